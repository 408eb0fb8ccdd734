"""Losses without logits: the plain loss's values and gradients, at the cost of forward pass and dx alone."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trained
from jax import P

import lora_jax as lora
from lora_jax.analysis import hlo, hlo_costs

BATCH, TIME, D, V = 2, 7, 16, 64
ROWS = 4  # a block of so many rows: one of two tokens of each sequence, and a token of padding
SETTINGS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "capped": {"soft_cap": 2.0},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 2.0},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(scope="module")
def data():
    """Hidden states, a head, labels of which some are ignored, and weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (BATCH, TIME, D)), jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (BATCH, TIME), 0, V).at[0, 1:3].set(-100)
    return hidden, head, labels, jax.random.uniform(keys[3], (BATCH, TIME))


def plain(hidden, head, labels, weights=None, *, label_smoothing=0.0, z_loss=0.0, soft_cap=None, reduction="mean"):
    """The loss as it is written with logits."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, head.shape[1], dtype=logits.dtype), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    counts = (labels != -100) * (jnp.ones(labels.shape, logits.dtype) if weights is None else weights)
    losses = losses * counts
    if reduction == "none":
        return losses
    return jnp.sum(losses) / (jnp.sum(counts) if reduction == "mean" else 1)


def ours(hidden, head, labels, weights=None, *, chunk_rows=ROWS, **how):
    """The loss without logits, in the plain one's order of arguments."""
    return lora.losses.linear_cross_entropy(hidden, head, labels, weights=weights, chunk_rows=chunk_rows, **how)


def scalar(loss, **how):
    """A scalar of the loss; of a loss for each row, another factor for each."""

    def run(*args):
        losses = loss(*args, **how)
        return jnp.sum(losses * jnp.cos(jnp.arange(losses.size, dtype=losses.dtype)).reshape(losses.shape))

    return run


def assert_same(found, expected, rtol=1e-5):
    def check(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    jax.tree.map(check, found, expected)


@pytest.mark.sampled(15)
@settings
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients_are_those_of_the_plain_loss(data, setting, reduction):
    how = SETTINGS[setting] | {"reduction": reduction}
    hidden, head, labels, weights = data
    for wrt in [(0,), (1,), (0, 1, 3)]:
        found, expected = (
            jax.jit(jax.value_and_grad(scalar(loss, **how), wrt))(hidden, head, labels, weights)
            for loss in (ours, plain)
        )
        assert_same(found, expected)


def test_in_double_precision_they_are_exact(data):
    with jax.enable_x64(True):
        hidden, head, weights = (np.asarray(data[i], np.float64) for i in (0, 1, 3))
        labels = np.asarray(data[2])
        for reduction in ("mean", "none"):
            how = SETTINGS["all"] | {"reduction": reduction}
            found, expected = (
                jax.jit(jax.value_and_grad(scalar(loss, **how), (0, 1)))(hidden, head, labels, weights)
                for loss in (ours, plain)
            )
            assert_same(found, expected, rtol=1e-12)


def test_in_bf16_the_loss_is_in_fp32_and_gradients_are_rounded_once_more(data):
    hidden, head, labels, _ = data
    args = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    found, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(*(arg.astype(dtype) for arg in args), labels)
        for loss, dtype in ((ours, jnp.bfloat16), (plain, jnp.float32))
    )
    assert (found[0].dtype, found[1][0].dtype, found[1][1].dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert_same(found[0], expected[0])
    assert_same([g.astype(jnp.float32) for g in found[1]], list(expected[1]), rtol=2**-7)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 14, 100])
def test_any_number_of_rows_at_a_time_gives_the_same(data, rows):
    hidden, head, labels, _ = data
    how = {"reduction": "none"}
    one = jax.jit(jax.value_and_grad(scalar(ours, **how, chunk_rows=rows)))
    assert_same(one(hidden, head, labels), jax.jit(jax.value_and_grad(scalar(plain, **how)))(hidden, head, labels))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)])
def test_hidden_states_have_any_axes(shape):
    hidden, labels = jnp.ones((*shape, D)), jnp.zeros(shape, jnp.int32)
    losses = ours(hidden, jnp.eye(D, V), labels, reduction="none")
    assert losses.shape == shape
    np.testing.assert_allclose(losses, np.log(D * np.e + V - D) - 1, rtol=1e-6)
    assert ours(hidden, jnp.eye(D, V), labels, reduction="sum").shape == ()


