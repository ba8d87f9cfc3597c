"""What a run leaves behind: metrics.csv, clients.csv, summary.md, .html and .json, results.tex, and figures.

Everything is written from the histories (`pipelines.results.history`) and, but for the tables of clients, from what the
record of the run says of it (`pipelines.results.subject`), so that a report can be drawn again from these alone. There
is a report for every run that has ended: what was not measured, because no client took part or none has examples for
it, is said in words.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from pipelines.experiment import views
from pipelines.experiment.setup import ATTACK_STEPS, Experiment
from pipelines.results import early, latex, pages, personal
from pipelines.results.history import (
    History,
    column,
    evaluated_rounds,
    final_scores,
    mean_losses,
    of_view,
    to_csv,
    total_bytes,
    views_of,
)
from pipelines.results.subject import Subject, counted, of_experiment

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
    shown = {name: early.reported(config, history, eval_rounds) for name, history in histories.items()}
    files.write_text(out / "clients.csv", clients_csv(shown, experiment.seeds, sizes, experiment.federation.domains))
    if config.evaluation.clients_over_time:
        files.write(out / "clients.parquet", partial(clients_parquet, experiment, shown))
    draw(out, out, of_experiment(experiment), histories, info, versions)


def draw(
    out: Path,
    run: Path,
    subject: Subject,
    histories: Mapping[str, History],
    info: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> list[str]:
    """Writes all of the report but the tables of rounds and clients, also of a run that has not ended.

    Args:
      out: where to.
      run: the run directory, for the command that repeats the run.
      subject: what was run.
      histories: as for `write`; each has been evaluated at least once.
      info: as for `write`.
      versions: as for `write`.

    Returns:
      The names of the files.
    """
    config = subject.config
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    histories = {name: early.reported(config, history, eval_rounds) for name, history in histories.items()}
    files.write_text(out / "results.tex", results_tex(subject, histories))
    numbers = summary_json(subject, histories)
    files.write_text(out / "summary.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    ended = {name: history for name, history in histories.items() if views_of(history, "client")}
    with figures.style():
        drawn = {"curves.png": curves(subject, histories, eval_rounds)}
        drawn |= {"clients.png": client_histogram(subject, ended)} if ended else {}
        pages.write(out, summary(run, subject, histories, info, versions), drawn)
    return ["summary.md", ".html and .json", "results.tex", f"{' and '.join(f[:-4] for f in drawn)} as .png and .pdf"]


def clients_csv(
    histories: Mapping[str, History], seeds: list[int], sizes: np.ndarray, domains: Sequence[str] = ()
) -> str:
    """How the final models do for every client, one row per method, seed and client, and per view if there are several.

    loss and accuracy are held out: of the global model on the test examples, weighted to the client's mix of labels,
    and of a view in which clients differ on the client's own; train_loss and train_accuracy are on the client's own
    training examples. In a run that validates, best_... is of its best model. There is a column domain where clients
    come from domains.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with_best = any(name.startswith("best/client/") for history in histories.values() for name in history)
    in_views = _in_views(histories)
    of_domains = ["domain"] if domains else []
    heads = ["method", "seed", *(["view"] if in_views else []), "client", *of_domains, "examples", *_CLIENT_METRICS]
    writer.writerow([*heads, *(f"best_{name}" for name in _CLIENT_METRICS if with_best)])
    for method, history in histories.items():
        for s, seed in enumerate(seeds):
            for view in views_of(history, "client"):
                columns = [of_view("client", view, name) for name in _CLIENT_METRICS]
                columns += [of_view("best/client", view, name) for name in _CLIENT_METRICS if with_best]
                for client, count in enumerate(sizes.tolist()):
                    values = [str(history[name][s, client]) if name in history else "" for name in columns]
                    whose = [client, *([domains[client]] if domains else [])]
                    writer.writerow([method, seed, *([view] if in_views else []), *whose, count, *values])
    return text.getvalue()


def _in_views(histories: Mapping[str, History]) -> bool:
    """Whether other views than the global one are reported."""
    return any(_views(history) != [views.GLOBAL] for history in histories.values())


def _views(history: History) -> list[str]:
    """Those in which clients were tested; of a method that has not ended those that are evaluated."""
    return views_of(history, "client") or views_of(history)


