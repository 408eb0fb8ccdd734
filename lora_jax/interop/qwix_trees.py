"""Adapters in the trees of qwix, which tunix and MaxText train: two more leaves beside each kernel.

    layers/0/attn/q_proj/w          [D, heads, size]
    layers/0/attn/q_proj/w_lora_a   [D, r]            the stacked axes of the kernel, its contracted axes, the rank
    layers/0/attn/q_proj/w_lora_b   [r, heads, size]  the rank, its other axes

Products by `dot_general` flatten the contracted axes to one, and the others likewise; einsums do not, and have one B
for all matrices of a stack. Layers that a scan stacks along an axis of the kernel are along that axis of the factors.
The change of a kernel is alpha / r times their product; a tree has the rank and not alpha. Since paths are those of the
parameters, no key map is needed, and the axes are those of a plan.

Read from qwix 0.1.8 (`_src/providers/lora.py`), tunix 0.1.7 and MaxText 0.2.5 (`utils/lora_utils.py`,
`common/checkpointing.py`).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.checkpoints.failures import first_line
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_adapter_dict, check_is
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import flatten_with_names, nearest
from lora_jax.core.targets import Plan
from lora_jax.core.untrusted import read_json
from lora_jax.interop.key_map import Array

_A, _B = "_lora_a", "_lora_b"
_WRAPPERS = ("params", "model", "state")  # what paths of saved trees begin with, and those of parameters may
_A_PLAN = "a plan, lora.plan(model.apply, params, batch, rules=...)"
METADATA = "_CHECKPOINT_METADATA"  # of orbax
LARGEST_METADATA = 2**20  # bytes


class _Pair(NamedTuple):
    a: Any
    b: Any


def from_qwix(tree: Any, plan: Plan, *, alpha: float) -> dict[str, Adapter]:
    """Return the adapters that a tree of qwix holds, as tunix and MaxText train them.

    Args:
        tree: such as `nnx.state(model, nnx.LoRAParam)`, the "params" of a Linen model, or nested dicts of arrays.
            Leaves that are no factors, such as the kernels themselves, and states of optimizers are left out.
        plan: of the model without qwix's factors, with just the weights that have them; its paths are the kernels'.
        alpha: what the rules of qwix had; the scale is alpha / rank.

    Returns:
        `{path: LoraAdapter}`, for all weights of the plan.

    Raises:
        LoraError: a factor is of no planned weight, a planned weight has none, or they do not fit it.

    >>> import lora_jax as lora
    >>> params = {"up": {"kernel": jnp.ones((4, 6))}}
    >>> plan = lora.plan(lambda p, x: x @ p["up"]["kernel"], params, jnp.ones((1, 4)), rules={".*": lora.Lora(rank=2)})
    >>> tree = {"up": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 6))}}
    >>> adapters = from_qwix(tree, plan, alpha=8.0)
    >>> adapters["up/kernel"].a.shape, float(adapters["up/kernel"].scale)
    ((4, 2), 4.0)
    """
    check_is("from_qwix(tree, plan, alpha=...)", "plan", plan, Plan, _A_PLAN)
    _check_alpha(alpha)
    pairs = _pairs(tree)
    ours = {_bare(path): path for path in plan}
    if unknown := [name for name in pairs if name not in ours]:
        near = ", ".join(nearest(unknown[0], ours, n=3)) or "none"
        raise LoraError(
            f"the tree has factors of {short(unknown[0])}, and {len(unknown) - 1} more that the plan does not have: "
            f"plan these weights too. The nearest are {near}."
        )
    if missing := [path for name, path in ours.items() if name not in pairs]:
        raise LoraError(f"the tree has no factors of {short(missing[0])}, and of {len(missing) - 1} more of the plan.")
    return {path: _adapter(path, plan, pairs[name], alpha) for name, path in ours.items()}


def to_qwix(adapters: Mapping[str, Adapter], like: Any, *, alpha: float) -> Any:
    """Return a tree of qwix with these adapters, for a model of tunix or MaxText to go on with.

    Args:
        adapters: `{path: adapter}` of LoRA, or of what is one in another form.
        like: the tree that the model has, such as `nnx.state(model, nnx.LoRAParam)`, which says the shapes, the dtypes
            and the rank. Factors of smaller rank are filled up with zeros, and those that have no adapter become zeros.
        alpha: what the rules of qwix have; scales that differ from alpha / rank are multiplied into B.

    Returns:
        A tree like `like`, with other leaves for the factors: `nnx.update(model, tree)`.

    Raises:
        LoraError: an adapter is no LoRA, has a larger rank, or has no place in the tree.

    >>> import lora_jax as lora
    >>> axes = lora.KernelAxes((), (0,), (1,))
    >>> adapters = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 6)), axes, 2.0)}
    >>> like = {"up": {"kernel_lora_a": jnp.zeros((4, 2)), "kernel_lora_b": jnp.zeros((2, 6))}}
    >>> to_qwix(adapters, like, alpha=4.0)["up"]["kernel_lora_b"][:, 0]
    Array([1., 0.], dtype=float32)
    """
    check_adapter_dict("to_qwix(adapters, like, alpha=...)", adapters)
    _check_alpha(alpha)
    pairs = _pairs(like)
    own = {_bare(path): path for path in adapters}
    if unknown := [path for name, path in own.items() if name not in pairs]:
        near = ", ".join(nearest(_bare(unknown[0]), pairs, n=3)) or "none"
        raise LoraError(f"the tree has no factors of {short(unknown[0])}; the nearest that it has are {near}.")
    made: dict[str, Any] = {}
    for name, pair in pairs.items():
        factors = _factors(own[name], adapters[own[name]], pair, alpha) if name in own else _Pair(0.0, 0.0)
        for ending, factor, leaf in zip((_A, _B), factors, pair, strict=True):
            made[name + ending] = jnp.broadcast_to(jnp.asarray(factor, leaf.dtype), leaf.shape)
    names, leaves, treedef = flatten_with_names(like)
    changed = [made.get(_of_tree(name) or "", leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(treedef, changed)


def load_maxtext(folder: str | Path, plan: Plan, *, alpha: float | None = None) -> dict[str, Adapter]:
    """Read the adapters of a checkpoint of MaxText, or of another tree of qwix that orbax has saved.

    Args:
        folder: of one step, such as `checkpoints/200`, or the folder of its tree below that, `items`.
        plan: as of `from_qwix`; of scanned layers the kernels are stacked as MaxText has them.
        alpha: by default what the checkpoint's own metadata says, which MaxText writes and tunix does not.

    Returns:
        `{path: LoraAdapter}`.

    Raises:
        LoraError: there is no such checkpoint; it does not say alpha, or another one; as `from_qwix`.

    >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile, lora_jax as lora
    >>> params, x = {"up": {"kernel": jnp.ones((4, 6))}}, jnp.ones((1, 4))
    >>> plan = lora.plan(lambda p, x: x @ p["up"]["kernel"], params, x, rules={".*": lora.Lora(rank=2)})
    >>> tree = {"up": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 6))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    ...         checkpointer.save(f"{folder}/200/items", tree)
    ...     lora.load_maxtext(f"{folder}/200", plan, alpha=8.0)
    {'up/kernel': LoraAdapter(a 4x2, b 2x6)}
    """
    import orbax.checkpoint as ocp

    check_is("load_maxtext(folder, plan)", "plan", plan, Plan, _A_PLAN)
    folder = Path(folder).absolute()
    tree_folder = folder / "items" if (folder / "items").is_dir() else folder
    if not tree_folder.is_dir():
        raise LoraError(f"there is no folder {tree_folder}.")
    said = _alpha_in(folder)
    own = said if alpha is None else alpha
    if own is None:
        raise LoraError(f"{folder} does not say alpha: give the one of its training, load_maxtext(..., alpha=...).")
    if alpha is not None and said is not None and alpha != said:
        raise LoraError(f"{folder} was trained with alpha {said}, and alpha={alpha} is given: leave it out.")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            forms = _factors_alone(checkpointer.metadata(tree_folder).item_metadata.tree)
            # Shapes are checked before anything is read: zeros in them take no memory.
            from_qwix(jax.tree.map(lambda form: np.broadcast_to(np.float32(0), form.shape), forms), plan, alpha=own)
            whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), forms)
            args = ocp.args.PyTreeRestore(item=forms, restore_args=whole, partial_restore=True)
            tree = checkpointer.restore(tree_folder, args)
    except LoraError:
        raise
    except Exception as error:  # a damaged folder raises errors of many types
        raise LoraError(f"{tree_folder} is no tree that orbax has saved: {first_line(error)}.") from error
    return from_qwix(tree, plan, alpha=own)


def _factors_alone(forms: Any) -> dict[str, Any]:
    """Return the nested dicts of a saved tree with just the factors: a checkpoint may have the whole model beside."""
    found: dict[str, Any] = {}
    for path, form in jax.tree_util.tree_flatten_with_path(forms)[0]:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = "/".join(map(str, keys))
        if len(keys) == len(path) and _of_tree(name) is not None:
            node = found
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = form
    return found


def _alpha_in(folder: Path) -> float | None:
    """Return the alpha that MaxText writes beside a tree, or None."""
    for path in (folder / METADATA, folder.parent / METADATA):
        if os.path.lexists(path):
            found = read_json(path, LARGEST_METADATA, "metadata of orbax")
            for key in ("custom_metadata", "lora"):
                found = found.get(key) if isinstance(found, dict) else None
            alpha = found.get("lora_alpha") if isinstance(found, dict) else None
            if alpha is not None:
                if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                    raise LoraError(f"{path}: lora_alpha is {short(json.dumps(alpha))}, expected a number.")
                return float(alpha)
    return None


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < math.inf:
        raise LoraError(f"alpha is {short(alpha)}, expected a number that is not 0.")


def _pairs(tree: Any) -> dict[str, _Pair]:
    """Return the factors of each kernel, by its path without what wraps it.

    Raises:
        LoraError: there are none; one lacks its partner.
    """
    factors: dict[str, Any] = {}
    for name, leaf in zip(*flatten_with_names(tree)[:2], strict=True):
        if (own := _of_tree(name)) is not None:
            factors[own] = leaf
    found: dict[str, _Pair] = {}
    for name in factors:
        kernel = name.removesuffix(_A).removesuffix(_B)
        if kernel + _A not in factors or kernel + _B not in factors:
            raise LoraError(f"the tree has {short(name)} without its partner.")
        found[kernel] = _Pair(factors[kernel + _A], factors[kernel + _B])
    if not found:
        raise LoraError(f"the tree has no leaves of qwix's LoRA, whose names end in {_A} and {_B}.")
    return found


def _of_tree(name: str) -> str | None:
    """Return the name of a factor without what wraps it, or None of other leaves."""
    parts = name.removesuffix("/value").split("/")
    is_of_optimizer = any(part.startswith("opt") for part in parts[:-1])
    return _bare("/".join(parts)) if parts[-1].endswith((_A, _B)) and not is_of_optimizer else None


def _bare(path: str) -> str:
    """Return a path without what wraps the parameters of a model."""
    parts = path.split("/")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return "/".join(parts)


def _adapter(path: str, plan: Plan, pair: _Pair, alpha: float) -> Adapter:
    """Return the adapter of a kernel from its factors."""
    target = plan[path]
    stack, inputs, outputs = _sizes(target.shape, target.axes)
    a, b = np.asarray(jax.device_get(pair.a)), np.asarray(jax.device_get(pair.b))
    rank = a.shape[-1] if a.ndim else 0
    ours_a = _stack_first(a, target.axes)
    ours_b = _stack_first(b, target.axes) if b.size == math.prod((*stack, rank, *outputs)) else None
    if ours_b is None and b.shape in ((rank, *outputs), (rank, math.prod(outputs))):  # one for the whole stack
        ours_b = np.broadcast_to(b, (*stack, *b.shape))
    n = len(stack)
    fits_a = ours_a is not None and ours_a.shape[:n] == stack and ours_a.shape[n:] in _forms(inputs, rank, last=True)
    fits_b = ours_b is not None and ours_b.shape[:n] == stack and ours_b.shape[n:] in _forms(outputs, rank, last=False)
    if not fits_a or not fits_b or ours_a is None or ours_b is None or rank == 0:
        raise LoraError(
            f"{short(path)} of shape {list(target.shape)} has factors {list(a.shape)} and {list(b.shape)} in the tree, "
            f"expected {[*stack, *inputs]} and the rank, and the rank and {outputs}, with the stacked axes where the "
            "kernel has them: they are of another model, or the plan is."
        )
    a, b = ours_a.reshape(*stack, *inputs, rank), ours_b.reshape(*stack, rank, *outputs)
    return LoraAdapter(jnp.asarray(a), jnp.asarray(b), target.axes, alpha / rank)


def _factors(path: str, adapter: Adapter, like: _Pair, alpha: float) -> _Pair:
    """Return the factors of an adapter in the shapes of a tree."""
    lora = adapter.to_lora() if isinstance(adapter, Adapter) else None
    if not isinstance(lora, LoraAdapter):
        raise LoraError(f"{short(path)} is a {type(adapter).__name__}, and qwix has LoRA alone: merge it instead.")
    rank, own, axes = like.a.shape[-1], lora.a.shape[-1], lora.axes
    if own > rank:
        raise LoraError(f"{short(path)} has rank {own}, and the tree has rank {rank}: truncate it, or train with more.")
    n = len(axes.stack)
    a = np.asarray(jax.device_get(lora.a), np.float32)
    b = np.asarray(jax.device_get(lora.b), np.float32) * np.float32(lora.scale / (alpha / rank))
    a = np.pad(a, [(0, rank - own if i == a.ndim - 1 else 0) for i in range(a.ndim)])
    b = np.pad(b, [(0, rank - own if i == n else 0) for i in range(b.ndim)])
    if math.prod(like.b.shape) * math.prod(b.shape[:n]) == b.size and n:
        first = b[(0,) * n]
        if not (b == first).all():
            raise LoraError(f"{short(path)} has an own B for each matrix of a stack, and qwix has one for all of them.")
        b = first
        return _Pair(_as_in_tree(path, a, axes, like.a.shape, n), b.reshape(like.b.shape))
    return _Pair(_as_in_tree(path, a, axes, like.a.shape, n), _as_in_tree(path, b, axes, like.b.shape, n))


def _as_in_tree(path: str, factor: Array, axes: KernelAxes, shape: tuple[int, ...], n: int) -> Array:
    """Return a factor [*stack, ...] with the stacked axes where a tree has them."""
    wrong = LoraError(f"{short(path)} has a factor {list(factor.shape)}, and the tree one of {list(shape)}.")
    if factor.size != math.prod(shape) or any(axis >= len(shape) for axis in axes.stack):
        raise wrong
    rest = [size for i, size in enumerate(shape) if i not in axes.stack]
    if [shape[axis] for axis in axes.stack] != [*factor.shape[:n]]:
        raise wrong
    return np.moveaxis(factor.reshape(*factor.shape[:n], *rest), range(n), axes.stack)


def _stack_first(factor: Array, axes: KernelAxes) -> Array | None:
    """Return a factor with its stacked axes first, which are where the kernel has them; None if it lacks some."""
    if any(axis >= factor.ndim for axis in axes.stack):
        return None
    return np.moveaxis(factor, axes.stack, range(len(axes.stack)))


def _sizes(shape: tuple[int, ...], axes: KernelAxes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape[axis] for axis in group) for group in (axes.stack, axes.inputs, axes.outputs))


def _forms(sizes: tuple[int, ...], rank: int, last: bool) -> list[tuple[int, ...]]:
    """Return the shapes that a factor of one matrix may have: as the kernel's axes are, or with these as one."""
    both = (sizes, (math.prod(sizes),))
    return [(*own, rank) if last else (rank, *own) for own in both]
