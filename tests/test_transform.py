import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES, D, K, assert_trees_close, compilations, eight_devices, equations

import lora_jax as lora
from lora_jax import Lora, LoraError
from lora_jax.core.recent import Recent
from lora_jax.transform import apply as apply_module
from lora_jax.transform import materialize as materialize_module

CASES = {case.name: case for case in MODELS}
W, X = jnp.ones((D, K)), jnp.ones((3, D))


def linear(params, x):
    return x @ params["w"]


ADAPTERS = lora.init(jax.random.key(0), {"w": W}, lora.plan(linear, {"w": W}, X, rules={"w": Lora(2)}))


@pytest.mark.parametrize(
    ("params", "adapters", "says"),
    [
        ({"v": W}, ADAPTERS, ["'w'", "no such path", "'v'", "lora.plan"]),
        ({"w": jnp.ones((D, 4))}, ADAPTERS, ["'w'", f"[{D}, {K}]", f"[{D}, 4]", "another model"]),
        ({"w": W}, {"w": jnp.ones((2, 2))}, ["adapters['w']", "lora.init"]),
        ({"w": W}, [1], ["{path: adapter}", "list"]),
        ({"w": jnp.ones((D, K), jnp.int8)}, ADAPTERS, ["'w'", "int8", "an array of floats"]),
        ({"w": "frozen"}, ADAPTERS, ["'w'", "str", "an array of floats"]),
    ],
)
def test_adapters_of_another_model(params, adapters, says):
    for call in (lora.lora_apply(linear), lambda p, a, x: lora.merge(p, a)):
        with pytest.raises(LoraError) as error:
            call(params, adapters, X)
        assert all(part in str(error.value) for part in says), str(error.value)


def test_flags_strings_and_keywords_pass_through():
    def fn(params, x, activation, *, twice=False, skip=None):
        y = {"tanh": jnp.tanh, "none": lambda y: y}[activation](x @ params["w"])
        assert skip is None
        return {"y": 2 * y if twice else y, "none": None}

    apply = lora.lora_apply(fn)
    for activation, twice in (("tanh", True), ("tanh", False), ("none", 1), ("none", True)):
        found = apply({"w": W}, ADAPTERS, X, activation, twice=twice)
        assert_trees_close(found, fn({"w": W}, X, activation, twice=twice))


def test_equal_flags_of_different_types_are_different_programs():
    seen = []

    def fn(params, x, n):
        float(n)  # it looks at the number
        seen.append(type(n))
        return x @ params["w"] * n

    apply = lora.lora_apply(fn)
    for n in (1, True, 1.0):
        apply({"w": W}, ADAPTERS, X, n)
    assert seen == [int, bool, float]
    for n in (0.0, -0.0, math.nan, math.nan):
        apply({"w": W}, ADAPTERS, X, n)
    assert len(seen) == 6


def test_another_float_is_no_other_program():
    """Floats are traced as arrays are, with a weak dtype; so are scalars of numpy."""
    traces = []

    def fn(params, x, rate, *, eps):
        traces.append(rate)
        return x @ params["w"] * rate + eps

    apply, half = lora.lora_apply(fn), jnp.bfloat16
    params, x = {"w": W.astype(half)}, X.astype(half)
    assert apply(params, ADAPTERS, x, 0.1, eps=1e-3).dtype == half
    apply(params, ADAPTERS, x, np.float32(0.1), eps=1e-3)
    assert len(traces) == 2, "a scalar of numpy has a dtype of its own"
    rates = [0.2, -0.0, math.nan, np.float32(3.0)]
    with compilations() as compiled:
        found = [apply(params, ADAPTERS, x, rate, eps=1e-5) for rate in rates]
    assert len(traces) == 2
    assert compiled == []
    assert_trees_close(found, [fn(params, x, rate, eps=1e-5) for rate in rates], rtol=1e-2)
    plan = lora.plan(fn, params, x, 0.5, eps=1e-3, rules={"w": Lora(2)})
    assert list(plan) == ["w"]


