"""Where adapters go on a mesh."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import MODELS, RULES, assert_trees_close, assert_trees_equal, total, trained_leaves
from jax import P
from jax.sharding import AxisType, NamedSharding
from placements import PLACEMENTS, batch, params, plan

import lora_jax as lora
from benchmarks.collectives import collectives
from lora_jax import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.sharding.batches import combined_sharding
from lora_jax.sharding.gradient_copies import PerShardCopies, add_to, add_up, copies_alone, make_copies
from lora_jax.transform.merge import _in_place

PLACED = next(p for p in PLACEMENTS if p.name == "data, fsdp and tensor")


@functools.cache
def make_mesh(sizes=(2, 2, 2), names=("data", "fsdp", "tensor")):
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes))


def specs_of(path, **kwargs):
    """The specs of A and B at a path."""
    found = lora.adapter_specs(PLACED.specs(), plan(), make_mesh(), **kwargs)[path]
    return found.a, found.b


def test_the_default_follows_tensor_axes_and_drops_those_of_the_batch():
    assert specs_of("layers/up") == (P(None, None, None), P(None, None, "tensor"))
    assert specs_of("layers/down") == (P(None, "tensor", None), P(None, None, None))
    assert specs_of("layers/q") == (P(None, None, None), P(None, None, "tensor", None))
    assert specs_of("layers/o") == (P(None, "tensor", None, None), P(None, None, None))


def test_other_policies():
    assert specs_of("layers/down", policy="replicate") == (P(None, None, None), P(None, None, None))
    assert specs_of("layers/down", policy="inherit") == (P(None, "tensor", None), P(None, None, "fsdp"))
    assert specs_of("layers/down", batch_axes=["tensor"]) == (P(None, None, None), P(None, None, "fsdp"))

    def own(path, spec):
        return P() if path == "layers/up" else spec

    assert specs_of("layers/up", policy=own) == (P(None, None, None), P(None, None, None))
    assert specs_of("layers/down", policy=own) == specs_of("layers/down", policy="inherit")


def test_experts_follow_their_stack():
    place = next(p for p in PLACEMENTS if p.name == "data and expert")
    specs = lora.adapter_specs(place.specs(), plan(), place.mesh())["layers/experts"]
    assert (specs.a, specs.b) == (P(None, "expert", None, None), P(None, "expert", None, None))


def test_the_base_may_be_given_in_any_way():
    mesh = make_mesh()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACED.specs())
    expected = lora.adapter_specs(PLACED.specs(), plan(), mesh)
    arrays = PLACED.params(mesh)
    abstract = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params(), shardings)
    for base in (shardings, arrays, abstract):
        assert lora.adapter_specs(base, plan()) == expected
        assert lora.adapter_specs(base, lora.init(jax.random.key(0), params(), plan())) == expected
    with jax.set_mesh(mesh):
        assert lora.adapter_specs(PLACED.specs(), plan()) == expected
    nothing = jax.tree.map(lambda _: None, params())
    assert lora.adapter_specs(nothing, plan(), mesh) == lora.adapter_specs(shardings, plan(), policy="replicate")


def test_linen_metadata():
    split = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    model, x = nn.Dense(8, kernel_init=split), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    fn, unboxed, _ = lora.from_linen(model, nn.unbox(variables))
    made = lora.plan(fn, unboxed, {}, x, rules={"kernel": lora.Lora(2)})
    for base in (nn.get_partition_spec(variables)["params"], variables["params"]):
        found = lora.adapter_specs(base, made, make_mesh())["kernel"]
        assert (found.a, found.b) == (P(None, None), P(None, "tensor"))


def test_logical_names_are_said_to_be_no_axes():
    split = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model, x = nn.Dense(8, kernel_init=split), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    fn, unboxed, _ = lora.from_linen(model, nn.unbox(variables))
    made = lora.plan(fn, unboxed, {}, x, rules={"kernel": lora.Lora(2)})
    logical = nn.get_partition_spec(variables)["params"]
    with pytest.raises(LoraError, match=r"'kernel' is .*the mesh has no axis 'embed'.*logical_to_mesh"):
        lora.adapter_specs(logical, made, make_mesh())
    physical = nn.logical_to_mesh(logical, rules=[("embed", "fsdp"), ("mlp", "tensor")])
    assert lora.adapter_specs(physical, made, make_mesh())["kernel"].b == P(None, "tensor")


def test_nnx_metadata():
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
    with jax.set_mesh(make_mesh()):
        model = nnx.Linear(4, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
    fn, p, state = lora.from_nnx(model)
    made = lora.plan(fn, p, state, jnp.ones((2, 4)), rules={"kernel": lora.Lora(2)})
    for base in (nnx.get_partition_spec(p), p):
        found = lora.adapter_specs(base, made, make_mesh())["kernel"]
        assert (found.a, found.b) == (P(None, None), P(None, "tensor"))


# Refusals -------------------------------------------------------------------------------------------------------------


def with_spec(name, spec):
    specs = PLACED.specs()
    return {**specs, "layers": {**specs["layers"], name: spec}}


@pytest.mark.parametrize(
    ("base", "kwargs", "says"),
    [
        (with_spec("kv", P(None, None, None, ("fsdp", "tensor"))), {"policy": "inherit"}, "axis 3 of size 2 cannot be"),
        (
            with_spec("up", P("tensor")),
            {},
            r"'layers/up' of shape \[3, 16, 32\].* axis 0 of size 3 .*'tensor' of size 2",
        ),
        (with_spec("up", P(None, "model")), {}, r"'layers/up' is .*no axis 'model', only \{'data': 2"),
        (with_spec("up", P(None, None, None, "tensor")), {}, "expected a PartitionSpec of at most 3 entries"),
        (with_spec("up", "tensor"), {}, "'layers/up' is a str without a sharding"),
        ({"layers": {"upper": P()}}, {}, "no place for 'layers/down' in the base; the nearest .* are 'layers/upper'"),
        (PLACED.specs(), {"policy": "everywhere"}, "'everywhere', expected one of 'tensor', 'replicate', 'inherit'"),
        (PLACED.specs(), {"policy": lambda path, spec: "x"}, "expected a PartitionSpec"),
    ],
)
def test_what_cannot_be_placed(base, kwargs, says):
    with pytest.raises(LoraError, match=says):
        lora.adapter_specs(base, plan(), make_mesh(), **kwargs)


def test_a_base_that_is_elsewhere():
    with pytest.raises(LoraError, match=r"'layers/down' is on SingleDeviceSharding.*not on the mesh"):
        lora.adapter_specs(params(), plan(), make_mesh())
    with pytest.raises(LoraError, match="say nothing of a mesh: give one"):
        lora.adapter_specs(PLACED.specs(), plan())
    other = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), devices=jax.devices()[::-1])
    with pytest.raises(LoraError, match="have to be on one mesh"):
        lora.adapter_specs(PLACED.params(make_mesh()), plan(), other)


def test_adapters_and_base_on_two_meshes():
    optimizer = optax.sgd(1.0)
    step = lora.jit_step(lambda a, p, x: jnp.ones(()), optimizer)
    here = jax.device_put(
        lora.TrainState.create(lora.init(jax.random.key(0), params(), plan()), optimizer), jax.devices()[0]
    )
    there = lora.TrainState.create(lora.init(jax.random.key(0), PLACED.params(make_mesh()), plan()), optimizer)
    half = next(p for p in PLACEMENTS if p.name == "tensor")
    for state, p, says in [
        (here, PLACED.params(make_mesh()), r"'embed' is on the devices \[0, 1, .*, 7\], but the adapters are on \[0\]"),
        (there, jax.device_put(params(), jax.devices()[0]), r"'embed' is on the devices \[0\], .* on \[0, 1, "),
        (
            there,
            half.params(half.mesh()),
            r"'embed' is on the devices \[0, 1, 2, 3\], but the adapters are on \[0, 1, ",
        ),
    ]:
        with pytest.raises(LoraError, match=says):
            step(state, p, batch(0)[0])


# Adapters on their shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tensor", "replicate", "inherit"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
@pytest.mark.sampled(5)
def test_adapters_start_on_their_shards_and_with_the_same_numbers(placement, policy):
    p = placement.params(placement.mesh())
    shardings = lora.adapter_shardings(p, plan(), policy=policy)
    made = lora.init(jax.random.key(7), p, plan(), shardings)
    assert jax.tree.map(lambda array: array.sharding, made) == shardings
    assert_trees_equal(made, lora.init(jax.random.key(7), params(), plan()))
    if policy == "tensor":
        found = lora.init(jax.random.key(7), p, plan())
        assert jax.tree.map(lambda array: array.sharding, found) == shardings, "as without being told"


def test_a_state_is_on_the_mesh_of_its_adapters():
    adapters = lora.init(jax.random.key(0), PLACED.params(make_mesh()), plan())
    state = lora.TrainState.create(adapters, lora.freeze_base(optax.adam(1e-3)), key=jax.random.key(1))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    expected = [leaf.sharding for leaf in trained_leaves(adapters)] * 2
    assert [leaf.sharding for leaf in moments] == expected


def test_merged_weights_stay_on_their_shards():
    p = PLACED.params(make_mesh())
    merged = lora.merge(p, lora.init(jax.random.key(0), p, plan()))
    assert jax.tree.map(lambda a: a.sharding, merged) == jax.tree.map(lambda a: a.sharding, p)


def test_merged_weights_take_the_place_of_the_weights():
    """On their own shards, and in their own memory: what is adapted is gone, the rest is as it was."""
    p = jax.tree.map(jnp.copy, PLACED.params(make_mesh()))  # other tests use the weights that these may share
    adapters = lora.init(jax.random.key(0), p, plan())
    adapters = jax.tree.map(lambda a: a + jax.random.normal(jax.random.key(1), a.shape, a.dtype), adapters)
    expected, leaves = lora.merge(p, adapters), dict(zip(*flatten_with_names(p)[:2], strict=True))
    places = jax.tree.map(lambda a: a.sharding, p)
    for path, adapter in adapters.items():
        compiled = _in_place(leaves[path].sharding).lower(leaves[path], adapter).compile()
        assert compiled.memory_analysis().alias_size_in_bytes == leaves[path].addressable_shards[0].data.nbytes
    found = lora.merge(p, adapters, donate=True)
    assert {path for path, leaf in leaves.items() if leaf.is_deleted()} == set(adapters)
    assert jax.tree.map(lambda a: a.sharding, found) == places
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-6)


def test_what_is_on_no_device_has_no_memory_to_give():
    p = jax.tree.map(np.asarray, PLACED.params(make_mesh()))
    adapters = lora.init(jax.random.key(0), p, plan())
    with pytest.raises(
        lora.LoraError, match=r"merge\(donate=True\) takes the memory .* is a ndarray: leave donate out"
    ):
        lora.merge(p, adapters, donate=True)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_on_the_mesh():
    sharding = NamedSharding(make_mesh((2, 4), ("data", "sequence")), P("data", "sequence"))
    ids, labels = np.arange(32).reshape(4, 8), np.arange(4)
    placed = lora.shard_batch({"ids": ids, "labels": labels}, sharding, rows=4)
    assert placed["ids"].sharding.spec == P("data", "sequence")
    assert placed["labels"].sharding.spec == P("data")
    assert_trees_equal(placed, {"ids": jnp.asarray(ids), "labels": jnp.asarray(labels)})
    assert lora.local_rows(sharding, 4) == slice(0, 4)


@pytest.mark.parametrize(
    ("batch", "rows", "says"),
    [
        ([np.ones((4, 8)), np.ones(3)], None, r"share their first axis.*\[4, 8\], \[3\]"),
        ([np.ones(())], None, "share their first axis"),
        ([], None, "share their first axis"),
        ([np.ones((3, 8))], None, "a batch of 3 rows cannot be split evenly over the mesh axes 'data' of size 2"),
        ([np.ones((4, 8))], 8, "gives 4 rows of the batch, expected 8: of all 8"),
        ([np.ones((4, 6))], None, "axis 1 of the batch has size 6.*'sequence' of size 4: pad it"),
    ],
)
def test_a_batch_that_does_not_fit(batch, rows, says):
    sharding = NamedSharding(make_mesh((2, 4), ("data", "sequence")), P("data", "sequence"))
    with pytest.raises(LoraError, match=says):
        lora.shard_batch(batch, sharding, rows)


# Copies of adapters, one for each part of the batch -------------------------------------------------------------------

# JAX cannot differentiate a loop of unknown length; three programs have a mesh of their own.
apart = ("while_loop", "tensor_parallel", "gathered_in_shard_map", "behind_a_barrier")
spreadable = [case for case in MODELS if case.name not in apart]


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], P()),
        ([P(), P(None, None)], P()),
        ([P("data", None)], P("data")),
        ([P(None, "fsdp")], P(None, "fsdp")),
        ([P("tensor"), P(None, "data"), P(("data", "fsdp"))], P(("data", "fsdp"))),  # the most parts
        ([P("fsdp"), P("data")], P("fsdp")),  # of as many parts, the first
        ([P("data"), P(None, "fsdp")], P("data", "fsdp")),
        ([P(None, "fsdp"), P("data")], P("data", "fsdp")),
        ([P("data"), P(None, "fsdp"), P(None, None, "tensor")], P("data", "fsdp", "tensor")),
        ([P("data"), P("fsdp", "tensor")], P("fsdp", "tensor")),  # its second axis is not taken along with the first
        ([P("data"), P("fsdp"), P(None, "tensor")], P("data", "tensor")),
        ([P("data"), P(None, "data")], P("data")),  # no mesh axis twice
        ([P("data"), P(None, ("data", "fsdp"))], P(None, ("data", "fsdp"))),
        ([P(("data", "one"), "one2")], P("data")),
        ([P("one", "one2"), P("one2", None, "fsdp")], P(None, None, "fsdp")),
    ],
)
def test_one_sharding_for_all_arrays_of_a_batch(specs, expected):
    mesh = make_mesh((2, 2, 2, 1, 1), ("data", "fsdp", "tensor", "one", "one2"))
    rows = [jax.device_put(jnp.ones((8, 8, 8)), NamedSharding(mesh, spec)) for spec in specs]
    found = combined_sharding({"a number": 3.0, "nowhere": jnp.ones(3), "rows": rows})
    assert found == (NamedSharding(mesh, expected) if specs else None)


def test_a_step_over_arrays_that_are_split_in_different_ways():
    """One reduction over all mesh axes that split some of them; the numbers are those of one device."""
    mesh = make_mesh((2, 4), ("data", "seq"))
    case = next(case for case in MODELS if case.name == "two_layers")
    apply, optimizer = lora.lora_apply(case.fn), optax.sgd(0.1)
    base, adapters = case.params(), case.adapters(RULES["lora"])
    x = jax.random.normal(jax.random.key(0), (4, 8, case.input().shape[-1]))

    def loss(adapters, params, weight, x):
        return jnp.mean(jnp.square(apply(params, adapters, x)) * weight[:, None, None])

    weight = jnp.arange(4.0)
    state = lora.TrainState.create(jax.tree.map(jnp.copy, adapters), optimizer)
    expected, _ = lora.train_step(loss, optimizer, state, base, weight, x)
    whole = NamedSharding(mesh, P())
    state = lora.TrainState.create(jax.device_put(jax.tree.map(jnp.copy, adapters), whole), optimizer)
    weight = jax.device_put(weight, NamedSharding(mesh, P("data")))
    x = jax.device_put(x, NamedSharding(mesh, P(None, "seq")))
    found, _ = lora.jit_step(loss, optimizer)(state, jax.device_put(base, whole), weight, x)
    assert_trees_close(found.trainable, expected.trainable, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", spreadable, ids=lambda case: case.name)
@pytest.mark.sampled(5)
def test_copies_change_nothing(case):
    """Law 1 with copies, whatever the program does to the weight: values, and the gradient once added up.

    Programs whose first token axis has no five parts use the adapter itself.
    """
    mesh = jax.make_mesh((5,), ("data",), (AxisType.Auto,), devices=jax.devices()[:5])
    whole = NamedSharding(mesh, P("data"))
    rule = RULES["lora"]
    p, x, adapters = case.params(), case.input(), case.adapters(rule)
    apply = lora.lora_apply(case.fn)

    @jax.jit
    def with_copies(adapters, p, x):
        value, grads = jax.value_and_grad(lambda a: total(apply(p, a, x)))(make_copies(adapters, whole))
        return value, add_up(grads, whole)

    found = with_copies(adapters, p, x)
    expected = jax.jit(jax.value_and_grad(lambda a, p, x: total(apply(p, a, x))))(adapters, p, x)
    rounding = 5e-2 if case.name in ("cast", "bf16", "bf16_activations", "fp16") else 1e-4
    assert_trees_close(found, expected, rtol=rounding, atol=rounding * 10)


def test_a_convolution_has_the_gradient_of_the_adapter_itself():
    """Its rows have no parts with copies of their own. Each array is summed over devices once, and none is sent."""
    rows = NamedSharding(make_mesh((8,), ("data",)), P("data"))
    case = next(case for case in MODELS if case.name == "convolution")
    p, adapters = case.params(), case.adapters(RULES["lora"])
    x = jax.random.normal(jax.random.key(1), (8, *case.input().shape[1:]))
    apply = lora.lora_apply(case.fn)

    def loss(adapters, p, x):
        return total(apply(p, adapters, x))

    gradient = jax.jit(lora.value_and_grad(loss, batch_sharding=rows))
    args = (*jax.device_put((adapters, p), NamedSharding(rows.mesh, P())), jax.device_put(x, rows))
    found = gradient(*args)[1]
    assert_trees_close(found, jax.grad(loss)(adapters, p, x), rtol=1e-4, atol=1e-4)
    sent = collectives(gradient.lower(*args).compile().as_text())
    assert {c.kind for c in sent} == {"all-reduce"}
    shapes = sorted(math.prod(shape) for c in sent for shape in c.shapes for _ in range(c.times) if shape)
    assert shapes == sorted(array.size for one in adapters.values() for array in (one.a, one.b))


def test_copies_are_of_one_adapter():
    mesh = make_mesh((2, 4), ("data", "sequence"))
    case = next(case for case in MODELS if case.name == "scan_over_layers_of_experts")
    adapters = case.adapters(RULES["lora"])
    copies = jax.jit(lambda a: make_copies(a, NamedSharding(mesh, P("data", "sequence"))))(adapters)
    [copied], [adapter] = copies.values(), adapters.values()
    assert isinstance(copied, PerShardCopies)
    assert copied.inner.a.shape == (2, 4, *adapter.a.shape)
    assert_trees_equal(copied.asked, adapter)
    assert copied.kernel_shape() == adapter.kernel_shape()
    assert_trees_equal(lora.merge(case.params(), copies), lora.merge(case.params(), adapters))


def test_copies_are_of_nothing_else():
    """No zeros are carried for what has no copies: a head, a weight that is trained whole, explicit or whole meshes."""
    case = next(case for case in MODELS if case.name == "two_layers")
    p, x = case.params(), case.input()
    plan = lora.plan(case.fn, p, x, rules={"w1": lora.Lora(rank=2), "w2": lora.Full()})
    tree = {"lora": lora.init(jax.random.key(0), p, plan), "head": jnp.ones(3)}
    split = NamedSharding(make_mesh((2, 4), ("data", "sequence")), P("data"))
    found = jax.jit(lambda tree: copies_alone(tree, split))(tree)
    assert [copies and copies.inner.a.shape for copies in found] == [None, (2, *tree["lora"]["w1"].a.shape), None]
    explicit = NamedSharding(jax.make_mesh((8,), ("data",), (AxisType.Explicit,)), P("data"))
    for batch_sharding in (explicit, NamedSharding(split.mesh, P())):
        assert copies_alone(tree, batch_sharding) == [None, None, None]
    sums = add_to(tree, [None, jax.tree.map(jnp.ones_like, tree["lora"]["w1"]), None])
    moved = jax.tree.map(lambda a, b: bool(jnp.all(a == b + 1)), sums, tree)
    assert jax.tree.leaves(moved["lora"]["w1"]) == [True, True, True]
    assert_trees_equal((sums["head"], sums["lora"]["w2"]), (tree["head"], tree["lora"]["w2"]))


def test_dropout_is_the_same_with_copies():
    case = next(case for case in MODELS if case.name == "scan_over_layers")
    mesh = jax.make_mesh((5,), ("data",), (AxisType.Auto,), devices=jax.devices()[:5])
    adapters, apply = case.adapters(RULES["lora"]), lora.lora_apply(case.fn)

    def run(adapters):
        return apply(case.params(), lora.with_dropout(adapters, jax.random.key(3), 0.5), case.input())

    copied = jax.jit(lambda a: run(make_copies(a, NamedSharding(mesh, P("data")))))(adapters)
    assert_trees_close(copied, run(adapters), rtol=1e-5, atol=1e-5)
    whole = apply(case.params(), adapters, case.input())
    assert jnp.abs(copied[0] - whole[0]).max() > 1e-2


class LogicalAxes(nn.Module):
    """A model whose kernel has logical axes: Flax checks its shape flattened, where no mesh is set to place it on."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
        h = nn.DenseGeneral((4, 8), kernel_init=init, use_bias=False, name="split")(x)
        return nn.with_logical_constraint(h, ("batch", "heads", "kv")).sum(-1)


