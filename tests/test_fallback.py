"""What cannot stay factored: refused by default, with all that the user needs to know; formed where it is asked for."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import D, K, assert_trees_close, formed, total

import lora_jax as lora
from lora_jax import Lora, LoraError
from lora_jax.transform import materialize as module_of_materialize

W, X = jax.random.normal(jax.random.key(0), (D, K)), jax.random.normal(jax.random.key(1), (3, D))
PARAMS = {"w": W}


def linear(params, x):
    return x @ params["w"]


def some_adapters(params, x, fn):
    plan = lora.plan(fn, params, x, rules={".*": Lora(2, alpha=3)}, materialize=True)
    return jax.tree.map(lambda a: a + 0.2, lora.init(jax.random.key(0), params, plan))


ADAPTERS = some_adapters(PARAMS, X, linear)


@jax.custom_vjp
def half_gradient(w, x):
    return x @ w


half_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (0.5 * res[1].T @ g, g @ res[0].T))


@jax.custom_jvp
def softsign(w):
    return w / (1 + jnp.abs(w))


softsign.defjvp(lambda p, t: (softsign(*p), 2 * t[0]))

PROGRAMS = [
    (lambda p, x: x @ (p["w"] + 1), "add"),
    (lambda p, x: x @ (p["w"] * jnp.arange(K)[None]), "mul"),
    (lambda p, x: x @ (1 / p["w"]), "div"),
    (lambda p, x: x.sum() + p["w"].sum(), "reduce_sum"),
    (lambda p, x: x[:, :K] @ p["w"].reshape(K, D), "reshape|dot_general"),
    (lambda p, x: p["w"].at[0].set(0.0) + x.sum(), "scatter"),
    (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), "tile"),
    (lambda p, x: jnp.where(x.sum() > 0, p["w"], 0.0) * x.sum(), "select_n"),
    (lambda p, x: jax.lax.scan(lambda c, _: (2 * c, x @ c), p["w"], length=2)[1], "scan"),
    (lambda p, x: jax.lax.scan(lambda c, w: (c + w.sum(), None), 0.0, p["w"])[0] + x.sum(), "scan|reduce_sum"),
    (lambda p, x: jax.lax.scan(lambda c, _: (c, p["w"]), x.sum(), length=2)[1], "scan"),
    (lambda p, x: x @ jax.lax.fori_loop(0, x.astype(int)[0, 0] + 2, lambda _, w: w + 1, p["w"]), "while"),
    (lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: 0 * w, p["w"]), "cond"),
    (lambda p, x: jax.jit(lambda w: x @ jnp.tanh(w))(p["w"]), "tanh"),
    (lambda p, x: p["w"].T @ p["w"] + 0 * x.sum(), "dot_general"),
    (lambda p, x: x @ softsign(p["w"]), "custom_jvp_call"),
    (lambda p, x: half_gradient(p["w"], x), "custom_vjp_call"),
    (lambda p, x: x @ p["w"].astype(jnp.int8).astype(jnp.float32), "convert_element_type"),
    (lambda p, x: x @ jnp.sort(p["w"]), "sort"),
]
programs = pytest.mark.parametrize(
    ("fn", "primitive"), PROGRAMS, ids=[f"{primitive}-{i}" for i, (_, primitive) in enumerate(PROGRAMS)]
)


@programs
def test_refused_by_name(fn, primitive):
    """The path, the operation, the user's line, and what to do; before any work, by the plan."""
    with pytest.raises(LoraError) as error:
        lora.lora_apply(fn)(PARAMS, ADAPTERS, X)
    message = str(error.value)
    assert message.startswith("'w' cannot stay factored")
    assert re.search(f"`({primitive})` at", message)
    assert "test_fallback.py" in message
    assert "lora.merge(" in message
    assert "materialize='w'" in message
    with pytest.raises(LoraError, match=r"1 weight\(s\) that cannot be adapted") as planned:
        lora.plan(fn, PARAMS, X, rules={"w": Lora(2)})
    assert re.search(f"`({primitive})` at", str(planned.value))
    assert "materialize='w'" in str(planned.value)


@programs
@pytest.mark.sampled(5)
def test_formed_where_it_is_allowed(fn, primitive):
    """Then applying is merging again, gradients through the user's own derivative rules included."""
    apply = lora.lora_apply(fn, materialize="w|v")

    def value_and_grad(fn):
        return jax.value_and_grad(lambda a: total(fn(a)), allow_int=True)

    both = [lambda a: apply(PARAMS, a, X), lambda a: fn(lora.merge(PARAMS, a), X)]
    if primitive == "while":  # JAX has no reverse mode through it
        found, expected = (f(ADAPTERS) for f in both)
    else:
        found, expected = jax.jit(lambda a: tuple(value_and_grad(f)(a) for f in both))(ADAPTERS)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)
    plan = lora.plan(fn, PARAMS, X, rules={"w": Lora(2)}, materialize="w")
    assert re.search(f"`({primitive})` at", plan["w"].materialized[0])
    assert "'w' is formed at full size: `" in str(plan)


