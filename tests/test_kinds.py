"""Every kind of adapter: the laws, over programs that use weights in each way."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    KINDS,
    MODELS,
    Case,
    assert_trees_close,
    assert_trees_equal,
    eight_devices,
    equations,
    formed,
    total,
    trained,
    trained_leaves,
)
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.adapters.vera import shared_projections
from lora_jax.core.kinds import KINDS as KINDS_BY_NAME
from lora_jax.key_maps import KeyMap, linear

DATA = Path(__file__).parent / "data" / "peft"

NAMES = ["two_layers", "attention_kernels", "scan_over_remat", "experts", "embedding", "convolution", "ragged"]
CASES = [next(c for c in MODELS if c.name == name) for name in NAMES]
kinds = pytest.mark.parametrize("kind", KINDS)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_hand(w, adapter):
    """W' in float64, by each method's formula."""
    w = np.asarray(w, np.float64)
    if isinstance(adapter, lora.FullAdapter):
        return w + np.asarray(adapter.delta, np.float64)
    stack, inputs, outputs = adapter.axes
    arrays = {
        name: np.asarray(getattr(adapter, name), np.float64)
        for name in adapter.layout
        if getattr(adapter, name) is not None
    }
    canonical = w.transpose([*stack, *inputs, *outputs])
    shape = canonical.shape
    n, n_in = len(stack), len(inputs)
    matrix = canonical.reshape(*shape[:n], int(np.prod(shape[n : n + n_in])), -1)

    def product(a, b):
        return a.reshape(*a.shape[:n], -1, a.shape[-1]) @ b.reshape(*b.shape[: n + 1], -1)

    scale = getattr(adapter, "scale", 1.0)
    if isinstance(adapter, lora.Ia3Adapter):
        gain = arrays["gain"].reshape(*shape[:n], 1, -1)
        delta = matrix * (gain - 1)
    elif isinstance(adapter, lora.VeraAdapter):
        a, b = shared_projections(0, 2, *adapter.widths)
        outputs_of_each = arrays["b"].reshape(*shape[:n], 1, -1)
        left, right = a[: matrix.shape[-2]].astype(np.float64), b[:, : matrix.shape[-1]]
        delta = (left * arrays["d"][..., None, :]) @ right * outputs_of_each
    elif isinstance(adapter, lora.LokrAdapter):
        w2 = arrays["a"] @ arrays["b"] if "b" in arrays else arrays["a"]
        flat = [m.reshape(-1, *m.shape[-2:]) for m in (arrays["w1"], w2)]
        delta = np.stack([np.kron(*pair) for pair in zip(*flat, strict=True)]).reshape(matrix.shape)
    elif isinstance(adapter, lora.LohaAdapter):
        delta = product(arrays["a1"], arrays["b1"]) * product(arrays["a2"], arrays["b2"])
    elif isinstance(adapter, lora.AdaLoraAdapter):
        e = arrays["e"].reshape(*arrays["e"].shape, *[1] * len(outputs))
        delta = product(arrays["a"], e * arrays["b"])
    else:
        delta = product(arrays["a"], arrays["b"])
    changed = matrix + scale * delta
    if isinstance(adapter, lora.DoraAdapter):
        m = arrays["m"].reshape(*arrays["m"].shape[:n], 1, -1)
        changed = changed * m / np.linalg.norm(changed, axis=-2, keepdims=True)
    order = [*stack, *inputs, *outputs]
    return changed.reshape(shape).transpose([order.index(i) for i in range(len(order))])


@kinds
@cases
@pytest.mark.sampled(5)
def test_merging_is_the_formula(kind, case):
    params, adapters = case.params(), case.adapters(KINDS[kind])
    for path, merged in lora.merge(params, adapters).items():
        if path in adapters:
            np.testing.assert_allclose(merged, by_hand(params[path], adapters[path]), rtol=1e-5, atol=1e-5)


@kinds
@cases
@pytest.mark.sampled(5)
def test_applying_is_merging(kind, case):
    """Values, and the gradients of what is trained."""
    params, x, adapters = case.params(), case.input(), case.adapters(KINDS[kind])
    apply = lora.lora_apply(case.fn)

    def both(adapters):
        factored = jax.value_and_grad(lambda a: total(apply(params, a, x)))(adapters)
        return factored, jax.value_and_grad(lambda a: total(case.fn(lora.merge(params, a), x)))(adapters)

    factored, merged = jax.jit(both)(adapters)
    assert_trees_close(factored, merged, rtol=1e-4, atol=1e-4)
    trains = jax.tree.map(lambda g, mask: bool(jnp.any(g != 0)) == mask, factored[1], lora.trainable_mask(adapters))
    assert all(jax.tree.leaves(trains)), "what is frozen has no gradient, and all else has one"


@kinds
@cases
@pytest.mark.sampled(5)
def test_starting_is_identity(kind, case):
    params, x = case.params(), case.input()
    adapters = lora.init(jax.random.key(0), params, case.plan(KINDS[kind]))
    assert_trees_close(lora.merge(params, adapters), params, rtol=1e-6, atol=1e-6)
    assert_trees_close(lora.lora_apply(case.fn)(params, adapters, x), case.fn(params, x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("full", "lokr_whole")])
@cases
@pytest.mark.sampled(5)
def test_factored_stays_factored(kind, case: Case):
    params, x, adapters = case.params(), case.input(), case.adapters(KINDS[kind])
    apply = lora.lora_apply(case.fn)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(apply(p, a, x))))(adapters, params)
    base = jax.make_jaxpr(jax.value_and_grad(lambda x, p: total(case.fn(p, x))))(x, params)
    for name in adapters:
        shape = params[name].shape
        assert Counter(formed(program, shape)) <= Counter(formed(base, shape)), name


FP32 = [c.name for c in MODELS if c.dtype == jnp.float32]
# By turns, one program with some kinds and the next with others. What is not here enters programs as LoRA does.
APART = (("dora", "lokr"), ("vera", "ia3"), ("full", "lora_fa"))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for i, name in enumerate(FP32) for kind in APART[i % 3]])
@pytest.mark.slow
def test_every_program_is_right_or_refused(kind, name):
    """What a kind cannot follow factored is refused by name; allowed to be formed, it is right."""
    case = next(c for c in MODELS if c.name == name)
    params, x, rule = case.params(), case.input(), KINDS[kind]
    plan = lora.plan(case.fn, params, x, rules={case.pattern: rule}, materialize=True)
    adapters = trained(lora.init(jax.random.key(0), params, plan), 2)
    found = jax.jit(lora.lora_apply(case.fn, materialize=True))(params, adapters, x)
    expected = jax.jit(lambda a: case.fn(lora.merge(params, a), x))(adapters)
    rounding = 3e-2 if name == "cast" else 5e-4
    assert_trees_close(found, expected, rtol=rounding, atol=rounding)


def test_kinds_mix_in_one_model():
    case = next(c for c in MODELS if c.name == "two_layers")
    params, x = case.params(), case.input()
    plan = lora.plan(case.fn, params, x, rules={"w1": lora.Dora(rank=2), "w2": lora.Loha(rank=2), "b": lora.Full()})
    assert "Dora(rank=2)" in str(plan)
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    assert_trees_close(lora.lora_apply(case.fn)(params, adapters, x), case.fn(lora.merge(params, adapters), x))


@kinds
def test_several_sets_at_once_and_dropout(kind):
    """`vmap` over adapters; dropout of nothing is nothing, and of something changes the output of what sees x."""
    case = next(c for c in MODELS if c.name == "two_layers")
    params, x = case.params(), case.input()
    one, two = (trained(case.adapters(KINDS[kind]), seed) for seed in (1, 2))
    apply = jax.jit(lora.lora_apply(case.fn))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    found = jax.vmap(apply, in_axes=(None, 0, None))(params, stacked, x)
    each = [apply(params, one, x), apply(params, two, x)]
    assert_trees_close(found, jnp.stack(each))
    dropped = apply(params, lora.with_dropout(one, jax.random.key(0), 0.5), x)
    assert jnp.isfinite(dropped).all()
    sees_x = kind not in ("full", "ia3")
    assert np.allclose(dropped, each[0], rtol=1e-5, atol=1e-5) != sees_x


@kinds
def test_placement_changes_speed_only(kind):
    """Over a mesh that splits the batch, with a copy of each adapter for each part: the same gradients."""
    case = next(c for c in MODELS if c.name == "scan_over_remat")
    params, adapters = case.params(), case.adapters(KINDS[kind])
    x = jax.random.normal(jax.random.key(5), (8, *case.x[1:]))
    batch = jax.NamedSharding(eight_devices(), jax.P("data"))

    def loss(adapters, params, x):
        return jnp.mean(jnp.square(lora.lora_apply(case.fn)(params, adapters, x)))

    here = jax.jit(lora.value_and_grad(loss))(adapters, params, x)
    there = jax.jit(lora.value_and_grad(loss, batch_sharding=batch))(adapters, params, jax.device_put(x, batch))
    assert_trees_close(there, here, rtol=1e-5, atol=1e-6)


@kinds
def test_checkpoints_give_back_what_was_saved(kind, tmp_path):
    case = next(c for c in MODELS if c.name == "attention_kernels")
    adapters = case.adapters(KINDS[kind])
    lora.checkpoint.save(tmp_path / "adapters", adapters)
    found, _ = lora.checkpoint.load(tmp_path / "adapters")
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    assert_trees_equal(found, adapters)


def test_rows_are_saved(tmp_path):
    params = {"table": jnp.arange(12.0).reshape(4, 3), "head": jnp.ones((4, 5))}
    plan = lora.plan(tied, params, jnp.array([1]), rules={"table": lora.Rows((3, 1))})
    adapters = lora.init(jax.random.key(0), params, plan)
    lora.checkpoint.save(tmp_path / "adapters", adapters)
    found, _ = lora.checkpoint.load(tmp_path / "adapters")
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    assert_trees_equal(found, adapters)


def from_torch(tensors, module):
    """The adapter of a linear module from what HF PEFT calls its arrays."""
    arrays = {
        name.removeprefix(f"{module}.").removesuffix(".weight").removesuffix(".default"): jnp.asarray(tensor.T)
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }
    axes = lora.KernelAxes((), (0,), (1,))
    inputs, outputs = {"lin0": ((6,), (10,)), "lin1": ((10,), (4,))}[module]

    def of(*names):
        return [arrays[name] for name in names]

    if "hada_w1_a" in arrays:
        return lora.LohaAdapter(*of("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a"), axes, 2.0)
    if "lokr_w1" in arrays:
        w1, a, b = of("lokr_w1", "lokr_w2_b", "lokr_w2_a")
        return lora.LokrAdapter(w1, a, axes, 2.0, inputs, outputs, b)
    if "vera_lambda_d" in arrays:
        return lora.VeraAdapter(*of("vera_lambda_d", "vera_lambda_b"), axes, inputs, outputs, 0, (10, 10))
    if "lora_magnitude_vector" in arrays:
        return lora.DoraAdapter(*of("lora_A", "lora_B", "lora_magnitude_vector"), axes, 2.0)
    return lora.LoraAdapter(*of("lora_A", "lora_B"), axes, 2.0)


@pytest.mark.parametrize("name", ["dora_sgd", "dora_adamw", "loha_adamw", "lokr_adamw", "vera_adamw", "pissa_adamw"])
def test_training_goes_as_with_hf_peft(name):
    """Five steps from PEFT's start, on its batches: losses, first gradients and the adapters at the end."""
    tensors = load_file(DATA / "train" / f"{name}.safetensors")

    def part(prefix):
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    base = {path: jnp.asarray(t.T) for path, t in part("base.").items()}
    modules = ("lin0", "lin1")
    adapters, final, grad0 = (
        {f"{m}.weight": from_torch(part(prefix), m) for m in modules} for prefix in ("init.", "final.", "grad0.")
    )
    if name.startswith("pissa"):  # whose start changes the base
        fresh = {path: dataclasses.replace(a, b=jnp.zeros_like(a.b)) for path, a in adapters.items()}
        base, _ = lora.starts.pissa(base, fresh)

    def model(p, x):
        x = jnp.tanh(jnp.matmul(x, p["lin0.weight"], precision="highest") + p["lin0.bias"][None])
        return jnp.matmul(x, p["lin1.weight"], precision="highest") + p["lin1.bias"][None]

    apply = lora.lora_apply(model)
    optimizer = optax.sgd(0.1) if "sgd" in name else optax.adamw(0.01, weight_decay=0.01)

    @jax.jit
    def step(adapters, state, x, y):
        loss, grads = jax.value_and_grad(lambda a: jnp.mean(jnp.square(apply(base, a, x) - y)))(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss, grads

    state, losses = optimizer.init(adapters), []
    for i, (x, y) in enumerate(zip(tensors["X"], tensors["Y"], strict=True)):
        adapters, state, loss, grads = step(adapters, state, x, y)
        losses.append(loss)
        if i == 0:
            assert_trees_close(trained_leaves(grads), trained_leaves(grad0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, tensors["losses"], rtol=1e-5, atol=1e-5)
    assert_trees_close(trained_leaves(adapters), trained_leaves(final), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rslora", "lora_fa", "loha", "adalora"])
def test_saving_to_peft_writes_the_lora_that_it_is(kind, tmp_path):
    case = next(c for c in MODELS if c.name == "two_layers")
    params, adapters = case.params(), case.adapters(KINDS[kind])
    key_map = KeyMap(*(linear(path, path) for path in adapters))
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    found, _ = lora.load_peft(tmp_path / "peft", params, key_map)
    assert_trees_close(lora.merge(params, found), lora.merge(params, adapters), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["full"])
def test_what_is_no_lora_is_not_saved_as_one(kind, tmp_path):
    case = next(c for c in MODELS if c.name == "two_layers")
    adapters = case.adapters(KINDS[kind])
    key_map = KeyMap(*(linear(path, path) for path in adapters))
    with pytest.raises(lora.LoraError, match="merge it instead"):
        lora.save_peft(tmp_path / "peft", adapters, key_map)
    assert list(tmp_path.iterdir()) == []


def test_full_trains_vectors_beside_factors():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["bias"][None]) * p["gain"]

    params = {"w": jnp.ones((4, 3)) / 4, "bias": jnp.zeros(3), "gain": jnp.ones(())}
    x = jnp.ones((2, 4))
    plan = lora.plan(fn, params, x, rules={"w": lora.Lora(rank=1), "bias|gain": lora.Full()})
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    merged = lora.merge(params, adapters)
    assert {path: leaf.shape for path, leaf in merged.items()} == {path: leaf.shape for path, leaf in params.items()}
    assert_trees_close(lora.lora_apply(fn)(params, adapters, x), fn(merged, x))


def test_rank_may_depend_on_path_and_shape():
    case = next(c for c in MODELS if c.name == "two_layers")
    plan = case.plan(lora.Lora(rank=lambda path, shape: 1 if path.endswith("1") else min(shape)))
    ranks = {path: target.abstract().a.shape[-1] for path, target in plan.items()}
    assert ranks == {path: 1 if path.endswith("1") else min(case.params()[path].shape) for path in plan}


def test_rslora_keeps_its_scale_as_the_rank_grows():
    """|A B| of random factors grows as sqrt(r): alpha / sqrt(r) makes it flat, alpha / r lets it fall."""

    def size(rule, r):
        a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (64, r)), (1, (r, 64))))
        return float(jnp.linalg.norm(a @ b) * rule(rank=r, alpha=1).scale)

    ranks = np.array([4, 16, 64, 256])
    slopes = [
        np.polyfit(np.log(ranks), np.log([size(rule, r) for r in ranks]), 1)[0] for rule in (lora.RsLora, lora.Lora)
    ]
    np.testing.assert_allclose(slopes, [0, -0.5], atol=0.05)