@pytest.mark.parametrize(
    "look",
    [
        lambda rate: 1 if rate > 0.5 else 2,
        lambda rate: math.sqrt(rate),
        lambda rate: {0.25: 3.0, 0.75: 4.0}[rate],
        lambda rate: 5 if rate.is_integer() else 6,
        lambda rate: jax.jit(lambda x, rate: x * len(str(rate)), static_argnums=1)(1.0, rate),
    ],
)
def test_a_function_may_look_at_floats(look):
    def fn(params, x, rate):
        return x @ params["w"] * look(rate)

    apply = lora.lora_apply(fn)
    for rate in (0.25, 0.75, 0.25):
        assert_trees_close(apply({"w": W}, ADAPTERS, X, rate), fn({"w": W}, X, rate))


def test_an_error_of_the_function_is_its_own():
    def fn(params, x, rate):
        raise ValueError(f"no rates here: {rate}")

    with pytest.raises(ValueError, match=r"no rates here: 0\.5"):
        lora.lora_apply(fn)({"w": W}, ADAPTERS, X, 0.5)


def test_what_is_kept_does_not_grow_with_the_shapes_seen(monkeypatch):
    case, kept = CASES["under_jit"], []
    adapters, x = case.adapters(RULES["lora"]), case.input()

    def small(size):
        kept.append(Recent(min(size, 3)))
        return kept[-1]

    monkeypatch.setattr(apply_module, "Recent", small)
    monkeypatch.setattr(materialize_module, "Recent", small)
    apply = lora.lora_apply(case.fn, materialize="w")
    for rows in (1, 2, 3, 4, 5, 1):
        for extra in range(rows):
            params = case.params() | {f"unused {extra}": W}
            expected = case.fn(lora.merge(params, adapters), x[:rows])
            assert_trees_close(apply(params, adapters, x[:rows]), expected, rtol=1e-4)
    assert sorted(map(len, kept)) == [3, 3]


def test_every_cache_has_a_bound():
    """But for those of what a process has a handful of: constants, and the kernels of a device."""
    unbounded = {"scale_code", "works", "_renameat2"}
    for module in pkgutil.walk_packages(lora.__path__, "lora_jax."):
        if not module.name.startswith(("lora_jax.cli", "lora_jax.__main__")):
            for name, value in vars(importlib.import_module(module.name)).items():
                if hasattr(value, "cache_parameters") and name not in unbounded:
                    assert value.cache_parameters()["maxsize"] is not None, f"{module.name}.{name}"


def test_what_cannot_be_hashed_is_named():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        sizes: list[int]

    with pytest.raises(LoraError, match="Settings, which is neither an array nor hashable"):
        lora.lora_apply(lambda p, x, settings: x @ p["w"])({"w": W}, ADAPTERS, X, Settings([1]))
    with pytest.raises(LoraError, match="bytearray, which is neither an array nor hashable"):
        lora.lora_apply(lambda p, x, blob: x @ p["w"])({"w": W}, ADAPTERS, X, bytearray(b"x"))


def test_no_adapters_leave_the_program_alone():
    case = CASES["scan_over_layers"]
    plain = jax.make_jaxpr(case.fn)(case.params(), case.input())
    assert str(jax.make_jaxpr(lambda p, x: lora.lora_apply(case.fn)(p, {}, x))(case.params(), case.input())) == str(
        plain
    )


@pytest.mark.parametrize(("name", "kept"), [("scan_over_remat", {"scan", "remat2"}), ("under_jit", {"jit"})])
def test_calls_are_built_again_not_unrolled(name, kept):
    case = CASES[name]
    program = jax.make_jaxpr(lora.lora_apply(case.fn))(case.params(), case.adapters(RULES["lora"]), case.input())
    names = [eqn.primitive.name for eqn in equations(program)]
    assert kept <= set(names)
    assert names.count("dot_general") == 3 * (1 if "scan" in kept else 2)


