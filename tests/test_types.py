"""The types that users see: a program of one, checked by mypy and, where it is installed, by pyright."""

import importlib.resources
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "typed" / "program.py"
ROOT = Path(__file__).parent.parent


def test_the_types_are_shipped():
    assert (importlib.resources.files("lora_jax") / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_finds_the_types_of_a_users_program(tmp_path):
    """Strictly, with the settings of no project: as it would be checked in a user's own."""
    options = ["--strict", "--no-incremental", "--config-file", "", "--follow-imports", "silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--disable-error-code", "import-untyped", PROGRAM],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed: it brings node at run time")
def test_pyright_finds_the_types_of_a_users_program(tmp_path):
    done = subprocess.run(
        ["pyright", "--pythonpath", sys.executable, PROGRAM], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
