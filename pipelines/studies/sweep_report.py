"""What a sweep has found: a tidy table, the best setting of every method, and how much its hyper-parameters matter.

    sweep.parquet     a row for every method, setting, seed and round
    summary.md        the best settings with confidence intervals, what lies on an edge of its grid, what diverged
    summary.html      the same with the figure inside
    results.tex       the same table for a paper
    sensitivity.png   and .pdf: the validation score over the grid of every method

Settings are chosen by validation scores, means over seeds; test scores are those of the chosen ones.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.common import figures, files
from pipelines.configuration import methods
from pipelines.results import latex, pages
from pipelines.results.history import column, evaluated_rounds, of_view
from pipelines.results.statistics import CONFIDENCE, TIE, interval, is_tied, spread
from pipelines.run import run_directory
from pipelines.studies.sweep import (
    KIND,
    LAST,
    Curves,
    Results,
    Trial,
    better_first,
    rounds_done,
    saved_trials,
    score,
    sound_rounds,
)
from pipelines.studies.sweep_config import Setting, Sweep, short

_FILE = "sweep.parquet"


class Best(NamedTuple):
    """The best setting of a method.

    Attributes:
      method: name of the method.
      setting: the setting whose mean validation score over seeds is best.
      validation: float[S], the score of every seed by which it was chosen.
      test: float[S], the same on test examples.
      view: the view by which the method is judged, "global" or for example "personal".
      edges: hyper-parameters whose best value is the first or last of their grid, in words.
      diverged: settings of which a seed came to a score that is not finite.
      settings: how many were tried.
    """

    method: str
    setting: Setting
    validation: np.ndarray
    test: np.ndarray
    view: str
    edges: list[str]
    diverged: list[Setting]
    settings: int


def write(sweep: Sweep, results: Results, main: Mapping[str, str], out: Path, say: Callable[[str], None]) -> None:
    """Writes everything; says what lies on an edge, what diverged, and whether the table had been edited.

    Args:
      sweep: the configuration.
      results: all trials.
      main: method to the view by which it is judged.
      out: directory of the sweep.
      say: what to do with a line.
    """
    if is_edited(out):
        say(f"note: {out / _FILE} was changed since it was written: it is written anew from the trials")
    files.write(out / _FILE, lambda path: table(sweep, results, path))
    files.write_text(out / (_FILE + ".sha256"), _digest(out / _FILE) + "\n")
    draw(out, out, sweep, results, main, say)


def draw(
    out: Path, run: Path, sweep: Sweep, results: Results, main: Mapping[str, str], say: Callable[[str], None]
) -> list[str]:
    """Writes all but the table, of the methods that are done; returns the names of the files.

    Args:
      out: where to.
      run: directory of the sweep, for the command that repeats it.
      sweep: as for `write`.
      results: as for `write`, of the methods that are done.
      main: as for `write`.
      say: as for `write`.
    """
    found = best(sweep, results, main)
    for each in found:
        for line in _warnings(sweep, each):
            say(f"note: {line}")
    header, rows = cells(sweep, found, lambda text: text)
    best_ones = [(row, len(header) - 2) for row, marked in enumerate(ties(found, sweep.evaluation.best_by)) if marked]
    comment = f"{sweep.command(run)}\nbold: best, and what a paired test cannot tell from it (p >= {TIE:g})"
    files.write_text(out / "results.tex", latex.table(header, rows, comment, best_ones))
    with figures.style():
        pages.write(out, summary(sweep, found, run), {"sensitivity.png": figure(sweep, results)})
    return ["summary.md and .html", "results.tex", "sensitivity.png and .pdf"]


def again(out: Path, target: Path, say: Callable[[str], None]) -> list[str]:
    """Writes the report of the sweep in the directory `out` again, from its trials, into `target`.

    Returns:
      The names of the files.

    Raises:
      ValueError: if `out` holds no sweep, none of its methods is done, or a trial or the table is not what was written.
    """
    record = run_directory.read(out, KIND)
    sweep = Sweep.from_values(record["config"])
    if "views" not in record:
        raise ValueError(
            f"{out} does not say by what its methods are judged, it is of an earlier version: give the command of the "
            "sweep again, which writes that down and repeats nothing that is done"
        )
    loaded = {method: saved_trials(sweep, method, out, str(record.get("run", ""))) for method in sweep.methods}
    results = {trial: curves for trials in loaded.values() for trial, curves in (trials or {}).items()}
    if not results:
        raise ValueError(f"no method of the sweep in {out} is done, so that there is nothing to show: run it first")
    if is_edited(out):
        raise ValueError(
            f"{out / _FILE} was changed since it was written: put it back, or remove it and give the command of the "
            "sweep again, which writes it anew"
        )
    files.make_directory(target)
    return draw(target, out, sweep, results, record["views"], say)


def _done(sweep: Sweep, results: Results) -> list[str]:
    """The methods of which there are results."""
    there = {trial.method for trial in results}
    return [method for method in sweep.methods if method in there]


def table(sweep: Sweep, results: Results, path: Path) -> None:
    """Writes the table as Parquet: a row for every method, setting, seed and round.

    Columns: method; setting, eight letters that tell a method's settings apart; each hyper-parameter, null where the
    method's grid has not got it; seed; round; the metrics of rounds; scores, null in rounds that were not evaluated;
    finite, whether the loss and the scores up to this round are. Of settings that successive halving has given up there
    are the rounds that they were trained for.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for axes in sweep.grid.values() for name in axes))
    kinds = {name: _kind([v for axes in sweep.grid.values() for v in axes.get(name, ())]) for name in names}
    metrics = dict.fromkeys(name for curves in results.values() for name, values in curves.items() if values.ndim == 1)
    headings = {name: name.removeprefix("round/") if name.startswith("round/") else column(name) for name in metrics}
    own: dict[str, Any] = {
        "text": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "switch": pa.bool_(),
    }
    schema = pa.schema(
        [("method", pa.string()), ("setting", pa.string())]
        + [(_heading(name, headings), own[kinds[name]]) for name in names]
        + [("seed", pa.int64()), ("round", pa.int64())]
        + [(heading, pa.float64()) for heading in headings.values()]
        + [("finite", pa.bool_())]
    )
    at = evaluated_rounds(sweep.rounds, sweep.evaluation.eval_every)
    with pq.ParquetWriter(path, schema) as writer:
        for trial, curves in results.items():
            rows = rounds_done(curves)
            values: dict[str, Any] = {
                "method": pa.repeat(pa.scalar(trial.method), rows),
                "setting": pa.repeat(pa.scalar(trial.setting.name), rows),
                "seed": pa.repeat(pa.scalar(trial.seed, pa.int64()), rows),
                "round": np.arange(1, rows + 1, dtype=np.int64),
                "finite": _finite(curves, at),
            }
            for name in names:
                value = trial.setting.values.get(name)
                kind = own[kinds[name]]
                value = str(value) if kinds[name] == "text" and value is not None else value
                values[_heading(name, headings)] = pa.repeat(pa.scalar(value, kind), rows)
            for name, heading in headings.items():
                values[heading] = _by_round(curves.get(name), name, at, rows)
            writer.write_table(pa.table([values[name] for name in schema.names], schema=schema))


