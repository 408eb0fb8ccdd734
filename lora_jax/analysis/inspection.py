"""`inspect`: what adapters do to each weight, as a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.analysis.spectrum import spectrum
from lora_jax.core.adapter import Adapter, AdapterWrapper, is_adapter
from lora_jax.core.argument_checks import TAKEN_BY_A_STEP, check_kept
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.by_path import ByPath
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import KINDS
from lora_jax.core.layout import of_weight
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.text import format_table


@dataclass(frozen=True)
class WeightSummary:
    """One adapted weight, and the change that its adapter makes.

    Attributes:
        path: of the weight.
        kind: of the adapter, as checkpoints call it: "lora", "dora", ...
        shape: of one matrix, [inputs, outputs]; of the whole weight, if the adapter takes it as no matrix.
        matrices: how many are stacked.
        parameters: the number of entries of the adapter's arrays.
        rank, scale: of A B and before it; None for kinds that are not W + s A B.
        norm: the Frobenius norm of the change, of all matrices together; None where it depends on W, as for `Dora`.
        effective_rank: the exponential of the entropy of the singular values' shares, which is r if all are equal (Roy
            and Vetterli 2007, "The effective rank"); the mean over the matrices that change.
        finite: whether no number of the adapter is a NaN or an infinity; if one is, the norm and the rank are NaN.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    matrices: int
    parameters: int
    rank: int | None
    scale: float | None
    norm: float | None
    effective_rank: float | None
    finite: bool


@dataclass(frozen=True, repr=False)
class Inspection(ByPath[WeightSummary]):
    """`{path: WeightSummary}` in the order of the paths; its text is a table.

    Attributes:
        weights: `{path: WeightSummary}`.
    """

    @property
    def parameters(self) -> int:
        """The number of entries of all adapters."""
        return sum(weight.parameters for weight in self.weights.values())

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the header and the cells of the table, of which the last five columns are numbers."""
        header = ["weight", "kind", "inputs, outputs", "matrices", "rank", "scale", "norm", "effective rank"]
        cells = [
            [w.path, w.kind, list(w.shape), w.matrices, "-" if w.rank is None else w.rank, number(w.scale),
             number(w.norm), "-" if w.effective_rank is None else f"{w.effective_rank:.2f}"]
            for w in self.weights.values()
        ]  # fmt: skip
        return header, cells

    def summary(self) -> str:
        """Return the line below the table."""
        return f"{len(self)} weights adapted, {self.parameters:,} parameters."

    def __repr__(self) -> str:
        return f"{format_table(*self.rows(), right=5)}\n{self.summary()}"


def inspect(adapters: Any) -> Inspection:
    """Return the rank and the scale of adapters, and the norm and effective rank of each weight's change.

    It computes in float64 on this host, without a weight and without forming A B.

    Args:
        adapters: `{path: adapter}`, or a tree that holds adapters, as a `TrainState`, of which those that are trained
            are taken, and what `lora.checkpoint.load(folder)` returns.

    Returns:
        An `Inspection`: `{path: WeightSummary}`, and a table when printed.

    Raises:
        LoraError: there are no adapters; they are traced, or only shapes; one is spread over several hosts.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"w": lora.LoraAdapter(a=jnp.eye(4, 2), b=jnp.eye(2, 3), axes=axes, ratio=3.0)}
    >>> print(lora.inspect(adapters))
    weight  kind  inputs, outputs  matrices  rank  scale   norm  effective rank
    ------  ----  ---------------  --------  ----  -----  -----  --------------
    w       lora  [4, 3]                  1     2      3  4.243            2.00
    1 weights adapted, 14 parameters.
    >>> lora.inspect(adapters)["w"].rank
    2
    """
    found = _adapters(adapters)
    if not found:
        raise LoraError(
            f"inspect takes adapters, found none in a {type(adapters).__name__}: give {{path: adapter}}, as lora.init "
            "makes them, or adapters, others = lora.checkpoint.load(folder)."
        )
    return Inspection({path: _summary(path, adapter) for path, adapter in sorted(found.items())})


def number(value: float | None) -> str:
    """Return a number of four digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def _adapters(tree: Any) -> dict[str, Adapter]:
    """Return the adapters of a tree by their paths."""
    if is_adapter(tree):
        return {"adapter": tree}
    tree = getattr(tree, "trainable", tree)  # of a state of training, whose optimizer has adapters of moments
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], Mapping):
        tree = tree[0]  # what is loaded, and others beside it
    if isinstance(tree, Mapping) and all(map(is_adapter, tree.values())):
        return dict(tree)
    names, nodes, _ = flatten_with_names(tree, is_leaf=is_adapter)
    return {name: node for name, node in zip(names, nodes, strict=True) if is_adapter(node)}


def _summary(path: str, adapter: Adapter) -> WeightSummary:
    while isinstance(adapter, AdapterWrapper):
        adapter = adapter.asked
    arrays = {name: _numbers(path, array) for name, array in adapter.arrays().items()}
    shape = adapter.kernel_shape()
    stack, d, k = adapter.axes.fans(shape)
    finite = all(bool(np.isfinite(array).all()) for array in arrays.values())
    size = sum(array.size for array in of_weight(arrays, adapter.layout).values())
    sides = (d, k) if adapter.axes.inputs and adapter.axes.outputs else tuple(shape)
    rank = scale = norm = effective = None
    factors = adapter.to_lora()
    if isinstance(factors, LoraAdapter):
        rank, scale = int(factors.a.shape[-1]), float(factors.scale)
        a, b = _numbers(path, factors.a).reshape(-1, d, rank), _numbers(path, factors.b).reshape(-1, rank, k)
        norm, effective, finite = spectrum(a, b, scale)
    elif isinstance(adapter, FullAdapter):
        norm = float(np.linalg.norm(arrays["delta"])) if finite else math.nan
    return WeightSummary(path, _kind(adapter), sides, stack, size, rank, scale, norm, effective, finite)


def _kind(adapter: Adapter) -> str:
    """Return the name of a kind in checkpoints, or of its class if it has none."""
    return next((name for name, kind in KINDS.items() if type(adapter) is kind), type(adapter).__name__)


def _numbers(path: str, array: Any) -> np.ndarray[Any, Any]:
    """Return an array on this host, in float64.

    Raises:
        LoraError: it has no numbers here.
    """
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct) or not hasattr(array, "dtype"):
        raise LoraError(
            f"{path!r} holds a {type(array).__name__} in the place of numbers: call inspect outside of jax.jit and "
            "other transforms, on adapters and not on their shapes."
        )
    check_kept([(path, array)], TAKEN_BY_A_STEP, "inspect(adapters): ")
    refuse_spread({path: array})
    return np.asarray(array).astype(np.float64)
