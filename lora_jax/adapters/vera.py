"""VeRA: W' = W + A diag(d) B diag(b), with random A and B that all weights share, and only the vectors d and b trained.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. A and B belong to the program and
not to the adapters: no step copies them, and no file has to hold them. They are the ones that HF PEFT draws.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.arguments import check_dtype, check_rank
from lora_jax.adapters.factored import Compact
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.stacked_rule import StackedRule
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Vera(StackedRule):
    """W' = W + A diag(d) B diag(b), A [inputs, rank] and B [rank, outputs] being cut out of two shared matrices.

    All weights of a plan that have the same `Vera` share A and B, which are as wide as the widest of them: with other
    weights in the plan they may be others.

    Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    Args:
        rank: of A and B, at least 1. It costs few parameters, and 256 is usual; as of LoRA's, time grows with it.
        seed: of A and B, which start as Kaiming's uniform distribution says.
        start: what the entries of d start at; those of b start at zero.
        dtype: of d and b.
        widths: the largest numbers of inputs and of outputs among the weights. `lora.plan` fills it in.
        stack: as of `Lora`.

    Raises:
        LoraError: an argument that is not of this kind.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Vera(rank=16)})
    >>> lora.init(jax.random.key(0), params, plan)["w"]
    VeraAdapter(d 16, b 4, inputs (6,), outputs (4,), seed 0, widths (6, 4))
    """

    rank: int = 256
    seed: int = 0
    start: float = 0.1
    dtype: Any = jnp.float32
    widths: tuple[int, int] | None = None

    shares = MappingProxyType({"outputs": "d", "inputs": "b"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype("Vera", self.dtype)
        if callable(self.rank):
            raise LoraError("Vera(rank=...) is a whole number: all weights share A and B.")
        check_rank("Vera", self.rank)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise LoraError(f"Vera(seed={self.seed!r}): the seed is a whole number of 32 bits, such as 0.")
        if isinstance(self.start, bool) or not isinstance(self.start, int | float) or not math.isfinite(self.start):
            raise LoraError(f"Vera(start={self.start!r}): d starts at a finite number, such as 0.1.")

    def __str__(self) -> str:
        return f"Vera(rank={self.rank}, seed={self.seed}{self.of_stack})"

    def among(self, fans: Iterable[tuple[int, int]]) -> Self:
        if self.widths is not None:
            return self
        inputs, outputs = zip(*fans, strict=True)
        return dataclasses.replace(self, widths=(max(inputs), max(outputs)))

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        _, d, k = axes.fans(shape)
        if self.widths is None or (d <= self.widths[0] and k <= self.widths[1]):
            return None
        return f"Vera(widths={self.widths}) has no room for {d} inputs and {k} outputs: leave `widths` out"

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        """Return the vectors as they start.

        Raises:
            LoraError: the rule is of no plan, so that nobody has said which weights share A and B.
        """
        if self.widths is None:
            raise LoraError("Vera has to know all weights that share A and B: make its plan with lora.plan.")
        stack, inputs, outputs = axes.sizes(w.shape)
        d = jnp.full((*stack, self.rank), self.start, self.dtype)
        b = jnp.zeros((*stack, *outputs), self.dtype)
        return VeraAdapter(d, b, axes, inputs, outputs, self.seed, self.widths)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        _, d, k = axes.fans(shape)
        return 2 * self.rank * (rows[0] * d + rows[1] * k)


@register_kind("vera")
@dataclass(frozen=True)
class VeraAdapter(Compact):
    """The vectors of one weight, and which A and B they are for.

    Attributes:
        d: the vector between A and B, fp32 [*stack, r].
        b: the vector after B, fp32 [*stack, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        inputs: the sizes of W's axes of inputs.
        outputs: the sizes of W's axes of outputs.
        seed: of A and B.
        widths: the numbers of inputs and outputs that A and B were drawn for.
    """

    d: jax.Array  # [*stack, r]
    b: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})
    seed: int = field(metadata={"static": True})
    widths: tuple[int, int] = field(metadata={"static": True})

    layout = MappingProxyType({"d": ("stack", "rank"), "b": ("stack", "outputs")})
    shares_traces = False  # A and B are constants: one trace of several products would hold them apart from the program

    def to_lora(self) -> LoraAdapter:
        """Return A as a constant, and B with all that is trained."""
        stack, r = self.d.shape[:-1], self.d.shape[-1]
        a, b = map(jnp.asarray, _cut_out(self.seed, r, self.widths, self.inputs, self.outputs, self.d.dtype))
        if stack:
            a, b = (jnp.broadcast_to(one, (*stack, *one.shape)) for one in (a, b))
        d = self.d.reshape(*self.d.shape, *[1] * len(self.outputs))
        return LoraAdapter(a, d * b * jnp.expand_dims(self.b, len(stack)), self.axes, 1.0)

    def scale_by(self, factor: jax.Array) -> "VeraAdapter":
        return dataclasses.replace(self, b=self.b * factor.astype(self.b.dtype))


@functools.lru_cache(maxsize=64)
def _cut_out(
    seed: int, rank: int, widths: tuple[int, int], inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return A [*inputs, rank] and B [rank, *outputs], the same arrays every time: programs hold equal objects once."""
    a, b = shared_projections(seed, rank, *widths)
    a = a[: math.prod(inputs)].reshape(*inputs, rank)
    b = b[:, : math.prod(outputs)].reshape(rank, *outputs)
    return a.astype(dtype, copy=False), b.astype(dtype, copy=False)


@functools.lru_cache(maxsize=8)
def shared_projections(seed: int, rank: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A [inputs, rank] and B [rank, outputs] in fp32, bit by bit as HF PEFT draws them from its key.

    U(-c, c) with c = sqrt(6 / inputs) for A and sqrt(6 / rank) for B, from one Mersenne Twister, A first.
    """
    stream = np.random.RandomState(seed)

    def uniform(rows: int, columns: int) -> np.ndarray:
        bound = np.float32(math.sqrt(3) * math.sqrt(2) / math.sqrt(columns))
        u = (stream.randint(0, 2**32, rows * columns, dtype=np.uint32) & 0xFFFFFF) * 2.0**-24
        drawn = u * np.float64(bound + bound) - np.float64(bound)  # in fp64, and rounded once
        return drawn.astype(np.float32).reshape(rows, columns)

    a, b = uniform(rank, inputs), uniform(outputs, rank)
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
