"""One product with a weight in NF4 on a TPU v5e, beside the dense one: the compiler's cycles, and memory."""

import dataclasses

import bundles
import cached
import jax
import jax.numpy as jnp
import programs
import pytest

import lora_jax as lora

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")

ROWS, D, K = 2048, 4096, 14336
DENSE = {"w": jax.ShapeDtypeStruct((D, K), jnp.bfloat16)}
X, Y = (jax.ShapeDtypeStruct((ROWS, n), jnp.bfloat16) for n in (D, K))


def single():
    """Scales in fp32."""
    return jax.eval_shape(lambda w: lora.bases.quantize(w, {"w": lora.bases.Nf4(double=False, stack=0)}), DENSE)


def double():
    """Scales in 8 bits, in blocks of 256. `Nf4()` packs numbers alone, so the shapes are written down."""
    w, n = single()["w"], D // 64 * K
    scales = {
        "scales": jax.ShapeDtypeStruct(w.scales.shape, jnp.uint8),
        "outer": jax.ShapeDtypeStruct((n // 256,), jnp.float32),
        "mean": jax.ShapeDtypeStruct((), jnp.float32),
    }
    return {"w": dataclasses.replace(w, **scales)}


def product(params, x):
    return lora.lora_apply(lambda params, x: x @ params["w"])(params, {}, x)


def derivative(params, y):
    """The gradient of x."""
    x = jnp.zeros((ROWS, D), jnp.bfloat16)
    return jax.vjp(lambda x: product(params, x), x)[1](y)[0]


def report(fn, params, x):
    mesh = lora.topology_mesh("v5e:2x2", data=4)
    return cached.report(fn, lora.abstract(params, mesh), lora.abstract(x, mesh), topology="v5e:2x2")


@pytest.mark.parametrize("packed", [single, double])
def test_a_product(packed):
    assert programs.cycles(report(product, packed(), X)) <= 1.5 * programs.cycles(report(product, DENSE, X))


def test_the_gradient_of_x():
    found, dense = report(derivative, single(), Y), report(derivative, DENSE, Y)
    assert programs.cycles(found) <= 1.5 * programs.cycles(dense)


def test_memory_is_one_weight_in_bf16():
    found = report(product, single(), X)
    assert found.parts["base"] == D * K // 2 + D // 64 * K * 4
    assert found.parts["temporary (activations)"] <= 1.01 * D * K * 2


# With few rows, as in generation, a kernel dequantizes W tile by tile ------------------------------------------------

BYTES_A_CYCLE = 819e9 / 1.5e9  # of HBM, at a clock at which 4 units of 128 x 128 make 197 TFLOP/s
READING = D * K * 2 / BYTES_A_CYCLE  # cycles, of W in bf16: all that a dense product of 16 rows takes


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_few_rows_takes_no_longer_than_to_read_a_dense_weight(transposed):
    assert bundles.of_nf4_product("v5e:2x2", 16, D, K, transposed) <= READING


def test_a_product_of_a_thousand_rows():
    dense = jax.ShapeDtypeStruct((1024, D), jnp.bfloat16)
    assert bundles.of_nf4_product("v5e:2x2", 1024, D, K, False) <= 1.1 * programs.cycles(report(product, DENSE, dense))
