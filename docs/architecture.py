"""Read the architecture off the imports: check its rules, draw its diagram, write its tables.

    python docs/architecture.py            redraw docs/architecture.svg and the tables in docs/architecture.md
    python docs/architecture.py --check    fail where a rule is broken, or where these files are out of date

`ROOMS` says which rooms there are and which others each may import. tests/test_architecture.py asserts that `problems`
finds none.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from house import Box, draw

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "lora_jax"
LONGEST = 400  # lines of a module
GROUND, TOP = "core", "the top"
FACADES = ("starts", "key_maps", "checkpoint", "initializers", "policies")  # public names of modules that lie in a room
# The core in the order in which it is best read.
READING = (
    "transform/apply.py",
    "transform/tracing.py",
    "transform/interpreter.py",
    "transform/adapted_weight.py",
    "transform/primitives/contractions.py",
    "core/products.py",
    "core/operand.py",
    "adapters/low_rank.py",
    "adapters/lora.py",
)


@dataclass(frozen=True)
class Room:
    """Some modules with one topic."""

    name: str
    about: str
    modules: tuple[str, ...]  # names, without the package's; all that begins with one of them and a dot belongs to it
    may_import: tuple[str, ...] = ()  # other rooms, all of them or single modules


# From the bottom to the top. A module belongs to the room with the longest name that it begins with.
_ROOMS = (
    Room(GROUND, "What all rooms share: adapters, axes, paths, products, packed weights.", ("core",)),
    Room("adapters", "The kinds of adapters, one formula a file.", ("adapters",), ("core",)),
    Room("losses", "Losses over a vocabulary that form no logits.", ("losses",), ("core",)),
    Room("transform", "lora_apply, plan, and merge, which is their definition.", ("transform",), ("core",)),
    Room(
        "interop",
        "Names and files of torch models.",
        (
            "interop.key_map",
            "interop.entries",
            "interop.name_templates",
            "interop.architectures",
            "interop.other_trees",
            "interop.safetensors_index",
            "interop.safetensors_writer",
            "interop._safetensors",
            "interop.model_config",
            "interop.low_bits",
        ),
        ("core",),
    ),
    Room("sharding", "Where adapters and batches are on a mesh.", ("sharding",), ("core", "transform")),
    Room("checkpoints", "Adapters and runs on disk.", ("checkpoints",), ("core", "adapters")),
    Room(
        "training",
        "One step, its gradient, its optimizers.",
        ("training",),
        ("core", "adapters", "transform", "sharding"),
    ),
    Room(
        "bases",
        "Frozen weights of fewer bits, their formats and files.",
        ("bases",),
        (
            "core",
            "sharding",
            "checkpoints.arrays",
            "interop.key_map",
            "interop.safetensors_index",
            "interop.low_bits.config",
            "interop.low_bits.files",
        ),
    ),
    Room(
        "initialization",
        "Fresh adapters; starts that look at weights, data or gradients.",
        ("initialization",),
        ("core", "adapters", "transform", "sharding", "checkpoints", "bases", "interop"),
    ),
    Room(
        "analysis",
        "What adapters and changes of weights amount to: norms and ranks; what a program takes on other machines.",
        ("analysis",),
        ("core", "adapters", "sharding", "training", "bases", "initialization"),
    ),
    Room(
        "algebra",
        "Adapters merged, truncated, and told from two checkpoints.",
        ("algebra",),
        ("core", "adapters", "initialization"),
    ),
    Room(
        "interop/peft",
        "The files of HF PEFT, read and written.",
        ("interop.peft",),
        ("core", "adapters", "checkpoints", "initialization", "interop"),
    ),
    Room(
        "interop (other formats)",
        "Whole checkpoints and further file formats, one file each.",
        ("interop",),
        ("core", "adapters", "checkpoints", "initialization", "interop", "interop/peft"),
    ),
)
_BELOW_CLI = tuple(room.name for room in _ROOMS)
ROOMS: tuple[Room, ...] = (
    *_ROOMS,
    Room("recipes", "Published models, examples as tokens, training runs.", ("recipes",), _BELOW_CLI),
    Room("cli", "The command lora-jax.", ("cli",), (*_BELOW_CLI, "recipes", *FACADES)),
    Room(
        TOP,
        "The public names. No room imports them from here.",
        ("", "flax_models", *FACADES),
        (*_BELOW_CLI, "recipes"),
    ),
)

Graph = Mapping[str, tuple[str, ...]]


def modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by their modules' names, without the package's own; "" is its `__init__`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> Graph:
    """Return the modules of the package that each of its modules imports, anywhere in its file.

    Imports inside functions count, and those for type checkers.
    """
    files = modules(root)
    return {name: tuple(sorted(set(_imported(root.name, name, path, files)))) for name, path in files.items()}


def _imported(package: str, module: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    own = (package, *module.split(".")) if module else (package,)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = len(own) - node.level + (path.name == "__init__.py")
            start = [*own[:above], *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            names = [[*filter(None, start), alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in names:
            if first == package:  # the longest beginning that is a module
                yield next(name for n in range(len(rest), -1, -1) if (name := ".".join(rest[:n])) in files)


def room_of(module: str) -> Room | None:
    """Return the room that a module belongs to."""

    def length(room: Room) -> int:
        return max((len(m) + 1 for m in room.modules if module == m or (m and module.startswith(f"{m}."))), default=0)

    room = max(ROOMS, key=length)
    return room if length(room) else None


def problems(root: Path = PACKAGE) -> list[str]:
    """Return what breaks the rules of the house, one sentence each."""
    files, graph = modules(root), imports(root)
    return [
        *_directions(graph),
        *_circles(graph),
        *(f"{name} belongs to no room of docs/architecture.py" for name in graph if room_of(name) is None),
        *(f"{name} has {n} lines, at most {LONGEST}" for name, path in files.items() if (n := _lines(path)) > LONGEST),
        *(f"{name} defines something" for name in FACADES if name in files and _defines(files[name])),
    ]


def _directions(graph: Graph) -> Iterator[str]:
    for module, imported in graph.items():
        for other in imported:
            room, its = room_of(module), room_of(other)
            if room and its and room is not its and not {its.name, other} & {*room.may_import}:
                yield f"{_called(module)} imports {_called(other)}, and {room.name} may not import {its.name}"


def _circles(graph: Graph) -> Iterator[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{' imports '.join(map(_called, reversed(error.args[1])))}: a circle"


def _called(module: str) -> str:
    return module or "__init__"


def _defines(path: Path) -> bool:
    """Return whether a module does more than import names: a docstring and `__all__` are no definitions."""
    allowed = (ast.ImportFrom, ast.Import)
    return any(
        not isinstance(node, allowed)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def diagram(root: Path = PACKAGE) -> str:
    """Return the drawing of all rooms, as an SVG."""
    files, graph = modules(root), imports(root)
    boxes = {}
    for room in ROOMS:
        shown = [(_shown(room, name), _lines(path)) for name, path in _files(room, files).items()]
        imported = _imported_rooms(room, files, graph)
        if shown:
            boxes[room.name] = Box(room.name, room.about, shown, [name for name in imported if name != GROUND])
    ground, roof = boxes.pop(GROUND), boxes.pop(TOP)
    return draw(
        ground,
        list(boxes.values()),
        roof,
        "A room imports core, and the rooms that its lines lead down to. Numbers are lines of code.",
    )


def _files(room: Room, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of a room, without the `__init__` of its folders, which only say what is in there."""
    return {n: p for n, p in files.items() if room_of(n) is room and (room.name == TOP or p.name != "__init__.py")}


