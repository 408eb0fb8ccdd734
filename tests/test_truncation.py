"""Ranks made smaller, beside the decomposition of whole changes; and differences of checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_starts import WEIGHTS, matrices

import lora_jax as lora
from lora_jax.algebra.truncation import Limit, Truncation, limit, product_svd, rank_of, truncated

AXES = lora.KernelAxes((), (0,), (1,))


def adapter(shape, axes, rank, seed=0, scale=-1.5):
    """With singular values that fall, so that ranks differ in what they hold."""
    rng = np.random.default_rng(seed)
    stack, inputs, outputs = axes.sizes(shape)
    a, b = rng.normal(size=(*stack, *inputs, rank)) * 0.5 ** np.arange(rank), rng.normal(size=(*stack, rank, *outputs))
    return lora.LoraAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), axes, scale)


def dense(one):
    """[n, d, k] in fp64."""
    n, d, k = one.axes.fans(one.kernel_shape())
    a, b = (np.asarray(array, np.float64) for array in (one.a, one.b))
    return float(one.scale) * a.reshape(n, d, -1) @ b.reshape(n, -1, k)


def nearest(changes, rank):
    """The oracle: the singular value decomposition of each whole matrix."""
    u, s, vt = np.linalg.svd(changes, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def left(changes, rank):
    return np.square(nearest(changes, rank)).sum() / np.square(changes).sum()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_nearest_of_a_rank(name):
    """As near as the full decomposition comes, also where the rank is above a side; and what it says is left, is."""
    shape, axes = WEIGHTS[name]
    one, found = {name: adapter(shape, axes, rank=8)}, {}
    changes = dense(one[name])
    most = min(*changes.shape[1:], 8)
    for rank in (1, 3, 8):
        small = lora.compress(one, rank=rank, report=found.__setitem__)[name]
        assert (small.a.shape[-1], small.axes, float(small.scale)) == (min(rank, most), axes, 1.0)
        np.testing.assert_allclose(dense(small), nearest(changes, rank), atol=2e-6 * np.abs(changes).max())
        assert found[name].rank == min(rank, most)
        np.testing.assert_allclose(found[name].energy, left(changes, rank), rtol=1e-9)


@pytest.mark.parametrize("energy", [1e-3, 0.8, 0.95, 1.0])
def test_the_smallest_rank_that_holds_a_share(energy):
    """Of all stacked matrices together."""
    shape, axes = WEIGHTS["experts"]
    one = {"w": adapter(shape, axes, rank=6)}
    changes = dense(one["w"])
    rank = lora.compress(one, energy=energy)["w"].a.shape[-1]
    assert left(changes, rank) >= energy * (1 - 1e-9)
    assert rank == 1 or left(changes, rank - 1) < energy


def test_sums_become_small_again():
    """Of adapters that are multiples of one another the rank is that of one."""
    one = {"w": adapter((12, 10), AXES, rank=3)}
    total = lora.combine([(one, 0.75), (one, -0.25), (one, 2.0)])
    assert total["w"].a.shape[-1] == 9
    small = lora.compress(total, energy=1 - 1e-10)["w"]
    assert small.a.shape[-1] == 3
    np.testing.assert_allclose(dense(small), 2.5 * dense(one["w"]), atol=1e-5)


def test_under_jit():
    """The same product, in fp32; with nothing of a weight's size."""
    shape, axes = WEIGHTS["layers_of_experts"]
    one = {"w": adapter(shape, axes, rank=4)}
    compress = jax.jit(lambda adapters: lora.compress(adapters, rank=2))
    small = compress(one)["w"]
    np.testing.assert_allclose(dense(small), nearest(dense(one["w"]), 2), atol=1e-4)
    large = {"w": jax.eval_shape(lambda: adapter((300, 200), AXES, rank=4))}
    sizes = [v.aval.size for e in jax.make_jaxpr(compress)(large).jaxpr.eqns[0].params["jaxpr"].eqns for v in e.outvars]
    assert max(sizes) == 300 * 4
    with pytest.raises(lora.LoraError, match="looks at numbers, and those of 'w' are traced: give a rank"):
        jax.jit(lambda adapters: lora.compress(adapters, energy=0.5))(one)