def main_view(subject: Subject, name: str, history: History) -> str:
    """The view that stands for a method."""
    main, there = subject.main[name], views_of(history)
    return main if main in there or not there else there[0]


def part_of_clients(experiment: Experiment) -> str:
    """The part of the federation on which clients are followed: "test" where they have one of their own, or "train"."""
    return "test" if "test" in experiment.federation.parts else "train"


def clients_parquet(experiment: Experiment, histories: Mapping[str, History], path: Path) -> None:
    """Writes how the models did for every client at every evaluation: a row per method, seed, round and client.

    If other views than the global one are evaluated, there is a column view, and a row for each of them. loss and
    accuracy are means over the client's own examples of the part that the column says, as many as the column examples
    says; NaN for a client without any. A seed that stopped early has rows up to there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config, part = experiment.config, part_of_clients(experiment)
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    # (method, view) to (its part of the federation, how many examples of it clients hold)
    parts: dict[tuple[str, str], tuple[str, np.ndarray]] = {}
    for method, history in histories.items():
        for view in views_of(history, "each"):
            if view == views.GLOBAL and views.has_one_global(experiment.algorithms[method]):
                parts[method, view] = part, experiment.federation.parts[part].assignment.sizes
            else:
                parts[method, view] = "test", views.own_tests(config, experiment.federation).assignment.sizes
    in_views = any(view != views.GLOBAL for _, view in parts)
    counts = [("seed", pa.int64()), ("round", pa.int64()), ("client", pa.int64()), ("examples", pa.int64())]
    method, view = next(iter(parts))
    kind = pa.from_numpy_dtype(histories[method][of_view("each", view, "loss")].dtype)
    measured = [("loss", kind), ("accuracy", kind)]
    of_views = [("view", pa.string())] if in_views else []
    schema = pa.schema([("method", pa.string()), *of_views, *counts, ("part", pa.string()), *measured])
    with pq.ParquetWriter(path, schema) as writer:
        for (method, view), (part, sizes) in parts.items():
            history, clients = histories[method], len(sizes)
            values = {name: history[of_view("each", view, name)].astype(kind.to_pandas_dtype()) for name, _ in measured}
            found = early.course(config, history)
            for s, seed in enumerate(experiment.seeds):
                evaluations = values["loss"].shape[1] if found is None else int(found.ends[s])
                rows = evaluations * clients
                columns = {
                    "method": pa.repeat(pa.scalar(method), rows),
                    **({"view": pa.repeat(pa.scalar(view), rows)} if in_views else {}),
                    "seed": pa.repeat(pa.scalar(seed, pa.int64()), rows),
                    "round": np.repeat(eval_rounds[:evaluations].astype(np.int64), clients),
                    "client": np.tile(np.arange(clients, dtype=np.int64), evaluations),
                    "examples": np.tile(sizes.astype(np.int64), evaluations),
                    "part": pa.repeat(pa.scalar(part), rows),
                    **{name: each[s, :evaluations].reshape(-1) for name, each in values.items()},
                }
                writer.write_table(pa.table(columns, schema=schema))


def curves(subject: Subject, histories: Mapping[str, History], eval_rounds: np.ndarray) -> Figure:
    """Test accuracy and training loss against rounds: lines are means over seeds, bands one standard deviation."""
    config = subject.config
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, accuracies = {}, {}
    for i, (method, history) in enumerate(histories.items()):
        accuracies[method] = history[of_view("test", main_view(subject, method, history), "accuracy")]
        band(left, eval_rounds, accuracies[method], i, _label(subject, method, history))
        # A round's loss is that of a few clients; the mean since the last evaluation shows the course.
        losses[method] = mean_losses(history, eval_rounds[: accuracies[method].shape[1]])
        if (found := early.course(config, history)) is not None:
            losses[method] = early.hold(losses[method], found.ends)
        band(right, eval_rounds, losses[method], i, methods.paper_name(method))
    accuracy_axis(left, list(accuracies.values()), config.report.target)
    for axis in (left, right):
        axis.set(xlabel="round", xlim=(0, _last_round(histories)))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    right.set(title="Training loss of the participants")
    seen = np.concatenate([loss[np.isfinite(loss)] for loss in losses.values()])
    if not len(seen):
        _say(right, "no client took part in any round")
    elif seen.min() >= 0 and seen.max() > 0:
        right.set_yscale("log")
    figures.legend_below(figure, left, right)
    figures.title(figure, f"{subject.title}; mean and standard deviation of {counted(config.seeds, 'seed')}")
    return figure


def accuracy_axis(axis: Axes, accuracies: Sequence[np.ndarray], target: float) -> None:
    """Limits, labels and the target of an axis that shows accuracies, float[S, e] each."""
    # Most of a curve is its beginning; what methods differ in is its end.
    finals = np.concatenate([each.mean(axis=0) for each in accuracies])
    finals = finals[np.isfinite(finals)]
    low = max(0.0, float(np.quantile(finals, 0.05)) - 0.05) if len(finals) else 0.0
    axis.set_ylim(low, min(1.0, max(finals.max(initial=0.0), target) + 0.02))
    if target >= low:
        style: dict[str, Any] = {"color": "#888888", "linewidth": 0.8, "linestyle": (0, (4, 3))}
        axis.axhline(target, label=f"target {100 * target:g} %", **style)
    axis.set(title="Test accuracy")
    axis.yaxis.set_major_formatter(figures.Percent())


def client_histogram(subject: Subject, histories: Mapping[str, History]) -> Figure:
    """How the accuracy of the final models is spread over clients: one histogram per method, all seeds."""
    config = subject.config
    columns = min(len(histories), 4)
    rows = -(-len(histories) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 5), 0.4 + 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.reshape(-1)[: len(histories)])
    for unused in grid.reshape(-1)[len(histories) :]:
        unused.remove()
    of_clients = {m: h[of_view("client", main_view(subject, m, h), "accuracy")] for m, h in histories.items()}
    values = {m: accuracy[~np.isnan(accuracy)] for m, accuracy in of_clients.items()}
    lowest = min((float(v.min()) for v in values.values() if len(v)), default=0.0)
    bins = np.linspace(min(math.floor(10 * lowest) / 10, 0.9), 1, 21)
    for i, (axis, (method, accuracy)) in enumerate(zip(axes, values.items(), strict=True)):
        axis.set_xlim(bins[0], bins[-1])
        axis.xaxis.set_major_formatter(figures.Percent())
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if not len(accuracy):
            axis.set(title=_label(subject, method, histories[method]))
            _say(axis, "no client has examples to be tested on")
            continue
        axis.hist(
            accuracy,
            bins=bins.tolist(),
            weights=np.full(accuracy.shape, 1 / config.seeds),
            color=figures.COLORS[i % len(figures.COLORS)],
        )
        tail = np.nanmean([worst_decile(row) for row in of_clients[method]])
        axis.axvline(accuracy.mean(), color="#222222", linewidth=1, label="mean")
        axis.axvline(tail, color="#222222", linewidth=1, linestyle=":", label="mean of the worst tenth")
        axis.set_title(
            f"{_label(subject, method, histories[method])}\n"
            f"mean {100 * accuracy.mean():.1f} %, worst tenth {100 * tail:.1f} %",
            fontsize=9,
        )
    for lowest_of_column in axes[-columns:]:
        lowest_of_column.tick_params(labelbottom=True)
        lowest_of_column.set_xlabel("accuracy of a client")
    figure.supylabel("clients (mean over seeds)" if config.seeds > 1 else "clients", fontsize=10)
    figures.legend_below(figure, *axes)
    own = "each client's test examples" if subject.tested_on_own else "test examples in each client's mix of labels"
    figures.title(figure, f"{subject.title}; final model on {own}")
    return figure


def results_tex(subject: Subject, histories: Mapping[str, History]) -> str:
    """The table of results in LaTeX, without what depends on the machine."""
    header, rows = results(subject, histories)
    over = f"{counted(subject.config.seeds, 'seed')}"
    comment = f"{subject.title}\nmean and standard deviation over {over}; made by fedjax-core"
    return latex.table(header, rows, comment)


def results(subject: Subject, histories: Mapping[str, History]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results, without what depends on the machine.

    A row for each method, or for each of its views, the main one first, where other views than the global one are
    evaluated.
    """
    config, in_views = subject.config, _in_views(histories)
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    extra, radius = _extra_parts(subject), config.evaluation.attack_radius
    header = [
        "method",
        *(["view"] if in_views else []),
        "test accuracy",
        *(["of the best model", "its round", "rounds"] if config.evaluation.validates else []),
        *(["under attack"] if radius else []),
        *(["mean of clients", "s.d. of clients"] if in_views else []),
        "worst decile of clients",
        *[personal.WORDS[each] for each in personal.references(subject, histories)],
        *[f"{part} {'clients' if part == 'new' else 'part'}" for part in extra],
        f"rounds to {100 * config.report.target:g} %",
        "sent up",
        "sent down",
    ]
    rows = []
    for name, view in rows_of(subject, histories):
        history, beside = histories[name], personal.others(subject, histories, name, view)
        curve = history[of_view("test", view, "accuracy")]
        ended = of_view("client", view, "accuracy") in history
        of_clients = history[of_view("client", view, "accuracy")].astype(np.float64) if ended else np.zeros((0, 0))
        tails = np.asarray([worst_decile(row) for row in of_clients])
        over_clients = [_mean_of_clients(of_clients), _sd_of_clients(of_clients)] if in_views else []
        attacked = of_view("test", view, "robust_accuracy")
        of_parts = [of_view(part, view, "accuracy") for part in extra]
        rows.append(
            [
                methods.paper_name(name),
                *([view] if in_views else []),
                mean_sd(final_scores(history, view, "accuracy").astype(np.float64)),
                *_of_the_best(config, history, eval_rounds, curve),
                *([_if_there(attacked in history and history[attacked][:, -1])] if radius else []),
                *[_if_there(ended and values) for values in (*over_clients, tails)],
                *["" if each is None else personal.shown(each) for each in beside.values()],
                *[_if_there(part in history and _mean_of_clients(history[part])) for part in of_parts],
                rounds_to_target(curve, eval_rounds, config.report.target),
                size(transferred(history, "bytes_up")),
                size(transferred(history, "bytes_down")),
            ]
        )
    return header, rows


