"""What was measured so far: arrays by name, the same on disk, in memory and after a restart.

Letters: S seeds, r rounds done, e evaluations done, N clients. Names are "round/<metric>" [S, r, ...],
"test/<metric>" [S, e], "validated/<metric>" [S, e] in runs that validate (`pipelines.results.early`), "each/<metric>"
[S, e, N] in runs that follow their clients and, when a method is finished, "client/<metric>" [S, N]. These are of the
global model; of another view they are "test/<view>/<metric>", "each/<view>/<metric>" and "client/<view>/<metric>"
(`of_view`). Of a method that does something after its last round "final/test/..." [S] is what has come of it.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Metrics, num_bytes, num_scalars
from fedjax_core.types import Params

History = dict[str, np.ndarray]

_BASE = ("loss", "update_norm", "bytes_up", "bytes_down", "participants")
_SCALARS = {  # before there were bytes: (name now, bytes of one, or None for those of a parameter)
    "round/uploaded": ("round/bytes_up", None),
    "round/downloaded": ("round/bytes_down", None),
    "round/dense": ("round/dense_bytes", None),
    "round/mask_bits": ("round/mask_bytes", 1 / 8),
}


def from_rounds(metrics: Metrics, scores: Mapping[str, Any]) -> History:
    """The history of some rounds and the evaluation after them.

    Args:
      metrics: leaves [S, r, ...].
      scores: name to [S].
    """
    found = {f"round/{name}": _plain(getattr(metrics, name)) for name in _BASE}
    for path, leaf in jax.tree_util.tree_flatten_with_path(metrics.extra)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found[f"round/{name if name not in _BASE else f'extra.{name}'}"] = _plain(leaf)
    # Scores are on the test examples unless their name says on which.
    named = {name if "/" in name else f"test/{name}": value for name, value in scores.items()}
    return found | {name: _plain(value)[:, None] for name, value in named.items()}


def append(history: History, new: History) -> History:
    """`history` followed by `new`, along the axis of rounds or evaluations."""
    return {
        name: np.concatenate([history[name], value], axis=1) if name in history else value
        for name, value in new.items()
    }


def growing(history: History) -> History:
    """The part that has an axis of rounds or evaluations."""
    return {name: value for name, value in history.items() if _grows(name)}


def after(history: History, rounds: int, evaluations: int) -> History:
    """What was measured after so many rounds and evaluations."""
    return {
        name: value[:, rounds if name.startswith("round/") else evaluations :]
        for name, value in growing(history).items()
    }


def in_bytes(history: History, params: Params) -> History:
    """A history in which scalars may have been counted, as in runs begun before there were bytes, in bytes.

    A scalar counts as much as a parameter of the model does, itemsize of its dtype, which is what those methods sent;
    exactly so where all parameters have one dtype. What has been measured since comes after it.

    Args:
      params: the model, or its shapes and dtypes.
    """
    found = dict(history)
    for old, (new, size) in _SCALARS.items():
        if old in found:
            each = num_bytes(params) / max(num_scalars(params), 1) if size is None else size
            before = found.pop(old) * np.float64(each)
            found[new] = np.concatenate([before, history[new]], axis=1) if new in history else before
    return found


class Growing:
    """A history that is appended to again and again without being copied each time.

    Args:
      history: what is there at the start, which is saved already.
    """

    def __init__(self, history: History) -> None:
        self._parts = [history] if history else []
        self._saved = len(self._parts)

    def append(self, new: History) -> None:
        """Adds some rounds and their evaluation."""
        self._parts.append(new)

    def unsaved(self) -> History:
        """What was appended since `saved` was called."""
        return _joined(self._parts[self._saved :])

    def saved(self) -> None:
        """Everything up to here is saved."""
        self._saved = len(self._parts)

    def unsave(self) -> None:
        """Nothing is saved, so that the next save takes all of it."""
        self._saved = 0

    def joined(self) -> History:
        """All of it."""
        return _joined(self._parts)


def _joined(parts: Sequence[History]) -> History:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part[name] for part in parts if name in part], axis=1) for name in names}


def of_seeds(history: History, which: np.ndarray) -> History:
    """The history of some seeds, bool[S], or of all for a single True."""
    return {name: value[which] for name, value in history.items()} if which.ndim else history


def until(history: History, ends: np.ndarray) -> History:
    """The history without participants and updates in the rounds of every seed after its end, int[S]."""
    after = np.arange(history["round/loss"].shape[1]) >= ends[:, None]
    return history | {name: np.where(after, 0, history[name]) for name in ("round/participants", "round/update_norm")}


def side_by_side(histories: Sequence[History]) -> History:
    """Histories of other seeds as one.

    Where the seeds of one have stopped earlier, its last values are repeated; they are not reported
    (`pipelines.results.early`).
    """

    def joined(name: str) -> np.ndarray:
        values = [history[name] for history in histories]
        if _grows(name):
            longest = max(value.shape[1] for value in values)
            values = [np.take(v, np.minimum(np.arange(longest), v.shape[1] - 1), axis=1) for v in values]
        return np.concatenate(values)

    return {name: joined(name) for name in histories[0]}


def first_bad_round(history: History) -> tuple[int, int] | None:
    """(seed, round) of the first training loss or update norm that is not finite, counted from 0; None if all are.

    A round in which no client took part has no loss, NaN, and is not bad for that.
    """
    known = history["round/participants"] > 0
    bad = ~((np.isfinite(history["round/loss"]) | ~known) & np.isfinite(history["round/update_norm"]))
    if not bad.any():
        return None
    round = int(np.argmax(bad.any(axis=0)))
    return int(np.argmax(bad[:, round])), round


def mean_losses(history: History, eval_rounds: np.ndarray) -> np.ndarray:
    """float[S, e], the mean training loss over the rounds since the evaluation before.

    Rounds in which no client took part, which have no loss, are left out; NaN where there was no other.
    """
    took_part = history["round/participants"] > 0
    loss = np.where(took_part, history["round/loss"], 0).astype(np.float64)
    rounds = loss.shape[1]
    starts = np.concatenate([[0], eval_rounds[eval_rounds < rounds]]).astype(np.int64)
    counts = np.add.reduceat(took_part.astype(np.int64), starts, axis=1)
    return np.where(counts > 0, np.add.reduceat(loss, starts, axis=1) / np.maximum(counts, 1), np.nan)


def mean_known(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def evaluated_rounds(rounds: int, eval_every: int) -> np.ndarray:
    """int[e], the rounds after which a run is evaluated: every `eval_every`, and the last."""
    grid = np.arange(eval_every, rounds + 1, eval_every)
    return grid if rounds % eval_every == 0 else np.append(grid, rounds)


def to_csv(
    histories: Mapping[str, History],
    seeds: Sequence[int],
    eval_rounds: np.ndarray,
    ends: Mapping[str, np.ndarray] | None = None,
) -> str:
    """The metrics as CSV text, one row per method, seed and round.

    Bytes are given per participant, as the methods report them (the mean where participants differ), and as
    `..._total`, times the participants, an integer as exact as that. The loss is nan in a round without participants. A
    cell is empty where the method does not report the metric, or the round was not evaluated. Metrics that are no
    scalars are left out.

    Args:
      histories: method to history.
      seeds: S seeds, or more: a method may not have run with all of them yet.
      eval_rounds: int[e], from `evaluated_rounds`.
      ends: method to int[S], the rounds of every seed, where they are not all.
    """
    columns = csv_columns(histories)
    header = ",".join(["method", "seed", "round", *columns.names]) + "\n"
    return header + csv_rows(histories, seeds, eval_rounds, columns, ends=ends)


class Columns(NamedTuple):
    """The columns of metrics.csv that depend on the methods: names of scores and of extra metrics."""

    tests: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Headings, but for method, seed and round."""
        return [*_BASE, "bytes_up_total", "bytes_down_total", *map(column, self.tests), *self.extras]


