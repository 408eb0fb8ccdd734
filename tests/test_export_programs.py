"""Adapters, packed weights and training states as arguments of exported programs, and in files of Flax."""

import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers import KINDS, MODELS, RULES, assert_trees_close, assert_trees_equal
from jax import export

import lora_jax as lora
from lora_jax import LoraError
from lora_jax.core.kinds import KINDS as REGISTERED

CASES = {case.name: case for case in MODELS}
ALL = RULES | KINDS | {"rows": lora.Rows((3, 11, 5))}


def case_of(rule):
    return CASES["tied_embedding" if rule == "rows" else "two_layers"]


def adapters_of(rule, key=2):
    case = case_of(rule)
    return lora.init(jax.random.key(key), case.params(), case.plan(ALL[rule]))


def written(fn, *args):
    """The program, written and read again."""
    pytest.importorskip("flatbuffers", reason="jax.export writes programs with it")
    return export.deserialize(export.export(jax.jit(fn))(*args).serialize())


def test_all_kinds_are_in_the_table():
    kinds = {type(target.abstract()) for rule in ALL for target in case_of(rule).plan(ALL[rule]).values()}
    own = {kind for kind in REGISTERED.values() if kind.__module__.startswith("lora_jax.")}
    assert own - kinds == {lora.Ia3InputsAdapter}  # which has no rule: it comes from files of PEFT


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.sampled(5)
def test_adapters_of_every_kind_are_arguments_and_results(rule):
    adapters = adapters_of(rule)
    program = written(lambda a: jax.tree.map(lambda array: 2 * array, a), adapters)
    out = program.call(adapters)
    assert_trees_equal(out, jax.tree.map(lambda array: 2 * array, adapters))
    for path, adapter in adapters.items():
        assert type(out[path].axes) is lora.KernelAxes
        assert out[path].kernel_shape() == adapter.kernel_shape()


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.sampled(5)
def test_one_program_for_many_adapters(rule):
    case = case_of(rule)
    apply, params, x = lora.lora_apply(case.fn), case.params(), case.input()
    program = written(apply, params, adapters_of(rule), x)
    for shift in (0.0, 0.1):
        adapters = jax.tree.map(lambda array: array + shift, adapters_of(rule))  # noqa: B023
        assert_trees_close(program.call(params, adapters, x), jax.jit(apply)(params, adapters, x))


def test_a_batch_of_any_size():
    case = case_of("lora")
    apply, params, adapters = lora.lora_apply(case.fn), case.params(), adapters_of("lora")
    [n] = export.symbolic_shape("n")
    rows = jax.ShapeDtypeStruct((n, *case.input().shape[1:]), jnp.float32)
    program = written(apply, params, adapters, rows)
    for size in (1, 3):
        x = case.input()[:size]
        assert_trees_close(program.call(params, adapters, x), apply(params, adapters, x))


FORMATS = {
    "nf4": lora.bases.Nf4(),
    "nf4 of single scales": lora.bases.Nf4(double=False),
    "int8": lora.bases.Int8(),
    "fp8": lora.bases.Fp8(dtype=jnp.bfloat16),
}


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def base():
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


SHAPES = {"w": (64, 128), "v": (128, 64)}
X = jnp.linspace(-1, 1, 3 * 64).reshape(3, 64)


def base_and_adapters():
    params = base()
    plan = lora.plan(model, params, X, rules={".*": lora.Lora(rank=2)})
    return params, jax.tree.map(lambda a: a + 0.01, lora.init(jax.random.key(0), params, plan))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.sampled(5)
def test_packed_bases_are_arguments(name):
    params, adapters = base_and_adapters()
    packed = lora.bases.quantize(params, {"w": FORMATS[name]})
    apply = lora.lora_apply(model)
    program = written(lambda p, a, x: (apply(p, a, x), p), packed, adapters, X)
    y, same = program.call(packed, adapters, X)
    assert_trees_close(y, jax.jit(apply)(packed, adapters, X))
    assert_trees_equal(same, packed)


