"""Programs with NF4 weights take the kernels of `nf4_pallas`; the plain product is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, total, trained

import lora_jax as lora
from lora_jax import bases


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
    return str(jaxpr).count("nf4_product[")


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.sampled(5)
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


def test_a_weight_of_torch_is_the_other_product():
    """What bitsandbytes packed has its outputs first, and is turned."""
    w = bases.quantize({"w": jax.random.normal(jax.random.key(0), (128, 64))}, {"w": bases.Nf4(kernel=True)})["w"]
    turned, x = w.with_deferred("transpose", (1, 0)).with_deferred("reshape", (64, 2, 64)), jnp.ones((3, 64))
    found = turned.dot(x, (0,), jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(found, jnp.tensordot(x, turned.dense(), 1), rtol=1e-4, atol=1e-4)
    back = turned.dot(jnp.ones((3, 2, 64)), (1, 2), jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(back, jnp.tensordot(jnp.ones((3, 2, 64)), turned.dense(), [(1, 2), (1, 2)]), rtol=1e-4)


def test_in_a_shard_map_a_placed_weight_has_them():
    """In a `shard_map` a device has what it has of a base on a mesh. Where the compiler splits it there are none."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jax.random.normal(jax.random.key(0), (64, 128)), jax.NamedSharding(mesh, jax.P()))
    base, x = bases.quantize({"w": w}, {"w": bases.Nf4(kernel=True, stack=0)}), jnp.ones((8, 64))

    def model(params, x):
        return x @ params["w"]

    def product(base, x):
        return lora.lora_apply(model)(base, {}, x)

    mapped = jax.shard_map(product, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data"))
    assert kernels(jax.make_jaxpr(mapped)(base, x)) == 1
    assert kernels(jax.make_jaxpr(product)(base, x)) == 0
    np.testing.assert_allclose(jax.jit(mapped)(base, x), x @ bases.dense(base)["w"], rtol=1e-5, atol=1e-5)
