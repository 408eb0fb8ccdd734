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
from lora_jax.bases import nf4, nf4_kernel

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
def test_both_products_and_their_derivatives(platform, shape):
    """Several tiles along every axis, rows that fill none, axes that are one tile."""
    rows, d, k = shape
    codes, scales, w = matrix(d, k)
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((rows, n)).astype(np.float32) for n in (d, k))
    how = (CODE, jnp.float32, "highest", platform)
    for product, given, other, dense in (
        (nf4_kernel.times, x, y, w),
        (nf4_kernel.times_transposed, y, x, w.T),
    ):
        found, vjp = jax.vjp(lambda given, product=product: product(given, codes, scales, *how), given)
        np.testing.assert_allclose(found, given @ dense, rtol=1e-5, atol=2e-4)
        np.testing.assert_allclose(vjp(other)[0], other @ dense.T, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_narrow_products(platform):
    """Values are rounded to W's dtype, sums are not."""
    codes, scales, w = matrix(128, 128)
    x = jax.random.normal(jax.random.key(0), (8, 128)).astype(jnp.bfloat16)
    found = nf4_kernel.times(x, codes, scales, CODE, jnp.bfloat16, None, platform)
    assert found.dtype == jnp.bfloat16
    expected = x.astype(jnp.float32) @ jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def heads(params, x):
    """Attention's kernels: several axes of outputs, and of inputs; and one that the program transposes."""
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    y = jnp.einsum("bthk,hkd->btd", jnp.tanh(q), params["o"])
    return y + jnp.tanh(y @ params["up"]) @ params["tied"].T


SHAPES = {"q": (64, 4, 64), "o": (4, 64, 128), "up": (128, 192), "tied": (128, 192)}


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
def test_programs_use_them(adapted):
    """Outputs, gradients of adapters and of inputs are those of the plain product; of three weights it has kernels."""
    found = {}
    for kernel in (True, False):
        base, adapters, x = setup(kernel)
        adapters = adapters if adapted else {}
        run = jax.value_and_grad(lambda a, x, base=base: total(lora.lora_apply(heads)(base, a, x)), argnums=(0, 1))
        found[kernel] = jax.jit(run)(adapters, x)
        forward = jax.make_jaxpr(lambda a, x, base=base: lora.lora_apply(heads)(base, a, x))(adapters, x)
        assert kernels(forward) == (3 if kernel else 0), "the transposed weight is unpacked"
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


def test_what_they_are_not_for():
    """Padded weights, another dtype, matrices that tiles do not cut evenly: the plain product, without a word."""
    assert nf4_kernel.tile(8, 100, 64, "gpu") is None
    assert nf4_kernel.tile(8, 1100, 64, "tpu") is None
    assert nf4_kernel.tile(8, 4096, 11008, "tpu") == (16, 512, 256)
    assert nf4_kernel.platform_for(False) is None
    assert nf4_kernel.platform_for(None) is None, "on a CPU"
    w = bases.quantize({"w": jnp.ones((12, 24))}, {"w": bases.Nf4(kernel=True)})["w"]
    assert w.dot(jnp.ones((3, 12)), (0,), None) is None
    w = bases.quantize({"w": jnp.ones((64, 64))}, {"w": bases.Nf4(kernel=True)})["w"]
    assert w.dot(jnp.ones((3, 64)), (0,), None) is not None
    assert w.dot(jnp.ones((0, 64)), (0,), None) is None
    assert w.dot(jnp.ones((3, 64), jnp.bfloat16), (0,), None) is None


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_device_is_tried_first(platform, monkeypatch):
    """With numbers of its own. A kernel that is wrong there is not used, and that is said."""
    nf4_kernel.works.cache_clear()
    assert nf4_kernel.works(platform)
    nf4_kernel.works.cache_clear()
    monkeypatch.setattr(nf4_kernel, "_look_up", lambda q, code: q.astype(jnp.float32))
    with pytest.warns(UserWarning, match="computed without kernels"):
        assert not nf4_kernel.works(platform)
    nf4_kernel.works.cache_clear()


SIZES = [(300, 1024, 768), (2048, 4096, 11008), (40, 576, 192)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "cuda"])
def test_accelerators_compilers_take_them(kind, dtype):
    """What Pallas hands to Mosaic and Triton is made without a device: both products, sizes of real models."""
    platform = "gpu" if kind == "cuda" else "tpu"
    for rows, d, k in SIZES:
        for product, width in ((nf4_kernel.times, d), (nf4_kernel.times_transposed, k)):
            run = functools.partial(product, code=CODE, dtype=dtype, precision=None, platform=platform)
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
