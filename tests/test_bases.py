"""Packed frozen weights: exact bytes and values, and programs that use them as if they were arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, assert_trees_close, eight_devices, total, trained
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import bases
from lora_jax.bases.nf4_layouts import to_bytes
from lora_jax.checkpoints.fingerprint import differences, fingerprint

FIXTURE = load_file(Path(__file__).parent / "data" / "nf4.safetensors")
FORMATS = {"nf4": bases.Nf4(), "nf4_single": bases.Nf4(double=False), "int8": bases.Int8(), "fp8": bases.Fp8()}
CASES = [case for case in MODELS if case.dtype == jnp.float32 and case.name != "cast"]


def packed(w, format=FORMATS["nf4"]):
    return bases.quantize({"w": jnp.asarray(w)}, {"w": format})["w"]


@pytest.mark.parametrize(("name", "double"), [("cs0", False), ("cs1", True)])
def test_bytes_and_values_are_those_of_bitsandbytes(name, double):
    """The fixture is torch's weight [96, 200]: here a kernel [200, 96], whose inputs hold no whole blocks."""
    kernel = FIXTURE["W"].T
    weight = packed(kernel, bases.Nf4(double=double))
    np.testing.assert_array_equal(to_bytes(weight.codes).reshape(-1), FIXTURE[f"{name}.packed"][:, 0])
    np.testing.assert_array_equal(weight.scales.reshape(-1), FIXTURE[f"{name}.absmax"])
    np.testing.assert_array_equal(weight.dense(), FIXTURE[f"{name}.deq"].T)
    if double:
        np.testing.assert_array_equal(weight.outer, FIXTURE["cs1.state2.absmax"])
        np.testing.assert_array_equal(weight.mean, FIXTURE["cs1.offset"][0])
        np.testing.assert_array_equal(bases.nf4.scale_code(), FIXTURE["cs1.state2.code"])
    narrow = packed(jnp.asarray(kernel).astype(jnp.bfloat16))
    np.testing.assert_array_equal(to_bytes(narrow.codes).reshape(-1), FIXTURE["bf16.packed"][:, 0])
    np.testing.assert_array_equal(narrow.dense().astype(jnp.float32), FIXTURE["bf16.deq"].T)


@pytest.mark.parametrize(("name", "double"), [("cs0", False), ("cs1", True)])
def test_a_block_lies_along_the_inputs(name, double):
    """The same numbers as torch's weight [300, 64], each row of which is a block."""
    weight = packed(FIXTURE["W"].reshape(300, 64).T, bases.Nf4(double=double))
    assert (weight.codes.shape, weight.codes.dtype, weight.scales.shape) == ((64, 300), jnp.uint4, (1, 300))
    pairs = FIXTURE[f"{name}.packed"].reshape(300, 32)
    np.testing.assert_array_equal(weight.codes, np.stack([pairs >> 4, pairs & 15], -1).reshape(300, 64).T)
    np.testing.assert_array_equal(weight.scales[0], FIXTURE[f"{name}.absmax"])
    np.testing.assert_array_equal(weight.dense(), FIXTURE[f"{name}.deq"].reshape(300, 64).T)


def torchs(w):
    """A matrix as torch has it: the first axes that hold whole blocks, or the first axis, at the end."""
    inputs = next((n for n in range(1, w.ndim) if np.prod(w.shape[:n]) % 64 == 0), 1)
    return np.moveaxis(w, range(inputs), range(-inputs, 0))


def nf4_by_hand(w):
    """Of one matrix, block by block and number by number, with scales of fp32."""
    found = np.empty(w.size, np.float32)
    for i in range(0, w.size, 64):
        block = torchs(w).reshape(-1)[i : i + 64]
        scale = np.abs(block).max() or 1
        found[i : i + 64] = [bases.nf4.CODE[np.abs(bases.nf4.CODE - x / scale).argmin()] * scale for x in block]
    inverse = torchs(np.arange(w.size).reshape(w.shape)).reshape(-1).argsort()
    return found[inverse].reshape(w.shape)


