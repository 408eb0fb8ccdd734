"""What each way to take a step sends over v5e:4x4, at a small size: every array, with loops counted.

Two scanned layers, each recomputed in the backward pass, the base in bf16, adapters of rank 16 on all seven linears.
The meshes are data 16, and fsdp 4 x tensor 4.
"""

import programs
import pytest
from collectives import arrays, numbers, of
from needs import needs

LAYERS, WIDTH, INNER, RANK = 2, 512, 1024, programs.RANK
WHOLE = LAYERS * RANK * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER))  # numbers of all adapters
COLUMNS = RANK * (3 * (WIDTH + WIDTH // 4) + 2 * (WIDTH + INNER // 4))  # of one layer: q, k, v, gate, up over tensor 4
ROWS = RANK * ((WIDTH // 4 + WIDTH) + (INNER // 4 + WIDTH))  # o and down
MESHES = {"data": {"data": 16}, "tensor": {"fsdp": 4, "tensor": 4}}
FACTORS = {"data": WHOLE, "tensor": LAYERS * (COLUMNS + ROWS)}  # numbers on one device
STEPS = [  # and by plain `jax.value_and_grad`, on each of the meshes
    ("lora_step", "data"),
    ("value_and_grad", "data"),
    ("shard_map_step", "data"),
    ("pmap_step", "data"),
    ("gradient", "data"),
    ("lora_step", "tensor"),
    ("value_and_grad", "tensor"),
    ("gradient", "tensor"),
]


@pytest.fixture(scope="module")
def found():
    """Reports by the program and the mesh."""
    needs("v5e:4x4")
    kept = {}

    def report(program, mesh):
        if (program, mesh) not in kept:
            kept[program, mesh] = getattr(programs.small("v5e:4x4", **MESHES[mesh]), program)()
        return kept[program, mesh]

    return report


def of_adapters(report):
    """What is sent of the shape of factors, their gradients among that: [..., r, k] or [..., d, r]."""
    tokens = programs.FEW  # thin products have them too
    return of(arrays(report), lambda _, __, shape: RANK in shape and shape != (1, tokens, RANK))


@pytest.mark.parametrize(("program", "mesh"), STEPS)
def test_gradients_of_adapters_are_summed_once_in_fp32_and_nothing_else_of_them_is_sent(found, program, mesh):
    sent = of_adapters(found(program, mesh))
    assert {(kind, dtype) for kind, dtype, _ in sent} == {("all-reduce", "f32")}
    assert numbers(sent) == FACTORS[mesh]


@pytest.mark.parametrize("program", ["lora_step", "value_and_grad", "shard_map_step", "pmap_step"])
def test_they_go_together_in_one_launch_with_the_loss(found, program):
    report = found(program, "data")
    assert report.launches == {"all-reduce": 1}
    scalars = 2 if program in ("shard_map_step", "pmap_step") else 1  # the loss, and its weight
    assert report.sent["all-reduce"] == 4 * (WHOLE + scalars)


def test_left_to_the_compiler_there_is_a_launch_for_each_layer(found):
    assert found("gradient", "data").launches == {"all-reduce": LAYERS + 1}


def test_init_sends_nothing(found):
    for mesh in MESHES:
        assert found("init", mesh).sent == {}, mesh


def test_merge_sends_nothing(found):
    for mesh in MESHES:
        assert found("merge", mesh).sent == {}, mesh


def test_merge_has_few_weights_at_a_time_in_fp32(found):
    largest = LAYERS * WIDTH * INNER * 4
    assert found("merge", "data").parts["temporary (activations)"] <= largest


def test_full_fine_tuning_sends_the_gradient_of_every_weight(found):
    weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH) + 2 * 1024 * WIDTH + WIDTH
    assert found("full", "data").sent["all-reduce"] == 2 * weights + 4
    for mesh in MESHES:
        assert programs.sent(found("lora_step", mesh)) < programs.sent(found("full", mesh)), mesh


def test_by_hand_as_many_numbers_are_sent_on_a_data_mesh(found):
    """By hand they are sent in bf16, as factors are cast for the products."""
    hand, ours = (arrays(found(program, "data")) for program in ("by_hand", "gradient"))
    assert {dtype for _, dtype, shape in hand if shape} == {"bf16"}
    assert numbers(ours) == numbers(hand) == WHOLE + 1


def test_temporary_memory_is_that_of_by_hand(found):
    """Of a small decoder; test_decoder.py has it of a large one."""
    ours, hand = found("gradient", "data"), found("by_hand", "data")
    assert programs.temporary(ours) <= 1.03 * programs.temporary(hand)


# On a tensor mesh two things that are meant to be so cost more than by hand. Written into the model by hand they make
# it what `lora_apply` makes: to the byte in what is sent, to 1.02 in temporary memory.
# - Sums over tokens, and y + h B, in fp32: 1.10 of the memory by hand. In the backward pass the compiler gathers q, k
#   and v for their products again, where by hand it keeps what it gathered to recompute: 5 gathers a layer, by hand 4.
# - h B waits for y, for 0.03 of the cycles at large sizes: 6 gathers a layer, and 1.13 of the memory.
# Nothing else is more than by hand, so less can be reached by giving up one of these.


@pytest.mark.xfail(strict=True, reason="measured 1.046, bound 1: two weights [512, 128] a layer are gathered once more")
def test_by_hand_as_much_is_sent_on_a_tensor_mesh_beside_sums_in_fp32(found):
    ours, hand = found("gradient", "tensor"), found("by_hand", "tensor")
    assert programs.sent(ours) <= programs.sent(hand) + FACTORS["tensor"] * (4 - 2)


@pytest.mark.xfail(strict=True, reason="measured 1.157, bound 1.02")
def test_temporary_memory_on_a_tensor_mesh_is_that_of_by_hand(found):
    ours, hand = found("gradient", "tensor"), found("by_hand", "tensor")
    assert programs.temporary(ours) <= 1.02 * programs.temporary(hand)
