"""What a run has measured so far, from its directory alone: no data, no model, no device.

    found = read(Path("runs/mine"))
    found.histories["scaffold"]["test/accuracy"]  # [seeds, evaluations]

Every number is read from the checkpoints, whose digests are checked, and none from the tables that people look at. Of a
run that has ended `metrics.csv` is compared with them: who reads it and a report of the same run must read the same.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pipelines.common import files
from pipelines.configuration.config import Config
from pipelines.results import early, history, report
from pipelines.results.history import History
from pipelines.results.subject import Subject
from pipelines.run import checkpoint, run_directory, train


class Measured(NamedTuple):
    """A run, finished or not.

    Attributes:
      out: its directory.
      subject: what was run, with its configuration.
      histories: method to what was measured with all its seeds, as far as all of them have come; only methods that
        have been evaluated.
      info: method to "compile_seconds", "run_seconds", "memory".
      record: of its directory (`pipelines.run.run_directory`).
      ended: whether nothing is left to be run.
    """

    out: Path
    subject: Subject
    histories: dict[str, History]
    info: dict[str, dict[str, Any]]
    record: Mapping[str, Any]
    ended: bool

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.subject.config


def read(out: Path) -> Measured:
    """What the run in a directory has measured.

    Raises:
      ValueError: if there is no run of `fedjax-core train`, it has not been evaluated yet, a checkpoint or metrics.csv
        is not what was written, or it was begun by a version that did not write down what reports say.
    """
    if not out.is_dir():
        raise ValueError(f"{out} is no directory: give the --out of a run")
    record = run_directory.read(out, train.KIND)
    config = train.read_config(out)
    if "subject" not in record:
        raise ValueError(
            f"{out} does not say what its report needs, it is of an earlier version: give the command of the run "
            "again, which writes that down and repeats nothing that is done"
        )
    subject = Subject.of_json(config, record["subject"])
    histories, info, complete = {}, {}, True
    sizes = list(record.get("batches", [config.seeds]))
    firsts = np.cumsum([0, *sizes]).tolist()[:-1]
    for name in config.methods:
        parts = []
        for first in firsts:
            saved = _saved(out, config, subject, name, first, str(record.get("run", "")))
            if saved is None:
                break
            parts.append(saved)
        ended = len(parts) == len(firsts) and all(_has_ended(config, part.history) for part in parts)
        complete = complete and ended
        if parts:
            histories[name], info[name] = _together(parts, ended)
    if not histories:
        raise ValueError(f"{out} has not been evaluated yet, so that there is nothing to show: run it first")
    if complete:
        _check_table(out, subject, histories)
    return Measured(out, subject, histories, info, record, complete)


def again(out: Path, target: Path, say: Callable[[str], None]) -> list[str]:
    """Draws and writes the report of the run in the directory `out` again, into `target`.

    Returns:
      The names of the files.

    Raises:
      ValueError: as `read`.
    """
    found = read(out)
    files.make_directory(target)
    versions = found.record.get("versions", {})
    with jax.enable_x64(found.config.machine.x64):
        return report.draw(target, out, found.subject, found.histories, found.info, versions)


def _saved(out: Path, config: Config, subject: Subject, name: str, first: int, run: str) -> train.Result | None:
    """What a batch of seeds has measured; None before its first evaluation."""

    def on_grid(round: int) -> bool:
        return round == config.rounds or (round < config.rounds and round % config.evaluation.eval_every == 0)

    folder = train.folder_of(out, name, first)
    saved = checkpoint.measured(folder, on_grid, run=run)
    if saved is None or not any(history.is_score(key) for key in saved.arrays):
        return None
    arrays = saved.arrays
    if "round/uploaded" in arrays:
        raise ValueError(
            f"{out} counts scalars in the place of bytes, it is of an earlier version: give the command of the run "
            "again, which counts bytes and repeats nothing that is done"
        )
    if name in subject.ending and _has_ended(config, arrays):
        after = checkpoint.measured(folder / train.AFTER, lambda round: round == saved.round, run=run)
        arrays = arrays | ({} if after is None else after.arrays)
    return train.Result(arrays, dict(saved.info))


def _has_ended(config: Config, measured: History) -> bool:
    """Whether all rounds are done, or all seeds have stopped."""
    course = early.course(config, measured)
    return measured["round/loss"].shape[1] >= config.rounds or (course is not None and bool(course.stopped.all()))


def _together(parts: list[train.Result], ended: bool) -> train.Result:
    """All batches of seeds of a method as one, as far as all of them have come.

    Batches that have ended may have done different numbers of rounds, where seeds stop early.
    """
    names = [name for name in parts[0].history if all(name in part.history for part in parts)]
    histories = [{name: part.history[name] for name in names} for part in parts]
    if not ended:
        histories = [history.growing(each) for each in histories]
        shortest = {name: min(each[name].shape[1] for each in histories) for name in histories[0]}
        histories = [{name: value[:, : shortest[name]] for name, value in each.items()} for each in histories]
    return train.merged([part._replace(history=each) for part, each in zip(parts, histories, strict=True)])


def _check_table(out: Path, subject: Subject, histories: Mapping[str, History]) -> None:
    """Raises ValueError if metrics.csv is there and not what was measured."""
    path = out / "metrics.csv"
    if not path.exists():
        return
    config = subject.config
    eval_rounds = history.evaluated_rounds(config.rounds, config.evaluation.eval_every)
    ends = early.ends(config, histories, eval_rounds)
    expected = history.to_csv(histories, subject.seeds, eval_rounds, ends).splitlines()
    try:
        found = path.read_text(encoding="utf-8").splitlines()
    except ValueError:
        found = []
    if found == expected:
        return
    line = next((i for i, pair in enumerate(zip(found, expected, strict=False), 1) if pair[0] != pair[1]), None)
    what = f"line {line} was edited" if line else f"it has {len(found)} lines and not {len(expected)}"
    raise ValueError(
        f"{path} is not what was measured ({what}): put it back, or give the command of the run again, which writes it "
        "anew and repeats nothing that is done"
    )
