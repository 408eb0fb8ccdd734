"""Starts that look at the weight, a gradient or the data: they change nothing, and the factors are as published."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import bases, starts
from lora_jax.initialization.corda import damp
from lora_jax.initialization.lora_ga import DIRECTIONS, SCALES
from lora_jax.initialization.svd import balanced_factors, explained_variance_ratio, singular_values, svd

PEFT = Path(__file__).parent / "data" / "peft"
RANK = 2

# One matrix; several inputs and outputs; stacked ones; each with its axes in an order of its own.
WEIGHTS = {
    "plain": ((12, 10), lora.KernelAxes((), (0,), (1,))),
    "outputs_first": ((10, 12), lora.KernelAxes((), (1,), (0,))),
    "heads": ((3, 10, 4), lora.KernelAxes((), (0, 2), (1,))),
    "experts": ((12, 3, 2, 5), lora.KernelAxes((1,), (0,), (2, 3))),
    "layers_of_experts": ((2, 6, 3, 7), lora.KernelAxes((0, 2), (3,), (1,))),
}


def fresh(shape, axes, rank=RANK, scale=1.5, dtype=jnp.float32):
    stack, inputs, outputs = axes.sizes(shape)
    a = jax.random.normal(jax.random.key(7), (*stack, *inputs, rank), dtype)
    return lora.LoraAdapter(a, jnp.zeros((*stack, rank, *outputs), dtype), axes, scale)


def model(dtype=jnp.float32, scale=1.5, factor_dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(WEIGHTS))
    params = {p: jax.random.normal(k, shape, dtype) for k, (p, (shape, _)) in zip(keys, WEIGHTS.items(), strict=True)}
    adapters = {p: fresh(shape, axes, scale=scale, dtype=factor_dtype) for p, (shape, axes) in WEIGHTS.items()}
    return params | {"bias": jnp.ones(3, dtype)}, adapters


def matrices(array, axes):
    """[n, d, k] in fp64, the slow way."""
    order = [*axes.stack, *axes.inputs, *axes.outputs]
    return np.asarray(array, np.float64).transpose(order).reshape(axes.fans(array.shape))


def rows(n=20):
    found = {}
    for i, (path, (shape, axes)) in enumerate(WEIGHTS.items()):
        stack, inputs, _ = axes.sizes(shape)
        x = jax.random.normal(jax.random.key(i), (*stack, n, math.prod(inputs)))
        found[path] = x * 0.8 ** jnp.arange(x.shape[-1]).reshape(*[1] * (x.ndim - 1), -1)
    return found


def gradients():
    return {p: jax.random.normal(jax.random.key(i), shape) for i, (p, (shape, _)) in enumerate(WEIGHTS.items())}


def covariances():
    return {path: jnp.matmul(x.mT, x) for path, x in rows().items()}


STARTS = {
    "pissa": starts.pissa,
    "pissa_randomised": lambda p, a: starts.pissa(p, a, iterations=2, key=jax.random.key(3)),
    "olora": starts.olora,
    "orthogonal": lambda p, a: (p, starts.orthogonal(jax.random.key(3), a)),
    "eva": lambda p, a: (p, starts.eva(a, rows())),
    "corda": lambda p, a: starts.corda(p, a, covariances()),
    "corda_knowledge": lambda p, a: starts.corda(p, a, covariances(), mode="knowledge"),
} | {
    f"lora_ga_{direction}_{scale}": lambda p, a, direction=direction, scale=scale: starts.lora_ga(
        p, a, gradients(), direction=direction, scale=scale, key=jax.random.key(3)
    )
    for direction, scale in [*((d, "stable") for d in DIRECTIONS), *(("ArB2r", s) for s in SCALES[1:])]
}
BASE_STAYS = ("orthogonal", "eva")


@pytest.mark.parametrize("scale", [1.5, -0.5])
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.sampled(5)
def test_starting_changes_nothing(name, scale):
    params, adapters = model(scale=scale)
    base, started = STARTS[name](params, adapters)
    assert list(started) == list(adapters)
    assert all(s.scale == scale and s.axes == adapters[p].axes for p, s in started.items())
    merged = lora.merge(base, started)
    for path, w in params.items():
        np.testing.assert_allclose(merged[path], w, atol=2e-5)
    changed = [path for path in adapters if np.abs(base[path] - params[path]).max() > 1e-3]
    assert changed == ([] if name in BASE_STAYS else list(adapters))


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.sampled(5)
def test_bf16(name):
    """The factors stay in fp32, and the base is rounded once: half a unit in the last place of W and of the rest."""
    params, adapters = model(jnp.bfloat16)
    base, started = STARTS[name](params, adapters)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in base.values())
    assert all(s.a.dtype == s.b.dtype == jnp.float32 for s in started.values())
    merged = lora.merge(base, started)
    for path, w in params.items():
        ulps = 2.0**-8 * (np.abs(np.asarray(base[path], np.float32)).max() + np.abs(np.asarray(w, np.float32)).max())
        np.testing.assert_allclose(np.asarray(merged[path], np.float32), np.asarray(w, np.float32), atol=ulps)


def test_what_rounding_the_factors_loses_stays_in_the_base():
    params, adapters = model(factor_dtype=jnp.bfloat16)
    base, started = starts.pissa(params, adapters)
    assert started["plain"].a.dtype == jnp.bfloat16
    for path, w in params.items():
        np.testing.assert_allclose(lora.merge(base, started)[path], w, atol=1e-5)


def test_one_svd_for_numpy_and_jax():
    """Each computes with its own library and in its own precision, and the factors have the same product."""
    w = np.random.default_rng(0).normal(size=(3, 7, 5))
    u, values, vt = svd(w, slice(2))
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, singular_values(w)[:, :2], rtol=1e-12)
    found = svd(jnp.asarray(w, jnp.float32), np.arange(2))
    assert all(isinstance(array, jax.Array) for array in found)
    np.testing.assert_allclose(found[1], values, rtol=1e-5)
    a, b = balanced_factors(u, values, vt, -0.5)
    np.testing.assert_allclose(-0.5 * a @ b, (u * values[:, None]) @ vt, rtol=1e-12)
    np.testing.assert_allclose(np.matmul(*balanced_factors(*found, -0.5)), a @ b, atol=1e-5)
    share = explained_variance_ratio(singular_values(w))
    np.testing.assert_allclose(explained_variance_ratio(singular_values(jnp.asarray(w, jnp.float32))), share, rtol=1e-5)
    np.testing.assert_allclose(share.sum(), 1)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_as_peft_starts(name):
    peft = load_file(PEFT / "inits.safetensors")  # W [out, in], scale 2
    w, a, b, residual = peft["W0"].T, peft[f"{name}.A"].T, peft[f"{name}.B"].T, peft[f"{name}.W"].T
    base, started = getattr(starts, name)({"w": w}, {"w": fresh(w.shape, WEIGHTS["plain"][1], scale=2.0)})
    np.testing.assert_allclose(base["w"], residual, atol=1e-5)
    np.testing.assert_allclose(started["w"].a @ started["w"].b, a @ b, atol=1e-5)


@pytest.mark.parametrize("scale", [1.5, -0.5])
def test_pissa_is_the_nearest_product(scale):
    """The residual has the other singular values, and A and B are of the same size."""
    params, adapters = model(scale=scale)
    base, started = starts.pissa(params, adapters)
    for path, adapter in started.items():
        full = np.linalg.svd(matrices(params[path], adapter.axes), compute_uv=False)
        left = np.linalg.svd(matrices(base[path], adapter.axes), compute_uv=False)
        np.testing.assert_allclose(left[:, :-RANK], full[:, RANK:], atol=1e-5)
        n = len(adapter.axes.stack)
        a = np.asarray(adapter.a).reshape(*adapter.a.shape[:n], -1, RANK)
        b = np.asarray(adapter.b).reshape(*adapter.b.shape[:n], RANK, -1)
        np.testing.assert_allclose(np.square(a).sum(-2), np.square(b).sum(-1), rtol=1e-5)


def test_randomised_pissa_is_near_the_exact_one():
    keys = jax.random.split(jax.random.key(0), 2)
    u, v = (jnp.linalg.qr(jax.random.normal(key, (3, 80, 60)))[0] for key in keys)
    w = jnp.matmul(u * 0.8 ** jnp.arange(60.0).reshape(1, 1, 60), v.mT, precision="highest")
    axes = lora.KernelAxes((0,), (1,), (2,))
    params, adapters = {"w": w}, {"w": fresh(w.shape, axes, rank=8)}
    exact, _ = starts.pissa(params, adapters)
    near, started = starts.pissa(params, adapters, iterations=4, key=jax.random.key(1))
    np.testing.assert_allclose(near["w"], exact["w"], atol=1e-5)
    again, _ = starts.pissa(params, adapters, iterations=4, key=jax.random.key(1))
    np.testing.assert_array_equal(near["w"], again["w"])
    np.testing.assert_allclose(lora.merge(near, started)["w"], w, atol=1e-5)


def test_olora_is_qr():
    params, adapters = model()
    _, started = starts.olora(params, adapters)
    found = started["plain"]
    q, r = np.linalg.qr(np.asarray(params["plain"], np.float64).T)
    np.testing.assert_allclose(found.a @ found.b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)
    np.testing.assert_allclose(found.b @ found.b.T, np.eye(RANK), atol=1e-5)


def test_orthogonal_factors_are_large_and_their_product_is_zero():
    _, adapters = model()
    started = starts.orthogonal(jax.random.key(0), adapters)
    for path, (shape, _) in WEIGHTS.items():
        assert min(np.abs(started[path].a).mean(), np.abs(started[path].b).mean()) > 0.01
        np.testing.assert_allclose(lora.merge({path: np.zeros(shape)}, {path: started[path]})[path], 0, atol=1e-7)
    alone = starts.orthogonal(jax.random.key(0), {"plain": adapters["plain"]})
    np.testing.assert_array_equal(alone["plain"].a, started["plain"].a)
    wide = starts.orthogonal(jax.random.key(0), {"w": fresh((400, 300), WEIGHTS["plain"][1], rank=8)})["w"]
    # X [400, 4] times orthonormal rows [4, 8] has variance 4 / 8 in an entry.
    assert abs(float(jnp.std(wide.a)) - 0.1 * 0.5**0.5) < 0.01
    assert abs(float(jnp.std(wide.b)) - 0.1 * 0.5**0.5) < 0.01


def test_eva_has_the_directions_of_the_data():
    _, adapters = model()
    started = starts.eva(adapters, rows(), rho=1)
    for path, (shape, axes) in WEIGHTS.items():
        _, d, _ = axes.fans(shape)
        x = np.asarray(rows()[path], np.float64).reshape(-1, 20, d)
        _, _, vt = np.linalg.svd(x, full_matrices=False)
        a = np.asarray(started[path].a).reshape(-1, d, RANK)
        np.testing.assert_allclose(a @ a.swapaxes(1, 2), vt[:, :RANK].swapaxes(1, 2) @ vt[:, :RANK], atol=1e-4)
        assert not started[path].b.any()


def test_eva_gives_ranks_to_what_explains_most():
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {name: fresh((8, 6), axes, rank=3) for name in ("flat", "steep", "none")}
    basis = np.eye(8, dtype=np.float32)
    inputs = {
        "flat": basis,  # each component explains 1/8
        "steep": basis * np.sqrt(2.0 ** -np.arange(8, dtype=np.float32))[:, None],  # about 1/2, 1/4, 1/8 and less
        "none": 0 * basis,
    }
    ranks = {path: a.a.shape[-1] for path, a in starts.eva(adapters, inputs).items()}
    assert ranks == {"flat": 5, "steep": 3, "none": 1}  # 1/4 and 1/8 (2^-3 / 2 (1 - 2^-8) is a little more) go first
    turned = dict(reversed(adapters.items()))
    again = starts.eva(turned, inputs)
    assert {path: a.a.shape[-1] for path, a in again.items()} == ranks
    assert list(again) == list(turned)
    capped = starts.eva(adapters, inputs, rho=1.4)
    assert {path: a.a.shape[-1] for path, a in capped.items()} == {"flat": 4, "steep": 4, "none": 1}
    same = starts.eva(adapters, inputs, rho=1)
    assert all(a.a.shape == (8, 3) and a.b.shape == (3, 6) and a.scale == 1.5 for a in same.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.sampled(5)
def test_the_budget_of_eva_is_exact(seed):
    draw = np.random.default_rng(seed)
    axes = lora.KernelAxes((), (0,), (1,))
    adapters, inputs = {}, {}
    for i in range(6):
        d, k = draw.choice([4, 7, 12], 2)  # few sizes, as each is compiled
        adapters[f"w{i}"] = fresh((d, k), axes, rank=int(draw.integers(1, min(d, k) + 1)))
        inputs[f"w{i}"] = draw.normal(size=(int(draw.choice([12, 30])), d)) * draw.uniform(0, 3, d)
    started = starts.eva(adapters, inputs, rho=float(draw.uniform(1, 3)))
    ranks = [a.a.shape[-1] for a in started.values()]
    assert sum(ranks) == sum(a.a.shape[-1] for a in adapters.values())
    assert all(1 <= a.a.shape[-1] <= min(a.kernel_shape()) for a in started.values())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.sampled(5)
def test_lora_ga_has_the_singular_vectors_of_the_gradient(direction, scale):
    """In torch's way of writing: G [out, in] = U S V^T, A of rows of V^T, B of columns of U S."""
    params, adapters = model()
    g, w = (np.asarray(tree["plain"], np.float64).T for tree in (gradients(), params))
    u, s, vt = np.linalg.svd(g)
    for_a, for_b = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}[direction]
    factor = {
        "stable": 10**0.25 / 8**0.5,
        "weight_svd": np.linalg.norm(w, 2) / s[for_b[0]],
        "gd_scale": 1 / 1.5**2,
        "unit": 1,
    }[scale]
    _, started = starts.lora_ga(params, adapters, gradients(), gamma=8.0, direction=direction, scale=scale)
    found = started["plain"]
    # Each of the two products a_i b_i has a sign of its own.
    for i in range(RANK):
        one = np.outer(found.a[:, i], found.b[i])
        other = factor * s[for_b[i]] * np.outer(vt[for_a[i]], u[:, for_b[i]])
        np.testing.assert_allclose(one * np.sign(np.sum(one * other)), other, atol=1e-4)