def test_vera_shares_one_pair_of_projections():
    """However many layers use them, and also where these are scanned: a program holds each once, an adapter none."""
    layers, d, r = 5, 24, 7

    def unrolled(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p["w"][i])
        return x.sum()

    def separate(p, x):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return x.sum()

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0].sum()

    stacked, x = {"w": jnp.ones((layers, d, d)) / d}, jnp.ones((3, d))
    unstacked = {f"w{i}": w for i, w in enumerate(stacked["w"])}
    for fn, params in ((unrolled, stacked), (separate, unstacked), (scanned, stacked)):
        adapters = lora.init(jax.random.key(0), params, lora.plan(fn, params, x, rules={"w.*": lora.Vera(rank=r)}))
        assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == layers * (r + d)
        gradient = jax.jit(jax.grad(lambda a, p, x: lora.lora_apply(fn)(p, a, x)))  # noqa: B023
        program, text = jax.make_jaxpr(gradient)(adapters, params, x), gradient.lower(adapters, params, x).as_text()
        held = Counter(re.findall(r'dense<"0x.*> : (tensor<.*>)', text))
        assert {*held} == {f"tensor<{d}x{r}xf32>", f"tensor<{r}x{d}xf32>"}
        # Newer versions of JAX keep constants in the body of a scan, and so in that of its derivative too.
        assert held.total() <= (3 if fn is scanned else 2), held
        copies = Counter(e.primitive.name for e in equations(program) if (layers, d, r) in shapes_out(e))
        assert not copies, "no layer has a projection of its own"


