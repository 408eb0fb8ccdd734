"""Kinds of adapters in the files of HF PEFT: which tensors of a module are which arrays of an adapter.

PEFT's factors are those of torch's weights: W' = W + s B A, with A [r, in] and B [out, r], which are our A and B
transposed. In between they are kept in torch's layout, by the names that our arrays have.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.loha import LohaAdapter
from lora_jax.adapters.lokr import LokrAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.vera import VeraAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout
from lora_jax.interop.key_map import Array, Placed

Arrays = dict[str, Array]

OF_RANK, OF_OUTPUTS = ("stack", "rank"), ("stack", "outputs")  # layouts of vectors, which torch has as they are


class Kind(NamedTuple):
    adapter: type[Adapter]
    names: Mapping[str, str]  # how the tensor of each of our arrays is called in its module
    modules: tuple[str, ...]  # kinds of modules that PEFT has it for
    pairs: tuple[tuple[str, str], ...] = ()  # our arrays that are a factor A and its B
    scaled: str = ""  # the array that a scale can be put into
    parts: bool = True  # the outputs of a module can be several parameters of ours


class Module(NamedTuple):
    """What a file holds for one module: of LoRA A [r, in] and B [out, r]."""

    arrays: Arrays
    scale: float

    def folded(self, kind: Kind, scale: float) -> "Module":
        """The same with another scale."""
        if scale == self.scale:
            return self
        array = self.arrays[kind.scaled]
        return Module(self.arrays | {kind.scaled: array * np.asarray(self.scale / scale, array.dtype)}, scale)


_MATRICES = ("linear", "conv1d")
_FACTORS = (*_MATRICES, "conv", "embedding")
_AB = {"a": "lora_A.weight", "b": "lora_B.weight"}
_TABLE_AB = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_LOHA = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
_LOKR = {"w1": "lokr_w1", "a": "lokr_w2_b", "b": "lokr_w2_a"}
_ADALORA = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}
_VERA = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
KINDS = {
    "LORA": Kind(LoraAdapter, _AB, (*_FACTORS, "experts", "experts_transposed"), (("a", "b"),), "b"),
    "DORA": Kind(DoraAdapter, _AB | {"m": "lora_magnitude_vector"}, _FACTORS, (("a", "b"),), "b"),
    "ADALORA": Kind(AdaLoraAdapter, _ADALORA, _MATRICES, (("a", "b"),), "e"),
    "LOHA": Kind(LohaAdapter, _LOHA, ("linear", "conv"), (("a1", "b1"), ("a2", "b2")), "b2"),
    "LOKR": Kind(LokrAdapter, _LOKR, ("linear",), (), "w1", parts=False),
    "VERA": Kind(VeraAdapter, _VERA, _MATRICES, parts=False),
}
# What any kind of adapter of PEFT's has, this version's or not.
_OF_ADAPTERS = re.compile(
    r"(.*\.)?(lora_(magnitude_vector|[AB](\.(weight|bias))?|E|embedding_[AB]|diag|velora.*|arrow.*|monteclora.*)"
    r"|token_adapter\..+|(hada|lokr)_\w+|vera_\w+)"
)
_LACKING = {  # what forms that this version lacks begin with, and how PEFT is told to do without
    "LOHA": {"hada_t": "use_effective_conv2d=False"},
    "LOKR": {"lokr_t": "use_effective_conv2d=False", "lokr_w1_": "decompose_both=False"},
}


def field_of(kind: str, name: str) -> tuple[str, str] | None:
    """The module and the array that a tensor is; None if it is none of an adapter.

    Raises:
        LoraError: it is one of another kind of adapter, or of a form that this version lacks.
    """
    endings = list(KINDS[kind].names.items())
    if kind in ("LORA", "DORA"):
        endings += _TABLE_AB.items()
    if kind == "LOKR":
        endings.append(("a", "lokr_w2"))  # whole, without a B
    own = name.rpartition(".")[2]
    for field, ending in endings:
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), field
    for start, option in _LACKING.get(kind, {}).items():
        if own.startswith(start):
            raise LoraError(f"of a form of {kind} that this version does not have: train it with {option}")
    if _OF_ADAPTERS.fullmatch(name):
        raise LoraError(f"which is not of {kind}, the kind that its config says")
    return None


def problem(kind: str, arrays: Arrays) -> str | None:
    """Why these are not the arrays of one module: what is wrong with it."""
    names = KINDS[kind].names
    needed = [field for field in names if not (kind == "LOKR" and field == "b")]
    if missing := [names[field] for field in needed if field not in arrays]:
        found = ", ".join(names[field] for field in names if field in arrays)
        return f"has only {found}, and not {', '.join(missing)}"
    for a, b in KINDS[kind].pairs:
        one, other = arrays[a], arrays[b]
        if (
            one.ndim < 2
            or other.ndim != one.ndim
            or one.shape[0] != other.shape[1]
            or 0 in (*one.shape[1:], len(other))
        ):
            return f"has factors {list(one.shape)} and {list(other.shape)}, of no common rank"
    if kind == "LOKR":
        return _problem_of_lokr(arrays)
    for field, shape in _expected(kind, arrays).items():
        if arrays[field].shape != shape:
            return f"has {names[field]} of shape {list(arrays[field].shape)}, expected {list(shape)}"
    if 0 in [array.size for array in arrays.values()] and kind != "ADALORA":  # which may leave nothing of a module
        return "has factors of rank 0"
    return None


def _expected(kind: str, arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """The shapes that the others have to have by those of the first factors."""
    if kind == "VERA":
        return {field: (arrays[field].size,) for field in _VERA}
    first, last = KINDS[kind].pairs[0]
    (rank, *_), (outputs, *_) = arrays[first].shape, arrays[last].shape
    window = [1] * (arrays[first].ndim - 2)
    found: dict[str, tuple[int, ...]] = {}
    if kind == "ADALORA":
        found["e"] = (rank, 1)
    if kind == "DORA":
        found["m"] = (1, outputs, *window) if window else (outputs,)
    if kind == "LOHA":
        found |= {"a2": arrays["a1"].shape, "b2": arrays["b1"].shape}
    return found


def _problem_of_lokr(arrays: Arrays) -> str | None:
    shapes = {_LOKR[field]: array.shape for field, array in arrays.items()}
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        return f"has {listed}, expected matrices"
    if "b" in arrays and arrays["b"].shape[1] != arrays["a"].shape[0]:
        return f"has {listed}, of no common rank"
    return None


def rank_of(kind: str, arrays: Arrays) -> int | None:
    """r of one module, all experts together; None for LoKr with a whole second factor, which has none."""
    if kind == "LOKR":
        return len(arrays["a"]) if "b" in arrays else None
    return len(arrays["d"] if kind == "VERA" else arrays[KINDS[kind].pairs[0][0]])


def inputs_of(kind: str, arrays: Arrays) -> int:
    """The number of inputs of one module, without those of a window; VeRA does not tell."""
    if kind == "LOKR":
        return arrays["w1"].shape[1] * arrays["a"].shape[1]
    return arrays[KINDS[kind].pairs[0][0]].shape[1]


def outputs_of(kind: str, arrays: Arrays) -> int:
    """The number of outputs of one module."""
    if kind == "LOKR":
        return len(arrays["w1"]) * (len(arrays["b"]) if "b" in arrays else len(arrays["a"]))
    return len(arrays["b"] if kind == "VERA" else arrays[KINDS[kind].pairs[0][1]])


def from_torch(kind: str, place: Placed, arrays: Arrays, start: int) -> Arrays:
    """Our arrays of one module, whose outputs in the module begin at `start`; without the axes of stacked modules.

    Raises:
        LoraError: the shapes are not those of our parameter's factors; a kind of module that PEFT has none for.
    """
    words, sizes = place.inner()
    window = [size for word, size in zip(words, sizes, strict=True) if word == "window"]
    outputs = [size for word, size in zip(words, sizes, strict=True) if word == "out"]
    if not KINDS[kind].parts and (place.entry.kind not in KINDS[kind].modules or place.entry.part is not None):
        raise LoraError(f"{place.path!r} is not a whole linear layer by the key map, and {kind} is read for these.")
    if kind == "LOKR":
        _check_lokr(place, arrays)
        return {field: array.T for field, array in arrays.items()}
    ours = {}
    for a, b in KINDS[kind].pairs:
        factor = arrays[a]
        if window and factor.ndim == 2 and factor.shape[1] % math.prod(window) == 0:  # in and window in one
            factor = factor.reshape(len(factor), -1, *window)
        ours[a], ours[b] = place.factors_from_torch(factor, arrays[b], start)
    for field, layout in KINDS[kind].adapter.layout.items():
        vector = arrays[field].reshape(-1)
        if layout == OF_RANK:
            ours[field] = vector
        elif layout == OF_OUTPUTS and len(vector) >= start + math.prod(outputs):
            ours[field] = vector[start : start + math.prod(outputs)].reshape(outputs)
        elif layout == OF_OUTPUTS:
            raise _does_not_fit(place, {field: arrays[field]})
    return ours


def _check_lokr(place: Placed, arrays: Arrays) -> None:
    if (inputs_of("LOKR", arrays), outputs_of("LOKR", arrays)) != place.axes.fans(place.shape)[1:]:
        raise _does_not_fit(place, arrays)


def _does_not_fit(place: Placed, arrays: Arrays) -> LoraError:
    shapes = " and ".join(str(list(array.shape)) for array in arrays.values())
    return LoraError(
        f"{next(iter(place.names.values()))} has {shapes}, which do not fit {place.path!r} of shape "
        f"{list(place.shape)}: another model, or another key map."
    )


def to_torch(kind: str, place: Placed, ours: Arrays) -> Arrays:
    """The arrays of one module, in torch's layout, from ours."""
    if kind == "LOKR":
        return {field: array.T for field, array in ours.items()}
    arrays = {}
    for a, b in KINDS[kind].pairs:
        arrays[a], arrays[b] = place.factors_to_torch(ours[a], ours[b])
    vectors = [name for name, layout in KINDS[kind].adapter.layout.items() if layout in (OF_RANK, OF_OUTPUTS)]
    return arrays | {field: ours[field].reshape(-1) for field in vectors}


