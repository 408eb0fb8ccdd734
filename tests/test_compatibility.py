"""docs/compatibility.md and CITATION.cff say what pyproject.toml and the code say."""

import re
import tomllib
from pathlib import Path

import lora_jax as lora

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
# What these extras bring is on the page; those that compile bring a dozen wheels for two platforms, which are not.
SHOWN = ("interop", "interop-gguf", "interop-image", "interop-mlx", "interop-models")
OTHER_SYSTEMS = ("mlx==0.32.4; sys_platform == 'darwin'",)


def requirements():
    """Every requirement on the page, and the extra beside it if there is one."""
    rows = re.findall(r"^\| `([^`]+)` \|(?: `([^`]+)` \|)?", PAGE, re.MULTILINE)
    return [(spec, extra) for spec, extra in rows if re.search(r"[<>=]=", spec)]


def test_the_page_has_every_requirement_as_it_is():
    shown = {spec for spec, _ in requirements()}
    project = {*PROJECT["dependencies"], *(spec for extra in SHOWN for spec in EXTRAS[extra])}
    own = {spec for spec in project if spec.startswith("lora_jax")}
    assert shown == project - own - set(OTHER_SYSTEMS)
    assert len(shown) == len(requirements()), "none is there twice"


def test_the_extra_beside_a_requirement_brings_it():
    named = [(spec, extra) for spec, extra in requirements() if extra]
    assert len(named) == 9
    assert [(spec, extra) for spec, extra in named if spec not in EXTRAS[extra]] == []


def test_what_is_compiled_for():
    assert all(f"`{spec}`" in PAGE for spec in EXTRAS["compiled"] if spec.startswith(("libtpu", "jax-cuda13-plugin")))
    newest = {spec.partition("==")[0].partition("[")[0]: spec.partition("==")[2] for spec in EXTRAS["compiled"]}
    rows = dict(re.findall(r"^\| `([\w-]+)>=[\d.]+` \| [\d.]+ \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert {name: rows[name] for name in ("jax", "flax", "optax", "orbax-checkpoint")} == {
        name: newest[name] for name in ("jax", "flax", "optax", "orbax-checkpoint")
    }


def test_versions_of_python():
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.count("::") == 2]
    versions = [version for version in classifiers if re.fullmatch(r"3\.\d+", version)]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert f"Python {', '.join(versions[:-1])} and {versions[-1]}." in PAGE


def test_the_extras_that_it_names():
    section = PAGE[PAGE.index("## What the extras bring") :]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE)))
    inner = {"dev", "bench", "compiled", "docs", "package", "site-tests", *SHOWN}
    assert set(named) == set(EXTRAS) - inner


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {lora.__version__}\n" in text
    assert f"license: {PROJECT['license']}\n" in text
    assert f"- name: {PROJECT['authors'][0]['name']}\n" in text
    page = (ROOT / "docs/citation.md").read_text(encoding="utf-8")
    assert f"version = {{{lora.__version__}}}" in page
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == lora.__version__
