"""FOT and its baselines on Permuted-MNIST, beside the figures of the paper's table.

    python benchmarks/permuted_mnist.py --data-dir DIR [--predict 2] [--methods fot fedavg] [--partitions iid]

The setting of the authors' code: 10 tasks of 200 rounds, 125 clients of 480 examples of each task, 64 of them a round,
one epoch in batches of 64, SGD with rate 0.01 and weight decay 1e-5, a perceptron 784-400-400-400-10 with dropout of
0.2, 0.5 and 0.5 after its hidden layers, an even split or two shards of sorted labels for each client. `--predict N`
only times N rounds of this and says what all of them would take. A run that was stopped goes on when the same command
is given again; with all tasks and rounds it writes benchmarks/results/permuted_mnist.json.

Layers start as PyTorch's do. Published are accuracy and forgetting of FOT and FedAvg. What differs here: FOT looks at
the layers' inputs at the new global model without dropout, where the authors' code takes each client's own model with
the dropout before that layer's input. That code has a command with eps = 0.96 and one with 0.94; which of them is for
the even split is told otherwise by the words above them than by the option that they pass, so FOT runs with both there.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import _measure
from fedjax_core import Plan, client_mesh, continue_rounds, place, replicated, run_events, samplers, shardings
from pipelines.common import processes
from pipelines.common.progress import duration, plain
from pipelines.studies import continual
from pipelines.studies.continual_config import METHODS, Continual

# partition: method: (average accuracy, forgetting) in %
PUBLISHED = {
    "iid": {"fot": (90.35, 1.75), "fedavg": (85.68, 8.29)},
    "shards": {"fot": (85.21, 1.97), "fedavg": (80.06, 9.21)},
}
# Of FOT, each in a run directory of its own; the other methods are in the first.
ENERGIES = {"iid": (0.96, 0.94), "shards": (0.94,)}
# Weights of the penalties, not tuned to this problem.
PENALTIES = {"lam": 10.0, "mu": 0.1}
FULL = {"tasks": 10, "rounds": 200}


def configurations(partition: str, methods: tuple[str, ...], data_dir: str | None, **size: int) -> list[Continual]:
    """One for each eps."""
    energies = ENERGIES[partition] if "fot" in methods else ENERGIES[partition][:1]
    first = configuration(partition, methods, data_dir, energies[0], **size)
    return [first, *(replace(first, methods=("fot",), energy=energy) for energy in energies[1:])]


def configuration(
    partition: str, methods: tuple[str, ...], data_dir: str | None, energy: float, **size: int
) -> Continual:
    return Continual(
        scenario="permuted",
        dataset="mnist",
        data_dir=data_dir,
        clients=125,
        cohort_size=64,
        partition=partition,
        methods=methods,
        model="mlp",
        hidden=(400, 400, 400),
        dropout=(0.2, 0.5, 0.5),
        start="uniform",
        batch_size=64,
        client_lr=0.01,
        energy=energy,
        checkpoint_every=20,
        **PENALTIES,
        **size,
    )


def matmul_peak() -> float:
    """Multiplications and additions a second of large products of matrices, one on every device."""
    mesh = client_mesh()
    count, by_client = mesh.shape["clients"], PartitionSpec("clients")
    a = place(jnp.ones((count, 2048, 2048)), NamedSharding(mesh, by_client))
    product = jax.jit(lambda a: jax.shard_map(lambda a: a @ a, mesh=mesh, in_specs=by_client, out_specs=by_client)(a))
    jax.block_until_ready(product(a))
    times = _measure.take_turns({"product": lambda: product(a)}, 5)["product"]
    return count * 2 * 2048**3 / min(times)


def predict(config: Continual, rounds: int) -> None:
    """Times rounds of every method, and the end of a task, and says what the whole run would take."""
    tasks = continual.scenario(config)
    mesh = client_mesh()
    population = place(tasks.population(0), replicated(mesh))
    sampler = samplers.uniform(config.clients, config.cohort_size)
    # Forwards, and backwards to the weights of all layers and the inputs of all but the first.
    products = [784 * 400, 400 * 400, 400 * 400, 400 * 10]
    step_work = 2 * config.batch_size * (3 * sum(products) - products[0])
    steps = 8 * config.cohort_size
    for name in config.methods:
        method = continual.build(config, name, tasks, plan=Plan(mesh=mesh))
        state, key = method.init(tasks.model.init(jax.random.key(0))), jax.random.key(1)
        kept = shardings(state, mesh)
        state = place(state, kept)
        rounds_fn = jax.jit(continue_rounds(method, sampler, 1), out_shardings=(kept, replicated(mesh)))
        run = rounds_fn.lower(state, population, key).compile()
        seconds, peaks = [], []
        for _ in range(rounds):
            peaks.append(matmul_peak())
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(run(state, population, key))
            seconds.append(time.perf_counter() - begin)
        end = 0.0
        if method.events_at("task"):
            event = jax.device_put((state, population.cohort(sampler(key, 0)), key), jax.devices()[0])
            ending = partial(run_events, continual.build(config, name, tasks), "task")
            end_task = jax.jit(ending).lower(*event).compile()
            begin = time.perf_counter()
            jax.block_until_ready(end_task(*event))
            end = time.perf_counter() - begin
        best = min(seconds)
        share = step_work * steps / best / max(peaks)
        total = config.tasks * (config.rounds * best + end)
        print(
            f"{config.partition} {name}: {best:.3f} s a round (all: {', '.join(f'{s:.2f}' for s in seconds)}), "
            f"{1e3 * best / steps:.2f} ms a step, {100 * share:.0f} % of the {max(peaks) / 1e9:.0f} GFLOP/s of a large "
            f"matrix product, {end:.1f} s the end of a task: {duration(total)} for {config.tasks} x {config.rounds} "
            "rounds",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/permuted_mnist"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--partitions", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--predict", type=int, default=0, metavar="ROUNDS")
    for name, number in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    processes.cores_as_devices()
    size = {name: getattr(args, name) for name in FULL}
    rows = []
    configs = [c for p in args.partitions for c in configurations(p, tuple(args.methods), args.data_dir, **size)]
    for config in configs:
        if args.predict:
            predict(config, args.predict)
            continue
        out = args.out / f"{config.partition}-{config.energy:g}"
        continual.run(config, out, reporter=plain())
        for name, content in json.loads((out / "summary.json").read_text()).items():
            (summary,) = content["seeds"].values()
            row = {"partition": config.partition, "method": name}
            row |= {"energy": config.energy} if name == "fot" else {}
            told = f"{config.partition} {name}{f', eps {config.energy:g}' if name == 'fot' else ''}"
            if name in PUBLISHED[config.partition]:
                accuracy, forgetting = PUBLISHED[config.partition][name]
                row |= {"published average accuracy": accuracy / 100, "published forgetting": forgetting / 100}
                told += f" (published {accuracy}, {forgetting})"
            rows.append(row | summary)
            print(
                f"{told}: average accuracy {100 * summary['average accuracy']:.2f} %, forgetting "
                f"{100 * summary['forgetting']:.2f} %, {duration(summary['seconds'])}",
                flush=True,
            )
    result = {"machine": _measure.machine(), **size, **PENALTIES, "rows": rows}
    if rows and size == FULL:
        print(_measure.save("permuted_mnist", result))


if __name__ == "__main__":
    main()
