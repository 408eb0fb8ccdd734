"""What other people's models need: they broadcast by rank."""

import jax
import pytest


@pytest.fixture(autouse=True)
def ranks_are_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield
