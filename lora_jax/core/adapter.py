"""Rules and adapters: what every kind of adapter can do, and the registry of kinds.

A kind is two classes in one file. A `Rule` is what the user writes, `Lora(rank=8)`: it makes fresh adapters. An
`Adapter` holds the arrays of one weight. Its `merge` is the definition of the kind; everything else must agree with it.
In a program an adapter is an `Operand` (`core/operand.py`), which `lower` makes.

Axes: s stacked matrices, T rows of x, d inputs and k outputs of one matrix, r rank.
"""

import abc
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout, field_names, weight_shape
from lora_jax.core.operand import Operand, check_delegation, spec_follower
from lora_jax.core.paths import is_array, nearest


class Rule(abc.ABC):
    """Say which adapter the weights that a pattern matches get. Arguments are checked when a rule is made.

    `whole` is for rules that take arrays of any shape, used in any way; `reads_weight` for those whose `init` looks at
    the numbers in W and not at its shape alone.
    """

    whole: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "Adapter":
        """Return a fresh adapter for a weight, of which only the shape is known unless the rule `reads_weight`."""

    @abc.abstractmethod
    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        """Return the FLOPs that the adapter adds to a product.

        Args:
            shape, axes: of the weight.
            rows: the numbers of rows of x @ A and of h @ B, over all stacked matrices.
        """

    def at(self, path: str, shape: tuple[int, ...]) -> Self:
        """Return the rule for one weight, where it depends on the weight."""
        return self

    def among(self, fans: Iterable[tuple[int, int]]) -> Self:
        """Return the rule, where it depends on the (inputs, outputs) of all the matrices that it is used for."""
        return self

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        """Return why the rule cannot be used for a weight along these axes; None if it can."""
        return None


