"""What a compiled program costs, read off its text: loops, collectives, and the compiler's estimates."""

import jax
import jax.numpy as jnp

from lora_jax.analysis import compile_report as reports
from lora_jax.analysis import hlo, hlo_costs, topologies

# As the compiler for TPUs writes it: no number of turns beside the loop, and a collective under one channel twice.
LOOP = """
%inner (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0:T(128)} negate(%p), backend_config={"estimated_cycles":"999"}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%b), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  %f = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/transpose(jvp(f))/mul"}, \
backend_config={"estimated_cycles":"100"}
  %odd = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%inner, \
backend_config={"estimated_cycles":"9223372036854775807"}
  %s = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) collective-permute-start(%f), channel_id=4
  %d = f32[8]{0:T(128)} collective-permute-done(%s), channel_id=4
  %g = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%d), channel_id=5, dimensions={0}
  %again = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%d), channel_id=5, dimensions={0}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %d)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
  ROOT %z = f32[8]{0:T(128)} fusion(%y), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/jvp(f)/mul"}, \
backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_are_counted_and_a_channel_once():
    found = hlo_costs.costs(LOOP)
    assert found.cycles == {"forward": 7, "backward": 6 * 100}
    assert found.sent == {"collective-permute": 6 * 32, "all-gather": 6 * 64}
    assert found.launches == {"collective-permute": 6, "all-gather": 6}
    assert found.unknown == {"odd": 6}
    assert found.unknown_loops == ()


# A collective that is begun before a loop and runs beside its turns: a part of each, and of what ends it.
BESIDE = """
%part (p: f32[8]) -> f32[16] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %g = f32[16]{0:T(128)} all-gather(%p), channel_id=7, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[16] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %async-collective-start.1 = f32[16]{0:T(128)} fusion(%x.1), kind=kCustom, calls=%part
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %async-collective-done.1 = f32[16]{0:T(128)} fusion(%x.1), kind=kCustom, calls=%part
}
"""


def test_what_runs_beside_a_loop_is_sent_once():
    loop = LOOP.split("ENTRY")[0].replace(
        "  %g = ", "  %beside = f32[16]{0:T(128)} fusion(%x), kind=kCustom, calls=%part\n  %g = "
    )
    found = hlo_costs.costs(loop + BESIDE)
    assert found.launches == {"all-gather": 1 + 6, "collective-permute": 6}
    assert found.sent == {"all-gather": 64 + 6 * 64, "collective-permute": 6 * 32}


def test_what_goes_between_slices_is_counted_apart():
    received = """  %r = (f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%token), channel_id=4, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_transfer_type="ALL_REDUCE"}
"""
    found = hlo_costs.costs(LOOP.replace("  %g = ", f"{received}  %g = "))
    assert found.sent == {"collective-permute": 6 * 32, "all-reduce between slices": 6 * 128, "all-gather": 6 * 64}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    found = hlo_costs.costs(LOOP.replace("constant(12)", "parameter(1)"))
    assert found.cycles == {"forward": 7, "backward": 100}
    assert found.unknown_loops == ("loop",)


def test_loops_of_a_real_program():
    def nested(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.fori_loop(0, 5, lambda _, z: jnp.sin(z) * 2, y), x)

    module = hlo.parse(jax.jit(nested).lower(jnp.ones(100)).compile().as_text())
    loops = [one for lines in module.computations.values() for one in lines if one.operation == "while"]
    assert sorted(module.trips(one) for one in loops) == [5, 7]


def test_cycles_of_a_program_without_a_derivative_are_its_own():
    text = LOOP.replace("jvp(f)", "f")
    assert hlo_costs.costs(text).cycles == {"the program": 607}


def test_a_report_says_what_it_does_not_know():
    unknown = LOOP.replace("constant(12)", "parameter(1)")
    machine = topologies.Topology("v5e:2x4", 1, tuple(jax.devices()), 2**30, {})
    text = str(reports.report_on(machine, {"base": 100}, reports.Compiled(unknown, 100)))
    assert "Without an estimate, and not in these sums: odd." in text
    assert "Loops of unknown length, of which one turn is counted: loop." in text
