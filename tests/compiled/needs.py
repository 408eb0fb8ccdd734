"""Skips that say what is missing."""

import pytest

import lora_jax as lora
from lora_jax.analysis.topologies import find_topology


def needs(topology: str) -> None:
    """Skip a test where the compiler for a machine is not installed."""
    try:
        find_topology(topology)
    except lora.LoraError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(f"{error} make test-compiled installs it.")
