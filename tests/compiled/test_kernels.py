"""Pallas kernels in compiled programs: NF4's own, and the attention of a user's model, which adapters leave alone."""

import functools

import cached
import decoder
import jax
import jax.numpy as jnp
import programs
import pytest
from jax import P
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from needs import needs

import lora_jax as lora
from lora_jax.analysis import hlo
from lora_jax.analysis.topologies import find_topology
from lora_jax.bases import nf4_kernels

D, K, ROWS = 1024, 2048, 16  # few rows, as in generation: then kernels are the default
MACHINES = {"v5e:2x2": ("tpu", "tpu", 1), "h100:8": ("cuda", "gpu", 132)}  # JAX's platform, the kernel's, cores
OTHERS = {"v4:2x2x2": ("tpu", "tpu v4", 1), **dict.fromkeys(("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"), ("tpu", "tpu", 1))}
TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")

# JAX warns of Triton, in which the kernels for GPUs are written.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
on_machines = pytest.mark.parametrize("machine", MACHINES)


def kernels(text):
    """How many kernels written by hand a program holds; one in a loop counts once."""
    lines = (one for lines in hlo.parse(text).computations.values() for one in lines)
    return sum(one.operation == "custom-call" and any(name in one.rest for name in TARGETS) for one in lines)


# NF4 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [*MACHINES, *OTHERS])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_kernel_for_nf4_compiles_wholly_and_takes_no_memory(machine, transposed):
    needs(machine)
    (platform, kernel, cores), found = (MACHINES | OTHERS)[machine], find_topology(machine)
    device, one = found.devices[0], SingleDeviceSharding(found.devices[0])
    run = functools.partial(
        nf4_kernels.run, dtypes=(jnp.bfloat16,), precision=None, transposed=transposed, platform=kernel
    )
    shapes = (((ROWS, K if transposed else D), jnp.bfloat16), ((D, K), jnp.uint4), ((D // 64, K), jnp.float32))
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in shapes]
    here = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=here)):
        lowered = jax.jit(run).trace(*args).lower(lowering_platforms=(platform,))
    compiled = cached.compiled(found, lowered, args)
    assert kernels(compiled.text) == 1
    assert compiled.temporary == 0


class Nf4:
    """An adapted product with a weight in NF4 over the rows of a mesh: in a `shard_map`, or left to the compiler."""

    def __init__(self, machine):
        needs(machine)
        self.machine, n = machine, len(find_topology(machine).devices)
        self.mesh = lora.topology_mesh(machine, data=n)
        rules = {"w": lora.bases.Nf4(double=False, stack=0)}
        dense = {"w": jax.ShapeDtypeStruct((D, K), jnp.bfloat16)}
        packed = jax.eval_shape(lambda params: lora.bases.quantize(params, rules), dense)
        self.params = lora.abstract(packed, self.mesh)
        self.x = lora.abstract(jax.ShapeDtypeStruct((n * ROWS, D), jnp.bfloat16), self.mesh, P("data"))
        plan = lora.plan(self.model, self.params, self.x, rules={"w": lora.Lora(rank=8)})
        self.adapters = lora.abstract_state(self.params, plan, programs.OPTIMIZER).trainable

    def model(self, params, x):
        return jnp.tanh(x @ params["w"])

    def loss(self, x, adapters, params):
        return jnp.mean(lora.lora_apply(self.model)(params, adapters, x).astype(jnp.float32))

    def mapped(self, x, adapters, params):
        def local(x, adapters, params):
            return jax.lax.pmean(self.loss(x, adapters, params), "data")

        specs = (P("data"), P(), P())
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=P())(x, adapters, params)

    def kernels(self, fn, *more):
        found = cached.report(fn, self.x, self.adapters, self.params, *more, topology=self.machine)
        return kernels(found.text)


@on_machines
def test_in_a_shard_map_products_take_kernels_forward_and_backward(machine):
    nf4 = Nf4(machine)
    assert nf4.kernels(nf4.mapped) == 1
    assert nf4.kernels(jax.value_and_grad(nf4.mapped, argnums=(0, 1))) == 2


def test_a_tpu_that_cannot_gather_has_a_kernel_too():
    nf4 = Nf4("v4:2x2x2")
    assert nf4.kernels(jax.value_and_grad(nf4.mapped, argnums=(0, 1))) == 2


@on_machines
def test_forward_mode_derivatives_take_them_too(machine):
    nf4 = Nf4(machine)

    def derivative(x, adapters, params, tangent):
        return jax.jvp(lambda x: nf4.mapped(x, adapters, params), (x,), (tangent,))

    assert nf4.kernels(derivative, nf4.x) == 2


@on_machines
def test_what_the_compiler_splits_takes_none(machine):
    nf4 = Nf4(machine)
    assert nf4.kernels(jax.value_and_grad(nf4.loss, argnums=(0, 1))) == 0


# Attention ------------------------------------------------------------------------------------------------------------


def flash(mesh):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    def local(q, k, v):  # [B, T, H, size], of one device
        q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))
        return jnp.swapaxes(flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5), 1, 2)

    return jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)


def splash(mesh):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def local(q, k, v):
        heads, tokens = q.shape[2], q.shape[1]
        mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens)) for _ in range(heads)])
        run = kernel.make_splash_mha_single_device(mask=mask)
        q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.swapaxes(jax.vmap(run)(q, k, v), 1, 2)

    return jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)


@pytest.mark.parametrize("attention", [flash, splash])
def test_attention_written_by_hand_goes_through_a_step_untouched(attention):
    """Forward, again as layers are recomputed, and for the gradients of q and of k and v."""
    needs("v5e:2x2")
    setup = programs.Setup("v5e:2x2", 1, {"data": 4}, programs.SMALL, programs.FEW)
    setup.model = decoder.make(setup.size, setup.mesh, attention(setup.mesh))
    frozen, step = setup.floor(), setup.lora_step()
    assert kernels(step.text) == kernels(frozen.text) == 4
