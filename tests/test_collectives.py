"""What training over a mesh sends: exact counts from the compiled programs."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import placements
import pytest
from helpers import assert_trees_close, trained
from jax import P
from jax.sharding import NamedSharding

import lora_jax as lora
from benchmarks.collectives import (
    INNER,
    LAYERS,
    MICROBATCHES,
    PLACES,
    RANK,
    ROWS,
    TOKENS,
    WIDTH,
    Setup,
    collectives,
    launches,
    nbytes,
)

FACTORS = LAYERS * 2 * RANK * (WIDTH + INNER) * 4  # bytes of all adapters


@functools.cache
def setup(name):
    return Setup(PLACES[name])


@functools.cache
def counted(name, program, *args, **kwargs):
    return getattr(setup(name), program)(*args, **kwargs)


def arrays(found, kind="all-reduce"):
    """Collectives of a kind that carry more than scalars, such as the loss."""
    return [c for c in found if c.kind == kind and any(c.shapes)]


def test_collectives_are_read_off_a_program():
    """Sums over devices inside a scan inside a scan, counted by hand."""
    mesh = PLACES["data 8"].mesh()

    def local(x):
        def inner(y, _):
            return jax.lax.psum(jax.lax.pcast(y, "data", to="varying"), "data"), None

        def outer(y, _):
            return jax.lax.scan(inner, y, length=5)[0] + 1, None

        y = jax.lax.psum(x, "data")
        return jax.lax.scan(outer, y, length=3)[0]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()))
    found = collectives(run.lower(jax.numpy.ones((8, 6))).compile().as_text())
    assert [(c.kind, c.shapes, c.nbytes, c.times, c.depth) for c in sorted(found, key=lambda c: c.depth)] == [
        ("all-reduce", ((1, 6),), 24, 1, 0),
        ("all-reduce", ((1, 6),), 24, 15, 2),
    ]


def test_one_gradient_reduction_with_microbatches_and_scanned_layers():
    [reduction] = arrays(counted("data 8", "lora", MICROBATCHES))
    assert (reduction.times, reduction.depth) == (1, 0)
    assert reduction.nbytes == FACTORS
    many = arrays(counted("data 8", "lora", MICROBATCHES, once=False))
    assert sum(c.times for c in many) == LAYERS * MICROBATCHES, "the compiler by itself reduces at every product"


@pytest.mark.parametrize("name", ["data 8", "data 2, tensor 4", "data 2, sequence 4"])
def test_under_shard_map_loss_and_metrics_come_with_the_gradient(name):
    found = counted(name, "shard_map", MICROBATCHES)
    [reduction] = [c for c in found if c.depth == 0 and any(c.shapes)]
    assert () in reduction.shapes, "the loss"
    if "tensor" not in PLACES[name].axes:
        assert launches(found) == 1
        assert reduction.nbytes == FACTORS + 8, "the adapters, the loss and its weight"


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.sampled(5)
def test_over_every_mesh_one_gradient_reduction_is_all_that_is_added(name):
    """No launch beyond the base model's, but one reduction of gradients and one of their norm."""
    base, found = counted(name, "base", MICROBATCHES), counted(name, "lora", MICROBATCHES)
    splits_batch, splits_adapters = any(PLACES[name].batch), "tensor" in PLACES[name].axes
    assert launches(found) == launches(base) + splits_batch + splits_adapters
    assert len([c for c in arrays(found) if c.depth == 0]) == splits_batch


def test_data_parallel_traffic_over_full_fine_tuning():
    """r(d + k) / (dk)"""
    lora, full = (
        sum(c.times * 4 * math.prod(shape) for c in counted("data 8", program, 1) for shape in c.shapes if shape)
        for program in ("lora", "full")
    )
    assert lora / full == RANK * (WIDTH + INNER) / (WIDTH * INNER)


@pytest.mark.parametrize("name", ["tensor 8", "data 2, tensor 4"])
def test_tensor_parallel_products_ride_along(name):
    """The columns' and rows' thin products come with the base's own reductions: r/d more bytes in each."""
    inside = [[c for c in counted(name, program, MICROBATCHES) if c.depth == 2] for program in ("base", "lora")]
    base, found = inside
    assert launches(found) == launches(base) == 2 * LAYERS * MICROBATCHES
    assert nbytes(found) * WIDTH == nbytes(base) * (WIDTH + RANK)
    rows = ROWS * TOKENS // MICROBATCHES // PLACES[name].axes.get("data", 1)
    assert nbytes(base) == launches(base) * rows * WIDTH * 4
    replicated = counted(name, "lora", MICROBATCHES, policy="replicate")
    assert launches(replicated) > launches(counted(name, "lora", MICROBATCHES)), "what the default policy saves"


