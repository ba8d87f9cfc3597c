"""Timeouts of collective operations between the devices of a processor, raised so that no slow step ends a run.

The devices of a mesh meet in collectives at the end of a round, and one that has little to do waits there for the one
that has most. XLA's backend for the processor takes a wait of a minute for a deadlock and ends the process (of half an
hour, between processes), and it reads the flags that say so once, when it starts. So importing this package raises
them, before that.
"""

import contextlib
import mmap
import os
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import jax

WITHIN = ("xla_cpu_collective_call_warn_stuck_timeout_seconds", "xla_cpu_collective_call_terminate_timeout_seconds")
"""Between devices of one process: after the first it complains, after the second, from then on, it ends."""

BETWEEN = ("xla_cpu_collective_timeout_seconds",)
"""Between processes."""

SECONDS = 1_000_000_000  # thirty years


def raise_timeouts() -> bool:
    """Raises the timeouts of collectives on the processor through `XLA_FLAGS`, as far as they are not set there.

    Nothing is done where the settings exclude the processor (`JAX_PLATFORMS`) or `XLA_FLAGS` names a file, nor for a
    flag that the installed jaxlib does not have: an unknown flag ends the process.

    Returns:
      False if it is too late, because JAX has been used; the backend is as it is then.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    # The flags count in pairs: where one of a pair is set, the other is left alone.
    missing = [name for names in (WITHIN, BETWEEN) if not any(name in flags for name in names) for name in names]
    platforms = getattr(jax.config, "jax_platforms")  # noqa: B009 (not in its type stub)
    if not missing or (flags and not flags.startswith("-")) or (platforms and "cpu" not in platforms.split(",")):
        return True
    if _is_running():
        return False
    os.environ["XLA_FLAGS"] = " ".join([*([flags] if flags else []), *(f"--{n}={SECONDS}" for n in known(missing))])
    return True


def warn_if_too_late(devices: Iterable[jax.Device]) -> None:
    """Warns, once, of devices of the processor that do not wait for each other."""
    global _in_time
    found = list(devices)
    if _in_time or len(found) < 2 or found[0].platform != "cpu":
        return
    _in_time = True
    warnings.warn(
        "JAX was used before fedjax_core was imported, so XLA ends the process when one device of the processor waits "
        f"a minute for another: import fedjax_core first, or set XLA_FLAGS=--{WITHIN[0]}={SECONDS}",
        RuntimeWarning,
        stacklevel=2,
    )


def known(names: Iterable[str]) -> list[str]:
    """Those of the flags that the installed jaxlib has: their names stand in its library."""
    wanted, found = list(names), set[str]()
    spec = find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or []:
        for library in Path(folder).glob("*jax_common*"):
            with (
                contextlib.suppress(OSError, ValueError),
                library.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                found |= {name for name in wanted if content.find(name.encode()) >= 0}
    return [name for name in wanted if name in found]


def _is_running() -> bool:
    """Whether JAX has started its backends; then it refuses another number of devices."""
    number = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009 (not in its type stub)
    try:
        jax.config.update("jax_num_cpu_devices", number + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", number)
    return False


_in_time = raise_timeouts()