def test_a_gradient_of_zero_is_no_reason_to_divide_by_it():
    params, adapters = model()
    zero = jax.tree.map(jnp.zeros_like, gradients())
    base, started = starts.lora_ga(params, adapters, zero, scale="weight_svd")
    np.testing.assert_array_equal(base["experts"], params["experts"])
    assert not started["experts"].b.any()


def test_random_directions_are_those_of_the_key():
    params, adapters = model()

    def start(seed):
        _, found = starts.lora_ga(params, adapters, gradients(), direction="random", key=jax.random.key(seed))
        return np.asarray(found["plain"].a)

    np.testing.assert_array_equal(start(0), start(0))
    assert any(np.abs(start(0) - start(seed)).max() > 0.1 for seed in range(1, 5))


def test_gradients_may_be_a_tree_like_the_parameters():
    params, adapters = {"layer": {"w": jnp.eye(6, 5)}}, {"layer/w": fresh((6, 5), WEIGHTS["plain"][1])}
    grads = jax.grad(lambda p: (jnp.arange(6.0) @ p["layer"]["w"]).sum() ** 2)(params)
    one, _ = starts.lora_ga(params, adapters, grads)
    other, _ = starts.lora_ga(params, adapters, {"layer/w": grads["layer"]["w"]})
    np.testing.assert_array_equal(one["layer"]["w"], other["layer"]["w"])


