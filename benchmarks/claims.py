"""What each method's paper claims, at small scale, with the spread over seeds.

    python benchmarks/claims.py [--only fedexp scaffold]

Every claim compares a method with its natural baseline on the same problems, seeds and number of rounds. On digits both
sides choose their client and server learning rates from one grid on twenty seeds and are compared on twenty others;
all rates and seeds run in one compile. The table goes to benchmarks/results/claims.json;
`pytest -m slow tests/algorithms/test_claims.py` checks it.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import Population, continue_rounds, evaluate, samplers
from models import losses, metrics
from pipelines import data, partition

SEEDS = 20
RATES = (0.03, 0.1, 0.3, 1.0)  # client learning rates tried on digits
FACTORS = (0.3, 1.0, 3.0)  # times the server learning rate, tried with each of them


class Claim(NamedTuple):
    """One comparison; values are float[SEEDS]."""

    text: str
    measure: str
    lower_is_better: bool
    method: np.ndarray
    baseline: np.ndarray

    @property
    def holds(self) -> bool:
        """The mean difference over seeds is at least two of its standard errors in the method's favor."""
        gain = np.asarray(self.baseline - self.method, float) * (1 if self.lower_is_better else -1)
        return bool(gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)))


# Heterogeneous quadratics: 20 clients, 10 dimensions, a problem per seed.


