"""Several processes that run the same program on the devices of one mesh: how they meet, and what they agree on.

Every process makes every compiled call; the first one alone writes files and speaks. What only one of them can know (a
signal that it got, what it found in a folder) is told to all before anything is decided by it, for processes that go
different ways wait for each other for ever.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_core import checks, client_mesh, place, replicated
from fedjax_core.placement import CLIENTS
from pipelines.common import files

HEARTBEAT_SECONDS = 30
_SUPERVISED = "FEDJAX_CORE_SUPERVISED"


class Lost(Exception):  # noqa: N818 (named for what happened)
    """Another process of the run is gone."""


def lost(out: object, what: str) -> Lost:
    """The error that says what to do when another process of the run is gone."""
    return Lost(
        f"another process of this run has stopped or cannot be reached ({what}). What was saved in {out} is whole: "
        "start all processes again with the same command, or one with fewer devices"
    )


def supervise(arguments: Sequence[str], out: object) -> int:
    """Runs the command again in a process of its own and returns its exit code.

    The runtime may end a process whose partner is gone from within, without a word that a user could read. This one
    looks on, passes signals to it, and says what happened. If this one is killed the other ends too.

    Args:
      arguments: of the command line.
      out: the run directory.

    Raises:
      Lost: if the process was ended by anything but a signal to this one.
    """
    received: list[int] = []
    read, write = os.pipe()
    with os.fdopen(write, "wb"):
        child = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            env=os.environ | {_SUPERVISED: str(read)},
            pass_fds=[read],
            start_new_session=True,  # so that Ctrl-C reaches it once, through this process
        )
        os.close(read)

        def forward(number: int, frame: object) -> None:
            received.append(number)
            child.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        status = child.wait()
    if status < 0 and -status not in received:
        raise lost(out, f"the runtime ended this one with {signal.Signals(-status).name}")
    return 128 - status if status < 0 else status


def is_supervised() -> bool:
    """Whether this process was started by `supervise`; then it ends when that one does."""
    end = os.environ.get(_SUPERVISED)
    if end is None:
        return False

    def wait_for_the_end() -> None:
        os.read(int(end), 1)  # nothing is ever written, so this returns when the other side is gone
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    return True


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_as_devices(number: int | None = None) -> None:
    """Lets cores stand in for devices, all of them unless a number is given; to be called before JAX is used.

    Where the environment says how many (`JAX_NUM_CPU_DEVICES`), that stays. It means nothing with other devices.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with suppress(RuntimeError):  # too late in a process that has used JAX already
        jax.config.update("jax_num_cpu_devices", number or cores())


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; to be called before JAX is used.

    Args:
      coordinator: "host:port" of the first process; where a cluster says it (SLURM, Open MPI, a TPU pod), None.
      num_processes: how many there are, or None where the cluster says it.
      process_id: which one this is, from 0, or None where the cluster says it.

    Raises:
      ValueError: if only some of the three are given, or they make no sense.
    """
    options = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in options.items() if value is None]
    if missing and len(missing) < len(options):
        raise ValueError(
            f"{', '.join(missing)} not given: give all of {', '.join(options)}, or none where a cluster says"
        )
    if num_processes is not None and process_id is not None:
        checks.positive_int("num_processes", num_processes, "a run has at least one process")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id} with num_processes={num_processes}: count them from 0")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator={coordinator!r} has no port: give it as host:port, for example localhost:9876")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of this run could not meet ({error}): start them all with the same coordinator and "
            "num_processes, each with its own process_id, before anything else uses JAX"
        ) from None
    _meet()


def _meet() -> None:
    """One collective over all devices, while all processes are at the same point.

    On processors the connections of a group of devices are made by its first collective, and a process whose partner
    is not there within half a minute gives up: too short a time where one compiles or reads for longer.
    """
    multihost_utils.sync_global_devices("connected")
    mesh = client_mesh()
    ones = place(np.ones(mesh.size, np.int32), NamedSharding(mesh, PartitionSpec(CLIENTS)))
    total = jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones)
    assert int(total) == mesh.size


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """What the first process holds, a JSON value, on all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = text if is_first() else np.zeros(length, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


class Refused(ValueError):  # noqa: N818 (named for what happened)
    """The run cannot be made here: memory suffices for no plan, or another process is at work in the directory."""


@contextmanager
def sole_use(out: Path) -> Iterator[bool]:
    """Keeps a second run out of the directory; yields whether anything can be written there.

    A directory that is read-only needs no lock: nothing writes there.

    Raises:
      Refused: if there is one already.
      Unwritable: if the lock cannot be made for another reason.
    """
    with ExitStack() as stack:
        yield bool(first_does(lambda: stack.enter_context(locked(out))))


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """`sole_use` by this process, whatever the others do."""
    folder = out / files.COPIES
    lock = FileLock(folder / files.LOCK)
    may_write = True
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise Refused(
            f"another process is at work in {out}: wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise files.unwritable(out, error) from error
        may_write = False
    try:
        yield may_write
    finally:
        lock.release()


def first_does(action: Callable[[], Any]) -> Any:
    """Lets the first process do something while the others wait, and tells all what came of it.

    Args:
      action: returns a JSON value; a ValueError or OSError of it, or `files.Unwritable`, is raised on all processes
        (of the same class on the first, as a ValueError on the others).
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": action()}
        except (ValueError, OSError, files.Unwritable) as error:
            failure, outcome = error, {"error": str(error)}
    outcome = from_first(outcome)
    if "error" in outcome:
        raise failure or ValueError(outcome["error"])
    return outcome["value"]


def highest(number: int) -> int:
    """The highest of a number over all processes."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def wait_for_all(name: str) -> None:
    """Waits until all processes have come to the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(status: int) -> None:
    """Ends this process without the shutdown that waits for the others, one of which is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
