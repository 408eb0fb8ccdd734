"""Reprs of one line: of rules the arguments that were given, of adapters and packed weights the shapes of their arrays.

No repr looks at the numbers in an array, which would wait for a device, and none depends on what the leaves are: under
`jit`, in masks, specs and shapes they are tracers, flags, None or markers of other libraries.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

_PLAIN = bool | int | float | complex | str | bytes | None
SHOWN = 4  # entries of a tuple in the repr of an adapter


class ShortRepr:
    """A base of dataclasses that keep the `__repr__` they inherit."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # or `dataclass` would write one, with all numbers of all arrays
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]


def repr_of_call(node: Any) -> str:
    """Return the call that makes a dataclass, with the arguments that are not their defaults.

    Python evaluates it to an equal one, where the arguments are numbers, texts, dtypes and functions with names, and
    `jnp` and the functions are known.
    """
    if not dataclasses.is_dataclass(node):
        return object.__repr__(node)
    fields = sorted((f for f in dataclasses.fields(node) if f.init and f.repr), key=lambda f: bool(f.kw_only))
    given = [(f, getattr(node, f.name, None)) for f in fields]
    arguments = [f"{f.name}={_argument(f.name, value)}" for f, value in given if not _is_same(value, f.default)]
    return f"{type(node).__name__}({', '.join(arguments)})"


def repr_of_arrays(node: Any, without: tuple[str, ...] = ()) -> str:
    """Return the class of a dataclass, the shapes of its arrays and its static facts, but for some fields."""
    if not dataclasses.is_dataclass(node):
        return object.__repr__(node)
    names = [f.name for f in dataclasses.fields(node) if f.name not in without]
    return f"{type(node).__name__}({', '.join(parts(node, names))})"


def parts(node: Any, names: list[str]) -> Iterator[str]:
    """Yield the name and the value of each of these fields, as in `a 768x8`."""
    return (f"{name} {brief(getattr(node, name, None))}" for name in names)


def shape_and_dtype(shape: Any, dtype: Any) -> str:
    """Return a shape, and the dtype unless it is fp32, as in `768x8 bfloat16`."""
    sizes = "x".join(map(str, shape)) or "scalar"
    name = str(getattr(dtype, "name", dtype))
    return sizes if name == "float32" else f"{sizes} {name}"


def brief(value: Any) -> str:
    """Return what a field of an adapter holds, in a few words."""
    value = _as_python(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and len(value) > SHOWN and all(isinstance(one, _PLAIN) for one in value):
        return f"({', '.join(map(repr, value[:SHOWN]))}, ...)"
    return _short(value)


def _argument(name: str, value: Any) -> str:
    if name == "stack" and isinstance(value, tuple) and len(value) == 1:
        return repr(value[0])  # as it is written, stack=0
    if isinstance(value, tuple) and len(value) > SHOWN and _is_consecutive(value):
        return f"range({value[0]}, {value[-1] + 1})"
    return _short(value)


def _short(value: Any) -> str:
    """Return a repr that Python reads where it can be one, and a few words where not."""
    value = _as_python(value)
    if isinstance(value, _PLAIN | ShortRepr | jax.P):
        return repr(value)
    if isinstance(value, tuple):  # NamedTuples too have reprs that begin with their names
        text = ", ".join(map(_short, value)) + ("," if len(value) == 1 else "")
        return f"({text})" if type(value) is tuple else f"{type(value).__name__}({text})"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_short(key)}: {_short(one)}' for key, one in value.items())}}}"
    if (name := _dtype_name(value)) is not None:
        return f"jnp.{name}"
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype"):
        return shape_and_dtype(value.shape, value.dtype)
    if isinstance(value, functools.partial):
        more = [_short(one) for one in value.args] + [f"{name}={_short(one)}" for name, one in value.keywords.items()]
        return f"partial({', '.join([_short(value.func), *more])})"
    return _name(value) if callable(value) and hasattr(value, "__qualname__") else f"<{type(value).__name__}>"


def _as_python(value: Any) -> Any:
    """Return a number of numpy's as Python's."""
    return value.item() if isinstance(value, np.generic) and isinstance(value.item(), _PLAIN) else value


def _name(function: Any) -> str:
    """Return the name of a function as a user writes it: `initializers.gaussian`, and `mine` in a script of its own."""
    module = str(getattr(function, "__module__", None) or "")
    own = module.startswith("lora_jax.") and not isinstance(function, type)
    return f"{module.rpartition('.')[2]}.{function.__qualname__}" if own else str(function.__qualname__)


def _dtype_name(value: Any) -> str | None:
    """Return the name of a dtype, in any form that one is given in; None of what is no dtype."""
    if isinstance(value, type) and issubclass(value, np.generic):
        return np.dtype(value).name
    dtype = value if isinstance(value, np.dtype) else getattr(value, "dtype", None)
    is_dtype = isinstance(value, np.dtype) or (callable(value) and isinstance(dtype, np.dtype))  # as jnp.bfloat16 is
    return str(dtype.name) if dtype is not None and is_dtype else None


def _is_same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if (name := _dtype_name(default)) is not None:
        return _dtype_name(value) == name
    plain = all(isinstance(one, _PLAIN | tuple) for one in (value, default))
    return plain and bool(value == default)


def _is_consecutive(value: tuple[Any, ...]) -> bool:
    return all(type(one) is int and one == value[0] + i for i, one in enumerate(value))