def _heading(name: str, headings: Mapping[str, str]) -> str:
    """The column of a hyper-parameter, which may have the name of a metric."""
    taken = {"method", "setting", "seed", "round", "finite", *headings.values()}
    return f"set.{name}" if name in taken else name


def _kind(values: Sequence[Any]) -> str:
    if all(isinstance(value, bool) for value in values):
        return "switch"
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "integer"
    return "number" if all(isinstance(value, int | float) for value in values) else "text"


def _by_round(values: np.ndarray | None, name: str, at: np.ndarray, rows: int) -> Any:
    """A metric in every round, null where it was not measured."""
    import pyarrow as pa

    if values is None:
        return pa.nulls(rows, pa.float64())
    if name.startswith("round/"):
        return pa.array(values.astype(np.float64))
    column, known = np.zeros(rows), np.zeros(rows, bool)
    at = at[: len(values)] if not name.startswith("final/") else np.asarray([rows])
    column[at - 1], known[at - 1] = values, True
    return pa.array(column, mask=~known)


def _finite(curves: Curves, at: np.ndarray) -> np.ndarray:
    sound = sound_rounds(curves)
    for name, values in curves.items():
        if name.startswith(("test/", "validated/")):
            sound[at[: len(values)] - 1] &= np.isfinite(values)
    return np.logical_and.accumulate(sound)