def test_rows_without_a_label_count_for_nothing_whatever_is_in_them(data):
    hidden, head, labels, _ = data
    hidden = hidden.at[0, 1].set(jnp.nan)
    step = jax.jit(jax.value_and_grad(ours))
    assert_same(step(hidden, head, labels), jax.jit(jax.value_and_grad(plain))(data[0], head, labels))
    none = jnp.full_like(labels, -100)
    value, gradient = step(hidden, head, none)
    assert value == 0
    assert not gradient.any()


def test_labels_out_of_range_are_refused_or_nan(data):
    hidden, head, labels, _ = data
    step, rows = jax.jit(jax.value_and_grad(ours)), jax.jit(functools.partial(ours, reduction="none"))
    for wrong in (V, -1):
        bad = labels.at[1, 3].set(wrong)
        with pytest.raises(lora.LoraError, match=f"`labels` have {wrong}, expected 0 to {V - 1}, or -100 for rows"):
            ours(hidden, head, bad)
        (value, gradient), each = step(hidden, head, bad), rows(hidden, head, bad)
        assert jnp.isnan(value)
        assert jnp.isnan(gradient[1, 3]).all()
        assert jnp.argwhere(jnp.isnan(each)).tolist() == [[1, 3]]
    with pytest.raises(lora.LoraError, match=r"`labels` have -100, expected 0 to 63\. `ignore` says"):
        ours(hidden, head, labels, ignore=None)
    assert_same(
        ours(hidden, head, labels.at[0, 1:3].set(3), ignore=3), ours(hidden, head, labels.at[labels == 3].set(-100))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.ones((2, 16))}, "expected hidden states [..., D] and a label for each"),
        ({"head": jnp.ones((64, 16))}, "expected a head [16, V]: say tied=True"),
        ({"head": jnp.ones((16, 64)), "tied": True}, "expected a head [V, 16], for it is tied: say tied=False"),
        ({"head": jnp.ones((4, 16, 16))}, "`head` has the shape [4, 16, 16]"),
        ({"head": {}}, "`head` is an empty dict, expected an array or a packed weight"),
        ({"labels": jnp.ones((2, 7))}, "`labels` is float32[2, 7], expected integers"),
        ({"weights": jnp.ones((2,))}, "`weights` have the shape [2], expected one for each label, [2, 7]"),
        ({"label_smoothing": 1.5}, "`label_smoothing` is 1.5, expected a number from 0 to 1"),
        ({"z_loss": "much"}, "`z_loss` is 'much', expected a number"),
        ({"soft_cap": 0.0}, "`soft_cap` is 0.0, expected a number above 0"),
        ({"reduction": "max"}, "`reduction` is 'max', expected \"mean\""),
        ({"hidden": jnp.ones((2, 7, 16), jnp.complex64)}, "`hidden` is complex64[2, 7, 16], expected floats"),
        ({"head": jnp.ones((16, 0))}, "expected at least one class"),
        ({"chunk_rows": 0}, "`chunk_rows` is 0, expected a whole number of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(data, change, message):
    args = {"hidden": data[0], "head": data[1], "labels": data[2]} | change
    with pytest.raises(lora.LoraError, match=re.escape(message)):
        lora.losses.linear_cross_entropy(**args)


def test_log_probabilities_are_those_of_the_labels(data):
    hidden, head, labels, _ = data
    found, expected = (
        jax.jit(jax.value_and_grad(scalar(log_probs), (0, 1)))(hidden, head, labels)
        for log_probs in (
            functools.partial(lora.losses.linear_log_probs, chunk_rows=ROWS, soft_cap=3.0),
            lambda *args: -plain(*args, soft_cap=3.0, reduction="none"),
        )
    )
    assert_same(found, expected)


# Transformations -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_and_second_derivatives(data, reduction):
    hidden, head, labels, _ = data

    def both(loss):
        def run(hidden, head):
            return scalar(loss, **SETTINGS["all"], reduction=reduction)(hidden, head, labels)

        moved = jnp.sin(hidden), jnp.cos(head)
        along = jax.jvp(run, (hidden, head), moved)
        again = jax.grad(lambda hidden: jnp.sum(jnp.sin(jax.grad(run)(hidden, head))))(hidden)
        return along, again, jax.jvp(jax.grad(run, (0, 1)), (hidden, head), moved)[1]

    assert_same(jax.jit(both, static_argnums=0)(ours), jax.jit(both, static_argnums=0)(plain), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_vmap_remat_and_in_a_scan(data, reduction):
    hidden, head, labels, _ = data
    heads = jnp.stack([head, 2 * head])

    def run(loss, hidden, heads):
        def step(total, sequence):
            hidden, labels = sequence
            each = jax.vmap(lambda head: scalar(loss, reduction=reduction)(hidden, head, labels))
            return total + jnp.sum(jnp.sin(each(heads))), None

        return jax.lax.scan(jax.checkpoint(step), jnp.zeros(()), (hidden, labels))[0]

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(run, loss), (0, 1)))(hidden, heads) for loss in (ours, plain)
    )
    assert_same(found, expected, rtol=1e-4)