def csv_columns(histories: Mapping[str, History]) -> Columns:
    """The columns that these histories need."""
    extras: dict[str, None] = {}
    tests: dict[str, None] = {}
    for history in histories.values():
        for name, value in history.items():
            group, _, metric = name.partition("/")
            if group == "round" and metric not in _BASE and value.ndim == 2:
                extras[metric] = None
            if group in ("test", "validated"):
                tests[name] = None
    return Columns(tuple(tests), tuple(extras))


def csv_rows(
    histories: Mapping[str, History],
    seeds: Sequence[int],
    eval_rounds: np.ndarray,
    columns: Columns,
    begin: int = 0,
    ends: Mapping[str, np.ndarray] | None = None,
) -> str:
    """The rows of `to_csv` for histories that begin after `begin` rounds.

    `eval_rounds` and `ends` are those of the whole run, counted from its beginning.
    """
    tests, extras = columns
    eval_rounds = eval_rounds[eval_rounds > begin] - begin
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for method, history in histories.items():
        if not history:
            continue
        for s, seed in enumerate(seeds[: len(history["round/loss"])]):
            rounds = history["round/loss"].shape[1]
            if ends is not None and method in ends:
                rounds = min(rounds, int(ends[method][s]) - begin)
            for t in range(rounds):
                participants = int(history["round/participants"][s, t])
                row = [_cell(history[f"round/{name}"][s, t], name) for name in _BASE]
                row += [str(total_bytes(history[f"round/{n}"][s, t], participants)) for n in ("bytes_up", "bytes_down")]
                at = int(np.searchsorted(eval_rounds, t + 1))
                evaluated = at < len(eval_rounds) and eval_rounds[at] == t + 1
                row += [str(history[n][s, at]) if evaluated and n in history else "" for n in tests]
                row += [_cell(history[f"round/{n}"][s, t], n) if f"round/{n}" in history else "" for n in extras]
                writer.writerow([method, seed, begin + t + 1, *row])
    return text.getvalue()


