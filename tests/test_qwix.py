"""Weights that qwix has packed, without that library: nodes of the same names, and values one number at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, assert_trees_close, total, trained

import lora_jax as lora
from lora_jax import bases
from lora_jax.checkpoints.fingerprint import differences, fingerprint
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names

CODE = bases.nf4.CODE


def of_qwix(cls):
    cls.__module__ = "qwix._src.core"
    return cls


@of_qwix
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qvalue", "scale", "zero_point"], meta_fields=["qtype"]
)
@dataclasses.dataclass(frozen=True)
class QArray:
    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = None


@of_qwix
@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["how"])
@dataclasses.dataclass(frozen=True)
class WithAux:
    array: Any
    how: str = "somehow"


KINDS = {  # name: (qtype, dtype of qvalue, zero points)
    "int8": (jnp.int8, jnp.int8, False),
    "int8_asymmetric": (jnp.int8, jnp.int8, True),
    "int4": (jnp.int4, jnp.int4, False),
    "int3": ("int3", jnp.int4, False),
    "nf4": ("nf4", jnp.uint4, False),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn, False),
}


def qarray(shape, tiles, kind="int8", dtype=jnp.float32, seed=0):
    qtype, kept, asymmetric = KINDS[kind]
    draw = np.random.default_rng(seed)
    low, high = {"nf4": (0, 16), "int4": (-8, 8), "int3": (-4, 4)}.get(kind, (-100, 100))
    q = jnp.asarray(draw.integers(low, high, shape), jnp.int32).astype(kept)
    scale = jnp.asarray(draw.uniform(0.01, 0.02, tiles), dtype)
    zero = jnp.asarray(draw.integers(-8, 8, tiles), jnp.int8) if asymmetric else None
    return QArray(q, scale, zero, qtype)


def by_hand(array):
    """Each number by itself, in fp64."""
    q = np.asarray(array.qvalue.astype(jnp.float32), np.float64)
    scale = np.asarray(array.scale, np.float64)
    zero = np.zeros(scale.shape) if array.zero_point is None else np.asarray(array.zero_point, np.float64)
    found = np.zeros(q.shape)
    for index in np.ndindex(*q.shape):
        tile = tuple(i * m // n for i, n, m in zip(index, q.shape, scale.shape, strict=True))
        value = CODE[int(q[index])] if array.qtype == "nf4" else q[index]
        found[index] = (value - zero[tile]) * scale[tile]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "tiles", "stack"),
    [
        ((8, 6), (1, 6), ()),
        ((8, 6), (4, 3), ()),
        ((8, 6), (8, 1), ()),  # scales for each input: a matrix all the same
        ((3, 8, 6), (3, 2, 6), (3,)),
        ((3, 8, 6), (1, 1, 6), ()),
        ((2, 3, 4, 6), (2, 3, 1, 1), (2, 3)),
        ((8,), (2,), ()),
    ],
    ids=str,
)
def test_values_are_those_of_the_library(kind, shape, tiles, stack):
    array = qarray(shape, tiles, kind)
    for node in (array, WithAux(array)):
        names, [weight], _ = flatten_with_names({"layer": {"w": node}})
        assert names == ["layer/w"]
        assert (weight.shape, weight.stack, weight.dtype) == (shape, stack, jnp.float32)
        np.testing.assert_allclose(weight.dense(), by_hand(array), rtol=1e-6)
    narrow = flatten_with_names(qarray(shape, tiles, kind, jnp.bfloat16))[1][0].dense()
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), by_hand(array), rtol=0.02)


def packed_case(name, kind="int8", box=lambda array: array):
    """A program whose weights have a scale for each output, or each matrix of a stack and output."""
    case = next(c for c in MODELS if c.name == name)
    base = dict(case.params())
    for i, (path, shape) in enumerate(case.shapes.items()):
        if len(shape) > 1:
            base[path] = box(qarray(shape, (*shape[:-2], 1, shape[-1]), kind, seed=i))
    return case, base


@pytest.mark.parametrize(
    ("name", "kind"),
    [("attention_kernels", "nf4"), ("scan_over_remat", "int8_asymmetric"), ("embedding", "int8"), ("experts", "nf4")],
)
def test_a_base_of_qwix_is_the_base_that_it_stands_for(name, kind):
    """Plans, outputs, gradients, merged weights; adapted and not."""
    case, base = packed_case(name, kind, WithAux)
    x, rules = case.input(), {case.pattern: lora.Lora(rank=2)}
    dense = {path: unpacked(leaf) for path, leaf in read(base).items()}
    plan = lora.plan(case.fn, base, x, rules=rules)
    assert str(plan) == str(lora.plan(case.fn, dense, x, rules=rules))
    adapters = trained(lora.init(jax.random.key(0), base, plan), 1)
    apply = lora.lora_apply(case.fn)

    @jax.jit
    def both(base, adapters):
        return jax.value_and_grad(lambda adapters: total(apply(base, adapters, x)))(adapters)

    assert_trees_close(both(base, adapters), both(dense, adapters), rtol=1e-4, atol=1e-4)
    assert_trees_close(jax.jit(apply)(base, {}, x), jax.jit(case.fn)(dense, x), rtol=1e-4, atol=1e-4)
    one = {path: adapters[path] for path in list(adapters)[:1]}
    merged = lora.merge(base, one)
    assert_trees_close(merged[next(iter(one))], lora.merge(dense, one)[next(iter(one))], rtol=1e-6, atol=1e-6)
    rest = [path for path, leaf in base.items() if isinstance(leaf, WithAux) and path not in one]
    assert all(isinstance(merged[path], WithAux) and merged[path].how == "somehow" for path in rest)
    assert all(merged[path].array.qvalue is base[path].array.qvalue for path in rest)


def read(base):
    names, leaves, _ = flatten_with_names(base)
    return dict(zip(names, leaves, strict=True))


def test_other_boxes_of_the_library_are_trees():
    assert flatten_with_names({"scale": WithAux(jnp.ones(3))})[0] == ["scale/array"]


def test_such_a_base_is_unpacked_and_told_from_others():
    base = {"w": qarray((64, 8), (1, 8)), "b": jnp.ones(8)}
    np.testing.assert_allclose(bases.dense(base)["w"], by_hand(base["w"]), rtol=1e-6)
    assert fingerprint(base) == fingerprint(jax.tree.map(jnp.copy, base))
    assert differences(fingerprint(base), fingerprint(base | {"w": qarray((64, 8), (1, 8), seed=1)}))


def test_a_scan_slices_what_is_packed():
    """No array of W's size among the residuals, for any one layer."""
    layers, d = 4, 32
    base = {"w": qarray((layers, d, d), (layers, 4, d), "nf4")}

    def model(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.ones((3, d))
    adapters = lora.init(jax.random.key(0), base, lora.plan(model, base, x, rules={"w": lora.Lora(rank=2)}))
    _, vjp = jax.vjp(lambda adapters: lora.lora_apply(model)(base, adapters, x), adapters)
    floats = [leaf for leaf in jax.tree.leaves(vjp) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats
    assert not [leaf.shape for leaf in floats if leaf.size >= d * d]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_such_nodes_again(kind):
    """Each number is the nearest of those that a tile has, and the largest is none the smaller."""
    shape, tiles = (16, 6), (4, 6)
    base = {"w": WithAux(qarray(shape, tiles, kind)), "other": qarray((8, 6), (1, 6))}
    plan = lora.plan(lambda p, x: x @ p["w"], base, jnp.ones((1, 16)), rules={"w": lora.Lora(rank=2)})
    adapters = trained(lora.init(jax.random.key(0), base, plan), 1)
    exact = np.asarray(lora.merge(base, adapters)["w"], np.float64)
    merged, losses = bases.merge(base, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert merged["w"].array.qvalue.dtype == base["w"].array.qvalue.dtype
    assert merged["other"].qvalue is base["other"].qvalue
    found, change = by_hand(merged["w"].array), exact - by_hand(base["w"].array)
    largest = np.abs(exact.reshape(4, 4, 6)).max(1, keepdims=True)
    steps = {"int8": 1 / 127, "int8_asymmetric": 1 / 127, "int4": 1 / 7, "int3": 1 / 3, "nf4": 0.31, "fp8": 1 / 15}
    assert (np.abs(found - exact).reshape(4, 4, 6) <= largest * steps[kind] / 2 * 1.2).all()
    assert losses["w"] == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(change), rel=1e-3)


def test_a_start_gives_such_nodes_again():
    base = {"w": qarray((16, 6), (1, 6))}
    plan = lora.plan(lambda p, x: x @ p["w"], base, jnp.ones((1, 16)), rules={"w": lora.Lora(rank=2)})
    started, adapters = lora.starts.pissa(base, lora.init(jax.random.key(0), base, plan))
    assert isinstance(started["w"], QArray)
    w = by_hand(base["w"])
    np.testing.assert_allclose(lora.merge(started, adapters)["w"], w, atol=np.abs(w).max() / 127)


def test_a_place_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, [weight], _ = flatten_with_names(qarray((8, 16), (2, 16)))
    placed = weight.placed(jax.sharding.NamedSharding(mesh, jax.P("model", "data")))
    assert placed.q.sharding.spec == jax.P("model", "data")
    assert placed.scales.sharding.spec == jax.P(None, "data")  # two tiles are not for four devices
    assert placed.sharding.spec == jax.P("model", "data")
    np.testing.assert_allclose(jax.jit(lambda w: w.dense())(placed), weight.dense())


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (
            QArray(jnp.ones((8, 6), jnp.int8), jnp.ones((3, 6)), None, jnp.int8),
            r"'w' is a QArray of codes \[8, 6\] with scales \[3, 6\], .* equal tiles",
        ),
        (QArray(jnp.ones((8, 6), jnp.int8), jnp.ones(6), None, jnp.int8), r"scales \[6\], expected as many axes"),
        (
            QArray({"value": jnp.ones((8, 6))}, jnp.ones((1, 6))),
            "of a dict and a .*, expected arrays: unbox the parameters",
        ),
        (WithAux(QArray(jnp.ones(6), {"value": 1})), "is a QArray of a .* and a dict"),
    ],
)
def test_nodes_in_pieces(node, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.plan(lambda p, x: x @ p["w"], {"w": node}, jnp.ones((1, 8)), rules={"w": lora.Lora(rank=2)})


@pytest.mark.parametrize(("kind", "kept"), [("mxfp8", jnp.float8_e4m3fn), ("nvfp4", jnp.float4_e2m1fn)])
def test_formats_with_scales_of_few_bits(kind, kept):
    """Powers of 2, no smaller than what the largest number takes; or floats of 8 bits, zeros and small tiles too."""
    w = jax.random.normal(jax.random.key(0), (64, 6)).at[:16].multiply(1e-4).at[16:32].set(0.0)
    node = QArray(jnp.zeros((64, 6), kept), jnp.ones((4, 6)), None, kind)
    _, [weight], _ = flatten_with_names({"w": node})
    again = weight.repack_like(w)
    largest = np.abs(w).reshape(4, 16, 6).max(1) / float(jnp.finfo(kept).max)
    if kind == "mxfp8":
        np.testing.assert_array_equal(again.scales, 2.0 ** np.ceil(np.log2(np.where(largest, largest, 1))))
    else:
        np.testing.assert_array_equal(again.scales, again.scales.astype(jnp.float8_e4m3fn).astype(jnp.float32))
        np.testing.assert_allclose(again.scales[2:], largest[2:], rtol=1 / 16)
    gap = np.abs(again.dense() - w).reshape(4, 16, 6).max(1)
    assert (gap <= np.maximum(largest, np.asarray(again.scales)) * (16 if kind == "mxfp8" else 1)).all()
