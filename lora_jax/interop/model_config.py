"""The config.json beside the weights of a published model."""

import os
from pathlib import Path
from typing import Any

from lora_jax.core.untrusted import read_json

CONFIG = "config.json"
LARGEST = 2**23  # bytes; with the names of many classes a config has some hundred thousand


def model_facts(folder: Path) -> dict[str, Any]:
    """Return what a model's config says, nothing if the folder holds weights alone.

    Raises:
        LoraError: it cannot be read, or is no JSON.
    """
    path = folder / CONFIG
    facts = read_json(path, LARGEST, "config of a model", finite=False) if os.path.lexists(path) else {}
    return facts if isinstance(facts, dict) else {}