def tensors_of(kind: str, place: Placed, arrays: Arrays) -> Arrays:
    """The tensors of one module as PEFT shapes and names them."""
    names = dict(KINDS[kind].names)
    if place.entry.kind == "embedding":
        names |= _TABLE_AB
    if kind == "LOKR" and "b" not in arrays:
        names["a"] = "lokr_w2"
    shaped = dict(arrays)
    if kind == "LOHA":
        shaped = {field: array.reshape(len(array), -1) for field, array in arrays.items()}
    if kind in ("ADALORA", "DORA"):
        shaped |= {field: arrays[field].reshape(shape) for field, shape in _expected(kind, arrays).items()}
    return {names[field]: array for field, array in shaped.items()}


def ranks_along(layout: Layout, experts: int) -> int | None:
    """The axis of the rank in the array of a single module, in our layout."""
    name = next((part for part in layout if part in ("rank", "r")), None)
    if name is None:
        return None
    return -1 if layout[-1] == name else experts


def decompose_factor(found: Sequence[Arrays]) -> int | None:
    """The option by which PEFT takes the outputs and inputs of these modules of LoKr apart; None if there is none.

    -1 stands for the divisors nearest to the square root, the smaller one first; another one for itself where it
    divides the number, and else for the largest of the smaller divisors that it is not below. A second factor is whole
    just where the rank is at least half of its longer side.
    """
    pairs = []
    for arrays in found:
        (q, p), m, n = arrays["w1"].shape, arrays["a"].shape[1], outputs_of("LOKR", arrays) // len(arrays["w1"])
        if "b" in arrays and len(arrays["a"]) >= max(m, n) / 2:
            return None
        pairs += [(q, n), (p, m)]
    for factor in (-1, *sorted({first for first, _ in pairs})):
        if all(first == _smaller_divisor(first * second, factor) for first, second in pairs):
            return factor
    return None


def _smaller_divisor(size: int, factor: int) -> int:
    if factor > 0 and size % factor == 0:
        return factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(n for n in range(most, 0, -1) if size % n == 0)
