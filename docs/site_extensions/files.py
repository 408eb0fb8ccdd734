"""Pages for files outside docs/ that pages link to: `[nnx.py](../examples/nnx.py)` works on GitHub, and here.

Each file that is linked gets a page with its text, at `files/examples/nnx.html`. Links to Markdown at the top of the
repository go to the page of the site that has its content.
"""

import posixpath
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
AT_THE_TOP = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yaml": "yaml", ".cff": "yaml", "": "text"}
LINKED = "linked_files"  # in the metadata of a page, which Sphinx keeps from build to build
LOGGER = logging.getLogger(__name__)


class LinkFiles(SphinxTransform):
    """Let links to files lead to their pages, before Sphinx makes downloads of them."""

    default_priority = 1

    def apply(self, **kwargs: Any) -> None:
        linked = set()
        files = self.document.findall(addnodes.download_reference) if self.app.builder.format == "html" else ()
        for node in list(files):
            _, found = self.env.relfn2path(node["reftarget"], self.env.docname)
            path = Path(found).resolve()
            if path.is_file() and path.is_relative_to(ROOT) and path.suffix in LANGUAGES:
                name = path.relative_to(ROOT).as_posix()
                linked.add(name)
                up = posixpath.relpath(".", posixpath.dirname(self.env.docname) or ".")
                uri = f"{up}/{_page(name)}{self.app.builder.out_suffix}"
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))
        for node in self.document.findall(addnodes.pending_xref):
            if node.get("refdomain") == "doc":  # with a whole path where it is not below docs/
                node["reftarget"] = AT_THE_TOP.get(node["reftarget"].removeprefix(f"{ROOT}/"), node["reftarget"])
        self.env.metadata[self.env.docname][LINKED] = sorted(linked)


def _page(name: str) -> str:
    return f"files/{name.removesuffix('.py')}"


def _pages(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield a page for each linked file."""
    names = sorted({name for metadata in app.env.metadata.values() for name in metadata.get(LINKED, ())})
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = app.builder.highlighter.highlight_block(text, LANGUAGES[Path(name).suffix])
        body = f'<h1>{escape(name)}</h1>\n<div class="highlight-default">{shown}</div>'
        yield _page(name), {"title": name, "body": body, "parents": ""}, "page.html"


def setup(app: Any) -> dict[str, bool]:
    """Add the links and the pages."""
    app.add_transform(LinkFiles)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": True}
