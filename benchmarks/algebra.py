"""Sums of adapters are exact, and small again: errors of `combine`, `compress`, PEFT's ways and TIES, as tables.

    python benchmarks/algebra.py                 # matrices of 1,024 x 1,024
    python benchmarks/algebra.py --size 128

Adapters of one weight, of different ranks and scales: half of each one's factors is common to all, half its own, and
the singular values fall. All numbers are relative to the Frobenius norm of the exact sum of changes, formed in fp64.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax as lora

AXES = lora.KernelAxes((), (0,), (1,))
Parts = list[tuple[dict[str, lora.Adapter], float]]


@dataclass(frozen=True)
class Config:
    """Measure the errors of sums, of smaller ranks, and of ways to merge."""

    size: int = 1024  # inputs and outputs
    rank: int = 16  # of the smallest part; the others have two and three times that
    seed: int = 0


def parts_of(c: Config, equal_ranks: bool = False) -> Parts:
    """Return three adapters, of LoRA and rsLoRA, with weights of both signs."""
    rng = np.random.default_rng(c.seed)
    most = 3 * c.rank
    common = [rng.normal(size=(c.size, most)), rng.normal(size=(most, c.size))]
    found: Parts = []
    for i, weight in enumerate((0.7, -0.3, 1.0)):
        rank = c.rank if equal_ranks else (i + 1) * c.rank
        fall = 0.9 ** np.arange(rank)
        a = (common[0][:, :rank] + rng.normal(size=(c.size, rank))) * fall
        b = common[1][:rank] + rng.normal(size=(rank, c.size))
        rule = lora.RsLora(rank, alpha=8) if i == 1 else lora.Lora(rank, alpha=2 * rank)
        small = [jnp.asarray(array / np.sqrt(c.size), jnp.float32) for array in (a, b)]
        found.append(({"w": lora.LoraAdapter(small[0], small[1], AXES, rule.scale)}, weight))
    return found


def dense(adapter: Any) -> Any:
    """Return the change of an adapter in fp64."""
    return float(adapter.scale) * np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64)


def exact(parts: Parts) -> Any:
    """Return the sum of dense changes."""
    return sum(weight * dense(adapters["w"]) for adapters, weight in parts)


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def sums(c: Config) -> dict[str, float]:
    """Return the error of each way to add up, of adapters of one rank."""
    parts = parts_of(c, equal_ranks=True)
    wanted = exact(parts)
    errors = {"combine": relative(dense(lora.combine(parts)["w"]), wanted)}
    for method in ("cat", "svd", "linear"):
        merged = lora.compose(parts, method, compat="peft")["w"]
        errors[f"PEFT's {method}"] = relative(dense(merged), wanted)
    return errors


def sum_of_lengths(c: Config) -> float:
    """Return the error of a sum of DoRA and LoRA, relative to the sum of changes."""
    w = np.asarray(jax.random.normal(jax.random.key(c.seed), (c.size, c.size)) / c.size**0.5)
    parts = parts_of(c)
    plain: Any = parts[0][0]["w"]
    m = jnp.asarray(1.5 * np.linalg.norm(w, axis=0), jnp.float32)
    parts[0] = ({"w": lora.DoraAdapter(plain.a, plain.b, m, AXES, plain.ratio)}, parts[0][1])

    def change(adapter: Any) -> Any:
        if not isinstance(adapter, lora.DoraAdapter):
            return dense(adapter)
        v = w.astype(np.float64) + dense(adapter)
        return v * np.asarray(adapter.m, np.float64) / np.linalg.norm(v, axis=0) - w

    total = lora.combine(parts, params={"w": jnp.asarray(w)})["w"]
    return relative(change(total), sum(weight * change(adapters["w"]) for adapters, weight in parts))


def smaller(c: Config) -> list[tuple[int, float, float, float]]:
    """Return for several ranks what `compress` leaves out, the least possible, and how far it is from the nearest."""
    parts = parts_of(c)
    wanted = exact(parts)
    total = lora.combine(parts)
    u, values, vt = np.linalg.svd(wanted)
    rows = []
    for rank in (c.rank // 2, c.rank, 2 * c.rank, 3 * c.rank, 4 * c.rank):
        nearest = (u[:, :rank] * values[:rank]) @ vt[:rank]
        small = dense(lora.compress(total, rank=rank)["w"])
        rows.append((rank, relative(small, wanted), relative(nearest, wanted), relative(small, nearest)))
    return rows


def held(c: Config, ranks: tuple[int, ...]) -> dict[str, list[float]]:
    """Return the share of the squared norm of merged changes that several ranks hold."""
    parts, found = parts_of(c), dict[str, list[float]]()
    ways: dict[str, Mapping[str, Any]] = {"sum": {}, "ties": {"density": 0.2}, "knots_ties": {"density": 0.2}}
    for method, options in ways.items():
        for rank in ranks:
            left: dict[str, Any] = {}
            lora.compose(parts, method, rank=rank, report=left.__setitem__, **options)
            found.setdefault(method, []).append(left["w"].energy)
    return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    for name, error in sums(c).items():
        print(f"{name:16} {error:.2e}")
    print(f"{'DoRA and LoRA':16} {sum_of_lengths(c):.2e}")
    total = lora.combine(parts_of(c))
    print(f"\ncompress from rank {6 * c.rank}: left out, the least possible, distance from the nearest")
    for rank, left_out, least, distance in smaller(c):
        print(f"{rank:4}  {left_out:8.4%}  {least:8.4%}  {distance:.1e}")
    change = dense(total["w"])
    ratios = sorted(
        seconds(lambda: np.linalg.svd(change)) / seconds(lambda: lora.compress(total, rank=c.rank)) for _ in range(3)
    )
    print(f"the decomposition of the whole change takes {ratios[1]:.0f} times as long")
    ranks = (c.rank, 2 * c.rank, 6 * c.rank)
    print(f"\nshare of the merged change that ranks {ranks} hold")
    for method, shares in held(c, ranks).items():
        print(f"{method:12}", *(f"{share:8.2%}" for share in shares))


if __name__ == "__main__":
    main()