def test_lengths_and_parts_stay():
    """Of DoRA the factors become smaller; what has none is left as it is, and so are dtypes."""
    w = jax.random.normal(jax.random.key(0), (12, 10))
    plain = adapter((12, 10), AXES, rank=4)
    dora = dataclasses.replace(lora.Dora(4).init(jax.random.key(1), w, AXES), b=plain.b, a=plain.a, ratio=plain.ratio)
    full = lora.FullAdapter(jnp.ones(3), lora.KernelAxes((), (), (0,)))
    thin = dataclasses.replace(plain, a=plain.a.astype(jnp.bfloat16), b=plain.b.astype(jnp.bfloat16))
    found = lora.compress({"dora": dora, "bias": full, "thin": thin}, rank=2)
    assert [*found] == ["dora", "bias", "thin"]
    assert found["bias"] is full
    assert isinstance(found["dora"], lora.DoraAdapter)
    np.testing.assert_array_equal(found["dora"].m, dora.m)
    np.testing.assert_allclose(dense(found["dora"]), nearest(dense(dora), 2), atol=1e-5)
    assert {found["thin"].a.dtype, found["thin"].b.dtype} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"compress\(rank=None, energy=None\): give one of them"),
        ({"rank": 2, "energy": 0.5}, "give one of them"),
        ({"rank": 0}, r"compress\(rank=0\): expected a whole number of at least 1"),
        ({"rank": True}, "expected a whole number"),
        ({"rank": 2.5}, "expected a whole number"),
        ({"energy": 0}, r"compress\(energy=0\): expected a share above 0 and at most 1"),
        ({"energy": 1.5}, "expected a share"),
        ({"energy": "x"}, "expected a share"),
        ({"rank": 5}, r"compress\(rank=5\): the largest rank is 4, so there is nothing to compress"),
    ],
)
def test_limits_that_are_none(options, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.compress({"w": adapter((6, 5), AXES, rank=4)}, **options)


def test_what_cannot_be_compressed():
    full = lora.FullAdapter(jnp.ones(3), lora.KernelAxes((), (), (0,)))
    with pytest.raises(lora.LoraError, match="there are no adapters with factors"):
        lora.compress({"bias": full}, rank=2)
    broken = adapter((6, 5), AXES, rank=2)
    with pytest.raises(lora.LoraError, match="'w' holds infinity or NaN"):
        lora.compress({"w": dataclasses.replace(broken, b=broken.b.at[0, 0].set(jnp.nan))}, rank=1)
    with pytest.raises(lora.LoraError, match="the adapter for 'w' is not of one piece"):
        lora.compress({"w": dataclasses.replace(broken, b=broken.b[:1])}, rank=1)
    with pytest.raises(lora.LoraError, match="expected a dict"):
        lora.compress(broken, rank=1)


def test_decompositions():
    """Of products and of matrices, exact and randomised; zeros have the rank 1, and lose nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 4)), rng.normal(size=(2, 4, 5))
    u, s, vt = product_svd(a, b)
    np.testing.assert_allclose((u * s[:, None]) @ vt, a @ b, atol=1e-12)
    np.testing.assert_allclose(s[:, :4], np.linalg.svd(a @ b)[1][:, :4], rtol=1e-10)
    large = [x @ y for x, y in zip(rng.normal(size=(2, 60, 3)), rng.normal(size=(2, 3, 50)), strict=True)]
    exact = truncated(large.__getitem__, 2, limit("f", 2, None))
    near = truncated(large.__getitem__, 2, limit("f", 2, None, 4, jax.random.key(0)))
    np.testing.assert_allclose(near[0] @ near[1], exact[0] @ exact[1], atol=1e-3)
    assert near[2].rank == exact[2].rank == 2
    np.testing.assert_allclose(near[2].energy, exact[2].energy, rtol=1e-5)
    a, b, found = truncated(lambda i: np.zeros((3, 2)), 1, Limit(None, 0.5))
    assert (a.shape, b.shape, found) == ((1, 3, 1), (1, 1, 2), Truncation(1, 1.0))
    assert rank_of(np.array([[1e300, 1e300]]), Limit(None, 1.0)) == 2
    for options, says in [((None, 0.5, 4), "finds a few singular values, not all"), ((2, None, 4), "draws random numb"),
                          ((2, None, -1), "expected a whole number such as 4")]:  # fmt: skip
        with pytest.raises(lora.LoraError, match=says):
            limit("f", *options)


# Differences ----------------------------------------------------------------------------------------------------------


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["bias"]) @ p["head"]


def checkpoints():
    keys = jax.random.split(jax.random.key(0), 4)
    base = {"w": jax.random.normal(keys[0], (6, 5)), "bias": jnp.ones(5), "head": jax.random.normal(keys[1], (5, 4))}
    change = {
        "w": adapter((6, 5), AXES, rank=2),
        "bias": lora.FullAdapter(jnp.arange(5.0), lora.KernelAxes((), (), (0,))),
    }
    return base, lora.merge(base, change)


def planned(base, **rules):
    return lora.plan(model, base, jnp.ones(6), rules=rules)


def test_a_difference_of_low_rank_is_found():
    """And merged into the base it is the other checkpoint. What did not change gets no adapter."""
    base, tuned = checkpoints()
    plan = planned(base, w=lora.Lora(2, alpha=-3), bias=lora.Full(), head=lora.Lora(1))
    for options in ({}, {"rank": 3}, {"energy": 1 - 1e-9}, {"iterations": 3, "key": jax.random.key(0)}):
        found = {}
        adapters = lora.difference(base, tuned, plan, report=found.__setitem__, **options)
        assert sorted(adapters) == ["bias", "w"]
        assert adapters["w"].a.shape[-1] == found["w"].rank == options.get("rank", 2)
        assert float(adapters["w"].scale) == -3 / found["w"].rank
        assert found["w"].energy > 1 - 1e-6
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), lora.merge(base, adapters), tuned)


def test_a_difference_of_stacked_weights():
    """Each along its own axes, to the nearest of the rank."""
    shape, axes = WEIGHTS["layers_of_experts"]
    assert (axes.stack, axes.inputs, axes.outputs) == ((0, 2), (3,), (1,))
    base = {"w": jax.random.normal(jax.random.key(0), shape)}
    tuned = {"w": base["w"] + 0.1 * jax.random.normal(jax.random.key(1), shape)}
    plan = lora.plan(lambda p, x: jnp.einsum("lgi,loei->leo", x, p["w"]), base, jnp.ones((2, 1, 7)),
                     rules={"w": lora.Lora(2, stack=2)})  # fmt: skip
    assert plan["w"].axes == axes
    found = lora.difference(base, tuned, plan)["w"]
    changes = matrices(tuned["w"], axes) - matrices(base["w"], axes)
    np.testing.assert_allclose(dense(found), nearest(changes, 2), atol=1e-6)


def test_a_difference_of_rows():
    base, _ = checkpoints()
    tuned = base | {"head": base["head"].at[:, 1].set(0.0)}
    plan = planned(base, head=lora.Rows([1], axis=1))
    np.testing.assert_array_equal(lora.merge(base, lora.difference(base, tuned, plan))["head"], tuned["head"])
    more = base | {"head": tuned["head"].at[:, 2].set(0.0)}
    with pytest.raises(lora.LoraError, match=r"'head' changed in other rows than Rows\(\[1\], axis=1\)"):
        lora.difference(base, more, plan)
    assert lora.difference(base, more, plan, rest=True)["head"].indices == (1,)


def test_differences_that_are_refused():
    base, tuned = checkpoints()
    plan = planned(base, w=lora.Lora(2))
    for wrong, says in [
        (tuned, "'bias' changed too, and has no place in the plan"),
        (base, "nothing has changed"),
        ({"w": tuned["w"]}, "'bias' is not in tuned, where the nearest are"),
        (tuned | {"more": jnp.ones(1)}, "'more' is not in base"),
        (tuned | {"bias": jnp.ones(4)}, r"'bias' has shape \[5\] in base, and \[4\] in tuned"),
        (base | {"w": base["w"].at[0, 0].set(jnp.inf)}, "'w' holds infinity or NaN in base or in tuned"),
        (base | {"w": "x"}, "'w' in tuned is str"),
        (base | {"head": base["head"] + 1}, "'head' changed too"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            lora.difference(base, wrong, plan)
    with pytest.raises(lora.LoraError, match="of the plan's weights none has changed"):
        lora.difference(base, base | {"head": base["head"] + 1}, plan, rest=True)
    assert [*lora.difference(base, tuned, plan, rest=True)] == ["w"]
    with pytest.raises(lora.LoraError, match="'w' is planned with Dora"):
        lora.difference(base, tuned, planned(base, w=lora.Dora(2)))
    with pytest.raises(lora.LoraError, match="the plan has 'w' of shape"):
        lora.difference({"v": tuned["w"]}, {"v": tuned["w"]}, plan)
    with pytest.raises(lora.LoraError, match=r"difference\(base, tuned, plan\): `plan` is"):
        lora.difference(base, tuned, {"w": lora.Lora(2)})
