"""The `.lora.h5` files of keras-hub: `backbone.save_lora_weights`, read and written.

    lora/vars/rank
    lora/<index>/vars/lora_kernel_a [*kernel without its last axis, r], lora_kernel_b [r, last axis]

The index is that of the layer among all layers of the backbone that have weights, and the kernel's change is
alpha / rank * a @ b, along the last axis alone. Of a kernel [d, heads, size] that is a LoRA for each head, and all have
the same b: as a LoRA of the whole kernel it has heads * r ranks, and b once for each head.

Read from keras-hub 0.32 (`models/backbone.py`) and Keras 3.15 (`layers/core/einsum_dense.py`, `saving/saving_lib.py`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.checkpoints.failures import not_written
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_adapter_dict, check_is
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.core.targets import Plan
from lora_jax.core.untrusted import open_file
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.common_rank import has_grown

ENDING = ".lora.h5"
LARGEST_RANK = 2**16
_A_PLAN = "a plan, lora.plan(model.stateless_call, params, batch, rules=...)"


def load_keras_lora(
    path: str | Path, plan: Plan, layers: Sequence[str], *, alpha: float | None = None
) -> dict[str, Adapter]:
    """Read the adapters that keras-hub has saved.

    Args:
        path: of the file, `.lora.h5`.
        plan: of just the weights that have adapters; their paths end in `<layer>/kernel`.
        layers: the paths of all layers of the backbone that have weights, in its order, by which the file names them:
            `[layer.path for layer in backbone._flatten_layers(include_self=False) if layer.weights]`.
        alpha: of `enable_lora`, which the file does not keep; the rank by default, as keras-hub has it.

    Returns:
        `{path: LoraAdapter}`. Where a kernel has outputs beside its last axis, it has the ranks of all of them.

    Raises:
        LoraError: h5py is missing; the file is damaged or none of keras-hub; a layer is none of the plan's, or the plan
            has one that the file lacks; factors do not fit.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> params, x = {"m": {"dense": {"kernel": jnp.ones((4, 3))}}}, jnp.ones((1, 4))
    >>> rules = {".*": lora.Lora(rank=2)}
    >>> plan = lora.plan(lambda p, x: x @ p["m"]["dense"]["kernel"], params, x, rules=rules)
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"m/dense/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_keras_lora(f"{folder}/adapter.lora.h5", adapters, layers=["norm", "dense"])
    ...     lora.load_keras_lora(f"{folder}/adapter.lora.h5", plan, layers=["norm", "dense"])
    {'m/dense/kernel': LoraAdapter(a 4x2, b 2x3)}
    """
    check_is("load_keras_lora(path, plan, layers)", "plan", plan, Plan, _A_PLAN)
    _check_alpha(alpha)
    path = Path(path)
    with open_file(path):  # before h5py does: no folder, no pipe, and the reason if it cannot be read
        pass
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            return _read(path, file, plan, layers, alpha)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"{path} cannot be read: {short(str(error))}.") from error


def save_keras_lora(
    path: str | Path, adapters: Mapping[str, Adapter], layers: Sequence[str], *, alpha: float | None = None
) -> None:
    """Write adapters for `backbone.load_lora_weights` of keras-hub.

    It loads them into layers with `enable_lora(rank)`, all of one rank, and it wants a factor for each of these: give
    adapters for all of them.

    Args:
        path: of the new file, which has to end in `.lora.h5`.
        adapters: `{path: adapter}` of LoRA, or of what is one in another form; smaller ranks are filled up with zeros.
        layers: as of `load_keras_lora`.
        alpha: of `enable_lora`; the rank by default, and then scales are multiplied into B.

    Raises:
        LoraError: an adapter is no LoRA, or is of a kernel with outputs beside its last axis and is not the same for
            each of them, which Keras has no place for; its layer is not among `layers`; the file cannot be written.

    >>> import h5py, jax.numpy as jnp, tempfile, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"m/dense/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_keras_lora(f"{folder}/adapter.lora.h5", adapters, layers=["norm", "dense"])
    ...     with h5py.File(f"{folder}/adapter.lora.h5") as file:
    ...         file["lora/1/vars/lora_kernel_a"].shape  # of layer 1
    (4, 2)
    """
    check_adapter_dict("save_keras_lora(path, adapters, layers)", adapters)
    _check_alpha(alpha)
    path = Path(path)
    if not path.name.endswith(ENDING):
        raise LoraError(f"{path} has to end in {ENDING}: keras-hub reads no other files.")
    if not adapters:
        raise LoraError("there are no adapters to save.")
    numbers = {_layer_of(name, layers): name for name in adapters}
    factors = {index: _factors(name, adapters[name]) for index, name in sorted(numbers.items())}
    rank = max(a.shape[-1] for a, _ in factors.values())
    h5py = _h5py()
    with written_file(path) as new:
        try:
            with h5py.File(new, "w") as file:
                file["lora/vars/rank"] = rank
                for index, (a, b) in factors.items():
                    wide = rank - a.shape[-1]
                    where = f"lora/{index}/vars"
                    file[f"{where}/lora_kernel_a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, wide)])
                    file[f"{where}/lora_kernel_b"] = np.pad(b, [(0, wide), (0, 0)]) * np.float32(rank / (alpha or rank))
        except OSError as error:
            raise not_written(path, error) from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise LoraError("the files of keras-hub need h5py: pip install 'lora_jax[keras]'.") from error
    return h5py


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf
    ):
        raise LoraError(f"alpha is {short(alpha)}, expected a number above 0.")


# Reading --------------------------------------------------------------------------------------------------------------


def _read(path: Path, file: Any, plan: Plan, layers: Sequence[str], alpha: float | None) -> dict[str, Adapter]:
    rank = int(_dataset(path, file, "lora/vars/rank", (), "iu"))
    if not 1 <= rank <= LARGEST_RANK:
        raise LoraError(f"{path} has rank {rank}, expected 1 to {LARGEST_RANK}.")
    if len(file["lora"]) > len(layers) + 1:
        raise LoraError(f"{path} has {len(file['lora'])} entries, and the backbone {len(layers)} layers.")
    adapters: dict[str, Adapter] = {}
    for name in sorted(file["lora"], key=str):  # bytes, where it is no text
        if name == "vars":
            continue
        is_number = isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 10
        if not is_number or int(name) >= len(layers):
            raise LoraError(f"{path} has adapters of layer {short(str(name))}, and `layers` has {len(layers)}.")
        own = _planned(path, layers[int(name)], plan)
        target = plan[own]
        where = f"lora/{name}/vars"
        a = _dataset(path, file, f"{where}/lora_kernel_a", (*target.shape[:-1], rank), "f")
        b = _dataset(path, file, f"{where}/lora_kernel_b", (rank, target.shape[-1]), "f")
        adapters[own] = _adapter(path, own, target.shape, target.axes, a, b, (alpha or rank) / rank)
    if missing := [own for own in plan if own not in adapters]:
        raise LoraError(f"{path} has no factors of {short(missing[0])}, and of {len(missing) - 1} more of the plan.")
    return {own: adapters[own] for own in plan}


def _dataset(path: Path, file: Any, name: str, shape: tuple[int, ...], kinds: str) -> Array:
    """Return an array of the file, whose shape is known before any of it is read.

    Raises:
        LoraError: it is not there, is of another shape or kind, or would be read from another file.
    """
    h5py = _h5py()
    node, parts = file, name.split("/")
    for i, part in enumerate(parts):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise LoraError(f"{path} has no {'/'.join(parts[: i + 1])}, or one that leads elsewhere.")
        node = node[part]
    if not isinstance(node, h5py.Dataset) or node.is_virtual or node.external:
        raise LoraError(f"{path}: {name} is no array of this file.")
    if node.shape != shape or node.dtype.kind not in kinds or node.dtype.itemsize > 8:
        raise LoraError(f"{path}: {name} is {node.dtype} {short(node.shape)}, expected {list(shape)}.")
    return np.asarray(node[()], node.dtype.newbyteorder("="))  # a file may have the bytes of each number reversed


def _planned(path: Path, layer: str, plan: Plan) -> str:
    """Return the weight of the plan that is the kernel of a layer."""
    kernel = f"{layer}/kernel"
    found = [own for own in plan if own == kernel or own.endswith(f"/{kernel}")]
    if len(found) != 1:
        near = ", ".join(nearest(kernel, plan, n=3)) or "none"
        raise LoraError(f"{path} has factors of {short(kernel)}, which the plan does not have; the nearest are {near}.")
    return found[0]


def _adapter(
    path: Path, own: str, shape: tuple[int, ...], axes: KernelAxes, a: Array, b: Array, scale: float
) -> Adapter:
    """Return the LoRA of a kernel, with as many ranks as it has outputs beside its last axis."""
    others = _outputs_beside_the_last(own, len(shape), axes, str(path))
    sizes, rank, last = [shape[axis] for axis in others], len(b), shape[-1]
    count = math.prod(sizes)
    if has_grown(count * rank * count * last, a.size + b.size):
        raise LoraError(f"{path}: {short(own)} would have {count * rank:,} ranks, more than memory is for: merge it.")
    inputs = [shape[axis] for axis in axes.inputs]
    ours_a = a.transpose(*axes.inputs, *others, a.ndim - 1).reshape(*inputs, count * rank)
    blocks = np.einsum("ij,rk->irjk", np.eye(count, dtype=b.dtype), b)
    ours_b = blocks.reshape(count * rank, *sizes, last)
    return LoraAdapter(jnp.asarray(ours_a), jnp.asarray(ours_b), axes, scale)


def _outputs_beside_the_last(own: str, ndim: int, axes: KernelAxes, where: str) -> tuple[int, ...]:
    """Return the axes of outputs but for the last axis of the kernel.

    Raises:
        LoraError: that is none of them, or the kernel is a stack.
    """
    if axes.stack or not axes.outputs or axes.outputs[-1] != ndim - 1:
        raise LoraError(f"{where}: {short(own)} has {axes}, and Keras has factors of outputs in the last axis.")
    return axes.outputs[:-1]


# Writing --------------------------------------------------------------------------------------------------------------


def _layer_of(name: str, layers: Sequence[str]) -> int:
    """Return the index of the layer that a path is the kernel of."""
    found = [i for i, layer in enumerate(layers) if name == f"{layer}/kernel" or name.endswith(f"/{layer}/kernel")]
    if len(found) != 1:
        near = ", ".join(nearest(name.removesuffix("/kernel"), layers, n=3)) or "none"
        raise LoraError(f"{short(name)} is the kernel of {len(found)} of the layers, expected one; like it are {near}.")
    return found[0]


def _factors(name: str, adapter: Adapter) -> tuple[Array, Array]:
    """Return a [*kernel without its last axis, r] and b [r, last axis] with a scale of 1."""
    lora = adapter.to_lora() if isinstance(adapter, Adapter) else None
    if not isinstance(lora, LoraAdapter):
        raise LoraError(f"{short(name)} is a {type(adapter).__name__}, and Keras has LoRA alone: merge it instead.")
    axes, shape = lora.axes, lora.kernel_shape()
    others = _outputs_beside_the_last(name, len(shape), axes, "save_keras_lora")
    a = np.asarray(jax.device_get(lora.a), np.float32)
    b = np.asarray(jax.device_get(lora.b), np.float32) * np.float32(lora.scale)
    sizes = [shape[axis] for axis in others]
    count, ranks = math.prod(sizes), a.shape[-1]
    rank = ranks // count
    blocks = b.reshape(count, rank, count, shape[-1]) if ranks == count * rank and rank else None
    own = None if blocks is None else blocks[0, :, 0]
    if own is None or blocks is None or not np.array_equal(blocks, np.einsum("ij,rk->irjk", np.eye(count), own)):
        raise LoraError(
            f"{short(name)} of shape {list(shape)} has {count} outputs beside its last axis, and Keras one B for all: "
            "only adapters that came from Keras, and were not trained on, go back. Merge it instead."
        )
    inputs = [shape[axis] for axis in axes.inputs]
    order = [*axes.inputs, *others]  # of the axes of `a` as it is here
    whole = a.reshape(*inputs, *sizes, rank).transpose(*np.argsort(order), len(order))
    return whole, own