def test_packed_bases_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    params, adapters = base_and_adapters()
    columns, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P(None, "tensor"), jax.P()))
    packed = lora.bases.quantize(params, {".*": lora.bases.Int8()})
    packed = {name: w.placed(columns) for name, w in packed.items()}
    adapters, x = jax.device_put((adapters, X), whole)
    apply = jax.jit(lora.lora_apply(model))
    assert_trees_close(written(apply, packed, adapters, x).call(packed, adapters, x), apply(packed, adapters, x))


def test_what_a_program_was_exported_with_has_to_be_the_same():
    params, adapters = base_and_adapters()
    program = written(lora.lora_apply(model), params, adapters, X)
    other = {path: dataclasses.replace(a, axes=a.axes._replace(stack=(2,))) for path, a in adapters.items()}
    with pytest.raises(ValueError, match=r"args\[1\]\['v'\].*KernelAxes"):
        program.call(params, other, X)


@functools.cache
def register_states_of_optax():
    """Once a process: the states are optax's own, and so is their registration."""
    for state in (optax.EmptyState, optax.ScaleByAdamState, optax.ScaleByScheduleState):
        export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")


def test_a_state_is_an_argument_and_a_result():
    register_states_of_optax()
    params, adapters = base_and_adapters()
    optimizer, apply = optax.adamw(optax.constant_schedule(1e-2)), lora.lora_apply(model)
    state = lora.TrainState.create(adapters, optimizer, jax.random.key(3), lora.LossScale.create())

    def loss(adapters, params, x, key):
        return jnp.mean(apply(params, lora.with_dropout(adapters, key, 0.5), x) ** 2)

    def step(state, params, x):
        return lora.train_step(loss, optimizer, state, params, x)

    program = written(step, state, params, X)
    (found, metrics), (expected, same) = program.call(state, params, X), jax.jit(step)(state, params, X)
    assert_trees_equal(jax.random.key_data(found.key), jax.random.key_data(state.key))
    without = [dataclasses.replace(state, key=None) for state in (found, expected)]
    assert_trees_close((without[0], metrics), (without[1], same))


def test_adapters_with_dropout_are_arguments():
    params, adapters = base_and_adapters()
    dropped = lora.with_dropout(adapters, jax.random.key(3), 0.5)
    apply = jax.jit(lora.lora_apply(model))
    assert_trees_close(written(apply, params, dropped, X).call(params, dropped, X), apply(params, dropped, X))


def test_the_state_of_a_budget_is_an_argument():
    register_states_of_optax()
    optimizer = lora.adapt_budget(optax.sgd(0.1), target_rank=1, total_steps=10)
    state = lora.TrainState.create(adapters_of("adalora"), optimizer)
    assert_trees_equal(written(lambda s: s, state).call(state), state)


@lora.register_kind("half_of_test_export_programs")
@dataclass(frozen=True)
class HalfAdapter(lora.Factored):
    """W' = W + A B / 2"""

    a: jax.Array
    b: jax.Array
    axes: lora.KernelAxes = field(metadata={"static": True})
    note: tuple[str | None, ...] = field(default=("x", None), metadata={"static": True})

    layout = {"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")}  # noqa: RUF012

    def to_lora(self):
        return lora.LoraAdapter(self.a, self.b, self.axes, 0.5)


def test_a_kind_of_ones_own():
    params, adapters = base_and_adapters()
    adapters = {path: HalfAdapter(adapter.a, adapter.b, adapter.axes) for path, adapter in adapters.items()}
    apply = jax.jit(lora.lora_apply(model))
    program = written(lambda p, a, x: (apply(p, a, x), a), params, adapters, X)
    assert_trees_close(program.call(params, adapters, X), (apply(params, adapters, X), adapters))
    assert_trees_equal(serialization.from_bytes(adapters, serialization.to_bytes(adapters)), adapters)


def test_a_kind_may_be_defined_again_as_in_a_notebook():
    def define():
        @lora.register_kind("again_of_test_export_programs")
        @dataclass(frozen=True)
        class AgainAdapter(HalfAdapter):
            pass

        return AgainAdapter

    first, second = define(), define()
    adapter = base_and_adapters()[1]["w"]
    for kind in (first, second):
        one = kind(adapter.a, adapter.b, adapter.axes)
        assert_trees_equal(serialization.from_bytes(one, serialization.to_bytes(one)), one)


