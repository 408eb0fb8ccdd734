"""Masks and labels of trees for optax: which arrays are trained, which decay, and which optimizer each one has."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from lora_jax.core.adapter import Adapter, AdapterWrapper, is_adapter
from lora_jax.core.argument_checks import check_tree
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import field_names
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.patterns import first_match
from lora_jax.core.text import listed
from lora_jax.training.argument_checks import check_mask, check_optimizer


def trainable_mask(tree: Any) -> Any:
    """Return the same tree of booleans: True at what is trained, False at what is frozen.

    Frozen are the arrays that an adapter never trains, and the base: a part of the tree that has the weights of
    the adapters, at the adapters' own paths. All else is trained: adapters, and what lies beside them, such as a new
    head. Optimizer masks and parameter counts all use this mask.

    Adapters may be anywhere in the tree. To freeze more of it, say so beside this mask:
    `lora.freeze_base(optimizer, lambda tree: {**lora.trainable_mask(tree), "statistics": False})`.

    Args:
        tree: adapters, or any tree that holds them.

    Returns:
        The tree, with a boolean for each array.

    Raises:
        LoraError: there is no array in it, as where a function or an optimizer was given.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), rules={"w": lora.Lora(rank=1)})
    >>> adapters = lora.init(jax.random.key(0), params, plan)
    >>> mask = trainable_mask({"adapters": adapters, "params": params, "head": jnp.ones((4, 2))})
    >>> mask["adapters"]["w"].a, mask["adapters"]["w"].b, mask["params"]["w"], mask["head"]
    (True, True, False, True)
    """
    check_tree("trainable_mask(tree)", "tree", tree)
    return mark(tree, lambda *_: True, lambda _: True, frozen=False)


def map_frozen(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return a tree with `change(array, *others)` in the place of each array that an adapter never trains.

    Args:
        change: makes an array of that of the tree, and those at the same place of the other trees.
        tree: that holds adapters.
        others: like it.
    """

    def node(at: Any, *others: Any) -> Any:
        if not is_adapter(at):
            return at
        mask = trainable_mask(at)
        return jax.tree.map(lambda trained, *arrays: arrays[0] if trained else change(*arrays), mask, at, *others)

    return jax.tree.map(node, tree, *others, is_leaf=is_adapter)


