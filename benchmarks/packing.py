"""Packed lanes: the share of executed steps that is of use, and what packing costs.

    python benchmarks/packing.py [--repeats 41]

Log-normal sizes (mean 600, sigma 0.8), batches of 20, one epoch, 4 times as many clients as lanes. Useful share: real
steps over executed ones, against padding every client to the longest, and against the best there can be: no order ends
before the longest client alone, or before all steps divided by the lanes. Cost of packing: a round in lanes against a
bare `fori_loop` that executes as many steps in as many lanes, without queue, start or end of a client: one client a
lane, with its part of all examples, so that both read as much.
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

import models
from benchmarks import _measure
from fedjax_core import Plan, Population, local_descent, local_work, shuffle, value_and_grad
from fedjax_core.batching import draw_batch
from fedjax_core.clients import for_each_client
from models import losses

BATCH, PER_LANE = 20, 4
WORK = local_work(batch_size=BATCH, num_epochs=1)


def population_of(sizes: np.ndarray) -> Population:
    rng, total = np.random.default_rng(0), int(sizes.sum())
    examples = {"x": rng.random((total, 28, 28, 1), np.float32), "y": rng.integers(0, 10, total).astype(np.int32)}
    return Population.from_flat(examples, np.concatenate([[0], np.cumsum(sizes)]))


def packed(program, plan):
    @jax.jit
    def round_fn(params, cohort, key):
        results = for_each_client(program, params, cohort, key, work=WORK, plan=plan)
        return results.aggregate, results.executed_steps

    return round_fn


def bare(program, lanes, steps):
    """`steps` steps in each of the lanes, and nothing else."""

    @jax.jit
    def run(params, cohort, key):
        keys = jax.random.split(key, lanes)
        seeds = jax.vmap(shuffle.seed)(keys)
        size = cohort.examples["y"].shape[0] // lanes
        starts, sizes = size * jnp.arange(lanes, dtype=jnp.int32), jnp.full(lanes, size, jnp.int32)
        carry = jax.vmap(lambda key: program.init(params, (), key))(keys)

        def step(t, carry):
            def one(carry, start, size, seed, key):
                batch = draw_batch(WORK, cohort.examples, start, size, seed, key, t % (size // BATCH + 1))
                return program.step(params, carry, batch)[0]

            return jax.vmap(one)(carry, starts, sizes, seeds, keys)

        return jax.lax.fori_loop(0, steps, step, carry)

    return run


def useful_share(lanes: int, seeds: range) -> dict:
    """Of a queue in lanes, longest client first, and of padding, over federations of several seeds."""
    # The queue's own count: a model of one number makes the steps cheap.
    program = local_descent(optax.sgd(0.0), value_and_grad(lambda w, batch, key: w * batch["x"][:, 0, 0, 0]))
    shares, padding, best = [], [], []
    run, rows = packed(program, Plan(lanes=lanes)), 2000 * lanes * PER_LANE
    for seed in seeds:
        sizes = _measure.log_normal_sizes(np.random.default_rng(seed), lanes * PER_LANE)
        # One number of rows for all, a client beside the cohort has the rest, so that one program serves them.
        examples = {"x": np.zeros((rows, 1, 1, 1), np.float32)}
        population = Population.from_flat(examples, np.concatenate([[0], np.cumsum(sizes), [rows]]))
        cohort = population.cohort(np.arange(len(sizes)))
        _, executed = run(jnp.float32(0), cohort, jax.random.key(0))
        steps = -(-sizes // BATCH)
        shares.append(steps.sum() / int(executed))
        padding.append(steps.sum() / (len(steps) * steps.max()))
        best.append(steps.sum() / (lanes * max(steps.max(), -(-steps.sum() // lanes))))
    return {
        "median": float(np.median(shares)),
        "quartiles": np.percentile(shares, [25, 75]).tolist(),
        "best_possible_median": float(np.median(best)),
        "of_best_possible": {
            "lowest": float(np.min(np.divide(shares, best))),
            "median": float(np.median(np.divide(shares, best))),
        },
        "padded_median": float(np.median(padding)),
        "federations": len(shares),
    }


def cost(name: str, lanes: int, repeats: int) -> dict:
    """Seconds of a packed round and of the bare loop with as many steps."""
    shape = (28, 28, 1)
    model = models.logistic_regression(shape, 10) if name == "logistic" else models.mlp(shape, 10)
    program = local_descent(optax.sgd(0.05), value_and_grad(losses.cross_entropy(model)))
    population = population_of(_measure.log_normal_sizes(np.random.default_rng(0), lanes * PER_LANE))
    cohort, key = population.cohort(np.arange(population.num_clients)), jax.random.key(1)
    params = model.init(jax.random.key(0))
    queue = packed(program, Plan(lanes=lanes))
    executed = int(queue(params, cohort, key)[1])
    loop = bare(program, lanes, executed // lanes)
    jax.block_until_ready(loop(params, cohort, key))
    contenders = {"packed": partial(queue, params, cohort, key), "bare": partial(loop, params, cohort, key)}
    times = _measure.take_turns(contenders, repeats)
    rows = {label: _measure.summary(seconds) for label, seconds in times.items()}
    ratios = np.asarray(times["packed"]) / np.asarray(times["bare"]) - 1
    return rows | {"steps": executed, "cost_share": float(np.median(ratios))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--save", default="packing")
    args = parser.parse_args()
    result = {"machine": _measure.machine(), "useful": {}, "cost": {}}
    for lanes in (4, 8, 16):
        row = result["useful"][str(lanes)] = useful_share(lanes, range(args.seeds))
        print(
            f"{lanes:2d} lanes, {PER_LANE * lanes} clients, {row['federations']} federations: useful share "
            f"{row['median']:.3f}, best possible {row['best_possible_median']:.3f}, padded to the longest "
            f"{row['padded_median']:.3f}; of the best possible {row['of_best_possible']['median']:.3f}, at least "
            f"{row['of_best_possible']['lowest']:.3f}"
        )
    for name in ("logistic", "mlp"):
        row = result["cost"][name] = cost(name, 4, args.repeats)
        print(
            f"{name:8s} 4 lanes, {row['steps']} steps: {row['packed']['median_s'] * 1e3:.1f} ms packed, "
            f"{row['bare']['median_s'] * 1e3:.1f} ms bare: packing costs {100 * row['cost_share']:.1f} %"
        )
    print(f"saved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
