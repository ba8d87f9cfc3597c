"""Kills small runs again and again, lets each go on, and compares what comes of it with a run that was never killed.

    python -m benchmarks.kills                    # ten minutes
    python -m benchmarks.kills --seconds 60 --only train,continual

Every case is a command of `fedjax-core` that takes some seconds. It is run once untouched. Then it is started again and
again in another directory and killed (SIGKILL) at a moment that is random, from the start of the process to its usual
end, or aimed: just after something in its directory has changed, while it is writing. After a few kills it is let run
to its end, and its results, the files named in the case, are compared byte by byte.

What is counted: kills, kills that met the process while it wrote (something unfinished was left), checkpoints found
damaged, starts that failed, and runs whose results differ. The last three are to be 0.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--dataset iris --model logistic_regression --clients 6 --cohort-size 3 --min-size 2 --epochs 1 --seeds 2"

CASES: Mapping[str, tuple[str, Sequence[str]]] = {
    "train": (
        f"train {SMALL} --method scaffold --method fedadam --rounds 2000 --eval-every 5 --checkpoint-every 10",
        ("metrics.csv", "clients.csv", "curves.png"),
    ),
    "staged": (
        f"train {SMALL} --staged --method scaffold --rounds 300 --eval-every 5 --checkpoint-every 10",
        ("metrics.csv", "clients.csv", "curves.png"),
    ),
    "mesh": (
        f"train {SMALL} --mesh 2 --method scaffold --rounds 600 --eval-every 5 --checkpoint-every 10",
        ("metrics.csv", "clients.csv", "curves.png"),
    ),
    "continual": (
        "continual --dataset iris --tasks 3 --rounds 60 --clients 6 --cohort-size 3 --hidden 10 "
        "--method fot,ewc,fedavg --checkpoint-every 3",
        ("accuracy.csv", "accuracy.png"),
    ),
    "zeroth-order": (
        "zeroth-order synthetic --dim 8 --rounds 5 --steps 2 --seeds 4 --features 100 --neighbors 20 --capacity 100",
        ("curves.csv", "summary.md", "curves.png"),
    ),
}
"""Name to a command and the files of its directory that say what came of it."""


COLUMNS = (
    "runs",
    "kills",
    "random",
    "aimed",
    "met while writing",
    "damaged checkpoints",
    "failed starts",
    "mismatches",
)


def start(words: str, out: Path, cache: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if "--mesh 2" in words:
        environment["JAX_NUM_CPU_DEVICES"] = "2"
    elif "--mesh" not in words and words.startswith("train"):
        words += " --mesh 1"
    with (out.parent / f"{out.name}.log").open("wb") as log:
        command = [sys.executable, "-m", "pipelines", *words.split(), "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def seen(out: Path) -> tuple[int, ...]:
    """What changes when something is written below the directory."""
    found = []
    for folder, _, names in os.walk(out):
        for name in names:
            try:
                found.append(os.stat(Path(folder) / name).st_mtime_ns)
            except OSError:  # just renamed
                continue
    return len(found), max(found, default=0)


def kill(process: subprocess.Popen[bytes], out: Path, rng: random.Random, usual: float) -> str:
    """Kills a process at a random or an aimed moment; says which, or "ended" if it was too quick."""
    aimed = rng.random() < 0.6
    until = time.monotonic() + (rng.uniform(0, usual) if not aimed else usual)
    before = seen(out)
    changes = rng.randrange(1, 12)
    while time.monotonic() < until and process.poll() is None:
        if aimed and (now := seen(out)) != before:
            before, changes = now, changes - 1
            if changes <= 0:
                time.sleep(rng.uniform(0, 0.02))
                break
        time.sleep(0.0005 if aimed else 0.005)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return "ended" if ended else "aimed" if aimed else "random"


def run(names: Sequence[str], seconds: float, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Kills the cases in turn until the time is over; the counts of each."""
    rng = random.Random(seed)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    untouched: dict[str, tuple[float, list[bytes]]] = {}
    for name in names:
        words, files = CASES[name]
        for attempt in ("cold", "warm"):  # the second time it finds its programs compiled, as all that follow
            begin, out = time.monotonic(), folder / f"{name}-{attempt}"
            process = start(words, out, folder / "cache")
            if process.wait():
                raise SystemExit((folder / f"{out.name}.log").read_text())
            untouched[name] = time.monotonic() - begin, [(out / file).read_bytes() for file in files]
        print(f"{name}: untouched in {untouched[name][0]:.1f} s", flush=True)
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        name = names[number % len(names)]
        words, files = CASES[name]
        usual, wanted = untouched[name]
        out, count = folder / f"{name}-{number}", counts[name]
        number += 1
        for _ in range(rng.randrange(2, 8)):
            process = start(words, out, folder / "cache")
            how = kill(process, out, rng, usual)
            if how == "ended":
                if process.returncode:
                    count["failed starts"] += 1
                break
            count[how] += 1
            count["kills"] += 1
            count["met while writing"] += any(out.rglob("*unfinished*"))
        process = start(words, out, folder / "cache")
        count["runs"] += 1
        if process.wait():
            count["failed starts"] += 1
            print(f"{name}-{number - 1}: {(folder / f'{out.name}.log').read_text()}", flush=True)
        elif [(out / file).read_bytes() for file in files] != wanted:
            count["mismatches"] += 1
            print(f"{name}: {out} differs from {name}-warm", flush=True)
        said = (folder / f"{out.name}.log").read_text()
        count["damaged checkpoints"] += said.count("is damaged")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--out", type=Path, help="write the counts there, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(options.only.split(","), options.seconds, options.seed, Path(folder))
    total = sum(counts.values(), Counter())
    print(f"seed {options.seed}")
    for name, count in [*counts.items(), ("all", total)]:
        print(f"{name}: " + ", ".join(f"{column} {count[column]}" for column in COLUMNS))
    if options.out is not None:
        content = {
            name: {column: count[column] for column in COLUMNS} for name, count in [*counts.items(), ("all", total)]
        }
        options.out.write_text(json.dumps({"seed": options.seed, **content}, indent=2) + "\n")
    sys.exit(bool(total["failed starts"] or total["mismatches"]))


if __name__ == "__main__":
    main()
