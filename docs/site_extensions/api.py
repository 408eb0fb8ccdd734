"""The pages of the reference: a directive for a topic's names, and links from wherever a name is written to its page.

    ```{api}
    lora_jax.plan
    lora_jax.Plan
    lora_jax.key_maps.BERT  the encoder of BERT
    ```

One name a line; a constant has a sentence behind it, as its value has no docstring. Pages are Markdown so that
tests/test_site_pages.py reads the same lines, and needs no Sphinx.
"""

import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PACKAGE = "lora_jax"


def find(name: str) -> Any:
    """Return what a public name stands for: `lora_jax.plan`, `lora_jax.bases` or `lora_jax.bases.Nf4`."""
    owner, _, last = name.rpartition(".")
    return getattr(find(owner), last) if owner else importlib.import_module(name)


def public_names() -> Iterator[str]:
    """Yield the names of `lora_jax.__all__`, and those of its modules', in order."""
    package = find(PACKAGE)
    for name in package.__all__:
        yield f"{PACKAGE}.{name}"
        if inspect.ismodule(module := getattr(package, name)):
            yield from (f"{PACKAGE}.{name}.{inner}" for inner in module.__all__)


class Api(SphinxDirective):
    """A table of names with the first sentence of each, and then each with all of its docstring."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        entries = [line.split(maxsplit=1) for line in self.content if line.strip()]
        named = {name: " ".join(sentence) for name, *sentence in entries}
        lines = [*_summary([name for name, sentence in named.items() if not sentence]), ""]
        for name, sentence in named.items():
            lines += [*_described(name, sentence), ""]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def _summary(names: list[str]) -> list[str]:
    names = [name for name in names if not inspect.ismodule(find(name))]
    return [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names)] if names else []


def _described(name: str, sentence: str) -> list[str]:
    found = find(name)
    if inspect.ismodule(found):
        return [f".. automodule:: {name}"]
    if inspect.isclass(found):
        return [f".. autoclass:: {name}", "   :members:"]
    if callable(found):
        return [f".. autofunction:: {name}"]
    return [f".. py:data:: {name}", f"   :type: {type(found).__name__}", "", f"   {sentence}"]


@cache
def _public_name_of() -> dict[str, str]:
    """Return the public name of each class and function by where it is written, which is what signatures say."""
    written = ((name, find(name)) for name in public_names())
    return {f"{found.__module__}.{found.__qualname__}": name for name, found in written if hasattr(found, "__qualname__")}


def _resolve(app: Any, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Link a class that a signature names by its module, or a docstring by its last name, to where it is documented."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    name = _public_name_of().get(target, f"{PACKAGE}.{target}")
    if name not in domain.objects:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, content)


def setup(app: Any) -> dict[str, bool]:
    """Add the directive and the links."""
    app.add_directive("api", Api)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}
