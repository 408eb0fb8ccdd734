"""Rules and adapters: what every kind of adapter can do.

A kind is two classes in one file. A `Rule` is what the user writes, `Lora(rank=8)`: it makes fresh adapters. An
`Adapter` holds the arrays of one weight. Its `merge` is the definition of the kind; everything else must agree with it.
In a program an adapter is an `Operand` (`core/operand.py`), which `lower` makes.

Axes: s stacked matrices, T rows of x, d inputs and k outputs of one matrix, r rank.
"""

import abc
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax

from lora_jax.core.axes import KernelAxes
from lora_jax.core.layout import Layout, field_names, weight_shape
from lora_jax.core.operand import Operand, check_delegation, spec_follower
from lora_jax.core.short_repr import ShortRepr, repr_of_arrays, repr_of_call


class Rule(ShortRepr, abc.ABC):
    """Say which adapter the weights that a pattern matches get. Arguments are checked when a rule is made.

    `whole` is for rules that take arrays of any shape, used in any way; `reads_weight` for those whose `init` looks at
    the numbers in W and not at its shape alone. `stack` are axes of the weight that are stacked matrices beside those
    that the program shows; `shares` names, for a group of axes, the array that all indices along them have in common.

    A kind of one's own is made by a subclass and `lora.register_kind`, whose example has both classes.

    >>> import lora_jax as lora
    >>> [isinstance(rule, lora.Rule) for rule in (lora.Lora(rank=8), lora.Full(), "Lora")]
    [True, True, False]
    """

    whole: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    stack: int | Sequence[int] | None = None
    shares: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @abc.abstractmethod
    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "Adapter":
        """Return a fresh adapter for a weight, of which only the shape is known unless the rule `reads_weight`.

        Args:
            key: a random key of this weight's own.
            w: the weight, or its `jax.ShapeDtypeStruct`.
            axes: which of its axes are stacked, inputs and outputs.
        """

    @abc.abstractmethod
    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        """Return the FLOPs that the adapter adds to a product.

        Args:
            shape, axes: of the weight.
            rows: the numbers of rows of x @ A and of h @ B, over all stacked matrices.
        """

    def at(self, path: str, shape: tuple[int, ...]) -> Self:
        """Return the rule for one weight, where it depends on the weight.

        Args:
            path: of the weight.
            shape: of the weight.
        """
        return self

    def among(self, fans: Iterable[tuple[int, int]]) -> Self:
        """Return the rule, where it depends on the (inputs, outputs) of all the matrices that it is used for.

        Args:
            fans: (inputs, outputs) of each matrix, numbers of entries.
        """
        return self

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        """Return why the rule cannot be used for a weight along these axes; None if it can.

        Args:
            shape: of the weight.
            axes: which of its axes are stacked, inputs and outputs.
        """
        return None

    def __repr__(self) -> str:
        return repr_of_call(self)


class Adapter(ShortRepr, abc.ABC):
    """A small change of one frozen weight W, as a pytree of its own beside W.

    A kind is a frozen dataclass of arrays and static facts, `axes` among these (`field(metadata={"static": True})`).

    Attributes:
        axes: which axes of W are stacked matrices, inputs and outputs.
        layout: for each array, the groups of W's axes that it has, such as `("stack", "inputs", "rank")`.
        frozen: the names of the arrays that are never trained.
        reads_weight: whether `lower` looks at the numbers in W.
        forms_weight: whether `lower` gives W' itself.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> adapter = lora.FullAdapter(jnp.full(3, 0.5), lora.KernelAxes(stack=(), inputs=(), outputs=(0,)))
    >>> isinstance(adapter, lora.Adapter), adapter.kernel_shape(), adapter.merge(jnp.ones(3)).tolist()
    (True, (3,), [1.5, 1.5, 1.5])
    """

    axes: KernelAxes
    layout: ClassVar[Mapping[str, Layout]]
    frozen: ClassVar[tuple[str, ...]] = ()
    reads_weight: bool = False
    forms_weight: bool = False

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """Return W', given W in fp32 or wider; both with W's own axes.

        Args:
            w: W.
        """

    @abc.abstractmethod
    def lower(self, w: Any) -> Operand | jax.Array:
        """Return the operand that stands for W' while tracing; called once per weight.

        Where W' is no larger than the adapter, as for biases, W' itself may be returned.

        Args:
            w: W, or its shape and dtype if the kind does not say `reads_weight`.
        """

    def lowering(self, w: Any) -> Callable[[Any], Operand | jax.Array]:
        """Return what lowers adapters that are equal to this one, as its copies are, each with a gradient of its own.

        A kind that `reads_weight` says here what it computes of W once for all of them.

        Args:
            w: as of `lower`.
        """
        return lambda adapter: adapter.lower(w)

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
        """Return the adapter with `change(array, layout)` in the place of each array, and with other axes if given.

        Args:
            change: takes an array and its layout, a tuple of the groups of W's axes that it has.
            axes: of the result; None for those that the adapter has.
        """
        arrays = {name: change(array, self.layout[name]) for name, array in self.arrays().items()}
        return dataclasses.replace(self, axes=axes or self.axes, **arrays)  # type: ignore[type-var]

    def specs(self, spec: jax.P) -> Self:
        """Return the partition specs of the arrays, where W's spec has an entry for each of its axes.

        Args:
            spec: of W, `jax.P` with as many entries as W has axes.
        """
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

    def __repr__(self) -> str:
        return repr_of_arrays(self, without=("axes",))


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
        own: dict[str, Any] = {n: False for n in field_names(self, static=False) if getattr(self, n) is not None}
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


check_delegation(AdapterWrapper, of=Adapter, own=("axes", "lower", "lowering"))


def is_adapter(node: Any) -> bool:
    """Return whether a node of a tree is an adapter: the `is_leaf` of every walk over adapters."""
    return isinstance(node, Adapter)


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
