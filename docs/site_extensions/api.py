"""The pages of the reference: a directive for a topic's names, and links from wherever a name is written to its page.

    ```{api}
    lora_jax.plan
    lora_jax.Plan
    lora_jax.key_maps.BERT  the encoder of BERT
    ```

One name a line; a constant has a sentence behind it, as its value has no docstring. Pages are Markdown so that
tests/test_site_pages.py reads the same lines, and needs no Sphinx.
"""

import dataclasses
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from site_extensions.names import find, public_name_of

REPR = re.compile(r"<(?:function|class) '?([\w.]+)'?(?: at \w+)?>")  # <function kaiming>, <class 'jax.numpy.float32'>


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
        return [f".. automodule:: {name}", "", ".. py:currentmodule:: None"]  # names on the page stay whole
    if inspect.isclass(found):
        # Fields are arguments, which the docstring tells.
        fields = [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
        return [f".. autoclass:: {name}", "   :members:", f"   :exclude-members: {', '.join(fields)}"]
    if callable(found):
        return [f".. autofunction:: {name}"]
    return [f".. py:data:: {name}", f"   :type: {type(found).__name__}", "", f"   {sentence}"]


def _signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str) -> Any:
    """Write defaults that are functions and classes by their names: those of dataclasses are known by their repr."""
    return REPR.sub(r"\1", signature or "") or signature, returned


def _resolve(app: Any, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Link a class that a signature names by the module that it is written in to where it is documented."""
    name, domain = public_name_of(node["reftarget"]), env.get_domain("py")
    if node.get("refdomain") != "py" or name not in domain.objects:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def setup(app: Any) -> dict[str, bool]:
    """Add the directive, its signatures and the links."""
    app.add_directive("api", Api)
    app.connect("autodoc-process-signature", _signature)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}
