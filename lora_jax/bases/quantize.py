"""Parameters with some of their weights packed."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bases.format import Format, check_weight
from lora_jax.bases.lazy import Stored, like, read
from lora_jax.bases.placement import pack_there
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names, nearest


def quantize(params: Any, rules: Mapping[str, Format | None], *, donate: bool = False) -> Any:
    """The same tree, with a packed weight in the place of each array that a rule matches.

    One weight is packed after the other, and what is `Stored` is read when its turn comes: of a model in files, one
    weight at a time is in memory before it is packed. `lora.plan`, `lora.lora_apply` and `lora.merge` take the result
    as they take parameters; `lora.bases.dense` gives arrays again.

    Args:
        rules: `{pattern: format}`, as `{".*/kernel": lora.bases.Nf4()}`; a pattern is a regular expression for a whole
            path, and the first that matches decides. None leaves arrays as they are.
        donate: each array is deleted as soon as it is packed.

    Returns:
        The tree, in which nothing is stored any more: what no rule matches is an array, or packed as it was stored.

    Raises:
        LoraError: before anything is packed, that a pattern is no regular expression or matches nothing, or that a
            matched leaf is no array of floats of at least two axes; and that a weight holds what is not finite.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
    >>> packed = lora.bases.quantize(params, {"kernel": lora.bases.Nf4()})
    >>> packed["kernel"].shape, packed["kernel"].nbytes
    ((64, 128), 4232)
    """
    names, leaves, treedef = flatten_with_names(params)
    chosen = _choose(rules, names)
    stacks = {
        name: check_weight(name, like(leaf), format.stack)
        for name, leaf in zip(names, leaves, strict=True)
        if (format := chosen.get(name)) is not None
    }

    def pack(name: str, leaf: Any) -> Any:
        format, w = chosen.get(name), read(name, leaf)
        if format is None:
            return jax.tree.map(jnp.asarray, w) if isinstance(leaf, Stored) else leaf
        w = jnp.asarray(w)
        if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
            raise LoraError(f"{name!r} holds NaN or infinity, which no packed format has: mend the weight first.")
        packed = pack_there(format, w, stacks[name], jnp.dtype(format.dtype or w.dtype))
        if isinstance(leaf, Stored):
            jax.block_until_ready(packed)  # the next one is read when this one is gone
        elif donate and isinstance(leaf, jax.Array):
            jax.block_until_ready(packed)
            leaf.delete()
        return packed

    return treedef.unflatten([pack(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def _choose(rules: Mapping[str, Format | None], names: list[str]) -> dict[str, Format | None]:
    if not isinstance(rules, Mapping) or not rules:
        raise LoraError(f"rules are a dict such as {{'.*/kernel': lora.bases.Nf4()}}, found {rules!r}.")
    chosen: dict[str, Format | None] = {}
    for pattern, format in rules.items():
        if format is not None and not isinstance(format, Format):
            raise LoraError(f"the rule for {pattern!r} is {format!r}, expected a format such as lora.bases.Nf4().")
        try:
            matched = [name for name in names if re.fullmatch(pattern, name)]
        except (re.error, TypeError) as error:
            raise LoraError(f"the pattern {pattern!r} is not a regular expression: {error}.") from None
        if not matched:
            near = ", ".join(map(repr, nearest(pattern, names)))
            raise LoraError(f"the rule {pattern!r} matches no parameter; the nearest paths are {near}.")
        for name in matched:
            chosen.setdefault(name, format)
    return chosen