def nf4_double_by_hand(w):
    """The scales of one matrix in 8 bits: one after the other of torch's weight, in blocks of 256."""
    flat = torchs(w).reshape(-1)
    flat = np.concatenate([flat, np.zeros(-flat.size % 64, np.float32)])
    exact = np.abs(flat.reshape(-1, 64)).max(-1)
    mean, code = np.float32(exact.astype(np.float64).mean()), bases.nf4.scale_code()
    scales = np.empty_like(exact)
    for i in range(0, len(exact), 256):
        block = exact[i : i + 256] - mean
        outer = np.abs(block).max()
        nearest = [code[np.abs(code - x / outer).argmin()] for x in block]
        scales[i : i + 256] = np.array(nearest, np.float32) * outer + mean
    return scales


@pytest.mark.parametrize(
    ("shape", "stack"), [((128, 300), 0), ((64, 3, 5), 0), ((2, 32, 70), 0), ((2, 3, 64, 5), 2), ((2, 13, 9), 1)]
)
def test_scales_are_in_the_order_of_torchs_weight(shape, stack):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight = packed(w, bases.Nf4(stack=stack))
    found = np.asarray(weight.fp32_scales()).mT.reshape(*shape[:stack], -1)
    for index in np.ndindex(*shape[:stack]):
        np.testing.assert_allclose(found[index], nf4_double_by_hand(w[index]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (64, 1), (7, 64), (128, 3), (2, 3, 50), (2, 2, 8, 9)])
def test_any_size_is_packed_exactly(shape):
    """Sizes that no block divides, and stacks: each matrix by itself; blocks of zeros."""
    w = jax.random.normal(jax.random.key(0), shape).at[..., :1].set(0.0)
    flat = np.asarray(w).reshape(-1, *shape[-2:])
    single = packed(w, bases.Nf4(double=False))
    expected = np.stack([nf4_by_hand(one) for one in flat]).reshape(shape)
    np.testing.assert_allclose(single.dense(), expected, rtol=1e-6, atol=1e-7)
    assert single.stack == shape[:-2]
    for i, one in enumerate(flat):
        index = np.unravel_index(i, shape[:-2]) if len(shape) > 2 else ()
        alone, of_stack = packed(one), jax.tree.map(lambda leaf, index=index: leaf[index], packed(w))
        np.testing.assert_array_equal(of_stack.dense(), alone.dense())
    q = packed(w, bases.Int8())
    step = np.abs(flat).max(-2, keepdims=True) / 127
    assert (np.abs(q.dense().reshape(flat.shape) - flat) <= step / 2 * 1.001).all()
    eight = packed(w, bases.Fp8()).dense().reshape(flat.shape)
    largest = np.abs(flat).max(-2, keepdims=True)
    assert (np.abs(eight - flat) <= np.maximum(np.abs(flat) / 16, largest / 448 / 512) * 1.001).all()


def test_eight_bits_have_a_scale_for_each_output():
    w = jax.random.normal(jax.random.key(0), (3, 6, 4, 5))
    coarse, fine = (packed(w, bases.Int8(stack=1, inputs=n)) for n in (2, 1))
    assert (coarse.scales.shape, fine.scales.shape) == ((3, 5), (3, 4, 5))
    np.testing.assert_allclose(fine.scales, np.abs(w).max(1) / 127, rtol=1e-6)
    assert (jnp.abs(fine.dense() - w) <= (np.abs(w).max(1, keepdims=True) / 254 * 1.001)).all()
    for inputs in (0, 3):
        with pytest.raises(lora.LoraError, match="axes of inputs beside one of outputs"):
            packed(w, bases.Int8(stack=1, inputs=inputs))


def test_bytes_a_number():
    w = jnp.ones((3, 512, 512))
    assert packed(w).nbytes / w.size == pytest.approx(0.516, abs=2e-4)
    assert packed(w, bases.Nf4(double=False)).nbytes / w.size == 0.5625
    assert packed(w, bases.Int8()).nbytes / w.size == 1 + 4 / 512


