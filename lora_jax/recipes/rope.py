"""Rotary positions: the angle by which each pair of a head's coordinates is turned for each position.

Su et al. 2021, "RoFormer", arXiv 2104.09864. Published models stretch the angles for longer texts in three ways: all by
one factor ("linear"; Chen et al. 2023, arXiv 2306.15595), by parts of the spectrum ("yarn"; Peng et al. 2023, arXiv
2309.00071), and by parts of the spectrum as Llama 3.1 does ("llama3").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError, short

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = (
    *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate"),
)
_KEYS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3, "yarn": _YARN}
_FLAGS = ("truncate",)


@dataclass(frozen=True)
class Rope:
    """The positions of some layers.

    Args:
        theta: the base: pair i of R / 2 turns by theta^(-2 i / R) for each position.
        kind: "default", "linear", "llama3" or "yarn".
        settings: further numbers of the kind, by their names in config.json, in order.
    """

    theta: float
    kind: str = "default"
    settings: tuple[tuple[str, Any], ...] = ()

    def rates(self, head_dim: int) -> np.ndarray[Any, Any]:
        """Return the angles for each position, fp64 [R / 2]."""
        plain = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        given = dict(self.settings)
        if self.kind == "linear":
            return plain / given["factor"]
        if self.kind == "llama3":
            return plain * _llama3(plain, **given)
        if self.kind == "yarn":
            return plain * _yarn(head_dim, self.theta, given)
        return plain

    @property
    def amplitude(self) -> float:
        """Return what sine and cosine are multiplied by."""
        given = dict(self.settings)
        if self.kind != "yarn":
            return 1.0
        if given.get("attention_factor") is not None:
            return float(given["attention_factor"])
        factor, ours, all_dims = given["factor"], given.get("mscale"), given.get("mscale_all_dim")
        if ours and all_dims:
            return _entropy_scale(factor, ours) / _entropy_scale(factor, all_dims)
        return _entropy_scale(factor)


def _llama3(
    rates: np.ndarray[Any, Any],
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> np.ndarray[Any, Any]:
    """Return what each rate is multiplied by: 1 if it turns often within the original length, 1 / factor if never."""
    turns = original_max_position_embeddings * rates / (2 * np.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return kept + (1 - kept) / factor


def _yarn(head_dim: int, theta: float, given: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return what each rate is multiplied by: a ramp from 1 down to 1 / factor along the pairs of coordinates."""

    def pair(turns: float) -> float:
        """Return the pair that turns so many times within the original length."""
        length = given["original_max_position_embeddings"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(given.get("beta_fast") or 32), pair(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 1e-3), 0, 1)
    return 1 - ramp + ramp / given["factor"]


def _entropy_scale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(where: str, facts: Mapping[str, Any], theta: float, length: int) -> Rope:
    """Return the positions that an entry of config.json describes.

    Args:
        where: what it is, for messages.
        facts: the entry: `rope_parameters` of transformers 5, or `rope_scaling` of transformers 4.
        theta: the base, if the entry has none.
        length: the longest text of the model, which is the original one if the entry has none.

    Raises:
        LoraError: another kind, a key that the kind does not have, or one that is missing or no number above 0.
    """
    kind = facts.get("rope_type") or facts.get("type") or "default"
    if kind not in _KEYS:
        raise LoraError(f"{where}: rope_type is {short(kind)}, expected one of {', '.join(_KEYS)}.")
    keys = _KEYS[kind]
    if unknown := [key for key in facts if key not in (*keys, *_COMMON) and facts[key] is not None]:
        raise LoraError(
            f"{where}: {short(unknown[0])} is {short(facts[unknown[0]])}, which positions of kind {kind!r} do not "
            f"have; known are {', '.join((*_COMMON, *keys))}."
        )
    if facts.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise LoraError(f"{where}: partial_rotary_factor is {short(facts['partial_rotary_factor'])}, expected 1.")
    given = {key: facts[key] for key in keys if facts.get(key) is not None}
    if "original_max_position_embeddings" in keys:
        given.setdefault("original_max_position_embeddings", length)
    if kind == "yarn" and "factor" not in given:
        given["factor"] = length / given["original_max_position_embeddings"]
    needed = keys if kind in ("linear", "llama3") else ()
    if missing := [key for key in needed if key not in given]:
        raise LoraError(f"{where}: positions of kind {kind!r} lack {', '.join(missing)}.")
    base = facts.get("rope_theta") or theta
    for key, value in {"rope_theta": base, **given}.items():
        fits = isinstance(value, bool) if key in _FLAGS else _is_above_zero(value)
        if not fits:
            raise LoraError(
                f"{where}: {key} is {short(value)}, expected {'a flag' if key in _FLAGS else 'a number above 0'}."
            )
    if kind == "llama3" and given["high_freq_factor"] == given["low_freq_factor"]:
        raise LoraError(f"{where}: high_freq_factor and low_freq_factor are both {given['low_freq_factor']}.")
    return Rope(float(base), kind, tuple(sorted(given.items())))


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
