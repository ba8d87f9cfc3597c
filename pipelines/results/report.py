"""What a run leaves behind: metrics.csv, clients.csv, summary.md, results.tex, and figures as .png and .pdf.

Everything is written from the histories (`pipelines.results.history`), so a report can be made again from checkpoints
alone. There is a report for every run that has ended: what was not measured, because no client took part or none has
examples for it, is said in words.
"""

import csv
import io
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_core import client_statistics
from pipelines.common import figures, files
from pipelines.common.progress import duration, size
from pipelines.configuration import methods
from pipelines.configuration.config import CLIENT_SETTINGS, Config
from pipelines.experiment.setup import ATTACK_STEPS, Experiment
from pipelines.federation import portrait
from pipelines.results import early, latex
from pipelines.results.history import History, evaluated_rounds, mean_losses, to_csv, total_bytes

_CLIENT_METRICS = ("loss", "accuracy", "train_loss", "train_accuracy")
_NOTHING = "no examples"


def write(
    out: Path,
    experiment: Experiment,
    histories: Mapping[str, History],
    info: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Writes every file of the report into the run directory.

    Args:
      out: the run directory.
      experiment: the experiment.
      histories: method to the history of a finished run.
      info: method to "compile_seconds", "run_seconds", "memory".
      versions: name to version, for the record.
    """
    config = experiment.config
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    sizes = experiment.federation.sizes
    ends = early.ends(config, histories, eval_rounds)
    files.write_text(out / "metrics.csv", to_csv(histories, experiment.seeds, eval_rounds, ends))
    histories = {name: early.reported(config, history, eval_rounds) for name, history in histories.items()}
    files.write_text(out / "clients.csv", clients_csv(histories, experiment.seeds, sizes))
    if config.evaluation.clients_over_time:
        files.write(out / "clients.parquet", partial(clients_parquet, experiment, histories))
    files.write_text(out / "results.tex", results_tex(experiment, histories))
    files.write_text(out / "summary.md", summary(out, experiment, histories, info, versions))
    with figures.style():
        figures.write(out / "curves.png", curves(experiment, histories, eval_rounds))
        figures.write(out / "clients.png", client_histogram(experiment, histories))


def clients_csv(histories: Mapping[str, History], seeds: list[int], sizes: np.ndarray) -> str:
    """How the final global model does for every client, one row per method, seed and client.

    loss and accuracy are held out (the test examples, weighted to the client's mix of labels); train_loss and
    train_accuracy are on the client's own training examples. In a run that validates, best_... is of its best model.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    best = [f"best/client/{name}" for name in _CLIENT_METRICS]
    best = best if any(best[0] in history for history in histories.values()) else []
    writer.writerow(["method", "seed", "client", "examples", *_CLIENT_METRICS, *(f"best_{n[12:]}" for n in best)])
    for method, history in histories.items():
        for s, seed in enumerate(seeds):
            for client, count in enumerate(sizes.tolist()):
                columns = [*(f"client/{name}" for name in _CLIENT_METRICS), *best]
                values = [str(history[name][s, client]) for name in columns]
                writer.writerow([method, seed, client, count, *values])
    return text.getvalue()


def part_of_clients(experiment: Experiment) -> str:
    """The part of the federation on which clients are followed: "test" where they have one of their own, or "train"."""
    return "test" if "test" in experiment.federation.parts else "train"


def clients_parquet(experiment: Experiment, histories: Mapping[str, History], path: Path) -> None:
    """Writes how the global model did for every client at every evaluation: a row per method, seed, round and client.

    loss and accuracy are means over the client's own examples of the part that the column says, as many as the column
    examples says; NaN for a client without any. A seed that stopped early has rows up to there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config, part = experiment.config, part_of_clients(experiment)
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    sizes = np.diff(experiment.federation.host_population(part).offsets).astype(np.int64)
    clients = len(sizes)
    counts = [("seed", pa.int64()), ("round", pa.int64()), ("client", pa.int64()), ("examples", pa.int64())]
    kind = pa.from_numpy_dtype(next(iter(histories.values()))["each/loss"].dtype)
    measured = [("loss", kind), ("accuracy", kind)]
    schema = pa.schema([("method", pa.string()), *counts, ("part", pa.string()), *measured])
    with pq.ParquetWriter(path, schema) as writer:
        for method, history in histories.items():
            found = early.course(config, history)
            for s, seed in enumerate(experiment.seeds):
                evaluations = history["each/loss"].shape[1] if found is None else int(found.ends[s])
                rows = evaluations * clients
                columns = {
                    "method": pa.repeat(pa.scalar(method), rows),
                    "seed": pa.repeat(pa.scalar(seed, pa.int64()), rows),
                    "round": np.repeat(eval_rounds[:evaluations].astype(np.int64), clients),
                    "client": np.tile(np.arange(clients, dtype=np.int64), evaluations),
                    "examples": np.tile(sizes, evaluations),
                    "part": pa.repeat(pa.scalar(part), rows),
                    **{name: history[f"each/{name}"][s, :evaluations].reshape(-1) for name, _ in measured},
                }
                writer.write_table(pa.table(columns, schema=schema))


def curves(experiment: Experiment, histories: Mapping[str, History], eval_rounds: np.ndarray) -> Figure:
    """Test accuracy and training loss against rounds: lines are means over seeds, bands one standard deviation."""
    config = experiment.config
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {}
    for i, (method, history) in enumerate(histories.items()):
        _band(left, eval_rounds, history["test/accuracy"], i, methods.paper_name(method))
        # A round's loss is that of a few clients; the mean since the last evaluation shows the course.
        losses[method] = mean_losses(history, eval_rounds[: history["test/accuracy"].shape[1]])
        if (found := early.course(config, history)) is not None:
            losses[method] = early.hold(losses[method], found.ends)
        _band(right, eval_rounds, losses[method], i, methods.paper_name(method))
    # Most of a curve is its beginning; what methods differ in is its end.
    finals = np.concatenate([h["test/accuracy"].mean(axis=0) for h in histories.values()])
    finals = finals[np.isfinite(finals)]
    low = max(0.0, float(np.quantile(finals, 0.05)) - 0.05) if len(finals) else 0.0
    left.set_ylim(low, min(1.0, max(finals.max(initial=0.0), config.report.target) + 0.02))
    if config.report.target >= low:
        style = {"color": "#888888", "linewidth": 0.8, "linestyle": (0, (4, 3))}
        left.axhline(config.report.target, label=f"target {100 * config.report.target:g} %", **style)
    for axis in (left, right):
        axis.set(xlabel="round", xlim=(0, _last_round(histories)))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    left.set(title="Test accuracy")
    left.yaxis.set_major_formatter(figures.Percent())
    right.set(title="Training loss of the participants")
    seen = np.concatenate([loss[np.isfinite(loss)] for loss in losses.values()])
    if not len(seen):
        _say(right, "no client took part in any round")
    elif seen.min() >= 0 and seen.max() > 0:
        right.set_yscale("log")
    figures.legend_below(figure, left, right)
    figures.title(figure, f"{_title(experiment)}; mean and standard deviation of {_count(config.seeds, 'seed')}")
    return figure


def client_histogram(experiment: Experiment, histories: Mapping[str, History]) -> Figure:
    """How the accuracy of the final global model is spread over clients: one histogram per method, all seeds."""
    config = experiment.config
    columns = min(len(histories), 4)
    rows = -(-len(histories) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 5), 0.4 + 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.reshape(-1)[: len(histories)])
    for unused in grid.reshape(-1)[len(histories) :]:
        unused.remove()
    values = {m: h["client/accuracy"][~np.isnan(h["client/accuracy"])] for m, h in histories.items()}
    lowest = min((float(v.min()) for v in values.values() if len(v)), default=0.0)
    bins = np.linspace(min(math.floor(10 * lowest) / 10, 0.9), 1, 21)
    for i, (axis, (method, accuracy)) in enumerate(zip(axes, values.items(), strict=True)):
        axis.set_xlim(bins[0], bins[-1])
        axis.xaxis.set_major_formatter(figures.Percent())
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if not len(accuracy):
            axis.set(title=methods.paper_name(method))
            _say(axis, "no client has examples to be tested on")
            continue
        axis.hist(
            accuracy,
            bins=bins.tolist(),
            weights=np.full(accuracy.shape, 1 / config.seeds),
            color=figures.COLORS[i % len(figures.COLORS)],
        )
        tail = np.nanmean([worst_decile(row) for row in histories[method]["client/accuracy"]])
        axis.axvline(accuracy.mean(), color="#222222", linewidth=1, label="mean")
        axis.axvline(tail, color="#222222", linewidth=1, linestyle=":", label="mean of the worst tenth")
        axis.set_title(
            f"{methods.paper_name(method)}\nmean {100 * accuracy.mean():.1f} %, worst tenth {100 * tail:.1f} %",
            fontsize=9,
        )
    for lowest_of_column in axes[-columns:]:
        lowest_of_column.tick_params(labelbottom=True)
        lowest_of_column.set_xlabel("accuracy of a client")
    figure.supylabel("clients (mean over seeds)" if config.seeds > 1 else "clients", fontsize=10)
    figures.legend_below(figure, *axes)
    own = (
        "each client's test examples" if _tested_on_own(experiment) else "test examples in each client's mix of labels"
    )
    figures.title(figure, f"{_title(experiment)}; final model on {own}")
    return figure


def results_tex(experiment: Experiment, histories: Mapping[str, History]) -> str:
    """The table of results in LaTeX, without what depends on the machine."""
    header, rows = results(experiment, histories)
    over = f"{_count(experiment.config.seeds, 'seed')}"
    comment = f"{_title(experiment)}\nmean and standard deviation over {over}; made by fedjax-core"
    return latex.table(header, rows, comment)


def results(experiment: Experiment, histories: Mapping[str, History]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results, without what depends on the machine."""
    config = experiment.config
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    extra = _extra_parts(experiment)
    header = [
        "method",
        "test accuracy",
        *(["of the best model", "its round", "rounds"] if config.evaluation.validates else []),
        *(["under attack"] if config.evaluation.attack_radius else []),
        "worst decile of clients",
        *[f"{part} {'clients' if part == 'new' else 'part'}" for part in extra],
        f"rounds to {100 * config.report.target:g} %",
        "sent up",
        "sent down",
    ]
    rows = []
    for name, history in histories.items():
        tails = np.asarray([worst_decile(row) for row in history["client/accuracy"]])
        rows.append(
            [
                methods.paper_name(name),
                mean_sd(history["test/accuracy"][:, -1].astype(np.float64)),
                *_of_the_best(config, history, eval_rounds),
                *([mean_sd(history["test/robust_accuracy"][:, -1])] if config.evaluation.attack_radius else []),
                mean_sd(tails),
                *[mean_sd(_mean_of_clients(history[f"{part}/accuracy"])) for part in extra],
                rounds_to_target(history["test/accuracy"], eval_rounds, config.report.target),
                size(transferred(history, "bytes_up")),
                size(transferred(history, "bytes_down")),
            ]
        )
    return header, rows


def summary(
    out: Path,
    experiment: Experiment,
    histories: Mapping[str, History],
    info: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The run in words and one table, as Markdown."""
    config = experiment.config
    extra = _extra_parts(experiment)
    header, rows = results(experiment, histories)
    header += ["compile", "run", "memory"]
    for row, name in zip(rows, histories, strict=True):
        spent = info[name]
        row += [
            "in run" if config.machine.staged else duration(spent["compile_seconds"]),
            duration(spent["run_seconds"]),
            size(spent["memory"]) if spent["memory"] else "unknown",
        ]
    own = "its own test examples" if _tested_on_own(experiment) else "test examples weighted to its mix of labels"
    also = "".join(
        f"{part.capitalize()} accuracy is the mean over {whose}. "
        for part, whose in (("validation", "clients, on their own"), ("new", "clients that took no part in training"))
        if part in extra
    )
    under_attack = (
        f"Under attack: test accuracy where {ATTACK_STEPS} steps of projected gradient ascent on its loss have moved "
        f"every input by at most {config.evaluation.attack_radius:g}. "
        if config.evaluation.attack_radius
        else ""
    )
    validated = (
        f"The best model is that with the best {config.evaluation.best_by} on the validation examples of all clients, "
        "the first of equals; test examples had no part in that choice. What is told of a stopped seed is as it was "
        "then. "
        if config.evaluation.validates
        else ""
    )
    table = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    settings = ["| method | its name here | settings |", "| --- | --- | --- |"]
    settings += [f"| {methods.paper_name(name)} | {name} | {settings_line(config, name)} |" for name in config.methods]
    missing = "".join(f" {line}" for line in _missing(experiment, histories))
    lines = [
        f"# {_title(experiment)}",
        "",
        *table,
        "",
        f"Mean ± standard deviation over {_count(config.seeds, 'seed')}, which ran at once. Test accuracy and the "
        f"accuracy of clients are the final global model's; a client's accuracy is on {own}, and the worst decile is "
        f"the mean over the tenth of the clients that fare worst. {validated}{under_attack}{also}Bytes are summed "
        "over rounds and participants, as a mean over seeds. Memory is what the compiled program needs, data "
        f"included.{missing}",
        "",
        "![Test accuracy and training loss against rounds](curves.png)",
        "",
        "![Histogram of the accuracy of clients](clients.png)",
        "",
        "## Settings",
        "",
        *[f"- {line}" for line in described(experiment)],
        "",
        *settings,
        "",
        "## Again",
        "",
        "```",
        config.command(str(out)),
        "```",
        "",
        "Ran with " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def described(experiment: Experiment) -> list[str]:
    """What an experiment is, one line for each part of it."""
    config = experiment.config
    params = num_parameters(experiment)
    hidden = f" (hidden {', '.join(map(str, config.hidden))})" if config.model == "mlp" else ""
    work = (
        f"{_count(config.local.steps, 'step')}"
        if config.local.steps is not None
        else _count(config.local.epochs, "epoch")
    )
    seeds = ", ".join(map(str, experiment.seeds))
    return [
        *portrait.described(config, experiment.federation),
        f"model: {config.model}{hidden}, {params:,} parameters",
        f"cohort: {cohort(config, experiment.federation.num_clients)}"
        + (", staged from host memory" if config.machine.staged else ""),
        f"local work: {work}, batches of {config.local.batch_size}, {config.local.client_optimizer}, "
        f"clients weighted {config.local.weights}",
        *([f"early stopping: {_stopping(config)}"] if config.evaluation.validates else []),
        f"rounds: {config.rounds}, evaluated every {config.evaluation.eval_every}, saved every "
        f"{config.report.checkpoint_every}; {_count(config.seeds, 'seed')} ({seeds}) at once"
        + (", double precision" if config.machine.x64 else ""),
    ]


def _stopping(config: Config) -> str:
    """When a seed stops, in words."""
    after = (
        [f"after {_count(config.evaluation.patience, 'evaluation')} without improvement"]
        if config.evaluation.patience
        else []
    )
    after += (
        [f"at a validation accuracy of {100 * config.evaluation.stop_at:g} %"]
        if config.evaluation.stop_at is not None
        else []
    )
    return f"{' or '.join(after) or 'never'}; the model with the best validation {config.evaluation.best_by} is kept"


def cohort(config: Config, num_clients: int) -> str:
    """Who takes part, in words."""
    c = config.participation
    turns = f"return with probability {c.turn_on:g}, leave with {c.turn_off:g}"
    words = {
        "full": f"all {num_clients} clients in every round",
        "bernoulli": f"each of {num_clients} clients with probability {c.probability:g} (bernoulli)",
        "periodic": f"each of {num_clients} clients in {c.probability:g} of every {c.period} rounds (periodic)",
        "markov": f"{num_clients} clients that {turns} (markov)",
    }
    return words.get(c.sampler, f"{c.cohort_size} of {num_clients} clients a round ({c.sampler})")


def settings_line(config: Config, name: str) -> str:
    """Everything that a method is run with, as `name=value` pairs."""
    client = {k: v for k, v in config.client_settings(name).items() if k == "client_lr" or v != CLIENT_SETTINGS[k]}
    own = methods.settings_of(name, config.method_settings(name))
    line = ", ".join(f"{k}={_shown(v)}" for k, v in {**client, **own}.items())
    return line if methods.takes_local_work(name) else f"{line}; one full-gradient step instead of local work"


def worst_decile(accuracies: np.ndarray) -> float:
    """Mean accuracy of the tenth of the clients that fare worst; NaN entries are left out, NaN if all are NaN."""
    if np.isnan(accuracies).all():
        return math.nan
    return float(client_statistics(jnp.asarray(accuracies)).worst_decile)


def rounds_to_target(accuracy: np.ndarray, eval_rounds: np.ndarray, target: float) -> str:
    """The first evaluated round at which each seed has reached the target, averaged; accuracy is [S, e]."""
    reached = accuracy >= target
    which = np.asarray(reached.any(axis=1))
    if not which.any():
        return "not reached"
    first = eval_rounds[np.argmax(reached[which], axis=1)]
    return f"{first.mean():.0f}" if which.all() else f"{first.mean():.0f} ({which.sum()} of {len(which)} seeds)"


def transferred(history: History, direction: str) -> int:
    """Bytes of all rounds and participants, as exact as the counts, as a mean over seeds (rounded)."""
    each, who = history[f"round/{direction}"], history["round/participants"]
    totals = [sum(total_bytes(*pair) for pair in zip(*rows, strict=True)) for rows in zip(each, who, strict=True)]
    return round(sum(totals) / len(totals))


def mean_sd(values: np.ndarray) -> str:
    """Mean ± standard deviation of shares, in percent; one value alone has no spread, and NaN entries are left out."""
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return _NOTHING
    if len(known) == 1:
        return f"{100 * known[0]:.2f} %"
    return f"{100 * known.mean():.2f} ± {100 * known.std(ddof=1):.2f} %"


def _of_the_best(config: Config, history: History, eval_rounds: np.ndarray) -> list[str]:
    """Test accuracy and round of the best models, and the rounds that were made, means over seeds."""
    found = early.course(config, history)
    if found is None:
        return []
    accuracy = np.take_along_axis(history["test/accuracy"], found.best[:, None], axis=1)[:, 0]
    rounds = [eval_rounds[found.best], early.rounds_of(found, eval_rounds)]
    stopped = f" ({found.stopped.sum()} of {_count(len(found.stopped), 'seed')} stopped)"
    return [mean_sd(accuracy), f"{rounds[0].mean():.0f}", f"{rounds[1].mean():.0f}{stopped}"]


def _last_round(histories: Mapping[str, History]) -> int:
    return max(history["round/loss"].shape[1] for history in histories.values())


def _mean_of_clients(values: np.ndarray) -> np.ndarray:
    """[S] of [S, N]: means over the clients that have a value; NaN where none has."""
    there = ~np.isnan(values)
    count = there.sum(axis=1)
    mean = np.where(there, values, 0).sum(axis=1) / np.maximum(count, 1)
    return np.asarray(np.where(count > 0, mean, np.nan))


def _extra_parts(experiment: Experiment) -> list[str]:
    return [part for part in ("validation", "new") if part in experiment.federation.parts]


def _missing(experiment: Experiment, histories: Mapping[str, History]) -> list[str]:
    """Sentences about what could not be measured."""
    lines = []
    for name, part in experiment.federation.parts.items():
        if name != "train" and not len(part.assignment.rows):
            whose = "None of the new clients" if name == "new" else "No client"
            what = "any examples" if name == "new" else f"{name} examples"
            lines.append(f"{whose} has {what}: the federation's {name} part is empty.")
    for name, history in histories.items():
        who = history["round/participants"]
        found = early.course(experiment.config, history)
        evals = evaluated_rounds(experiment.config.rounds, experiment.config.evaluation.eval_every)
        made = who.shape[1] if found is None else int(early.rounds_of(found, evals).max())
        rounds = int((who[:, :made].sum(axis=0) == 0).sum())
        if rounds == made:
            lines.append(
                f"No client took part in any round of {methods.paper_name(name)}: its model is the initial one."
            )
        elif rounds:
            lines.append(f"In {_count(rounds, 'round')} of {methods.paper_name(name)} no client took part.")
    return lines


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, index: int, label: str) -> None:
    there = np.isfinite(values).any(axis=0)
    x, values = x[: values.shape[1]][there], values[:, there]
    known = np.ma.masked_invalid(values)  # a seed may have a gap where others have none
    mean = known.mean(axis=0).filled(np.nan)
    look = figures.look(index)
    marker = "o" if len(x) == 1 else None  # a line through one point cannot be seen
    axis.plot(x, mean, linewidth=1.6, label=label, marker=marker, markersize=4, **look)
    if len(values) > 1:
        sd = known.std(axis=0, ddof=1).filled(0.0)
        axis.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.18, linewidth=0)


def _say(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#666666", fontsize=9)


def _title(experiment: Experiment) -> str:
    return f"{portrait.title(experiment.config, experiment.federation)}, {experiment.config.model}"


def _tested_on_own(experiment: Experiment) -> bool:
    """Whether clients are tested on examples of their own."""
    return "test" in experiment.federation.parts or experiment.dataset.is_sequence


def num_parameters(experiment: Experiment) -> int:
    """Parameters of the model."""
    shapes = jax.eval_shape(experiment.model.init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