class Adapter(abc.ABC):
    """A small change of one frozen weight W, as a pytree of its own beside W.

    A kind is a frozen dataclass of arrays and static facts, `axes` among these (`field(metadata={"static": True})`).

    Attributes:
        axes: which axes of W are stacked matrices, inputs and outputs.
        layout: for each array, the groups of W's axes that it has, such as `("stack", "inputs", "rank")`.
        frozen: the names of the arrays that are never trained.
        reads_weight: whether `lower` looks at the numbers in W.
        forms_weight: whether `lower` gives W' itself.
    """

    axes: KernelAxes
    layout: ClassVar[Mapping[str, Layout]]
    frozen: ClassVar[tuple[str, ...]] = ()
    reads_weight: bool = False
    forms_weight: bool = False

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """Return W', given W in fp32 or wider; both with W's own axes."""

    @abc.abstractmethod
    def lower(self, w: Any) -> Operand | jax.Array:
        """Convert the adapter to the operand used while tracing; called once per weight.

        Where W' is no larger than the adapter, as for biases, W' itself may be returned.
        """

    def to_lora(self) -> "Adapter | None":
        """Return the `LoraAdapter` with the same `merge`, which files and sums of adapters are made of.

        None stands for a kind that is no LoRA: such adapters are refused there by name.
        """
        return None

    def arrays(self) -> dict[str, jax.Array]:
        """Return the arrays, by the names of their fields. Some kinds can do without one of theirs."""
        found = {name: getattr(self, name) for name in field_names(self, static=False)}
        return {name: array for name, array in found.items() if array is not None}

    def replace_arrays(self, change: Callable[[Any, Layout], Any], axes: KernelAxes | None = None) -> Self:
        """Return the adapter with `change(array, layout)` in the place of each array, and with other axes if given."""
        arrays = {name: change(array, self.layout[name]) for name, array in self.arrays().items()}
        return dataclasses.replace(self, axes=axes or self.axes, **arrays)  # type: ignore[type-var]

    def specs(self, spec: jax.P) -> Self:
        """Return the partition specs of the arrays, where W's spec has an entry for each of its axes."""
        return self.replace_arrays(spec_follower(spec, self.axes))

    def kernel_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that this adapter fits.

        Raises:
            LoraError: its arrays do not fit one another.
        """
        return weight_shape(self.arrays(), self.layout, self.axes)

    def trainable(self) -> Self:
        """Return the same tree with True at what is trained and False at what is frozen."""
        arrays: dict[str, Any] = {name: name not in self.frozen for name in self.arrays()}
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]


class AdapterWrapper(Adapter):
    """An adapter that changes how another one meets a product. It says how it is lowered, and nothing else.

    Everything else is what the adapter inside says.
    """

    inner: Adapter
    layout: ClassVar[Mapping[str, Layout]] = MappingProxyType({})

    @property
    def asked(self) -> Adapter:
        """Return the adapter that answers in this one's place."""
        return self.inner

    def merge(self, w: jax.Array) -> jax.Array:
        return self.asked.merge(w)

    def to_lora(self) -> Adapter | None:
        return self.asked.to_lora()

    def arrays(self) -> dict[str, jax.Array]:
        return self.asked.arrays()

    def replace_arrays(self, change: Callable[[Any, Layout], Any], axes: KernelAxes | None = None) -> Any:
        return self.asked.replace_arrays(change, axes)

    def specs(self, spec: jax.P) -> Any:
        return self.asked.specs(spec)

    def kernel_shape(self) -> tuple[int, ...]:
        return self.asked.kernel_shape()

    def trainable(self) -> Self:
        own: dict[str, Any] = dict.fromkeys(field_names(self, static=False), False)
        return dataclasses.replace(self, **own | {"inner": self.inner.trainable()})  # type: ignore[type-var]

    @property
    def frozen(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.frozen

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.inner.reads_weight

    @property
    def forms_weight(self) -> bool:  # type: ignore[override]
        return self.inner.forms_weight


check_delegation(AdapterWrapper, of=Adapter, own=("axes", "lower"))


# The registry of kinds ------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Adapter]] = {}  # by the names that checkpoints know them under

Kind = TypeVar("Kind", bound=type[Adapter])


def register_kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of adapter: a frozen dataclass, made a pytree here, which checkpoints know under this name.

    From then on adapters of the kind are planned, applied, merged, saved, restored and inspected as those of this
    library are; and exported as the LoRA that `to_lora` gives, or refused by name. `examples/own_kind.py` writes one.

    Args:
        name: in checkpoints; it has to stay the same for as long as there are any.

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
            KINDS[name] = jax.tree_util.register_dataclass(kind)
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


# Lowering, with other adapters in the place of some ------------------------------------------------------------------

_stand_ins: contextvars.ContextVar[dict[Any, Adapter]] = contextvars.ContextVar("stand-ins", default={})  # noqa: B039


@contextlib.contextmanager
def stand_ins(pairs: Iterable[tuple[Adapter, Adapter]]) -> Iterator[None]:
    """Lower, inside, the second adapter of each pair in the place of the first.

    The first is known by its very arrays. A program that computes something of them, and applies that, applies what it
    computed; and a program that only looks at them finds them as they are.
    """
    known = [(*_identity(adapter), adapter, other) for adapter, other in pairs]  # held, so that ids stay their own
    token = _stand_ins.set({(tree, ids): other for tree, ids, _, other in known})
    try:
        yield
    finally:
        _stand_ins.reset(token)


def lower(adapter: Adapter, w: Any) -> Operand | jax.Array:
    """Lower an adapter, or the one that stands in for it."""
    others = _stand_ins.get()
    return (others.get(_identity(adapter), adapter) if others else adapter).lower(w)


def _identity(adapter: Adapter) -> tuple[Any, tuple[int, ...]]:
    leaves, tree = jax.tree.flatten(adapter)
    return tree, tuple(map(id, leaves))


# Adapters beside parameters -------------------------------------------------------------------------------------------


def is_adapter(node: Any) -> bool:
    """Return whether a node of a tree is an adapter: the `is_leaf` of every walk over adapters."""
    return isinstance(node, Adapter)


def check_adapters(adapters: Mapping[str, Adapter], names: list[str], leaves: list[Any]) -> None:
    """Check that every adapter has its weight and fits it.

    Raises:
        LoraError: the adapters are no `{path: adapter}`; a path is not among the parameters, or is no array of floats
            there; shapes differ.
    """
    if not isinstance(adapters, Mapping):
        raise LoraError(
            f"adapters are a dict {{path: adapter}} as lora.init makes it, found {type(adapters).__name__}."
        )
    weights = dict(zip(names, leaves, strict=True))
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise LoraError(
                f"adapters[{path!r}] is a {type(adapter).__name__}, expected an adapter as lora.init makes it."
            )
        check_registered(adapter)
        if path not in weights:
            near = ", ".join(map(repr, nearest(path, names)))
            raise LoraError(
                f"there is an adapter for {path!r}, but the parameters have no such path; the nearest are {near}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )
        weight = weights[path]
        if not (is_array(weight) and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = weight.dtype if is_array(weight) else type(weight).__name__
            raise LoraError(f"there is an adapter for {path!r}, but that is {found}, expected an array of floats.")
        dtypes = sorted({str(a.dtype) for a in jax.tree.leaves(adapter) if _is_counted(a.dtype)})
        if dtypes:
            raise LoraError(
                f"the adapter for {path!r} holds {', '.join(dtypes)} arrays, expected floats: cast them back with "
                "jax.tree.map(lambda array: array.astype(jnp.float32), adapters)."
            )
        try:
            found, expected = adapter.kernel_shape(), tuple(weight.shape)
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error} lora.init makes one that fits.") from None
        if found != expected:
            raise LoraError(
                f"the adapter for {path!r} fits a weight of shape {list(found)}, "
                f"but the parameter has {list(expected)}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )


def _is_counted(dtype: Any) -> bool:
    return not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jax.dtypes.prng_key))
