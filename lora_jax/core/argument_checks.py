"""Checks of what a call is given: one error that says what was found, what is expected, and the order of the call.

They look at types and shapes alone and wait for no device, so that what is called in a loop can afford them.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.arrays import concrete, describe, is_key
from lora_jax.core.errors import LoraError, short
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import is_array
from lora_jax.core.targets import Plan

TAKEN_BY_A_STEP = (
    "a step took its memory for the state that it returned (lora.jit_step donates the state it gets, as jax.jit does "
    "with donate_argnums). Use what it returned, state.trainable, or give it a copy: jax.tree.map(jnp.copy, adapters)."
)
TAKEN_BY_DONATION = (
    "a call took its memory, such as lora.merge or lora.bases.quantize with donate=True. Use what that call returned."
)

A_KEY_MAP = "a KeyMap: lora.key_maps.LLAMA and the like, or key_maps.KeyMap(key_maps.linear(path, name), ...)"


def refuse(call: str, argument: str, value: Any, expected: str, verb: str = "is") -> NoReturn:
    """Raise for an argument: `call` shows all arguments in their order, and `expected` ends with how to make it."""
    raise LoraError(f"{call}: `{argument}` {verb} {found(value)}, expected {expected}.")


def check_is(call: str, argument: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise unless an argument is of one of these types."""
    if not isinstance(value, kinds):
        refuse(call, argument, value, expected)


def check_each(call: str, argument: str, values: Iterable[Any], kind: type, expected: str) -> None:
    """Raise unless all values of an argument are of this type."""
    for value in values:
        check_is(call, argument, value, kind, expected)


def check_function(call: str, argument: str, fn: Any) -> None:
    """Raise unless an argument is a function; a Flax model, which may be called, keeps its parameters elsewhere."""
    if (library := flax_library(fn)) == "Linen":
        made = "fn, params, state = lora.from_linen(model, variables); or model.apply, of all variables"
        refuse(call, argument, fn, f"a function of parameters: {made}")
    if library == "NNX":
        refuse(call, argument, fn, "a function of parameters: fn, params, state = lora.from_nnx(model)")
    if not callable(fn):
        refuse(call, argument, fn, "a function")


def check_key(call: str, key: Any) -> None:
    """Raise unless this is one random key, new-style or old-style."""
    is_of_numbers = isinstance(key, jax.Array | np.ndarray)
    if is_of_numbers and is_key(key):
        if key.ndim:
            refuse(call, "key", key, "one: call it under jax.vmap for several, or give keys[0]")
        return
    if not (is_of_numbers and key.dtype == np.uint32 and key.shape in ((2,), (4,))):  # as jax.random.PRNGKey makes them
        seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
        refuse(call, "key", key, f"a random key, such as jax.random.key({seed})")


def check_folder(call: str, folder: Any, argument: str = "folder") -> None:
    """Raise unless this is a path, which need not be there."""
    check_is(call, argument, folder, (str, os.PathLike), 'a path, such as "runs/adapters"')


def check_adapter_dict(call: str, adapters: Any, others: str = "") -> None:
    """Raise unless this is `{path: adapter}`; the message ends with where other things go, if given."""
    if isinstance(adapters, list | tuple) and not hasattr(adapters, "_fields"):
        refuse(
            call, "adapters", adapters, "one dict {path: adapter}: lora.combine([(adapters, 1.0), ...]) adds several"
        )
    if hasattr(adapters, "trainable") and not isinstance(adapters, Adapter):
        refuse(call, "adapters", adapters, "a dict {path: adapter}: those of a state are its state.trainable")
    if isinstance(adapters, Plan):
        refuse(call, "adapters", adapters, "a dict {path: adapter}: lora.init(key, params, plan) makes it")
    check_is(call, "adapters", adapters, Mapping, "a dict {path: adapter} as lora.init makes it")
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise LoraError(
                f"{call}: adapters[{path!r}] is {found(adapter)}, expected an adapter as lora.init makes it{others}."
            )


def check_tree(call: str, argument: str, tree: Any) -> None:
    """Raise unless this may be a tree that an optimizer has: beside arrays it may hold functions, as models do."""
    leaves = jax.tree.leaves(tree)
    alone = bool(leaves) and leaves[0] is tree and not is_array(tree)
    if (alone and not isinstance(tree, bool)) or (leaves and all(map(_is_no_part, leaves))):
        whole = "a tree of arrays, such as the adapters that lora.init(key, params, plan) makes"
        is_one = alone or is_optimizer(tree)
        refuse(call, argument, tree if is_one else leaves[0], whole, "is" if is_one else "holds")


def _is_no_part(leaf: Any) -> bool:
    return isinstance(leaf, str | Plan | Rule) or callable(leaf)


def check_kept(named: Iterable[tuple[str, Any]], taken: str, call: str = "") -> None:
    """Raise if an array is gone, because something was given its memory; of traced arrays, that is not known.

    Args:
        named: the arrays, with their names for the message.
        taken: what may have taken them, and what to use instead.
        call: what the message begins with.
    """
    for name, array in named:
        if is_taken(array):
            raise LoraError(f"{call}{name!r} has been deleted: {taken}")


def is_taken(array: Any) -> bool:
    """Return whether an array is known to be gone."""
    return concrete(array) and bool(array.is_deleted())


def named_arrays(path: str, adapter: Adapter) -> list[tuple[str, Any]]:
    """Return the arrays of an adapter with their names."""
    return [(f"{path}/{name}", array) for name, array in adapter.arrays().items()]


def is_optimizer(value: Any) -> bool:
    """Return whether this is an optax transformation."""
    return (
        isinstance(value, tuple) and callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    )


def flax_library(value: Any) -> str | None:
    """Return the library of a Flax model, or of a class of such models, without importing it; None for all else."""
    for kind in (value if isinstance(value, type) else type(value)).__mro__:
        if kind.__name__ == "Module" and kind.__module__.startswith("flax."):
            return {"linen": "Linen", "nnx": "NNX"}.get(kind.__module__.split(".")[1])
    return None


def found(value: Any) -> str:
    """Return what a value is, in the words of the library's users."""
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    if (library := flax_library(value)) is not None:
        return f"the {library} {'class' if isinstance(value, type) else 'model'} {name}"
    if isinstance(value, type):
        return f"the class {name}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return short(value)
    if is_optimizer(value):
        return "an optax transformation"
    if isinstance(value, Plan):
        return "a plan"
    if isinstance(value, Mapping):
        return _found_dict(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f"a {name} of {len(value)}"
    if isinstance(value, Rule):
        return f"the rule {value}"
    if is_array(value) and not is_packed(value):
        if not is_key(value):
            return describe(value)
        return f"an array of {value.size} random keys" if value.ndim else "a random key"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return with_article(name)


def with_article(name: str) -> str:
    """Return `a LoraAdapter`, `an Entry`."""
    return f"an {name}" if name[:1].upper() in "AEIOU" else f"a {name}"


def _found_dict(value: Mapping[Any, Any]) -> str:
    for kind, what in ((Adapter, "adapters, {path: adapter}"), (Rule, "rules, {pattern: rule}")):
        if value and all(isinstance(item, kind) for item in value.values()):
            return what
    keys = ", ".join(repr(key) for key in [*value][:3])
    some = f"the key{'s' * (len(value) > 1)} {keys}{', ...' * (len(value) > 3)}"
    return f"a dict with {some}" if value else "an empty dict"
