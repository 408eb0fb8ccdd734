"""A strict session: eight simulated devices, and nothing may be broadcast by rank without being asked to."""

import gc
import os
import shutil
import subprocess
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


FIFTHS, LARGE = 5, 30  # tables of so many cases are run a fifth at a time,
TENTHS, LARGEST = 10, 100  # and of so many a tenth


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too, and a part of each large table")
    parser.addoption("--all", action="store_true", help="run everything")


def pytest_configure(config):
    config.option.slow |= config.option.all


def pytest_collection_modifyitems(config, items):
    """Skip what this run is not for.

    The inner loop leaves out what is slow, all but one in n of the cases of a sampled table, and all but a fifth of a
    large table, always the same ones.
    With --slow a fifth of each of these tables is run, or a tenth, another one for each commit, so that some runs of CI
    see all. What is rare, as it takes minutes, is in one of five runs, each in another one.
    """
    if config.getoption("--all"):
        return
    slow, tables = config.getoption("--slow"), {}  # the cases of each test
    for item in items:
        tables.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    turn = _turn() if slow else 0
    for cases in tables.values():
        sampled = cases[0].get_closest_marker("sampled")
        ordered = sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))
        if slow:
            of = TENTHS if len(cases) >= LARGEST else FIFTHS if sampled or len(cases) >= LARGE else 1
            kept = ordered[turn % of :: of] or ordered[:1]
            kept = [case for case in kept if not case.get_closest_marker("rare") or _is_turn_of(case, turn)]
        else:
            of = sampled.args[0] if sampled else FIFTHS if len(cases) >= LARGE else 1
            kept = ordered[: -(-len(cases) // of)]
        chosen = set(map(id, kept))
        for item in cases:
            if item.get_closest_marker("slow") and not slow:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow, as CI does"))
            elif id(item) not in chosen:
                rare = item.get_closest_marker("rare") and slow
                item.add_marker(
                    pytest.mark.skip(reason=f"one in {FIFTHS if rare else of} is run here, and all with --all")
                )


@pytest.fixture(scope="session")
def share(pytestconfig):
    """Return how many of a slow test's rounds this run is for: of n all with --all, and a fifth in CI."""
    return lambda n: n if pytestconfig.getoption("--all") else n // FIFTHS


def _is_turn_of(item, turn):
    """Return whether a rare test is run this time: each in other runs than its neighbours."""
    return (turn + zlib.crc32(item.nodeid.encode())) % FIFTHS == 0


def _turn():
    """Return a number that is another one for another commit; 0 where no git is there to ask."""
    if shutil.which("git") is None:
        return 0
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(__file__))
    return zlib.crc32(found.stdout.encode())


def pytest_runtest_teardown(item):
    """Drop what was compiled now and then: JAX keeps all of it, some megabytes for each test."""
    global _run
    _run += not item.get_closest_marker("skip")
    if _run >= (KEPT_IN_CI if item.config.getoption("--slow") else KEPT):
        _run = 0
        jax.clear_caches()
        gc.collect()
