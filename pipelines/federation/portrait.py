"""A federation in words, tables and pictures, before anything is trained: federation.md and federation.png (and .pdf).

Letters: N clients, K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.common import figures, files
from pipelines.configuration.config import Config
from pipelines.federation import heterogeneity
from pipelines.federation.assignment import Assignment
from pipelines.federation.federations import PUBLIC, Federation, options

_SHOWN = 60  # clients that a bubble plot has room for
_SHOWN_CLASSES = 30


def write(
    out: Path, config: Config, federation: Federation, table: list[dict[str, Any]], warnings: Sequence[str]
) -> None:
    """Writes federation.md and federation.png into the directory `out`.

    Args:
      out: the directory, which exists.
      config: what the federation was built from.
      federation: the federation.
      table: from `comparison`.
      warnings: from `Federation.warnings`.
    """
    with figures.style():
        figures.write(out / "federation.png", figure(config, federation))
    files.write_text(out / "federation.md", text(config, federation, table, warnings))


def described(config: Config, federation: Federation) -> list[str]:
    """What a federation is, one line for each part of it."""
    dataset, sizes = federation.dataset, federation.sizes
    x = dataset.train["x"]
    own = ", ".join(f"{name} {getattr(config.federation, name):g}" for name in options(config.federation.partition))
    kind = "tokens" if dataset.is_sequence else "classes"
    lines = [
        f"data: {dataset.name}, {len(x):,} training and {len(dataset.test['y']):,} test examples, "
        f"{dataset.num_classes} {kind}, inputs {x.dtype}{list(dataset.input_shape)}",
        f"clients: {federation.num_clients:,} by {config.federation.partition}{f' ({own})' if own else ''}, with "
        f"{sizes.min():,} to {sizes.max():,} examples, median {np.median(sizes):g}",
    ]
    if config.federation.pool:
        lines.append("pool: the data set's own test examples are among those of the clients")
    if federation.domains:
        counted = {name: federation.domains.count(name) for name in dict.fromkeys(federation.domains)}
        listed = ", ".join(f"{name} ({number})" for name, number in counted.items())
        lines.append(f"domains, with the number of their clients: {listed}")
    if config.federation.imbalance > 1:
        lines.append(
            f"long tail: the first class has {config.federation.imbalance:g} times the examples of the last one"
        )
    if config.federation.feature_skew != "none":
        lines.append(f"feature skew: {config.federation.feature_skew}, severity {config.federation.severity:g}")
    for name, (source, assignment) in federation.parts.items():
        if name == "train":
            continue
        held = len(assignment.rows)
        if name == PUBLIC:
            lines.append(f"public: {held:,} examples of the training part, without labels, that the server holds")
            continue
        whose = "its own examples" if source == "train" else "the test part"
        if name == "new":
            lines.append(
                f"new clients: {assignment.num_clients:,} that take no part, with {held:,} examples of "
                f"{'the training part' if source == 'train' else whose}"
            )
        else:
            lines.append(f"{name} of each client: {held:,} examples in all, of {whose}")
    return lines


def text(config: Config, federation: Federation, table: list[dict[str, Any]], warnings: Sequence[str]) -> str:
    """The federation as Markdown."""
    lines = [
        f"# {title(config, federation)}",
        "",
        *[f"- {line}" for line in described(config, federation)],
        "",
        "![Labels by client and sizes](federation.png)",
        "",
        "## What would spoil a study",
        "",
        *([f"- {line}" for line in warnings] or ["Nothing was found."]),
        "",
        "## Heterogeneity",
        "",
        heterogeneity.to_markdown(table).rstrip(),
        "",
        "Sizes are numbers of training examples. Entropies and Jensen-Shannon divergences (JS, at most log 2 = 0.693) "
        "are in nats; TV is total variation. The Gini coefficient is 0 for equal sizes; effective clients are 1 / sum "
        "of squared shares.",
    ]
    return "\n".join(lines) + "\n"


def comparison(config: Config, federation: Federation, compared: Mapping[str, Assignment]) -> list[dict[str, Any]]:
    """The measures of a federation and of other partitions: a row for each measure, a column for each partition."""
    dataset = federation.dataset
    assignments = {config.federation.partition: federation.parts["train"].assignment, **compared}
    columns = heterogeneity.compare(assignments, dataset.train["y"], dataset.num_classes)
    names = [name for name in columns[0] if name != "partition"]
    return [{"measure": name, **{column["partition"]: column[name] for column in columns}} for name in names]


def figure(config: Config, federation: Federation) -> Figure:
    """Labels by client as bubbles, the histogram of sizes, and that of the clients' divergence from all examples."""
    dataset = federation.dataset
    counts = heterogeneity.label_counts(federation.parts["train"].assignment, dataset.train["y"], dataset.num_classes)
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    axes = drawn.subplot_mosaic([["bubbles", "sizes"], ["bubbles", "divergence"]], width_ratios=(2, 1))
    _bubbles(axes["bubbles"], counts, "token" if dataset.is_sequence else "class")
    _sizes(axes["sizes"], federation.sizes)
    _, divergence = heterogeneity.global_divergence(counts)
    axes["divergence"].hist(divergence, bins=30, range=(0, float(np.log(2))), color=figures.COLORS[1])
    axes["divergence"].set(
        title="Difference from all examples", xlabel="Jensen-Shannon divergence of the labels (nats)", ylabel="clients"
    )
    axes["divergence"].yaxis.set_major_locator(MaxNLocator(integer=True))
    figures.title(drawn, title(config, federation))
    return drawn