def _imported_rooms(room: Room, files: Mapping[str, Path], graph: Graph) -> list[str]:
    found = {room_of(other) for name in files if room_of(name) is room for other in graph[name]}
    return [other.name for other in ROOMS if other in found and other is not room and other is not ROOMS[-1]]


def _shown(room: Room, name: str) -> str:
    """Return what a file is called within its room."""
    folder = name.partition(".")[0] if room.name != "interop/peft" else "interop.peft"
    return (name.removeprefix(f"{folder}.") or "__init__").replace(".", "/")


def tables(root: Path = PACKAGE) -> dict[str, str]:
    """Return the tables of docs/architecture.md, by the names in its markers."""
    files, graph = modules(root), imports(root)
    rows = [["file", "lines", "what it says of itself"]]
    for name in READING:
        path = root / name
        rows.append([f"[{name}](../{root.name}/{name})", str(_lines(path)), _summary(path)])
    total = sum(_lines(root / name) for name in READING)
    core = f"{_table(rows)}\n\n{len(READING)} files of {total:,} lines together."

    rows = [["room", "what is there", "files", "lines", "imports"]]
    for room in ROOMS:
        if own := _files(room, files):
            imported = ", ".join(_imported_rooms(room, files, graph)) or "nothing"
            lines = sum(map(_lines, own.values()))
            rows.append([room.name, room.about, str(len(own)), f"{lines:,}", imported])
    return {"core": core, "rooms": _table(rows)}


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def with_tables(text: str, root: Path = PACKAGE) -> str:
    """Return the text with each table between its markers, `<!-- name -->` and `<!-- end of name -->`."""
    for name, table in tables(root).items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no place for a table between {start} and {end}")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main(check: bool) -> int:
    """Write the diagram and the tables, or with `check` compare them; return the exit status."""
    svg, page = DOCS / "architecture.svg", DOCS / "architecture.md"
    wanted = {svg: diagram(), page: with_tables(page.read_text(encoding="utf-8"))}
    failures = problems()
    for path, text in wanted.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            failures.append(f"{path.name} is out of date: make architecture")
    print("\n".join(failures) or "The architecture is as it is drawn.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
