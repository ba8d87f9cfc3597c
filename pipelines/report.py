"""What a run leaves behind: metrics.csv, clients.csv, curves.png, clients.png, summary.md.

Everything is written from the histories (`pipelines.history`), so a report can be made again from checkpoints alone.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedjax_core import spread
from pipelines import figures, files, methods, portrait
from pipelines.config import CLIENT_SETTINGS, Config
from pipelines.history import History, evaluated_rounds, mean_losses, to_csv
from pipelines.progress import duration, size
from pipelines.setup import ATTACK_STEPS, Experiment

_CLIENT_METRICS = ("loss", "accuracy", "train_loss", "train_accuracy")
_LINES = ("-", "--", ":")


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
    eval_rounds = evaluated_rounds(config.rounds, config.eval_every)
    sizes = experiment.federation.sizes
    files.write_text(out / "metrics.csv", to_csv(histories, experiment.seeds, eval_rounds))
    files.write_text(out / "clients.csv", clients_csv(histories, experiment.seeds, sizes))
    with figures.style():
        figures.write(out / "curves.png", curves(experiment, histories, eval_rounds))
        figures.write(out / "clients.png", client_histogram(experiment, histories))
    files.write_text(out / "summary.md", summary(out, experiment, histories, info, versions))


def clients_csv(histories: Mapping[str, History], seeds: list[int], sizes: np.ndarray) -> str:
    """How the final global model does for every client, one row per method, seed and client.

    loss and accuracy are held out (the test examples, weighted to the client's mix of labels); train_loss and
    train_accuracy are on the client's own training examples.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "client", "examples", *_CLIENT_METRICS])
    for method, history in histories.items():
        for s, seed in enumerate(seeds):
            for client, count in enumerate(sizes.tolist()):
                values = [str(history[f"client/{name}"][s, client]) for name in _CLIENT_METRICS]
                writer.writerow([method, seed, client, count, *values])
    return text.getvalue()


def curves(experiment: Experiment, histories: Mapping[str, History], eval_rounds: np.ndarray) -> Figure:
    """Test accuracy and training loss against rounds: lines are means over seeds, bands one standard deviation."""
    config = experiment.config
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (method, history) in enumerate(histories.items()):
        _band(left, eval_rounds, history["test/accuracy"], i, method)
        # A round's loss is that of a few clients; the mean since the last evaluation shows the course.
        _band(right, eval_rounds, mean_losses(history, eval_rounds), i, method)
    left.axhline(config.target, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
    left.annotate(
        f"target {100 * config.target:g} %",
        (0, config.target),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color="#666666",
        fontsize=8,
    )
    # Most of a curve is its beginning; what methods differ in is its end.
    finals = np.concatenate([h["test/accuracy"].mean(axis=0) for h in histories.values()])
    left.set_ylim(max(0.0, float(np.quantile(finals, 0.05)) - 0.05), min(1.0, max(finals.max(), config.target) + 0.02))
    left.set(title="Test accuracy", xlabel="round", xlim=(0, config.rounds))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(histories) <= 6:
        left.legend(loc="lower right")
        right.legend(loc="upper right")
    else:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    right.set(title="Training loss of the participants", xlabel="round", xlim=(0, config.rounds))
    if all((h["round/loss"] >= 0).all() for h in histories.values()):
        right.set_yscale("log")
    figure.suptitle(f"{_title(experiment)}; mean and standard deviation of {_count(config.seeds, 'seed')}", fontsize=9)
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
    lowest = min(v.min() for v in values.values())
    bins = np.linspace(min(math.floor(10 * lowest) / 10, 0.9), 1, 21)
    for i, (axis, (method, accuracy)) in enumerate(zip(axes, values.items(), strict=True)):
        axis.hist(
            accuracy,
            bins=bins,
            weights=np.full(accuracy.shape, 1 / config.seeds),
            color=figures.COLORS[i % len(figures.COLORS)],
        )
        tail = np.mean([worst_decile(row) for row in histories[method]["client/accuracy"]])
        axis.axvline(accuracy.mean(), color="#222222", linewidth=1, label=f"mean {100 * accuracy.mean():.1f} %")
        axis.axvline(tail, color="#222222", linewidth=1, linestyle=":", label=f"worst decile {100 * tail:.1f} %")
        axis.set(title=method)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="upper left", fontsize=8)
    for lowest_of_column in axes[-columns:]:
        lowest_of_column.tick_params(labelbottom=True)
    figure.supxlabel("accuracy of a client", fontsize=10)
    figure.supylabel("clients (mean over seeds)" if config.seeds > 1 else "clients", fontsize=10)
    own = (
        "each client's test examples" if _tested_on_own(experiment) else "test examples in each client's mix of labels"
    )
    figure.suptitle(f"{_title(experiment)}; final model on {own}", fontsize=9)
    return figure


def summary(
    out: Path,
    experiment: Experiment,
    histories: Mapping[str, History],
    info: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The run in words and one table, as Markdown."""
    config = experiment.config
    eval_rounds = evaluated_rounds(config.rounds, config.eval_every)
    extra = [part for part in ("validation", "new") if part in experiment.federation.parts]
    header = [
        "method",
        "test accuracy",
        *(["under attack"] if config.attack_radius else []),
        "worst decile of clients",
        *[f"{part} {'clients' if part == 'new' else 'part'}" for part in extra],
        f"rounds to {100 * config.target:g} %",
        "uploaded scalars",
        "downloaded scalars",
        "compile",
        "run",
        "memory",
    ]
    rows = []
    for name, history in histories.items():
        accuracy = history["test/accuracy"][:, -1].astype(np.float64)
        tails = np.asarray([worst_decile(row) for row in history["client/accuracy"]])
        spent = info[name]
        rows.append(
            [
                name,
                mean_sd(accuracy),
                *([mean_sd(history["test/robust_accuracy"][:, -1])] if config.attack_radius else []),
                mean_sd(tails),
                *[mean_sd(np.asarray(np.nanmean(history[f"{part}/accuracy"], axis=1))) for part in extra],
                rounds_to_target(history["test/accuracy"], eval_rounds, config.target),
                f"{transferred(history, 'uploaded'):,}",
                f"{transferred(history, 'downloaded'):,}",
                "in run" if config.staged else duration(spent["compile_seconds"]),
                duration(spent["run_seconds"]),
                size(spent["memory"]) if spent["memory"] else "unknown",
            ]
        )
    own = "its own test examples" if _tested_on_own(experiment) else "test examples weighted to its mix of labels"
    also = "".join(
        f"{part.capitalize()} accuracy is the mean over {whose}. "
        for part, whose in (("validation", "clients, on their own"), ("new", "clients that took no part in training"))
        if part in extra
    )
    under_attack = (
        f"Under attack: test accuracy where {ATTACK_STEPS} steps of projected gradient ascent on its loss have moved "
        f"every input by at most {config.attack_radius:g}. "
        if config.attack_radius
        else ""
    )
    table = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    settings = ["| " + " | ".join(cells) + " |" for cells in [["method", "settings"], ["---", "---"]]]
    settings += [f"| {name} | {settings_line(config, name)} |" for name in config.methods]
    lines = [
        f"# {_title(experiment)}",
        "",
        *table,
        "",
        f"Mean ± standard deviation over {_count(config.seeds, 'seed')}, which ran at once. Test accuracy and the "
        f"accuracy of clients are the final global model's; a client's accuracy is on {own}, and the worst decile is "
        f"the mean over the tenth of the clients that fare worst. {under_attack}{also}Scalars are summed over rounds "
        "and participants, as a mean over seeds. Memory is what the compiled program needs, data included.",
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
    params = sum(math.prod(leaf.shape) for leaf in _leaves(experiment))
    hidden = f" (hidden {', '.join(map(str, config.hidden))})" if config.model == "mlp" else ""
    work = f"{_count(config.steps, 'step')}" if config.steps is not None else _count(config.epochs, "epoch")
    seeds = ", ".join(map(str, experiment.seeds))
    return [
        *portrait.described(config, experiment.federation),
        f"model: {config.model}{hidden}, {params:,} parameters",
        f"cohort: {cohort(config, experiment.federation.num_clients)}"
        + (", staged from host memory" if config.staged else ""),
        f"local work: {work}, batches of {config.batch_size}, {config.client_optimizer}, "
        f"clients weighted {config.weights}",
        f"rounds: {config.rounds}, evaluated every {config.eval_every}, saved every {config.checkpoint_every}; "
        f"{_count(config.seeds, 'seed')} ({seeds}) at once" + (", double precision" if config.x64 else ""),
    ]


def cohort(config: Config, num_clients: int) -> str:
    """Who takes part, in words."""
    c = config
    turns = f"return with probability {c.turn_on:g}, leave with {c.turn_off:g}"
    words = {
        "full": f"all {num_clients} clients in every round",
        "bernoulli": f"each of {num_clients} clients with probability {c.participation:g} (bernoulli)",
        "periodic": f"each of {num_clients} clients in {c.participation:g} of every {c.period} rounds (periodic)",
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
    """Mean accuracy of the tenth of the clients that fare worst; NaN entries are left out."""
    return float(spread(jnp.asarray(accuracies)).worst_decile)


def rounds_to_target(accuracy: np.ndarray, eval_rounds: np.ndarray, target: float) -> str:
    """The first evaluated round at which each seed has reached the target, averaged; accuracy is [S, e]."""
    reached = accuracy >= target
    which = np.asarray(reached.any(axis=1))
    if not which.any():
        return "not reached"
    first = eval_rounds[np.argmax(reached[which], axis=1)]
    return f"{first.mean():.0f}" if which.all() else f"{first.mean():.0f} ({which.sum()} of {len(which)} seeds)"


def transferred(history: History, direction: str) -> int:
    """Scalars of all rounds and participants, exact, as a mean over seeds (rounded)."""
    each, who = history[f"round/{direction}"], history["round/participants"]
    totals = [sum(int(a) * int(b) for a, b in zip(*rows, strict=True)) for rows in zip(each, who, strict=True)]
    return round(sum(totals) / len(totals))


def mean_sd(values: np.ndarray) -> str:
    """Mean ± standard deviation of shares, in percent; one value alone has no spread."""
    if len(values) == 1:
        return f"{100 * values[0]:.2f} %"
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f} %"


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, index: int, label: str) -> None:
    color, line = figures.COLORS[index % len(figures.COLORS)], _LINES[index // len(figures.COLORS) % len(_LINES)]
    mean = values.mean(axis=0)
    axis.plot(x, mean, line, color=color, linewidth=1.6, label=label)
    if len(values) > 1:
        sd = values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)


def _title(experiment: Experiment) -> str:
    return f"{portrait.title(experiment.config, experiment.federation)}, {experiment.config.model}"


def _tested_on_own(experiment: Experiment) -> bool:
    """Whether clients are tested on examples of their own."""
    return "test" in experiment.federation.parts or experiment.dataset.is_sequence


def _leaves(experiment: Experiment) -> list[Any]:
    import jax

    return jax.tree.leaves(jax.eval_shape(experiment.model.init, jax.random.key(0)))


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