def shapes_out(eqn):
    return [v.aval.shape for v in eqn.outvars]


def test_vera_draws_what_hf_peft_draws():
    tensors = load_file(DATA / "vera" / "adapter_model.safetensors")
    a, b = shared_projections(0, 4, 10, 10)
    np.testing.assert_array_equal(a.T, tensors["base_model.vera_A"])
    np.testing.assert_array_equal(b.T, tensors["base_model.vera_B"])


def test_vera_is_as_wide_as_the_widest_weight_of_its_rule():
    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"] @ p["other"]

    params = {"up": jnp.ones((4, 9)), "down": jnp.ones((9, 5)), "other": jnp.ones((5, 11))}
    rules = {"up|down": lora.Vera(rank=3), "other": lora.Vera(rank=3, seed=1)}
    plan = lora.plan(fn, params, jnp.ones((2, 4)), rules=rules)
    assert {path: target.rule.widths for path, target in plan.items()} == {
        "up": (9, 9),
        "down": (9, 9),
        "other": (5, 11),
    }
    with pytest.raises(lora.LoraError, match="no room for 9 inputs and 5 outputs"):
        lora.plan(fn, params, jnp.ones((2, 4)), rules={"up|down": lora.Vera(rank=3, widths=(8, 9))})
    with pytest.raises(lora.LoraError, match=r"lora\.plan"):
        lora.Vera(rank=3).init(jax.random.key(0), params["up"], plan["up"].axes)