def test_scan_and_remat_keep_their_settings():
    case = CASES["scan_over_remat"]
    programs = (
        jax.make_jaxpr(case.fn)(case.params(), case.input()),
        jax.make_jaxpr(lora.lora_apply(case.fn))(case.params(), case.adapters(RULES["lora"]), case.input()),
    )
    for name, settings in (("scan", ("length", "reverse", "unroll")), ("remat2", ("policy", "prevent_cse"))):
        base, adapted = (next(e for e in equations(p) if e.primitive.name == name) for p in programs)
        assert {s: base.params[s] for s in settings} == {s: adapted.params[s] for s in settings}


def test_a_policy_can_keep_the_low_rank_product():
    """`lora_h` is saved, and so x @ A is not computed again in the backward pass."""
    case = CASES["remat"]
    apply, params, adapters, x = lora.lora_apply(case.fn), case.params(), case.adapters(RULES["lora"]), case.input()
    program = jax.make_jaxpr(jax.grad(lambda a: apply(params, a, x).sum()))(adapters)
    batch, time, _ = x.shape
    forms = [(batch * time, 2), (batch, time, 2)]  # with the tokens flattened or not
    to_rank = [e for e in equations(program) if e.primitive.name == "dot_general" and e.outvars[0].aval.shape in forms]
    assert len(to_rank) == 2 * 2  # of two weights: x @ A going forward, dy @ B^T going back


def test_a_remat_that_was_differentiated_stays_one():
    """Of a derivative inside the function: the recomputation is not merged with the computation."""
    case = CASES["gradient_of_a_scan_inside"]
    args = case.params(), case.input()
    base = jax.make_jaxpr(case.fn)(*args)
    adapted = jax.make_jaxpr(lora.lora_apply(case.fn))(args[0], case.adapters(RULES["lora"]), args[1])
    flags = [
        sorted(e.params["differentiated"] for e in equations(p) if e.primitive.name in ("remat2", "checkpoint"))
        for p in (base, adapted)
    ]
    assert flags[0] == flags[1]
    assert True in flags[0]


def test_shardings_of_a_nested_jit_hold():
    mesh = eight_devices()
    rows, columns = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P(None, "data")))
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w), in_shardings=(columns, None), out_shardings=rows)
    params, x = {"w": jnp.ones((D, 16))}, jnp.ones((24, D))
    plan = lora.plan(lambda p, x: inner(p["w"], x), params, x, rules={"w": Lora(2)})
    adapters = lora.init(jax.random.key(0), params, plan)
    apply = lora.lora_apply(lambda p, x: inner(p["w"], x))
    assert jax.jit(apply)(params, adapters, x).sharding.is_equivalent_to(rows, 2)
    program = jax.make_jaxpr(apply)(params, adapters, x)
    constraints = [e.params["sharding"] for e in equations(program) if e.primitive.name == "sharding_constraint"]
    assert [c.spec for c in constraints] == [columns.spec, rows.spec]


def test_traced_once_for_each_set_of_shapes():
    calls = []

    def fn(params, x):
        calls.append(x.shape)
        return x @ params["w"]

    apply = lora.lora_apply(fn)
    apply({"w": W}, ADAPTERS, X)
    jax.jit(apply)({"w": 2 * W}, ADAPTERS, X + 1)
    assert calls == [(3, D)]
    apply({"w": W}, ADAPTERS, X[:2])
    assert calls == [(3, D), (2, D)]


def test_new_adapters_and_new_weights_compile_nothing():
    apply = jax.jit(lora.lora_apply(linear))
    other = jax.tree.map(lambda a: a + 1, ADAPTERS)
    w = W + 1
    jax.block_until_ready(apply({"w": W}, ADAPTERS, X))
    with compilations() as seen:
        jax.block_until_ready(apply({"w": w}, other, X))
    assert not seen


