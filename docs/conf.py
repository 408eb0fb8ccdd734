"""Sphinx's settings for the site. `make docs` builds it in docs/_build/html, with warnings as errors.

The site works as files on any server, without a network: it has no fonts, scripts or pictures of other hosts. Formulas
are text, as in docstrings; MathJax would come from elsewhere.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
# For the notebooks, which run in processes of their own: what the tests run on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

from lora_jax.core.version import __version__  # noqa: E402

project = "lora_jax"
author = "The lora_jax developers"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "site_extensions.docstrings",
    "site_extensions.api",
    "site_extensions.files",
    "site_extensions.commands",
]
smartquotes = False  # W' and "encoder/" are to be copied as they are
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Reference
default_role = "code"  # `x` in a docstring is code
autodoc_inherit_docstrings = False  # a method that only does what its base class promises is not listed again
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False  # the tables link to names further down on the same page
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# References that lead nowhere are warnings. These are no pages of this site: types of other libraries, type variables,
# and classes behind the public names, which a signature may name and a reader has no use for.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|flax|optax|orbax|numpy|np|collections|typing|pathlib|os|types|datetime)\..*"),
    ("py:.*", r"(int|str|bool|float|bytes|dict|list|tuple|set|type|None|Any|Path|optional|\.\.\.)"),
    ("py:.*", r"(tuple\[int|Rest|Template)"),
    ("py:.*", r"lora_jax\.(core|adapters|transform|initialization|training|sharding|checkpoints|bases|interop)\..*"),
    ("py:.*", r"lora_jax\.(analysis|algebra|recipes|losses)\..*"),
]
if os.environ.get("READTHEDOCS"):  # elsewhere the site is built without a network, and these names stay without links
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "orbax": ("https://orbax.readthedocs.io/en/latest", None),
    }

# Pages and notebooks
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # as on GitHub: [text](page.md#heading) works in both, and one that is not there is a warning
nb_execution_mode = "force"  # a notebook that ran with an older library has not been tested
nb_execution_in_temp = True  # what a notebook writes is gone with it
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds of one cell, on a machine that is busy
nb_merge_streams = True
highlight_language = "text"  # of blocks that name none: what a command printed is no Python
copybutton_prompt_text = r">>> ?|\.\.\. ?|\$ "  # an empty line in a function is "..."
copybutton_prompt_is_regexp = True

# Links to other hosts: `make docs-links`
linkcheck_anchors = False
linkcheck_timeout = 20

html_theme = "sphinx_book_theme"
html_title = "lora_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_copy_source = False
html_domain_indices = False  # of the module there is one
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # else there are two buttons for the menu, and the one seen on a telephone does nothing
}
