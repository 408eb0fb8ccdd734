"""A group of its own, `make test-compiled`: programs compiled for TPUs and GPUs that are not there.

It is run without the conftest.py of the other tests, whose flags are for programs that run.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