@pytest.mark.parametrize("name", ["fsdp 8", "data 2, fsdp 2, tensor 2"])
def test_fsdp_gathers_the_base_once_for_each_use_and_adapters_never(name):
    """Each of two weights has two uses: forward, and for the gradient of its input."""
    gathers = [c for c in counted(name, "lora", MICROBATCHES) if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == 2 * 2 * LAYERS * MICROBATCHES
    tensor = PLACES[name].axes.get("tensor", 1)
    whole = {(WIDTH, INNER // tensor), (INNER // tensor, WIDTH)}
    assert {shape for c in gathers for shape in c.shapes} == whole


@pytest.mark.parametrize("name", ["data and tensor", "data, fsdp and tensor"])
def test_what_is_sent_does_not_depend_on_the_mesh_in_context(name):
    """The operands' own types say that they are on a mesh: also under a plain `jax.jit` of placed arguments."""
    place = next(place for place in placements.PLACEMENTS if place.name == name)
    mesh = place.mesh()
    params = place.params(mesh)
    adapters = lora.init(jax.random.key(1), params, placements.plan())
    batch = [jax.device_put(rows, jax.NamedSharding(mesh, place.batch)) for rows in placements.batch(0)]

    def sent():
        gradient = jax.jit(lambda a, p, *rows: jax.grad(lambda a: placements.loss(a, p, *rows)[0])(a))
        found = collectives(gradient.lower(adapters, params, *batch).compile().as_text())
        return sorted((c.kind, c.shapes, c.times) for c in found)

    plain = sent()
    with jax.set_mesh(mesh):
        assert sent() == plain
    assert {kind for kind, *_ in plain} >= {"all-reduce"}


def test_adapters_of_experts_stay_where_they_are():
    """Experts are split over the axis that splits the rows: each device trains its own, and gets those of no other."""
    mesh = jax.make_mesh((8,), ("expert",), (jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, P("expert"))

    def local(w, x):  # [E / 8, D, D], [rows / 8, D]
        every = jax.lax.all_gather(x, "expert", tiled=True)
        return jax.lax.psum_scatter(jnp.tanh(jnp.einsum("td,edf->etf", every, w)).sum(0), "expert", tiled=True)

    def model(params, x):
        return x + jax.shard_map(local, mesh=mesh, in_specs=(P("expert"),) * 2, out_specs=P("expert"))(params["up"], x)

    params = {"up": jax.device_put(jax.random.normal(jax.random.key(0), (16, WIDTH, WIDTH)) / WIDTH, split)}
    x = jax.device_put(jax.random.normal(jax.random.key(1), (ROWS, WIDTH)), split)
    plan = lora.plan(model, params, x, rules={"up": lora.Lora(RANK, stack=0)})
    state = lora.TrainState.create(trained(lora.init(jax.random.key(2), params, plan), 3), optax.sgd(0.1))
    assert state.trainable["up"].a.sharding.spec[0] == "expert"
    apply = lora.lora_apply(model)

    def loss(adapters, params, x):
        return jnp.mean(apply(params, adapters, x) ** 2)

    plain = jax.value_and_grad(loss)
    expected, gradient = jax.jit(plain)(state.trainable, params, x)
    step = lora.jit_step(loss, optax.sgd(0.1))
    found = collectives(step.lower(state, params, x).compile().as_text())
    norm_and_whether_it_is_finite = 8
    assert (
        nbytes(found)
        <= nbytes(collectives(jax.jit(plain).lower(state.trainable, params, x).compile().as_text()))
        + norm_and_whether_it_is_finite
    )
    moved = jax.tree.map(lambda array, slope: array - 0.1 * slope, state.trainable, gradient)
    state, metrics = step(state, params, x)
    assert_trees_close((metrics["loss"], state.trainable["up"].a), (expected, moved["up"].a), rtol=1e-5, atol=1e-6)
