"""Where in a program it is that a compiler, or JAX on the way there, refuses it.

Compilers name their own instructions. Where they add the user's line, that is taken; else the lowered program is
searched for what they name: a kernel, a custom call, or an operation on an array of that shape.
"""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

HERE = str(Path(__file__).parent / "compile_report.py")  # calls the user's function; what is around it is no part of it
PACKAGES = Path(jax.__file__).resolve().parent.parent
LORA_JAX = f"{Path(__file__).resolve().parents[1]}/"
LIBRARIES = (LORA_JAX, *(f"{PACKAGES / name}/" for name in ("jax", "jaxlib", "flax", "optax")))
LONGEST = 600  # characters of a message's first line: some print whole programs in it
MOST = 3  # places that a message names
LINES = (
    re.compile(r'"(?P<name>[^"]*)"\("(?P<file>[^"]+)":(?P<line>\d+)'),  # MLIR: "function"("file.py":12:4 to :9)
    re.compile(r"(?P<file>/[^\s:]+):(?P<line>\d+):\d+(?: \[(?P<name>[^\]]*)\])?"),  # XLA: /file.py:12:4 [function]
    re.compile(r'source_file="(?P<file>[^"]+)" source_line=(?P<line>\d+)'),  # of an instruction
)
# XLA's names of dtypes that are not those of MLIR with another first letter.
DTYPES = {"pred": "i1", "bf16": "bf16", "c64": "complex<f32>", "c128": "complex<f64>"}


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says; two lines if the first is a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {line if len(line) <= LONGEST else f'{line[:LONGEST]} ...'}"


def traced_at(error: BaseException) -> str:
    """Return the line of a function that could not be traced or lowered, as in "; at model.py:12 (attention)".

    It is the user's, or one of JAX where no line of the user's is known. JAX hands on the line of an operation that it
    cannot lower as the cause of its error.
    """
    before = _frames(error.__cause__) if error.__cause__ else []
    own = [frame for frame in [*_frames(error), *before] if not frame.filename.startswith(LIBRARIES)]
    return "".join(f"; at {frame.filename}:{frame.lineno} ({frame.name})" for frame in (own or before)[:1])


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of a traceback inside of the user's function, the innermost first."""
    found = traceback.extract_tb(error.__traceback__)
    start = max((i + 1 for i, frame in enumerate(found) if frame.filename == HERE), default=0)
    return list(reversed(found[start:]))


def compiled_at(said: str, program: Any) -> str:
    """Return the part of a lowered program that a compiler's message is about, as in "; at model.py:12 (attention)".

    Args:
        said: the message.
        program: what `jax.jit(...).lower` returns.
    """
    name = re.findall(r'op_name="([^"]+)"', said)  # the scopes around an operation
    places = [line] if (line := _line(said)) else list(dict.fromkeys(_operations(said, program))) or name[:1]
    if not places:
        return "; it names no part of the program"
    more = f", and {len(places) - MOST} more" if len(places) > MOST else ""
    return f"; at {' or '.join(places[:MOST])}{more}"


def _line(text: str) -> str | None:
    """Return the innermost line of the user's that a text names."""
    text = text.split(HERE)[0]
    for pattern in LINES:
        for found in pattern.finditer(text):
            if not found["file"].startswith(LIBRARIES):
                name = found.groupdict().get("name")
                return f"{found['file']}:{found['line']}" + (f" ({name})" if name else "")
    return None


def _operations(said: str, program: Any) -> list[str]:
    """Return the operations that a message names: by the name of a kernel or call, else by what they do and a shape."""
    words = dict.fromkeys(re.findall(r"(?<![%.\w])\w+", said))  # without names of instructions, %tanh.2
    does = dict.fromkeys(word.lower() for word in words)
    types = tuple(f"tensor<{'x'.join([*dims.split(','), _dtype(dtype)])}>" for dtype, dims in _arrays(said))
    named: list[str] = []
    alike: list[str] = []
    for op, line in _walk(program.compiler_ir().operation, "an unknown line", {}):
        kind, kernel = op.name.split(".")[-1], _attribute(op, "kernel_name")
        call = _attribute(op, "call_target_name") if kind == "custom_call" else None
        place = f"{line}, {kernel or kind}"
        if kernel in words or (not kernel and call in words):
            named.append(place)
        elif kernel if "vmem" in does else kind in does:  # only kernels are short of vmem
            alike += [place] if any(str(value.type) in types for value in (*op.operands, *op.results)) else []
    return named or alike


def _walk(op: Any, around: str, calls: dict[str, str]) -> Iterator[tuple[Any, str]]:
    """Yield the operations in a module and their lines; one without a line has that of the operation or call around."""
    for region in op.regions:
        for block in region.blocks:
            for inner in (found.operation for found in block.operations):
                line = _line(str(inner.location)) or calls.get(_attribute(inner, "sym_name") or "", around)
                if callee := _attribute(inner, "callee"):
                    calls.setdefault(callee, line)
                yield inner, line
                yield from _walk(inner, line, calls)


def _attribute(op: Any, name: str) -> str | None:
    return str(op.attributes[name]).strip('"@') if name in op.attributes else None


def _arrays(said: str) -> list[tuple[str, str]]:
    """Return the dtypes and the shapes, such as "8,128", of the arrays that a message names."""
    return re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]+)\]", said)


def _dtype(dtype: str) -> str:
    """Return MLIR's name of one of XLA's dtypes."""
    return DTYPES.get(dtype) or re.sub(r"^s(?=\d)", "i", re.sub(r"^u(?=\d)", "ui", dtype)).replace("f8e", "f8E")
