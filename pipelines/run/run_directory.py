"""A run's directory, whatever the command: whose it is, what it was begun with, who is at work in it, how it stops.

    claim(out, KIND, config, check, pinned, where)         the directory is this run's, or can grow to be
    with at_work(out, KIND, say, grown) as work:           one process at a time
        ... if stop := work.stop(): ...                    what is under way is finished and saved, and then
            raise interruption(stop, "after ...", command)

The record of a run, `config.json` (of a study `study.json`), is a JSON object with a digest of itself and a copy beside
the checkpoints:

    config     what is run; the only part that may be edited by hand
    command    `fedjax-core` what; runs of `train` have none
    versions   those that began it
    run        its name, which its checkpoints bear
    identity   digests of its data, and the kind of random keys (`pipelines.run.identity`)

and what a command adds. Before there were records `continual` and `zeroth-order` wrote the configuration alone; such a
directory is read, and given the rest when a run goes on in it.
"""

import errno
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax

from fedjax_core.types import PyTree
from pipelines.common import files, processes
from pipelines.run import identity

Say = Callable[[str], None]
Record = dict[str, Any]


class Kind(NamedTuple):
    """What the directories of a command's runs have in common.

    Attributes:
      command: "train", "continual" or "zeroth-order".
      check: `check(config)` raises an error unless the JSON value is a configuration of the command.
      marker: file of the record.
      unit: what is finished before a run stops.
    """

    command: str
    check: Callable[[Any], object]
    marker: str = "config.json"
    unit: str = "chunk"


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop and has saved what it had.

    Attributes:
      signal: number of the signal that asked.
      message: where it stopped, and how to go on.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal, self.message = signal, message


class Work(NamedTuple):
    """A run at work in its directory.

    Attributes:
      out: the directory.
      run: name of the run, for its checkpoints; empty for one of before there were names.
      may_write: whether anything can be written there.
      stop: returns the number of the signal that asked for an end, or 0.
    """

    out: Path
    run: str
    may_write: bool
    stop: Callable[[], int]

    def check_writable(self) -> None:
        """Raises OSError where nothing can be written; a finished run may be looked at there."""
        if not self.may_write:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.out))


def interruption(number: int, where: str, command: str) -> Interrupted:
    """The error that says where a run was stopped by a signal, and how to go on."""
    return Interrupted(number, f"stopped {where}. The same command goes on from there:\n  {command}")


def claim(
    out: Path,
    kind: Kind,
    config: Any,
    check: Callable[[Any], None],
    pinned: Mapping[str, str],
    where: str,
    **more: Any,
) -> None:
    """Makes `out` the directory of a run, or checks that it is that of this run, or can grow to be.

    Args:
      out: the directory; made if need be.
      kind: of the command.
      config: what is run, a JSON value.
      check: `check(there)` raises ValueError unless a run of the configuration `there` is this one, or can grow to be.
      pinned: what the run must find again to go on, see `pipelines.run.identity`.
      where: the data, for messages.
      **more: what else the record of a new run holds.

    Raises:
      ValueError: if the directory holds another run (with what differs), one of other examples, or something else.
      Refused: if it is new and another process is making its run there.
      Unwritable: if it cannot be written to.
    """

    def is_ours() -> bool:
        if not files.run_directory(out, kind.marker):
            return False
        record = read(out, kind)
        check(record["config"])
        kept = files.kept_config(out / kind.marker)
        if kept is not None and kept != record["config"]:
            check(kept)  # what was edited by hand cannot make another run of what is there
        identity.check(record.get("identity", {}), pinned, where, out)
        return True

    def action() -> None:
        with files.explain_os_errors(out, "Nothing was run"):
            if is_ours():
                return
            with processes.locked(out):
                if not is_ours():  # another process may have come between
                    own = {} if kind.command == _FIRST else {"command": kind.command}
                    content = {"config": config, **own, "versions": versions(), **more}
                    files.write_record(out / kind.marker, {**content, "run": _name(), "identity": dict(pinned)})

    processes.first_does(action)