def freeze_base(
    optimizer: optax.GradientTransformation, mask: Any | Callable[[Any], Any] = trainable_mask
) -> optax.GradientTransformationExtraArgs:
    """Apply an optimizer to the arrays that `mask` marks; the others get zero updates and have no optimizer state.

    `optax.masked` alone would pass on the gradients of the others as their updates. Without this function there are two
    more ways to say the same:

        optax.partition(
            {"train": optimizer, "freeze": optax.set_to_zero()}, lambda tree: lora.labels(tree, {".*": "train"})
        )
        optax.chain(
            optax.masked(optimizer, lora.trainable_mask),
            optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(operator.not_, lora.trainable_mask(tree))),
        )

    Args:
        optimizer: any optax transformation.
        mask: a tree of booleans, or a function that makes one from the optimized tree; one boolean may stand for a
            whole part of it. By default adapters are trained, and what lies beside them, and their base is frozen.

    Returns:
        An optax transformation for the whole tree.

    Raises:
        LoraError: this is no optax transformation; (when initialized) the mask holds something else than booleans, or
            is not of the optimized tree.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), rules={"w": lora.Lora(rank=1)})
    >>> tree = {"adapters": lora.init(jax.random.key(0), params, plan), "params": params}
    >>> optimizer = lora.freeze_base(optax.sgd(0.1))
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
    >>> float(updates["adapters"]["w"].b[0, 0]), float(updates["params"]["w"][0, 0])
    (-0.10000000149011612, 0.0)
    """

    check_optimizer("freeze_base(optimizer, mask)", optimizer)

    def labels(tree: Any) -> Any:
        marks = mask(tree) if callable(mask) else mask
        check_mask("freeze_base(optimizer, mask)", marks, tree)
        return jax.tree.map(lambda trained: "train" if trained else "freeze", marks)

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def labels(tree: Any, rules: Mapping[str, str], default: str | None = None) -> Any:
    """Return the same tree of labels, for `optax.partition`: that of the first pattern that matches an array's path.

    What `trainable_mask` marks as frozen is labelled "freeze": the arrays that an adapter never trains, whatever the
    patterns say, and those of the base of the tree's adapters. A pattern that decides on anything trained is not for
    the base, nor is the default; one that decides on nothing else, as "base/.*/bias" or a last ".*" may, is.

    Args:
        tree: what is optimized: adapters, or any tree that holds them.
        rules: `{pattern: label}`; a pattern is a regular expression for the whole path of an array. The arrays of an
            adapter are fields below its own path, as in "layers_0/query/kernel/a".
        default: the label of trained arrays that no pattern matches; without it they are an error.

    Returns:
        The tree, with a label for each array.

    Raises:
        LoraError: a pattern is no regular expression, matches no trained array (the nearest are listed), or only
            arrays that earlier patterns took; no pattern matches some trained array.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> tree = {"adapters": {"w": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 4)), axes, 1.0)}, "head": jnp.ones(4)}
    >>> marks = labels(tree, {".*/b": "fast", "adapters/.*": "slow", "head": "head"})
    >>> marks["adapters"]["w"].a, marks["adapters"]["w"].b, marks["head"]
    ('slow', 'fast', 'head')
    """
    if not isinstance(rules, Mapping):
        raise LoraError(f"labels: rules are a dict such as {{'.*/b': 'fast', '.*': 'slow'}}, found {rules!r}.")
    check_tree("labels(tree, rules)", "tree", tree)
    names, _, treedef = flatten_with_names(tree)
    marks = jax.tree.leaves(mark(tree, lambda *_: "train", lambda _: "train", frozen="freeze", base=lambda _: "base"))
    trained = [name for name, found in zip(names, marks, strict=True) if found == "train"]
    base = [name for name, found in zip(names, marks, strict=True) if found == "base"]
    hint = "A pattern stands for a whole path, that of an adapter and the field; the nearest are"
    chosen = first_match(rules, trained, base, call="labels: ", one="trained array", many="arrays", hint=hint)
    missing = [name for name in trained if name not in chosen]
    if missing and default is None:
        raise LoraError(
            f"labels: no pattern matches {len(missing)} trained array(s):\n{listed(missing)}\nGive a pattern for them, "
            f"such as {{{re.escape(missing[0])!r}: 'freeze'}}, or a label for all the rest: default='freeze'."
        )
    everything = dict.fromkeys(names, "freeze") | dict.fromkeys(missing, default) | chosen
    return treedef.unflatten([everything[name] for name in names])


def decay_mask(tree: Any) -> Any:
    """Return the same tree of booleans: True at matrices, which weight decay may shrink, False at all else.

    Of an adapter, the matrices are its factors: arrays with two groups of axes (inputs, outputs, rank) beside the
    stack. Magnitudes, gains, biases and scales are vectors, whose neutral value is not zero. Beside adapters, arrays of
    two axes or more count as matrices. Arrays that an adapter never trains are False.

    Args:
        tree: adapters, or any tree that holds them.

    Returns:
        The tree, with a boolean for each array.

    >>> import jax.numpy as jnp, optax, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"w": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 4)), axes, 1.0)}
    >>> mask = decay_mask({"adapters": adapters, "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}})
    >>> mask["adapters"]["w"].b, mask["head"]["kernel"], mask["head"]["bias"]
    (True, True, False)
    >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=decay_mask)
    """

    def is_factor(adapter: Adapter, name: str) -> bool:
        return len([group for group in adapter.layout[name] if group != "stack"]) > 1

    return mark(tree, is_factor, is_matrix, frozen=False, base=is_matrix)


