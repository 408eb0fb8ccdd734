"""A group of its own, `make test-compiled`: programs compiled for TPUs and GPUs that are not there.

It is run without the conftest.py of the other tests, whose flags are for programs that run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