def _cell(value: Any, name: str) -> str:
    """A number in a table; whole bytes without a point."""
    return str(int(value)) if "bytes" in name and float(value).is_integer() else str(value)


def total_bytes(per_participant: Any, participants: Any) -> int:
    """Bytes that all participants have sent or been sent, from the mean."""
    return round(float(per_participant) * int(participants))


def of_view(kind: str, view: str, metric: str) -> str:
    """The name of a metric of a view: "test/accuracy" of the global model, "test/personal/accuracy" of another view."""
    return f"{kind}/{metric}" if view == "global" else f"{kind}/{view}/{metric}"


def views_of(history: History, kind: str = "test") -> list[str]:
    """Names of the views that were evaluated, the global one first."""
    known = [""] if f"{kind}/accuracy" in history else []
    of_others = [name.split("/") for name in history if name.startswith(f"{kind}/")]
    return [each or "global" for each in known] + [p[1] for p in of_others if len(p) == 3 and p[2] == "accuracy"]


def final_scores(history: History, view: str, metric: str) -> np.ndarray:
    """float[S], the last scores on the test examples: after what a method does after its last round, if it does."""
    name = of_view("test", view, metric)
    return history[f"final/{name}"] if f"final/{name}" in history else history[name][:, -1]


def is_score(name: str) -> bool:
    """Whether it is a score of the models at every evaluation, [S, e]."""
    return name.startswith(("test/", "validated/"))


def _grows(name: str) -> bool:
    """Whether it has an axis of rounds or evaluations."""
    return is_score(name) or name.startswith(("round/", "each/"))


def column(name: str) -> str:
    """The column of a score: "test_accuracy", "validation_accuracy"."""
    return name.replace("validated/", "validation/").replace("/", "_")


def _plain(value: Any) -> np.ndarray:
    """A numpy array of a dtype that numpy itself can store."""
    if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
        value = value.astype(jnp.float32)
    return np.asarray(value)
