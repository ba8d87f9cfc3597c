"""The table, the goals and the plot of a run of the peers."""

import math
from pathlib import Path

import numpy as np

from benchmarks import _measure
from pipelines.common import figures

PICTURES = Path(__file__).resolve().parent.parent.parent / "docs" / "peers"

LABELS = {
    "torch": "PyTorch loop",
    "torch_graphs": "PyTorch, CUDA graphs",
    "pfl": "pfl",
    "flower": "Flower",
    "fedjax": "FedJAX",
    "naive": "naive JAX",
    "ours": "fedjax-core",
    "ours_one": "fedjax-core, one device",
}
TITLES = {
    "logistic": "logistic regression",
    "mlp": "MLP",
    "cnn": "CNN",
    "lstm": "LSTM",
    "resnet": "ResNet-18-GN",
    "transformer": "transformer",
    "pfl-cifar10": "pfl's CIFAR-10",
    "fl-simulator": "FL-Simulator's ResNet-18-GN",
    "gpt": "transformer of 110M",
}
MARKERS = "osP^Dvx"
OURS = ("ours", "ours_one")
OTHERS = ("torch", "pfl", "flower", "fedjax", "naive")

# How many times as fast as whom, on a CPU of two cores; the fastest of the named counts.
GOALS = {
    "logistic": [(3.0, "the fastest peer", OTHERS)],
    "mlp": [(2.0, "the fastest peer", OTHERS)],
    "cnn": [(1.3, "the fastest peer", OTHERS)],
    "lstm": [(1.2, "the fastest peer", OTHERS)],
    "resnet": [(1.0, "the fastest peer", OTHERS)],
    "transformer": [(1.2, "the fastest peer", OTHERS)],
    "pfl-cifar10": [(1.3, "the fastest peer", OTHERS)],
}


def peak(result: dict) -> float:
    """GFLOP/s of the fastest matrix product of any library in the run; not a number if none was measured."""
    every = [value for peaks in result["peaks"] for key in ("numpy", "jax", "torch") if (value := peaks[key])]
    return max(every, default=float("nan"))


def times_as_fast(cells: dict, peer: str, own: str = "ours") -> float | None:
    """Median over the rounds that both have done of the peer's seconds over ours; None if there are none."""
    theirs, ours = (cells.get(name, {}).get("seconds", []) for name in (peer, own))
    ratios = [a / b for a, b in zip(theirs, ours, strict=False)]
    return float(np.median(ratios)) if ratios else None


