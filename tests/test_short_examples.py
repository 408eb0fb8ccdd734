"""The short examples do what they say: they learn, merging changes nothing, and the base stays as it was."""

import importlib.util

import from_scratch
import haiku_or_equinox
import linen
import nnx
import numpy as np
import pytest


def check(numbers):
    """Errors are shares of wrong answers; several where there are several sets of adapters."""
    before, after = np.array(numbers["before"]), np.array(numbers["after"])
    assert numbers["base"] < 0.03
    assert (before > 0.7).all()
    assert (after < 0.1 * before).all()
    assert numbers["difference"] < 1e-4
    assert numbers["unchanged"]


@pytest.mark.slow
def test_from_scratch(capsys):
    check(from_scratch.main())
    printed = capsys.readouterr().out
    assert "5 of 6 weights adapted" in printed
    assert "reverse" in printed


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
