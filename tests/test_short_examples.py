"""The short examples do what they say: they learn, merging changes nothing, and the base stays as it was."""

import importlib.util

import from_scratch
import haiku_or_equinox
import linen
import nnx
import numpy as np
import own_kind
import pytest
import serve_adapters

import lora_jax as lora
from lora_jax.key_maps import KeyMap, linear


def check(numbers):
    """Errors are shares of wrong answers; several where there are several sets of adapters."""
    before, after = np.array(numbers["before"]), np.array(numbers["after"])
    assert numbers["base"] < 0.03
    assert (before > 0.7).all()
    assert (after < 0.1 * before).all()
    assert numbers["difference"] < 1e-4
    assert numbers["unchanged"]


@pytest.mark.slow
@pytest.mark.rare
def test_from_scratch(capsys):
    check(from_scratch.main())
    printed = capsys.readouterr().out
    assert "5 of 6 weights adapted" in printed
    assert "reverse" in printed


@pytest.mark.slow
def test_serve_adapters(capsys):
    settings = serve_adapters.Settings(adapters=6, slots=3, requests=12, batch=3, tokens=3, checks=2)
    assert serve_adapters.main(settings) == {"programs": 2, "wrong": 0, "answers": 12, "resident": 3}
    assert "12 requests for 7 adapters in 3 slots" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("example", [linen, nnx], ids=lambda module: module.__name__)
def test_flax(example):
    check(example.main())


@pytest.mark.slow
@pytest.mark.parametrize(("library", "package"), haiku_or_equinox.PACKAGES.items())
def test_haiku_and_equinox(library, package):
    pytest.importorskip(library, reason=f"needs {package}: pip install {package}")
    check(haiku_or_equinox.main(library))


@pytest.mark.parametrize(("library", "package"), haiku_or_equinox.PACKAGES.items())
def test_a_missing_library_is_named(library, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"error: {library} is not installed: pip install {package}"):
        haiku_or_equinox.main(library)


def test_a_kind_of_ones_own(tmp_path, capsys):
    """It learns, comes back from a checkpoint, and is exported as the LoRA that it is."""
    found = own_kind.main()
    assert "LoraXs(rank=4)" in capsys.readouterr().out
    assert found["after"] < 0.5 * found["before"]
    assert found["difference"] < 1e-5
    assert found["unchanged"]
    adapters = found["adapters"]
    mask = lora.trainable_mask(adapters)["layers"]
    assert (mask.a, mask.r, mask.b) == (False, True, False)

    params = {name: np.zeros(adapter.kernel_shape(), np.float32) for name, adapter in adapters.items()}
    key_map = KeyMap(linear("layers", "layers.{i}", "i in out"), linear("head", "head"))
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    loaded, _ = lora.load_peft(tmp_path / "peft", params, key_map)
    for name, w in lora.merge(params, adapters).items():
        np.testing.assert_allclose(lora.merge(params, loaded)[name], w, atol=1e-6)
