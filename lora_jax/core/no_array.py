"""What a packed weight says where a program takes it for an array, as the plain function does."""

from collections.abc import Callable
from typing import Any, NoReturn

from lora_jax.core.errors import LoraError

# What programs do to a weight first: products and sums, conversions by JAX and NumPy, lookups, views.
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_ASKED = (
    *(f"__{side}{name}__" for name in _OPERATORS for side in ("", "r")),
    *("__neg__", "__jax_array__", "__array__", "__getitem__"),
    *("astype", "reshape", "transpose", "swapaxes"),
)


class NoArray:
    """A node of a tree that stands for an array, and is none: each use as one is an error that says what to do."""

    __array_ufunc__ = None  # NumPy's arrays leave their products with it to the methods here

    @property
    def T(self) -> Any:  # noqa: N802 (the name of it in JAX and NumPy)
        """Refuse to be transposed.

        Raises:
            LoraError: always.
        """
        refuse_use(self)


def refuse_use(node: Any) -> NoReturn:
    """Raise for a packed weight that a function of arrays is given."""
    raise LoraError(
        f"the {type(node).__name__} of shape {list(node.shape)} is a packed weight, and no array: call "
        "lora.lora_apply(fn)(params, {}, ...) in the place of fn(params, ...), with adapters or without, or unpack all "
        "of them: params = lora.bases.dense(params)."
    )


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_use(self)

    method.__name__, method.__qualname__ = name, f"NoArray.{name}"
    method.__doc__ = "Refuse to be taken for an array."
    return method


for _name in _ASKED:
    setattr(NoArray, _name, _refusing(_name))
