"""The site's reference: each public name is on one page, and each command has its help."""

import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from site_extensions.names import find, public_names
from site_extensions.plain_text import as_restructured_text

from lora_jax.cli.commands import COMMANDS

DOCS = Path(__file__).resolve().parents[1] / "docs"
FENCE = re.compile(r"^```\{api\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def entries() -> dict[Path, list[list[str]]]:
    """The lines of the reference by page: a name, and for a constant a sentence."""
    pages = sorted((DOCS / "api").glob("*.md"))
    fences = {page: FENCE.findall(page.read_text(encoding="utf-8")) for page in pages}
    return {
        page: [line.split(maxsplit=1) for fence in found for line in fence.splitlines()]
        for page, found in fences.items()
    }


def test_each_public_name_is_on_one_page():
    found = Counter(name for lines in entries().values() for name, *_ in lines)
    assert not [f"{name} is on no page of docs/api" for name in public_names() if name not in found]
    assert not [f"{name} is there {times} times" for name, times in found.items() if times > 1]
    assert not [f"{name} is not public" for name in found if name not in set(public_names())]


def test_what_has_no_docstring_of_its_own_has_a_sentence():
    for lines in entries().values():
        for name, *sentence in lines:
            has_docstring = isinstance(find(name), type | ModuleType) or callable(find(name))
            assert has_docstring != bool(sentence), name


def test_each_page_of_the_reference_is_in_its_table_of_contents():
    index = (DOCS / "api/index.md").read_text(encoding="utf-8")
    listed = re.search(r"```\{toctree\}\n:maxdepth: 1\n\n(.*?)\n```", index, re.DOTALL).group(1).split()
    assert sorted(listed) == sorted(page.stem for page in entries() if page.stem != "index")


def test_each_command_has_a_heading_and_its_help():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)\n\n```\{command-help\} (\S+)\n```$", page, re.MULTILINE) == [(c, c) for c in COMMANDS]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("s * A B of [*stack, d], |s|, b_ and a_b", r"s \* A B of [\*stack, d], \|s\|, b\_ and a_b"),
        ("`a * b`s and x`c`", r"``a * b``\ s and x\ ``c``"),
        ("Code over `two\nlines`.", "Code over ``two\nlines``."),
        ("`lora.init` of `Lora`", ":py:obj:`lora.init <lora_jax.init>` of :py:obj:`Lora <lora_jax.Lora>`"),
        (
            "The formula:\n\n    a * b\n\n    c * d\n\nand * more",
            "The formula::\n\n    a * b\n\n    c * d\n\nand \\* more",
        ),
        ("A program.\n\n    a * b", "A program.\n\n::\n\n    a * b"),
        ("Args:\n    x: of * rows.\n\n        More of it.", "Args:\n    x: of \\* rows.\n\n        More of it."),
        (">>> 2 * 3\n6", ">>> 2 * 3\n6"),
    ],
)
def test_docstrings_are_plain_text(docstring, expected):
    assert "\n".join(as_restructured_text(docstring.split("\n"))) == expected
