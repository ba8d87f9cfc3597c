"""Runs beside one another: what differs between them, whether that is fair, their numbers, curves and differences.

    write(Path("comparisons/mine"), load([Path("runs/one"), Path("runs/other")]))

comparison.md, and comparison.html with the figure inside; curves.png and .pdf. S seeds, e evaluations.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.common import figures, files
from pipelines.common.progress import duration, size
from pipelines.configuration import methods
from pipelines.configuration.config import Config
from pipelines.configuration.options import fields_of
from pipelines.results import early, pages, report, statistics
from pipelines.results.history import evaluated_rounds, final_scores, of_view
from pipelines.results.subject import counted
from pipelines.run import measured, run_directory
from pipelines.run.measured import Measured

_SHOWN_ELSEWHERE = ("methods", "settings")


class Entry(NamedTuple):
    """A method of a run.

    Attributes:
      label: run and method, which no other has.
      run: index of the run.
      method: its name.
      view: the view by which it is judged.
      seeds: S seeds.
      rounds: int[e], rounds of the evaluations.
      accuracy: float[S, e], on test examples; of a seed that has stopped its last one from there on.
      loss: float[S, e], likewise.
      final_accuracy: float[S], what has come of it in the end.
      final_loss: float[S].
      best_accuracy: float[S], of the best model by validation where the run validates, else the highest.
      best_loss: float[S], likewise, or the lowest.
      sent: bytes up and down, of all rounds and participants, means over seeds.
      seconds: of compiling and of running, all seeds together.
    """

    label: str
    run: int
    method: str
    view: str
    seeds: list[int]
    rounds: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    final_accuracy: np.ndarray
    final_loss: np.ndarray
    best_accuracy: np.ndarray
    best_loss: np.ndarray
    sent: tuple[int, int]
    seconds: tuple[float, float]


class Difference(NamedTuple):
    """How the final accuracy of one entry differs from that of another, seed by seed.

    Attributes:
      one: an entry.
      other: what it is compared with.
      values: float[S], of the seeds that both have: accuracy of `one` less that of `other`.
      p: p-value of the paired test, None where it says nothing.
    """

    one: Entry
    other: Entry
    values: np.ndarray
    p: float | None


class Comparison(NamedTuple):
    """Runs and their methods.

    Attributes:
      runs: the runs.
      names: a name for each, no two alike.
      target: test accuracy that the methods are to reach.
      entries: every method of every run.
    """

    runs: list[Measured]
    names: list[str]
    target: float
    entries: list[Entry]


def load(outs: Sequence[Path], target: float | None = None) -> Comparison:
    """Reads runs that are to be compared.

    Args:
      outs: their directories, two or more; the others are compared with the first.
      target: test accuracy to reach, that of the first run unless given.

    Raises:
      ValueError: if there are fewer than two, one is named twice or is a copy of another, one is no run of
        `fedjax-core train`, or cannot be read (`pipelines.run.measured.read`).
    """
    if len(outs) < 2:
        raise ValueError(
            f"there is {counted(len(outs), 'run')} to compare: name two or more, or see one by `fedjax-core report RUN`"
        )
    _check_apart(outs, [str(out.resolve()) for out in outs], "are the same directory")
    kinds = {out: run_directory.command_of(out) for out in outs}
    first, kind = next(iter(kinds.items()))
    for out, other in kinds.items():
        if other != kind:
            raise ValueError(
                f"{first} is of `fedjax-core {kind}` and {out} of `fedjax-core {other}`: compare runs of `fedjax-core "
                "train` with one another"
            )
    if kind != "train":
        raise ValueError(
            f"{first} is of `fedjax-core {kind}`, whose report compares its methods (`fedjax-core report {first}`): "
            "compare runs of `fedjax-core train`"
        )
    runs = [measured.read(out) for out in outs]
    _check_apart(outs, [str(run.record.get("run", "")) for run in runs], "are copies of one run")
    return of(runs, run_names(outs), runs[0].config.report.target if target is None else target)


def of(runs: Sequence[Measured], names: Sequence[str], target: float) -> Comparison:
    """The comparison of runs, under names of which no two are alike."""
    entries = [
        _entry(run, i, method, f"{names[i]}/{methods.paper_name(method)}")
        for i, run in enumerate(runs)
        for method in run.histories
    ]
    return Comparison(list(runs), list(names), target, entries)


def _check_apart(outs: Sequence[Path], whose: Sequence[str], words: str) -> None:
    """Raises ValueError if two runs are one."""
    seen: dict[str, Path] = {}
    for out, each in zip(outs, whose, strict=True):
        if each and each in seen:
            raise ValueError(f"{seen[each]} and {out} {words}: leave one of them out")
        seen[each] = out


def run_names(outs: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    paths = [out.resolve().parts for out in outs]
    longest = max(map(len, paths))
    for parts in range(1, longest + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(out) for out in outs]


def _entry(run: Measured, index: int, method: str, label: str) -> Entry:
    config = run.config
    all_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    shown = early.reported(config, run.histories[method], all_rounds)
    view = report.main_view(run.subject, method, shown)
    accuracy, loss = (shown[of_view("test", view, name)].astype(np.float64) for name in ("accuracy", "loss"))
    final_accuracy, final_loss = (final_scores(shown, view, name).astype(np.float64) for name in ("accuracy", "loss"))
    course = early.course(config, shown)
    if course is not None:
        at = course.best[:, None]
        best = [np.take_along_axis(values, at, axis=1)[:, 0] for values in (accuracy, loss)]
    else:  # what a method does after its last round may have made it better
        best = [
            np.fmax(np.fmax.reduce(accuracy, axis=1), final_accuracy),
            np.fmin(np.fmin.reduce(loss, axis=1), final_loss),
        ]
    info = run.info[method]
    return Entry(
        label,
        index,
        method,
        view,
        run.subject.seeds[: len(accuracy)],
        all_rounds[: accuracy.shape[1]],
        accuracy,
        loss,
        final_accuracy,
        final_loss,
        best[0],
        best[1],
        (report.transferred(shown, "bytes_up"), report.transferred(shown, "bytes_down")),
        (info["compile_seconds"], info["run_seconds"]),
    )


def differences(found: Comparison) -> list[Difference]:
    """Each method against the first one, and against the same method of an earlier run, where seeds are pairs.

    They are pairs where federations, test examples and kinds of random keys are the same, and both are judged by the
    same view.
    """
    pairs = []
    for i, one in enumerate(found.entries):
        before = found.entries[:i]
        alike = [each for each in before[1:] if each.method == one.method and before[0].method != one.method]
        pairs += [(one, other) for other in (*before[:1], *alike[:1])]
    return [each for each in (_difference(found, one, other) for one, other in pairs) if each is not None]


def _difference(found: Comparison, one: Entry, other: Entry) -> Difference | None:
    pair = _paired(found, one, other)
    return None if pair is None else Difference(one, other, pair[0] - pair[1], statistics.paired_test(*pair))


def _paired(found: Comparison, one: Entry, other: Entry) -> list[np.ndarray] | None:
    """The final accuracies of both, float[S] of the seeds that both have; None where seeds are no pairs."""
    here, there = _identity(found.runs[one.run]), _identity(found.runs[other.run])
    common = [seed for seed in one.seeds if seed in other.seeds]
    if not here or here != there or one.view != other.view or not common:
        return None
    return [each.final_accuracy[[each.seeds.index(seed) for seed in common]] for each in (one, other)]


def ties(found: Comparison) -> list[bool]:
    """Which entries have the highest final accuracy, or cannot be told from it by a paired test over common seeds.

    None where any two of them are no pairs: there is no best one then.
    """
    means = np.asarray([each.final_accuracy.mean() for each in found.entries])
    if not np.isfinite(means).any():
        return [False] * len(means)
    best = found.entries[int(np.nanargmax(means))]
    pairs = [_paired(found, each, best) for each in found.entries]
    return [
        all(pair is not None for pair in pairs) and (each is best or (pair is not None and statistics.is_tied(*pair)))
        for each, pair in zip(found.entries, pairs, strict=True)
    ]


def _identity(run: Measured) -> dict[str, str]:
    """Digests of examples and clients, and the kind of random keys."""
    return dict(run.record.get("identity") or {})


def unfair(found: Comparison) -> list[str]:
    """What makes a comparison of these runs unfair, a sentence each."""
    lines = []

    def differs(of: Callable[[Measured], Any]) -> str:
        """Who has what, in words; "" where all have the same."""
        values = [of(run) for run in found.runs]
        if all(value == values[0] for value in values):
            return ""
        return "; ".join(f"{name}: {_shown(value)}" for name, value in zip(found.names, values, strict=True))

    def digest(name: str) -> Callable[[Measured], str]:
        return lambda run: _identity(run).get(name, "unknown")[:12]

    unknown = [name for name, run in zip(found.names, found.runs, strict=True) if not _identity(run)]
    if unknown:
        lines.append(f"Nothing is known of the examples of {', '.join(unknown)}, of an earlier version.")
    elif (said := differs(digest("examples"))) and differs(lambda run: run.config.machine.x64):
        lines.append(
            f"Whether the examples are the same cannot be told: their digests are others ({said}), as they are between "
            "single and double precision."
        )
    elif said:
        lines.append(f"The examples are others, so that accuracies are of other tasks (digests {said}).")
    elif said := differs(digest("clients")):
        lines.append(f"The same examples are held by other clients, or in other parts (digests {said}).")
    if said := differs(lambda run: run.subject.parts.get("test", 0)):
        lines.append(f"The test parts of clients are others (examples in them: {said}).")
    if said := differs(lambda run: run.config.evaluation.evaluate_clients):
        lines.append(f"Not as many clients are tested by models of their own (evaluate_clients: {said}).")
    if said := differs(lambda run: "keys" in _identity(run) and (digest("keys")(run), digest("partitionable")(run))):
        lines.append(f"The random keys are of other kinds, so that one seed draws other numbers ({said}).")
    views = {each.view for each in found.entries}
    if len(views) > 1:
        lines.append(
            "Methods are judged by other views ("
            + "; ".join(f"{each.label}: {each.view}" for each in found.entries)
            + "): clients' own models are tested on other examples than a global one."
        )
    if said := differs(lambda run: run.config.rounds):
        lines.append(f"The numbers of rounds are others ({said}).")
    ends = {each.label: int(each.rounds[-1]) for each in found.entries}
    short = [
        f"{each.label} at round {ends[each.label]} of {found.runs[each.run].config.rounds}"
        for each in found.entries
        if not found.runs[each.run].ended and ends[each.label] < found.runs[each.run].config.rounds
    ]
    if short:
        lines.append(f"Not all have ended, and are shown as far as they have come ({'; '.join(short)}).")
    begun = [
        f"{name}: {', '.join(m for m in run.config.methods if m not in run.histories)}"
        for name, run in zip(found.names, found.runs, strict=True)
        if len(run.histories) < len(run.config.methods)
    ]
    if begun:
        lines.append(f"Methods that have not been evaluated yet are left out ({'; '.join(begun)}).")
    if said := differs(lambda run: run.subject.seeds):
        lines.append(f"The seeds are others ({said}).")
    if said := differs(lambda run: run.config.machine.x64):
        lines.append(f"Not all are in double precision (x64: {said}).")
    if said := differs(lambda run: run.config.evaluation.eval_every):
        lines.append(
            f"They are evaluated at other rounds (eval_every: {said}): who is looked at more often has more chances of "
            "a high best accuracy, and reaches a target sooner."
        )
    if said := differs(lambda run: run.config.evaluation.validates):
        lines.append(
            f"Only some stop early or keep their best model by validation examples ({said}); of the others the best is "
            "chosen by looking at test examples."
        )
    if said := differs(lambda run: run.record.get("versions", {}).get("device", "unknown")):
        lines.append(f"They ran on other devices, so that seconds say nothing ({said}).")
    return lines


def configurations(found: Comparison) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """What differs, (choice, its value in every run), and what is the same, "choice=value" where it is no default."""
    flats = [run.config.flat() for run in found.runs]
    default = Config().flat()
    different, same = [], []
    for name in fields_of(Config):
        values = [flat[name] for flat in flats]
        if any(value != values[0] for value in values):
            different.append((name, [_shown(value) for value in values]))
        elif values[0] != default[name] and name not in _SHOWN_ELSEWHERE:
            same.append(f"{name}={_shown(values[0])}")
    return different, same


def _shown(value: Any) -> str:
    """A value of a configuration, in a cell."""
    if isinstance(value, Mapping):
        pairs = [(f"{m}.{k}", v) for m, own in value.items() for k, v in own.items()]
        return ", ".join(f"{name}={_shown(v)}" for name, v in pairs) or "-"
    if isinstance(value, list | tuple):
        numbers = all(isinstance(each, int) for each in value) and len(value) > 2
        if numbers and list(value) == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(_shown, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write(out: Path, found: Comparison, command: str) -> list[str]:
    """Writes the comparison into a directory, which is made if need be; returns the names of the files.

    Args:
      out: where to.
      found: from `load`.
      command: that compares these runs, to be shown.
    """
    with figures.style():
        drawn = {"curves.png": curves(found)}
        text = summary(found, command)
        files.make_directory(out)
        pages.write(out, text, drawn, "comparison")
    return ["comparison.html and .md", "curves.png and .pdf"]


def rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results."""
    in_views = any(each.view != "global" for each in found.entries)
    header = ["run", "method", *(["view"] if in_views else []), "seeds", "rounds", "final accuracy", "best accuracy"]
    header += [
        "final loss",
        "best loss",
        f"rounds to {100 * found.target:g} %",
        "sent up",
        "sent down",
        "compile",
        "run",
    ]
    cells = []
    for each, marked in zip(found.entries, ties(found), strict=True):
        final = report.mean_sd(each.final_accuracy)
        compiled, ran = map(duration, each.seconds)
        staged = found.runs[each.run].config.machine.staged
        cells.append(
            [
                found.names[each.run],
                methods.paper_name(each.method),
                *([each.view] if in_views else []),
                str(len(each.seeds)),
                str(each.rounds[-1]),
                f"**{final}**" if marked else final,
                report.mean_sd(each.best_accuracy),
                _loss(each.final_loss),
                _loss(each.best_loss),
                report.rounds_to_target(each.accuracy, each.rounds, found.target),
                *map(size, each.sent),
                "in run" if staged else compiled,
                ran,
            ]
        )
    return header, cells


