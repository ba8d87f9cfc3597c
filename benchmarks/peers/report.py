"""The table, the goals and the plot of a run of the peers."""

import numpy as np

from benchmarks import _measure

LABELS = {
    "torch": "PyTorch loop",
    "pfl": "pfl",
    "flower": "Flower",
    "fedjax": "FedJAX",
    "naive": "naive JAX",
    "ours": "fedjax-core",
    "ours_one": "fedjax-core, one device",
}
OURS = ("ours", "ours_one")
FRAMEWORKS = ("pfl", "flower", "fedjax")
OTHERS = ("torch", *FRAMEWORKS, "naive")

# How many times as fast as whom, on a CPU of two cores; the fastest of the named counts.
GOALS = {
    "logistic": [(3.0, "the fastest peer", OTHERS)],
    "mlp": [(2.0, "the fastest peer", OTHERS)],
    "cnn": [(1.0, "PyTorch", ("torch",)), (2.0, "every framework", FRAMEWORKS)],
    "lstm": [(2.0, "the fastest peer", OTHERS)],
    "transformer": [(2.0, "the fastest peer", OTHERS)],
}


def peak(result: dict) -> float:
    """GFLOP/s of the fastest matrix product of any library in the run."""
    return max(value for peaks in result["peaks"] for key in ("numpy", "jax", "torch") if (value := peaks[key]))


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
            f"{cell['gflops']:.3g} ({cell['gflops'] / top:.0%})",
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
            lines.append(f"| {name} | {goal:.0f}x of {whom} | {' | '.join(columns)} |")
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
    lines = [
        f"{machine['device']}, {machine['cores']} cores, Python {machine['python']}, JAX {machine['jax']}. "
        f"Peak of float32 matrix products in this run: {top:.0f} GFLOP/s, at its slowest {min(fastest_each):.0f}.",
        "",
    ]
    for name, entry in result["workloads"].items():
        lines += table(name, entry, top)
    return "\n".join([*lines, *goals(result)])


def plot(result: dict, path) -> None:
    """Seconds of a local step of each peer, a row for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pipelines.common import figures

    names = list(result["workloads"])
    figure, axes = plt.subplots(1, len(names), figsize=(2.3 * len(names) + 1.5, 2.9), sharey=True, squeeze=False)
    peers = list(LABELS)[::-1]
    for ax, name in zip(axes[0], names, strict=True):
        cells = result["workloads"][name]["cells"]
        for place, peer in enumerate(peers):
            cell = cells.get(peer, {})
            if "seconds" not in cell:
                ax.text(
                    0.03, place, "no figure", va="center", fontsize=7, color="0.5", transform=ax.get_yaxis_transform()
                )
                continue
            low, middle, high = np.percentile(np.divide(cell["seconds"], cell["steps"]) * 1e3, [25, 50, 75])
            ax.barh(place, middle, color="tab:blue" if peer in OURS else "0.75")
            ax.plot([low, high], [place, place], color="0.2", linewidth=1.2)
            ax.text(middle, place, f" {middle:.3g}", va="center", fontsize=7)
        ax.set_xlim(0, ax.get_xlim()[1] * 1.3)  # room for the numbers
        ax.xaxis.set_major_locator(plt.MaxNLocator(3))
        ax.set_ylim(-0.6, len(peers) - 0.4)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(peers)), [LABELS[peer] for peer in peers])
    figure.supxlabel("milliseconds a local step", fontsize=8)
    figure.tight_layout()
    figures.write(path, figure)
    plt.close(figure)


def write(result: dict, name: str) -> None:
    """Prints the table, and saves it and the plot beside the results."""
    text = markdown(result)
    print(f"\n{text}")
    (_measure.RESULTS / f"{name}.md").write_text(text)
    plot(result, _measure.RESULTS / f"{name}.png")
    print("\nsaved " + ", ".join(str(_measure.RESULTS / f"{name}.{kind}") for kind in ("json", "md", "png")))
