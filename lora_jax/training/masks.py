"""Which leaves an optimizer may move, which of them it decays, and how fast each learns."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from lora_jax.core.adapter import Adapter, is_adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import field_names
from lora_jax.core.paths import flatten_with_names, nearest

LearningRate = float | Callable[[Any], Any]  # or a schedule: steps taken -> rate


def trainable_mask(tree: Any) -> Any:
    """The same tree of booleans: True at the trained arrays of adapters, False at everything else.

    The one truth for optimizer masks and counts. Adapters may stand anywhere in the tree, also beside the base.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), rules={"w": lora.Lora(rank=1)})
    >>> mask = trainable_mask({"adapters": lora.init(jax.random.key(0), params, plan), "params": params})
    >>> mask["adapters"]["w"].a, mask["adapters"]["w"].b, mask["params"]["w"]
    (True, True, False)
    """
    return jax.tree.map(lambda node: node.trainable() if is_adapter(node) else False, tree, is_leaf=is_adapter)


def freeze_base(
    optimizer: optax.GradientTransformation, mask: Any | Callable[[Any], Any] = trainable_mask
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for what `mask` marks, and no update at all, nor any state, for the rest.

    `optax.masked` alone would hand the gradients of the rest through as updates.

    Args:
        optimizer: any optax transformation.
        mask: a tree of booleans, or a function that makes one from the optimized tree.
    """

    def labels(tree: Any) -> Any:
        marks = mask(tree) if callable(mask) else mask
        return jax.tree.map(lambda trained: "train" if trained else "freeze", marks)

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def labels(tree: Any, rules: Mapping[str, str], default: str | None = None) -> Any:
    """The same tree of labels, for `optax.partition`: each array has that of the first pattern which matches its path.

    Arrays that an adapter never trains are labelled "freeze", whatever the patterns say.

    Args:
        tree: what is optimized: adapters, or any tree that holds them.
        rules: `{pattern: label}`; a pattern is a regular expression for the whole path of an array. The arrays of an
            adapter are fields below its own path, as in "layers_0/query/kernel/a".
        default: the label of trained arrays that no pattern matches; without it they are an error.

    Raises:
        LoraError: a pattern is no regular expression, or matches no trained array (the nearest are listed), or only
            ones that earlier patterns took; no pattern matches some trained array.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> tree = {"adapters": {"w": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 4)), axes, 1.0)}, "head": jnp.ones(4)}
    >>> marks = labels(tree, {".*/b": "fast", "adapters/.*": "slow", "head": "head"})
    >>> marks["adapters"]["w"].a, marks["adapters"]["w"].b, marks["head"]
    ('slow', 'fast', 'head')
    """
    if not isinstance(rules, Mapping):
        raise LoraError(f"labels: rules are a dict such as {{'.*/b': 'fast', '.*': 'slow'}}, found {rules!r}.")
    names, _, treedef = flatten_with_names(tree)
    is_trained = jax.tree.leaves(mark(tree, lambda *_: True, lambda _: True, frozen=False))
    trained = [name for name, moves in zip(names, is_trained, strict=True) if moves]
    chosen: dict[str, str] = {}
    for pattern, label in rules.items():
        matched = _matches(pattern, trained)
        fresh = [name for name in matched if name not in chosen]
        if not fresh:
            raise LoraError(
                f"labels: the pattern {pattern!r} is never reached: all {len(matched)} arrays that it matches, "
                f"{matched[0]!r} first, are taken by earlier ones. Put it before them, or drop it."
            )
        chosen |= dict.fromkeys(fresh, label)
    missing = [name for name in trained if name not in chosen]
    if missing and default is None:
        raise LoraError(
            f"labels: no pattern matches {len(missing)} trained array(s):{_listed(missing)}\nGive a pattern for them, "
            f"such as {{{re.escape(missing[0])!r}: 'freeze'}}, or a label for all the rest: default='freeze'."
        )
    everything = dict.fromkeys(names, "freeze") | dict.fromkeys(missing, default) | chosen
    return treedef.unflatten([everything[name] for name in names])


