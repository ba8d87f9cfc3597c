"""Seconds per round of each execution plan, against a plain Python loop over a jitted step.

    python benchmarks/plans.py [--models logistic mlp cnn] [--repeats 5]

Ten clients with log-normal sizes (mean 600, sigma 0.8), 28x28 inputs, batch 20, one epoch. The loop is what a
researcher writes first: one jitted step (native convolution for the CNN), clients one after another, batches
sliced from host memory, the average taken at the end.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import Plan, Population
from models import losses

BATCH = 20


def make_model(name: str):
    shape = (28, 28, 1)
    if name == "logistic":
        return models.logistic_regression(shape, 10)
    if name == "mlp":
        return models.mlp(shape, 10)
    return models.cnn(shape, 10)


def make_population(num_clients: int = 10) -> Population:
    rng = np.random.default_rng(0)
    sizes = _measure.log_normal_sizes(rng, num_clients)
    clients = [
        {"x": rng.random((n, 28, 28, 1), np.float32), "y": rng.integers(0, 10, n).astype(np.int32)} for n in sizes
    ]
    return Population.from_clients(clients)


def python_loop(model, population, lr: float):
    """The round as a plain loop: the baseline of the table."""
    loss_fn = losses.cross_entropy(model)
    optimizer = optax.sgd(lr)

    @jax.jit
    def step(params, opt_state, batch, mask, key):
        def mean(params):
            values = loss_fn(params, batch, key)
            return jnp.sum(values * mask) / jnp.sum(mask)

        grads = jax.grad(mean)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    clients = [jax.tree.map(np.asarray, population.client(i)) for i in range(population.num_clients)]
    key = jax.random.key(0)

    def round_fn(params):
        rng = np.random.default_rng(0)
        results = []
        for client in clients:
            n = len(client["y"])
            order = rng.permutation(n)
            local, opt_state = params, optimizer.init(params)
            for start in range(0, n, BATCH):
                index = order[start : start + BATCH]
                mask = np.arange(BATCH) < len(index)
                index = np.resize(index, BATCH)
                batch = {"x": client["x"][index], "y": client["y"][index]}
                local, opt_state = step(local, opt_state, batch, mask, key)
            results.append(local)
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *results)

    return round_fn


def measure(name: str, repeats: int, lanes: list[int]) -> dict:
    model = make_model(name)
    params = model.init(jax.random.key(0))
    population = make_population()
    ids = np.arange(population.num_clients)
    contenders, report = {}, {}
    loop = python_loop(make_model(name), population, 0.05)
    compile_s, _ = _measure.first_call(loop, params)
    contenders["python loop"] = partial(loop, params)
    report["python loop"] = {"first_call_s": compile_s}
    for count in lanes:
        fedavg = algorithms.fedavg(
            losses.cross_entropy(model), optax.sgd(0.05), batch_size=BATCH, plan=Plan(lanes=count)
        )
        round_fn = jax.jit(fedavg.round)
        state, cohort, key = fedavg.init(params), population.cohort(ids), jax.random.key(1)
        compile_s, _ = _measure.first_call(round_fn, state, cohort, key)
        label = f"{count} lane{'s' if count > 1 else ''}"
        contenders[label] = partial(round_fn, state, cohort, key)
        report[label] = {"first_call_s": compile_s}
    for label, times in _measure.take_turns(contenders, repeats).items():
        report[label] |= _measure.summary(times)
    base = report["python loop"]["median_s"]
    for row in report.values():
        row["speedup_over_python_loop"] = base / row["median_s"]
    steps = int(np.sum(-(-np.asarray(population.sizes) // BATCH)))
    return {"steps_per_round": steps, "plans": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["logistic", "mlp", "cnn"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 4, 10])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", default="plans")
    args = parser.parse_args()
    result = {"machine": _measure.machine(), "workload": __doc__.splitlines()[4], "models": {}}
    for name in args.models:
        result["models"][name] = measure(name, args.repeats, args.lanes)
        print(f"\n{name}: {result['models'][name]['steps_per_round']} steps a round")
        for label, row in result["models"][name]["plans"].items():
            print(
                f"  {label:12s} first call {row['first_call_s']:6.2f} s   round {row['median_s'] * 1e3:8.1f} ms "
                f"[{row['q25_s'] * 1e3:.1f}, {row['q75_s'] * 1e3:.1f}]   {row['speedup_over_python_loop']:.2f}x"
            )
    print(f"\nsaved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
