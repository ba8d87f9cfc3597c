"""Seconds to split a data set over clients, against shuffling its rows and sorting them by client with numpy.

    python benchmarks/partitioning.py [--clients 100 1000 10000] [--repeats 7]

60,000 labels of 10 classes, and 10,000,000 rows over 1,000,000 clients. Every split has to shuffle the rows and bring
them in the order of their clients; the yardstick does no more, with a permutation and a stable argsort of int64.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import _measure
from pipelines.federation import partition

YARDSTICK = "shuffle and sort"
OPTIONS = {
    "iid": {},
    "dirichlet": {"alpha": 0.3, "min_size": 5},
    "shards": {"shards_per_client": 2},
    "classes": {"classes_per_client": 2},
    "partial_classes": {"classes_per_client": 2, "alpha": 0.5},
    "lognormal": {"sigma": 1.0, "min_size": 2},
    "power_law": {"exponent": 1.0, "min_size": 2},
    "natural": {},
    "domains": {},
    "clusters": {"alpha": 0.5, "min_size": 1},
}


def shuffle_and_sort(total: int, num_clients: int) -> np.ndarray:
    owner = np.random.default_rng(0).permutation(total) * num_clients // total
    return np.argsort(owner, kind="stable")


def measure(names: list[str], total: int, num_clients: int, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(total, dtype=np.int32) % 10)
    # A tenth more groups than clients, so that there is a choice.
    groups = rng.integers(0, num_clients * 11 // 10, total)
    contenders = {YARDSTICK: partial(shuffle_and_sort, total, num_clients)}
    for name in names:
        split = partial(partition.PARTITIONS[name], groups if name == "natural" else labels, num_clients)
        contenders[name] = partial(_done, split, OPTIONS[name])
    times = _measure.take_turns(contenders, repeats)
    report = {name: {"options": OPTIONS.get(name, {}), **_measure.summary(seconds)} for name, seconds in times.items()}
    for row in report.values():
        row["times_the_yardstick"] = row["median_s"] / report[YARDSTICK]["median_s"]
    return {"examples": total, "clients": num_clients, "partitions": report}


def _done(split, options) -> np.ndarray:
    return split(**options).rows  # an array, which is what the timer waits for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", default="partitioning")
    args = parser.parse_args()
    result = {"machine": _measure.machine(), "workload": " ".join(__doc__.splitlines()[4:6]), "runs": []}
    workloads = [(list(OPTIONS), 60_000, clients) for clients in args.clients]
    workloads.append((["iid", "lognormal"], 10_000_000, 1_000_000))
    for names, total, clients in workloads:
        run = measure(names, total, clients, args.repeats)
        result["runs"].append(run)
        print(f"\n{total:,} examples into {clients:,} clients")
        for name, row in run["partitions"].items():
            print(
                f"  {name:16s} {row['median_s'] * 1e3:9.1f} ms [{row['q25_s'] * 1e3:.1f}, {row['q75_s'] * 1e3:.1f}]   "
                f"{row['times_the_yardstick']:.1f}x"
            )
    print(f"\nsaved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
