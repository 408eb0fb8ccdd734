"""Kernels that unpack NF4 tile by tile, interpreted: the plain product is the oracle. And TPU and GPU take them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, total, trained

import lora_jax as lora
from lora_jax import bases
from lora_jax.bases import nf4, nf4_pallas

CODE = tuple(nf4.CODE.tolist())
PLATFORMS = ("interpreted tpu", "interpreted gpu")


def matrix(d, k, seed=0):
    """Random codes and scales, and W by hand."""
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 256, (d, k // 2), np.uint8), rng.random((d, k // 64), np.float32)
    w = np.zeros((d, k), np.float32)
    for j in range(k):
        q = codes[:, j // 2] >> 4 if j % 2 == 0 else codes[:, j // 2] & 15
        w[:, j] = nf4.CODE[q] * scales[:, j // 64]
    return codes, scales, w


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 128, 512), (70, 256, 192), (300, 1024, 256), (17, 576, 128)])
@pytest.mark.sampled(2)
def test_both_products_and_their_derivatives(platform, shape):
    """Several tiles along every axis, rows that fill none, axes that are one tile."""
    rows, d, k = shape
    codes, scales, w = matrix(d, k)
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((rows, n)).astype(np.float32) for n in (d, k))
    how = (CODE, (jnp.float32,), "highest", platform)
    for product, given, other, dense in (
        (nf4_pallas.times, x, y, w),
        (nf4_pallas.times_transposed, y, x, w.T),
    ):
        found, vjp = jax.vjp(lambda given, product=product: product(given, codes, scales, *how), given)
        np.testing.assert_allclose(found, given @ dense, rtol=1e-5, atol=2e-4)
        np.testing.assert_allclose(vjp(other)[0], other @ dense.T, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_narrow_products(platform):
    """Values are rounded to W's dtype, sums are not."""
    codes, scales, w = matrix(128, 128)
    x = jax.random.normal(jax.random.key(0), (8, 128)).astype(jnp.bfloat16)
    found = nf4_pallas.times(x, codes, scales, CODE, (jnp.bfloat16,), None, platform)
    assert found.dtype == jnp.bfloat16
    expected = x.astype(jnp.float32) @ jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def heads(params, x):
    """Attention's kernels: several axes of outputs, and of inputs; one that is transposed, and one in parts."""
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    y = jnp.einsum("bthk,hkd->btd", jnp.tanh(q), params["o"])
    y = y + jnp.tanh(y @ params["up"]) @ params["tied"].T
    return y + jnp.einsum("btd,hdk->bthk", y, params["moved"]).sum(2)


SHAPES = {"q": (64, 4, 64), "o": (4, 64, 128), "up": (128, 192), "tied": (128, 192), "moved": (2, 128, 128)}