def _loss(values: np.ndarray) -> str:
    return statistics.spread(values) if np.isfinite(values).all() else "not finite"


def summary(found: Comparison, command: str) -> str:
    """The comparison as Markdown."""
    different, same = configurations(found)
    warned = unfair(found)
    header, cells = rows(found)
    left = header.index("seeds")
    lines = [f"# {counted(len(found.runs), 'run')} beside one another: {', '.join(found.names)}", ""]
    lines += ["## What differs", ""]
    if different:
        shown = [[name, *values] for name, values in different]
        lines += pages.table(["choice", *found.names], shown, left=1 + len(found.names))
    else:
        lines += ["Nothing: the configurations are the same."]
    others = "all at their defaults" if not same else f"{', '.join(same)}, and all others at their defaults"
    lines += ["", f"The same in all of them: {others}."]
    if warned:
        lines += ["", "## What makes this unfair", "", *(f"- {line}" for line in warned)]
    lines += ["", "## Results", "", *pages.table(header, cells, left), "", _about(found), ""]
    lines += ["![Test accuracy and test loss against rounds](curves.png)", ""]
    lines += ["## Differences, seed by seed", "", *_differences(found), "", "## Settings", ""]
    settings = [[each.label, report.settings_line(found.runs[each.run].config, each.method)] for each in found.entries]
    lines += [*pages.table(["run and method", "settings"], settings, left=2), "", "## Again", ""]
    commands = [run.config.command(str(run.out)) for run in found.runs]
    return "\n".join([*lines, "```", *commands, "", command, "```"]) + "\n"


