"""The public names of the package, and which of them a word in a docstring or a class in a signature is."""

import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

PACKAGE = "lora_jax"


def find(name: str) -> Any:
    """Return what a public name stands for: `lora_jax.plan`, `lora_jax.bases` or `lora_jax.bases.Nf4`."""
    owner, _, last = name.rpartition(".")
    return getattr(find(owner), last) if owner else importlib.import_module(name)


def public_names() -> Iterator[str]:
    """Yield the names of `lora_jax.__all__`, and those of its modules', in order."""
    package = find(PACKAGE)
    for name in package.__all__:
        yield f"{PACKAGE}.{name}"
        if inspect.ismodule(module := getattr(package, name)):
            yield from (f"{PACKAGE}.{name}.{inner}" for inner in module.__all__)


def linked_name(code: str) -> str | None:
    """Return the public name that code in a docstring is: a class by its last name, others behind `lora.`.

    >>> linked_name("Lora"), linked_name("lora.init()"), linked_name("plan")  # which may be an argument
    ('lora_jax.Lora', 'lora_jax.init', None)
    """
    name = code.removesuffix("()")
    owner, _, rest = name.partition(".")
    if not name[:1].isupper() and owner not in ("lora", PACKAGE):
        return None
    whole = f"{PACKAGE}.{name if name[:1].isupper() else rest}"
    return whole if whole in _known() else None


def public_name_of(written: str) -> str | None:
    """Return the public name of a class or function, given the module that it is written in and its name there."""
    return _by_place().get(written)


@cache
def _known() -> frozenset[str]:
    return frozenset(public_names())


@cache
def _by_place() -> dict[str, str]:
    found = ((name, find(name)) for name in public_names())
    return {f"{it.__module__}.{it.__qualname__}": name for name, it in found if hasattr(it, "__qualname__")}