def mark(
    tree: Any,
    array: Callable[[Adapter, str], Any],
    other: Callable[[Any], Any],
    frozen: Any,
    base: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the same tree with a mark in the place of each array.

    Masked nodes of optax have no leaves, and stay as they are.

    Args:
        array: gives the mark of a trained array, from its adapter and the name of its field.
        other: gives the mark of an array beside adapters.
        frozen: the mark of arrays that an adapter never trains.
        base: gives the mark of an array of the base, which is the tree's part that has the adapters' weights; without
            it that is `frozen`.
    """

    def node(at: Any) -> Any:
        if not is_adapter(at):
            return jax.tree.map(other, at)
        if isinstance(at, AdapterWrapper):
            own = {name: getattr(at, name) for name in field_names(at, static=False)}
            marks = {n: node(v) if is_adapter(v) else jax.tree.map(lambda _: frozen, v) for n, v in own.items()}
            return dataclasses.replace(at, **marks)  # type: ignore[type-var]
        trained, marks = at.trainable(), {}
        for name in field_names(at, static=False):
            value = array(at, name) if getattr(trained, name) else frozen
            marks[name] = jax.tree.map(lambda _, value=value: value, getattr(at, name))
        return dataclasses.replace(at, **marks)

    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda at: is_adapter(at) or is_packed(at))
    of_base = base or (lambda _: frozen)
    marks = [
        jax.tree.map(of_base, at) if in_base else node(at)
        for (_, at), in_base in zip(keyed, _in_base(keyed), strict=True)
    ]
    return jax.tree.unflatten(treedef, marks)


def _in_base(keyed: Sequence[tuple[Any, Any]]) -> list[bool]:
    """Return for each leaf of a tree, given with its path, whether it is in the base of adapters of the tree.

    An adapter's key is the path of its weight from where the base begins: the base of {"adapters": {"a/w": ...},
    "base": {"a": {"w": ..., "b": ...}}} is all below "base". One weight shows that. A base without a key of its own is
    beside what is new: that takes the weights of all adapters, for a new head may have the name of an old one.
    """
    together: dict[Any, dict[str, Adapter]] = {}
    for path, node in keyed:
        if is_adapter(node) and path:
            together.setdefault(path[:-1], {})[str(getattr(path[-1], "key", ""))] = node
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in keyed]
    arrays = [not is_adapter(node) for _, node in keyed]
    found: dict[tuple[str, Any], dict[str, None]] = {}  # below each part of the tree, the weights of some adapters
    for name, (_, leaf), is_array in zip(names, keyed, arrays, strict=True):
        for whole in (name, name.removesuffix("/value")) if is_array else ():  # NNX has a level of its own
            parts = whole.split("/")
            for start in range(len(parts)):
                root, weight = "/".join([*parts[:start], ""]), "/".join(parts[start:])
                for place, adapters in together.items():
                    if weight in adapters and _may_be_of(adapters[weight], leaf):
                        found.setdefault((root, place), {})[weight] = None
    bases = tuple(root for (root, place), weights in found.items() if root or len(weights) == len(together[place]))
    return [is_array and name.startswith(bases) for name, is_array in zip(names, arrays, strict=True)]


def _may_be_of(adapter: Adapter, leaf: Any) -> bool:
    """Return whether a leaf has the shape of an adapter's weight; True where arrays of the adapter are not there."""
    if not all(hasattr(array, "shape") for array in adapter.arrays().values()):
        return True  # optax has masked some
    try:
        return adapter.kernel_shape() == getattr(leaf, "shape", None)
    except LoraError:
        return True  # several sets of adapters at once, or updates: the path decides


def is_matrix(leaf: Any) -> bool:
    """Return whether a leaf has two axes or more."""
    return getattr(leaf, "ndim", 0) > 1