def tied(p, ids):
    return jnp.tanh(p["table"][ids]) @ p["table"].T @ p["head"]


def test_rows_are_trained_and_no_others():
    params = {
        "table": jax.random.normal(jax.random.key(0), (9, 4)),
        "head": jax.random.normal(jax.random.key(1), (9, 5)),
    }
    ids = jnp.array([[1, 5, 7], [5, 5, 0]])
    plan = lora.plan(tied, params, ids, rules={"table": lora.Rows((5, 2)), "head": lora.Rows([3], axis=1)})
    adapters = lora.init(jax.random.key(2), params, plan)
    apply = lora.lora_apply(tied)
    np.testing.assert_array_equal(apply(params, adapters, ids), tied(params, ids))
    adapters = trained(adapters, 1)
    merged = lora.merge(params, adapters)
    np.testing.assert_array_equal(merged["table"][jnp.array([5, 2])], adapters["table"].values)
    np.testing.assert_array_equal(merged["head"][:, 3], adapters["head"].values[0])
    kept = [i for i in range(9) if i not in (5, 2)]
    np.testing.assert_array_equal(merged["table"][np.array(kept)], params["table"][np.array(kept)])

    def loss(adapters, through):
        return total(apply(params, adapters, ids) if through == "apply" else tied(lora.merge(params, adapters), ids))

    found, expected = (jax.value_and_grad(loss)(adapters, through) for through in ("apply", "merge"))
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)
    program = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(adapters, "apply")
    assert not formed(program, (9, 4)), "the table is not copied"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lora.Rows(()), "different whole numbers"),
        (lambda: lora.Rows((1, 1)), "different whole numbers"),
        (lambda: lora.Rows((-1,)), "different whole numbers"),
        (lambda: lora.Rows((0.5,)), "different whole numbers"),
        (lambda: lora.Rows((1,), axis=2), "axis 0 or 1"),
        (lambda: lora.Vera(rank=0), "rank"),
        (lambda: lora.Vera(rank=4, seed=-1), "seed"),
        (lambda: lora.Vera(rank=4, start=float("nan")), "finite"),
        (lambda: lora.Vera(rank=lambda path, shape: 4), "whole number"),
        (lambda: lora.Lokr(rank=4, factor=0), "factor"),
        (lambda: lora.Ia3(dtype=int), "dtype"),
    ],
)
def test_rules_that_cannot_be(make, says):
    with pytest.raises(lora.LoraError, match=says):
        make()


