"""Machines that are not there, as the compilers for them know them.

libtpu holds XLA's compiler for TPUs, and the CUDA plugin the one for GPUs: both compile for machines that this one has
no part of.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lora_jax.analysis.failures import first_line
from lora_jax.core.errors import LoraError

GIB = 1 << 30
# The HBM of one device in bytes, by the beginning of the topology's name. Of TPUs it is what the compiler says that a
# program may have, in GiB with two decimals, when it refuses one. A device of v4 is one of the two cores of a chip, one
# of tpu7x likewise. Of GPUs it is all that the driver shows, of which JAX takes XLA_PYTHON_CLIENT_MEM_FRACTION.
HBM = {
    "v4": int(15.25 * GIB),
    "v5e": int(15.75 * GIB),
    "v5p": int(95.73 * GIB),
    "v6e": int(31.24 * GIB),
    "tpu7x": int(94.74 * GIB),
    "h100": 84_978_434_048,
}
TPUS = "v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:2x2, v6e:4x8, v4:2x2x2, tpu7x:2x2x1"
KNOWN = f"{TPUS}; h100:8 (one host of 8), h100:8x8 (hosts x GPUs of each)"
# What compilers read when they are loaded, where the user has not set it.
ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # libtpu wants to know its machine, and would ask the cloud for it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file refuses a second process
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the CUDA plugin wants cuDNN and a driver, which compiling does not
}
# NVIDIA H100 SXM, 80 GB: data sheet and CUDA's device properties. Nothing can be timed, so autotuning is off.
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
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}
NO_KERNEL, WITHOUT_TRITON = "No supported config found for HLO", {"xla_gpu_enable_triton_gemm": False}
GPU_SHARE = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclass(frozen=True)
class Topology:
    """A machine to compile for.

    Attributes:
        name: as the user wrote it.
        slices: of TPUs, which meet over the data centre's network.
        devices: all of them, in the machine's order.
        hbm: bytes of one device.
        options: for the compiler.
        share: of a device's memory that JAX takes by default.
    """

    name: str
    slices: int
    devices: tuple[Any, ...]
    hbm: int
    options: dict[str, Any]
    share: float = 1.0

    def __str__(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.name} ({len(self.devices)} x {self.devices[0].device_kind})"


def find_topology(name: str, slices: int = 1) -> Topology:
    """Return a machine by its name.

    Raises:
        LoraError: there is no such machine; libtpu or the CUDA plugin is not installed.
    """
    # libtpu divides by the sizes, and ends the process where one is 0.
    found = re.fullmatch(r"(\w+):([1-9]\d{0,3}(?:x[1-9]\d{0,3})*)", name) if isinstance(name, str) else None
    if found is None or found[1] not in HBM:
        raise LoraError(f"the topology is {name!r}, expected one such as {KNOWN}.")
    if not isinstance(slices, int) or isinstance(slices, bool) or slices < 1:
        raise LoraError(f"slices={slices!r}: expected a whole number of at least 1.")
    return _topology(name, found[1], tuple(map(int, found[2].split("x"))), slices)


@functools.lru_cache(maxsize=64)  # a mesh and the report of a step on it have to be of the same device objects
def _topology(name: str, kind: str, sizes: tuple[int, ...], slices: int) -> Topology:
    if kind == "h100":
        if slices > 1 or len(sizes) > 2:
            raise LoraError(f"{name!r} with {slices} slices: GPUs are named by hosts x GPUs of each, such as h100:8x8.")
        hosts, devices = sizes if len(sizes) == 2 else (1, sizes[0])
        shape = f"1x{hosts}x{devices}"
        made = _described(name, "cuda", topology_name="", target_config=H100, topology=shape)
        return Topology(name, 1, tuple(made.devices), HBM[kind], GPU_OPTIONS, GPU_SHARE)
    several = {"num_slices": slices} if slices > 1 else {}
    made = _described(name, "tpu", topology_name=name, **several)
    return Topology(name, slices, tuple(made.devices), HBM[kind], {})


def _described(name: str, platform: str, **how: Any) -> Any:
    try:
        with _environment():
            return topologies.get_topology_desc(platform=platform, **how)
    except Exception as error:
        said = first_line(error)
        missing = _missing(platform)
        if missing:
            raise LoraError(f"compiling for {name!r} takes {missing}. It is not installed here ({said}).") from error
        if isinstance(error, NotImplementedError):  # by JAX: no plugin of this platform is registered
            raise LoraError(
                f"compiling for {name!r} takes the {platform.upper()} plugin. It is installed, but did not start when "
                f"this process first used JAX ({said}; JAX logged why): set JAX_PLATFORMS=cpu in the environment, or "
                "make the mesh before anything asks for JAX's devices."
            ) from error
        raise LoraError(
            f"the compiler knows no topology {name!r}: {said}. Names that work are such as {KNOWN}."
        ) from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set what compilers read when they are loaded, and take it back: on a machine with TPUs it would be wrong."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _missing(platform: str) -> str | None:
    """Return what to install, if the compiler for a platform is not there."""
    if platform == "tpu":
        return None if find_spec("libtpu") else 'libtpu: pip install "jax[tpu]"'
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            if find_spec(plugin):
                return None
        except ModuleNotFoundError:
            continue
    return 'the CUDA plugin: pip install "jax[cuda13]", on Linux'


def topology_mesh(topology: str, *, slices: int = 1, **axes: int) -> Mesh:
    """Return a mesh of the devices of a machine that is not there, to compile for it with `lora.compile_report`.

    Neighbouring devices of the machine are neighbours along the last axes. Of several slices the first axis should be
    the one that splits the batch: what it sends goes over the data centre's network.

    Args:
        topology: the machine: TPUs such as "v5e:4x4", "v5p:4x4x4", "v6e:4x8", "tpu7x:2x2x1", or GPUs such as "h100:8"
            and "h100:8x8" (hosts x GPUs of each).
        slices: how many of such a slice of TPUs.
        axes: the names and sizes of the mesh's axes, such as `data=2, fsdp=8`.

    Returns:
        A mesh, of which shardings of `jax.ShapeDtypeStruct`s can be made. Nothing can be computed on it.

    Raises:
        LoraError: there is no such topology, or its compiler is not installed; the axes do not have as many devices.

    >>> import lora_jax as lora
    >>> mesh = lora.topology_mesh("v5e:4x4", data=2, fsdp=8)  # doctest: +SKIP
    """
    if not axes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in axes.values()):
        raise LoraError(
            f"topology_mesh({topology!r}): the axes of the mesh are {axes}; expected sizes such as data=2, fsdp=8."
        )
    found = find_topology(topology, slices)
    if math.prod(axes.values()) != len(found.devices):
        raise LoraError(
            f"the mesh {axes} has {math.prod(axes.values())} devices, but {found} has {len(found.devices)}: the sizes "
            "of the axes multiply to the number of devices."
        )
    devices = np.array(found.devices).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
