"""Reports on programs for machines that are not there, and what is refused.

The machine is made of CPU devices here. tests/compiled compiles for real ones.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

import lora_jax as lora
from lora_jax.analysis import compile_report as reports
from lora_jax.analysis import topologies
from lora_jax.analysis.abstract_arguments import argument_bytes
from lora_jax.core.packed import is_packed

# A machine of eight CPU devices ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    found = topologies.Topology("v5e:2x4", 1, tuple(jax.devices()), 2**30, {})

    def find(name, slices=1):
        return found if name == found.name else topologies.find_topology(name, slices)

    monkeypatch.setattr(reports, "find_topology", find)
    return found


def mesh_of(devices, **axes):
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def model(params, x):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, params)[0]


SHAPES = {
    "up": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16),
    "down": jax.ShapeDtypeStruct((3, 256, 64), jnp.bfloat16),
}
SPECS = {"up": P(None, "fsdp"), "down": P(None, None, "fsdp")}
OPTIMIZER = optax.adam(1e-3)


def step_and_arguments(mesh, rules=None):
    shapes = SHAPES if rules is None else jax.eval_shape(lambda params: lora.bases.quantize(params, rules), SHAPES)
    params = lora.abstract(shapes, mesh, SPECS)
    x = lora.abstract(jax.ShapeDtypeStruct((16, 8, 64), jnp.bfloat16), mesh, P("fsdp"))
    plan = lora.plan(model, params, x, rules={".*": lora.Lora(rank=4)})
    state = lora.abstract_state(params, plan, OPTIMIZER)
    apply = lora.lora_apply(model)
    step = lora.jit_step(lambda a, p, x: jnp.mean(apply(p, a, x).astype(jnp.float32) ** 2), OPTIMIZER)
    return step, (state, params, x)


def test_bytes_of_each_part_are_those_of_the_shapes(machine):
    mesh = mesh_of(machine.devices, fsdp=8)
    step, args = step_and_arguments(mesh)
    report = lora.compile_report(step, *args, topology=machine.name)
    adapters = 2 * 3 * 4 * (64 + 256) * 4 + 2 * 2 * 4  # A and B of both in fp32, and alpha and r
    assert report.parts["base"] == 2 * 3 * 64 * 256 * 2 // 8
    assert report.parts["adapters"] == adapters
    assert report.parts["optimizer"] == 2 * adapters + 4
    assert report.parts["other arguments"] == 16 * 8 * 64 * 2 // 8 + 2 * 4
    assert report.fits
    assert report.advice == ()
    assert report.sent["all-reduce"] > 0
    assert report.topology == f"v5e:2x4 (8 x {machine.devices[0].device_kind})"
    assert "fits" in str(report)
    assert "base" in str(report)


def test_a_packed_base_counts_its_packed_bytes(machine):
    mesh = mesh_of(machine.devices, fsdp=8)
    step, args = step_and_arguments(mesh, {".*": lora.bases.Int8(stack=1)})
    assert all(map(is_packed, args[1].values()))
    report = lora.compile_report(step, *args, topology=machine.name)
    assert 2 * 3 * 64 * 256 // 8 <= report.parts["base"] < 1.3 * 2 * 3 * 64 * 256 // 8


def test_shapes_have_the_places_that_arrays_get(machine):
    mesh = mesh_of(machine.devices, data=2, tensor=4)
    specs = {"up": P(None, None, "tensor"), "down": P(None, "tensor")}
    dense = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), SHAPES)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    rules = {".*": lora.bases.Int8(stack=1)}
    there = lora.bases.place(lora.bases.quantize(dense, rules), shardings)
    shapes = lora.abstract(jax.eval_shape(lambda p: lora.bases.quantize(p, rules), SHAPES), mesh, specs)
    assert jax.tree.structure(shapes) == jax.tree.structure(there)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(there), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)
    plan = lora.plan(model, there, jnp.ones((2, 8, 64), jnp.bfloat16), rules={".*": lora.Lora(rank=4)})
    state = lora.TrainState.create(lora.init(jax.random.key(0), there, plan), OPTIMIZER)
    found = lora.abstract_state(shapes, plan, OPTIMIZER)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_what_does_not_fit_says_what_to_change_first(machine):
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (3.50G) exceeds available HBM (1.00G). HLO module: jit_step."
    )
    needed = reports._needed(said)
    assert needed == 3.5 * 2**30
    arguments = {"base": 2**31, "adapters": 2**20, "optimizer": 2**21, "other arguments": 4}
    report = reports.report_on(machine, arguments, reports.Compiled(needed=needed, said=said))
    assert not report.fits
    assert report.parts[reports.TEMPORARY] == needed - sum(arguments.values())
    assert "4 bits" in report.advice[0]
    assert "jax.checkpoint" in report.advice[1]
    assert "DOES NOT FIT" in str(report)
    assert reports._needed("INTERNAL: something else (3.50G)") is None


def test_of_a_program_that_fits_the_device_no_more_than_the_compiler_has(machine):
    small = topologies.Topology("v5e:2x4", 1, machine.devices, 1000, {})
    report = reports.report_on(small, {"base": 100}, reports.Compiled("", 100, 0, 950, 0, 1050))
    assert not report.fits
    assert len(report.advice) == 1
    assert "microbatches" in report.advice[0]


def test_of_a_gpu_jax_takes_three_quarters(machine):
    gpu = topologies.Topology("h100:8", 1, machine.devices, 1000, {}, share=0.75)
    assert reports.report_on(gpu, {"base": 100}, reports.Compiled("", 100, 0, 650, 0, 750)).advice == ()
    report = reports.report_on(gpu, {"base": 100}, reports.Compiled("", 100, 0, 651, 0, 751))
    assert report.fits
    assert "JAX takes 75% of this memory" in str(report)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in str(report)


def test_static_arguments_are_keywords(machine):
    x = lora.abstract(jax.ShapeDtypeStruct((8, 4), jnp.float32), mesh_of(machine.devices, data=8))

    def scaled(x, mode):
        return {"double": 2, "half": 0.5}[mode] * x

    assert lora.compile_report(scaled, x, mode="half", topology=machine.name).fits
    by_name = lora.compile_report(scaled, x=x, mode="half", topology=machine.name)
    assert by_name.parts["other arguments"] == 8 * 4 * 4
    assert by_name.parts["padding of arguments"] == 0
    with pytest.raises(lora.LoraError, match=r"argument 2 is 'half', and no array.*by its name"):
        lora.compile_report(scaled, x, "half", topology=machine.name)


def test_what_is_in_the_memory_of_a_host_takes_none_of_a_device(machine):
    mesh = mesh_of(machine.devices, data=8)
    there = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P(), memory_kind="pinned_host"))
    here = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert argument_bytes(({"w": there, "b": here},))["base"] == 8 * 4 * 4
    report = reports.report_on(
        machine, {"base": 100}, reports.Compiled("", 100, host={"arguments": 2**31, "outputs": 0})
    )
    assert report.parts["base"] == 100
    assert "on the host   GiB\n-----------  ----\narguments    2.00\n\n" in f"{report}\n\n"


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v9z:2x2", "v5e", "v5e:", "h100", 8, "H100 x 8", "v5e:0x2", "h100:0"])
def test_unknown_topologies_are_refused_with_names_that_work(name):
    with pytest.raises(lora.LoraError, match=r"v5e:4x4.*h100:8x8"):
        lora.topology_mesh(name, data=16)


@pytest.mark.parametrize(("name", "install"), [("v5e:2x2", r"jax\[tpu\]"), ("h100:8", r"jax\[cuda13\]")])
def test_a_compiler_that_is_not_there_is_named(monkeypatch, name, install):
    def absent(**_):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", absent)
    monkeypatch.setattr(topologies, "find_spec", lambda _: None)
    with pytest.raises(lora.LoraError, match=f"pip install .{install}.*no such backend"):
        lora.topology_mesh(name, data=4)
    monkeypatch.setattr(topologies, "find_spec", lambda _: True)
    with pytest.raises(lora.LoraError, match=r"knows no topology.*no such backend.*v5e:4x4"):
        lora.topology_mesh(name, data=4)


def test_a_plugin_that_did_not_start_is_named(monkeypatch):
    def unregistered(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", unregistered)
    monkeypatch.setattr(topologies, "find_spec", lambda _: True)
    with pytest.raises(lora.LoraError, match=r"CUDA plugin.*installed, but did not start.*JAX_PLATFORMS=cpu"):
        lora.topology_mesh("h100:8", data=8)


def test_the_environment_is_what_the_user_set_before_and_after(monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    found = {}

    def seen(**_):
        found.update({name: os.environ[name] for name in topologies.ENVIRONMENT})
        raise RuntimeError("no such backend")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", seen)
    before = dict(os.environ)
    with pytest.raises(lora.LoraError):
        lora.topology_mesh("v5e:2x2", data=4)
    assert found == topologies.ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    assert dict(os.environ) == before


def test_a_mesh_has_all_devices(monkeypatch, machine):
    monkeypatch.setattr(topologies, "find_topology", lambda *_: machine)
    assert dict(lora.topology_mesh("v5e:2x4", data=2, fsdp=4).shape) == {"data": 2, "fsdp": 4}
    with pytest.raises(lora.LoraError, match=r"has 4 devices, but .* has 8"):
        lora.topology_mesh("v5e:2x4", data=2, fsdp=2)
    with pytest.raises(lora.LoraError, match="sizes such as data=2"):
        lora.topology_mesh("v5e:2x4")


def double(tree):
    return jax.tree.map(lambda x: x * 2, tree)


def test_arguments_that_are_on_no_machine_are_named(machine):
    here, half = mesh_of(machine.devices, data=8), mesh_of(machine.devices[:4], data=4)
    good = lora.abstract(jax.ShapeDtypeStruct((8, 4), jnp.float32), here)
    for bad, message in [
        (jax.ShapeDtypeStruct((8, 4), jnp.float32), r"'layer/w'.* without a sharding.*lora\.abstract"),
        (jnp.ones((8, 4)), r"'layer/w'.* is an array on cpu devices"),
        (np.ones((8, 4)), r"'layer/w'.* is a ndarray without a sharding"),
        (lora.abstract(good, half), r"'layer/w'.* of 4 x .* not one of all 8 devices"),
        (
            jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
            "expected a NamedSharding",
        ),
    ]:
        with pytest.raises(lora.LoraError, match=message):
            lora.compile_report(double, {"fine": good, "layer": {"w": bad}}, topology=machine.name)
    assert lora.compile_report(double, {"fine": good}, topology=machine.name).fits


def test_a_program_that_cannot_be_traced_or_compiled_is_refused_with_the_first_line(monkeypatch, machine):
    mesh = mesh_of(machine.devices, data=8)
    x = lora.abstract(jax.ShapeDtypeStruct((8, 4), jnp.float32), mesh)
    with pytest.raises(lora.LoraError, match=r"cannot be traced.*TypeError: dot_general"):
        lora.compile_report(lambda x: x @ x, x, topology=machine.name)

    class Lowered:
        compiler_ir = jax.jit(jnp.tanh).lower(1.0).compiler_ir

        def compile(self, compiler_options):
            raise RuntimeError("Mosaic failed to compile: bad kernel\nat a long stack")

    with pytest.raises(
        lora.LoraError, match=r"does not compile for v5e:2x4.*Mosaic failed to compile: bad kernel; it names no part"
    ):
        reports.compiled_for(machine, Lowered())


def test_abstract_names_what_does_not_fit():
    mesh = mesh_of(jax.devices(), data=8)
    w = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    for tree, specs, message in [
        ({"w": w}, {"v": P()}, "'w' is not in both trees"),
        ({"w": w}, P("data"), "axis 0 of size 6 cannot be split evenly"),
        ({"w": w}, P("model"), "the mesh has no axis 'model'"),
        ({"w": w}, {"w": "data"}, "expected a PartitionSpec"),
        ({"w": 3}, P(), "'w' is a int, expected an array or a shape"),
    ]:
        with pytest.raises(lora.LoraError, match=message):
            lora.abstract(tree, mesh, specs)
    with pytest.raises(lora.LoraError, match="topology_mesh"):
        lora.abstract({"w": w}, None)


def test_specs_in_all_their_forms_say_the_same():
    mesh = mesh_of(jax.devices(), data=8)
    w = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    split, whole = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P(None, None))
    for specs, expected in [
        (P("data"), split),
        ({"w": P("data")}, split),
        (NamedSharding(mesh, P("data")), split),
        ({"w": NamedSharding(mesh, P("data"))}, split),
        (None, whole),
        ({"w": None}, whole),
    ]:
        assert lora.abstract(w, mesh, specs)["w"].sharding == expected


def test_a_state_is_of_parameters_on_a_mesh():
    x = jax.ShapeDtypeStruct((16, 8, 64), jnp.bfloat16)
    plan = lora.plan(model, SHAPES, x, rules={".*": lora.Lora(rank=4)})
    with pytest.raises(lora.LoraError, match=r"on no mesh.*lora\.abstract\(params, mesh, specs\)"):
        lora.abstract_state(SHAPES, plan, OPTIMIZER)
    with pytest.raises(lora.LoraError, match=r"`plan` is .*expected a plan"):
        lora.abstract_state(SHAPES, OPTIMIZER, plan)


def test_a_step_takes_a_state(machine):
    step, (state, params, x) = step_and_arguments(mesh_of(machine.devices, fsdp=8))
    with pytest.raises(lora.LoraError, match=r"`state` is .*TrainState"):
        lora.compile_report(step, state.trainable, params, x, topology=machine.name)


def test_a_mesh_of_another_number_of_slices_is_refused_with_how_to_make_one(monkeypatch):
    machine = topologies.Topology("v5e:2x2", 2, tuple(jax.devices()), 2**30, {})
    monkeypatch.setattr(reports, "find_topology", lambda *_: machine)
    x = lora.abstract(jax.ShapeDtypeStruct((8, 4), jnp.float32), mesh_of(jax.devices()[:4], data=4))
    with pytest.raises(lora.LoraError, match=r'not one of all 8.*topology_mesh\("v5e:2x2", slices=2, \.\.\.\)'):
        lora.compile_report(double, x, topology="v5e:2x2", slices=2)


def test_parts_are_known_by_their_types():
    w = jnp.ones((8, 4))
    adapters = {"w": lora.Lora(rank=2).init(jax.random.key(0), w, lora.KernelAxes((), (0,), (1,)))}
    moments = OPTIMIZER.init(adapters)
    assert argument_bytes(({"w": w}, w))["base"] == 32 * 4  # a single array is no base
    found = argument_bytes(({"w": w, "b": jnp.ones(4)}, adapters, moments, jnp.ones(3), jnp.uint4(1)))
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    assert found == {"base": 36 * 4, "adapters": own, "optimizer": 2 * own + 4, "other arguments": 3 * 4 + 1}
