"""A training step compiled for a machine that is not there: whether it fits, and what it costs."""

from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax.analysis.abstract import abstract, abstract_state
from lora_jax.analysis.compile_report import CompileReport, compile_report
from lora_jax.analysis.topologies import find_topology, topology_mesh
from lora_jax.bases.quantize import quantize
from lora_jax.recipes.model import abstract as abstract_model
from lora_jax.recipes.model import packing
from lora_jax.recipes.objectives import make_loss
from lora_jax.recipes.options import Options, axes_over, batch_spec, make_optimizer, rules, with_rows
from lora_jax.recipes.packed_rows import DTYPES
from lora_jax.training.step import jit_step


def compile_for(topology: str, folder: str | Path, options: Options, *, pairs: bool = False) -> CompileReport:
    """Compile the step of a training run for another machine, of which only the folder's config.json is read.

    Args:
        topology: of the machine, as of `lora.compile_report`.
        folder: of the model.
        options: of the run; without `mesh`, each device has the whole base.
        pairs: whether the examples are preferences, which are trained by DPO.

    Raises:
        LoraError: as `lora.compile_report`; the mesh is of another number of devices; the rows cannot be split.
    """
    options.check()
    devices = len(find_topology(topology).devices)
    axes = axes_over(options, devices, f"and {topology} has {devices}")
    options = with_rows(options, axes, together=2 if pairs else 1)
    mesh = topology_mesh(topology, **axes)
    dtype = jnp.bfloat16 if options.dtype == "auto" else jnp.dtype(options.dtype)
    model = abstract_model(folder, dtype, mesh)
    dense, formats = model.params, packing(options.bits)
    params = jax.eval_shape(lambda params: quantize(params, formats), dense) if formats else dense
    model = model.replace(params=abstract(params, mesh, model.specs))
    plan = model.plan(rules(options, model))
    optimizer = make_optimizer(options, 1000)
    state = abstract_state(model.params, plan, optimizer)
    shape = (options.rows // 2, 2, options.max_length) if pairs else (options.rows, options.max_length)
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in DTYPES.items()}
    step = jit_step(make_loss(model, options, pairs), optimizer, microbatches=options.microbatches)
    return compile_report(step, state, model.params, abstract(shapes, mesh, batch_spec(axes)), topology=topology)
