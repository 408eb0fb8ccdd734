"""Adapters of any kind as LoRA: beside decompositions of the whole changes, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS

import lora_jax as lora
from lora_jax.adapters.ia3 import Ia3InputsAdapter
from lora_jax.algebra.conversion import ConvertedWeight

AXES = lora.KernelAxes((), (0,), (1,))
STACKED = lora.KernelAxes((1,), (2,), (0, 3))  # [2, 3, 6, 4]: three matrices of 6 inputs and 8 outputs
EXACT = {"rslora", "lora_fa", "adalora", "loha", "lokr", "lokr_whole", "vera"}


def weight(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(adapter, seed=1):
    """With all that is trained moved, so that it changes something."""
    rng, mask = np.random.default_rng(seed), lora.trainable_mask(adapter)
    return jax.tree.map(lambda a, m: a + jnp.asarray(rng.normal(size=a.shape), a.dtype) / 3 if m else a, adapter, mask)


def of_kind(kind, shape=(6, 5), axes=AXES):
    w = weight(shape)
    rule = KINDS[kind].among([axes.fans(shape)[1:]])
    return {"w": w}, {"w": moved(rule.init(jax.random.key(0), w, axes))}


def change(params, adapters):
    """W' - W in fp64."""
    return np.asarray(lora.merge(params, adapters)["w"], np.float64) - np.asarray(params["w"], np.float64)


def matrices(whole, axes):
    order = [*axes.stack, *axes.inputs, *axes.outputs]
    return whole.transpose(order).reshape(axes.fans(whole.shape))


def test_each_kind_of_the_laws_is_here():
    assert EXACT | {"full", "dora", "ia3"} == {*KINDS}


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_what_is_a_lora_stays_what_it_is(kind):
    params, adapters = of_kind(kind)
    found, report = lora.to_lora(adapters)
    assert type(found["w"]) is lora.LoraAdapter
    np.testing.assert_allclose(change(params, found), change(params, adapters), atol=1e-6)
    assert report["w"].loss == 0.0
    assert (report["w"].shape, report["w"].rank, report["w"].intruders) == ((6, 5), found["w"].a.shape[-1], None)


@pytest.mark.parametrize("kind", [*sorted(EXACT), "dora", "ia3"])
@pytest.mark.parametrize(("shape", "axes"), [((6, 5), AXES), ((2, 3, 6, 4), STACKED)], ids=["matrix", "stacked"])
def test_the_nearest_of_a_rank(kind, shape, axes):
    """The oracle: the decomposition of each whole change."""
    params, adapters = of_kind(kind, shape, axes)
    found, report = lora.to_lora(adapters, rank=1, params=params)
    wanted = matrices(change(params, adapters), axes)
    u, s, vt = np.linalg.svd(wanted, full_matrices=False)
    nearest = u[..., :1] * s[..., None, :1] @ vt[..., :1, :]
    one = found["w"]
    assert (type(one), one.a.shape[-1], one.axes) == (lora.LoraAdapter, 1, axes)
    np.testing.assert_allclose(matrices(change(params, found), axes), nearest, atol=2e-5)
    lost = np.linalg.norm(wanted - nearest) / np.linalg.norm(wanted)
    np.testing.assert_allclose(report["w"].loss, lost, atol=1e-5)
    assert report.loss == report["w"].loss
    # A rank that holds all of it loses nothing but rounding.
    found, report = lora.to_lora(adapters, rank=8, params=params)
    np.testing.assert_allclose(matrices(change(params, found), axes), wanted, atol=2e-5)
    assert report["w"].loss < 1e-5


@pytest.mark.parametrize("kind", ["loha", "dora"])
def test_energy_is_a_share_of_the_squared_norm(kind):
    params, adapters = of_kind(kind, (8, 8))
    s = np.linalg.svd(change(params, adapters), compute_uv=False)
    shares = np.cumsum(np.square(s)) / np.square(s).sum()
    for energy in (0.6, 0.9, 0.99):
        found, report = lora.to_lora(adapters, energy=energy, params=params)
        assert found["w"].a.shape[-1] == report["w"].rank == int(np.argmax(shares >= energy)) + 1
        np.testing.assert_allclose(report["w"].loss ** 2, 1 - shares[report["w"].rank - 1], atol=1e-5)


def test_rows_and_inputs_with_their_weight():
    """The rows that were trained are a LoRA of as many; factors on inputs are near one."""
    w = weight((9, 4))
    rows = moved(lora.Rows((7, 2)).init(jax.random.key(0), w, AXES))
    inputs = Ia3InputsAdapter(jnp.linspace(0.5, 1.5, 9), AXES, (4,))
    for adapter, rank in ((rows, 2), (inputs, 4)):
        found, report = lora.to_lora({"w": adapter}, rank=6, params={"w": w})
        assert report["w"].rank == rank
        np.testing.assert_allclose(change({"w": w}, found), change({"w": w}, {"w": adapter}), atol=1e-5)
    assert lora.to_lora({"w": rows}, params={"w": w})[1]["w"].loss == 0.0
    for adapter in (rows, inputs):
        with pytest.raises(lora.LoraError, match=r"'w' is a .*Adapter, and no LoRA but with its weight"):
            lora.to_lora({"w": adapter}, rank=2)


