"""A table row for each model that nobody here wrote, and the laws over all of them."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, assert_trees_equal, formed, total, trained_leaves

import lora_jax as lora

# Sizes are distinct, so that hardly any activation has the size of a weight by chance.
BATCH, TIME, D, K, HEADS, LAYERS, VOCABULARY = 5, 7, 12, 11, 4, 2, 19
Axes = Mapping[str, tuple[tuple[int, ...], ...]]


def drawn(tree: Any) -> Any:
    """Numbers in the place of shapes, with nothing to compile: matrices around 0, vectors around 1."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(3), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.ones(leaf.shape, leaf.dtype))
        values = 0.3 * rng.normal(size=leaf.shape) if len(leaf.shape) > 1 else rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values.astype(leaf.dtype))

    return jax.tree.map(draw, tree)


def tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape or (BATCH, TIME, D)).astype(np.float32))


def words(*shape: int) -> jax.Array:
    shape = shape or (BATCH, TIME)
    return jnp.asarray(np.arange(np.prod(shape), dtype=np.int32).reshape(shape) * 5 % VOCABULARY)


def start(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    return drawn(jax.ShapeDtypeStruct(shape, dtype))


# Most of the time goes into compilations, each for one or two runs.
QUICKLY = {"xla_backend_optimization_level": 0}
RULE = lora.Lora(rank=2, alpha=3, init_a=start)


class Call:
    """`fn(params, *args, **kwargs)`, as the model's own users write it."""

    def __init__(self, fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> None:
        self.fn, self.params, self.args, self.kwargs = fn, params, args, kwargs

    def __call__(self, params: Any, *args: Any) -> Any:
        return self.fn(params, *(args or self.args), **self.kwargs)


@dataclass(frozen=True)
class Model:
    """`make()` gives the call; weights whose path matches `pattern` are adapted, those in `materialize` densely."""

    name: str
    make: Callable[[], Call]
    pattern: str
    axes: Axes  # some paths, and their (stack, inputs, outputs)
    materialize: str | bool
    eager: bool  # also without jit, where starting is identity to the last bit

    def obeys_the_laws(self) -> None:
        call, rules, dense = self.make(), {self.pattern: RULE}, {"materialize": self.materialize}
        params = call.params
        if self.materialize:
            with pytest.raises(lora.LoraError, match="materialize"):
                lora.plan(call.fn, params, *call.args, rules=rules, **call.kwargs)
        plan = lora.plan(call.fn, params, *call.args, rules=rules, **dense, **call.kwargs)
        assert {path: tuple(plan[path].axes) for path in self.axes} == dict(self.axes)
        fresh = lora.init(jax.random.key(1), params, plan)
        adapters = drawn(fresh)
        adapted = lora.lora_apply(call.fn, **dense)

        def apply(adapters: Any, params: Any) -> Any:
            return adapted(params, adapters, *call.args, **call.kwargs)

        def merged(adapters: Any, params: Any) -> Any:
            return call(lora.merge(params, adapters))

        program = jax.jit(gradient(apply)).trace(adapters, params)
        run = program.lower().compile(QUICKLY)
        expect = jax.jit(gradient(merged)).lower(adapters, params).compile(QUICKLY)

        # Applying is merging.
        ((_, out), grads), ((_, expected), expected_grads) = run(adapters, params), expect(adapters, params)
        assert_close(out, expected)
        assert_close(grads, expected_grads)
        assert all(np.any(np.asarray(g)) for g in trained_leaves(grads)), "every adapter has a gradient"

        # Starting is identity, but for the roundings of another program.
        ((_, start), _), ((_, base), _) = run(fresh, params), expect(fresh, params)
        assert_trees_close(start, base, rtol=1e-6, atol=1e-6)
        if self.eager:
            assert_close(apply(adapters, params), expected)
            assert_trees_equal(apply(fresh, params), call(params))
        moved = [np.any(np.asarray(a != b)) for a, b in zip(*map(jax.tree.leaves, (out, base)), strict=True)]
        assert any(moved), "the adapters are seen in the output"

        # Factored stays factored.
        own = self.program_of_the_base(call)
        for path, adapter in {} if self.materialize else adapters.items():
            shape = adapter.kernel_shape()
            one_matrix = tuple(n for axis, n in enumerate(shape) if axis not in adapter.axes.stack)
            for what in (shape, one_matrix):
                assert Counter(formed(program.jaxpr, what)) <= Counter(formed(own, what)), path

    def program_of_the_base(self, call: Call) -> Any:
        """The model and its gradient with respect to its inputs."""
        floats = [i for i, a in enumerate(call.args) if is_float(a)]

        def of_inputs(inputs: list[Any], params: Any) -> Any:
            given = dict(zip(floats, inputs, strict=True))
            return call(params, *(given.get(i, a) for i, a in enumerate(call.args)))

        return jax.make_jaxpr(gradient(of_inputs))([call.args[i] for i in floats], call.params)


class Table(list[Model]):
    """The models of one file: `@table.model(pattern)` before each function that makes one."""

    def model(
        self, pattern: str, axes: Axes | None = None, materialize: str | bool = False, eager: bool = False
    ) -> Callable[[Callable[[], Call]], Callable[[], Call]]:
        def add(make: Callable[[], Call]) -> Callable[[], Call]:
            self.append(Model(make.__name__, make, pattern, axes or {}, materialize, eager))
            return make

        return add

    def laws(self) -> Callable[[Model], None]:
        """The test function of the file."""

        @pytest.mark.parametrize("model", self, ids=lambda model: model.name)
        def test_laws(model: Model) -> None:
            model.obeys_the_laws()

        return test_laws


def assert_close(found: Any, expected: Any) -> None:
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected) if is_float(leaf))
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, largest))


def is_float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def gradient(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`((scalar, f(x, rest)), gradient)` with respect to x, of a scalar of all the floats of the output."""

    def scalar(x: Any, rest: Any) -> Any:
        out = f(x, rest)
        return total([leaf for leaf in jax.tree.leaves(out) if is_float(leaf)]), out

    return jax.value_and_grad(scalar, has_aux=True)
