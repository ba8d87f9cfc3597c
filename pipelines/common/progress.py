"""What a run says while it runs: a progress bar on a terminal, plain lines anywhere else."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column


class Progression(NamedTuple):
    """How far a method has come.

    Attributes:
      method: its name.
      round: rounds done.
      rounds: rounds in all.
      rounds_per_second: over the last evaluations, all seeds at once.
      loss: training loss since the evaluation before, mean over seeds; NaN if no client took part.
      accuracy: test accuracy, mean over seeds.
    """

    method: str
    round: int
    rounds: int
    rounds_per_second: float
    loss: float
    accuracy: float

    def text(self) -> str:
        """Everything but the name and the bar."""
        left = (self.rounds - self.round) / self.rounds_per_second if self.rounds_per_second else 0.0
        return (
            f"round {self.round}/{self.rounds}  {self.rounds_per_second:.1f} rounds/s  loss {self.loss:.4g}  "
            f"accuracy {100 * self.accuracy:.1f} %  {duration(left)} left"
        )


class Speed:
    """Rounds a second over the last evaluations, so that the time left follows a run that becomes slower or faster.

    Args:
      round: rounds done at the start.
      last: how many evaluations count.
    """

    def __init__(self, round: int, *, last: int = 20) -> None:
        self._seen = deque([(round, time.monotonic())], maxlen=last + 1)

    def at(self, round: int) -> float:
        """The speed when so many rounds are done."""
        self._seen.append((round, time.monotonic()))
        (first, began), (_, now) = self._seen[0], self._seen[-1]
        return (round - first) / max(now - began, 1e-9)


class Reporter(NamedTuple):
    """Where a run's words go.

    Attributes:
      say: `say(text)`, one or more lines.
      update: `update(progression)`, after every evaluation.
      finish: `finish()`, when a method is done or given up.
      event: `event(name, fields)`, what happens, for programs (`json_lines`); the other three are for people.
      log: `log(method, seeds, begin, new, ends)` after every evaluation, and with what is there when a method goes on:
        see `pipelines.results.logs`.
    """

    say: Callable[[str], None]
    update: Callable[[Progression], None]
    finish: Callable[[], None]
    event: Callable[[str, Mapping[str, Any]], None] = lambda name, fields: None
    log: Callable[[str, Sequence[int], int, dict[str, Any], Any], None] = lambda *new: None


def silent() -> Reporter:
    """Says nothing."""
    return Reporter(lambda text: None, lambda progression: None, lambda: None)


def json_lines(stream: TextIO | None = None) -> Reporter:
    """One JSON object a line and nothing else, for programs that read along.

    Each has the key "event": "message" (text), "compiling" (method), "evaluated" (method, round, rounds, seeds,
    rounds_per_second, stopped and one list over seeds for each metric: train_loss, test_loss, test_accuracy ...),
    "saved" (method, round, path), "finished" (method, rounds; at the very end path instead), "stopped" (message) or
    "error" (message, exit_code). A number that is not known is null.
    """

    def event(name: str, fields: Mapping[str, Any]) -> None:
        text = json.dumps({"event": name, **_plain_json(fields)}, allow_nan=False)
        print(text, file=stream or sys.stdout, flush=True)

    return Reporter(lambda text: event("message", {"text": text}), lambda progression: None, lambda: None, event)


def _plain_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def plain(stream: TextIO | None = None, *, most_lines: int = 20) -> Reporter:
    """Lines without control codes, at most about `most_lines` per method, the last evaluation always among them."""

    def say(text: str) -> None:
        print(text, file=stream or sys.stdout, flush=True)

    shown: dict[str, int] = {}

    def update(p: Progression) -> None:
        if p.round < p.rounds and p.round - shown.get(p.method, 0) < p.rounds / most_lines:
            return
        shown[p.method] = p.round
        say(f"  {p.method:<12} {p.text()}")

    return Reporter(say, update, lambda: None)


def bar(console: Console) -> Reporter:
    """One progress bar per method, which stays when the method is done."""
    columns: list[ProgressColumn] = [
        TextColumn("  {task.description:<12}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[text]}"),
    ]
    live: list[Progress] = []

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(p: Progression) -> None:
        if not live:
            live.append(Progress(*columns, console=console, expand=True))
            live[0].start()
            live[0].add_task(p.method, total=p.rounds, text="")
        live[0].update(live[0].task_ids[0], completed=p.round, text=p.text(), refresh=True)

    def finish() -> None:
        if live:
            live.pop().stop()

    return Reporter(say, update, finish)


def duration(seconds: float) -> str:
    """A duration in words: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """A number of bytes in words: "12 kB", "3.4 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 10 else f"{num_bytes:.1f} {unit}"