# Heads ---------------------------------------------------------------------------------------------------------------


def model(loss, tied=False, **how):
    """A function of parameters with a layer and a head."""

    def run(params, hidden, labels):
        head = params["head"].T if tied else params["head"]
        return scalar(loss, **how)(jnp.tanh(hidden @ params["layer"]), head, labels)

    return run


def parameters(data, tied=False):
    head = data[1].T if tied else data[1]
    return {"layer": jax.random.normal(jax.random.key(1), (D, D)), "head": head}


def by_adapters(run):
    """Value and gradient by the adapters, of (adapters, params, *args)."""
    apply = lora.lora_apply(run)
    return jax.jit(jax.value_and_grad(lambda adapters, params, *args: apply(params, adapters, *args)))


RULES = {"LoRA": lora.Lora(rank=2), "DoRA": lora.Dora(rank=2), "VeRA": lora.Vera(rank=4), "IA3": lora.Ia3()}


def with_adapters(run, params, data, rule):
    plan = lora.plan(run, params, data[0], data[2], rules={".*": rule})
    adapters = lora.init(jax.random.key(2), params, plan)
    change = lora.trainable_mask(adapters)

    def moved(array, is_trained):
        return array + 0.1 * jnp.cos(jnp.arange(array.size, dtype=array.dtype)).reshape(array.shape) * is_trained

    return plan, jax.tree.map(moved, adapters, change)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_an_adapted_head_is_read_as_the_plain_loss_reads_it(data, rule, reduction, tied):
    params = parameters(data, tied)
    run, expected = (model(loss, tied, reduction=reduction) for loss in (ours, plain))
    plan, adapters = with_adapters(expected, params, data, RULES[rule])
    ours_too = lora.plan(run, params, data[0], data[2], rules={".*": RULES[rule]})
    assert {path: ours_too[path].axes for path in ours_too} == {path: plan[path].axes for path in plan}
    args = (adapters, params, data[0], data[2])
    assert_same(by_adapters(run)(*args), by_adapters(expected)(*args), rtol=1e-4)