def best(sweep: Sweep, results: Results, main: Mapping[str, str]) -> list[Best]:
    """The best setting of every method, best method first, by validation scores; `main`: see `write`.

    Of a method whose settings were halved it is the best of those that were trained to the end.
    """
    by = sweep.evaluation.best_by
    found = []
    for method in _done(sweep, results):
        settings = sweep.settings_of_grid(method)
        of = {setting: _curves(sweep, results, method, setting) for setting in settings}
        finished = [s for s in settings if all(rounds_done(curves) == sweep.rounds for curves in of[s])]
        means = np.asarray([np.mean([score(curves, by) for curves in of[s]]) for s in finished])
        chosen = finished[int(better_first(means, by)[0])]
        found.append(
            Best(
                method,
                chosen,
                np.asarray([score(curves, by) for curves in of[chosen]]),
                np.asarray([score(curves, by, name=of_view("test", main[method], by)) for curves in of[chosen]]),
                main[method],
                _edges(sweep, method, chosen),
                [s for s in settings if not np.isfinite([score(curves, by) for curves in of[s]]).all()],
                len(settings),
            )
        )
    return [found[i] for i in better_first(np.asarray([each.validation.mean() for each in found]), by)]


def _curves(sweep: Sweep, results: Results, method: str, setting: Setting) -> list[Curves]:
    """The curves of a setting, a seed each."""
    return [results[Trial(method, setting, seed)] for seed in sweep.all_seeds]


def _edges(sweep: Sweep, method: str, setting: Setting) -> list[str]:
    found = []
    for name, values in sweep.grid.get(method, {}).items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values) > 1 and setting.values[name] in (min(numbers), max(numbers)):
            which = "smallest" if setting.values[name] == min(numbers) else "largest"
            found.append(f"{name}={short(setting.values[name])}, the {which}")
    return found


def _warnings(sweep: Sweep, each: Best) -> list[str]:
    lines = []
    if each.edges:
        lines.append(
            f"{each.method} is best on the edge of its grid ({'; '.join(each.edges)}): better values may lie beyond, "
            "add them to the grid"
        )
    if each.diverged:
        some = "; ".join(str(setting) or "its only setting" for setting in each.diverged[:5])
        more = ", ..." if len(each.diverged) > 5 else ""
        lines.append(f"{each.method} diverged with {len(each.diverged)} of {each.settings} settings: {some}{more}")
    return lines


def ties(found: Sequence[Best], by: str) -> list[bool]:
    """Whether a method is the best on test examples, or a paired test over seeds cannot tell it from the best.

    Methods that are judged by other views are tested on other examples, and not compared. The seeds of all methods draw
    the same models, cohorts and batches, so that they are pairs. With one seed nothing can be told, and only the best
    is marked.
    """
    marked = []
    for each in found:
        rivals = [other.test for other in found if other.view == each.view]
        top = rivals[better_first(np.asarray([test.mean() for test in rivals]), by)[0]]
        marked.append(is_tied(each.test, top))
    return marked