@pytest.mark.parametrize(("mode", "which"), [("instruction", slice(0, RANK)), ("knowledge", slice(-RANK, None))])
@pytest.mark.sampled(5)
def test_corda_is_a_part_of_the_weight_that_the_data_chooses(mode, which):
    """In torch's way of writing: W C = U S V^T, A B = U S V^T C^-1."""
    params, adapters = model()
    found = starts.corda(params, adapters, covariances(), mode=mode)[1]["plain"]
    w, c = np.asarray(params["plain"], np.float64).T, np.asarray(covariances()["plain"], np.float64)
    damped = c + 0.01 * np.mean(np.diag(c)) * np.eye(len(c))
    u, s, vt = np.linalg.svd(w @ damped, full_matrices=False)
    expected = u[:, which] @ np.diag(s[which]) @ vt[which] @ np.linalg.inv(damped)
    np.testing.assert_allclose(1.5 * found.a @ found.b, expected.T, atol=1e-4)


def test_a_covariance_without_inverse_is_damped_more_where_it_must_be():
    """One matrix of the stack is singular when a hundredth of its mean is added, the other one is not."""
    d = 64
    axes = lora.KernelAxes((0,), (1,), (2,))
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))
    least = -0.005 / 1.005  # which is -0.01 times the mean, so that the first damping makes it zero
    hard = (q * np.where(np.arange(d) < d // 2, 1.0, least)) @ q.T
    c = jnp.asarray(np.stack([np.eye(d), hard]), jnp.float32)
    damped, inverse = damp("w", c)
    added = np.diagonal(damped - c, axis1=1, axis2=2).mean(-1) / np.trace(c, axis1=1, axis2=2) * d
    np.testing.assert_allclose(added[0], 0.01, rtol=1e-4)
    assert added[1] > 0.0199
    np.testing.assert_allclose(jnp.matmul(damped, inverse, precision="highest")[1], np.eye(d), atol=0.05)
    w = jax.random.normal(jax.random.key(0), (2, d, 8))
    base, started = starts.corda({"w": w}, {"w": fresh(w.shape, axes)}, {"w": c})
    np.testing.assert_allclose(lora.merge(base, started)["w"], w, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in STARTS if name not in BASE_STAYS])
@pytest.mark.sampled(5)
def test_a_trained_adapter_becomes_a_plain_one_of_the_original_base(name):
    params, adapters = model()
    base, start = STARTS[name](params, adapters)
    trained = jax.tree.map(lambda array: 0.9 * array + 0.1, start)
    plain = lora.combine([(trained, 1.0), (start, -1.0)])
    assert plain["plain"].a.shape == (12, 2 * RANK)
    expected, found = lora.merge(base, trained), lora.merge(params, plain)
    for path in params:
        np.testing.assert_allclose(found[path], expected[path], atol=5e-5)


def test_all_stays_where_it_was():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = (jax.sharding.NamedSharding(mesh, jax.P(*spec)) for spec in [("model", None), (None, "model")])
    w = jax.device_put(jax.random.normal(jax.random.key(0), (16, 8)), columns)
    adapter = fresh((16, 8), WEIGHTS["plain"][1])
    adapter = dataclasses.replace(adapter, a=jax.device_put(adapter.a, rows), b=jax.device_put(adapter.b, columns))
    base, started = starts.pissa({"w": w}, {"w": adapter})
    assert (base["w"].sharding, started["w"].a.sharding, started["w"].b.sharding) == (columns, rows, columns)
    np.testing.assert_allclose(lora.merge(base, started)["w"], w, atol=1e-5)


def test_parameters_and_adapters_in_numpy():
    params, adapters = jax.tree.map(np.asarray, model())
    base, started = starts.pissa(params, adapters)
    np.testing.assert_allclose(lora.merge(base, started)["experts"], params["experts"], atol=1e-5)


FORMATS = {"nf4": bases.Nf4(), "int8": bases.Int8(), "fp8": bases.Fp8()}


@pytest.mark.parametrize(
    ("name", "format"),
    [("pissa", "int8"), *((name, "nf4") for name in ("pissa", "olora", "eva", "corda", "lora_ga_ArB2r_stable"))],
)
@pytest.mark.sampled(6)
def test_what_a_start_leaves_of_a_packed_weight_is_packed_again(name, format):
    """As if it had been unpacked before and packed after."""
    params, adapters = model()
    packed = bases.quantize(params, dict.fromkeys(WEIGHTS, FORMATS[format]))
    dense, expected = STARTS[name](bases.dense(packed), adapters)
    base, started = STARTS[name](packed, adapters)
    for one, other in zip(jax.tree.leaves(started), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    if name in BASE_STAYS:
        assert all(base[path] is packed[path] for path in WEIGHTS)
    else:
        again = bases.quantize(dense, dict.fromkeys(WEIGHTS, FORMATS[format]))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, base, again))


