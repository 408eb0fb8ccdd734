"""The registry of kinds of adapters, which one call of a user joins."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout, field_names
from lora_jax.core.serialization import register_node

KINDS: dict[str, type[Adapter]] = {}  # by the names that checkpoints know them under

Kind = TypeVar("Kind", bound=type[Adapter])


def register_kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of adapter: a frozen dataclass, made a pytree here, which checkpoints know under this name.

    From then on adapters of the kind are planned, applied, merged, saved, restored and inspected as those of this
    library are; and exported as the LoRA that `to_lora` gives, or refused by name. `jax.export` takes them as arguments
    of programs that it writes, and `flax.serialization` writes them. `examples/own_kind.py` writes one.

    Args:
        name: in checkpoints and exported programs; it has to stay the same for as long as there are any.

    Returns:
        The decorator of the class.

    Raises:
        LoraError: another class has the name; the class is no dataclass of an adapter, or its `layout` does not have
            just its arrays.

    >>> from dataclasses import dataclass, field
    >>> import jax, lora_jax as lora
    >>> @lora.register_kind("half")
    ... @dataclass(frozen=True)
    ... class HalfAdapter(lora.Factored):  # W' = W + A B / 2
    ...     a: jax.Array
    ...     b: jax.Array
    ...     axes: lora.KernelAxes = field(metadata={"static": True})
    ...     layout = {"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")}
    ...     def to_lora(self):
    ...         return lora.LoraAdapter(self.a, self.b, self.axes, 0.5)
    """

    if not isinstance(name, str):
        raise LoraError(f"register_kind({name!r}): give the name of the kind, @lora.register_kind('my_kind').")

    def register(kind: Kind) -> Kind:
        _check_kind(name, kind)
        try:
            KINDS[name] = register_node(f"lora_jax.adapter.{name}")(kind)
        except ValueError as error:
            raise LoraError(
                f"{kind.__name__} is a pytree already: register_kind makes it one. Register it once, under one name."
            ) from error
        return kind

    return register


def _check_kind(name: str, kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Adapter) and "__dataclass_fields__" in vars(kind)):
        raise LoraError(f"register_kind({name!r}) is for a dataclass of lora.Adapter, found {kind!r}.")
    taken = KINDS.get(name)
    if taken is not None and not _is_same_class(taken, kind):
        raise LoraError(f"register_kind({name!r}): {taken.__name__} has that name already, take another one.")
    arrays, facts, layouts = field_names(kind, static=False), field_names(kind, static=True), dict(_layouts(kind))
    if "axes" not in facts or "kind" in facts or sorted(arrays) != sorted(layouts):
        raise LoraError(
            f"{kind.__name__} has the arrays {arrays} and a layout of {list(layouts)}: a kind has a layout for each of "
            'its arrays, and every other field is field(metadata={"static": True}), `axes` among them and none `kind`.'
        )
    if not isinstance(kind.frozen, tuple) or any(array not in arrays for array in kind.frozen):
        raise LoraError(f"{kind.__name__}.frozen is {kind.frozen!r}, expected a tuple of some of its arrays, {arrays}.")
    parts = [part for layout in layouts.values() for part in layout]
    tells_shape = kind.kernel_shape is not Adapter.kernel_shape or kind.forms_weight
    if not tells_shape and not {"inputs", "outputs"} <= {*parts}:
        raise LoraError(
            f"{kind.__name__} has arrays along {', '.join(dict.fromkeys(parts))}, and none along the inputs or the "
            "outputs of its weight: mend its layout, or let it define `kernel_shape`."
        )


def _layouts(kind: Any) -> Iterator[tuple[str, Layout]]:
    layout = getattr(kind, "layout", None)
    for array, parts in layout.items() if isinstance(layout, Mapping) else [("", None)]:
        if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
            raise LoraError(
                f"{kind.__name__}.layout is {layout!r}, expected a tuple of groups of axes for each array, such as "
                '{"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")}.'
            )
        yield array, parts


def _is_same_class(one: type, other: type) -> bool:
    """Return whether a class is another one defined again, as in a notebook."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def kind_name(adapter: Adapter) -> str:
    """Return the name that an adapter's kind is registered under.

    Raises:
        LoraError: it is not registered.
    """
    kind = type(adapter)
    name = next((name for name, known in KINDS.items() if known is kind), None)
    if name is not None:
        return name
    if isinstance(adapter, AdapterWrapper):
        raise LoraError(f"{kind.__name__} is no kind of its own: take the adapters as they were before, without it.")
    if any(_is_same_class(kind, known) for known in KINDS.values()):
        raise LoraError(f"{kind.__name__} was defined again since this adapter was made: make the adapter again too.")
    raise LoraError(
        f"{kind.__name__} is no registered kind of adapter: write @lora.register_kind(name) over its class."
    )


def check_registered(adapter: Any) -> None:
    """Raise if an adapter is of a class that JAX does not know as a pytree."""
    if jax.tree_util.all_leaves([adapter]):
        kind_name(adapter)