FAST = ("two_layers", "attention_kernels", "scan_over_remat", "experts", "embedding", "convolution", "ragged")


@pytest.mark.parametrize(
    ("case", "format"),
    [
        pytest.param(case, format, id=f"{case.name}-{format}", marks=() if case.name in FAST else pytest.mark.slow)
        for i, case in enumerate(CASES)
        for format in FORMATS
        if case.name in FAST or (format == "nf4" and i % 2)
    ],
)
@pytest.mark.sampled(5)
def test_a_packed_base_is_the_base_that_it_stands_for(case, format):
    """In every program: plans, outputs, gradients and merged weights."""
    params, x = case.params(), case.input()
    matrices = "|".join(name for name, shape in case.shapes.items() if len(shape) > 1)
    base = bases.quantize(params, {matrices: FORMATS[format]})
    plan = lora.plan(case.fn, base, x, rules={case.pattern: lora.Lora(rank=2)}, materialize=True)
    assert str(plan) == str(lora.plan(case.fn, params, x, rules={case.pattern: lora.Lora(rank=2)}, materialize=True))
    adapters = trained(lora.init(jax.random.key(0), base, plan), 1)
    apply = lora.lora_apply(case.fn, materialize=True)

    @jax.jit
    def both(base, adapters, x):
        run = jax.value_and_grad if case.name != "while_loop" else lambda fn: fn
        return run(lambda adapters: total(apply(base, adapters, x)))(adapters)

    dense = bases.dense(base)
    assert_trees_close(both(base, adapters, x), both(dense, adapters, x), rtol=1e-4, atol=1e-4)
    assert_trees_close(jax.jit(apply)(base, {}, x), jax.jit(case.fn)(dense, x), rtol=1e-4, atol=1e-4)
    merged = bases.dense(lora.merge(base, adapters))
    assert_trees_close(merged, lora.merge(dense, adapters), rtol=1e-6, atol=1e-6)