def _about(found: Comparison) -> str:
    validated = any(run.config.evaluation.validates for run in found.runs)
    best = "the highest and lowest of all evaluations on test examples, which flatters whoever jumps about"
    if validated:
        best = f"those of the best model by validation examples where the run has some, else {best}"
    targets = {run.config.report.target for run in found.runs}
    whose = "" if targets == {found.target} else f" The target is {100 * found.target:g} % for all of them."
    bold = (
        "Bold: the highest final accuracy, and what a paired t-test over common seeds cannot tell from it (p of at "
        f"least {statistics.TIE:g}). "
        if any(ties(found))
        else ""
    )
    return (
        f"{bold}Mean ± standard deviation over seeds, on test examples; best accuracy and loss are {best}. Bytes are "
        f"summed over rounds and participants, as a mean over seeds; seconds are of all seeds at once.{whose}"
    )


def _differences(found: Comparison) -> list[str]:
    of = differences(found)
    if not of:
        return [
            "None can be told: no two of these methods have seeds in common on the same federation, judged by the same "
            "view."
        ]
    header = ["run and method", "less", "seeds", "difference of final accuracy", "p"]
    cells = [
        [
            each.one.label,
            each.other.label,
            str(len(each.values)),
            _points(each.values),
            "-" if each.p is None else f"{each.p:.3g}",
        ]
        for each in of
    ]
    return [
        *pages.table(header, cells, left=2),
        "",
        f"In percentage points, with the {100 * statistics.CONFIDENCE:g} % interval of Student's t over the seeds that "
        "both have; p is that of a paired t-test, without a correction for their number. With one seed, or differences "
        "that are all alike, it says nothing.",
    ]


