"""Pack the weights of a tree of parameters that rules select."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bases.format import Format, check_weight
from lora_jax.bases.lazy import Stored, like, read
from lora_jax.bases.placement import pack_there
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.patterns import first_match


def quantize(params: Any, rules: Mapping[str, Format | None], *, donate: bool = False) -> Any:
    """Return the parameters with a packed weight in the place of each array that a rule matches.

    Weights are packed one after the other, and a `Stored` leaf is read when its turn comes: of a model in files, one
    weight at a time is in memory before it is packed. `lora.plan`, `lora.lora_apply` and `lora.merge` take the result
    in the place of parameters; `lora.bases.dense` turns it back into arrays.

    Args:
        params: a tree of arrays, `Stored` leaves, and weights that are packed already.
        rules: `{pattern: format}`, as in `{".*/kernel": lora.bases.Nf4()}`; a pattern is a regular expression for a
            whole path, and the first that matches decides. None leaves arrays as they are.
        donate: delete each array as soon as it is packed.

    Returns:
        The tree without `Stored` leaves: what no rule matches is an array, or packed as it was stored.

    Raises:
        LoraError: before anything is packed: a pattern is no regular expression, matches no path (the nearest are
            listed), or only paths that earlier rules took; a matched leaf is no array of floats of at least two axes.
            Later: a weight holds NaN or infinity.

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
            jax.block_until_ready(packed)  # read the next one only when this one can be freed
        elif donate and isinstance(leaf, jax.Array):
            jax.block_until_ready(packed)
            leaf.delete()
        return packed

    return treedef.unflatten([pack(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def _choose(rules: Mapping[str, Format | None], names: list[str]) -> dict[str, Format | None]:
    """Return the format of each path that a rule matches."""
    if not isinstance(rules, Mapping) or not rules:
        raise LoraError(f"rules are a dict such as {{'.*/kernel': lora.bases.Nf4()}}, found {rules!r}.")
    for pattern, format in rules.items():
        if format is not None and not isinstance(format, Format):
            raise LoraError(f"the rule for {pattern!r} is {format!r}, expected a format such as lora.bases.Nf4().")
    return first_match(rules, names)