KINDS = {
    "dora": lora.Dora(rank=2),
    "loha": lora.Loha(rank=2),
    "lokr": lora.Lokr(rank=2),
    "vera": lora.Vera(rank=2),
    "ia3": lora.Ia3(),
    "full": lora.Full(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two_layers", "scan_over_remat"])
@pytest.mark.sampled(5)
def test_every_kind_of_adapter_stands_beside_a_packed_base(kind, name):
    case = next(c for c in MODELS if c.name == name)
    base, x = bases.quantize(case.params(), {case.pattern: bases.Nf4()}), case.input()
    plan = lora.plan(case.fn, base, x, rules={case.pattern: KINDS[kind]})
    adapters = lora.init(jax.random.key(0), base, plan)
    apply = jax.jit(jax.value_and_grad(lambda a, p: total(lora.lora_apply(case.fn)(p, a, x))))
    dense = bases.dense(base)
    assert_trees_close(apply(adapters, base)[0], total(case.fn(dense, x)), rtol=1e-5, atol=1e-5)
    adapters = trained(adapters, 1)
    assert_trees_close(apply(adapters, base), apply(adapters, dense), rtol=1e-4, atol=1e-4)


def test_a_step_over_a_mesh_with_dropout_moves_adapters_only():
    case = next(c for c in MODELS if c.name == "scan_over_remat")
    base = bases.quantize(case.params(), {case.pattern: bases.Nf4()})
    x = jax.random.normal(jax.random.key(5), (8, *case.x[1:]))
    adapters = trained(
        lora.init(jax.random.key(0), base, lora.plan(case.fn, base, x, rules={case.pattern: lora.Lora(2)})), 1
    )

    def loss(adapters, params, x):
        adapters = lora.with_dropout(adapters, jax.random.key(1), 0.5)
        return jnp.mean(jnp.square(lora.lora_apply(case.fn)(params, adapters, x)))

    batch = jax.NamedSharding(eight_devices(), jax.P("data"))
    here = jax.jit(lora.value_and_grad(loss))(adapters, base, x)
    there = jax.jit(lora.value_and_grad(loss, batch_sharding=batch))(adapters, base, jax.device_put(x, batch))
    assert_trees_close(there, here, rtol=1e-5, atol=1e-6)
    step = lora.jit_step(loss, lora.freeze_base(optax.adam(1e-2)))
    state = lora.TrainState.create(adapters, lora.freeze_base(optax.adam(1e-2)))
    first = None
    for _ in range(20):
        state, metrics = step(state, base, x)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first


def stack(layers=6, d=64):
    def model(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (layers, d, 2 * d)) / 8,
        "down": jax.random.normal(keys[1], (layers, 2 * d, d)) / 12,
    }
    base, x = bases.quantize(params, {".*": bases.Nf4()}), jax.random.normal(keys[2], (5, d))
    plan = lora.plan(model, base, x, rules={".*": lora.Lora(rank=3)})
    return model, base, lora.init(jax.random.key(1), base, plan), x


def test_what_is_kept_for_the_derivative_is_packed():
    """No array of W's size among the residuals of a scanned stack, for any one layer."""
    model, base, adapters, x = stack()
    apply = lora.lora_apply(model)

    def kept(params):
        _, vjp = jax.vjp(lambda adapters: apply(params, adapters, x), adapters)
        return [leaf for leaf in jax.tree.leaves(vjp) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    assert not [leaf.shape for leaf in kept(base) if leaf.size >= 64 * 128]
    assert [leaf.shape for leaf in kept(bases.dense(base)) if leaf.size >= 64 * 128], "as a dense base is"


def test_temporary_memory_is_that_of_one_layer():
    """Beside unpacking under autodiff, which keeps every layer's weights."""
    model, base, adapters, x = stack(layers=8, d=256)
    apply = lora.lora_apply(model)

    def naive(params, adapters, x):
        def layer(x, of):
            w, a = of

            def dense(name, x):
                return x @ w[name].dense() + (x @ a[name][0]) @ a[name][1]

            return x + dense("down", jnp.tanh(dense("up", x))), None

        factors = {name: (adapter.a, adapter.b) for name, adapter in adapters.items()}
        return jax.lax.scan(layer, x, (params, factors))[0]

    def compiled(fn):
        return jax.jit(jax.grad(lambda a, p, x: fn(p, a, x).sum())).lower(adapters, base, x).compile()

    ours, theirs = compiled(apply), compiled(naive)
    assert_trees_close(ours(adapters, base, x), theirs(adapters, base, x), rtol=1e-4, atol=1e-4)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (ours, theirs)]
    assert sizes[0] <= 0.55 * sizes[1]


def test_a_packed_base_has_a_fingerprint():
    case = next(c for c in MODELS if c.name == "two_layers")
    one = bases.quantize(case.params(), {"w1": bases.Nf4(), "w2": bases.Int8()})
    other = bases.quantize({**case.params(), "w1": case.params()["w1"] + 1}, {"w1": bases.Nf4(), "w2": bases.Int8()})
    assert fingerprint(one) == fingerprint(jax.tree.map(jnp.copy, one))
    assert differences(fingerprint(one), fingerprint(other))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({}, "rules are a dict"),
        ({"w": lora.Lora(rank=2)}, "expected a format"),
        ({"(": bases.Nf4()}, "not a regular expression"),
        ({"v": bases.Nf4()}, "nearest paths are"),
        ({"bias": bases.Nf4()}, "at least two axes"),
        ({"ids": bases.Int8()}, "array of floats"),
        ({"nan": bases.Nf4()}, "NaN or infinity"),
        ({"w": bases.Nf4(stack=2)}, "no 2 stack axes"),
        ({"empty": bases.Nf4()}, "is empty"),
    ],
)
def test_what_cannot_be_packed(rules, says):
    params = {
        "w": jnp.ones((4, 4)),
        "bias": jnp.ones(4),
        "ids": jnp.ones((4, 4), jnp.int32),
        "nan": jnp.full((4, 4), jnp.nan),
        "empty": jnp.ones((4, 0)),
    }
    with pytest.raises(lora.LoraError, match=says):
        bases.quantize(params, rules)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_packing_in_jit_and_from_shapes_alone(format):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 64, 8))}

    def pack(params):
        return bases.quantize(params, {"w": format})

    packed = pack(params)
    assert_trees_close(jax.jit(pack)(params), packed, rtol=1e-6, atol=1e-6)
    assert jax.tree.map(jax.typeof, packed) == jax.tree.map(
        lambda s: jax.core.ShapedArray(s.shape, s.dtype), jax.eval_shape(pack, params)
    )