def test_rows_that_a_table_lacks():
    params = {"table": jnp.ones((9, 4)), "head": jnp.ones((9, 6))}
    for rule, says in ((lora.Rows((9,)), "has 9 rows"), (lora.Rows((5,), axis=1), "has 4 rows")):
        with pytest.raises(lora.LoraError, match=says):
            lora.plan(tied, params, jnp.array([1]), rules={"table": rule})
    stacked = {"w": jnp.ones((3, 4, 4))}
    with pytest.raises(lora.LoraError, match="table of two axes"):
        lora.plan(
            lambda p, x: jnp.einsum("eb,ebk->ek", x, p["w"]), stacked, jnp.ones((3, 4)), rules={"w": lora.Rows((1,))}
        )


def test_lokr_takes_sizes_apart_near_their_square_root():
    rule = lora.Lokr(rank=2)
    assert rule.sides(384, 1536) == (16, 24, 32, 48)
    assert rule.sides(7, 12) == (1, 7, 3, 4)
    assert lora.Lokr(rank=2, factor=8).sides(384, 36) == (8, 48, 6, 6)


def test_orthogonality_is_the_mean_distance():
    axes = lora.KernelAxes((), (0,), (1,))
    a, b = jnp.eye(4)[:, :2], 2 * jnp.eye(3)[:2]
    adapters = {"w": lora.AdaLoraAdapter(a, jnp.zeros(2), b, axes, 1.0)}
    np.testing.assert_allclose(lora.orthogonality(adapters), (0 + 3 * np.sqrt(2)) / 2, rtol=1e-6)
    with pytest.raises(lora.LoraError, match="AdaLora"):
        lora.orthogonality({})


