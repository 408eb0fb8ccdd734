"""Programs that do not compile: the message has the compiler's first line, and where in the program it is.

The texts are those of the compilers for TPUs and GPUs; the programs are lowered here. tests/compiled has real failures.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh

import lora_jax as lora
from lora_jax.analysis import compile_report as reports
from lora_jax.analysis import topologies
from lora_jax.analysis.failures import compiled_at, first_line

MACHINE = topologies.Topology("v5e:2x4", 1, tuple(jax.devices()), 2**30, {})
X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(reports, "find_topology", lambda *_: MACHINE)


def on_all_devices(shape=X):
    mesh = Mesh(np.array(MACHINE.devices), ("data",), axis_types=(AxisType.Auto,))
    return lora.abstract(shape, mesh, P("data"))


def line_of(function, text):
    """Return `file:line` of the line of a function that has this text."""
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def twice(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


def with_a_kernel(x):
    x = jnp.tanh(x)
    return pl.pallas_call(twice, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="twice")(x)


def with_an_unknown_call(x):
    return jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) + 1


def with_an_fft(x):
    x = x + 1
    return jnp.fft.fft(x).real


def for_tpu(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))


def test_a_real_failure_names_the_line():
    with pytest.raises(lora.LoraError, match=r"does not compile for v5e:2x4.*no_such_target") as caught:
        lora.compile_report(with_an_unknown_call, on_all_devices(), topology="v5e:2x4")
    assert line_of(with_an_unknown_call, "ffi_call") in str(caught.value)


@pytest.mark.parametrize(
    ("said", "function", "text"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %pallas_call.12 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%tanh.2)",
            with_a_kernel,
            "pallas_call",
        ),
        (
            "INTERNAL: Mosaic failed to compile TPU kernel with MLIR module name `twice` HLO name `pallas_call.1`: "
            "Invalid vector type for load",
            with_a_kernel,
            "pallas_call",
        ),
        (
            "INVALID_ARGUMENT: during context [pre-optimization]: Unexpected operand type for FFT: c64[8,128]{1,0}\n"
            "\nSuspected Python Code Location:\n  <no source information>",
            with_an_fft,
            "jnp.fft",
        ),
    ],
)
def test_what_a_compiler_names_is_found_in_the_program(said, function, text):
    assert compiled_at(said, for_tpu(function, X)).startswith(f"; at {line_of(function, text)} ({function.__name__})")


@pytest.mark.parametrize(
    "said",
    [
        'INTERNAL: Invalid vector type for load\nat location: loc("get"(callsite("attend"("/home/me/model.py":10:3 '
        'to :47) at "layer"("/home/me/model.py":50:3 to :9))))',
        "INVALID_ARGUMENT: Custom emitter not found\n\nSuspected Python Code Location:\n"
        "  {jax}/_src/pjit.py:12:4 [jit]\n  /home/me/model.py:10:4 [attend]\n  /home/me/model.py:50:2 [layer]",
        "INVALID_ARGUMENT: Failed to parse Triton module: /home/me/model.py:10:37: error: more elements than 1048576",
        'UNIMPLEMENTED: %y = f32[8] add(%x), metadata={op_name="jit(f)/add" source_file="/home/me/model.py" '
        "source_line=10}",
    ],
)
def test_lines_that_compilers_name_are_taken(said):
    jax_folder = jax.__file__.removesuffix("/__init__.py")
    assert "; at /home/me/model.py:10" in compiled_at(said.replace("{jax}", jax_folder), None)


def test_a_failure_without_a_place_says_so():
    program = for_tpu(jnp.tanh, X)
    assert compiled_at("INTERNAL: something else", program) == "; it names no part of the program"
    assert compiled_at('metadata={op_name="jit(f)/scan/add"}', program) == "; at jit(f)/scan/add"


def test_first_lines():
    assert first_line(RuntimeError("INTERNAL: E1001:\nno memory\nmore")) == "RuntimeError: INTERNAL: E1001: no memory"
    assert first_line(RuntimeError("")) == "RuntimeError: no message"
    assert len(first_line(RuntimeError("x" * 10_000))) < 700


def test_what_cannot_be_traced_or_lowered_names_the_line():
    def mismatched(x):
        return x @ x

    def not_lowered(x):
        return with_a_kernel(x)

    for function, text, message in [
        (mismatched, "x @ x", "TypeError: dot_general"),
        (not_lowered, "with_a_kernel", "interpret"),  # Pallas has no kernels for CPUs
    ]:
        with pytest.raises(lora.LoraError, match=message) as caught:
            lora.compile_report(function, on_all_devices(), topology="v5e:2x4")
        line = line_of(mismatched, text) if function is mismatched else line_of(with_a_kernel, "pallas_call")
        assert f"; at {line}" in str(caught.value)
