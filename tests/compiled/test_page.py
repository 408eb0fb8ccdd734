"""The example of docs/will_it_fit.md runs, and its report says what the machine's own compiler does."""

import functools
import re
from pathlib import Path

import decoder
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas as pl

import lora_jax as lora

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")
PAGE = Path(__file__).parent.parent.parent / "docs" / "will_it_fit.md"


def test_the_example_of_the_page(capsys):
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    rows = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    shapes = {
        "embed": jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16),
        "layers": {
            "up": jax.ShapeDtypeStruct((2, 1024, 4096), jnp.bfloat16),
            "down": jax.ShapeDtypeStruct((2, 4096, 1024), jnp.bfloat16),
        },
    }
    specs = {
        "embed": jax.P(None, "fsdp"),
        "layers": {"up": jax.P(None, "fsdp"), "down": jax.P(None, None, "fsdp")},
    }

    def model(params, ids):
        def layer(x, p):
            return x + jnp.tanh(x @ p["up"]) @ p["down"], None

        x, _ = jax.lax.scan(jax.checkpoint(layer), params["embed"][ids], params["layers"])
        return x @ params["embed"].T

    apply, optimizer = lora.lora_apply(model), optax.adam(1e-4)

    def loss(adapters, params, ids, labels):
        return decoder.cross_entropy(apply(params, adapters, ids), labels)

    names = {
        "lora": lora,
        "jax": jax,
        "step": lora.jit_step(loss, optimizer),
        "plan": lora.plan(model, shapes, rows, rules={"layers/.*": lora.Lora(rank=16)}),
        "optimizer": optimizer,
        "shapes": shapes,
        "specs": specs,
        "rows": (rows, rows),
    }
    exec(code, names)
    printed = capsys.readouterr().out
    assert "v5e:2x2 (4 x TPU v5 lite), on one device" in printed
    assert re.search(r"of 15\.75: fits", printed)
    assert re.search(r"all-reduce +1 ", printed)  # the gradients of all adapters and the loss, once
    for part in ("base", "adapters", "optimizer", "temporary (activations)", "forward", "backward"):
        assert part in printed, part


def test_a_program_that_does_not_fit_has_a_report():
    mesh = lora.topology_mesh("v5e:2x2", data=4)
    x = lora.abstract(jax.ShapeDtypeStruct((2**17, 2**18), jnp.float32), mesh)
    report = lora.compile_report(lambda params: params.sum(), x, topology="v5e:2x2")
    assert not report.fits
    assert report.needed == 2**37
    assert "exceeds available HBM" in report.said


def test_topologies_that_libtpu_does_not_know_are_refused():
    with pytest.raises(lora.LoraError, match=r"knows no topology 'v5e:3x3'.*v5e:4x4"):
        lora.topology_mesh("v5e:3x3", data=9)


def test_two_slices_are_a_mesh():
    mesh = lora.topology_mesh("v5e:4x4", slices=2, data=2, fsdp=16)
    slices = [{device.slice_index for device in row} for row in mesh.devices]
    assert slices == [{0}, {1}]


def test_what_is_sent_between_slices_is_counted():
    mesh = lora.topology_mesh("v5e:2x2", slices=2, data=2, fsdp=4)
    x = lora.abstract(jax.ShapeDtypeStruct((16, 4096), jnp.float32), mesh, jax.P(("data", "fsdp")))
    report = lora.compile_report(lambda x: x.sum(0), x, topology="v5e:2x2", slices=2)
    between = {kind: n for kind, n in report.sent.items() if kind.endswith("between slices")}
    assert between == {"all-reduce between slices": 4096 * 4}


def test_a_mosaic_kernel_goes_untouched_through_lora_apply():
    """JAX's own splash attention on one device, beside adapted projections."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, tokens, size = 4, 512, 128
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens)) for _ in range(heads)])
    kernel = splash.make_splash_mha_single_device(mask=mask)

    def model(params, x):  # x: [T, D]
        q, k, v = (jnp.einsum("td,dhr->htr", x, params[name]) for name in ("q", "k", "v"))
        return jnp.einsum("htr,hrd->td", kernel(q, k, v), params["o"])

    shapes = {name: jax.ShapeDtypeStruct((512, heads, size), jnp.bfloat16) for name in ("q", "k", "v")}
    shapes["o"] = jax.ShapeDtypeStruct((heads, size, 512), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((tokens, 512), jnp.bfloat16)
    plan = lora.plan(model, shapes, x, rules={".*": lora.Lora(rank=8)})
    adapters = jax.eval_shape(lambda key: lora.init(key, shapes, plan), jax.random.key(0))
    apply = lora.lora_apply(model)
    device = lora.topology_mesh("v5e:2x2", data=4).devices[0]
    one = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    kinds = (jax.sharding.AxisType.Auto,)

    def kernels(fn, *args):
        mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=kinds, abstract_device=one)
        with jax.sharding.use_abstract_mesh(mesh):
            text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("tpu_custom_call")

    def loss(adapters, params, x):
        return apply(params, adapters, x).astype(jnp.float32).sum()

    def plain(x, params):
        return model(params, x).astype(jnp.float32).sum()

    assert kernels(apply, shapes, adapters, x) == kernels(model, shapes, x) == 1
    assert kernels(jax.grad(loss), adapters, shapes, x) == kernels(jax.grad(plain), x, shapes) > 1


TRITON = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def doubled(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


@TRITON
@pytest.mark.parametrize(
    ("topology", "dtype", "shape", "said"),
    [
        ("v5e:2x2", jnp.float32, (512, 32768), "memory space vmem"),
        ("v5e:2x2", jnp.float8_e3m4, (8, 256), "Mosaic failed to compile"),
        ("h100:4", jnp.float32, (512, 32768), "Failed to parse Triton module"),
    ],
)
def test_a_kernel_that_does_not_compile_is_found_in_the_program(topology, dtype, shape, said):
    mesh = lora.topology_mesh(topology, data=4)
    rows = jax.ShapeDtypeStruct((4 * shape[0], shape[1]), dtype)

    def local(x):
        return pl.pallas_call(doubled, out_shape=jax.ShapeDtypeStruct(shape, dtype))(x)

    def program(x):
        return jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)(x)

    with pytest.raises(lora.LoraError, match=rf"does not compile for {topology}.*{said}.*; at .*test_page\.py:\d+"):
        lora.compile_report(program, lora.abstract(rows, mesh, jax.P("data")), topology=topology)


@TRITON
@pytest.mark.parametrize("topology", ["v5e:1x1", "h100:1"])
def test_kernels_in_a_program_for_one_device_know_it(topology):
    x = lora.abstract(jax.ShapeDtypeStruct((256, 256), jnp.float32), lora.topology_mesh(topology, data=1))
    report = lora.compile_report(pl.pallas_call(doubled, out_shape=x), x, topology=topology)
    assert report.fits
    assert re.search("tpu_custom_call|triton", report.text)


def test_a_product_without_a_triton_kernel_goes_to_cublas():
    """Without autotuning XLA finds no kernel for this one."""
    mesh = lora.topology_mesh("h100:1", data=1)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 128, 160, 768), (128, 256, 768)))
    program = functools.partial(jnp.einsum, "becf,edf->ebcd")
    report = lora.compile_report(program, lora.abstract(x, mesh), lora.abstract(w, mesh), topology="h100:1")
    assert "__triton" not in report.text
    assert "cublas" in report.text