def title(config: Config, federation: Federation) -> str:
    """A federation in one line."""
    own = ", ".join(f"{name} {getattr(config.federation, name):g}" for name in options(config.federation.partition))
    skew = "" if config.federation.feature_skew == "none" else f", {config.federation.feature_skew}"
    return (
        f"{federation.dataset.name}, {federation.num_clients:,} clients by {config.federation.partition}"
        f"{f' ({own})' if own else ''}{skew}"
    )


def _bubbles(axis: Axes, counts: np.ndarray, noun: str) -> None:
    num_clients, num_classes = counts.shape
    # All clients where there is room; else some that are spread evenly over the sizes.
    shown = np.arange(num_clients)
    if num_clients > _SHOWN:
        by_size = np.argsort(counts.sum(axis=1), kind="stable")
        shown = by_size[np.linspace(0, num_clients - 1, _SHOWN).round().astype(int)]
    labels = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:_SHOWN_CLASSES])
    held = counts[np.ix_(shown, labels)]
    client, label = np.nonzero(held)
    area = held[client, label] / max(held.max(), 1)
    axis.scatter(client, label, s=180 * area + 1, color=figures.COLORS[0], alpha=0.75, linewidths=0)
    few = len(labels) <= 12
    ticks = np.arange(len(labels)) if few else np.arange(0, len(labels), 5)
    axis.set_yticks(ticks, [str(labels[i]) for i in ticks])
    some = f", {len(shown)} of {num_clients:,} clients by size" if num_clients > _SHOWN else ""
    most = f", the {len(labels)} most frequent of {num_classes}" if len(labels) < num_classes else ""
    clients = MaxNLocator("auto", integer=True).tick_values(0, max(len(shown) - 1, 1))
    axis.set_xticks([tick for tick in clients if 0 <= tick < len(shown)])  # there is no client -1
    axis.set(xlim=(-1, len(shown)), ylim=(-1, len(labels)))
    axis.set(title=f"Training examples by client and {noun}", xlabel=f"client{some}", ylabel=f"{noun}{most}")


def _sizes(axis: Axes, sizes: np.ndarray) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    logarithmic = low > 0 and high > 20 * low
    bins = (
        np.geomspace(low, high, 31) if logarithmic else np.linspace(low - 0.5, high + 0.5, min(30, high - low + 1) + 1)
    )
    axis.hist(sizes, bins=bins.tolist(), color=figures.COLORS[2])
    axis.axvline(float(sizes.mean()), color="#222222", linewidth=1, label=f"mean {sizes.mean():,.1f}")
    axis.axvline(
        float(np.median(sizes)), color="#222222", linewidth=1, linestyle=":", label=f"median {np.median(sizes):g}"
    )
    if logarithmic:
        axis.set_xscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="training examples of a client", ylabel="clients")
    figures.legend_above(axis, "Sizes")
