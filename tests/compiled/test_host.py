"""A base in the memory of the host, by the real compilers: it comes layer by layer, and is never sent back."""

import functools
import re

import decoder
import jax
import jax.numpy as jnp
import programs
import pytest
from cached import report
from jax.ad_checkpoint import checkpoint_name
from needs import needs

import lora_jax as lora

SIZE = decoder.Size(layers=8, width=512, inner=1024, heads=4, kv_heads=4, vocabulary=1024)
LINEARS = SIZE.layers * (4 * SIZE.width**2 + 3 * SIZE.width * SIZE.inner)  # numbers
TPU = "v5e:1x1"
FORMATS = {"bf16": None, **programs.FORMATS}


@functools.cache
def step(machine, host, fsdp=1, bits="bf16"):
    """`lora.jit_step` with adapters on all seven linears, over a base on the host or on the device."""
    needs(machine)
    setup = programs.setup(machine, 1, SIZE, programs.FEW, fsdp=fsdp)
    params = setup.packed(bits) if FORMATS[bits] else setup.params
    state = setup.state(params)
    if host:
        params = lora.bases.to_host(params, decoder.LINEARS)
    return setup.report(lora.jit_step(setup.loss(), programs.OPTIMIZER), state, params, setup.ids, setup.ids)


def copies(text):
    """Of the asynchronous copies between the memories, the shapes that come from the host, and those that go to it."""
    here, there = [], []
    for line in text.splitlines():
        if found := re.search(r" = (\(.*\)) (copy|dynamic-slice|dynamic-update-slice)-start\(", line):
            arrays = re.findall(r"(\w+\[[\d,]+\])\{([^}]*)\}", found[1])
            # A slice has (whole, part), a copy (to, source), an update (whole, part, whole).
            source, to = (arrays[0], arrays[-1]) if found[2] == "dynamic-slice" else (arrays[1], arrays[0])
            if ("S(5)" in source[1]) != ("S(5)" in to[1]):
                (here if "S(5)" in source[1] else there).append(to[0])
    return here, there


def test_a_tpu_brings_each_weight_twice_and_sends_none_back():
    """Once in the forward pass, and once for a layer that is computed again and its derivatives."""
    found, plain = step(TPU, host=True), step(TPU, host=False)
    here, there = copies(found.text)
    assert len(here) == 2 * 7
    assert there == []
    assert len(re.findall(r"dynamic-slice-done\(", found.text)) >= 2 * 7
    assert found.host["arguments"] == 2 * LINEARS
    assert plain.parts["base"] - found.parts["base"] == 2 * LINEARS
    one = 2 * LINEARS // SIZE.layers
    # and of x, what waiting for the layer spares a base on the device (core/backward_order), and this one not
    assert programs.temporary(found) <= programs.temporary(plain) + 1.2 * one, "of the weights, one layer at a time"
    assert "on the host" in str(found)


def test_the_next_layer_is_under_way_where_a_turn_of_the_scan_has_two():
    """All copies of a turn begin before its first product, and one is awaited where another product is done already."""
    needs(TPU)
    mesh = lora.topology_mesh(TPU, fsdp=1)
    up, down = (jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16) for shape in ((512, 1024), (1024, 512)))
    params = lora.bases.to_host(lora.abstract({"up": up, "down": down}, mesh), ".*")
    x = lora.abstract(jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), mesh)

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    def model(params, x):
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params, unroll=2)[0]

    adapters = lora.abstract_state(
        params, lora.plan(model, params, x, rules={".*": lora.Lora(rank=4)}), programs.OPTIMIZER
    ).trainable
    apply = lora.lora_apply(model)
    gradient = jax.grad(lambda adapters, params, x: jnp.sum(apply(params, adapters, x).astype(jnp.float32) ** 2))
    text = report(gradient, adapters, params, x, topology=TPU).text
    loops = [one for one in re.split(r"\n(?=\S)", text) if "dynamic-slice-start(" in one and "S(5)" in one]
    assert len(loops) == 2
    for loop in loops:
        order = re.findall(r"(dynamic-slice-start|dynamic-slice-done)\(|(dot_general)\"", loop)
        kinds = [one or other for one, other in order]
        first = kinds.index("dynamic-slice-done")
        assert kinds[:first].count("dynamic-slice-start") == kinds.count("dynamic-slice-start") == 2 * 2
        last = len(kinds) - 1 - kinds[::-1].index("dynamic-slice-done")
        assert "dot_general" in kinds[first:last]


@pytest.mark.parametrize("bits", programs.FORMATS)
def test_of_packed_weights_a_tpu_would_bring_the_whole_stack_for_each_layer(bits):
    """Numbers of 8 bits and less are in another order on the host than where they are sliced."""
    with pytest.raises(lora.LoraError, match=r"'layers/down' has numbers of u?int[48]"):
        step(TPU, host=True, bits=bits)


def test_gpus_that_are_not_there_have_no_memory_with_a_name():
    """JAX then leaves out where an array is to be, so that nothing can be said of it."""
    with pytest.raises(lora.LoraError, match=r"gpu devices \(NVIDIA H100.*have no memory of the kind 'pinned_host'"):
        step("h100:8", fsdp=8, host=True)


def test_layer_inputs_are_kept_on_the_host():
    """Of eight layers' inputs, the device has those of one or two."""
    needs(TPU)
    mesh = lora.topology_mesh(TPU, fsdp=1)
    layers, rows, width = 8, 8192, 2048  # more than the compiler keeps in the chip's vector memory
    shapes = {"layers": jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16)}
    params = lora.abstract(shapes, mesh)
    x = lora.abstract(jax.ShapeDtypeStruct((rows, width), jnp.bfloat16), mesh)

    def gradient(policy):
        def layer(x, w):
            x = checkpoint_name(x, "layer_input")
            return jnp.tanh(x @ w), None

        def model(params, x):
            body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            return jax.lax.scan(body, x, params["layers"])[0]

        plan = lora.plan(model, params, x, rules={".*": lora.Lora(rank=4)})
        adapters = lora.abstract_state(params, plan, programs.OPTIMIZER).trainable
        apply = lora.lora_apply(model)
        step = jax.grad(lambda adapters, params, x: jnp.sum(apply(params, adapters, x).astype(jnp.float32) ** 2))
        return report(step, adapters, params, x, topology=TPU)

    found = gradient(lora.policies.offload("layer_input"))
    plain = gradient(jax.checkpoint_policies.nothing_saveable)
    one = 2 * rows * width
    assert found.host["temporary (activations)"] == layers * one
    assert programs.temporary(plain) - programs.temporary(found) >= (layers - 3) * one