@pytest.mark.parametrize("name", ["under_jit", "scan_over_layers", "scan_over_remat", "attention_kernels"])
def test_a_second_eager_call_compiles_nothing(name):
    case = CASES[name]
    apply, params, x = lora.lora_apply(case.fn), case.params(), case.input()
    first, second = (case.adapters(RULES["lora"], key) for key in (1, 2))
    jax.block_until_ready(apply(params, first, x))
    with compilations() as seen:
        jax.block_until_ready(apply(params, second, x))
    assert not seen


def test_under_disable_jit():
    case = CASES["scan_over_layers"]
    with jax.disable_jit():
        found = lora.lora_apply(case.fn)(case.params(), adapters := case.adapters(RULES["lora"]), case.input())
    assert_trees_close(found, case.fn(lora.merge(case.params(), adapters), case.input()))


def test_a_large_scale_does_not_overflow_fp16():
    """x A is 2,400: 32 times that is past 65,504, the largest fp16, though the result is 77."""
    params, x = {"w": jnp.zeros((D, K), jnp.float16)}, jnp.full((1, D), 100.0, jnp.float16)
    plan = lora.plan(linear, params, x, rules={"w": Lora(rank=1, alpha=32)})
    [adapter] = lora.init(jax.random.key(0), params, plan).values()
    adapters = {"w": dataclasses.replace(adapter, a=2 + 0 * adapter.a, b=1e-3 + 0 * adapter.b)}
    assert_trees_close(lora.lora_apply(linear)(params, adapters, x), linear(lora.merge(params, adapters), x), rtol=2e-3)


def test_eight_bit_floats():
    """The factors are not rounded to the 8 bits of the operands that they stand beside."""

    def fn(params, x):
        return jax.lax.dot(
            x.astype(jnp.float8_e4m3fn), params["w"].astype(jnp.float8_e4m3fn), preferred_element_type=jnp.float32
        )

    adapters = jax.tree.map(lambda a: a + 0.01, ADAPTERS)
    x = jnp.linspace(0, 1, 3 * D).reshape(3, D)
    delta = lora.lora_apply(fn)({"w": W}, adapters, x) - fn({"w": W}, x)
    expected = x.astype(jnp.float8_e4m3fn).astype(jnp.float32) @ lora.merge({"w": 0 * W}, adapters)["w"]
    assert_trees_close(delta, expected, rtol=1e-3, atol=1e-5)
    stored = {"w": W.astype(jnp.float8_e4m3fn)}
    assert lora.merge(stored, adapters)["w"].dtype == jnp.float8_e4m3fn


def test_a_wide_result_stays_exact():
    """A product that is kept wider than its operands loses nothing to a fresh adapter."""

    def fn(params, x):
        return jax.lax.dot(x, params["w"], preferred_element_type=jnp.float64)

    with jax.enable_x64(True):
        x, w = (jax.random.normal(jax.random.key(n), s, jnp.float32) for n, s in ((0, (3, D)), (1, (D, K))))
        found = lora.lora_apply(fn)({"w": w}, ADAPTERS, x)
        assert found.dtype == jnp.float64
        assert jnp.all(found == fn({"w": w}, x))


def test_names_of_arguments_still_name_them():
    """jit's `static_argnames` and `donate_argnames` go by the signature, which has one argument more."""

    def fn(params, x, flag):
        return x @ params["w"] if flag else x

    apply = lora.lora_apply(fn)
    assert list(inspect.signature(apply).parameters) == ["params", "adapters", "x", "flag"]
    jitted = jax.jit(apply, static_argnames="flag")
    assert_trees_close(jitted({"w": W}, ADAPTERS, X, True), X @ W)
    assert_trees_close(jitted({"w": W}, ADAPTERS, X, flag=False), X)