def summary_json(subject: Subject, histories: Mapping[str, History]) -> dict[str, Any]:
    """What every method has come to, as JSON values: means over seeds, and those of each seed under "seeds".

    Names are those of the columns of metrics.csv: the last test scores of every view ("test_accuracy",
    "test_personal_accuracy"), mean, deviation and worst decile over the clients of each view ("client_accuracy",
    "client_accuracy_sd", "client_accuracy_worst_decile") and the mean of each domain ("client_accuracy_of_rotated"),
    how many are better or worse off than alone and than with FedAvg ("client_personal_better_than_alone"),
    "rounds_to_target", and the bytes of all rounds and participants ("bytes_up_total"). A number that there is not is
    None, and so is its mean.
    """
    config = subject.config
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    found = {}
    for name, history in histories.items():
        of_seeds: dict[str, list[float | None]] = {}
        for view in views_of(history):
            prefix = of_view("test", view, "")
            metrics = [key.removeprefix(prefix) for key in history if key.startswith(prefix)]
            for metric in (each for each in metrics if "/" not in each):
                scores = final_scores(history, view, metric)
                of_seeds[column(of_view("test", view, metric))] = [_known(value) for value in scores]
            if (clients := of_view("client", view, "accuracy")) in history:
                of_clients = history[clients].astype(np.float64)
                over = {"": _mean_of_clients(of_clients), "_sd": _sd_of_clients(of_clients)}
                over["_worst_decile"] = np.asarray([worst_decile(row) for row in of_clients])
                for end, values in over.items():
                    of_seeds[column(f"{clients}{end}")] = [_known(value) for value in values]
                for domain, values in personal.by_domain(subject, of_clients).items():
                    of_seeds[f"{column(clients)}_of_{domain}"] = [_known(value) for value in values]
            for other, beside in personal.others(subject, histories, name, view).items():
                for word in ("better", "worse") if beside is not None else ():
                    key = column(of_view("client", view, f"{word}_than_{personal.NAMES[other]}"))
                    counts = getattr(beside, word).tolist()
                    of_seeds[key] = [*map(float, counts), *[None] * (len(history["round/loss"]) - len(counts))]
        curve = history[of_view("test", main_view(subject, name, history), "accuracy")]
        reached = curve >= config.report.target
        of_seeds["rounds_to_target"] = [
            float(eval_rounds[np.argmax(row)]) if row.any() else None for row in np.asarray(reached)
        ]
        sent = ("round/bytes_up", "round/bytes_down", "round/participants")
        one_seed = [{key: history[key][s : s + 1] for key in sent} for s in range(len(curve))]
        for direction in ("bytes_up", "bytes_down"):
            of_seeds[f"{direction}_total"] = [float(transferred(each, direction)) for each in one_seed]
        means = {
            key: None if any(value is None for value in values) else float(np.mean(values))  # type: ignore[arg-type]
            for key, values in of_seeds.items()
        }
        seeds = {
            str(seed): {key: values[s] for key, values in of_seeds.items()}
            for s, seed in enumerate(subject.seeds[: len(curve)])
        }
        found[name] = {**means, "seeds": seeds}
    return found


