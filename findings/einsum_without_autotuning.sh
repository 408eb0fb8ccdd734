#!/usr/bin/env bash
# With autotuning off, XLA does not compile a batched product of bf16 arrays for H100.
#
# Versions: jax, jaxlib and the CUDA 13 plugin 0.12.0.1, compiling for a described H100 without one.
#
# `einsum("becf,edf->ebcd")` of [8, 128, 160, 768] and [128, 256, 768], what a layer of experts computes in its backward
# pass, with xla_gpu_autotune_level=0: the product is given to Triton, for which no configuration compiles, and nothing
# falls back to cuBLAS. With smaller sizes, or xla_gpu_enable_triton_gemm=False, it compiles. Level 0 is what compiling
# without a GPU takes, since nothing can be timed, and what is set for results that do not differ from run to run.
#
# Seen:
#     experts                 No supported config found for HLO
#     experts, no Triton      compiles
#     smaller                 compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(for p in python3.13 python3.12 python3; do "$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
    2>/dev/null && echo "$p" && break; done) || { echo "JAX 0.12 needs Python 3.12 or newer."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 jax-cuda13-plugin==0.12.0.1 \
    jax-cuda13-pjrt==0.12.0.1 nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvrtc==13.5.37 nvidia-nvjitlink==13.5.37 \
    nvidia-nvvm==13.5.37

JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
gpu = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x1").devices[0]


def said(x, w, **options):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(gpu)) for shape in (x, w))
    program = jax.jit(lambda x, w: jnp.einsum("becf,edf->ebcd", x, w)).lower(x, w)
    try:
        program.compile(compiler_options={"xla_gpu_autotune_level": 0, **options})
    except jax.errors.JaxRuntimeError as error:
        return str(error).removeprefix("INTERNAL: ").split(":")[0]
    return "compiles"


found = {
    "experts": said((8, 128, 160, 768), (128, 256, 768)),
    "experts, no Triton": said((8, 128, 160, 768), (128, 256, 768), xla_gpu_enable_triton_gemm=False),
    "smaller": said((2, 4, 160, 128), (4, 256, 128)),
}
for name, what in found.items():
    print(f"{name:22}  {what}")
assert list(found.values()) == ["No supported config found for HLO", "compiles", "compiles"], "the behaviour has changed"
print("The product still does not compile without autotuning.")
PYTHON
