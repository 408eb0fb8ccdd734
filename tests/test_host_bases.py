"""Weights in the memory of the host: the same numbers, brought where they are used, and never as a whole stack."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES, assert_trees_close, assert_trees_equal, total
from jax import NamedSharding, P
from placements import PLACEMENTS, batch, loss, optimizer, params, plan

import lora_jax as lora
from lora_jax import bases
from lora_jax.analysis.abstract_arguments import argument_bytes

LAYERS, WIDTH, INNER = 3, 64, 128
RULE = {"layers/(up|down)|head": lora.Lora(rank=4)}
FORMATS = {"dense": None, "NF4": bases.Nf4(), "NF4, scales in fp32": bases.Nf4(double=False), "int8": bases.Int8()}


def layer(x, p):
    return x + jnp.tanh((x * p["norm"][None]) @ p["up"].astype(x.dtype)) @ p["down"], None


def model(p, x, how="scan"):
    body = jax.checkpoint(layer) if "remat" in how else layer
    if "scan" in how:
        return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]
    for i in range(LAYERS):
        x, _ = body(x, jax.tree.map(lambda w, i=i: w[i], p["layers"]))
    return x @ p["head"]


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 8


@functools.cache
def base(format="dense"):
    layers = {"up": numbers(0, LAYERS, WIDTH, INNER), "down": numbers(1, LAYERS, INNER, WIDTH)}
    dense = {"layers": layers | {"norm": jnp.ones((LAYERS, WIDTH))}, "head": numbers(2, WIDTH, 16)}
    return dense if format == "dense" else bases.quantize(dense, {"layers/(up|down)": FORMATS[format]})


X = numbers(3, 5, WIDTH)


@functools.cache
def adapters():
    fresh = lora.init(jax.random.key(4), base(), lora.plan(model, base(), X, rules=RULE))
    return jax.tree.map(lambda array: array + 0.1 if array.ndim > 1 else array, fresh)


def gradient(how="scan"):
    apply = lora.lora_apply(functools.partial(model, how=how))
    return jax.value_and_grad(lambda adapters, params, x: jnp.sum(apply(params, adapters, x) ** 2))


@pytest.mark.parametrize("how", ["scan", "scan, remat", "unrolled", "unrolled, remat"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.sampled(8)
def test_values_and_gradients_are_those_of_the_plain_base(format, how):
    there, run = bases.to_host(base(format), ".*"), gradient(how)
    both = jax.jit(lambda own, *bases: [run(own, base, X) for base in bases])
    on_device, on_host = both(adapters(), base(format), there)
    assert_trees_equal(on_host, on_device)
    assert {array.sharding.memory_kind for array in jax.tree.leaves(on_host)} == {"device"}


def test_an_eager_call():
    apply = lora.lora_apply(model)
    assert_trees_close(apply(bases.to_host(base(), ".*"), {}, X), model(base(), X))


# A loop of unknown length has no derivative, and what is moved is committed to its device, of which two programs take
# eight.
CASES = [c for c in MODELS if c.name not in ("while_loop", "tensor_parallel", "gathered_in_shard_map")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.sampled(30)
def test_every_use_of_a_weight(case):
    """Transposed, reshaped, looked up, convolved: what is no product gets the weight on the device."""
    there = bases.to_host(case.params(), case.pattern)
    apply = lora.lora_apply(case.fn)
    run = jax.jit(jax.value_and_grad(lambda p, own, x: total(apply(p, own, x)), argnums=1))
    x, own = case.input(), case.adapters(RULES["lora"])
    assert_trees_close(run(there, own, x), run(case.params(), own, x), rtol=2e-2 if case.dtype != jnp.float32 else 1e-4)


def equations(jaxpr, inside=""):
    """Yield each equation with the names of the programs around it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn, inside
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield from equations(part, f"{inside}/{eqn.primitive.name}")


@pytest.mark.parametrize("how", ["scan", "scan, remat"])
def test_layers_come_one_by_one_and_none_is_kept_or_sent_back(how):
    """What the passes hand on is on the host still, and no array of the device has the shape of a whole stack."""
    there = bases.to_host(base(), "layers/.*")
    found = list(equations(jax.make_jaxpr(gradient(how))(adapters(), there, X)))
    stacks = {(LAYERS, WIDTH, INNER), (LAYERS, INNER, WIDTH)}
    whole = [v.aval for eqn, _ in found for v in eqn.outvars if v.aval.shape in stacks]
    assert whole
    assert {aval.memory_space for aval in whole} == {jax.memory.Space.Host}
    moved = [
        (eqn.invars[0].aval, eqn.outvars[0].aval, where) for eqn, where in found if eqn.primitive.name == "device_put"
    ]
    assert all(
        (a.memory_space, b.memory_space) == (jax.memory.Space.Host, jax.memory.Space.Device) for a, b, _ in moved
    )
    layers = [where for _, b, where in moved if b.shape in {(WIDTH, INNER), (INNER, WIDTH)}]
    # Forward, and for the derivatives; a remat computes the forward pass again, where the compiler joins both.
    assert len(layers) == (6 if "remat" in how else 4)
    assert all("/scan" in where for where in layers)


