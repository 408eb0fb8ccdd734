"""What the docstring of a public name says, and what one lacks: the rules of the reference, checked one name at a time.

Docstrings are in Google's style, as Sphinx's napoleon reads it. `lacking` says for each public name what is missing.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import lora_jax as lora

MODULES = ("bases", "checkpoint", "initializers", "key_maps", "losses", "policies", "recipes", "starts")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
LITERATURE = re.compile(r"arXiv|doi|Proceedings|[A-Z][a-z]+ et al\.? \d{4}|[A-Z][a-z]+ \d{4}, ")
AS_OF = re.compile(r"[Aa]rguments(?: and errors)?(?: are those)? (?:as )?of `(\w+)`")
ENTRY = re.compile(r"(\**\w+(?:, \**\w+)*)(?: \([^)]*\))?:(?: |$)")


class Public(NamedTuple):
    """A public name: of a module, or of a class."""

    name: str  # as it is written, such as "bases.Nf4" or "Plan.table"
    value: Any
    owner: type | None = None  # the class that it is a method or a property of


# What is public ------------------------------------------------------------------------------------------------------


def public_names() -> Iterator[Public]:
    """Yield the public names of the package and of its public modules, and of their classes."""
    for module, prefix in [(lora, ""), *((importlib.import_module(f"lora_jax.{m}"), f"{m}.") for m in MODULES)]:
        for name in module.__all__:
            value = getattr(module, name)
            yield Public(prefix + name, value)
            if inspect.isclass(value):
                yield from (Public(f"{prefix}{name}.{m}", member, value) for m, member in members(value))


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class has from this package."""
    seen: set[str] = set()
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for base in cls.__mro__:
        if not base.__module__.startswith("lora_jax"):
            continue
        for name, value in vars(base).items():
            if (getattr(value, "__doc__", None) or "").startswith("Refuse to be"):
                continue  # what an array has and a packed weight refuses, with a message that says what to do
            is_member = isinstance(value, property | functools.cached_property | classmethod | staticmethod)
            if not name.startswith("_") and name not in seen | fields and (is_member or inspect.isfunction(value)):
                yield name, value
            seen.add(name)


# What a docstring says -----------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """Return the sections of a docstring by their names, each without its indentation; the rest is under ""."""
    found, name = {"": ""}, ""
    for line in text.splitlines():
        if (heading := line.rstrip().removesuffix(":")) in SECTIONS and line.rstrip().endswith(":"):
            name = heading
            found[name] = ""
        elif name and line and not line.startswith(" "):
            name = ""
        if line.rstrip() != f"{name}:":
            found[name] += f"{line}\n"
    return {name: textwrap.dedent(body) for name, body in found.items()}


def entries(body: str) -> list[str]:
    """Return the names that a section has entries for, in order: `a, b: ...` is one for each of the two."""
    names = []
    for line in body.splitlines():
        if not line.startswith(" ") and (entry := ENTRY.match(line)):
            names += [name.strip("* ") for name in entry[1].split(",")]
    return names


def documents(of: Public) -> list[str]:
    """Return the docstring of a name. Of a method, those of the methods that it overrides follow."""
    if of.owner is None:
        return [inspect.cleandoc(getattr(of.value, "__doc__", None) or "")]
    name = of.name.rpartition(".")[2]
    found = [vars(base)[name] for base in of.owner.__mro__ if name in vars(base)]
    return [inspect.cleandoc(value.__doc__) for value in found if getattr(value, "__doc__", None)] or [""]


def said(of: Public) -> dict[str, str]:
    """Return the sections of a name's docstring. What a method does not say again is what the one it overrides says."""
    found: dict[str, str] = {}
    for text in documents(of):
        found = sections(text) | found
    return found


def _called(value: Any) -> Any:
    """Return what a method calls: the function in a class method or a static one."""
    return getattr(value, "__func__", value)


def parameters(of: Public) -> list[str]:
    """Return the parameters of a call, without `self`; none of what is no call."""
    value = _called(of.value)
    if isinstance(value, property | functools.cached_property) or not callable(value):
        return []
    if inspect.isclass(value) and issubclass(value, Exception):
        return []
    names = [name for name in inspect.signature(value).parameters if not name.startswith("_")]
    return names[1:] if of.owner is not None and names[:1] in (["self"], ["cls"]) else names


def positional(of: Public, names: list[str]) -> list[str]:
    """Return the names of the parameters that may be given by position: only their order is a part of the call."""
    if not parameters(of):
        return []
    kinds = {p.name: p.kind for p in inspect.signature(_called(of.value)).parameters.values()}
    return [
        name for name in names if kinds.get(name) not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    ]


# What code does ------------------------------------------------------------------------------------------------------