@pytest.mark.parametrize("how", ["value_and_grad", "jit_step", "microbatches"])
def test_the_loss_sees_no_mesh_that_its_caller_has_not_set(how):
    """So that a Linen model with axis rules, which trains in a loop of one's own, trains in ours."""
    mesh, axes = make_mesh((2, 4), ("data", "tensor")), [("batch", "data"), ("embed", None), ("heads", "tensor")]
    x = jax.device_put(jnp.linspace(-1, 1, 8 * 16).reshape(8, 16), NamedSharding(mesh, P("data")))
    variables = LogicalAxes().init(jax.random.key(0), x)
    places = nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), mesh, [*axes, ("kv", None)])
    fn, params, state = lora.from_linen(LogicalAxes(), jax.device_put(nn.unbox(variables), places))
    made = lora.plan(fn, params, state, x, rules={".*kernel": lora.Lora(rank=2)})
    adapters = lora.init(jax.random.key(1), params, made, shardings=lora.adapter_shardings(params, made))
    apply, optimizer, seen = lora.lora_apply(fn), optax.sgd(0.1), []

    def loss(adapters, params, x):
        seen.append(jax.sharding.get_abstract_mesh().empty)
        return jnp.mean(apply(params, adapters, state, x)[0] ** 2)

    with nn.logical_axis_rules([*axes, ("kv", None)]):
        grads = jax.jit(jax.grad(loss))(adapters, params, x)
        if how == "value_and_grad":
            gradient = jax.jit(lora.value_and_grad(loss, batch_sharding=x.sharding))
            found, expected = gradient(adapters, params, x)[1], grads
        else:
            step = lora.jit_step(loss, optimizer, microbatches=2 if how == "microbatches" else 1)
            start = lora.TrainState.create(jax.tree.map(jnp.copy, adapters), optimizer)
            found = step(start, params, x)[0].trainable
            expected = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads)
    assert_trees_close(found, expected)
    assert all(seen)


