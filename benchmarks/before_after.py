"""The same benchmarks on two commits in turns: whether a change has cost run time, packing or compilation.

    python -m benchmarks.before_after 28e6f9c            # 10 minutes on two cores, of which it wants both

The commit is checked out beside this one and both are measured one after the other, again and again, each of them first
in every other turn, for machines are not the same from minute to minute. Of every median that the benchmarks report the
smallest of all turns counts, for others at work only add to it; ratios are after over before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _measure

ROOT = Path(__file__).resolve().parents[1]
NAME = "before_after_part"
METHODS = ("fedavg", "scaffold", "fednova", "fedprox", "mifa", "fedadam", "moon")
COMMANDS = {
    "dispatch": ("--rounds", "5000", "--repeats", "5"),
    "packing": (),
    "plans": ("--models", "logistic", "mlp", "--lanes", "1", "4", "--repeats", "5"),
    "compiling": ("--models", "mlp", "cnn", "transformer", "--methods", *METHODS, "--repeats", "3"),
}
"""Benchmark to its arguments, which both commits know."""


def measured(tree: Path) -> dict[str, float]:
    """Seconds, by what they are of, of each benchmark in a tree."""
    found: dict[str, float] = {}
    for name, arguments in COMMANDS.items():
        words = [sys.executable, f"benchmarks/{name}.py", *arguments, "--save", NAME]
        if name == "compiling" and "--only" in (tree / "benchmarks/compiling.py").read_text():
            words += ["--only", "models", "methods"]
        subprocess.run(words, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, capture_output=True)
        path = tree / "benchmarks/results" / f"{NAME}.json"
        found |= {f"{name} {key}": value for key, value in _medians(json.loads(path.read_text())).items()}
        path.unlink()
        path.with_suffix(".md").unlink(missing_ok=True)
    return found


def _medians(node: Any, path: str = "") -> dict[str, float]:
    """Every median in a result, by the keys that lead to it."""
    if not isinstance(node, dict):
        return {}
    own = {path: node["median_s"]} if "median_s" in node else {}
    inner = [_medians(value, f"{path}, {key}".removeprefix(", ")) for key, value in node.items()]
    return own | {key: value for each in inner for key, value in each.items()}


def compared(turns: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What is measured on both sides: the smallest of all turns before and after, and the ratios of single turns."""
    found = {}
    for key in turns[0]["before"].keys() & turns[0]["after"].keys():
        before, after = (np.array([turn[side][key] for turn in turns]) for side in ("before", "after"))
        found[key] = {
            "before_s": float(before.min()),
            "after_s": float(after.min()),
            "ratio": float(after.min() / before.min()),
            "smallest_in_a_turn": float((after / before).min()),
            "largest_in_a_turn": float((after / before).max()),
        }
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what is compared with")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", default="before_after", help="name of the results (before_after)")
    args = parser.parse_args()
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(other), args.commit], cwd=ROOT, check=True)
        try:
            for turn in range(args.turns):
                sides = {"before": other, "after": ROOT}
                order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
                turns.append({side: measured(sides[side]) for side in order})
                print(f"turn {turn + 1} of {args.turns} is done", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    result = compared(turns)
    for key, values in result.items():
        print(
            f"{key:45} {values['before_s']:10.4g} s {values['after_s']:10.4g} s   {values['ratio']:.2f} "
            f"[{values['smallest_in_a_turn']:.2f}, {values['largest_in_a_turn']:.2f}]"
        )
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    content = {
        "machine": _measure.machine(),
        "before": args.commit,
        "after": here.stdout.strip()[:7],
        "turns": args.turns,
        "seconds": result,
    }
    (_measure.RESULTS / f"{args.save}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
