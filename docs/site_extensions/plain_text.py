"""Make reStructuredText of docstrings, which are plain text with `code` in backticks, examples and indented blocks.

A reader of the source sees `[*stack, d]`, |s| and s * A B as they are. Sphinx would take the stars and bars for markup,
so they are escaped; a block that is indented below a paragraph is shown as it stands. Code that is a public name,
`Lora` or `lora.init`, is a link.
"""

import re
from collections.abc import Sequence

from site_extensions.names import linked_name

CODE = re.compile(r"(`+[^`]+`+)")
SPECIAL = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")  # emphasis, substitutions, escapes, and names that end as links do
MAY_STAND_BEFORE_CODE = "'\"([{<-/: \n"  # by the rules of reStructuredText
MAY_STAND_BEHIND_CODE = "'\")]}>-/:.,;!? \n"
EXAMPLE = ">>>"
SECTION = re.compile(r" *\w+:$")


def as_restructured_text(lines: Sequence[str]) -> list[str]:
    r"""Return the lines of a docstring with nothing in them that only looks like markup.

    >>> as_restructured_text(["s * A B, with `a`s of |A|:", "", "    A * B"])
    ['s \\* A B, with ``a``\\ s of \\|A\\|::', '', '    A * B']
    """
    paragraphs = re.split(r"\n(?:[ ]*\n)+", "\n".join(lines).strip("\n"))
    result = []
    above = None  # the indentation of the line that a block which is shown as it stands belongs to
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        if above is not None and _indentation(paragraph) > above:
            result.append(paragraph)
            continue
        above = None
        if paragraph.lstrip().startswith(EXAMPLE):
            result.append(paragraph)
            continue
        first, last = paragraph.split("\n")[0], paragraph.split("\n")[-1]
        text = _escaped(paragraph)
        deeper = _indentation(following) >= _indentation(last) + 4 and EXAMPLE not in following
        if deeper and (last.endswith(":") or not SECTION.match(first)):
            above = _indentation(last)
            text += ":" if last.endswith(":") else f"\n\n{' ' * above}::"
        result.append(text)
    return "\n\n".join(result).split("\n")


def _indentation(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _escaped(text: str) -> str:
    """Return text with its markup escaped, and code in it set off from letters that touch it."""
    parts = CODE.split(text)  # text, code, text, ...
    for i in range(0, len(parts), 2):
        behind_code, before_code = i > 0, i < len(parts) - 1
        part = SPECIAL.sub(r"\\\g<0>", parts[i])
        if behind_code and part and part[0] not in MAY_STAND_BEHIND_CODE:
            part = rf"\ {part}"
        if before_code and part and part[-1] not in MAY_STAND_BEFORE_CODE:
            part = rf"{part}\ "
        parts[i] = part
    parts[1::2] = map(_code, parts[1::2])
    return "".join(parts)


def _code(quoted: str) -> str:
    code = quoted.strip("`")
    name = linked_name(code)
    return f":py:obj:`{code} <{name}>`" if name else f"``{code}``"