def test_boxes_whose_arrays_are_on_a_mesh():
    """As `jax.jit(model.init, out_shardings=...)` makes them: with logical names, which no mesh has."""
    mesh = make_mesh((2, 4), ("data", "model"))
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads"))
    model = nn.Dense(8, kernel_init=kernel, use_bias=False)
    x = jnp.ones((2, 4))
    specs = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), x))
    places = nn.logical_to_mesh_sharding(specs, mesh, (("embed", None), ("heads", "model")))
    fn, p, state = lora.from_linen(model, jax.jit(model.init, out_shardings=places)(jax.random.key(0), x))
    adapters = lora.init(jax.random.key(1), p, lora.plan(fn, p, state, x, rules={"kernel": lora.Lora(2)}))
    assert adapters["kernel"].b.sharding == NamedSharding(mesh, P(None, "model"))
    assert adapters["kernel"].a.sharding.is_fully_replicated


def test_a_state_that_was_used_is_named():
    p, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    apply = lora.lora_apply(lambda p, x: x @ p["w"])
    adapters = lora.init(jax.random.key(0), p, lora.plan(lambda p, x: x @ p["w"], p, x, rules={"w": lora.Lora(2)}))
    optimizer = lora.freeze_base(optax.adam(1e-2))
    step = lora.jit_step(lambda a, p, x: (apply(p, a, x) ** 2).mean(), optimizer)
    state = lora.TrainState.create(adapters, optimizer)
    step(state, p, x)
    with pytest.raises(LoraError, match="has been deleted: "):
        step(state, p, x)
    with pytest.raises(LoraError, match=r"inspect\(adapters\): 'w' has been deleted"):
        lora.inspect(state.trainable)