@functools.cache
def definitions(module: ModuleType) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return the functions, classes and methods (`Class.name`) of a module, and the comments of its constants."""
    source = inspect.getsource(module)
    lines, tree = source.splitlines(), ast.parse(source)
    found: dict[str, ast.AST] = {}
    comments: dict[str, str] = {}
    for node, following in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            above = lines[node.lineno - 2].strip()
            below = following.value.value if _is_text(following) else ""
            comment = above[2:].strip() if above.startswith("#:") else below
            comments |= {target.id: comment for target in targets if isinstance(target, ast.Name)}
    return found, comments


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def raises(of: Public) -> bool:
    """Return whether a call raises LoraError by itself: in its own body, or in functions of its file that it calls.

    A call of `refuse...` or of `check_...` counts, as that is what these are for.
    """
    value = inspect.unwrap(_called(of.value))
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    found, _ = definitions(inspect.getmodule(value))
    starts = [value.__qualname__]
    if inspect.isclass(value):
        starts = [f"{value.__name__}.{part}" for part in ("__init__", "__new__", "__post_init__")]
    todo, done = [name for name in starts if name in found], set()
    while todo:
        name = todo.pop()
        done.add(name)
        for node in ast.walk(found[name]):
            if isinstance(node, ast.Raise) and "LoraError" in ast.unparse(node):
                return True
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.startswith(("refuse", "check_")):
                    return True
                own = f"{name.partition('.')[0]}.{called.removeprefix('self.')}" if "self." in called else called
                made = (
                    [f"{own}.__init__", f"{own}.__post_init__"] if isinstance(found.get(own), ast.ClassDef) else [own]
                )
                todo += [name for name in made if name in found and name not in done]
    return False


# What is lacking -----------------------------------------------------------------------------------------------------


def lacking(of: Public, *, sourced: bool = False, exempt: bool = False) -> list[str]:
    """Return what the docstring of a public name lacks.

    Args:
        of: the name.
        sourced: whether it stands for a method of the literature, so that its paper is named.
        exempt: whether it needs no example.
    """
    if inspect.ismodule(of.value):
        return [] if of.value.__doc__ else ["a docstring"]
    if not (callable(of.value) or of.owner):
        return _lacking_of_constant(of)
    text, parts = documents(of)[0], said(of)
    lacks = [] if text.partition("\n")[0].endswith((".", ":", "?")) else ["a summary in one line"]
    wanted, given = parameters(of), entries(parts.get("Args", ""))
    if inspect.isclass(of.value) and not given:
        given = [name for name in entries(parts.get("Attributes", "")) if name in wanted]
    if reference := AS_OF.search(text):
        given = [name for name in wanted if name in {*given, *parameters(_public(reference[1]))}]
    is_abstract = inspect.isclass(of.value) and inspect.isabstract(of.value)
    if not is_abstract and (set(given) != set(wanted) or positional(of, given) != positional(of, wanted)):
        lacks.append(f"Args: {', '.join(wanted)} (it has {', '.join(given) or 'none'})")
    if _returns(of) and "Returns" not in parts and "Yields" not in parts:
        if of.owner is None:
            lacks.append("Returns:")
        elif not re.search(r"\b([Rr]eturn|Yield|Make|Read)\b", text.partition("\n\n")[0]):
            lacks.append("Returns:, or a summary that begins with 'Return '")
    if raises(of) and "Raises" not in parts:
        lacks.append("Raises:")
    if of.owner is None and not exempt and not _has_example(of.value, text):
        lacks.append("an example, >>>")
    if sourced and not LITERATURE.search(text):
        lacks.append("its paper")
    return lacks


def _public(name: str) -> Public:
    """Return the public name that ends with another one, as docstrings name their neighbours."""
    return next(of for of in public_names() if of.name.rpartition(".")[2] == name and of.owner is None)


def _returns(of: Public) -> bool:
    """Return whether a function or a method returns anything."""
    if inspect.isclass(of.value) or isinstance(of.value, property | functools.cached_property):
        return False
    value = inspect.unwrap(_called(of.value))
    return inspect.signature(value).return_annotation not in (None, "None")


def _has_example(value: Any, text: str) -> bool:
    """Return whether a name has an example; for a class, that of any of its methods will do."""
    own = dict(members(value)) if inspect.isclass(value) else {}
    return ">>>" in text or any(">>>" in (member.__doc__ or "") for member in own.values())


def _lacking_of_constant(of: Public) -> list[str]:
    """A constant is documented where it is defined: by `#:` above it or by a string below, which autodoc finds."""
    name = of.name.rpartition(".")[2]
    for module in _modules_below(of.name):
        _, comments = definitions(module)
        if name in comments:
            return [] if comments[name].strip() else ["a comment '#: ...' above it, or a string below"]
    return ["a definition"]


def _modules_below(name: str) -> Iterator[ModuleType]:
    """Yield the modules that a public name may be defined in: the public one, and what that imports it from."""
    module = importlib.import_module(f"lora_jax.{name.rpartition('.')[0]}")
    yield module
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name.rpartition(".")[2] for alias in node.names):
            yield importlib.import_module(node.module)
