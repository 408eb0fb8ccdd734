"""Every kind of adapter: the laws, over programs that use weights in each way."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, Case, assert_trees_close, assert_trees_equal, eight_devices, formed, total, trained
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.key_maps import KeyMap, linear

DATA = Path(__file__).parent / "data" / "peft"

KINDS = {
    "rslora": lora.RsLora(rank=2, alpha=3),
    "lora_fa": lora.LoraFa(rank=2, alpha=3),
    "dora": lora.Dora(rank=2, alpha=3),
    "loha": lora.Loha(rank=2, alpha=3),
    "adalora": lora.AdaLora(rank=2, alpha=3),
    "full": lora.Full(),
}
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
    arrays = {name: np.asarray(getattr(adapter, name), np.float64) for name in adapter.layout}
    canonical = w.transpose([*stack, *inputs, *outputs])
    shape = canonical.shape
    n, n_in = len(stack), len(inputs)
    matrix = canonical.reshape(*shape[:n], int(np.prod(shape[n : n + n_in])), -1)

    def product(a, b):
        return a.reshape(*a.shape[:n], -1, a.shape[-1]) @ b.reshape(*b.shape[: n + 1], -1)

    if isinstance(adapter, lora.LohaAdapter):
        delta = product(arrays["a1"], arrays["b1"]) * product(arrays["a2"], arrays["b2"])
    elif isinstance(adapter, lora.AdaLoraAdapter):
        e = arrays["e"].reshape(*arrays["e"].shape, *[1] * len(outputs))
        delta = product(arrays["a"], e * arrays["b"])
    else:
        delta = product(arrays["a"], arrays["b"])
    changed = matrix + adapter.scale * delta
    if isinstance(adapter, lora.DoraAdapter):
        m = arrays["m"].reshape(*arrays["m"].shape[:n], 1, -1)
        changed = changed * m / np.linalg.norm(changed, axis=-2, keepdims=True)
    order = [*stack, *inputs, *outputs]
    return changed.reshape(shape).transpose([order.index(i) for i in range(len(order))])


@kinds
@cases
def test_merging_is_the_formula(kind, case):
    params, adapters = case.params(), case.adapters(KINDS[kind])
    for path, merged in lora.merge(params, adapters).items():
        if path in adapters:
            np.testing.assert_allclose(merged, by_hand(params[path], adapters[path]), rtol=1e-5, atol=1e-5)


@kinds
@cases
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
def test_starting_is_identity(kind, case):
    params, x = case.params(), case.input()
    adapters = lora.init(jax.random.key(0), params, case.plan(KINDS[kind]))
    assert_trees_close(lora.merge(params, adapters), params, rtol=1e-6, atol=1e-6)
    assert_trees_close(lora.lora_apply(case.fn)(params, adapters, x), case.fn(params, x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
@cases
def test_factored_stays_factored(kind, case: Case):
    params, x, adapters = case.params(), case.input(), case.adapters(KINDS[kind])
    apply = lora.lora_apply(case.fn)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(apply(p, a, x))))(adapters, params)
    base = jax.make_jaxpr(jax.value_and_grad(lambda x, p: total(case.fn(p, x))))(x, params)
    for name in adapters:
        shape = params[name].shape
        assert Counter(formed(program, shape)) <= Counter(formed(base, shape)), name


@kinds
@pytest.mark.parametrize("name", [c.name for c in MODELS if c.dtype == jnp.float32])
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


def test_kinds_mix_in_one_model_with_dropout_and_vmap():
    case = next(c for c in MODELS if c.name == "two_layers")
    params, x = case.params(), case.input()
    first, *others = [path for path in params if path.startswith("w")]
    rules = {first: lora.Dora(rank=2), "|".join(others): lora.Loha(rank=2)}
    plan = lora.plan(case.fn, params, x, rules=rules)
    assert "Dora(rank=2, alpha=None)" in str(plan)
    one, two = (trained(lora.init(jax.random.key(i), params, plan), i) for i in (1, 2))
    apply = lora.lora_apply(case.fn)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    found = jax.vmap(apply, in_axes=(None, 0, None))(params, stacked, x)
    assert_trees_close(found, jnp.stack([apply(params, one, x), apply(params, two, x)]))
    dropped = apply(params, lora.with_dropout(one, jax.random.key(0), 0.5), x)
    assert jnp.isfinite(dropped).all()
    assert not np.allclose(dropped, found[0])


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


def from_torch(tensors, module):
    """The adapter of a linear module from what HF PEFT calls its arrays."""
    arrays = {
        name.removeprefix(f"{module}.").removesuffix(".weight").removesuffix(".default"): jnp.asarray(tensor.T)
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }
    axes = lora.KernelAxes((), (0,), (1,))
    if "hada_w1_a" in arrays:
        names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
        return lora.LohaAdapter(*(arrays[name] for name in names), axes, 2.0)
    a, b, m = (arrays[name] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    return lora.DoraAdapter(a, b, m, axes, 2.0)


@pytest.mark.parametrize("name", ["dora_sgd", "dora_adamw", "loha_adamw"])
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
            assert_trees_close(grads, grad0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, tensors["losses"], rtol=1e-5, atol=1e-5)
    assert_trees_close(adapters, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rslora", "lora_fa", "loha", "adalora"])
def test_saving_to_peft_writes_the_lora_that_it_is(kind, tmp_path):
    case = next(c for c in MODELS if c.name == "two_layers")
    params, adapters = case.params(), case.adapters(KINDS[kind])
    key_map = KeyMap(*(linear(path, path) for path in adapters))
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    found, _ = lora.load_peft(tmp_path / "peft", params, key_map)
    assert_trees_close(lora.merge(params, found), lora.merge(params, adapters), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "full"])
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


def test_orthogonality_is_the_mean_distance():
    axes = lora.KernelAxes((), (0,), (1,))
    a, b = jnp.eye(4)[:, :2], 2 * jnp.eye(3)[:2]
    adapters = {"w": lora.AdaLoraAdapter(a, jnp.zeros(2), b, axes, 1.0)}
    np.testing.assert_allclose(lora.orthogonality(adapters), (0 + 3 * np.sqrt(2)) / 2, rtol=1e-6)
    with pytest.raises(lora.LoraError, match="AdaLora"):
        lora.orthogonality({})
