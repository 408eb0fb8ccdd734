"""What a population costs: the products of its members, one by each weight of the base, and no base of their own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import equations

import lora_jax as lora

N, L, T, D, K = 8, 3, 2, 256, 384


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, p)[0]


def unrolled(p, x):
    for i in range(L):
        x = x + jnp.tanh(x @ p[f"up{i}"]) @ p[f"down{i}"]
    return x


STACKED = {"up": jnp.ones((L, D, K)) / D, "down": jnp.ones((L, K, D)) / K}
APART = {f"{name}{i}": w[i] for name, w in STACKED.items() for i in range(L)}
MODELS = {"scanned": (scanned, STACKED), "unrolled": (unrolled, APART)}
X = jax.random.normal(jax.random.key(0), (N, T, D))


def dot_flops(jaxpr):
    """FLOPs of matrix products; those of a scanned layer count once."""
    flops = 0
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            flops += 2 * eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))
    return flops


def steps(name):
    """The step of one member and of eight, lowered, and the FLOPs of their products."""
    fn, params = MODELS[name]
    apply = lora.lora_apply(fn)

    def loss(adapters, params, x):
        return jnp.mean((apply(params, adapters, x) - 1) ** 2)

    plan = lora.plan(fn, params, X[0], rules={".*": lora.Lora(1)})
    members = [lora.init(jax.random.key(i), params, plan) for i in range(N)]
    one = lora.TrainState.create(members[0], optax.adam(1e-3))
    all_of_them = lora.Population.create(members, optax.adam, {"learning_rate": [1e-3] * N})
    single, step = lora.jit_step(loss, optax.adam(1e-3)), lora.population_step(loss, optax.adam)
    flops = [
        dot_flops(jax.make_jaxpr(lambda *a: lora.train_step(loss, optax.adam(1e-3), *a))(one, params, X[0])),
        dot_flops(jax.make_jaxpr(step)(all_of_them, params, lora.PerMember(X))),
    ]
    return params, single.lower(one, params, X[0]), step.lower(all_of_them, params, lora.PerMember(X)), flops


@pytest.mark.parametrize("name", MODELS)
def test_flops_products_and_memory(name):
    params, single, step, (flops_of_one, flops) = steps(name)
    assert N * flops_of_one <= flops <= 1.001 * N * flops_of_one
    alone, together = single.compile(), step.compile()
    texts = alone.as_text(), together.as_text()
    assert len(base_products(texts[0])) == len(base_products(texts[1])) > 0
    for shape in {(N * L * D * K), (N * D * K)}:
        assert not [s for s in shapes(texts[1]) if np.prod(s) == shape], "a base for each member"
    base = sum(w.nbytes for w in jax.tree.leaves(params))
    more = together.memory_analysis().temp_size_in_bytes - alone.memory_analysis().temp_size_in_bytes
    assert more < base / 2  # one base for each member would be N - 1 times as much


def shapes(text):
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]


def base_products(text):
    """The products with a weight of the base, in compiled code."""
    defined = dict(re.findall(r"%?([\w.-]+) = f32\[([\d,]+)\]", text))
    found = []
    for operands in re.findall(r" dot\((.*?)\), ", text):
        names = re.findall(r"%([\w.-]+)", operands)
        sizes = [np.prod([int(n) for n in defined.get(name, "0").split(",")]) for name in names]
        found += [operands] * (D * K in sizes)
    return found