# A kind of one's own --------------------------------------------------------------------------------------------------


def own_kind(register=True, **members):
    """A class such as a user may write it: W' = W + A B, changed in some way."""
    layout = {"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")}
    annotations = {"a": jax.Array, "b": jax.Array, "axes": lora.KernelAxes} | members.pop("annotations", {})
    body = {
        "__annotations__": annotations,
        "axes": dataclasses.field(metadata={"static": True}),
        "layout": MappingProxyType(layout),
        "to_lora": lambda self: lora.LoraAdapter(self.a, self.b, self.axes, 1.0),
        "__module__": __name__,
    }
    body = {name: value for name, value in (body | members).items() if value is not None}
    kind = dataclasses.dataclass(frozen=True)(type("OwnAdapter", (lora.Factored,), body))
    return lora.register_kind("own")(kind) if register else kind


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"layout": None}, "layout is None, expected a tuple of groups"),
        ({"layout": {"a": ["inputs", "rank"], "b": ["rank", "outputs"]}}, "expected a tuple of groups of axes"),
        ({"layout": {"a": ("stack", "inputs", "rank")}}, "has the arrays .* and a layout of .*'a'"),
        ({"layout": {"a": ("stack", "input", "rank"), "b": ("stack", "rank", "outputs")}}, "none along the inputs or"),
        ({"frozen": ("A",)}, r"frozen is \('A',\), expected a tuple of some of its arrays"),
        ({"frozen": "ba"}, "frozen is 'ba', expected a tuple"),
        (
            {"annotations": {"kind": str}, "kind": dataclasses.field(default="x", metadata={"static": True})},
            "`axes` among them and none `kind`",
        ),
    ],
)
def test_a_kind_that_cannot_be_registered(members, says):
    with pytest.raises(lora.LoraError, match=says):
        own_kind(**members)
    assert "own" not in KINDS_BY_NAME


