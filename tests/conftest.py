"""A strict session: eight simulated devices, and nothing may be broadcast by rank without being asked to."""

import gc
import os
import zlib
from importlib.metadata import version

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    # Most of the time goes into compiling tiny programs, and their machine code need not be fast. The programs, whose
    # operations and bytes are counted, are optimized as ever.
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):  # later ones have no other way, and refuse a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

gc.freeze()  # what is imported stays, and traces are many small objects that live for one test:
gc.set_threshold(100_000)  # a tenth of the time went into looking through all of them

KEPT = 50  # tests whose compiled programs are kept together; CI has memory for more, and less to compile again
KEPT_IN_CI = 200
_run = 0


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are left to CI")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    tables = {}  # the cases of each sampled test
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow, as CI does"))
        elif sampled := item.get_closest_marker("sampled"):
            tables.setdefault((item.path, item.originalname, sampled.args[0]), []).append(item)
    for (*_, n), cases in tables.items():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in cases[-(-len(cases) // n) :]:
            item.add_marker(pytest.mark.skip(reason=f"one in {n} is run here, and all with --slow, as in CI"))


def pytest_runtest_teardown(item):
    """Drop what was compiled now and then: JAX keeps all of it, some megabytes for each test."""
    global _run
    _run += not item.get_closest_marker("skip")
    if _run >= (KEPT_IN_CI if item.config.getoption("--slow") else KEPT):
        _run = 0
        jax.clear_caches()
        gc.collect()
