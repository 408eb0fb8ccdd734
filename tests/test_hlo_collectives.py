"""What devices send each other, read off texts as the compilers for GPUs and for several kinds of TPUs write them."""

from lora_jax.analysis import hlo, hlo_costs


def test_what_a_kernel_says_of_itself_over_several_lines_ends_no_computation():
    kernel = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %z = f32[8]{0} negate(%k)
}
"""
    module = hlo.parse(kernel)
    assert [one.operation for one in module.computations["main"]] == ["parameter", "custom-call", "negate"]


# As other compilers write it: that for GPUs has operands beside the results of what is begun, and gives all that comes
# of `shard_map` one channel; TPUs with sparse cores call computations there.
BEGUN = """
%called_computation (p: f32[8]) -> f32[16] {
  ROOT %there = f32[16]{0} all-gather(%p), channel_id=3, dimensions={0}
}

ENTRY %main (x: f32[8], y: s32[2]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = s32[2]{0} parameter(1)
  %gather = ((s32[2]{0}, f32[8]{0}), (s32[4]{0}, f32[16]{0})) all-gather-start(%y, %x), channel_id=1, dimensions={0}
  %scatter = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%x), channel_id=1, dimensions={0}
  %n = f32[8]{0} negate(%x)
  %second = f32[4]{0} reduce-scatter(%n), channel_id=1, dimensions={0}
  %permute = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2
  %sum = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), channel_id=1
  %sums = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) all-reduce-start(%x, %x), channel_id=4
  %sparse = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", \
to_apply=%called_computation
  %r = (f32[2]{0:T(128)}, u32[]{:S(2)}, token[]) recv(%after), channel_id=6, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %z = f32[8]{0} all-reduce-done(%sum)
}
"""


def test_what_is_sent_is_what_a_device_gets():
    found = hlo_costs.costs(BEGUN)
    assert found.sent == {
        "all-gather": (4 + 16) * 4 + 16 * 4,
        "reduce-scatter": 2 * 4 * 4,
        "collective-permute": 8 * 4,
        "all-reduce": 8 * 4 + 2 * 8 * 4,
        "all-reduce between slices": 2 * 4,
    }
    kinds = ("all-gather", "reduce-scatter", "collective-permute", "all-reduce", "all-reduce between slices")
    assert found.launches == dict(zip(kinds, (2, 2, 1, 2, 1), strict=True))