LOFTQ = {
    "loftq_nf4": (bases.Nf4(), 2),
    "loftq_nf4_single": (bases.Nf4(double=False), 1),
    "loftq_int8": (bases.Int8(), 1),
    "loftq_fp8": (bases.Fp8(), 1),
}
ON_A_MESH = ("pissa", "olora", "orthogonal", "eva", "corda", "lora_ga_ArB2r_stable", *LOFTQ)
TWO = ("plain", "experts")  # of the weights: each shape is compiled anew


def on_a_mesh(over):
    """The model over eight devices: all weights whole, or each split along the first axis that can be."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "other"), (jax.sharding.AxisType.Auto,) * 2)

    def spec(shape):
        axis = next(i for i, n in enumerate(shape) if n % 2 == 0) if over else None
        return jax.P(*("fsdp" if i == axis else None for i in range(len(shape))))

    def there(path, leaf):
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec(leaf.shape) if path in WEIGHTS else jax.P()))

    params, adapters = two()
    places = {
        path: jax.tree.map(lambda s: jax.NamedSharding(mesh, s), adapter.specs(spec(WEIGHTS[path][0])))
        for path, adapter in adapters.items()
    }
    return {path: there(path, leaf) for path, leaf in params.items()}, jax.device_put(adapters, places)


def two():
    params, adapters = model()
    return {path: params[path] for path in (*TWO, "bias")}, {path: adapters[path] for path in TWO}


@pytest.mark.parametrize(
    ("name", "over", "packed"),
    [
        pytest.param(name, over, packed, marks=() if (name, over) == ("loftq_nf4", "fsdp") else pytest.mark.slow)
        for name in ON_A_MESH
        for over in ("fsdp", None)
        for packed in (False, True)
        if not (packed and name in LOFTQ)  # LoftQ is for what is not packed yet
    ],
)
@pytest.mark.sampled(5)
def test_a_start_leaves_every_array_on_the_mesh(name, over, packed):
    """Where it was, or where packing it there would put it; and with the numbers of one device."""
    format, iterations = LOFTQ.get(name, (FORMATS["nf4"], 0))
    rules = dict.fromkeys(TWO, format)

    def start(params, adapters):
        if name in LOFTQ:
            return starts.loftq(params, adapters, format, iterations=iterations)
        return STARTS[name](params, adapters)

    params, adapters = two()
    expected, _ = start(bases.quantize(params, rules) if packed else params, adapters)
    params, adapters = on_a_mesh(over)
    params = bases.quantize(params, rules) if packed else params
    base, started = start(params, adapters)
    like = bases.quantize(params, rules) if name in LOFTQ else params
    for found, before in ((base, like), (started, adapters)):
        assert jax.tree.structure(found) == jax.tree.structure(before) or name == "eva"
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
            assert len(one.sharding.device_set) == 8
    for path, leaf in jax.device_get(bases.dense(base)).items():
        np.testing.assert_allclose(leaf, bases.dense(expected)[path], atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_what_pissa_leaves_loses_less_than_packing_the_weight(format):
    """Where few singular values are large. A weight that is packed already keeps what it has lost."""
    u, v = (jnp.linalg.qr(jax.random.normal(key, (64, 64)))[0] for key in jax.random.split(jax.random.key(0)))
    w = jnp.matmul(u * 0.9 ** jnp.arange(64.0)[None], v.T, precision="highest")
    rules, adapters = {"w": FORMATS[format]}, {"w": fresh((64, 64), WEIGHTS["plain"][1], rank=8)}
    packed = bases.quantize({"w": w}, rules)

    def lost(base, adapters, w=w):
        return float(jnp.linalg.norm(bases.dense(lora.merge(base, adapters))["w"] - w))

    base, started = starts.pissa({"w": w}, adapters)
    plain = lost(packed, {})
    assert lost(bases.quantize(base, rules), started) < 0.5 * plain
    from_packed = starts.pissa(packed, adapters)
    assert lost(*from_packed, packed["w"].dense()) < 0.5 * plain
    assert plain < lost(*from_packed) < 1.2 * plain


PLAIN = WEIGHTS["plain"][1]
W = {"w": np.ones((6, 4), np.float32)}
GOOD = {"w": fresh((6, 4), PLAIN)}
NAN = {"w": np.full((6, 4), np.nan, np.float32)}

WRONG = {
    "no such path": (lambda: starts.pissa({"v": W["w"]}, GOOD), "adapter for 'w', but the parameters have no such"),
    "another shape": (lambda: starts.pissa({"w": np.ones((6, 5))}, GOOD), "'w' fits a weight of shape"),
    "no adapter": (lambda: starts.pissa(W, {"w": "x"}), "'w' is a str, and starts are of LoraAdapter: plan it with"),
    "no adapters": (
        lambda: starts.orthogonal(jax.random.key(0), [GOOD["w"]]),
        r"`adapters` is a list of 1, expected a dict \{path: adapter\}",
    ),
    "a rank above": (lambda: starts.pissa(W, {"w": fresh((6, 4), PLAIN, rank=5)}), r"'w': rank 5 is above min\(6, 4\)"),
    "of two pieces": (
        lambda: starts.eva({"w": dataclasses.replace(GOOD["w"], b=jnp.zeros((3, 4)))}, {}),
        "the adapter for 'w' is not of one piece: its rank has 2 entries in a, 3 in b. lora.init makes one that fits",
    ),
    "no scale": (lambda: starts.pissa(W, {"w": fresh((6, 4), PLAIN, scale=0.0)}), "'w' has the scale 0.0, expected a"),
    "started twice": (lambda: starts.pissa(*starts.pissa(W, GOOD)), "'w' has been started or trained already"),
    "integers": (
        lambda: starts.eva({"w": dataclasses.replace(GOOD["w"], b=jnp.zeros((2, 4), int))}, {}),
        "B of 'w' is of int32 numbers, expected an array of floats",
    ),
    "NaN in W": (lambda: starts.olora(NAN, GOOD), "the parameter 'w' holds a NaN or an infinity, expected finite"),
    "NaN in a packed W": (
        lambda: starts.olora(jax.tree.map(lambda a: a * jnp.nan, bases.quantize(W, {"w": bases.Fp8()})), GOOD),
        "the parameter 'w' holds a NaN",
    ),
    "packed in jit": (
        lambda: jax.jit(lambda w: starts.pissa(w, GOOD))(bases.quantize(W, {"w": bases.Int8()})),
        "the parameter 'w' is traced, and starts look at numbers",
    ),
    "too large": (
        lambda: starts.lora_ga(W, {"w": fresh((6, 4), PLAIN, dtype=jnp.float16)}, {"w": 1e6 * np.eye(6, 4)}),
        "the start of 'w' overflows float16",
    ),
    "in jit": (lambda: jax.jit(starts.pissa)(W, GOOD), "A of 'w' is traced, and starts look at numbers"),
    "no key": (lambda: starts.pissa(W, GOOD, iterations=2), r"draws random numbers: give it key=jax.random.key\(0\)"),
    "half an iteration": (lambda: starts.pissa(W, GOOD, iterations=0.5), "iterations=0.5.*expected a whole number"),
    "odd": (
        lambda: starts.orthogonal(jax.random.key(0), {"w": fresh((6, 4), PLAIN, rank=3)}),
        "'w' has rank 3, expected an even one, each factor has half of it: take rank",
    ),
    "rho below 1": (lambda: starts.eva(GOOD, W, rho=0.5), "rho=0.5.*expected a finite number of at least 1"),
    "no inputs": (lambda: starts.eva(GOOD, {"v": W["w"]}), "inputs has nothing for 'w', .* the nearest: 'v'"),
    "inputs of another size": (lambda: starts.eva(GOOD, W), r"inputs\['w'\] has shape \[6, 4\], expected \[n, 6\]"),
    "few inputs": (lambda: starts.eva(GOOD, {"w": np.ones((1, 6))}), r"inputs\['w'\] has 1 rows, expected at least 2"),
    "NaN in inputs": (lambda: starts.eva(GOOD, {"w": np.full((9, 6), np.inf)}), r"inputs\['w'\] holds a NaN"),
    "inputs of integers": (lambda: starts.eva(GOOD, {"w": np.ones((9, 6), int)}), r"inputs\['w'\] is of int64 numbers"),
    "no gradients": (lambda: starts.lora_ga(W, GOOD, {}), "gradients has nothing for 'w', .* the nearest: none at all"),
    "gradients turned round": (lambda: starts.lora_ga(W, GOOD, {"w": W["w"].T}), r"\[4, 6\], expected \[6, 4\]"),
    "NaN in gradients": (lambda: starts.lora_ga(W, GOOD, NAN), r"gradients\['w'\] holds a NaN"),
    "no gradient": (lambda: starts.lora_ga(W, GOOD, {"w": "x"}), r"gradients\['w'\] is a str, expected an array"),
    "twice the rank": (
        lambda: starts.lora_ga(W, {"w": fresh((6, 4), PLAIN, rank=3)}, W),
        r"'w' has rank 3, .* min\(6, 4\): take a rank of at most 2",
    ),
    "direction": (lambda: starts.lora_ga(W, GOOD, W, direction="BrA2r"), "direction='BrA2r'.*expected one of 'ArB2r'"),
    "scale": (lambda: starts.lora_ga(W, GOOD, W, scale="gd"), "scale='gd'.*: expected one of 'stable'"),
    "gamma": (lambda: starts.lora_ga(W, GOOD, W, gamma=0), "gamma=0.*expected a finite number above 0"),
    "random without key": (lambda: starts.lora_ga(W, GOOD, W, direction="random"), "draws random numbers: give it key"),
    "mode": (lambda: starts.corda(W, GOOD, W, mode="ipm"), "mode='ipm'.*: expected one of 'instruction', 'knowledge'"),
    "no covariance": (lambda: starts.corda(W, GOOD, {}), "covariances has nothing for 'w'"),
    "rows for a covariance": (lambda: starts.corda(W, GOOD, W), r"covariances\['w'\] .* \[6, 4\], expected \[6, 6\]"),
    "not symmetric": (lambda: starts.corda(W, GOOD, {"w": np.tri(6)}), r"covariances\['w'\] is not symmetric"),
    "no variance": (lambda: starts.corda(W, GOOD, {"w": np.zeros((6, 6))}), r"covariances\['w'\] has no variance"),
    "no inverse": (
        lambda: starts.corda(W, GOOD, {"w": np.diag([3.4e38, 0, 0, 0, 0, 0]).astype(np.float32)}),
        r"covariances\['w'\] has no inverse in float32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(wrong):
    call, message = WRONG[wrong]
    with pytest.raises(lora.LoraError, match=message):
        call()
