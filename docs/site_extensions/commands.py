"""The help of a command, as it prints it: `{command-help} train`, or without a name that of `lora-jax` itself."""

import contextlib
import io
import os
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

COLUMNS = 88  # characters in a line


def help_of(command: str | None = None) -> str:
    """Return what `lora-jax --help` or `lora-jax COMMAND --help` prints."""
    from lora_jax import cli

    output = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=str(COLUMNS), NO_COLOR="1"),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*([command] if command else []), "--help"])
    return output.getvalue()


class CommandHelp(SphinxDirective):
    """What a command prints with --help."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = help_of(*self.arguments)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
