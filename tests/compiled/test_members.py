"""Many adapters over one base, on TPUs and H100s: each weight takes part in one product for all."""

import members
import pytest
from collectives import arrays, in_memory, numbers, of
from needs import needs
from products import taking

D, F, E, T, L, EACH = members.D, members.F, members.E, members.T, members.layers.L, members.EACH
MACHINES = {"v5e:4x4": 16, "h100:8": 8}
on_machines = pytest.mark.parametrize("machine", MACHINES)


@pytest.fixture(scope="module")
def found():
    """Reports by machine and program."""
    kept = {}

    def report(machine, program):
        needs(machine)
        if (machine, program) not in kept:
            kept[machine, program] = program(machine, MACHINES[machine])
        return kept[machine, program]

    return report


@on_machines
def test_the_rows_of_all_members_meet_all_experts_in_one_product(found, machine):
    """Forward of `up` and `down`, and the derivative by what `down` reads; of each the rows of both members.

    XLA writes a ragged product for GPUs as a dense one, along the inputs of all experts: there a row has E times D.
    """
    rows = EACH * T * (E if machine.startswith("h100") else 1)
    assert sorted(taking(found(machine, members.population), E * D * F)) == sorted([rows * D, rows * F, rows * D])


@on_machines
def test_no_member_has_experts_of_its_own_and_members_send_nothing(found, machine):
    report = found(machine, members.population)
    assert in_memory(report, "bf16")[0] == E * D * F, "the experts themselves"
    assert in_memory(report, "f32")[0] <= E * D * F // 4
    assert report.sent == {}


@on_machines
def test_a_mixed_batch_takes_one_product_for_each_weight(found, machine):
    """Forward, `up` once more as it is recomputed, and backward: of all examples that are on a device."""
    rows = EACH * T
    of_up, of_down = [rows * D, rows * D, rows * F], [rows * F, rows * D]
    assert sorted(taking(found(machine, members.mixed), D * F)) == sorted(of_up + of_down)


@on_machines
def test_no_example_has_a_weight_of_its_own_and_the_base_is_gathered_once_each_way(found, machine):
    report = found(machine, members.mixed)
    assert in_memory(report, "bf16")[0] <= D * F, "one gathered weight"
    assert in_memory(report, "f32")[0] <= D * F // 2
    gathers = of(arrays(report), lambda kind, *_: kind == "all-gather")
    assert {dtype for _, dtype, _ in gathers} == {"bf16"}
    assert numbers(gathers) == 2 * 2 * L * D * F
    sums = of(arrays(report), lambda kind, *_: kind == "all-reduce")
    slots = members.SLOTS * L * members.RULE.rank * 2 * (D + F)
    assert numbers(sums) == slots + 1, "gradients of all slots once, and the loss"
    assert {dtype for _, dtype, _ in sums} == {"f32"}


@pytest.mark.parametrize("machine", ["v5e:1x1", "h100:1"])
def test_short_examples_of_one_slot_share_their_factors(machine):
    """On one device: no factor is copied for an example, and each weight still takes part in one product."""
    needs(machine)
    report, rows = members.short(machine, 1), members.SHORT
    of_up, of_down = [rows * D, rows * D, rows * F], [rows * F, rows * D]
    assert sorted(taking(report, D * F)) == sorted(of_up + of_down)
    assert in_memory(report, "bf16")[0] == L * D * F < rows * members.RULE.rank * D