FORMATS = {
    "NF4": lora.bases.Nf4(),
    "NF4, plain scales": lora.bases.Nf4(double=False),
    "int8": lora.bases.Int8(),
    "fp8": lora.bases.Fp8(),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_head_is_dequantized_in_parts(data, name, tied, monkeypatch):
    """Beside an adapter of its own, one of a layer before, and given as it is."""
    monkeypatch.setattr("lora_jax.core.packed_parts.NUMBERS", 48 * 64)  # of 64 inputs and of 80, or 192, words
    d, v = 64, 192 if tied else 80
    keys = jax.random.split(jax.random.key(3), 3)
    hidden, labels = jax.random.normal(keys[0], (BATCH, TIME, d)), jax.random.randint(keys[1], (BATCH, TIME), 0, v)
    head = jax.random.normal(keys[2], (v, d) if tied else (d, v))
    params = {"layer": jnp.eye(d), "head": head}
    packed = lora.bases.quantize(params, {"head": FORMATS[name]})
    dense = lora.bases.dense(packed)
    run, expected = (model(loss, tied) for loss in (ours, plain))
    both = (hidden, None, labels)
    _, adapters = with_adapters(expected, params, both, lora.Lora(rank=2))
    for some in (adapters, {"layer": adapters["layer"]}):
        found = by_adapters(run)(some, packed, hidden, labels)
        assert_same(found, by_adapters(expected)(some, dense, hidden, labels), rtol=1e-4)
    direct = jax.jit(jax.value_and_grad(functools.partial(ours, tied=tied)))
    assert_same(direct(hidden, packed["head"], labels), direct(hidden, dense["head"], labels), rtol=1e-4)
    for step, args in (
        (direct, (hidden, packed["head"], labels)),
        (by_adapters(run), (adapters, packed, hidden, labels)),
    ):
        text = step.lower(*args).as_text()
        assert f"{d}x{v}xf32" not in text
        assert f"{v}x{d}xf32" not in text


def test_a_tied_table_is_a_head(data):
    hidden, head, labels, _ = data
    assert_same(ours(hidden, head.T, labels, tied=True), ours(hidden, head, labels))
    assert_same(ours(hidden, head.T.T, labels), ours(hidden, head, labels))


def test_a_head_under_the_programs_own_vmap(data):
    params = parameters(data)

    def each(loss):
        def run(p, hidden, labels):
            return jnp.sum(jax.vmap(lambda h, y: loss(jnp.tanh(h @ p["layer"]), p["head"], y))(hidden, labels))

        return run

    _, adapters = with_adapters(each(plain), params, data, lora.Lora(rank=2))
    found, expected = (by_adapters(each(loss))(adapters, params, data[0], data[2]) for loss in (ours, plain))
    assert_same(found, expected, rtol=1e-4)


def test_heads_under_the_programs_own_vmap(data):
    """Several heads read the same hidden states."""
    hidden, head, labels, _ = data
    params = {"layer": parameters(data)["layer"], "heads": jnp.stack([head, 2 * head])}

    def each(loss):
        def run(p, hidden, labels):
            x = jnp.tanh(hidden @ p["layer"])
            return jnp.sum(jax.vmap(lambda head: loss(x, head, labels))(p["heads"]))

        return run

    plan = lora.plan(each(plain), params, hidden, labels, rules={".*": lora.Lora(rank=2)})
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    found, expected = (by_adapters(each(loss))(adapters, params, hidden, labels) for loss in (ours, plain))
    assert_same(found, expected, rtol=1e-4)


def test_weights_may_be_a_list(data):
    hidden, head, labels, _ = data
    weights = [[1.0] * TIME, [0.5] * TIME]
    assert_same(ours(hidden, head, labels, weights=weights), ours(hidden, head, labels, weights=jnp.asarray(weights)))


def test_dropout_before_the_head_is_refused_by_name(data):
    params = parameters(data)
    _, adapters = with_adapters(model(ours), params, data, lora.Lora(rank=2))
    apply, key = lora.lora_apply(model(ours)), jax.random.key(4)
    with pytest.raises(lora.LoraError, match=r"'head' has dropout, and .* multiplies by it in blocks of rows"):
        apply(params, lora.with_dropout(adapters, key), data[0], data[2])
    others = {"layer": adapters["layer"]}
    some = {**lora.with_dropout(others, key), "head": adapters["head"]}
    expected = jax.jit(lora.lora_apply(model(plain)))(params, some, data[0], data[2])
    assert_same(jax.jit(apply)(params, some, data[0], data[2]), expected)


def test_a_head_that_is_used_otherwise_is_refused_by_name(data):
    run = lambda p, hidden, labels: ours(hidden, p["head"] * jnp.ones((D, V)), labels)  # noqa: E731
    with pytest.raises(lora.LoraError, match=r"'head': .* takes it with more than a scalar"):
        with_adapters(run, parameters(data), data, lora.Lora(rank=2))


# Meshes --------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_vocabulary_is_split_over_an_axis_of_shard_map(data, reduction, check_vma):
    hidden, head, labels, _ = data
    how = SETTINGS["all"] | {"reduction": reduction}
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = P("data") if reduction == "none" else P()

    def local(hidden, head, labels):
        losses = ours(hidden, head, labels, **how, axis_name="model")
        return losses if reduction == "none" else jax.lax.psum(losses, "data")

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(None, "model"), P("data")), out_specs=rows, check_vma=check_vma
    )
    found = jax.jit(jax.value_and_grad(scalar(split), (0, 1)))
    assert_same(found(hidden, head, labels), jax.value_and_grad(scalar(plain, **how), (0, 1))(hidden, head, labels))
    step = jax.jit(jax.value_and_grad(scalar(split)))
    sent = hlo_costs.collectives(hlo.parse(step.lower(hidden, head, labels).compile().as_text()))
    whole = [one for one in sent if D in [n for shape in one.shapes for n in shape]]
    assert [(one.kind, one.times) for one in whole] == [("all-reduce", 1)]  # of dx
    others = [math.prod(shape) for one in sent if one not in whole for shape in one.shapes]
    assert max(others) <= BATCH * (TIME + 1)  # a number for each row, or for each of a block


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(), P(None, "model"), P("data", "model")])
def test_over_a_mesh_the_compiler_splits_rows_and_vocabulary(spec):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (4, 8, D)), jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (4, 8), 0, V)
    expected = jax.value_and_grad(plain, (0, 1))(hidden, head, labels)
    put = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))  # noqa: E731
    args = put(hidden, P("data")), put(head, spec), put(labels, P("data"))
    loss = functools.partial(ours, chunk_rows=8)
    assert_same(jax.jit(jax.value_and_grad(loss, (0, 1)))(*args), expected)
    step = jax.jit(jax.value_and_grad(loss))
    sent = hlo_costs.collectives(hlo.parse(step.lower(*args).compile().as_text()))
    own = V // (4 if "model" in spec else 1)
    assert all(
        shape in ((D, own), (D // 2, own), (D, D)) for one in sent if one.depth == 0 for shape in one.shapes if shape
    )
    assert {one.kind for one in sent if one.depth} <= {"all-reduce"}  # the head is gathered once, before the blocks
    assert sum(one.nbytes * one.times for one in sent if one.depth) <= 4 * 4 * 8 // 2 * (D + 3) + 16


@pytest.mark.slow
def test_on_a_mesh_of_explicit_axes_the_batch_may_be_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (8, 8, D)), jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (8, 8), 0, V)
    with jax.set_mesh(mesh):
        args = (jax.device_put(array, jax.NamedSharding(mesh, P("data"))) for array in (hidden, labels))
        found = jax.jit(jax.value_and_grad(lambda x, y: ours(x, head, y, chunk_rows=16)))(*args)
    assert_same(jax.device_get(found), jax.device_get(jax.value_and_grad(plain)(hidden, head, labels)))