def test_registering_says_what_is_wrong():
    with pytest.raises(lora.LoraError, match="give the name of the kind"):
        lora.register_kind(own_kind(register=False))
    with pytest.raises(lora.LoraError, match="LoraAdapter has that name already"):
        lora.register_kind("lora")(own_kind(register=False))
    with pytest.raises(lora.LoraError, match=r"is for a dataclass of lora\.Adapter"):
        lora.register_kind("own")(object)


def test_a_kind_that_is_not_registered_or_was_defined_again(tmp_path):
    axes = lora.KernelAxes((), (0,), (1,))

    def rule_of(kind):
        class Own(lora.Lora):
            def init(self, key, w, axes):
                return kind(jnp.ones((w.shape[0], 1)), jnp.ones((1, w.shape[1])), axes)

        return Own(rank=1)

    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    unknown = own_kind(register=False)
    with pytest.raises(lora.LoraError, match="OwnAdapter is no registered kind of adapter"):
        lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": rule_of(unknown)})
    with pytest.raises(lora.LoraError, match="OwnAdapter is no registered kind of adapter"):
        lora.lora_apply(lambda p, x: x @ p["w"])(params, {"w": unknown(jnp.ones((4, 1)), jnp.ones((1, 3)), axes)}, x)
    try:
        old = own_kind()(jnp.ones((4, 1)), jnp.ones((1, 3)), axes)
        own_kind()
        with pytest.raises(lora.LoraError, match="defined again since this adapter was made"):
            lora.checkpoint.save(tmp_path / "adapters", {"w": old})
    finally:
        KINDS_BY_NAME.pop("own", None)
    dropped = lora.with_dropout({"w": lora.LoraAdapter(old.a, old.b, axes, 1.0)}, jax.random.key(0))
    with pytest.raises(lora.LoraError, match="take the adapters as they were before"):
        lora.checkpoint.save(tmp_path / "adapters", dropped)


def test_sums_are_of_all_that_is_lora():
    case = next(c for c in MODELS if c.name == "two_layers")
    params = case.params()
    one, two = case.adapters(KINDS["adalora"]), case.adapters(KINDS["lora_fa"])
    both = lora.merge(params, lora.combine([(one, 1.0), (two, 1.0)]))
    each = [lora.merge(params, a) for a in (one, two)]
    expected = jax.tree.map(lambda w, a, b: a + b - w, params, *each)
    assert_trees_close(both, expected, rtol=1e-5, atol=1e-5)