def test_a_function_with_an_argument_called_adapters():
    """It is the function's own, by keyword; the adapters that are applied are the second argument, by position."""

    def fn(params, x, adapters):
        return x @ params["w"] + adapters

    apply, adapters = lora.lora_apply(fn), jax.tree.map(lambda a: a + 0.1, ADAPTERS)
    assert list(inspect.signature(apply).parameters) == ["params", "outer_adapters", "x", "adapters"]
    expected = fn(lora.merge({"w": W}, adapters), X, 2.0)
    assert_trees_close(apply({"w": W}, adapters, X, 2.0), expected)
    assert_trees_close(jax.jit(apply, static_argnames="adapters")({"w": W}, adapters, x=X, adapters=2.0), expected)


def named(params, x, *, gain=1.0):
    return gain * x @ params["w"]


def scaled_by(gain, params, x):
    return gain * x @ params["w"]


WAYS = {
    "named": named,
    "a lambda": lambda p, x: x @ p["w"],
    "of any arguments": lambda *args: args[1] @ args[0]["w"],
    "a Partial": jax.tree_util.Partial(scaled_by, 1.0),
    "a partial": functools.partial(named, gain=1.0),
    "jitted": jax.jit(named),
}


@pytest.mark.parametrize("way", WAYS)
def test_applied_twice(way):
    """`apply(params, outer, inner, x)` is the function of both merged, and so is a third time around."""
    inner, outer = ({"w": jax.tree.map(lambda a, c=c: a + c, ADAPTERS["w"])} for c in (0.1, -0.2))
    once = lora.lora_apply(WAYS[way])
    twice = lora.lora_apply(once)
    expected = X @ lora.merge(lora.merge({"w": W}, outer), inner)["w"]
    for apply in (twice, jax.jit(twice)):
        assert_trees_close(apply({"w": W}, outer, inner, X), expected, rtol=1e-5)
    assert_trees_close(lora.lora_apply(twice)({"w": W}, {}, outer, inner, X), expected, rtol=1e-5)
    plan = lora.plan(once, {"w": W}, inner, X, rules={"w": Lora(1)})
    assert plan["w"].axes == ADAPTERS["w"].axes
    by_both = jax.grad(lambda pair: twice({"w": W}, *pair, X).sum())((outer, inner))
    merged = jax.grad(lambda pair: (X @ lora.merge(lora.merge({"w": W}, pair[0]), pair[1])["w"]).sum())((outer, inner))
    assert_trees_close(by_both, merged, rtol=1e-4)


def test_the_signature_of_what_is_applied_twice():
    twice = lora.lora_apply(lora.lora_apply(named))
    assert list(inspect.signature(twice).parameters) == ["params", "outer_adapters", "adapters", "x", "gain"]
    assert_trees_close(twice({"w": W}, ADAPTERS, ADAPTERS, x=X, gain=2.0), 2 * X @ W)


def test_numpy_weights():
    """As the function itself would take them: float64 as JAX's default float."""
    params = {"w": np.ones((D, K))}
    assert_trees_close(lora.lora_apply(linear)(params, ADAPTERS, np.ones((3, D))), jnp.full((3, K), float(D)))
    assert lora.merge(params, ADAPTERS)["w"].dtype == jnp.float32


def test_closed_over_tracers():
    """A function may close over values of a trace around it."""

    @jax.jit
    def outer(x, adapters):
        apply = lora.lora_apply(lambda p: x @ p["w"])
        return jax.grad(lambda a: (apply({"w": W}, a) * x.sum()).sum())(adapters)

    adapters = jax.tree.map(lambda a: a + 0.1, ADAPTERS)
    expected = jax.grad(lambda a: (linear(lora.merge({"w": W}, a), X) * X.sum()).sum())(adapters)
    assert_trees_close(outer(X, adapters), expected, rtol=1e-4)