@pytest.mark.parametrize("devices", [0, 8])
def test_by_default_each_device_of_a_mesh_has_a_block_of_its_own(devices):
    """Of 128 rows, for so many words on a CPU. They are traced, and nothing is computed."""
    rows, words, place = 4096, 2**18, {}
    if devices:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        place = {"sharding": jax.NamedSharding(mesh, P("data"))}
    hidden, labels = (jax.ShapeDtypeStruct(*a, **place) for a in (((rows, D), jnp.float32), ((rows,), jnp.int32)))
    loss = lambda x, y: lora.losses.linear_cross_entropy(x, jnp.ones((D, words)), y)  # noqa: E731
    program = str(jax.jit(jax.value_and_grad(loss)).trace(hidden, labels).jaxpr)
    assert [int(n) for n in re.findall(r"\blength=(\d+)", program)] == [rows // 128 // max(devices, 1)]


def test_a_mean_over_many_rows_does_not_underflow_in_fp16():
    """With a loss that is scaled as for training in fp16."""
    hidden = jax.random.normal(jax.random.key(0), (2**16, 2), jnp.float16)
    head, labels = jax.random.normal(jax.random.key(1), (2, 3), jnp.float16), jnp.zeros(2**16, jnp.int32)
    scaled = lambda x: 2.0**14 * lora.losses.linear_cross_entropy(x, head.astype(x.dtype), labels)  # noqa: E731
    found, expected = jax.grad(scaled)(hidden).astype(jnp.float32), jax.grad(scaled)(hidden.astype(jnp.float32))
    assert jnp.linalg.norm(found - expected) <= 1e-3 * jnp.linalg.norm(expected)


# Costs ---------------------------------------------------------------------------------------------------------------


def multiplications(text):
    """Twice the multiplications of all matrix products of a compiled program, in loops as often as they run."""
    module, total = hlo.parse(text), 0
    types = {one.name: one.results for lines in module.computations.values() for one in lines}
    for one, times, *_ in hlo_costs._walk(module, module.entry, 1, False, loops := []):
        if one.operation == "dot":
            [(_, shape, _)] = hlo.arrays(types[one.operands[0]])
            contracted = [shape[int(i)] for i in one.field(r"lhs_contracting_dims={([\d,]*)}").split(",")]
            [(_, result, _)] = hlo.arrays(one.results)
            total += 2 * times * math.prod(result) * math.prod(contracted)
    assert not loops, "every loop says how often it runs"
    return total


@pytest.fixture(scope="module")
def compile_large():
    """Compile for 8,192 tokens of width 4,096 and 128,256 words; nothing is computed."""
    t, d, v = 8192, 4096, 128_256
    shapes = ((t, d), jnp.float32), ((d, v), jnp.float32), ((t,), jnp.int32)
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return t * d * v, lambda fn: jax.jit(fn).lower(*args).compile()


def test_at_128k_words_it_takes_a_twentieth_of_the_memory_and_no_operation_more(compile_large):
    product, compiled = compile_large
    loss, expected = (
        compiled(jax.value_and_grad(functools.partial(fn, ignore=None)))
        for fn in (lora.losses.linear_cross_entropy, with_picked_logits)
    )
    temporary, of_plain = (c.memory_analysis().temp_size_in_bytes for c in (loss, expected))
    assert temporary <= 0.05 * of_plain
    assert multiplications(loss.as_text()) == 4 * product  # x W, and dx
    assert multiplications(expected.as_text()) == 4 * product
    assert multiplications(compiled(lora.losses.linear_cross_entropy).as_text()) == 2 * product


@pytest.mark.slow
def test_at_128k_words_a_packed_head_takes_little_more():
    """In int8; the plain loss of a dense head has 8.4 GB, of which a twentieth are 420 MB."""
    t, d, v = 8192, 4096, 128_256
    head = jax.eval_shape(
        lambda w: lora.bases.quantize({"head": w}, {"head": lora.bases.Int8()}),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
    )
    run = lora.lora_apply(lambda p, hidden, y: lora.losses.linear_cross_entropy(hidden, p["head"], y))
    step = jax.jit(jax.value_and_grad(lambda hidden, p, y: run(p, {}, hidden, y)))
    compiled = step.lower(
        jax.ShapeDtypeStruct((t, d), jnp.float32), head, jax.ShapeDtypeStruct((t,), jnp.int32)
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * 8.4e9
    assert multiplications(compiled.as_text()) == 4 * t * d * v


def with_picked_logits(hidden, head, labels, ignore):
    """The plain loss with the least memory."""
    logits = hidden @ head
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@pytest.mark.parametrize(("reduction", "wrt", "times"), [("none", 0, 4), ("mean", (0, 1), 6), ("none", (0, 1), 8)])
def test_products_for_each_gradient(data, reduction, wrt, times):
    hidden, head, labels, _ = data
    hidden, labels = hidden[:, :6], labels[:, :6]  # without padding
    step = jax.jit(jax.value_and_grad(scalar(ours, reduction=reduction), wrt))
    found = multiplications(step.lower(hidden, head, labels).compile().as_text())
    assert found == times * hidden.size * V


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_with_an_adapted_head(data, reduction):
    """Of the head 4 T D V where losses are summed; beside these, of rank r."""
    hidden, labels, rank = data[0][:, :6], data[2][:, :6], 2
    params = {"head": data[1]}
    run = lambda p, hidden, labels: scalar(ours, reduction=reduction)(hidden, p["head"], labels)  # noqa: E731
    _, adapters = with_adapters(run, params, (hidden, None, labels), lora.Lora(rank=rank))
    step = jax.jit(jax.value_and_grad(lambda a, x: lora.lora_apply(run)(params, a, x, labels), (0, 1)))
    found = multiplications(step.lower(adapters, hidden).compile().as_text())
    rows = hidden.size // D
    thin = 2 * rows * rank * (D + V)
    passes = {"mean": (4, 3), "none": (6, 5)}[reduction]
    assert found <= passes[0] * rows * D * V + passes[1] * thin
