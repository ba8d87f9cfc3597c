"""Where FedAvg stalls and FedAvg-M does not: the mean squared gradient against rounds and against heterogeneity.

    python benchmarks/momentum_floor.py

Quadratics of 10 clients in 10 dimensions whose minimizers differ by `spread`, with gradient noise; everyone takes part
in every round, ten local steps at a constant learning rate. The model starts at the same distance from the optimum
whatever the heterogeneity, and both methods take the same server step gamma, so that they differ in the momentum only.
FedAvg-M's beta and gamma are those of its theory for a horizon of R rounds, beta = c / sqrt(R), gamma = beta / (6 L),
which promises a mean of ||grad f(x_r)||^2 over the rounds r < R of order R^(-1/2), whatever the heterogeneity.

Printed: that mean for horizons R, its slope in R and in the heterogeneity (logarithms of both), fitted for every seed.
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
from fedjax_core import Plan, Population, continue_rounds, samplers

CLIENTS, DIM, EXAMPLES, STEPS = 10, 10, 16, 10
LR = 0.05
SMOOTHNESS = 2.0
BETA = 4.0  # beta = BETA / sqrt(R)
NOISE = 1.0
DISTANCE = 3.0  # from the first model to the optimum
HORIZONS = (100, 200, 400, 800, 1600, 3200)
SPREADS = (8.0, 16.0, 32.0)
CHUNK = 100  # rounds in one compiled call


def problems(seeds: int, spread: float):
    """Populations, optima, mean Hessians and first models, stacked over seeds (in float32)."""
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.normal(size=(CLIENTS, DIM, DIM)))[0]
        a = q @ (rng.uniform(0.2, SMOOTHNESS, (CLIENTS, DIM, 1)) * q.transpose(0, 2, 1))
        b = spread * rng.normal(size=(CLIENTS, DIM))
        noise = NOISE * rng.normal(size=(CLIENTS, EXAMPLES, DIM))
        points = b[:, None] + noise - noise.mean(1, keepdims=True)
        population = Population.from_clients(
            [{"a": np.repeat(a[i : i + 1], EXAMPLES, 0), "b": points[i]} for i in range(CLIENTS)]
        )
        optimum = np.linalg.solve(a.sum(0), np.einsum("nij,nj->i", a, b))
        away = rng.normal(size=DIM)
        rows.append((population, optimum, a.mean(0), optimum + DISTANCE * away / np.linalg.norm(away)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def loss(params, batch, key):
    d = params - batch["b"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", d, batch["a"], d)


def method(name, beta, gamma):
    settings = {"beta": beta} if name == "fedavg_m" else {}
    return getattr(algorithms, name)(
        loss,
        optax.sgd(LR),
        server_lr=gamma / (LR * STEPS),
        batch_size=1,
        num_steps=STEPS,
        order="replacement",
        plan=Plan(lanes=CLIENTS),
        **settings,
    )


@partial(jax.jit, static_argnums=0)
def chunk(name, states, problem, beta, gamma, keys):
    """CHUNK rounds for every seed: the states and ||grad f||^2 before every round, [seeds, CHUNK]."""

    def one_seed(state, problem, key):
        population, optimum, hessian, _ = problem
        algorithm = method(name, beta, gamma)
        one = continue_rounds(algorithm, samplers.full(CLIENTS), 1)

        def body(state, _):
            gradient = hessian @ (algorithm.params(state) - optimum)
            return one(state, population, key)[0], jnp.sum(gradient**2)

        return jax.lax.scan(body, state, length=CHUNK)

    return jax.vmap(one_seed)(states, problem, keys)


def mean_square(name, seeds, rounds, spread):
    """Mean over the rounds of ||grad f(x_r)||^2, for every seed."""
    beta = BETA / np.sqrt(rounds)
    gamma = beta / (6 * SMOOTHNESS)
    problem = problems(seeds, spread)
    states = jax.vmap(method(name, beta, gamma).init)(problem[3])
    keys = jax.random.split(jax.random.key(0), seeds)
    total = 0.0
    for _ in range(rounds // CHUNK):
        states, squares = chunk(name, states, problem, jnp.float32(beta), jnp.float32(gamma), keys)
        total = total + np.asarray(squares, np.float64).sum(1)
    return total / rounds


def slopes(values, at):
    """Slope of log(values) [points, seeds] in log(at) [points], for every seed."""
    return np.polyfit(np.log(at), np.log(values), 1)[0]


def main() -> None:
    """Measures and prints the means and their slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    result: dict = {
        "machine": _measure.machine(),
        "seeds": seeds,
        "horizons": HORIZONS,
        "spreads": SPREADS,
        "methods": {},
    }
    for name in ("fedavg", "fedavg_m"):
        over_rounds = np.array([mean_square(name, seeds, rounds, SPREADS[-1]) for rounds in HORIZONS])
        longest = [mean_square(name, seeds, HORIZONS[-1], spread) for spread in SPREADS[:-1]]
        over_spreads = np.array([*longest, over_rounds[-1]])
        in_rounds, in_spread = slopes(over_rounds, HORIZONS), slopes(over_spreads, SPREADS)
        result["methods"][name] = {
            "over_horizons_at_the_largest_spread": over_rounds.tolist(),
            "over_spreads_at_the_longest_horizon": over_spreads.tolist(),
            "slope_in_rounds": in_rounds.tolist(),
            "slope_in_spread": in_spread.tolist(),
        }
        for at, values in ((HORIZONS, over_rounds), (SPREADS, over_spreads)):
            print(f"{name:9s}", "  ".join(f"{a:g}: {v:.3g}" for a, v in zip(at, values.mean(1), strict=True)))
        for title, slope in (("rounds", in_rounds), ("spread", in_spread)):
            print(f"{name:9s} slope in {title} {slope.mean():6.2f} ± {slope.std(ddof=1):.2f}", flush=True)
    print(_measure.save("momentum_floor", result))


if __name__ == "__main__":
    main()