def setup(kernel, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {n: (jax.random.normal(k, s) / 12).astype(dtype) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    x = jax.random.normal(jax.random.key(1), (2, 3, 64)).astype(dtype)
    base = bases.quantize(params, {".*": bases.Nf4(stack=0, kernel=kernel)})
    plan = lora.plan(heads, base, x, rules={".*": lora.Lora(rank=2)})
    return base, trained(lora.init(jax.random.key(2), base, plan), 1), x


def kernels(jaxpr):
    """How many there are in a program, wherever they are."""
    return str(jaxpr).count("pallas_call[")


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.sampled(2)
def test_programs_use_them(adapted):
    """Outputs, gradients of adapters and of inputs are those of the plain product; all weights but one have kernels."""
    found = {}
    for kernel in (True, False):
        base, adapters, x = setup(kernel)
        adapters = adapters if adapted else {}
        run = jax.value_and_grad(lambda a, x, base=base: total(lora.lora_apply(heads)(base, a, x)), argnums=(0, 1))
        found[kernel] = jax.jit(run)(adapters, x)
        forward = jax.make_jaxpr(lambda a, x, base=base: lora.lora_apply(heads)(base, a, x))(adapters, x)
        assert kernels(forward) == (4 if kernel else 0), "what is contracted in the middle is unpacked"
    assert_trees_close(found[True], found[False], rtol=1e-4, atol=1e-4)


def test_scanned_layers_and_vmapped_inputs():
    def model(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, params)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (3, 64, 128)) / 8, "down": jax.random.normal(keys[1], (3, 128, 64)) / 11}
    x = jax.random.normal(keys[2], (4, 2, 64))
    found, kept = {}, {}
    for kernel in (True, False):
        base = bases.quantize(params, {".*": bases.Nf4(kernel=kernel)})
        plan = lora.plan(model, base, x[0], rules={".*": lora.Lora(rank=2)})
        adapters, apply = trained(lora.init(jax.random.key(1), base, plan), 1), lora.lora_apply(model)

        def loss(adapters, base, x, apply=apply):
            return total(jax.vmap(lambda x: apply(base, adapters, x))(x))

        found[kernel] = jax.jit(jax.value_and_grad(loss))(adapters, base, x)
        _, vjp = jax.vjp(lambda a, base=base, apply=apply: apply(base, a, x[0]), adapters)
        kept[kernel] = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept[True] <= kept[False], "the packed arrays, scales too"
    assert_trees_close(found[True], found[False], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", ["narrower", "wider", "both"])
def test_values_are_rounded_as_the_program_rounds_them(cast):
    """W of one dtype, cast to others on its way: each rounds."""
    kept, first, last = {
        "narrower": (jnp.float32, jnp.float32, jnp.bfloat16),
        "wider": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        "both": (jnp.float32, jnp.bfloat16, jnp.float32),
    }[cast]

    def model(params, x):
        return x.astype(last) @ params["w"].astype(first).astype(last)

    w = {"w": jax.random.normal(jax.random.key(0), (64, 128)).astype(kept)}
    x = jax.random.normal(jax.random.key(1), (8, 64)).astype(jnp.bfloat16)
    found = [
        lora.lora_apply(model)(bases.quantize(w, {"w": bases.Nf4(kernel=kernel)}), {}, x).astype(jnp.float32)
        for kernel in (True, False)
    ]
    np.testing.assert_allclose(*found, rtol=1e-2 if last == jnp.bfloat16 else 1e-5, atol=1e-4)


def test_a_weight_of_torch_is_the_other_product():
    """What bitsandbytes packed has its outputs first, and is turned."""
    w = bases.quantize({"w": jax.random.normal(jax.random.key(0), (128, 64))}, {"w": bases.Nf4(kernel=True)})["w"]
    turned, x = w.with_deferred("transpose", (1, 0)).with_deferred("reshape", (64, 2, 64)), jnp.ones((3, 64))
    found = turned.dot(x, (0,), jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(found, jnp.tensordot(x, turned.dense(), 1), rtol=1e-4, atol=1e-4)
    back = turned.dot(jnp.ones((3, 2, 64)), (1, 2), jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(back, jnp.tensordot(jnp.ones((3, 2, 64)), turned.dense(), [(1, 2), (1, 2)]), rtol=1e-4)


def test_what_they_are_not_for():
    """Padded weights, other dtypes and precisions, what tiles do not cut evenly: the plain product, without a word."""
    assert nf4_pallas.tile(8, 100, 64, "gpu") is None
    assert nf4_pallas.tile(8, 1100, 64, "tpu") is None
    assert nf4_pallas.tile(8, 960, 960, "tpu") is None, "more than fits"
    assert nf4_pallas.tile(8, 4096, 11008, "tpu") == (16, 512, 256)
    assert nf4_pallas.platform_for(False, 8, 64, 64, jnp.float32, None) is None
    assert nf4_pallas.platform_for(None, 8, 64, 64, jnp.float32, None) is None, "on a CPU"
    assert nf4_pallas.platform_for(True, 8, 64, 64, jnp.float32, None) == "interpreted tpu"
    assert nf4_pallas.platform_for(True, 8, 64, 64, jnp.float16, None) is None
    assert nf4_pallas.platform_for(True, 8, 64, 64, jnp.float32, jax.lax.Precision.HIGH) is None
    w = bases.quantize({"w": jnp.ones((12, 24))}, {"w": bases.Nf4(kernel=True)})["w"]
    assert w.dot(jnp.ones((3, 12)), (0,), None) is None
    w = bases.quantize({"w": jnp.ones((64, 64))}, {"w": bases.Nf4(kernel=True)})["w"]
    assert w.dot(jnp.ones((3, 64)), (0,), None) is not None
    assert w.dot(jnp.ones((0, 64)), (0,), None) is None
    assert w.dot(jnp.ones((3, 64), jnp.bfloat16), (0,), None) is None


def test_which_products_an_accelerator_takes_by_itself(monkeypatch):
    """Few rows, on one device, where a trial with its own dtype, precision and tile succeeds."""
    tried = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(nf4_pallas, "works", lambda *how: tried.append(how) or len(tried) < 3)
    chosen = [
        nf4_pallas.platform_for(None, rows, 64, 128, dtype, None)
        for rows, dtype in ((1, jnp.bfloat16), (256, jnp.float32), (8, jnp.float32), (257, jnp.float32))
    ]
    assert chosen == ["tpu", "tpu", None, None]
    assert [how[3] for how in tried] == [(16, 64, 128), (256, 64, 128), (16, 64, 128)]
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert nf4_pallas.platform_for(None, 1, 64, 128, jnp.float32, None) is None


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_device_is_tried_first(platform, monkeypatch):
    """A kernel that is wrong there is not used, and that is said."""
    how = (platform, jnp.dtype(jnp.bfloat16), None, (16, 64, 128))
    nf4_pallas.works.cache_clear()
    with jax.transfer_guard("disallow"):
        assert nf4_pallas.works(*how)
    nf4_pallas.works.cache_clear()
    monkeypatch.setattr(nf4_pallas, "_look_up", lambda q, code: q.astype(jnp.float32))
    with pytest.warns(UserWarning, match="computed without kernels"):
        assert not nf4_pallas.works(*how)
    nf4_pallas.works.cache_clear()


SIZES = [(300, 1024, 768), (2048, 4096, 11008), (40, 576, 192)]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # from JAX 0.12 on
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "cuda"])
def test_accelerators_compilers_take_them(kind, dtype):
    """What Pallas hands to Mosaic and Triton is made without a device: both products, sizes of real models."""
    platform = "gpu" if kind == "cuda" else "tpu"
    for rows, d, k in SIZES:
        for product, width in ((nf4_pallas.times, d), (nf4_pallas.times_transposed, k)):
            run = functools.partial(product, code=CODE, dtypes=(dtype,), precision=None, platform=platform)
            shapes = [((rows, width), dtype), ((d, k // 2), jnp.uint8), ((d, k // 64), jnp.float32)]
            args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
            with abstract_tpu(kind) if platform == "tpu" else contextlib.nullcontext():
                text = (
                    jax.jit(run).trace(*args).lower(lowering_platforms=("cuda" if kind == "cuda" else "tpu",)).as_text()
                )
            assert ("tpu_custom_call" if platform == "tpu" else "triton") in text


@contextlib.contextmanager
def abstract_tpu(kind):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        yield
