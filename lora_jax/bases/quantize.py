"""Pack the weights of a tree of parameters that rules select."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bases.change import Change, warn_of_large
from lora_jax.bases.format import Format, check_weight
from lora_jax.bases.lazy import Stored, like, read
from lora_jax.bases.placement import pack_there
from lora_jax.core.aliases import Uses, same
from lora_jax.core.arrays import concrete
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.patterns import first_match


def quantize(
    params: Any,
    rules: Mapping[str, Format | None],
    *,
    donate: bool = False,
    report: Callable[[str, Change], Any] | None = None,
) -> Any:
    """Return the parameters with a packed weight in the place of each array that a rule matches.

    Weights are packed one after the other, and a `Stored` leaf is read when its turn comes: of a model in files, one
    weight at a time is in memory before it is packed. `lora.plan`, `lora.lora_apply` and `lora.merge` take the result
    in the place of parameters; `lora.bases.dense` turns it back into arrays. Two leaves that are one array, with the
    same format, are packed once and stay one.

    Where a block of a weight changes by more than half of its norm, a `LoraWarning` names the weight: `Nf4()` rounds
    the scales of small blocks beside those of large ones, and may make small ones many times too large.

    Args:
        params: a tree of arrays, `Stored` leaves, and weights that are packed already.
        rules: `{pattern: format}`, as in `{".*/kernel": lora.bases.Nf4()}`; a pattern is a regular expression for a
            whole path, and the first that matches decides. None leaves arrays as they are.
        donate: delete each array as soon as it is packed, except where another leaf lies in the same memory and is
            still needed.
        report: called with the path and the `lora.bases.Change` of each packed weight, once it is packed. Not under
            `jax.jit`.

    Returns:
        The tree without `Stored` leaves: what no rule matches is an array, or packed as it was stored.

    Raises:
        LoraError: before anything is packed: a pattern is no regular expression, matches no path (the nearest are
            listed), or only paths that earlier rules took; a matched leaf is no array of floats of at least two axes,
            or holds NaN or infinity. Later: a `Stored` one does.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 128)), "bias": jnp.ones(128)}
    >>> changes = {}
    >>> packed = lora.bases.quantize(params, {"kernel": lora.bases.Nf4()}, report=changes.__setitem__)
    >>> packed["kernel"].shape, packed["kernel"].nbytes
    ((64, 128), 4232)
    >>> print(f"{changes['kernel'].weight:.2f} {changes['kernel'].block:.2f}")
    0.09 0.11
    """
    names, leaves, treedef = flatten_with_names(params)
    formats = {name: format for name, format in _choose(rules, names).items() if format is not None}
    given = dict(zip(names, leaves, strict=True))
    stacks = {name: check_weight(name, like(given[name]), format.stack) for name, format in formats.items()}
    for name in formats:
        if isinstance(given[name], jax.core.Tracer) and report is not None:
            raise LoraError(f"quantize(report=...) looks at numbers, and {name!r} is traced: quantize outside jax.jit.")
        if not isinstance(given[name], Stored | jax.core.Tracer):
            _check_finite(name, given[name])

    work = {
        name: (same(leaf), formats.get(name)) for name, leaf in given.items() if _is_changed(leaf, formats.get(name))
    }
    uses = Uses(names, leaves, work)
    done: dict[Any, tuple[Any, Change | None]] = {}
    for name, key in work.items():
        if key not in done:
            done[key] = _read_and_pack(name, given[name], formats.get(name), stacks.get(name))
            if donate and concrete(given[name]) and uses.last(given[name]):
                jax.block_until_ready(done[key][0])
                given[name].delete()
        if report is not None and (changed := done[key][1]) is not None:
            report(name, changed)
    changes = {name: changed for name, key in work.items() if (changed := done[key][1]) is not None}
    warn_of_large(changes, formats, stacklevel=2)
    return treedef.unflatten([done[work[name]][0] if name in work else leaf for name, leaf in given.items()])


def _is_changed(leaf: Any, format: Format | None) -> bool:
    return format is not None or isinstance(leaf, Stored)


def _read_and_pack(name: str, leaf: Any, format: Format | None, stack: int | None) -> tuple[Any, Change | None]:
    """Return a leaf, read if it is `Stored` and packed if it has a format, and how much that changed it."""
    w = read(name, leaf)
    if format is None or stack is None:
        return jax.tree.map(jnp.asarray, w), None
    w = jnp.asarray(w)
    if isinstance(leaf, Stored):
        _check_finite(name, w)
    packed, changed = pack_there(format, w, stack, jnp.dtype(format.dtype or w.dtype))
    if isinstance(leaf, Stored):
        jax.block_until_ready(packed)  # read the next one only when this one can be freed
    return packed, changed


def _check_finite(name: str, w: Any) -> None:
    if not bool(w.__array_namespace__().isfinite(w).all()):
        raise LoraError(f"{name!r} holds NaN or infinity, which no packed format has: mend the weight first.")


def _choose(rules: Mapping[str, Format | None], names: list[str]) -> dict[str, Format | None]:
    """Return the format of each path that a rule matches."""
    if not isinstance(rules, Mapping) or not rules:
        raise LoraError(f"rules are a dict such as {{'.*/kernel': lora.bases.Nf4()}}, found {rules!r}.")
    for pattern, format in rules.items():
        if format is not None and not isinstance(format, Format):
            raise LoraError(f"the rule for {pattern!r} is {format!r}, expected a format such as lora.bases.Nf4().")
    return first_match(rules, names)
