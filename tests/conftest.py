"""Settings shared by all tests."""

import datetime
import gc
import os
from importlib.metadata import version
from pathlib import Path

# Tests compile far more than they compute, so the processor's backend is told not to optimize.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    ]
)

# Which fifth of the methods is tested in depth: another one every day, unless told. Workers get it from here.
os.environ.setdefault("FEDJAX_CORE_TURN", str(datetime.date.today().toordinal() % 5))

import jax

import fedjax_core  # noqa: F401 - before JAX is used, whose waiting it sets

# Golden traces and plan agreement are proved in float64; float32 tests pass float32 arrays.
jax.config.update("jax_enable_x64", True)
# Stand-ins for a mesh: several CPU devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # made now: the command line asks for as many as there are cores where there are none yet


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 30_000  # Linux allows a process 65,530


def _group(item):
    """What a test shares compiled programs with: its module, and its group there."""
    marker = item and item.get_closest_marker("xdist_group")
    return item and item.path, marker and marker.args


def pytest_collection_modifyitems(items):
    """Groups run in one go on one process, as they do on several."""
    first = {}
    for number, item in enumerate(items):
        first.setdefault(_group(item), number)
    items.sort(key=lambda item: first[_group(item)])


def pytest_runtest_teardown(item, nextitem):
    """Frees compiled programs between groups, before there are too many for the operating system.

    Each is mapped into memory several times, and a process that may not map any more dies while it compiles.
    """
    if _group(item) == _group(nextitem) or not MAPPINGS.exists():
        return
    if MAPPINGS.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"methods in depth: those of FEDJAX_CORE_TURN={os.environ['FEDJAX_CORE_TURN']}")
