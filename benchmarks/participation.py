"""Where methods converge to when clients take part unequally often, under three patterns of participation.

    python benchmarks/participation.py [--rounds 2000]

The quadratics of benchmarks/claims.py, 20 clients and a problem per seed, with participation that depends on the data:
the further out a client's minimizer lies in one direction, the more often it takes part, from 5 to 100 % of the rounds.
The clients come and go independently (bernoulli), stay on or off for a while (markov) or in a fixed rhythm (periodic).
One local step, so that nothing else keeps a method from the optimum. Reported are the distance of the mean model of
the second half of the rounds from the optimum (where it converges to) and the mean distance of the models from
that mean (how much it moves), over seeds.
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
from benchmarks import _measure, claims
from fedjax_core import Population, continue_rounds, samplers

CLIENTS = 20
RATES = np.arange(1, CLIENTS + 1) / CLIENTS

PATTERNS = {
    "bernoulli": samplers.bernoulli(RATES),
    "markov": samplers.markov(0.05, 0.05 * (1 / RATES - 1)),  # the paper's chain: each rate is its client's share
    "periodic": samplers.periodic(RATES, CLIENTS),
}
METHODS = {
    "FedAvg over participants": ("fedavg", {}),
    "FedAvg over all": ("fedavg_ipw", {}),
    "known probabilities": ("fedavg_ipw", {"probabilities": RATES}),
    "FedAU": ("fedau", {"num_clients": CLIENTS, "cutoff": 50}),
    "FedStale, estimated": ("fedstale", {"num_clients": CLIENTS, "probabilities": "estimated"}),
    "MIFA": ("mifa", {"num_clients": CLIENTS}),
}


def problems():
    """Populations whose clients are sorted by the first coordinate of their minimizers, and optima, over seeds."""
    populations, optima = claims.quadratics()
    order = jnp.argsort(populations.examples["b"][:, :, 0], axis=1)
    examples = jax.tree.map(jax.vmap(lambda leaf, order: leaf[order]), populations.examples, {"a": order, "b": order})
    return Population(examples, populations.offsets), optima


def measure(name: str, settings: dict, sampler: samplers.Sampler, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """(distance of the mean model from the optimum, mean distance from the mean model), float[SEEDS] each."""
    algorithm = getattr(algorithms, name)(claims.quadratic_loss, optax.sgd(0.02), batch_size=1, num_steps=1, **settings)
    one = continue_rounds(algorithm, sampler, 1)

    def body(population, key, state):
        state, _ = one(state, population, key)
        return state, algorithm.params(state)

    def distances(population, optimum, key):
        start = algorithm.init(jnp.zeros(10))
        _, models = jax.lax.scan(lambda state, _: body(population, key, state), start, length=rounds)
        models = models[rounds // 2 :]
        mean = models.mean(0)
        return jnp.linalg.norm(mean - optimum), jnp.linalg.norm(models - mean, axis=1).mean()

    keys = jax.random.split(jax.random.key(0), claims.SEEDS)
    return tuple(np.asarray(d) for d in jax.jit(jax.vmap(distances))(*problems(), keys))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    rows = []
    for pattern, sampler in PATTERNS.items():
        for label, (name, settings) in METHODS.items():
            away, moving = measure(name, settings, sampler, args.rounds)
            rows.append(
                {
                    "pattern": pattern,
                    "method": label,
                    "distance of the mean model": away.tolist(),
                    "distance from the mean model": moving.tolist(),
                }
            )
            print(
                f"{pattern:10s} {label:25s} from the optimum {away.mean():7.4f} ± {away.std(ddof=1):6.4f}   "
                f"moving {moving.mean():7.4f} ± {moving.std(ddof=1):6.4f}",
                flush=True,
            )
    result = {"machine": _measure.machine(), "seeds": claims.SEEDS, "rounds": args.rounds, "rows": rows}
    print(_measure.save("participation", result))


if __name__ == "__main__":
    main()