def test_only_what_is_allowed_is_formed():
    """v is normalised, w is not: w stays factored."""
    params = {"v": jnp.ones((D, D)), "w": W}

    def fn(p, x):
        return jnp.tanh(x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True))) @ p["w"]

    rules = {".*": Lora(2)}
    with pytest.raises(LoraError, match=r"1 weight\(s\).*\n  'v': float32\[12, 12\]: `"):
        lora.plan(fn, params, X, rules=rules)
    with pytest.raises(LoraError, match="'v'"):
        lora.plan(fn, params, X, rules=rules, materialize="w")
    plan = lora.plan(fn, params, X, rules=rules, materialize=["v"])
    assert plan["w"].materialized == ()
    adapters = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(0), params, plan))
    apply = lora.lora_apply(fn, materialize=["v"])
    assert not formed(jax.make_jaxpr(apply)(params, adapters, X), W.shape)
    assert_trees_close(apply(params, adapters, X), fn(lora.merge(params, adapters), X))


def test_a_weight_that_is_only_formed():
    """It is in no product: all its axes but the last are inputs of its factors."""
    params = {"w": jnp.ones((3, 4, 5))}
    plan = lora.plan(lambda p, x: jnp.tanh(p["w"]) * x, params, 1.0, rules={"w": Lora(2)}, materialize=True)
    assert plan["w"].axes == lora.KernelAxes((), (0, 1), (2,))
    assert plan["w"].flops() == 0


def test_a_use_along_other_axes_can_be_formed():
    params = {"w": jax.random.normal(jax.random.key(2), (D, 3, 4))}

    def two_ways(params, x):
        return jnp.einsum("td,dhk->thk", x, params["w"]).sum() + jnp.einsum("th,dhk->tdk", x[:, :3], params["w"])

    adapters = some_adapters(params, X, two_ways)
    found = lora.lora_apply(two_ways, materialize=True)(params, adapters, X)
    assert_trees_close(found, two_ways(lora.merge(params, adapters), X), rtol=1e-4)


def test_returning_the_weight_is_refused():
    def fn(p, x):
        return x @ p["w"], p["w"]

    with pytest.raises(LoraError, match="'w' cannot stay factored: the function returns it"):
        lora.lora_apply(fn)(PARAMS, ADAPTERS, X)
    _, returned = lora.lora_apply(fn, materialize=True)(PARAMS, ADAPTERS, X)
    assert_trees_close(returned, lora.merge(PARAMS, ADAPTERS)["w"])


def test_two_adapted_weights_do_not_multiply():
    params = {"w": W, "v": jnp.ones((K, 3))}
    adapters = some_adapters(params, X, lambda p, x: x @ p["w"] @ p["v"])
    with pytest.raises(LoraError, match=r"'w' cannot stay factored.*another adapted weight, 'v'"):
        lora.lora_apply(lambda p, x: x @ (p["w"] @ p["v"]))(params, adapters, X)


def test_a_use_along_other_axes_is_refused():
    params = {"w": jnp.ones((D, 3, 4))}
    adapters = some_adapters(params, X, lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]))
    with pytest.raises(
        LoraError, match="with inputs 1, outputs 0 2, but its adapter was made for inputs 0, outputs 1 2"
    ):
        lora.lora_apply(lambda p, x: jnp.einsum("th,dhk->tdk", x[:, :3], p["w"]))(params, adapters, X)


def test_a_weight_behind_stop_gradient_only():
    with pytest.raises(LoraError, match=r"'w': float32\[12, 10\] is used behind `stop_gradient` only.*never train"):
        lora.plan(lambda p, x: x @ jax.lax.stop_gradient(p["w"]), PARAMS, X, rules={"w": Lora(2)})


def test_the_line_of_a_call_stands_for_one_inside_jax():
    with pytest.raises(LoraError, match=r"`reduce_sum` at .*test_fallback.py"):
        lora.plan(lambda p, x: x @ p["w"] / jnp.var(p["w"]), PARAMS, X, rules={"w": Lora(2)})


def test_patterns_are_checked_once_for_each_set_of_paths(monkeypatch):
    """Not at every call, which may be one of a loop; and again for other parameters."""
    seen = []
    check = module_of_materialize.first_match
    monkeypatch.setattr(
        module_of_materialize, "first_match", lambda *args, **kw: seen.append(args[1]) or check(*args, **kw)
    )
    apply = lora.lora_apply(linear, materialize="w")
    for _ in range(3):
        apply(PARAMS, ADAPTERS, X)
    apply(PARAMS | {"other": X}, ADAPTERS, X)
    apply(PARAMS, ADAPTERS, X)
    assert seen == [["w"], ["other", "w"]]
    with pytest.raises(LoraError, match="materialize: the pattern 'w' matches no parameter"):
        apply({"v": W}, {"v": ADAPTERS["w"]}, X)


@pytest.mark.parametrize("materialize", ["(", 3, [1], None])
def test_bad_patterns(materialize):
    for call in (lora.lora_apply, lambda fn, **kw: lora.plan(fn, PARAMS, X, rules={"w": Lora(2)}, **kw)):
        with pytest.raises(LoraError, match="neither True, nor False, nor regular expressions for whole paths"):
            call(linear, materialize=materialize)
