"""benchmarks/accelerator.py, which measures a GPU or TPU, runs to its end on a CPU with small sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TITLES = ("a training step ", "a training step over bases", "a forward pass of 16 rows", "a loss over 512 words")


def run(*options):
    """In a process of its own, which has one device and none of the modules of these tests."""
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "accelerator.py"), *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.rare
def test_it_checks_values_and_prints_all_its_tables():
    done = run("--tiny", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cpu, ")
    assert all(any(line.startswith(title) for line in lines) for title in TITLES), done.stdout
    assert lines.count("1 rounds, values agree") == len(TITLES)
    rows = [
        line for line in lines if line.startswith(("frozen", "LoRA", "lora_jax", "full", "QLoRA", "plain", "linear"))
    ]
    assert len(rows) == 5 + 3 + 3 + 2
    assert all(float(row.split()[-4]) > 0 for row in rows)


@pytest.mark.slow
def test_without_an_accelerator_it_says_so():
    done = run()
    assert done.returncode == 1
    assert "measures a GPU or TPU, and JAX finds none" in done.stderr
    assert "--tiny" in done.stderr