def cells(sweep: Sweep, found: Sequence[Best], bold: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of the best settings; `bold` marks the best and its ties."""
    by = sweep.evaluation.best_by
    in_views = any(each.view != "global" for each in found)
    rows = []
    for each, marked in zip(found, ties(found, by), strict=True):
        test = spread(each.test)
        rows.append(
            [
                methods.paper_name(each.method),
                *([each.view] if in_views else []),
                str(each.setting) or "-",
                interval(each.validation),
                bold(test) if marked else test,
                f"{len(each.diverged)} of {each.settings}",
            ]
        )
    header = [
        "method",
        *(["view"] if in_views else []),
        "best setting",
        f"validation {by} ({100 * CONFIDENCE:g} % interval)",
        f"test {by} (s.d.)",
        "diverged",
    ]
    return header, rows


def summary(sweep: Sweep, found: Sequence[Best], out: Path) -> str:
    """The report as Markdown."""
    header, rows = cells(sweep, found, bold=lambda text: f"**{text}**")
    by, seeds = sweep.evaluation.best_by, sweep.seeds
    lines = [
        f"# {sweep.data.dataset}, {sweep.model}: {len(found)} methods, {sum(each.settings for each in found)} "
        f"settings, {seeds} seeds",
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * (len(header) - 3)}{' --: |' * 3}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"Settings are chosen by the {by} on examples that clients keep back ({sweep.federation.validation_share:g} of "
        f"theirs), the mean of the last {LAST} evaluations and of the seeds; its {100 * CONFIDENCE:g} % interval is "
        "Student's, over seeds. Bold: best on test examples, and what a paired t-test over seeds cannot tell from it "
        f"(p of at least {TIE:g}).",
    ]
    if "view" in header:
        lines[-1] += " Methods are compared within a view: clients' own models are tested on other examples."
    if seeds == 1:
        lines += ["", "There is one seed, so that nothing can be said about chance: no difference here need be one."]
    waiting = [methods.paper_name(name) for name in sweep.methods if name not in {each.method for each in found}]
    if waiting:
        lines += ["", f"**This sweep has not ended.** Not done yet: {', '.join(waiting)}."]
    warned = [line for each in found for line in _warnings(sweep, each)]
    if warned:
        lines += ["", "## To be looked at", "", *(f"- {line}" for line in warned)]
    lines += ["", "![The score on validation examples over the grid of every method](sensitivity.png)"]
    lines += ["", "## The best settings by `fedjax-core train`", "", "```"]
    lines += [
        sweep.config_of(each.method, each.setting).command(f"runs/{methods.folder(each.method)}") for each in found
    ]
    lines += ["```", "", "## This sweep", "", "```", sweep.command(out), "```", ""]
    return "\n".join(lines)


def figure(sweep: Sweep, results: Results) -> Figure:
    """The validation score over the grid: a line over one hyper-parameter, a map over the first two.

    Of further ones the best value is taken. Settings that diverged, or were given up, are left blank.
    """
    done = _done(sweep, results)
    shown = [method for method in done if sweep.grid.get(method)] or done
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axis, method in zip(axes, shown, strict=False):
        _draw(axis, sweep, method, results)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _draw(axis: Axes, sweep: Sweep, method: str, results: Results) -> None:
    by = sweep.evaluation.best_by
    grid = {name: values for name, values in sweep.grid.get(method, {}).items() if len(values) > 1}
    names = list(grid)[:2]
    axis.set_title(methods.paper_name(method), loc="left")
    scores: dict[tuple[Any, ...], list[np.ndarray]] = {}
    for setting in sweep.settings_of_grid(method):
        curves = _curves(sweep, results, method, setting)
        if all(rounds_done(each) == sweep.rounds for each in curves):
            found = np.asarray([score(each, by) for each in curves])
            scores.setdefault(tuple(setting.values[name] for name in names), []).append(found)
    chosen = {
        at: several[int(better_first(np.asarray([s.mean() for s in several]), by)[0])] for at, several in scores.items()
    }
    if not names:
        axis.text(0.5, 0.5, f"one setting: {interval(next(iter(chosen.values())))}", ha="center")
        axis.set_axis_off()
    elif len(names) == 1:
        values = grid[names[0]]
        at = [(i, chosen[(value,)]) for i, value in enumerate(values) if (value,) in chosen]
        x = [i for i, _ in at]
        axis.errorbar(
            x,
            [s.mean() for _, s in at],
            [s.std(ddof=1) if len(s) > 1 else 0 for _, s in at],
            marker="o",
            markersize=3,
            **figures.look(0),
        )
        _ticks(axis.set_xticks, values)
        axis.set(xlabel=names[0], ylabel=f"validation {by}")
    else:
        rows, columns = grid[names[1]], grid[names[0]]
        means = np.full((len(rows), len(columns)), np.nan)
        for (x, y), s in chosen.items():
            means[rows.index(y), columns.index(x)] = s.mean() if np.isfinite(s).all() else np.nan
        image = axis.imshow(means, origin="lower", aspect="auto", cmap="cividis" if by == "accuracy" else "cividis_r")
        for (row, at_column), value in np.ndenumerate(means):
            if np.isfinite(value):
                axis.text(
                    at_column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, color=_ink(image, value)
                )
        axis.grid(False)
        _ticks(axis.set_xticks, columns)
        _ticks(axis.set_yticks, rows)
        axis.set(xlabel=names[0], ylabel=names[1])
        axis.figure.colorbar(image, ax=axis, label=f"validation {by}")


def _ink(image: Any, value: float) -> str:
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _ticks(put: Callable[..., Any], values: Sequence[Any]) -> None:
    put(range(len(values)), [short(value) for value in values])


def is_edited(out: Path) -> bool:
    """Whether the table of a sweep is there and is not what was written."""
    written = out / (_FILE + ".sha256")
    return (out / _FILE).exists() and written.exists() and written.read_text().strip() != _digest(out / _FILE)


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
