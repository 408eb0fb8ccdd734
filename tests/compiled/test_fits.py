"""A whole model fits its machine: a bound of docs/will_it_fit.md, by its own program."""

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")

from benchmarks.will_it_fit import BOUNDS, MODELS, RANK


def numbers(c):
    """Of all linears, of the embedding and the head, and of the norms."""
    attention = c.width * c.head * (2 * c.heads + 2 * c.kv_heads)
    return (
        c.layers * (attention + 3 * c.width * c.inner),
        2 * c.vocabulary * c.width,
        (2 * c.layers + 1) * c.width,
    )


def factors(c):
    """Of A and B of all linears."""
    ends = 2 * (c.width + c.heads * c.head) + 2 * (c.width + c.kv_heads * c.head) + 3 * (c.width + c.inner)
    return c.layers * RANK * ends


@pytest.mark.slow
def test_llama_3_8b_fits_four_chips():
    program = next(one for one in BOUNDS if one.machine == "v5e:2x2")
    found, c = program.report(), MODELS[program.model]
    assert found.fits, found
    linears, tables, norms = numbers(c)
    nf4 = linears // 2 + linears // 64 * 4  # codes of 4 bits, and for each 64 a scale in fp32
    assert found.parts["base"] == (nf4 + 2 * tables) // found.devices + 2 * norms
    assert found.parts["adapters"] == 4 * factors(c) + 7 * 2 * 4  # and of each linear alpha and r


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:16x16", "v5p:4x4x4"])
def test_llama_3_70b_with_4096_tokens_on_each_chip_fits(machine):
    """With headroom of 0.29 GiB on v5e:16x16, where adapters and moments are split as the base is."""
    found = next(one for one in BOUNDS if one.machine == machine).report()
    assert found.fits, found


@pytest.mark.slow
def test_llama_3_8b_in_bf16_fits_one_chip_with_its_layers_on_the_host():
    program = next(one for one in BOUNDS if one.machine == "v5e:1x1")
    found, c = program.report(), MODELS[program.model]
    assert found.fits, found
    _, tables, _ = numbers(c)
    assert found.parts["base"] == 2 * (tables + c.width), "the embedding, the head and the last norm"
    assert found.parts["temporary (activations)"] <= 2.2 * 2**30
