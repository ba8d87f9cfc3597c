"""How often the loops of a round run, which only the sizes of the clients say.

A round makes passes over its clients (calls of `for_each_client`), each with loops of its own. While the round is
traced `recording` notes what every pass is and gives its loops a name; `trips` then says of a loop of the compiled
program how often it runs, from the sizes of the clients of some cohorts.
"""

import heapq
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_core import Cohort, LocalWork, checks, for_each_client
from fedjax_core.clients import replaced
from fedjax_core.execution import balanced_order
from fedjax_core.lanes import LOOPS
from pipelines.compiled.program import Instruction, Trips

_PASS = re.compile(r"pass_of_clients_(\d+)\b")


class Pass(NamedTuple):
    """A pass over clients in a round, as it was traced.

    Attributes:
      work: its local work.
      num_slots: slots of its cohort, C.
    """

    work: LocalWork
    num_slots: int


class Loops(NamedTuple):
    """How often the loops of a pass run on the chip with most steps; means over some cohorts.

    Attributes:
      clients: runs of the body of the outer loop.
      steps: local steps of all lanes together.
      ends: clients that end.
      starts: clients that begin after the first of each lane.
      executed: steps of all lanes of all chips, of idle lanes and chips too.
      useful: steps of clients on all chips.
    """

    clients: float
    steps: float
    ends: float
    starts: float
    executed: float
    useful: float


@contextmanager
def recording() -> Iterator[list[Pass]]:
    """Inside, passes that are traced are noted in the list, and their loops get names."""
    found: list[Pass] = []

    def recorded(program: Any, shared: Any, cohort: Cohort, *args: Any, **options: Any) -> Any:
        found.append(Pass(options["work"], cohort.ids.shape[0]))
        with replaced(None), jax.named_scope(f"pass_of_clients_{len(found) - 1}"):
            return for_each_client(program, shared, cohort, *args, **options)

    with replaced(recorded):
        yield found


def steps_of(work: LocalWork, sizes: np.ndarray) -> np.ndarray:
    """int[n], local steps of clients of these sizes; -1 stands for an empty slot.

    An array of epochs or steps, one for each client, counts by its mean.
    """
    per_epoch = -(-np.maximum(sizes, 0) // work.batch_size)
    if work.num_steps is not None:
        count = np.full(sizes.shape, _mean(work.num_steps))
    else:
        count = _mean(work.num_epochs) * per_epoch
    return np.where(sizes > 0, np.maximum(np.rint(count), 1), 0).astype(int)


def _mean(value: Any) -> float:
    return float(np.mean(np.asarray(value))) if checks.is_concrete(value) else 1.0


def loops(steps: np.ndarray, num_devices: int, lanes: int) -> Loops:
    """How often the loops of a pass run.

    Args:
      steps: int[M], local steps of every slot.
      num_devices: chips that they are dealt to.
      lanes: lanes of each chip.
    """
    per_device = -(-len(steps) // num_devices)
    padded = np.concatenate([steps, np.zeros(per_device * num_devices - len(steps), steps.dtype)])
    order = np.asarray(_order(padded.astype(np.int32), num_devices)) if num_devices > 1 else np.arange(len(padded))
    each = [_on_chip(part, lanes) for part in padded[order].reshape(num_devices, per_device)]
    busiest = max(each, key=lambda found: found[1])
    most = min(lanes, per_device)
    return Loops(*busiest, executed=float(most * sum(found[1] for found in each)), useful=float(steps.sum()))


def _on_chip(steps: np.ndarray, lanes: int) -> tuple[float, float, float, float]:
    """(runs of the outer loop, steps of all lanes, ends, starts) on one chip."""
    lanes = min(lanes, len(steps))
    queue = [int(n) for n in (np.sort(steps)[::-1] if lanes > 1 else steps) if n > 0]
    busy: list[int] = []
    ends = set()
    for number in queue:
        begin = heapq.heappop(busy) if len(busy) == lanes else 0
        heapq.heappush(busy, begin + number)
        ends.add(begin + number)
    # One lane takes its first client inside of the loop, which turns once more for it.
    alone = lanes == 1 and bool(queue)
    starts = len(queue) if alone else max(len(queue) - lanes, 0)
    return float(len(ends) + alone), float(max(ends, default=0)), float(len(queue)), float(starts)


def mean(found: Sequence[Loops]) -> Loops:
    """The mean over several cohorts."""
    return Loops(*np.mean(np.asarray(found), axis=0).tolist())


def trips(of_passes: Sequence[Loops]) -> Trips:
    """How often the loops of a program run, given those of each pass in the order in which they were traced."""

    def count(loop: Instruction) -> float | None:
        parts = loop.scope.split("/")
        numbers = _PASS.findall(loop.scope)
        if len(parts) < 2 or parts[-1] != "while" or not numbers:
            return None
        of, name = of_passes[int(numbers[-1])], re.sub(r"^.*?(\w+)\)*$", r"\1", parts[-2])
        each = max(of.clients, 1.0)  # the others run once in each run of the outer loop
        return {
            LOOPS.clients: of.clients,
            LOOPS.steps: of.steps / each,
            LOOPS.ends: of.ends / each,
            LOOPS.starts: of.starts / each,
        }.get(name)

    return count


_order = jax.jit(balanced_order, static_argnums=1)
