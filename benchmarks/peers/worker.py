"""One peer on one workload, in a process of its own: `python -m benchmarks.peers.worker PEER REQUEST`.

PEER is a module of this package with `run(task, recorder)`, REQUEST a JSON object:

    {"workload": "mlp", "mean_size": 600, "cohort_size": 10, "rounds": 8, "seconds": 6, "check": false}

What happens is written to standard output as it happens, one JSON object a line, so that a process that is stopped
has still said how far it got. With "check" a peer runs one round on a small federation in stored order, and says how
far every array of the model has moved; otherwise rounds are timed until there are enough or time is up.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.peers import workloads
from benchmarks.peers.workloads import Federation, Parameters, Workload


class Task(NamedTuple):
    """What a peer gets.

    Attributes:
      workload: sizes, model, batch size, learning rate.
      federation: the examples.
      parameters: where the model starts.
      cohorts: int64[rounds, C], who takes part in each round.
      shuffled: whether a client shuffles its examples in every round.
      dropout: whether the model of "pfl-cifar10" has its dropout.
    """

    workload: Workload
    federation: Federation
    parameters: Parameters
    cohorts: np.ndarray
    shuffled: bool
    dropout: bool


class Recorder:
    """The stopwatch of a peer, and its line to the driver."""

    def __init__(self, task: Task, request: dict) -> None:
        self.request, self._task, self._round, self._spent = request, task, 0, 0.0
        # What libraries print must not come between the lines that the driver reads.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **event: object) -> None:
        """Writes one line."""
        print(json.dumps(event), file=self._out, flush=True)

    def ready(self, device: str, versions: dict[str, str]) -> None:
        """Starts the watch; the examples are loaded and the model is made."""
        self.say(event="ready", device=device, versions=versions)
        self._start = time.perf_counter()

    def round_done(self, parameters: Callable[[], Parameters], executed_steps: Callable[[], int] | None = None) -> bool:
        """Notes a round whose results are there; returns whether there is another. What is called is off the clock.

        Args:
          parameters: gives the global model by the paths of the workload's own.
          executed_steps: gives the local steps executed, padding included; None if only those that were needed.
        """
        seconds = time.perf_counter() - self._start
        self._spent += seconds if self._round else 0  # compilation is not a part of the time that is given
        ids = self._task.cohorts[self._round]
        steps = workloads.local_steps(self._task.workload, ids)
        event = {
            "event": "round",
            "seconds": seconds,
            "steps": steps,
            "executed_steps": executed_steps() if executed_steps else steps,
        }
        if self._round == 0:
            event["moved"] = {
                path: float(np.linalg.norm((value - self._task.parameters[path]).ravel().astype(np.float64)))
                for path, value in parameters().items()
            }
        self.say(**event)
        self._round += 1
        enough = self._round == len(self._task.cohorts)
        late = self._round > self.request["least_rounds"] and self._spent > self.request["seconds"]
        if enough or late:
            self.say(event="done", peak_memory_mib=peak_memory_mib())
            return False
        self._start = time.perf_counter()
        return True


def peak_memory_mib() -> float:
    """Sum over this process and its descendants of the most memory that each has held."""
    if not Path("/proc/self/status").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    parent, most = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # the process has ended meanwhile
        process = int(fields["Pid"])
        parent[process], most[process] = int(fields["PPid"]), int(fields.get("VmHWM", "0 kB").split()[0])
    family = [os.getpid()]
    for process in family:
        family += [child for child, its_parent in parent.items() if its_parent == process]
    return sum(most[process] for process in family) / 2**10


def make_task(request: dict) -> Task:
    """The task that a request asks for."""
    workload = workloads.ALL[request["workload"]]
    workload = workload._replace(mean_size=request["mean_size"], cohort_size=request["cohort_size"])
    if request["check"]:
        workload = workloads.check_version(workload)
    return Task(
        workload,
        workloads.make_federation(workload),
        workloads.initial_parameters(workload),
        workloads.cohorts(workload, 1 if request["check"] else 1 + request["rounds"]),
        shuffled=not request["check"],
        dropout=not request["check"],
    )


def main() -> None:
    peer, request = sys.argv[1], json.loads(sys.argv[2])
    task = make_task(request)
    importlib.import_module(f"benchmarks.peers.{peer}").run(task, Recorder(task, request))


if __name__ == "__main__":
    main()