def test_a_plan_is_the_same_and_adapters_are_on_the_device():
    there = bases.to_host(base(), ".*")
    found = lora.plan(model, there, X, rules=RULE)
    assert repr(found) == repr(lora.plan(model, base(), X, rules=RULE))
    fresh = lora.init(jax.random.key(4), there, found)
    assert {array.sharding.memory_kind for array in jax.tree.leaves(fresh)} == {"device"}
    assert there["layers"]["up"].sharding.memory_kind == "pinned_host"
    assert there["layers"]["up"].nbytes == base()["layers"]["up"].nbytes


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if len(p.axes) > 1][:2], ids=lambda p: p.name)
@pytest.mark.slow
def test_training_over_a_mesh(placement):
    mesh = placement.mesh()

    def train(p, place=lambda rows: rows):
        state = lora.TrainState.create(lora.init(jax.random.key(1), p, plan()), optimizer())
        step = lora.jit_step(loss, optimizer())
        state, metrics = step(state, p, *place(batch(0)))
        return metrics["loss"], state.trainable

    there = jax.device_put(params(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), placement.specs()))
    there = bases.to_host(there, "layers/.*", stack=1)
    for name, spec in placement.specs()["layers"].items():
        w = there["layers"][name]
        assert w.sharding.is_equivalent_to(NamedSharding(mesh, spec, memory_kind="pinned_host"), w.ndim), name
    place = functools.partial(lora.shard_batch, sharding=NamedSharding(mesh, placement.batch))
    assert_trees_close(train(there, place), train(params()), rtol=1e-5)


def test_shapes_shardings_files_and_what_is_there_already():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    shapes = lora.abstract(base("NF4"), mesh)
    there = bases.to_host(shapes, "layers/(up|down)|head")
    assert type(there["layers"]["up"]) is bases.Nf4Weight
    assert {a.sharding.memory_kind for a in jax.tree.leaves(there["layers"]["up"])} == {"pinned_host"}
    assert argument_bytes((there,))["base"] == LAYERS * WIDTH * 4
    where = {"w": NamedSharding(mesh, P("x")), "v": NamedSharding(mesh, P())}
    assert bases.to_host(where, "w") == where | {"w": NamedSharding(mesh, P("x"), memory_kind="pinned_host")}
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = bases.Stored(jax.ShapeDtypeStruct((2, 3), np.float32), lambda: w)
    read = bases.to_host({"a": stored, "b": w}, "a|b")
    for one in (read, bases.to_host(read, "a|b")):
        assert all(one[name].array.sharding.memory_kind == "pinned_host" for name in "ab")
        np.testing.assert_array_equal(one["a"].dense(), w)
    tied = bases.to_host({"a": X, "b": X}, ".*")
    assert tied["a"] is tied["b"]


def test_merged_in_place_of_what_was_there():
    there = bases.to_host(base(), ".*")
    merged, losses = bases.merge(there, adapters())
    assert merged["layers"]["up"].sharding.memory_kind == "pinned_host"
    assert set(losses.values()) == {0.0}
    assert_trees_equal(bases.dense(merged), lora.merge(base(), adapters()))


def test_saved_and_loaded_to_the_host(tmp_path):
    there = bases.to_host(base("int8"), "layers/.*")
    bases.save(tmp_path / "base", there)
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    where = bases.to_host(jax.tree.map(lambda _: NamedSharding(mesh, P()), base()), "layers/.*")
    loaded = bases.load(tmp_path / "base", where)
    assert_trees_equal(bases.dense(loaded), bases.dense(base("int8")))
    assert {array.sharding.memory_kind for array in jax.tree.leaves(loaded["layers"])} == {"pinned_host"}


# What is refused ------------------------------------------------------------------------------------------------------


def test_without_such_memory_the_error_says_what_there_is(monkeypatch):
    from lora_jax.bases import host

    kinds = [SimpleNamespace(kind="device"), SimpleNamespace(kind="unpinned_host")]
    device = SimpleNamespace(id=0, platform="metal", device_kind="M9", addressable_memories=lambda: kinds)
    monkeypatch.setattr(host, "_where", lambda array: SimpleNamespace(device_set=[device]))
    with pytest.raises(lora.LoraError, match=r"'head' cannot be moved, for metal devices \(M9\) .*'unpinned_host'"):
        bases.to_host(base(), "head")


@pytest.mark.parametrize(
    ("tree", "patterns", "stack", "message"),
    [
        ({"w": jnp.ones(3)}, "v", None, "matches no parameter"),
        ({"w": jnp.ones(3, int)}, "w", None, r"'w' is int32\[3\], expected an array of floats"),
        ({"w": "text"}, "w", None, "'w' is str"),
        ({"w": jnp.ones((2, 3))}, "w", 2, r"'w' of shape \[2, 3\] has no 2 stack axes"),
    ],
)
def test_what_cannot_be_moved_is_named(tree, patterns, stack, message):
    with pytest.raises(lora.LoraError, match=message):
        bases.to_host(tree, patterns, stack=stack)


def test_traced_arrays_and_plain_functions_are_refused():
    with pytest.raises(lora.LoraError, match="'w' is traced"):
        jax.jit(lambda w: bases.to_host({"w": w}, "w"))(X)
    with pytest.raises(lora.LoraError, match=r"call lora.lora_apply\(fn\)"):
        model(bases.to_host(base(), "head"), X)


def test_names_of_a_policy_are_strings():
    with pytest.raises(lora.LoraError, match=r"offload\(\['layer_input'\],?\).*such as offload\('layer_input'\)"):
        lora.policies.offload(["layer_input"])
