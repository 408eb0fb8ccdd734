"""The decoder at the sizes of Llama-3-8B, with two scanned layers: what adapters add, as the compiler for TPUs has it.

Two thousand tokens on each chip of v5e:4x4, the base split over all sixteen, everything recomputed in the backward
pass, adapters of rank 16 on all seven linears.
"""

import copy

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")

import decoder
import programs
from products import products

from lora_jax.analysis import hlo

LAYERS, WIDTH, INNER, KEYS = 2, 4096, 14336, 1024
LOSS = 1 << 18  # bytes of the ids and the loss, and a little
FACTORS = LAYERS * programs.RANK * (2 * 2 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + INNER)) * 4  # bytes of A and B


@pytest.fixture(scope="module")
def setup():
    return programs.setup("v5e:4x4", fsdp=16)


@pytest.fixture(scope="module")
def lora_gradient(setup):
    return setup.gradient()


def test_every_fusion_and_loop_has_an_estimate(lora_gradient):
    assert lora_gradient.unknown == {}
    assert sum(lora_gradient.cycles.values()) > 0


def test_the_gradients_of_adapters_are_sent_once(lora_gradient):
    loss = 4
    assert lora_gradient.sent["all-reduce"] == FACTORS + loss
    assert "reduce-scatter" not in lora_gradient.sent


def test_gradients_of_adapters_are_summed_in_fp32_beside_a_base_in_bf16(lora_gradient):
    module = hlo.parse(lora_gradient.text)
    sums = [one for lines in module.computations.values() for one in lines if one.operation == "all-reduce"]
    assert sums
    assert {dtype for one in sums for dtype, _, _ in hlo.arrays(one.results)} == {"f32"}


def test_gradients_of_factors_are_products_in_fp32(lora_gradient):
    """A sum over tokens that came out in bf16 would have 8 bits, whatever it is added up in afterwards."""
    rank, found = programs.RANK, {}
    for *_, (dtype, shape) in products(lora_gradient):
        sides = [n for n in shape if n > 1]
        if len(sides) == 2 and rank in sides and max(sides) in (WIDTH, INNER, KEYS):
            found.setdefault(dtype, []).append(shape)
    assert list(found) == ["f32"]
    assert len(found["f32"]) >= 2 * 7


def test_adapters_and_their_gradients_take_no_more_memory_than_their_bytes(lora_gradient):
    assert lora_gradient.parts["adapters"] == FACTORS + 7 * 2 * 4  # and of each linear alpha and r
    assert lora_gradient.parts["padding of arguments"] <= 0.02 * FACTORS
    assert lora_gradient.parts["outputs"] <= 1.02 * FACTORS


def test_the_base_is_split_over_all_chips(lora_gradient):
    linears = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER)
    tables, norms = 2 * 4096 * WIDTH, (2 * LAYERS + 1) * WIDTH
    assert lora_gradient.parts["base"] == (linears + tables) // 16 * 2 + norms * 2


@pytest.fixture(scope="module")
def floor(setup):
    return setup.floor()


def test_cycles_over_the_frozen_floor(lora_gradient, floor):
    assert programs.cycles(lora_gradient) <= 1.02 * programs.cycles(floor)


def test_temporary_memory_over_the_frozen_floor(lora_gradient, floor):
    assert programs.temporary(lora_gradient) <= 1.10 * programs.temporary(floor)


@pytest.mark.slow
def test_cycles_and_memory_of_four_layers_over_the_frozen_floor():
    setup = programs.setup("v5e:4x4", size=decoder.Size(layers=4), fsdp=16)
    gradient, floor = setup.gradient(), setup.floor()
    assert programs.cycles(gradient) <= 1.02 * programs.cycles(floor)
    assert programs.temporary(gradient) <= 1.07 * programs.temporary(floor)


def test_what_is_sent_over_the_frozen_floor(lora_gradient, floor):
    """The floor begins with embedded tokens, so it lacks their lookup.

    The compiler takes each layer's q, k and v once more beside adapters, 5 % of all: q and one of the others by hand.
    """
    lookup, again = 2048 * WIDTH * 2, LAYERS * (WIDTH + 2 * KEYS) * WIDTH * 2
    assert programs.sent(lora_gradient) <= programs.sent(floor) + FACTORS + lookup + again + LOSS


@pytest.fixture(scope="module")
def by_hand(setup):
    return setup.by_hand()


@pytest.mark.slow
def test_lora_by_hand_takes_more_cycles_and_memory(lora_gradient, by_hand):
    assert programs.cycles(lora_gradient) <= 0.97 * programs.cycles(by_hand)
    assert programs.temporary(lora_gradient) <= 0.8 * programs.temporary(by_hand)
    assert programs.sent(lora_gradient) <= 1.02 * programs.sent(by_hand)


@pytest.fixture(scope="module")
def without_remat(setup):
    """The floor, and the gradient with each way to keep."""
    setup = copy.copy(setup)
    setup.model = decoder.make(setup.size, setup.mesh, remat=False)
    return setup.floor(), setup.gradient(keep="thin"), setup.gradient(keep="inputs")


@pytest.mark.slow
def test_what_is_thin_takes_less_memory_and_little_more_time(without_remat):
    floor, thin, inputs = without_remat
    assert programs.temporary(thin) <= 1.03 * programs.temporary(floor)
    assert 1.04 * programs.temporary(floor) < programs.temporary(inputs) <= 1.07 * programs.temporary(floor)
    assert programs.cycles(thin) <= 1.06 * programs.cycles(floor)
    assert programs.cycles(inputs) <= 1.03 * programs.cycles(floor)  # q, k, v and gate, up read x together
    assert abs(programs.sent(thin) - programs.sent(inputs)) <= 8  # scalars; as it was before products were joined


@pytest.fixture(scope="module")
def qlora_gradient(setup):
    return setup.gradient(bits="nf4")


def test_a_base_in_nf4_costs_few_cycles(qlora_gradient, lora_gradient):
    assert programs.cycles(qlora_gradient) <= 1.05 * programs.cycles(lora_gradient)


def test_a_base_in_nf4_takes_no_more_temporary_memory(qlora_gradient, lora_gradient):
    assert programs.temporary(qlora_gradient) <= programs.temporary(lora_gradient)


def test_a_base_in_nf4_is_gathered_packed(qlora_gradient, lora_gradient):
    assert programs.sent(qlora_gradient) <= 0.28 * programs.sent(lora_gradient)


@pytest.fixture(scope="module")
def int8_gradient(setup):
    return setup.gradient(bits="int8")


@pytest.mark.slow
def test_a_base_in_int8_costs_no_cycles(int8_gradient, lora_gradient):
    assert programs.cycles(int8_gradient) <= programs.cycles(lora_gradient)
    assert programs.temporary(int8_gradient) <= programs.temporary(lora_gradient)
    assert programs.sent(int8_gradient) <= 0.5 * programs.sent(lora_gradient)
