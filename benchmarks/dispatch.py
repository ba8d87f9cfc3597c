"""Rounds a second of a tiny model: all rounds in one compiled call, against a Python loop of compiled rounds.

    python benchmarks/dispatch.py [--rounds 20000] [--repeats 7]

A quadratic in 10 dimensions, 10 of 100 clients a round, one local step: the work is next to nothing, what is left is
what a round costs beside its work. The loop is what a researcher writes first: `jax.jit(fedavg.round)`, the cohort
drawn by NumPy, `population.cohort(ids)`, no waiting before the end.
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
from benchmarks import _measure
from fedjax_core import Population, samplers, simulate

CLIENTS, COHORT, DIM = 100, 10, 10


def quadratic(params, batch, key):
    return 0.5 * jnp.sum(jnp.square(params - batch["center"]), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", default="dispatch")
    args = parser.parse_args()
    result = {"machine": _measure.machine(), "rounds": args.rounds}
    centers = np.random.default_rng(0).normal(size=(CLIENTS, DIM)).astype(np.float32)
    population = Population.from_flat({"center": centers}, np.arange(CLIENTS + 1))
    fedavg = algorithms.fedavg(quadratic, optax.sgd(0.1), batch_size=1, num_steps=1)
    params, key = jnp.zeros(DIM), jax.random.key(0)
    together = jax.jit(simulate(fedavg, samplers.uniform(CLIENTS, COHORT), args.rounds))
    round_fn = jax.jit(fedavg.round)

    def loop(rounds):
        rng, state = np.random.default_rng(0), fedavg.init(params)
        for t in range(rounds):
            cohort = population.cohort(rng.choice(CLIENTS, COHORT, replace=False))
            state, _ = round_fn(state, cohort, jax.random.fold_in(key, t))
        return state

    result["compile_s"] = {
        "one call": _measure.first_call(together, params, population, key)[0],
        "loop": _measure.first_call(loop, 1)[0],
    }
    few = max(args.rounds // 100, 1)
    contenders = {"one call": partial(together, params, population, key), "loop": partial(loop, few)}
    times = _measure.take_turns(contenders, args.repeats)
    for name, rounds in (("one call", args.rounds), ("loop", few)):
        result[name] = _measure.summary([seconds / rounds for seconds in times[name]])
        median = result[name]["median_s"]
        print(f"{name:9s} {1 / median:10,.0f} rounds/s, {median * 1e6:9.1f} us a round")
    result["ratio"] = result["loop"]["median_s"] / result["one call"]["median_s"]
    print(f"one call is {result['ratio']:.0f} times as fast")
    print(f"saved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