@cache
def quadratics(heterogeneity: float = 3.0, rank: int = 10):
    """Populations and optima stacked over seeds; below full rank all clients share a minimizer (interpolation)."""
    populations, optima = [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        rotations = np.linalg.qr(rng.normal(size=(20, 10, 10)))[0]
        a = rotations @ (rng.uniform(0.2, 2.0, (20, 10, 1)) * rotations.transpose(0, 2, 1))
        b = rng.normal(size=(20, 10)) * heterogeneity
        if rank < 10:
            a = rotations[:, :, :rank] @ (rng.uniform(0.2, 2.0, (20, rank, 1)) * rotations[:, :, :rank].swapaxes(1, 2))
            b[:] = b[0]
        populations.append(Population.from_clients([{"a": a[i : i + 1], "b": b[i : i + 1]} for i in range(20)]))
        optima.append(np.linalg.solve(a.sum(0), np.einsum("nij,nj->i", a, b)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *populations), jnp.asarray(np.stack(optima))


def quadratic_loss(params, batch, key):
    d = params - batch["b"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", d, batch["a"], d)


def distance(name, rounds=200, cohort=10, lr=0.1, heterogeneity=3.0, rank=10, **settings):
    """Distance to the optimum after the rounds, for every seed."""
    populations, optima = quadratics(heterogeneity, rank)
    settings = {"batch_size": 1} | settings
    if name in ("scaffold", "feddyn"):
        settings["num_clients"] = 20
    algorithm = getattr(algorithms, name)(quadratic_loss, optax.sgd(lr), **settings)
    run = continue_rounds(algorithm, samplers.uniform(20, cohort), rounds)

    def final(population, optimum, key):
        state, _ = run(algorithm.init(jnp.zeros(10)), population, key)
        return jnp.linalg.norm(algorithm.params(state) - optimum)

    return np.asarray(jax.jit(jax.vmap(final))(populations, optima, jax.random.split(jax.random.key(0), SEEDS)))


# Handwritten digits: 50 clients by Dirichlet(0.1), 5 a round.


@cache
def digits():
    dataset = data.load("digits")
    assignment = partition.dirichlet(dataset.train["y"], 50, alpha=0.1, min_size=2)
    model = models.mlp((8, 8, 1), 10, hidden=(50,))
    return partition.federate(dataset, assignment), dataset, model


def accuracy_curve(make, rounds=60, cohort=5, factors=FACTORS):
    """Test accuracy after every round and the final global models, for every choice of rates and 2 SEEDS seeds.

    Returns:
      accuracy float[choices, 2 SEEDS, rounds], and params with leaves [choices, 2 SEEDS, ...].
    """
    population, dataset, model = digits()
    test = jax.tree.map(jnp.asarray, dict(dataset.test))
    metric_fn = metrics.classification(model)
    sampler = samplers.uniform(50, cohort)

    def curve(population, rate, factor, key):
        algorithm = make(losses.cross_entropy(model), rate, factor)
        one = continue_rounds(algorithm, sampler, 1)

        def body(state, _):
            state, _ = one(state, population, key)
            return state, evaluate(metric_fn, algorithm.params(state), test)["accuracy"]

        init_key, _ = jax.random.split(key)
        state, accuracy = jax.lax.scan(body, algorithm.init(model.init(init_key)), length=rounds)
        return accuracy, algorithm.params(state)

    rates, factors = (jnp.asarray(np.ravel(grid)) for grid in np.meshgrid(RATES, factors))
    keys = jax.random.split(jax.random.key(1), 2 * SEEDS)
    over_seeds = jax.vmap(curve, (None, None, None, 0))
    accuracy, params = jax.jit(jax.vmap(over_seeds, (None, 0, 0, None)))(population, rates, factors, keys)
    return np.asarray(accuracy), params


def choose(score):
    """The choice with the best mean score [choices, 2 SEEDS] on the first half of the seeds."""
    return int(np.argmax(np.nan_to_num(score[:, :SEEDS], nan=-np.inf).mean(1)))


def late_accuracy(name, **settings):
    """Mean test accuracy over the last ten rounds on the second half of the seeds."""
    return _late(name, tuple(settings.items()))[0]


@cache
def _late(name, settings=()):
    settings = dict(settings)
    server_lr = settings.pop("server_lr", 1.0)

    def make(loss_fn, rate, factor):
        if name == "fedopt":
            extra = {"server_optimizer": optax.adam(server_lr * factor, 0.9, 0.99, 1e-3)}
        else:
            extra = {"server_lr": server_lr * factor}
        factory = getattr(algorithms, name)
        return factory(loss_fn, optax.sgd(rate), batch_size=10, num_epochs=2, **extra, **settings)

    accuracy, params = accuracy_curve(make)
    late = accuracy[:, :, -10:].mean(-1)
    best = choose(late)
    return late[best, SEEDS:], jax.tree.map(lambda leaf: leaf[best, SEEDS:], params)


def rounds_to(target, curve):
    """First round whose accuracy reaches the target (one past the end if none), [...] from [..., rounds]."""
    reached = curve >= target
    return np.where(reached.any(-1), reached.argmax(-1) + 1, curve.shape[-1] + 1)


def sharpness(name, settings=()):
    """Rise of the training loss in the worst direction at distance 0.5 (first order), for every seed."""
    population, _, model = digits()
    _, params = _late(name, settings)
    loss_fn = losses.cross_entropy(model)

    @jax.jit
    @jax.vmap
    def rise(params):
        def loss(params):
            return jnp.mean(loss_fn(params, population.examples, jax.random.key(0)))

        gradient = jax.grad(loss)(params)
        norm = optax.tree.norm(gradient)
        return loss(jax.tree.map(lambda p, g: p + 0.5 * g / norm, params, gradient)) - loss(params)

    return np.asarray(rise(params))


def fedavg_against_fedsgd():
    def needed(factory, **settings):
        def make(loss_fn, rate, factor):
            return factory(loss_fn, optax.sgd(rate), batch_size=10, server_lr=factor, **settings)

        rounds = rounds_to(0.85, accuracy_curve(make, cohort=10, factors=(1.0,))[0])
        return rounds[choose(-rounds), SEEDS:]

    return needed(algorithms.fedavg, num_epochs=5), needed(algorithms.fedsgd)


LATE = "test accuracy, last 10 of 60 rounds"
DISTANCE = "distance to the optimum"
UNEQUAL = np.tile([1, 2, 4, 8, 16], 4)


def claims():
    """Method -> a function that measures its claim."""
    beats = "reaches a higher accuracy than FedAvg under strong label skew and low participation"

    def server(name, **settings):
        return lambda: Claim(beats, LATE, False, late_accuracy(name, **settings), late_accuracy("fedavg"))

    def exact(text, name, baseline="fedavg", common=(), **settings):
        common = dict(common)
        return lambda: Claim(text, DISTANCE, True, distance(name, **common, **settings), distance(baseline, **common))

    many = {"num_steps": 10}
    flat = "finds flatter minima than FedAvg"
    rise = "rise of the loss at distance 0.5"
    return {
        "fedavg": lambda: Claim(
            "needs fewer rounds than FedSGD", "rounds to 85 % accuracy", True, *fedavg_against_fedsgd()
        ),
        "local_sgd": lambda: Claim(
            "with 10 local steps gets closer in 10 rounds than with 1, when clients are alike",
            DISTANCE,
            True,
            distance("local_sgd", rounds=10, cohort=20, heterogeneity=0.1, num_steps=10),
            distance("local_sgd", rounds=10, cohort=20, heterogeneity=0.1, num_steps=1),
        ),
        "fedsgd": lambda: Claim(
            "has no client drift: with everyone it reaches the optimum, where FedAvg with 10 steps stalls",
            DISTANCE,
            True,
            distance("fedsgd", cohort=20),
            distance("fedavg", cohort=20, **many),
        ),
        "fedopt": lambda: Claim(
            beats + " (with optax.adam)",
            LATE,
            False,
            late_accuracy("fedopt", server_lr=0.01),
            late_accuracy("fedavg"),
        ),
        "fedavgm": server("fedavgm", momentum=0.9, server_lr=0.3),
        "fedadagrad": server("fedadagrad", server_lr=0.1),
        "fedadam": server("fedadam", server_lr=0.01),
        "fedyogi": server("fedyogi", server_lr=0.01),
        "fedprox": exact("stalls closer to the optimum than FedAvg", "fedprox", common=many | {"cohort": 20}, mu=1.0),
        "scaffold": exact("converges with partial participation, where FedAvg stalls", "scaffold", common=many),
        "feddyn": exact("converges with partial participation, where FedAvg stalls", "feddyn", common=many, alpha=0.5),
        "fednova": exact(
            "removes most of the bias that unequal local work gives FedAvg",
            "fednova",
            common={"num_steps": UNEQUAL, "cohort": 20, "lr": 0.02, "rounds": 600},
        ),
        "fedexp": exact(
            "gets closer than FedAvg in the same 40 rounds when clients interpolate a common solution",
            "fedexp",
            common={"num_steps": 20, "cohort": 20, "rounds": 40, "rank": 1},
        ),
        "fedcm": server("fedcm", alpha=0.2),
        "fedsam": lambda: Claim(flat, rise, True, sharpness("fedsam", (("rho", 0.2),)), sharpness("fedavg")),
        "fedasam": lambda: Claim(flat, rise, True, sharpness("fedasam", (("rho", 1.0),)), sharpness("fedavg")),
        "mofedsam": lambda: Claim(
            "adds the global direction to FedSAM and beats it under low participation",
            LATE,
            False,
            late_accuracy("mofedsam", rho=0.05, alpha=0.1),
            late_accuracy("fedsam", rho=0.05),
        ),
    }


def main() -> None:
    """Measures the claims and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None)
    args = parser.parse_args()
    rows = {}
    for name, measure in claims().items():
        if args.only and name not in args.only:
            continue
        claim = measure()
        rows[name] = {
            "claim": claim.text,
            "measure": claim.measure,
            "method": [float(v) for v in claim.method],
            "baseline": [float(v) for v in claim.baseline],
            "holds": claim.holds,
        }
        print(
            f"{name:11s} {claim.method.mean():9.4g} ± {claim.method.std(ddof=1):8.2g}  against "
            f"{claim.baseline.mean():9.4g} ± {claim.baseline.std(ddof=1):8.2g}  {claim.measure}"
            f"{'' if claim.holds else '   DOES NOT HOLD'}",
            flush=True,
        )
    saved = _measure.RESULTS / "claims.json"
    if args.only and saved.exists():  # the others stay as they were measured
        rows = json.loads(saved.read_text())["claims"] | rows
    print(_measure.save("claims", {"machine": _measure.machine(), "seeds": SEEDS, "claims": rows}))


if __name__ == "__main__":
    main()
