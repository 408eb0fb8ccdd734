"""Docstrings for Sphinx: `plain_text` makes reStructuredText of them, and napoleon lists of their sections."""

from typing import Any

from sphinx.ext import napoleon

from site_extensions.plain_text import as_restructured_text

SETTINGS = napoleon.Config(napoleon_use_ivar=True)


class Docstring(napoleon.GoogleDocstring):
    """Google's style, in which what is returned is told in sentences: what stands before a colon there is no type."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)
    if what != "property":  # of which napoleon takes all that stands before a colon for a type
        lines[:] = Docstring(lines, SETTINGS, app, what, name, obj, options).lines()


def setup(app: Any) -> dict[str, bool]:
    """Run for each docstring."""
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