def disagreement(cells: dict, peer: str) -> float | None:
    """Largest relative difference from our own of how far an array of the model moves in the common round.

    Relative to a millionth of the whole model's way at least: the bias of an attention's keys moves by rounding alone.
    """
    theirs, ours = (cells.get(name, {}).get("check_moved") for name in (peer, "ours"))
    if not theirs or not ours:
        return None
    least = 1e-6 * np.linalg.norm(list(ours.values()))
    return max(abs(theirs[path] - moved) / max(moved, least) for path, moved in ours.items())


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def table(name: str, entry: dict, top: float) -> list[str]:
    """One workload as lines of Markdown."""
    settings, cells = entry["settings"], entry["cells"]
    sizes = f"log-normal, sigma {settings['sigma']}" if settings["sigma"] else "all alike"
    lines = [
        f"### {name}",
        "",
        f"{settings['cohort_size']} clients of {settings['num_clients']} a round, mean size {settings['mean_size']} "
        f"({sizes}), batch {settings['batch_size']}, {entry['parameters']:,} parameters, "
        f"{entry['flops_per_example'] / 1e6:,.2f} MFLOP an example.",
        "",
        "| | first round | later rounds: median [quartiles], count | a local step | useful steps | peak memory "
        "| GFLOP/s (share of peak) | differs by | fedjax-core is faster |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for peer, label in LABELS.items():
        cell = cells.get(peer)
        if cell is None:
            continue
        first = seconds(cell["first_round_s"]) if "first_round_s" in cell else "-"
        if "median_s" not in cell:
            lines.append(f"| {label} | {first} | {cell['error']} | | | | | | |")
            continue
        factor, differs = times_as_fast(cells, peer), disagreement(cells, peer)
        columns = [
            label,
            first,
            f"{seconds(cell['median_s'])} [{seconds(cell['q25_s'])}, {seconds(cell['q75_s'])}], {cell['repeats']}"
            + (f" ({cell['error']})" if cell["error"] else ""),
            seconds(float(np.median(np.divide(cell["seconds"], cell["steps"])))),
            f"{cell['useful_step_share']:.0%}",
            f"{cell['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in cell else "-",
            f"{cell['gflops']:,.0f}" + ("" if math.isnan(top) else f" ({cell['gflops'] / top:.0%})"),
            "-" if differs is None else f"{differs:.0e}",
            "" if peer in OURS or factor is None else f"{factor:.2f}x",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return [*lines, ""]


def goals(result: dict) -> list[str]:
    """What was hoped for, and what it is with all devices and with one, as lines of Markdown."""
    lines = [
        "### Goals on a CPU of two cores",
        "",
        f"| workload | goal | {' | '.join(LABELS[own] for own in OURS)} |",
        "| --- | --- | --- | --- |",
    ]
    for name, wanted in GOALS.items():
        cells = result["workloads"].get(name, {}).get("cells", {})
        for goal, whom, peers in wanted:
            columns = [verdict(cells, goal, peers, own) for own in OURS]
            lines.append(f"| {name} | {goal:g}x of {whom} | {' | '.join(columns)} |")
    return [*lines, ""]


def verdict(cells: dict, goal: float, peers: tuple[str, ...], own: str) -> str:
    """How many times as fast as the fastest of the peers, whether that is enough, and of whom there is no figure."""
    factors = {peer: times_as_fast(cells, peer, own) for peer in peers}
    found = {peer: factor for peer, factor in factors.items() if factor is not None}
    if not found:
        return "no figure"
    fastest = min(found, key=found.__getitem__)
    lacking = ", ".join(LABELS[peer] for peer in peers if peer not in found)
    judged = "reached" if found[fastest] >= goal else f"**falls short, {found[fastest] / goal:.2f} of the goal**"
    return f"{found[fastest]:.2f}x of {LABELS[fastest]}, {judged}" + (f"; no figure: {lacking}" if lacking else "")


def markdown(result: dict) -> str:
    machine, top = result["machine"], peak(result)
    fastest_each = [max(peaks[key] or 0 for key in ("numpy", "jax", "torch")) for peaks in result["peaks"]]
    lines = [f"{machine['device']}, {machine['cores']} cores, Python {machine['python']}, JAX {machine['jax']}."]
    if fastest_each:
        lines[0] += (
            f" Peak of float32 matrix products in this run: {top:.0f} GFLOP/s, at its slowest {min(fastest_each):.0f}."
        )
    lines.append("")
    for name, entry in result["workloads"].items():
        lines += table(name, entry, top)
    return "\n".join([*lines, *(goals(result) if machine["backend"] == "cpu" else [])])


def plot(result: dict, path: Path) -> None:
    """How many times as long as ours a round takes with each peer: a row for each workload, on one logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    every = {name: entry["cells"] for name, entry in result["workloads"].items()}
    rows = {name: cells for name, cells in every.items() if "seconds" in cells.get("ours", {})}
    peers = [peer for peer in LABELS if peer != "ours"]
    with figures.style():
        figure = Figure(figsize=(6, 1.2 + 0.72 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for row, cells in enumerate(rows.values()):
            if row % 2:
                axis.axhspan(row - 0.5, row + 0.5, color="0.96", linewidth=0)
            for place, peer in enumerate(peers):
                theirs = cells.get(peer, {}).get("seconds", [])
                ratios = np.array([a / b for a, b in zip(theirs, cells["ours"]["seconds"], strict=False)])
                if not len(ratios):
                    continue
                at = row + 0.8 * ((place + 0.5) / len(peers) - 0.5)
                low, middle, high = np.percentile(ratios, [25, 50, 75])
                color = figures.COLORS[place % len(figures.COLORS)]
                axis.plot([low, high], [at, at], color=color, linewidth=1.2)
                axis.plot(middle, at, MARKERS[place], color=color, markersize=6, label=LABELS[peer])
        axis.axvline(1, color="0.2", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylim(len(rows) - 0.5, -0.5)
        each = [f"{TITLES.get(name, name)}\n{seconds(cells['ours']['median_s'])}" for name, cells in rows.items()]
        axis.set_yticks(range(len(rows)), each)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("seconds of a round, fedjax-core = 1")
        figures.legend_below(figure, axis, columns=3)
    figures.write(path, figure)


def write(result: dict, name: str) -> None:
    """Prints the table, saves it beside the results, and draws the plot for the documentation."""
    text = markdown(result)
    print(f"\n{text}")
    (_measure.RESULTS / f"{name}.md").write_text(text)
    plot(result, PICTURES / f"{name}.png")
    print(f"\nsaved {_measure.RESULTS / name}.json, {_measure.RESULTS / name}.md and {PICTURES / name}.png")