def _points(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return "unknown"
    half = statistics.half_width(values)
    mean = 100 * float(np.mean(values))
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} ± {100 * half:.2f}"


def curves(found: Comparison) -> Figure:
    """Test accuracy and test loss against rounds: lines are means over seeds, bands one standard deviation."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, each in enumerate(found.entries):
        report.band(left, each.rounds, each.accuracy, i, each.label)
        report.band(right, each.rounds, each.loss, i, each.label)
    for axis in (left, right):
        axis.set(xlabel="round", xlim=(0, max(int(each.rounds[-1]) for each in found.entries)))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    report.accuracy_axis(left, [each.accuracy for each in found.entries], found.target)
    right.set(title="Test loss")
    losses = np.concatenate([each.loss[np.isfinite(each.loss)] for each in found.entries])
    if len(losses) and losses.min() > 0:
        right.set_yscale("log")
    figures.legend_below(figure, left, right, columns=3)
    figures.title(figure, "Mean and standard deviation over seeds")
    return figure


def command(outs: Sequence[Path], out: Path, target: float | None) -> str:
    """The command line that makes a comparison."""
    words = ["fedjax-core", "compare", *map(str, outs), *([] if target is None else ["--target", f"{target:g}"])]
    return shlex.join([*words, "--out", str(out)])