def _known(value: Any) -> float | None:
    """The number, or None if it is none that JSON has."""
    return float(value) if np.isfinite(value) else None


def rows_of(subject: Subject, histories: Mapping[str, History]) -> list[tuple[str, str]]:
    """(method, view) of every row of the table of results."""
    rows = []
    for name, history in histories.items():
        main, there = main_view(subject, name, history), _views(history)
        rows += [(name, view) for view in sorted(there, key=lambda view: view != main)]
    return rows


def summary(
    out: Path,
    subject: Subject,
    histories: Mapping[str, History],
    info: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The run in words and one table, as Markdown."""
    config = subject.config
    extra = _extra_parts(subject)
    header, rows = results(subject, histories)
    header += ["compile", "run", "memory"]
    for row, (name, _) in zip(rows, rows_of(subject, histories), strict=True):
        spent = info[name]
        row += [
            "in run" if config.machine.staged else duration(spent["compile_seconds"]),
            duration(spent["run_seconds"]),
            size(spent["memory"]) if spent["memory"] else "unknown",
        ]
    own = "its own test examples" if subject.tested_on_own else "test examples weighted to its mix of labels"
    of_views = subject.about_views if _in_views(histories) else ""
    ended = _about_ends(subject, histories)
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
    missing = "".join(f" {line}" for line in _missing(subject, histories))
    ended_ones = any(views_of(history, "client") for history in histories.values())
    pictures = ["![Histogram of the accuracy of clients](clients.png)", ""] if ended_ones else []
    unfinished = _unfinished(subject, histories)
    lines = [
        f"# {subject.title}",
        "",
        *([f"**This run has not ended.** {' '.join(unfinished)}", ""] if unfinished else []),
        *table,
        "",
        f"Mean ± standard deviation over {counted(config.seeds, 'seed')}, which ran at once. Test accuracy and the "
        f"accuracy of clients are the final global model's; a client's accuracy is on {own}, and the worst decile is "
        f"the mean over the tenth of the clients that fare worst. {of_views}{ended}{validated}{under_attack}{also}"
        f"{_about_others(subject, histories)}"
        "Bytes are summed over rounds and participants, as a mean over seeds. Memory is what the compiled program "
        f"needs, data included.{missing}",
        "",
        *_domain_table(subject, histories),
        "![Test accuracy and training loss against rounds](curves.png)",
        "",
        *pictures,
        "## Settings",
        "",
        *[f"- {line}" for line in subject.lines],
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


def _about_others(subject: Subject, histories: Mapping[str, History]) -> str:
    """What being better off means, in words."""
    than = {personal.ALONE: "the model that it has trained alone", personal.FEDAVG: "FedAvg's"}
    beside = [than[each] for each in personal.references(subject, histories)]
    if not beside:
        return ""
    return (
        f"A client is better off than with another model, {' or '.join(beside)}, if its accuracy on its own test "
        "examples is higher; the table has how many are, of those that are tested. "
    )


def _domain_table(subject: Subject, histories: Mapping[str, History]) -> list[str]:
    """Lines with the accuracy of the clients of each domain; none where clients do not come from domains."""
    names, in_views = list(dict.fromkeys(subject.domains)), _in_views(histories)
    rows = []
    for name, view in rows_of(subject, histories) if names else ():
        history, metric = histories[name], of_view("client", view, "accuracy")
        if metric in history:
            found = personal.by_domain(subject, history[metric])
            rows.append([methods.paper_name(name), *([view] if in_views else []), *map(mean_sd, found.values())])
    if not rows:
        return []
    header = ["method", *(["view"] if in_views else []), *names]
    table = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return ["Accuracy of the clients of each domain:", "", *table, ""]


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


def _of_the_best(config: Config, history: History, eval_rounds: np.ndarray, curve: np.ndarray) -> list[str]:
    """Of float[S, e] test accuracy and round of the best models, and the rounds that were made, means over seeds."""
    found = early.course(config, history)
    if found is None:
        return []
    accuracy = np.take_along_axis(curve, found.best[:, None], axis=1)[:, 0]
    rounds = [eval_rounds[found.best], early.rounds_of(found, eval_rounds)]
    stopped = f" ({found.stopped.sum()} of {counted(len(found.stopped), 'seed')} stopped)"
    return [mean_sd(accuracy), f"{rounds[0].mean():.0f}", f"{rounds[1].mean():.0f}{stopped}"]


def _last_round(histories: Mapping[str, History]) -> int:
    return max(history["round/loss"].shape[1] for history in histories.values())


def _mean_of_clients(values: np.ndarray) -> np.ndarray:
    """[S] of [S, N]: means over the clients that have a value; NaN where none has."""
    there = ~np.isnan(values)
    count = there.sum(axis=1)
    mean = np.where(there, values, 0).sum(axis=1) / np.maximum(count, 1)
    return np.asarray(np.where(count > 0, mean, np.nan))


def _sd_of_clients(values: np.ndarray) -> np.ndarray:
    """[S] of [S, N]: standard deviations over the clients that have a value; NaN where none has."""
    mean = _mean_of_clients(values)
    return np.asarray(np.sqrt(_mean_of_clients(np.square(values - mean[:, None]))))


def _if_there(values: Any) -> str:
    """`mean_sd`, or nothing where there is False in the place of values."""
    return "" if values is False else mean_sd(values)


def _label(subject: Subject, name: str, history: History) -> str:
    """A method's name in figures, with the view that is shown unless that is the global one."""
    view = main_view(subject, name, history)
    return methods.paper_name(name) + ("" if view == views.GLOBAL else f" ({view})")


def _extra_parts(subject: Subject) -> list[str]:
    return [part for part in ("validation", "new") if part in subject.parts]


def _about_ends(subject: Subject, histories: Mapping[str, History]) -> str:
    """What is told of methods that do something after the last round, in words."""
    names = [methods.paper_name(name) for name in histories if name in subject.ending]
    if not names:
        return ""
    return (
        f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} something after the last round: final numbers are "
        "of what has come of it, the curves and metrics.csv of the rounds. "
    )