def read(out: Path, kind: Kind) -> Record:
    """The record of the run in a directory.

    Raises:
      ValueError: if there is none, or that of a run of another command, or it is damaged and so is its copy.
    """
    path = out / kind.marker
    if not files.has_record(path):
        raise ValueError(f"{out} is no run directory, it has no {kind.marker}: give the --out of a run")
    content = files.read_record(path, kind.check)
    if "config" not in content:
        content = {"config": content, "command": "continual" if kind.command == _FIRST else kind.command}
    whose = content.get("command", _FIRST)
    if whose != kind.command:
        raise ValueError(
            f"{out} holds a run of another command, `fedjax-core {whose}`: choose another --out, or give that of a run "
            f"of `fedjax-core {kind.command}`"
        )
    try:
        kind.check(content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another --out") from None
    return content


def command_of(out: Path, markers: Collection[str] = ("config.json", "study.json")) -> str:
    """The command that made the run in a directory.

    Args:
      out: the directory.
      markers: files that can be its record.

    Raises:
      ValueError: if it is no run directory, or its record is damaged and so is the copy.
    """
    if not out.is_dir():
        raise ValueError(f"{out} is {'a file' if out.exists() else 'no directory'}: give the --out of a run")
    there = [marker for marker in markers if files.has_record(out / marker)]
    if not there:
        raise ValueError(f"{out} is no run directory, it has no {' and no '.join(markers)}: give the --out of a run")
    content = files.read_record(out / there[0])
    if "config" in content:
        return str(content.get("command", _FIRST))
    return "continual" if there[0] == "config.json" else "zeroth-order"  # as they were before there were records


@contextmanager
def at_work(
    out: Path,
    kind: Kind,
    say: Say,
    grown: Callable[[Record], Mapping[str, Any]],
    pinned: Mapping[str, str],
    machine: Mapping[str, Any] | None = None,
) -> Iterator[Work]:
    """Keeps other processes out of a claimed directory, writes down what the run is now, and listens for signals.

    Args:
      out: the directory.
      kind: of the command.
      say: where words go.
      grown: what changes in a record as the run grows; nothing is written where that is nothing.
      pinned: as for `claim`, for directories that do not have it yet.
      machine: names and values that change last bits, to be compared with those of the configuration.

    Raises:
      Refused: if another process is at work there.
      Unwritable: if it cannot be written to for another reason than that everything there is read-only.
    """

    def write_down() -> None:
        then = read(out, kind)
        now = {"run": _name(), **then, "identity": then.get("identity") or dict(pinned), **grown(then)}
        if now != then or not files.is_kept(out / kind.marker):
            with files.explain_os_errors(out):
                files.write_record(out / kind.marker, now)

    with processes.sole_use(out) as may_write:
        if may_write:
            processes.first_does(write_down)
        record = processes.first_does(lambda: read(out, kind))
        for name, then, now in _changed(record, machine or {}):
            say(f"note: this run was begun with {name} {then} and goes on with {now}: last bits may differ")
        with stop_requests(say, kind.unit) as stop:
            yield Work(out, str(record.get("run", "")), may_write, lambda: processes.highest(stop()))


@contextmanager
def stop_requests(say: Say, unit: str = "chunk") -> Iterator[Callable[[], int]]:
    """Turns SIGINT and SIGTERM into a wish to stop: yields a function that returns the signal's number, or 0.

    The second signal has its usual effect, at once, even inside a compiled call.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        say(f"stopping: finishing this {unit} and saving it (once more to abort)")

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def waited_for(outputs: PyTree) -> Any:
    """Waits for a computation in Python, so that signals are handled meanwhile, and returns it."""
    on_device: list[Any] = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
    for leaf in on_device:
        while not leaf.is_ready():
            time.sleep(0.002)
    return outputs


def versions() -> dict[str, str]:
    """Versions that can change a number, and the device."""
    found = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found, "device": jax.devices()[0].device_kind}


def _changed(record: Record, machine: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, version or setting that began the run, the one now) of everything that has changed since."""
    config = record["config"]
    before = {**config, **config.get("machine", {})}  # before there were sections it was flat
    then = {**record.get("versions", {}), **{name: before.get(name) for name in machine}}
    pairs = [(name, then.get(name), now) for name, now in (versions() | dict(machine)).items()]
    return [(name, was, now) for name, was, now in pairs if was is not None and was != now]


def _name() -> str:
    return secrets.token_hex(8)


_FIRST = "train"  # the command whose records do not say whose they are
