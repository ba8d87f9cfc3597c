"""Traces of every method on the quadratic problem Q3, from an independent program, in float64 to 1e-7."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from tests.problems import FULL, PART, Q3_START, q3_population, quadratic_loss

SGD = optax.sgd(0.1)
STEPS = {"batch_size": 1, "num_steps": 2}
EPOCH = {"batch_size": 1, "num_epochs": 1}  # with repeated examples: K_i = number of copies
HEAVY_BALL = optax.sgd(0.1, momentum=0.9)
PROXIMAL = {"lam": 2.0, "inner_lr": 0.1, "inner_steps": 3, "mu": 0.1, "beta": 0.8}


def make(name, *args, **kwargs):
    return getattr(algorithms, name)(quadratic_loss, *args, **kwargs)


# name, algorithm, cohorts, copies of each client's example, server model after each round
TRACES = [
    (
        "fedavg full",
        make("fedavg", SGD, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.62000000, 0.78833333), (0.37994722, 0.63294167), (0.22891581, 0.51776070)],
    ),
    (
        "fedavg part",
        make("fedavg", SGD, **STEPS),
        PART,
        (1, 1, 1),
        [(0.68500000, 0.82875000), (0.25890937, 0.72904063), (0.26329109, 0.46477258)],
    ),
    (
        "fedavg K=1,2,4",
        make("fedavg", SGD, **EPOCH),
        FULL,
        (1, 2, 4),
        [(0.53670000, 0.75367292), (0.26838641, 0.56752063), (0.11422879, 0.42452525)],
    ),
    (
        "local_sgd full",
        make("local_sgd", SGD, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.62000000, 0.78833333), (0.37994722, 0.63294167), (0.22891581, 0.51776070)],
    ),
    (
        "fedavgm",
        make("fedavgm", SGD, momentum=0.9, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.62000000, 0.78833333), (0.03794722, 0.44244167), (-0.51097919, 0.06660570)],
    ),
    (
        "fedadagrad",
        make("fedadagrad", SGD, server_lr=0.1, tau=1e-3, initial_accumulator=1e-6, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.90026281, 0.90047132), (0.83349461, 0.83440863), (0.78093158, 0.78273627)],
    ),
    (
        "fedadam",
        make("fedadam", SGD, server_lr=0.1, b1=0.9, b2=0.99, tau=1e-3, initial_accumulator=1e-6, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.90259663, 0.90461186), (0.77101620, 0.77518390), (0.61853889, 0.62527273)],
    ),
    (
        "fedyogi",
        make("fedyogi", SGD, server_lr=0.1, b1=0.9, b2=0.99, tau=1e-3, initial_accumulator=1e-6, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.90259696, 0.90461287), (0.77137299, 0.77553529), (0.61976591, 0.62648486)],
    ),
    (
        "fedprox",
        make("fedprox", SGD, mu=0.5, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.63083333, 0.79416667), (0.39376667, 0.64153889), (0.24209260, 0.52735509)],
    ),
    (
        "scaffold II full",
        make("scaffold", SGD, num_clients=3, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.62000000, 0.78833333), (0.37335694, 0.62905972), (0.21976001, 0.51145930)],
    ),
    (
        "scaffold II part",
        make("scaffold", SGD, num_clients=3, **STEPS),
        PART,
        (1, 1, 1),
        [(0.68500000, 0.82875000), (0.36030521, 0.60559271), (0.20646776, 0.48947560)],
    ),
    (
        "scaffold I part",
        make("scaffold", SGD, num_clients=3, option="I", **STEPS),
        PART,
        (1, 1, 1),
        [(0.68500000, 0.82875000), (0.37140937, 0.59487396), (0.22072859, 0.48634654)],
    ),
    (
        "feddyn full",
        make("feddyn", SGD, num_clients=3, alpha=0.5, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.26166667, 0.58833333), (-0.25445000, 0.22002222), (-0.45788679, -0.03270218)],
    ),
    (
        "feddyn part",
        make("feddyn", SGD, num_clients=3, alpha=0.5, **STEPS),
        PART,
        (1, 1, 1),
        [(0.48958333, 0.72291667), (-0.21539757, 0.48570833), (-0.32700351, 0.03187426)],
    ),
    (
        "fednova",
        make("fednova", SGD, **EPOCH),
        FULL,
        (1, 2, 4),
        [(0.60724167, 0.74304531), (0.36616262, 0.56704838), (0.21878996, 0.44557876)],
    ),
    (
        "fednova momentum",
        make("fednova", HEAVY_BALL, **EPOCH),
        FULL,
        (1, 2, 4),
        [(0.26995410, 0.52120568), (0.06119773, 0.32506647), (0.00532396, 0.23889295)],
    ),
    (
        "fednova prox",
        make("fednova", SGD, mu=0.5, **EPOCH),
        FULL,
        (1, 2, 4),
        [(0.60807511, 0.74327620), (0.36726045, 0.56732609), (0.21989327, 0.44582090)],
    ),
    (
        "fedexp",
        make("fedexp", SGD, eps=1e-3, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.62000000, 0.78833333), (0.37994722, 0.63294167), (0.15536194, 0.46166637)],
    ),
    (
        "fedcm",
        make("fedcm", SGD, alpha=0.1, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.95720000, 0.97688333), (0.87805011, 0.93379081), (0.76979733, 0.87410961)],
    ),
    (
        "fedsam",
        make("fedsam", SGD, rho=0.1, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.59377986, 0.77206459), (0.34195183, 0.60571620), (0.18940620, 0.48425745)],
    ),
    (
        "pfedme full",
        make("pfedme", SGD, num_clients=3, **PROXIMAL, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.86288102, 0.91470903), (0.74424075, 0.83821152), (0.64161210, 0.76956361)],
    ),
    (
        "pfedme part",
        make("pfedme", SGD, num_clients=3, **PROXIMAL, **STEPS),
        PART,
        (1, 1, 1),
        [(0.87957041, 0.93931468), (0.69680665, 0.88476149), (0.64636827, 0.76041250)],
    ),
    (
        "fedagain full",
        make("fedagain", SGD, num_clients=3, rho=0.5, **STEPS),
        FULL,
        (1, 1, 1),
        [(0.65205962, 0.77674475), (0.45960055, 0.60135192), (0.36112805, 0.46121763)],
    ),
    (
        "fedagain part",
        make("fedagain", SGD, num_clients=3, rho=0.5, **STEPS),
        PART,
        (1, 1, 1),
        [(0.72081561, 0.80728906), (0.29863950, 0.66459968), (0.31612160, 0.41701522)],
    ),
    (
        "fedagain mean",
        make("fedagain", SGD, num_clients=3, reference="mean", **STEPS),
        FULL,
        (1, 1, 1),
        [(0.82581786, 0.71338270), (0.73387838, 0.49730589), (0.68963320, 0.33715028)],
    ),
]


def run(algorithm, cohorts, copies):
    population = q3_population(copies)
    round_fn = jax.jit(algorithm.round)
    state = algorithm.init(jnp.asarray(Q3_START))
    states, metrics = [], []
    for ids in cohorts:
        state, info = round_fn(state, population.cohort(ids), jax.random.key(0))
        states.append(state)
        metrics.append(info)
    return states, metrics


@pytest.mark.quick
@pytest.mark.parametrize(("name", "algorithm", "cohorts", "copies", "expected"), TRACES, ids=[t[0] for t in TRACES])
def test_golden_trace(name, algorithm, cohorts, copies, expected):
    states, _ = run(algorithm, cohorts, copies)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("option", "cohorts", "expected"),
    [
        ("II", FULL, (0.76798468, 0.58800209)),
        ("II", PART, (0.99023015, 0.69843549)),
        ("I", PART, (1.09000417, 0.71947830)),
    ],
)
def test_scaffold_server_control(option, cohorts, expected):
    states, _ = run(make("scaffold", SGD, num_clients=3, option=option, **STEPS), cohorts, (1, 1, 1))
    np.testing.assert_allclose(states[-1].control, expected, rtol=0, atol=1e-7)


def test_fedexp_step_sizes_and_average_of_the_last_two_models():
    algorithm = make("fedexp", SGD, eps=1e-3, **STEPS)
    states, metrics = run(algorithm, FULL, (1, 1, 1))
    np.testing.assert_allclose([m.extra.server_lr for m in metrics], [1, 1, 1.48701044], atol=1e-7)
    np.testing.assert_allclose(algorithm.params(states[-1]), (0.26765458, 0.54730402), atol=1e-7)
