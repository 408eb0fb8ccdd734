"""The code blocks of a page in Markdown, and what it takes to run each of them.

`tests/test_code_blocks.py` says what a page may hold, and runs it.
"""

import ast
import doctest
import functools
import re
import shlex
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import markdown_it

import lora_jax as lora

ROOT = Path(__file__).parent.parent
NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->", re.DOTALL)
RUN_FIRST = re.compile(r"<!--\s*run first\n(.*?)-->", re.DOTALL)
PYTHON, SHELL, OUTPUT = ("python", "pycon"), ("sh", "bash", "console"), ("", "text")
DATA = ("json", "toml", "yaml", "bibtex")
COMMAND = re.compile(r"\b(lora-jax|python|make|pip) ")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@dataclass(frozen=True)
class Block:
    """One block of a page: its language, its text, and what the comment on the line before says of it."""

    page: Path
    line: int  # of its text, from 1
    language: str | None  # None for an indented block, "" for a fence without one
    text: str
    reason: str | None = None  # why it is not run, where the page says that it is not
    hidden: bool = False  # set-up in a comment, which readers do not see

    def __str__(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"


def pages() -> list[Path]:
    """Return README.md, CONTRIBUTING.md and all pages of docs/, but for what is built there."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for page in docs if "_build" not in page.parts)]


def is_notebook(page: Path) -> bool:
    """Return whether a page is a notebook in MyST's form, whose cells `make docs` runs."""
    return bool(re.match(r"---\n.*?\bjupytext:.*?\n---\n", page.read_text(encoding="utf-8"), re.DOTALL))


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order, by the rules of CommonMark, those in comments included."""
    found, before = [], ""
    for token in markdown_it.MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            before += token.content
            if hidden := RUN_FIRST.search(token.content):
                line = token.map[0] + 2 + token.content[: hidden.start()].count("\n")
                found.append(Block(page, line, "python", hidden[1], hidden=True))
            continue
        if token.type in ("fence", "code_block"):
            said = NOT_RUN.search(before)
            found.append(
                Block(
                    page,
                    token.map[0] + 1 + (token.type == "fence"),
                    _language(token) if token.type == "fence" else None,
                    token.content,
                    reason=said[1].strip() if said else None,
                )
            )
        before = ""
    return found


def _language(fence: markdown_it.token.Token) -> str:
    """Return the language of a fence: of a `{code-block}` its argument, of other directives their own name."""
    directive, _, argument = fence.info.strip().partition(" ")
    return argument if directive in ("{code-block}", "{code}") else directive


# Python ---------------------------------------------------------------------------------------------------------------


class Namespace:
    """The names that the blocks of one page share, as a module, which dataclasses and Flax ask for."""

    def __init__(self, name: str):
        self.module = types.ModuleType(name)
        sys.modules[name] = self.module

    def close(self) -> None:
        del sys.modules[self.module.__name__]

    def run(self, block: Block) -> None:
        """Run one block: its examples, compared with what is printed below them, or all of it."""
        if ">>>" in block.text:
            self._examples(block)
        else:
            padded = "\n" * (block.line - 1) + block.text  # so that a traceback shows the page's own line
            exec(compile(padded, str(block.page), "exec"), self.module.__dict__)

    def _examples(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line - 1)
        test.globs = self.module.__dict__
        printed = []
        runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
        if runner.run(test, out=printed.append, clear_globs=False).failed:
            raise AssertionError("".join(printed))


def source_of(block: Block) -> str:
    """Return the Python of a block, without prompts and what is printed."""
    if ">>>" not in block.text:
        return block.text
    return "".join(example.source for example in doctest.DocTestParser().get_examples(block.text))


def unknown_names(source: str) -> list[str]:
    """Return what a block calls `lora.something`, of which there is none."""
    unknown = []
    for node in ast.walk(ast.parse(source)):
        names = []
        while isinstance(node, ast.Attribute):
            names, node = [node.attr, *names], node.value
        if names and isinstance(node, ast.Name) and node.id == "lora":
            place = lora
            for name in names:
                if not isinstance(place, types.ModuleType):
                    break  # an attribute of a class or a result, which only a run shows
                if not hasattr(place, name):
                    unknown.append(".".join(("lora", *names)))
                    break
                place = getattr(place, name)
    return unknown


# Shell ----------------------------------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of each command of a block of shell."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = (line.removeprefix("$ ") for line in text.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def problem_of(words: list[str]) -> str | None:
    """Return what is wrong with a command by its own parser, or why it needs a mark; None if all is well."""
    program = Path(words[0]).name
    if program == "lora-jax":
        return _command_problem(words[1:])
    if program == "python" and words[1:] and words[1].endswith(".py"):
        return _script_problem(words[1:])
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = {*targets} - {name for rule in rules for name in rule.split()}
        return f"there is no target {', '.join(sorted(unknown))} in the Makefile" if unknown else None
    if program == "pip" and words[1] == "install":
        return _extras_problem(words[2:])
    return f"{words[0]!r} is no command that is checked: say above the block why it is not run"


def _command_problem(arguments: list[str]) -> str | None:
    """Have the real parser of `lora-jax` take the arguments, with commands that do nothing."""
    from lora_jax.cli import commands

    if "--config" in arguments:  # a file of settings, which may have what has to be given otherwise
        at = arguments.index("--config")
        arguments = arguments[:at] + arguments[at + 2 :]
        if arguments[1:2] == [] or arguments[1].startswith("--"):
            arguments = [arguments[0], "MODEL", "DATA", "OUTPUT", *arguments[1:]]
    nothing = {name: functools.wraps(command)(lambda *_, **__: 0) for name, command in commands.COMMANDS.items()}
    try:
        with mock.patch.object(commands, "COMMANDS", nothing):
            code = commands.main(arguments)
    except SystemExit as error:
        code = error.code
    return f"`lora-jax {shlex.join(arguments)}` is refused by its parser" if code else None


def _script_problem(words: list[str]) -> str | None:
    """Return whether a script of the repository is missing, or has nothing that is called as an option is."""
    scripts = [word for word in words if word.endswith(".py") and "/" in word]
    if missing := [script for script in scripts if not (ROOT / script).is_file()]:
        return f"there is no {missing[0]}"
    shared = ROOT / "lora_jax" / "recipes" / "options.py"  # what benchmarks take as --options.name
    sources = "".join(path.read_text(encoding="utf-8") for path in (*(ROOT / script for script in scripts), shared))
    for word in words:
        if word.startswith("--"):
            names = word[2:].partition("=")[0].split(".")
            for name in names:
                spelled = {name, name.replace("-", "_"), name.removeprefix("no-").replace("-", "_")}
                if not any(re.search(rf"\b{re.escape(one)}\b", sources) for one in spelled):
                    return f"{scripts[0]} knows no option {word}"
    return None


def _extras_problem(words: list[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        named = re.fullmatch(r"(?:\.|lora_jax|lora-jax)\[([\w,-]+)\]", word)
        unknown = {*named[1].split(",")} - {*project["optional-dependencies"]} if named else ()
        if unknown:
            return f"pyproject.toml has no extra {', '.join(sorted(unknown))}"
    return None
