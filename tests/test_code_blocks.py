"""Every code block of README.md, CONTRIBUTING.md and docs/ is run, or the page says why not.

What a page may hold:

- ```` ```python ````: run, in the order of the page, in one namespace and one empty folder. Where it has prompts
  (`>>>`), what is printed is compared, as in a docstring. Eight simulated devices; warnings and promoted ranks are
  errors.
- `<!-- run first`, Python, `-->`: set-up that readers need not see, run in its place.
- ```` ```sh ````: `lora-jax` is parsed by its real parser, scripts have to be there with their options, targets in the
  Makefile, extras in pyproject.toml. `tests/test_finetune.py` runs those of docs/train.md.
- ```` ```text ````, or no language: what a command printed, which stands above it on the page.
- ```` ```json ````, `toml` and the like: data.
- ```` ```{code-cell} ````, in notebooks alone: `make docs` runs it.
- `<!-- not run: the reason -->` on the line before a block of Python or shell: it is not. Its syntax and the names
  `lora.*` in it are checked all the same.

An indented block has no language, so there is none.
"""

import ast
import json
import tomllib
import warnings

import jax
import pytest
from code_blocks import (
    COMMAND,
    DATA,
    OUTPUT,
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Namespace,
    blocks_of,
    commands_of,
    is_notebook,
    pages,
    problem_of,
    source_of,
    unknown_names,
)

PAGES = pages()
GUIDES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
names = {"ids": lambda page: str(page.relative_to(ROOT))}


def runs(page):
    """Return the blocks of Python of a page that are to be run."""
    return [block for block in blocks_of(page) if block.language in PYTHON and block.reason is None]


def test_every_block_is_run_or_says_why_not():
    """By its language: a list of all that are neither, so that pages are mended at once."""
    wrong = [f"{block}: {said}" for page in PAGES for block in blocks_of(page) if (said := problem(block))]
    assert not wrong, "\n".join(wrong)


def problem(block: Block) -> str | None:
    language = block.language
    if block.reason is not None and not block.reason:
        return "a mark without a reason: <!-- not run: reason -->"
    if language is None:
        return "an indented block: write a fenced one, with its language"
    if language in PYTHON:
        try:
            ast.parse(source_of(block))
        except (SyntaxError, ValueError) as error:
            return f"no Python: {error}"
        unknown = unknown_names(source_of(block))
        return f"there is no {', '.join(unknown)}" if unknown else None
    if language in SHELL:
        found = [said for words in commands_of(block) if (said := problem_of(words))]
        found = [said for said in found if block.reason is None or "is no command that is checked" not in said]
        return "; ".join(found) or None
    if language in OUTPUT:
        above = block.page.read_text(encoding="utf-8").splitlines()[: block.line]
        named = COMMAND.search("\n".join(above)) or "```python" in "\n".join(above)
        return None if named else "output, and no command above it that printed it"
    if language in DATA:
        return None if block.reason is not None else data_problem(block)
    if language == "{code-cell}":
        return None if is_notebook(block.page) else "a cell of a notebook, on a page that is none"
    return None if language.startswith("{") else f"{language!r} is no language that is known here"


def data_problem(block: Block) -> str | None:
    try:
        if block.language == "json":
            json.loads(block.text)
        if block.language == "toml":
            tomllib.loads(block.text)
    except ValueError as error:
        return f"no {block.language}: {error}"
    return None


def run_page(page, folder, monkeypatch):
    """Run the Python of a page, in its order."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = Namespace(f"shown_in_{page.stem}")
    try:
        for block in runs(page):
            namespace.run(block)
    finally:
        namespace.close()
        jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if runs(page)], **names)
def test_the_python_of_a_guide_runs(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in GUIDES and runs(page)], **names)
def test_the_python_of_a_page_in_a_folder_runs(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


def test_what_is_wrong_with_a_page_is_found(tmp_path, monkeypatch):
    """The checks themselves, on a page that has each mistake."""
    monkeypatch.setattr("code_blocks.ROOT", tmp_path)
    for name in ("pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    (tmp_path / "lora_jax" / "recipes").mkdir(parents=True)
    (tmp_path / "lora_jax" / "recipes" / "options.py").write_text("")
    (tmp_path / "a.py").write_text("")
    page = tmp_path / "page.md"
    mistakes = {
        "```\nprinted\n```\n": "no command above",
        "    x = 1\n": "an indented block",
        "```python\nx = \n```\n": "no Python",
        "```python\nlora.no_such_name(1)\n```\n": "there is no lora.no_such_name",
        "<!-- not run: -->\n```python\nx = 1\n```\n": "a mark without a reason",
        "```sh\nlora-jax train A B C --no-such-option 3\n```\n": "refused by its parser",
        "```sh\nlora-jax tarin A B C\n```\n": "refused by its parser",
        "<!-- not run: long -->\n```sh\nlora-jax train A\n```\n": "refused by its parser",
        "```sh\npython ./b.py\n```\n": "there is no ./b.py",
        "```sh\npython ./a.py --fast\n```\n": "knows no option --fast",
        "```sh\nmake nothing\n```\n": "there is no target nothing",
        "```sh\npip install '.[nothing]'\n```\n": "no extra nothing",
        "```sh\nrm -r x\n```\n": "no command that is checked",
        "```json\n{\n```\n": "no json",
        "```{code-cell}\nx = 1\n```\n": "a cell of a notebook",
        "```fortran\nEND\n```\n": "no language that is known",
    }
    for text, said in mistakes.items():
        page.write_text(text)
        (block,) = blocks_of(page)
        assert said in (problem(block) or ""), text


def test_what_a_page_may_hold_is_let_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("code_blocks.ROOT", ROOT)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run first\nx = 2\n-->\n\n```python\n>>> x + 1\n3\n```\n\n<!-- not run: none -->\n```python\nopen('no')\n"
        "```\n\n```sh\n$ make test ARGS=-x\n"
        "lora-jax train --config own.toml --rank 3  # a comment\nlora-jax eval MODEL \\\n    DATA --json\n```\n\n"
        "```text\nprinted\n```\n\n```{note}\nx\n```\n\n- a list\n\n  ```toml\n  a = 1\n  ```\n"
    )
    blocks = blocks_of(page)
    assert [problem(block) for block in blocks] == [None] * len(blocks)
    assert [block.line for block in blocks if block.language == "python"] == [2, 6, 12]
    assert len(runs(page)) == 2
    run_page(page, tmp_path, monkeypatch)


def test_examples_that_print_something_else_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    (block,) = blocks_of(page)
    namespace = Namespace("page_of_this_test")
    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        namespace.run(Block(ROOT / "README.md", 1, "python", block.text))
    with pytest.raises(UserWarning, match="careful"), warnings.catch_warnings():
        namespace.run(Block(ROOT / "README.md", 1, "python", "import warnings\nwarnings.warn('careful')"))
    namespace.close()