def _matches(pattern: str, names: list[str]) -> list[str]:
    try:
        matched = [name for name in names if re.fullmatch(pattern, name)]
    except (re.error, TypeError) as error:
        raise LoraError(f"labels: the pattern {pattern!r} is not a regular expression: {error}.") from None
    if not matched:
        raise LoraError(
            f"labels: the pattern {pattern!r} matches no trained array. A pattern stands for a whole path, that of an "
            f"adapter and the field; the nearest are{_listed(nearest(pattern, names))}"
        )
    return matched


def _listed(names: list[str]) -> str:
    more = f"\n  and {len(names) - 8} more" if len(names) > 8 else ""
    return "".join(f"\n  {name}" for name in names[:8]) + more


def decay_mask(tree: Any) -> Any:
    """The same tree of booleans: True at matrices, which weight decay may shrink, False at vectors and frozen arrays.

    Of an adapter, the factors are matrices: arrays of two groups of axes. Magnitudes, gains, biases and scales are
    vectors, for which zero is no neutral value. Beside adapters, arrays of two axes or more count as
    matrices.

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

    return mark(tree, is_factor, _is_matrix, frozen=False)


def lora_plus(
    optimizer: Callable[[Any], optax.GradientTransformation], learning_rate: LearningRate, ratio: float = 16.0
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: B learns `ratio` times faster than A, lr_B = ratio * lr_A.

    A's sum over all d inputs makes the output move d times as much as A's entries do; B's sum is over r only. What has
    outputs and no inputs moves the output as B does, and learns as fast: B itself, and vectors of one entry per output,
    such as DoRA's magnitudes. Beside adapters these are the arrays of at most one axis, such as biases. All else that
    is trained learns at `learning_rate`, also A of an embedding table (HF PEFT trains both of its factors at 1e-6).
    Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.

    Each of the two groups has an optimizer of its own: whatever looks at all gradients at once goes before, as in
    `optax.chain(optax.clip_by_global_norm(1.0), lora.lora_plus(optax.adam, 1e-4))`. AdamW multiplies its decay by the
    learning rate, so that it also decays B faster.

    Args:
        optimizer: makes an optax transformation from a learning rate: `optax.adamw`, or
            `lambda rate: optax.adamw(rate, weight_decay=0.1, mask=lora.decay_mask)`.
        learning_rate: of A; a number, or a schedule.
        ratio: above 0, usually above 1; the paper's advice for most models is about 16.

    Raises:
        LoraError: the ratio is not a number above 0.

    >>> optimizer = lora_plus(optax.adamw, optax.cosine_decay_schedule(1e-4, 1000), ratio=16.0)
    """
    check_positive("lora_plus", "ratio", ratio, 16.0)

    def groups(tree: Any) -> Any:
        def group(adapter: Adapter, name: str) -> str:
            layout = adapter.layout[name]
            return "fast" if "outputs" in layout and "inputs" not in layout else "slow"

        return mark(tree, group, lambda leaf: "slow" if _is_matrix(leaf) else "fast", frozen="freeze")

    def faster(count: Any) -> Any:
        return learning_rate(count) * ratio  # type: ignore[operator]

    fast = optimizer(faster if callable(learning_rate) else learning_rate * ratio)
    return optax.partition({"slow": optimizer(learning_rate), "fast": fast, "freeze": optax.set_to_zero()}, groups)


def mark(tree: Any, array: Callable[[Adapter, str], Any], other: Callable[[Any], Any], frozen: Any) -> Any:
    """The same tree with `array(adapter, field)` at trained arrays of adapters, and `other(leaf)` beside adapters.

    Arrays that an adapter never trains become `frozen`. What optax has masked has no leaves, and stays as it is.
    """

    def node(at: Any) -> Any:
        if not is_adapter(at):
            return other(at)
        trained, marks = at.trainable(), {}
        for name in field_names(at, static=False):
            value = array(at, name) if getattr(trained, name) else frozen
            marks[name] = jax.tree.map(lambda _, value=value: value, getattr(at, name))
        return dataclasses.replace(at, **marks)

    return jax.tree.map(node, tree, is_leaf=is_adapter)


def check_positive(call: str, name: str, value: Any, usual: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise LoraError(f"{call}({name}={value!r}): expected a number above 0, such as {name}={usual}.")


def _is_matrix(leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) > 1
