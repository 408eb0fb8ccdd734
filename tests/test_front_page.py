"""A newcomer gets to trained adapters of a model of their own by copying one block of the documentation."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

PAGE = Path(__file__).parents[1] / "docs" / "your_own_model.md"
MOST_LINES = 25  # that a newcomer copies, without empty ones
MERGED = {  # what the unchanged model computes with what is left in the end
    "A plain function": lambda found: found["model"](found["merged"], found["x"]),
    "Flax NNX": lambda found: found["model"](found["x"]),
    "Flax Linen": lambda found: found["model"].apply(found["merged"], found["x"]),
}


def blocks():
    """The blocks of Python of the page by the section that they are in."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        if code := re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            [found[title]] = code
    return found


def test_the_front_page_leads_there():
    assert f"({PAGE.name})" in (PAGE.parent / "index.md").read_text(encoding="utf-8")


def test_there_is_a_block_for_each_library():
    assert [*blocks()] == [*MERGED]


@pytest.mark.parametrize("library", MERGED)
def test_a_newcomer_copies_a_block_and_has_trained_adapters(library, tmp_path, monkeypatch):
    code = blocks()[library]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= MOST_LINES
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, f"{PAGE.name}: {library}", "exec"), found)

    adapters, y = found["state"].trainable, found["y"]
    assert len(adapters) == 2
    assert found["metrics"]["loss"] < 0.1 * jnp.mean(y**2), "the task is learned"
    error = jnp.mean((MERGED[library](found) - y) ** 2)
    np.testing.assert_allclose(error, found["metrics"]["loss"], rtol=0.1)  # the last step moved once more
    loaded, _ = lora.checkpoint.load("adapters")
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