def test_what_is_of_no_matrix_stays():
    whole = {"b": lora.FullAdapter(jnp.ones(3), lora.KernelAxes((), (), (0,)))}
    whole["g"] = lora.Ia3Adapter(jnp.ones(3), lora.KernelAxes((), (), (0,)), ())
    found, report = lora.to_lora(whole, rank=2)
    assert found == whole
    assert report["b"] == ConvertedWeight("b", "full", (3,), 1, None, 0.0, None)
    assert "full" in str(report)


def intruders(params, adapters, top, threshold):
    """The oracle: torch's left singular vectors are those over the outputs."""
    found = 0
    whole, added = np.asarray(params["w"], np.float64), change(params, adapters)
    for w, d in zip(matrices(whole, AXES), matrices(added, AXES), strict=True):
        before, after = (np.linalg.svd(x.T, full_matrices=False)[0] for x in (w, w + d))
        for i in range(min(top, after.shape[1])):
            found += max(abs(after[:, i] @ before[:, j]) for j in range(before.shape[1])) < threshold
    return found


def test_intruder_dimensions():
    w = weight((6, 9)) / 3
    far = np.random.default_rng(5).normal(size=9)
    b = np.stack([far, np.roll(far, 3)]) / 2
    adapters = {"w": lora.LoraAdapter(weight((6, 2), 3), jnp.asarray(b, jnp.float32), AXES, 3.0)}
    for top, threshold in ((10, 0.5), (1, 0.8), (10, 0.8)):
        _, report = lora.to_lora(adapters, params={"w": w}, top=top, threshold=threshold)
        assert report["w"].intruders == intruders({"w": w}, adapters, top, threshold) == report.intruders
    assert lora.to_lora(adapters, params={"w": w}, threshold=0.8)[1].intruders > 0
    small = {"w": dataclasses.replace(adapters["w"], ratio=1e-3)}
    assert lora.to_lora(small, params={"w": w})[1].intruders == 0
    assert lora.to_lora(adapters, params={"w": w}, top=0)[1]["w"].intruders is None


def test_packed_weights_are_unpacked():
    w = weight((64, 64))
    packed = lora.bases.quantize({"w": w}, {"w": lora.bases.Int8()})
    adapters = {"w": moved(lora.Dora(2).init(jax.random.key(0), w, AXES))}
    found, report = lora.to_lora(adapters, rank=64, params=packed, top=0)
    wanted = lora.to_lora(adapters, rank=64, params={"w": packed["w"].dense()}, top=0)[0]
    np.testing.assert_array_equal(found["w"].a, wanted["w"].a)
    assert report["w"].loss < 1e-4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"'w' is a DoraAdapter, and no LoRA but with its weight.*to_lora\(adapters, rank=16, params=params\)"),
        ({"params": True}, r"'w' is a DoraAdapter, and no LoRA: say of which rank the nearest one shall be"),
        ({"rank": 2, "energy": 0.5}, "give one of them"),
        ({"rank": 0}, "expected a whole number of at least 1"),
        ({"rank": 2, "params": {"v": jnp.ones((6, 5))}}, "'w' is no array of the parameters; the nearest are 'v'"),
        ({"rank": 2, "params": {"w": jnp.ones((5, 5))}}, r"'w' has shape \[5, 5\], its adapter is for \[6, 5\]"),
        ({"rank": 2, "top": -1}, r"top=-1\): expected a whole number"),
        ({"rank": 2, "threshold": 0}, r"threshold=0\): expected a cosine"),
    ],
)
def test_wrong_calls(options, says):
    params, adapters = of_kind("dora")
    options = options | ({"params": params} if options.get("params") is True else {})
    with pytest.raises(lora.LoraError, match=says):
        lora.to_lora(adapters, **options)


def test_numbers_are_needed():
    _, adapters = of_kind("rslora")
    with pytest.raises(lora.LoraError, match="looks at numbers"):
        jax.eval_shape(lambda a: lora.to_lora(a)[0], adapters)
    with pytest.raises(lora.LoraError, match="'w' holds infinity or NaN"):
        lora.to_lora({"w": dataclasses.replace(adapters["w"], a=adapters["w"].a * jnp.nan)})
    with pytest.raises(lora.LoraError, match="there are no adapters"):
        lora.to_lora({})