# Files of Flax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.sampled(5)
def test_flax_writes_adapters_of_every_kind(rule):
    adapters = adapters_of(rule)
    fresh = jax.tree.map(jnp.zeros_like, adapters)
    assert_trees_equal(serialization.from_bytes(fresh, serialization.to_bytes(adapters)), adapters)
    for path, arrays in serialization.to_state_dict(adapters).items():
        assert {name for name, array in arrays.items() if array is not None} == {*adapters[path].arrays()}


def test_flax_writes_states():
    _, adapters = base_and_adapters()
    optimizer = lora.freeze_base(optax.adamw(optax.constant_schedule(1e-2)))

    def create(adapters, seed):
        return lora.TrainState.create(adapters, optimizer, jax.random.key(seed), lora.LossScale.create())

    state, fresh = create(adapters, 7), create(jax.tree.map(jnp.zeros_like, adapters), 0)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_trees_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    assert_trees_equal(dataclasses.replace(restored, key=None), dataclasses.replace(state, key=None))


def test_flax_writes_dropout_and_packed_weights():
    params, adapters = base_and_adapters()
    dropped = lora.with_dropout(adapters, jax.random.key(3), 0.5)
    restored = serialization.from_bytes(
        lora.with_dropout(jax.tree.map(jnp.zeros_like, adapters), jax.random.key(0), 0.5),
        serialization.to_bytes(dropped),
    )
    apply = lora.lora_apply(model)
    assert_trees_equal(apply(params, restored, X), apply(params, dropped, X))
    for packing in FORMATS.values():
        packed = lora.bases.quantize(params, {"w": packing})
        zeros = jax.tree.map(jnp.zeros_like, packed)
        assert_trees_equal(serialization.from_bytes(zeros, serialization.to_bytes(packed)), packed)


def test_flax_refuses_a_state_of_another_kind():
    dora = serialization.to_bytes(adapters_of("dora"))
    with pytest.raises(
        LoraError, match=r"LoraAdapter has the fields \['a', 'b', 'm', 'ratio'\], expected \['a', 'b', 'ratio'\]"
    ):
        serialization.from_bytes(adapters_of("lora"), dora)


# Fresh processes ------------------------------------------------------------------------------------------------------

READER = """
import sys
import jax, numpy as np
from jax import export
import lora_jax as lora

program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
params = dict(np.load(sys.argv[2]))
plan = lora.plan(lambda p, x: x @ p["w"] @ p["v"], params, params["x"][:1], rules={"w|v": lora.Lora(rank=2)})
del params["x"]
adapters = jax.tree.map(lambda a: a + 0.01, lora.init(jax.random.key(0), params, plan))
np.save(sys.argv[3], program.call(params, adapters, np.load(sys.argv[2])["x"]))
"""


@pytest.mark.slow
def test_a_program_is_called_in_a_fresh_process(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes programs with it")
    params, adapters = base_and_adapters()
    apply = jax.jit(lora.lora_apply(model))
    (tmp_path / "program").write_bytes(export.export(apply)(params, adapters, X).serialize())
    np.savez(tmp_path / "params.npz", x=X, **params)
    files = [str(tmp_path / name) for name in ("program", "params.npz", "found.npy")]
    subprocess.run([sys.executable, "-c", READER, *files], check=True)
    np.testing.assert_allclose(np.load(files[-1]), apply(params, adapters, X), rtol=1e-5, atol=1e-5)


LATER = """
import sys
import jax.numpy as jnp
import lora_jax as lora

assert not any(name.partition(".")[0] == "flax" for name in sys.modules)
adapter = lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), lora.KernelAxes((), (0,), (1,)), 1.0)
from flax import serialization
zeros = lora.LoraAdapter(jnp.zeros((4, 2)), jnp.zeros((2, 3)), adapter.axes, 1.0)
restored = serialization.from_bytes(zeros, serialization.to_bytes(adapter))
assert isinstance(restored, lora.LoraAdapter) and bool((restored.a == 1).all())
"""


@pytest.mark.slow
def test_flax_may_be_imported_later_and_is_not_imported_for_this():
    subprocess.run([sys.executable, "-c", LATER], check=True)