def test_nnx_paths_and_values():
    model = nnx.Sequential(nnx.Linear(D, K, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(K, 2, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    plan = lora.plan(fn, state, X, rules={".*/kernel": Lora(2)})
    assert list(plan) == ["layers/0/kernel", "layers/2/kernel"]
    adapters = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(0), state, plan))
    merged = lora.merge(state, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert_trees_close(lora.lora_apply(fn)(state, adapters, X), fn(merged, X))


def test_partial_and_method():
    apply = lora.lora_apply(functools.partial(lambda p, x, scale: scale * (x @ p["w"]), scale=2.0))
    assert_trees_close(apply({"w": W}, ADAPTERS, X), 2 * X @ W)


def test_gradient_of_the_base_when_asked():
    """The base is an ordinary argument: its gradient is that of the merged function, not a silent zero."""
    adapters = jax.tree.map(lambda a: a + 0.1, ADAPTERS)
    found = jax.grad(lambda p: jnp.sin(lora.lora_apply(linear)(p, adapters, X)).sum())({"w": W})
    expected = jax.grad(lambda p: jnp.sin(linear(lora.merge(p, adapters), X)).sum())({"w": W})
    assert_trees_close(found, expected)


def test_a_stack_of_adapters_without_vmap():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), ADAPTERS)
    for call in (lora.lora_apply(linear), lambda p, a, x: lora.merge(p, a)):
        with pytest.raises(LoraError, match=r"'w' has a of shape \[2, 12, 2\], expected 2 axes.*jax.vmap\(apply"):
            call({"w": W}, stacked, X)


def test_parameters_by_keyword():
    apply = lora.lora_apply(linear)
    with pytest.raises(LoraError, match=r"by position, found 0 positional arguments.*\['params', 'adapters', 'x'\]"):
        apply(params={"w": W}, adapters=ADAPTERS, x=X)
    with pytest.raises(LoraError, match=r"by position, found 1 positional arguments"):
        apply({"w": W}, x=X)
    assert_trees_close(apply({"w": W}, ADAPTERS, x=X), X @ W)

    def keyword_only(x, *, params):
        return x @ params["w"]

    apply = lora.lora_apply(lambda params, *args, **kw: keyword_only(*args, params=params, **kw))
    assert_trees_close(apply({"w": W}, ADAPTERS, X), X @ W)


def test_values_of_a_trace_that_has_ended():
    kept = []
    jax.jit(lambda x: kept.append(x))(X)
    apply = lora.lora_apply(linear)
    with pytest.raises(LoraError, match="'args/0' is a value from inside another jit, grad, vmap or scan"):
        apply({"w": W}, ADAPTERS, kept[0])
    kept.clear()
    jax.jit(lambda w: kept.append(w))(W)
    with pytest.raises(LoraError, match="'params/w' is a value from inside another"):
        apply({"w": kept[0]}, ADAPTERS, X)
    with pytest.raises(LoraError, match="the function closes over a value from inside another"):
        lora.lora_apply(lambda p, x: x @ p["w"] + kept[0].sum())({"w": W}, ADAPTERS, X)


def test_a_stack_of_another_size():
    case = CASES["scan_over_layers"]
    adapters = case.adapters(RULES["lora"])
    params = jax.tree.map(lambda p: jnp.concatenate([p, p]), case.params())
    with pytest.raises(
        LoraError, match=r"'w' fits a weight of shape \[2, 12, 12\], but the parameter has \[4, 12, 12\]"
    ):
        lora.lora_apply(case.fn)(params, adapters, case.input())
    a_only = {"w": dataclasses.replace(adapters["w"], a=jnp.concatenate([adapters["w"].a] * 2))}
    with pytest.raises(
        LoraError, match=r"the adapter for 'w' is not of one piece: its axis 0 has 4 entries in a, 2 in b"
    ):
        lora.lora_apply(case.fn)(case.params(), a_only, case.input())