def _missing(subject: Subject, histories: Mapping[str, History]) -> list[str]:
    """Sentences about what could not be measured."""
    lines = []
    for name, held in subject.parts.items():
        if name != "train" and not held:
            whose = "None of the new clients" if name == "new" else "No client"
            what = "any examples" if name == "new" else f"{name} examples"
            lines.append(f"{whose} has {what}: the federation's {name} part is empty.")
    for name, history in histories.items():
        who = history["round/participants"]
        found = early.course(subject.config, history)
        evals = evaluated_rounds(subject.config.rounds, subject.config.evaluation.eval_every)
        made = who.shape[1] if found is None else int(early.rounds_of(found, evals).max())
        rounds = int((who[:, :made].sum(axis=0) == 0).sum())
        if rounds == made:
            lines.append(
                f"No client took part in any round of {methods.paper_name(name)}: its model is the initial one."
            )
        elif rounds:
            lines.append(f"In {counted(rounds, 'round')} of {methods.paper_name(name)} no client took part.")
    return lines


def _unfinished(subject: Subject, histories: Mapping[str, History]) -> list[str]:
    """Sentences about what is still to be run."""
    config, lines = subject.config, []
    for name in config.methods:
        shown = methods.paper_name(name)
        if name not in histories:
            lines.append(f"{shown} has not been evaluated yet.")
            continue
        seeds, done = histories[name]["round/loss"].shape
        found = early.course(config, histories[name])
        if seeds < config.seeds:
            lines.append(f"{shown} has been run with {seeds} of {counted(config.seeds, 'seed')}.")
        if done < config.rounds and not (found is not None and found.stopped.all()):
            lines.append(f"{shown} has come to round {done} of {config.rounds}.")
    return lines


def band(axis: Axes, x: np.ndarray, values: np.ndarray, index: int, label: str) -> None:
    """Draws means over seeds as a line and one standard deviation as a band.

    Args:
      axis: where to.
      x: float[e] or longer.
      values: float[S, e]; what is not finite is left out.
      index: number of the line, which gives its look.
      label: its name.
    """
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


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