def test_scales_of_a_traced_weight_are_packed_to_the_same_bits():
    w = jax.random.normal(jax.random.key(0), (2, 3, 192, 40))

    def pack(w):
        return bases.quantize({"w": w}, {"w": bases.Nf4()})["w"]

    expected = pack(w)
    for found in (jax.jit(pack)(w), jax.vmap(pack)(w)):
        for name, array in expected.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], array)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("mode", "fill"), [("fill", None), ("fill", 0.0), ("fill", 2.0), ("clip", None)])
@pytest.mark.sampled(5)
def test_matrices_of_a_stack_by_their_numbers(format, mode, fill):
    """Those that there are not are what the program makes of them: NaN, a number, or the last one."""
    w, x = jax.random.normal(jax.random.key(0), (4, 64, 8)), jnp.ones((3, 1, 64))

    def model(params, x):
        return x @ jnp.take(params["w"], jnp.array([1, 7, 3]), axis=0, mode=mode, fill_value=fill)

    base = bases.quantize({"w": w}, {"w": FORMATS[format]})
    found = lora.lora_apply(model, materialize=True)(base, {}, x)
    np.testing.assert_allclose(found, model(bases.dense(base), x), rtol=1e-5, atol=1e-5)


def test_a_packed_weight_is_neither_packed_again_nor_started_from():
    """Other starts take it: tests/test_starts.py. LoftQ has to know what packing lost."""
    case = next(c for c in MODELS if c.name == "two_layers")
    base = bases.quantize(case.params(), {case.pattern: bases.Nf4()})
    with pytest.raises(lora.LoraError, match="is packed already"):
        bases.quantize(base, {case.pattern: bases.Nf4()})
    adapters = lora.init(jax.random.key(0), base, lora.plan(case.fn, base, case.input(), rules={"w.*": lora.Lora(2)}))
    with pytest.raises(lora.LoraError, match="'w1' is packed already, and LoftQ makes up for what packing loses"):
        lora.starts.loftq(base, adapters, bases.Nf4())


@pytest.mark.parametrize("name", ["two_layers", "scan_over_remat", "attention_kernels"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.sampled(5)
def test_loftq_makes_up_for_what_packing_loses(name, format):
    """A B is the best of its rank, for any scale. More iterations need not be better, and are near."""
    case, rule = next(c for c in MODELS if c.name == name), lora.Lora(rank=3, alpha=12)
    params = case.params()
    fresh = lora.init(jax.random.key(0), params, case.plan(rule))
    packed = bases.quantize(params, {case.pattern: FORMATS[format]})

    def lost(base, adapters):
        merged = bases.dense(lora.merge(base, adapters))
        return sum(float(jnp.square(merged[path] - params[path]).sum()) for path in adapters)

    base, started = lora.starts.loftq(params, fresh, FORMATS[format])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, base, packed))
    best = 0.0
    for path, adapter in started.items():
        stack, inputs, outputs = adapter.axes
        gap = np.asarray(params[path] - packed[path].dense()).transpose([*stack, *inputs, *outputs])
        gap = gap.reshape(adapter.axes.fans(params[path].shape))
        best += float(np.square(np.linalg.svd(gap, compute_uv=False)[:, 3:]).sum())
    assert lost(base, started) == pytest.approx(best, rel=1e-3)
    assert lost(base, started) < 0.8 * lost(packed, fresh)
    assert lost(*lora.starts.loftq(params, fresh, FORMATS[format], iterations=4)) < 0.8 * lost(packed, fresh)


