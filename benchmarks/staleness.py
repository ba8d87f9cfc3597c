"""The best weight on stale updates, over differences in participation and in data.

    python benchmarks/staleness.py [--seeds 12]

The finding of the FedStale paper at small scale: the best beta falls when the clients' participation differs more, and
rises when their data differ more. Handwritten digits, divided at random among 8 clients. Data differ by swapped labels,
as in the authors' experiments: for a share of the examples, even clients swap the labels 0 and 1, odd clients 8 and 9.
Four clients take part often and four rarely, with the same mean, a half. A regularized logistic regression is trained
for 200 rounds of 3 steps; the measure is the global objective, all clients' examples with their labels, averaged over
the last 100 rounds. All betas, settings and seeds run in one compile.

How noisy the batches are decides where in [0, 1] the best betas lie, since a stale update helps as far as it resembles
a fresh one: batches of 30 spread them out, with 10 they are near 0 and with 60 near 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import Population, continue_rounds
from models import losses
from pipelines.data import datasets
from pipelines.federation import partition

CLIENTS = 8
ROUNDS = 200
SWAPS = (0.0, 0.5, 1.0)
RATES = ((0.5, 0.5), (0.75, 0.25), (0.9, 0.1), (0.95, 0.05))
BETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def swapped(labels: np.ndarray, owner: np.ndarray, share: float) -> np.ndarray:
    """The labels with a share of them swapped, by client."""
    chosen = np.random.default_rng(0).random(len(labels)) < share
    new = labels.copy()
    for parity, (a, b) in enumerate(((0, 1), (8, 9))):
        mine = chosen & (owner % 2 == parity)
        new[mine & (labels == a)], new[mine & (labels == b)] = b, a
    return new


def curves(seeds: int) -> np.ndarray:
    """Objective in the second half of the rounds, float[swaps, rates, betas, seeds]."""
    dataset = datasets.load("digits")
    model = models.logistic_regression((8, 8, 1), 10)
    cross_entropy = losses.cross_entropy(model)
    assignment = partition.iid(dataset.train["y"], CLIENTS)
    population = partition.federate(dataset, assignment)
    owner = np.repeat(np.arange(CLIENTS), np.asarray(population.sizes))
    labels = jnp.stack([swapped(np.asarray(population.examples["y"]), owner, share) for share in SWAPS])

    def loss_fn(params, batch, key):
        return cross_entropy(params, batch, key) + 0.01 * optax.tree.norm(params, squared=True)

    def objective(labels, rates, beta, key):
        clients = Population({**population.examples, "y": labels}, population.offsets)
        probabilities = jnp.repeat(rates, CLIENTS // 2)
        algorithm = algorithms.fedstale(
            loss_fn,
            optax.sgd(0.2),
            num_clients=CLIENTS,
            beta=beta,
            probabilities=probabilities,
            batch_size=30,
            num_steps=3,
        )

        def sampler(key, round):  # samplers.bernoulli with probabilities that a vmap can change
            draw = jax.random.uniform(jax.random.fold_in(key, round), (CLIENTS,))
            return jnp.where(draw < probabilities, jnp.arange(CLIENTS, dtype=jnp.int32), -1)

        one = continue_rounds(algorithm, sampler, 1)

        def body(state, _):
            state, _ = one(state, clients, key)
            return state, jnp.mean(loss_fn(algorithm.params(state), clients.examples, key))

        start = algorithm.init(model.init(jax.random.key(0)))
        return jnp.mean(jax.lax.scan(body, start, length=ROUNDS)[1][ROUNDS // 2 :])

    run = objective
    for argument in (3, 2, 1, 0):
        run = jax.vmap(run, tuple(0 if i == argument else None for i in range(4)))
    keys = jax.random.split(jax.random.key(1), seeds)
    return np.asarray(jax.jit(run)(labels, jnp.asarray(RATES), jnp.asarray(BETAS), keys))


def best(curve: np.ndarray) -> float:
    """Where a parabola through the lowest point of a curve over BETAS and its neighbors has its minimum."""
    low = int(np.clip(curve.argmin(), 1, len(BETAS) - 2))
    a, b, _ = np.polyfit(BETAS[low - 1 : low + 2], curve[low - 1 : low + 2], 2)
    return float(np.clip(-b / (2 * a), 0, 1)) if a > 0 else BETAS[int(curve.argmin())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    args = parser.parse_args()
    rows = []
    for share, of_share in zip(SWAPS, curves(args.seeds), strict=True):
        for rates, curve in zip(RATES, of_share, strict=True):
            # The seeds are the same for all betas, so differences between betas are known better than the levels.
            per_seed = [best(curve[:, seed]) for seed in range(args.seeds)]
            rows.append(
                {
                    "swapped labels": share,
                    "participation": rates,
                    "best beta": best(curve.mean(1)),
                    "best beta per seed, mean": float(np.mean(per_seed)),
                    "best beta per seed, standard deviation": float(np.std(per_seed, ddof=1)),
                    "objective": curve.mean(1).tolist(),
                }
            )
            print(
                f"swapped {share:.1f}  participation {rates}  best beta {rows[-1]['best beta']:.2f}  "
                f"over seeds {np.mean(per_seed):.2f} ± {np.std(per_seed, ddof=1):.2f}"
            )
    result = {"machine": _measure.machine(), "seeds": args.seeds, "betas": BETAS, "settings": rows}
    print(_measure.save("staleness", result))


if __name__ == "__main__":
    main()
