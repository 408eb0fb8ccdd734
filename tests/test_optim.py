"""Optimizers for adapters: which arrays move, how fast, what is decayed, and what the gradients are multiplied by."""

import dataclasses
import functools
import itertools
import operator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins
from helpers import KINDS, MODELS, RULES
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.training.lora_plus import lora_plus
from lora_jax.training.masks import decay_mask, freeze_base, labels, trainable_mask
from lora_jax.training.preconditioners import lora_fa, lora_fa_gradient, riemannian

TRAIN = Path(__file__).parent / "data" / "peft" / "train"

# Weights with one matrix, several inputs and outputs, and stacks, as (shape, axes).
WEIGHTS = {
    "plain": ((6, 5), lora.KernelAxes((), (0,), (1,))),
    "heads": ((3, 5, 4), lora.KernelAxes((), (0, 2), (1,))),
    "layers": ((2, 6, 3, 4), lora.KernelAxes((0,), (1,), (2, 3))),
    "layers_of_experts": ((2, 6, 3, 7), lora.KernelAxes((0, 2), (3,), (1,))),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gain(lora.Adapter):
    """Another kind, in which much is not as in LoRA: W' = W diag(1 + gain) + table B, with a frozen table."""

    gain: jax.Array  # [*stack, *outputs]
    table: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: lora.KernelAxes = field(metadata={"static": True})

    layout = MappingProxyType(
        {
            "gain": ("stack", "outputs"),
            "table": ("stack", "inputs", "rank"),
            "b": ("stack", "rank", "outputs"),
        }
    )
    frozen = ("table",)

    def merge(self, w):
        return w * (1 + self.gain)[None] + self.table @ self.b

    def lower(self, w):
        return self.merge(w)


def low_rank(shape, axes, key, dtype=jnp.float32, rank=2, scale=1.5):
    stack, inputs, outputs = axes.sizes(shape)
    for_a, for_b = jax.random.split(key)
    a = jax.random.normal(for_a, (*stack, *inputs, rank), dtype)
    return lora.LoraAdapter(a, jax.random.normal(for_b, (*stack, rank, *outputs), dtype), axes, scale)


def pairs(key=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(key), len(WEIGHTS))
    return {path: low_rank(*WEIGHTS[path], k, dtype) for path, k in zip(WEIGHTS, keys, strict=True)}


def everything(key=0):
    """Adapters of two kinds, and a head beside them."""
    gain, table, b, kernel, bias = jax.random.split(jax.random.key(key), 5)
    normal = jax.random.normal
    other = Gain(normal(gain, (5,)), normal(table, (6, 2)), normal(b, (2, 5)), WEIGHTS["plain"][1])
    head = {"kernel": normal(kernel, (5, 3)), "bias": normal(bias, (3,))}
    return {"adapters": {**pairs(key), "gain": other}, "head": head}


def with_base(key=0):
    """The same beside the base that one of the adapters is of: a weight at the adapter's path, and a bias."""
    kernel, bias = jax.random.split(jax.random.key(key))
    return {
        **everything(key),
        "base": {"plain": jax.random.normal(kernel, (6, 5)), "bias": jax.random.normal(bias, (5,))},
    }


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def train(optimizer, tree, steps=3, jit=True):
    """Some steps with gradients that do not depend on the parameters."""
    update, state = jax.jit(optimizer.update) if jit else optimizer.update, optimizer.init(tree)
    for step in range(steps):
        gradients = with_base if "base" in tree else everything if "head" in tree else pairs
        updates, state = update(gradients(100 + step), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def assert_close(found, expected, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, **tolerances)


# Labels and masks -----------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_first_pattern():
    found = by_path(labels(everything(), {"adapters/plain/a": "none", ".*/b": "fast", "head/.*": "head"}, "slow"))
    assert {path: found[path] for path in found if "layers" not in path} == {
        "adapters/plain/a": "none",
        "adapters/plain/b": "fast",
        "adapters/plain/ratio": "freeze",
        "adapters/heads/a": "slow",
        "adapters/heads/b": "fast",
        "adapters/heads/ratio": "freeze",
        "adapters/gain/gain": "slow",
        "adapters/gain/table": "freeze",
        "adapters/gain/b": "fast",
        "head/kernel": "head",
        "head/bias": "head",
    }
    assert labels({"lin/kernel": pairs()["plain"]}, {"lin/kernel/[ab]": "x"})["lin/kernel"].b == "x"


def test_labels_partition_a_tree():
    tree = everything()
    rates = {"fast": optax.sgd(1.0), "slow": optax.sgd(0.5), "freeze": optax.set_to_zero()}
    rules = {".*/b": "fast", "head/bias": "freeze", ".*": "slow"}
    optimizer = optax.chain(optax.scale(2.0), optax.partition(rates, functools.partial(labels, rules=rules)))
    moved = by_path(jax.tree.map(jnp.subtract, tree, train(optimizer, tree, steps=1)))
    for path, gradient in by_path(everything(100)).items():
        rate = 2 if path.endswith("/b") else 0 if path.endswith(("table", "ratio", "head/bias")) else 1
        np.testing.assert_allclose(moved[path], rate * gradient, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({".*/c": "x", ".*": "y"}, r"'\.\*/c' matches no trained array.*the nearest are\n  adapters/"),
        ({"adapters/plian/a": "x", ".*": "y"}, r"'adapters/plian/a' matches no trained array.*\n  adapters/plain/a\n"),
        ({".*/table": "x", ".*": "y"}, r"'\.\*/table' matches no trained array"),
        ({".*": "x", ".*/b": "y"}, r"'\.\*/b' is never reached: all 5 arrays that it matches, 'adapters/gain/b' first"),
        ({".*/(a|b)": "x"}, r"no pattern matches 3 trained array\(s\):\n  adapters/gain/gain\n  head/bias\n  head/ker.*"
                            r"default='freeze'"),
        ({"*/b": "x"}, r"'\*/b' is not a regular expression: nothing to repeat"),
        ({3: "x"}, "3 is not a regular expression"),
        ([".*/b"], r"rules are a dict such as .* found \['\.\*/b'\]"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(rules, says):
    with pytest.raises(lora.LoraError, match=f"(?s)labels: .*{says}"):
        labels(everything(), rules)


def test_decay_is_for_matrices():
    marks = by_path(decay_mask(everything()))
    assert [path for path, decayed in marks.items() if not decayed and not path.endswith("ratio")] == [
        "adapters/gain/gain",
        "adapters/gain/table",
        "head/bias",
    ]
    assert not any(marks[f"adapters/{path}/ratio"] for path in WEIGHTS)
    # Decay is all there is to an update without gradients.
    tree = everything()
    optimizer = freeze_base(optax.adamw(0.1, weight_decay=0.5, mask=decay_mask), mask_of_all)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    for (path, update), array in zip(by_path(updates).items(), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(update, (-0.05 if marks[path] else 0) * array, rtol=1e-5, err_msg=path)


def test_what_is_frozen_by_default():
    """The base is known by the weights of the adapters in it; masks and labels agree on it."""
    tree = with_base()
    frozen = [path for path, trained in by_path(trainable_mask(tree)).items() if not trained]
    ratios = [f"adapters/{path}/ratio" for path in WEIGHTS]
    assert sorted(frozen) == sorted(["adapters/gain/table", "base/bias", "base/plain", *ratios])
    found = by_path(labels(tree, {".*/b": "fast"}, default="slow"))
    assert [path for path, label in found.items() if label == "freeze"] == frozen
    named = by_path(labels(tree, {"base/bias": "bias"}, default="slow"))
    assert (named["base/bias"], named["base/plain"]) == ("bias", "freeze")
    assert by_path(labels(tree, {"(adapters|head)/.*": "x"}))["base/plain"] == "freeze"  # which need no pattern
    # At the top, in another container, below another name, as NNX has it.
    adapters = {"a/kernel": pairs()["plain"]}
    weight, rest = jnp.ones((6, 5)), {"bias": jnp.ones(5)}
    for tree, base in [
        ({"lora": adapters, "a": {"kernel": weight, **rest}}, ["a/bias", "a/kernel"]),
        ({"lora": adapters, "p": [{"a": {"kernel": weight, **rest}}], "q": rest}, ["p/0/a/bias", "p/0/a/kernel"]),
        ({"lora": adapters, "p": {"a": {"kernel": {"value": weight}}}, "q": rest}, ["p/a/kernel/value"]),
        ({"lora": {"deep": adapters}, "p": {"a": {"kernel": weight}}, "q": rest}, ["p/a/kernel"]),
        ({"lora": adapters, "p": {"a": {"kernel": jnp.ones((6, 4))}}}, []),  # of another shape
        ({"lora": adapters, "p": {"kernel": weight}}, []),
        ({"lora": {**adapters, "head": adapters["a/kernel"]}, "head": weight}, []),  # a head in the place of one
        ({"one": adapters, "two": {"b": pairs()["plain"]}, "p": {"b": weight, **rest}, "q": rest}, ["p/b", "p/bias"]),
        (adapters, []),
    ]:
        marks = by_path(trainable_mask(tree))
        assert [path for path, trained in marks.items() if not trained and not path.endswith("/ratio")] == base
    packed = lora.bases.quantize({"a": {"kernel": weight}}, {".*": lora.bases.Int8()})
    assert not any(jax.tree.leaves(trainable_mask({"lora": adapters, "p": packed})["p"]))
    marks = trainable_mask({"lora": jax.tree.map(lambda a: a[None], adapters), "p": {"a": {"kernel": weight}}})
    assert marks["p"]["a"]["kernel"] is False  # several sets at once


def test_a_mask_may_freeze_a_part_as_a_whole():
    tree = everything()
    optimizer = freeze_base(optax.sgd(1.0), lambda tree: {**trainable_mask(tree), "head": False})
    moved = by_path(train(optimizer, tree, steps=1))
    for path, array in by_path(tree).items():
        assert (np.asarray(moved[path]) == array).all() == path.startswith("head") | path.endswith(
            ("table", "ratio")
        ), path


def by_masks(optimizer):
    def frozen(tree):
        return jax.tree.map(operator.not_, trainable_mask(tree))

    return optax.chain(optax.masked(optimizer, trainable_mask), optax.masked(optax.set_to_zero(), frozen))


def by_labels(optimizer):
    parts = {"train": optimizer, "freeze": optax.set_to_zero()}
    return optax.partition(parts, functools.partial(labels, rules={".*": "train"}))


@pytest.mark.parametrize("form", [by_labels, by_masks])
def test_two_more_ways_to_freeze(form):
    """They train as `freeze_base` does and leave the rest as it is, bit by bit; `optax.masked` alone does not."""
    tree, adam = with_base(), optax.adamw(1e-2, weight_decay=0.1)
    found, expected = (train(way(adam), tree) for way in (form, freeze_base))
    alone = by_path(train(optax.masked(adam, trainable_mask), tree))
    assert_close(found, expected, rtol=1e-6)
    for path, trained in by_path(trainable_mask(tree)).items():
        moved = np.asarray(by_path(found)[path]) != by_path(tree)[path]
        assert moved.all() if trained else not moved.any(), path
        assert trained or (np.asarray(alone[path]) != by_path(tree)[path]).any()


def all_kinds():
    """Adapters of each kind, each for the same base, and a head."""
    case = next(case for case in MODELS if case.name == "two_layers")
    adapters = {name: {"w1": case.adapters(rule)["w1"]} for name, rule in (RULES | KINDS).items()}
    dropped = lora.with_dropout(adapters["lora"], jax.random.key(0), 0.1)
    return {"adapters": {**adapters, "dropped": dropped, "gain": {"w1": everything()["adapters"]["gain"]}},
            "base": case.params(), "head": jnp.ones(3)}  # fmt: skip


@pytest.mark.parametrize("rules", [{".*": "x"}, {".*w1/b": "y", "head": "x", ".*": "z"}])
def test_labels_and_mask_freeze_the_same(rules):
    tree = all_kinds()
    marks, found = by_path(trainable_mask(tree)), by_path(labels(tree, rules))
    assert {path: label != "freeze" for path, label in found.items()} == marks
    assert not any(trained for path, trained in marks.items() if path.startswith("base/"))
    assert {"adapters/lora_fa/w1/a", "adapters/gain/w1/table"} <= {
        path for path, trained in marks.items() if not trained
    }
    assert by_path(labels(tree, rules | {"base/w1": "base"}))["base/w1"] == "base", "for what is named by itself"
    last = by_path(labels(tree, {"adapters/.*": "x", "head": "x", "base/w1": "base", ".*": "rest"}))
    assert (last["base/w1"], last["base/w2"], last["adapters/lora/w1/a"]) == ("base", "rest", "x")


@pytest.mark.parametrize("name", ["adamw", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_step_never_moves_frozen_arrays(name):
    """Whatever the optimizer does: decay all of them, or pass gradients on as updates."""
    adam = optax.adamw(1e-2, weight_decay=0.1)
    optimizer = {"adamw": adam, "masked": optax.masked(adam, trainable_mask)}[name]
    tree = all_kinds()["adapters"]
    del tree["dropped"]  # it holds a key

    def loss(trainable, params):
        return sum((array.astype(jnp.float32) ** 2).sum() for array in jax.tree.leaves(trainable))

    state = lora.TrainState.create(tree, optimizer)
    state, metrics = lora.jit_step(loss, optimizer)(state, {})
    marks, before, after = map(by_path, (trainable_mask(tree), tree, state.trainable))
    assert not all(marks.values())
    for path, trained in marks.items():
        moved = np.asarray(after[path]) != before[path]
        assert moved.all() if trained else not moved.any(), path
    squares = sum(4 * (np.asarray(before[path], np.float64) ** 2).sum() for path, trained in marks.items() if trained)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(squares), rtol=1e-5)  # of what is trained


def mask_of_all(tree):
    return {"adapters": trainable_mask(tree["adapters"]), "head": {"kernel": True, "bias": True}}


# LoRA+ ----------------------------------------------------------------------------------------------------------------


def test_lora_plus_is_two_optimizers():
    """What has outputs and no inputs learns faster, on a schedule too; each with its own rate in a closed form."""
    tree, schedule = everything(), optax.linear_schedule(0.1, 0.0, 5)
    found = by_path(train(lora_plus(optax.sgd, schedule, ratio=4.0), tree))
    gradients = [by_path(everything(100 + step)) for step in range(3)]
    for path, array in by_path(tree).items():
        rate = 0 if path.endswith(("table", "ratio")) else 4 if path.endswith(("/b", "/gain", "/bias")) else 1
        expected = array - sum(rate * float(schedule(i)) * gradient[path] for i, gradient in enumerate(gradients))
        np.testing.assert_allclose(found[path], expected, atol=1e-5, err_msg=path)


def test_lora_plus_of_ratio_1_is_the_optimizer():
    tree = everything()
    expected = freeze_base(optax.adamw(1e-2), mask_of_all)
    assert_close(train(lora_plus(optax.adamw, 1e-2, ratio=1), tree), train(expected, tree), rtol=1e-6)


@pytest.mark.parametrize("freeze", [freeze_base, lambda optimizer: optimizer], ids=["freeze_base", "by itself"])
def test_lora_plus_leaves_the_base_alone(freeze):
    """And trains the head, which is beside the adapters as the base is, and has none of their weights."""
    tree = with_base()
    moved = by_path(train(freeze(lora_plus(optax.adam, 1e-2)), tree))
    for path, array in by_path(tree).items():
        assert (np.asarray(moved[path]) == array).all() == path.startswith("base") | path.endswith(
            ("table", "ratio")
        ), path


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf"), True, None, "16"])
def test_lora_plus_checks_its_ratio(ratio):
    with pytest.raises(lora.LoraError, match=r"lora_plus\(ratio=.*expected a number above 0, such as ratio=16.0"):
        lora_plus(optax.sgd, 0.1, ratio)


# Preconditioning ------------------------------------------------------------------------------------------------------


def per_matrix(adapter, gradient, formula):
    """`formula(A, B, g_A, g_B)` at one matrix after the other, in fp64."""
    n, rank = len(adapter.axes.stack), adapter.a.shape[-1]
    arrays = [np.array(x, np.float64) for x in (adapter.a, adapter.b, gradient.a, gradient.b)]
    out_a, out_b = np.empty(adapter.a.shape), np.empty(adapter.b.shape)
    for at in itertools.product(*map(range, adapter.a.shape[:n])):
        a, b, grad_a, grad_b = (x[at] for x in arrays)
        new_a, new_b = formula(*(x.reshape(-1, rank) if i % 2 == 0 else x.reshape(rank, -1)
                                 for i, x in enumerate((a, b, grad_a, grad_b))))  # fmt: skip
        out_a[at], out_b[at] = new_a.reshape(a.shape), new_b.reshape(b.shape)
    return dataclasses.replace(gradient, a=out_a, b=out_b)


def riemannian_formula(a, b, grad_a, grad_b):
    eye = 0.1 * np.eye(a.shape[1])
    return grad_a @ np.linalg.inv(b @ b.T + eye), np.linalg.inv(a.T @ a + eye) @ grad_b


def lora_fa_formula(a, b, grad_a, grad_b):
    return 0 * grad_a, np.linalg.inv(a.T @ a + 1e-8 * np.eye(a.shape[1])) @ grad_b / 1.5**2


PRECONDITIONERS = {"riemannian": (riemannian(reg=0.1), riemannian_formula),
                   "lora_fa_gradient": (lora_fa_gradient(), lora_fa_formula)}  # fmt: skip


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioning_is_per_matrix(name, jit):
    transformation, formula = PRECONDITIONERS[name]
    tree, gradients = everything(), everything(1)
    update = jax.jit(transformation.update) if jit else transformation.update
    found, _ = update(gradients, transformation.init(tree), tree)
    for path in WEIGHTS:
        expected = per_matrix(tree["adapters"][path], gradients["adapters"][path], formula)
        assert_close(found["adapters"][path], expected, rtol=1e-4, atol=1e-5)
    # Nothing else is touched: other kinds of adapters, also with a field `b`, and heads.
    assert_close(found["head"], gradients["head"], rtol=0)
    assert_close(found["adapters"]["gain"], gradients["adapters"]["gain"], rtol=0)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioning_in_bf16_is_done_in_fp32(name):
    transformation, formula = PRECONDITIONERS[name]
    tree, gradients = pairs(dtype=jnp.bfloat16), pairs(1, jnp.bfloat16)
    found, _ = transformation.update(gradients, transformation.init(tree), tree)
    for path in WEIGHTS:
        expected = per_matrix(tree[path], gradients[path], formula)
        assert found[path].b.dtype == found[path].a.dtype == jnp.bfloat16
        to_fp32 = jax.tree.map(lambda x: x.astype(jnp.float32), found[path])
        assert_close(to_fp32, expected, rtol=2**-8, atol=1e-5)  # the rounding of the result alone


def test_riemannian_steps_do_not_depend_on_how_a_and_b_share_their_size():
    """(c A, B / c) makes the same W, and with preconditioned SGD goes on to the same W, where plain SGD does not."""
    key, axes = jax.random.key(0), WEIGHTS["plain"][1]
    start = low_rank((6, 5), axes, key)
    uneven = dataclasses.replace(start, a=10 * start.a, b=start.b / 10)
    target = jax.random.normal(key, (6, 5))

    def after(optimizer, adapter):
        grads = jax.grad(lambda it: ((it.merge(jnp.zeros((6, 5))) - target) ** 2).sum())(adapter)
        updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
        return optax.apply_updates(adapter, updates).merge(jnp.zeros((6, 5)))

    def distance(optimizer):
        return float(abs(after(optimizer, start) - after(optimizer, uneven)).max())

    with jax.default_matmul_precision("highest"):
        assert distance(optax.chain(riemannian(reg=1e-6), optax.sgd(0.1))) < 1e-4
        assert distance(optax.sgd(0.1)) > 1.0


def test_lora_fa_moves_w_as_near_to_its_gradient_as_it_can():
    """s A X = the projection of g_W onto the columns of A, for the X that stands for g_B."""
    adapter = low_rank((6, 5), WEIGHTS["plain"][1], jax.random.key(0))
    grad_w = jax.random.normal(jax.random.key(1), (6, 5))
    _, pull = jax.vjp(lambda it: it.merge(jnp.zeros((6, 5))), adapter)
    transformation = lora_fa_gradient()
    with jax.default_matmul_precision("highest"):
        found, _ = transformation.update(*pull(grad_w), transformation.init(adapter), adapter)
        nearest, *_ = np.linalg.lstsq(np.asarray(adapter.scale * adapter.a), np.asarray(grad_w))
    np.testing.assert_allclose(found.b, nearest, atol=1e-5)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("spoil", ["zero", "columns_alike", "huge"])
def test_preconditioning_stays_finite(name, spoil):
    """Where a factor is zero, as B at the start, or has columns that repeat, or is beyond what `reg` can damp."""
    change = {"zero": lambda x: 0 * x, "columns_alike": jnp.ones_like, "huge": lambda x: 1e8 * jnp.ones_like(x)}[spoil]
    tree = {path: dataclasses.replace(p, a=change(p.a), b=change(p.b)) for path, p in pairs().items()}
    transformation = PRECONDITIONERS[name][0]
    found, _ = transformation.update(pairs(1), transformation.init(tree), tree)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_lora_fa_is_adam_on_its_gradient():
    """In a closed form, with PEFT's place for eps, its decay and a schedule; A stays, heads and other kinds learn."""
    tree, schedule, eps = everything(), optax.linear_schedule(0.1, 0.0, 5), 1e-3
    found = by_path(train(lora_fa(schedule, eps=eps, weight_decay=0.5), tree))
    for path, array in by_path(tree).items():
        if path.endswith(("/a", "/table", "/ratio")):
            np.testing.assert_array_equal(found[path], array)
            continue
        w, m, v = np.asarray(array, np.float64), 0.0, 0.0
        for step in range(3):
            g = everything(100 + step)
            _, kind, field = (*path.split("/"), "")[:3]
            g = (per_matrix(tree["adapters"][kind], g["adapters"][kind], lora_fa_formula).b
                 if kind in WEIGHTS else np.asarray(by_path(g)[path], np.float64))  # fmt: skip
            m, v, t, lr = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, step + 1, float(schedule(step))
            w = w - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
            w = w * (1 - lr * 0.5) if field == "b" or path == "head/kernel" else w
        np.testing.assert_allclose(found[path], w, rtol=1e-4, atol=1e-4, err_msg=path)


def test_lora_fa_keeps_no_moments_of_a():
    tree = pairs()
    moments = [leaf.shape for leaf in jax.tree.leaves(lora_fa(1e-3).init(tree)) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [adapter.b.shape for adapter in tree.values()])


def test_lora_fa_computes_no_gradient_of_a():
    """As many FLOPs as where only B is differentiated."""
    adapter, optimizer = low_rank((32, 48), WEIGHTS["plain"][1], jax.random.key(0), rank=8), lora_fa(1e-3)

    def flops(gradient):
        def step(adapter, state, x):
            return optimizer.update(gradient(adapter, x), state, adapter)

        compiled = jax.jit(step).lower(adapter, optimizer.init(adapter), jnp.ones((64, 32))).compile()
        return compiled.cost_analysis()["flops"]

    def loss(b, adapter, x):
        return jnp.tanh((x @ adapter.a) @ b).sum()

    def of_both(adapter, x):
        return jax.grad(lambda it, x: loss(it.b, it, x))(adapter, x)

    def of_b(adapter, x):
        return dataclasses.replace(adapter, a=jnp.zeros_like(adapter.a), b=jax.grad(loss)(adapter.b, adapter, x))

    assert flops(of_both) == flops(of_b)


@pytest.mark.parametrize(
    ("optimizer", "freeze"),
    [
        (lora_plus(lambda rate: optax.adamw(rate, mask=decay_mask), 1e-2), freeze_base),
        (optax.chain(optax.clip_by_global_norm(1.0), riemannian(), optax.adamw(1e-2, mask=decay_mask)), freeze_base),
        (lora_fa(1e-2, weight_decay=0.1), lambda optimizer: optimizer),  # which freezes the base itself
    ],
    ids=["lora_plus", "riemannian", "lora_fa"],
)
def test_only_adapters_move(optimizer, freeze):
    """And what is trained beside them, with the base frozen, in a chain, compiled or not."""
    tree = with_base()
    optimizer = optax.chain(freeze(optimizer), optax.scale(0.5))
    found = train(optimizer, tree)
    assert_close(found, train(optimizer, tree, jit=False), rtol=1e-4, atol=1e-6)
    assert_close(found["base"], tree["base"], rtol=0)
    assert all(abs(found["head"][name] - array).min() > 0 for name, array in tree["head"].items())
    np.testing.assert_array_equal(found["adapters"]["gain"].table, tree["adapters"]["gain"].table)
    assert all(abs(found["adapters"][path].b - tree["adapters"][path].b).min() > 0 for path in WEIGHTS)


@pytest.mark.parametrize("optimizer", [lora_plus(optax.adam, 1e-2), optax.chain(riemannian(), optax.sgd(1e-2)),
                                       lora_fa(1e-2)], ids=["lora_plus", "riemannian", "lora_fa"])  # fmt: skip
def test_training_steps_take_them(optimizer):
    def model(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (6, 8)), "down": jax.random.normal(keys[1], (8, 3))}
    x = jax.random.normal(keys[2], (16, 6))
    adapters = {path: low_rank(w.shape, WEIGHTS["plain"][1], keys[2]) for path, w in params.items()}
    apply, y = lora.lora_apply(model), model(params | {"up": params["up"] + 0.3}, x)
    step = lora.jit_step(lambda it, params, x, y: ((apply(params, it, x) - y) ** 2).mean(), optimizer)
    state, losses = lora.TrainState.create(adapters, optimizer), []
    for _ in range(30):
        state, metrics = step(state, params, x, y)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", [0, -1e-2, float("nan"), None])
def test_riemannian_checks_its_reg(reg):
    with pytest.raises(lora.LoraError, match=r"riemannian\(reg=.*expected a number above 0, such as reg=0.01"):
        riemannian(reg)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioning_needs_both_factors(name):
    tree, (transformation, _) = pairs(), PRECONDITIONERS[name]
    with pytest.raises(lora.LoraError, match=f"{name} needs the factors.*pass params to update"):
        transformation.update(tree, transformation.init(tree))
    with pytest.raises(lora.LoraError, match=r"lora_fa_gradient\(dtype=.*give a floating dtype"):
        lora_fa_gradient(dtype=jnp.int8)

    masked = optax.masked(transformation, functools.partial(jax.tree.map, lambda leaf: leaf is tree["heads"].a))
    with pytest.raises(lora.LoraError, match=rf"{name} needs both factors of 'heads' and one.*chain\(lora.{name}\(\)"):
        masked.update(tree, masked.init(tree), tree)

    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)
    with pytest.raises(lora.LoraError, match=f"{name}: the adapter 'plain' has a of shape .2, 6, 2., expected 2 axes"):
        transformation.update({"plain": several["plain"]}, optax.EmptyState(), {"plain": several["plain"]})
    found, _ = jax.vmap(lambda g, p: transformation.update(g, optax.EmptyState(), p))(several, several)
    one, _ = transformation.update(tree, optax.EmptyState(), tree)
    assert_close(jax.tree.map(lambda leaf: leaf[1], found), one, rtol=1e-4, atol=1e-5)


# As in PEFT -----------------------------------------------------------------------------------------------------------


def distance_to_peft(name, optimizer):
    """How far five steps on PEFT's batches end from where PEFT's end: adapters, and losses."""
    tensors = load_file(TRAIN / f"{name}.safetensors")
    params = twins.from_torch({key[5:]: tensor for key, tensor in tensors.items() if key.startswith("base.")})

    def adapters(part):  # of rank 2, with alpha 4
        axes = WEIGHTS["plain"][1]
        factors = {lin: [jnp.asarray(tensors[f"{part}.{lin}.lora_{x}.default.weight"].T) for x in "AB"]
                   for lin in ("lin0", "lin1")}  # fmt: skip
        return {f"{lin}/kernel": lora.LoraAdapter(*pair, axes, 2.0) for lin, pair in factors.items()}

    @twins.broadcasting
    def model(p, x):
        return jnp.tanh(x @ p["lin0/kernel"] + p["lin0/bias"]) @ p["lin1/kernel"] + p["lin1/bias"]

    apply = lora.lora_apply(model)
    step = lora.jit_step(lambda it, params, x, y: ((apply(params, it, x) - y) ** 2).mean(), optimizer)
    state, losses = lora.TrainState.create(adapters("init"), optimizer), []
    with jax.default_matmul_precision("highest"):
        for x, y in zip(tensors["X"], tensors["Y"], strict=True):
            state, metrics = step(state, params, x, y)
            losses.append(float(metrics["loss"]))
    differences = jax.tree.map(lambda one, other: float(abs(one - other).max()), state.trainable, adapters("final"))
    return max(jax.tree.leaves(differences)), np.abs(losses - tensors["losses"]).max()


def test_lora_plus_is_as_in_peft():
    """PEFT's own groups have no weight decay unless it is asked for by another name."""
    assert max(distance_to_peft("loraplus_adamw", lora_plus(optax.adam, 1e-2, ratio=16.0))) < 1e-5


def test_lora_fa_is_as_in_peft():
    """With PEFT's rounding to bf16; without it, as near as that rounding lets it be."""
    assert max(distance_to_peft("lorafa", lora_fa(1e-2, dtype=jnp.bfloat16))) < 1e-5
    adapters, losses = distance_to_peft("lorafa", lora_fa(1e-2))
    assert 1e-5 < adapters < 2e-4
    assert losses < 1e-4