@pytest.mark.parametrize(
    ("given", "says"), [({"format": "nf4"}, "expected a format"), ({"iterations": 0}, "at least 1")]
)
def test_loftq_that_cannot_be(given, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.starts.loftq({}, {}, **({"format": bases.Nf4()} | given))


def test_donated_arrays_are_gone():
    w = jnp.ones((8, 64))
    bases.quantize({"w": w}, {"w": bases.Nf4()}, donate=True)
    assert w.is_deleted()


# Layouts --------------------------------------------------------------------------------------------------------------


def test_all_inputs_are_one_axis_where_that_is_asked_for():
    """A kernel [heads, head_dim, d] of 64 heads: bitsandbytes has torch's [d, heads * head_dim]."""
    w = np.random.default_rng(0).normal(size=(64, 2, 6)).astype(np.float32)
    by_default, asked = packed(w, bases.Nf4(stack=0)), packed(w, bases.Nf4(stack=0, inputs=2))
    assert (by_default.codes.shape, asked.codes.shape) == ((64, 12), (128, 6))
    matrix = packed(w.reshape(128, 6), bases.Nf4())
    assert asked.shape == w.shape
    np.testing.assert_array_equal(asked.dense(), matrix.dense().reshape(w.shape))
    again = asked.repack_like(asked.dense())
    assert jax.tree.structure(again) == jax.tree.structure(asked)
    np.testing.assert_array_equal(again.codes, asked.codes)
    for inputs in (0, 3):
        with pytest.raises(lora.LoraError, match="axes of inputs beside one of outputs"):
            packed(w, bases.Nf4(stack=0, inputs=inputs))


@pytest.mark.parametrize(
    ("shape", "deferred", "inputs"),
    [
        ((128, 6), (), (0,)),
        ((128, 6), (), (1,)),
        ((128, 6), (("transpose", (1, 0)),), (0,)),
        ((128, 6), (("transpose", (1, 0)), ("reshape", (2, 3, 128)), ("cast", jnp.float32)), (2,)),
        ((64, 2, 3), (), (0,)),
        ((64, 2, 3), (), (1, 2)),
        ((2, 32, 6), (), (0, 1)),
        ((2, 32, 6), (), (0,)),
        ((2, 32, 6), (), (1,)),
        ((64, 2, 3), (("transpose", (1, 0, 2)),), (1,)),
        ((24, 8), (), (0,)),
    ],
)
def test_the_matrix_that_a_kernel_is_given(shape, deferred, inputs, monkeypatch):
    """It is [d, k] as the codes are, or its transpose; where a product is with another matrix, there is no kernel."""
    w = packed(np.random.default_rng(0).normal(size=shape).astype(np.float32), bases.Nf4(stack=0))
    for name, how in deferred:
        w = w.with_deferred(name, how)
    sizes, asked = [w.shape[axis] for axis in inputs], []
    x = jax.random.normal(jax.random.key(1), (5, 2, *sizes))

    def by_kernel(x, w, *, transposed, precision):
        asked.append(transposed)
        matrix = w.codes.astype(jnp.uint8)
        values = jnp.asarray(bases.nf4.CODE)[matrix] * jnp.repeat(w.fp32_scales(), 64, axis=0)
        return x @ (values.T if transposed else values)

    monkeypatch.setattr(bases.nf4, "_by_kernel", by_kernel)
    found = w.dot(x, inputs, None)
    if (shape, inputs) in (((2, 32, 6), (0,)), ((2, 32, 6), (1,)), ((64, 2, 3), (1,)), ((24, 8), (0,))):
        assert found is None
        return
    expected = jnp.tensordot(x, w.dense(), (tuple(range(2, 2 + len(inputs))), inputs))
    assert len(asked) == 1
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)
