"""Rounds a second of a long run at the usual cadence of evaluations and checkpoints, from its beginning to its end.

    python -m benchmarks.saving                 # 12,000 rounds of a tiny model, five seeds
    python -m benchmarks.saving --rounds 3000

A save writes what is new and nothing else, so that the last thousand rounds are to take as long as the first.
"""

import argparse
import tempfile
import time
from pathlib import Path

from pipelines.common import progress
from pipelines.configuration.config import Config
from pipelines.run.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12_000)
    parser.add_argument("--every", type=int, default=1000, help="rounds of a line")
    options = parser.parse_args()
    config = Config(
        dataset="iris",
        model="logistic_regression",
        clients=6,
        cohort_size=3,
        min_size=2,
        methods=("fedavg",),
        epochs=1,
        rounds=options.rounds,
    )
    last: list[float] = [0, time.monotonic(), time.process_time()]

    def update(p: progress.Progression) -> None:
        if p.round % options.every == 0:
            now, busy = time.monotonic(), time.process_time()
            speed = (p.round - last[0]) / (now - last[1])
            shown = f"{speed:.0f} rounds/s, {busy - last[2]:.1f} s of processor time"
            print(f"rounds {last[0]} to {p.round}: {shown}; it says {p.text()}", flush=True)
            last[:] = p.round, now, busy

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", reporter=progress.silent()._replace(update=update))


if __name__ == "__main__":
    main()
