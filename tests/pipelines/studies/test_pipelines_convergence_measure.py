"""Curves of convergence: closed forms, one program for all cases, and what is refused."""

import jax
import numpy as np
import pytest

from pipelines.studies.convergence import problems
from pipelines.studies.convergence.measure import Case, measure, method, names

SMALL = {"dim": 2, "clients": 3}


def by_hand(problem, lr, steps, rounds):
    """FedAvg on a quadratic without noise, from the examples: squared distance, slope, excess [T + 1] and drift [T]."""
    clients = problem.data.population.num_clients
    examples = problem.data.population.examples
    of_clients = lambda a: np.asarray(a).reshape(clients, -1, *a.shape[1:]).mean(1)  # noqa: E731
    A, t, best = of_clients(examples["A"]), of_clients(examples["tilt"]), np.asarray(problem.data.optimum)
    x, found, moved = np.asarray(problem.data.start), [], []
    for r in range(rounds + 1):
        z, slope = x - best, A.mean(0) @ (x - best)
        found.append((z @ z, slope @ slope, 0.5 * z @ slope))
        if r < rounds:
            y = np.repeat(x[None], clients, 0)
            for _ in range(steps):
                y = y - lr * (np.einsum("nij,nj->ni", A, y - best) + t)
            moved.append(np.mean(np.sum((y - x) ** 2, 1)))
            x = y.mean(0)
    return [*np.transpose(found), np.array(moved)]


def test_curves_are_those_of_a_plain_program():
    """Cases and seeds in one program, against one NumPy loop for each."""
    cases = [
        Case({**SMALL, "zeta": 0.0, "smoothness": 1.0}, {"client_lr": 0.3}),
        Case({**SMALL, "zeta": 2.0, "smoothness": 3.0}, {"client_lr": 0.1}),
        Case({**SMALL, "zeta": 0.0}, {"client_lr": 1e200}),  # which diverges, and hurts nobody else
    ]
    curves = measure(problems.quadratic, method("fedavg", num_steps=4), cases, rounds=5, seeds=2, first_seed=7)
    assert [a.shape for a in curves] == [(3, 2, 6)] * 3 + [(3, 2, 5)]
    assert not np.isfinite(curves.excess[2, :, -1]).any()
    for s, case in enumerate(cases[:2]):
        for r in range(2):
            expected = by_hand(problems.quadratic(7 + r, **case.constants), case.hyper["client_lr"], 4, 5)
            for own, other in zip(curves, expected, strict=True):
                np.testing.assert_allclose(own[s, r], other, rtol=1e-10, atol=1e-15)


def test_the_noise_of_a_step_has_the_variance_that_was_asked_for():
    """From the minimizer of equal clients, one step of each: E ||x - x*||^2 = lr^2 sigma^2 / (N B)."""
    case = Case({**SMALL, "zeta": 0.0, "sigma": 2.0, "radius": 0.0}, {"client_lr": 0.5})
    curves = measure(problems.quadratic, method("fedavg", batch_size=2), [case], rounds=1, seeds=200)
    found = curves.distance[0, :, 1]
    expected = 0.5**2 * 2.0**2 / (3 * 2)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(200)
    assert found.std() / np.sqrt(200) < 0.1 * expected  # or the line above could not fail
    assert np.all(curves.distance[0, :, 0] == 0)


def test_methods_with_other_clients_and_partial_cohorts():
    """A state for each client; a real hyper-parameter of the method; cohorts of two."""
    cases = [Case({**SMALL, "zeta": 1.0}, {"client_lr": lr, "server_lr": s}) for lr, s in ((0.2, 1.0), (0.2, 0.0))]
    scaffold = method("scaffold", num_steps=3)
    curves = measure(problems.quadratic, scaffold, cases, rounds=200, seeds=2, cohort_size=2)
    assert np.all(curves.excess[0, :, -1] < 1e-9)
    assert np.all(curves.drift[0, :, -1] < 1e-8)
    np.testing.assert_array_equal(curves.excess[1], np.repeat(curves.excess[1, :, :1], 201, 1))


def test_clients_that_do_not_descend_have_no_drift():
    curves = measure(problems.sine, method("fedsgd"), [Case(SMALL, {"client_lr": 1.0})], rounds=2, seeds=1)
    assert np.isnan(curves.drift).all()
    assert np.all(np.diff(curves.excess[0, 0]) < 0)


def test_names():
    assert {"fedavg", "scaffold", "feddyn", "fednova", "mime", "fedzo"} <= set(names())
    assert not {"fedgh", "moon", "FZooSQueries"} & set(names())


FEDAVG = {"client_lr": 0.1}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cases": []}, "cases is empty"),
        ({"rounds": 0}, "rounds must be"),
        ({"seeds": 0}, "seeds must be"),
        ({"cohort_size": 4}, "cohort_size=4 is above the number of clients, 3"),
        ({"cases": [Case({**SMALL, "zeta": -1.0}, FEDAVG)]}, r"case 1 \(.*zeta=-1.0.*\): zeta must lie in"),
        ({"cases": [Case(SMALL, FEDAVG), Case({**SMALL, "dim": 4}, FEDAVG)]}, "case 2 .* has other sizes"),
        ({"cases": [Case(SMALL, FEDAVG), Case(SMALL, {**FEDAVG, "server_lr": 1.0})]}, "case 2 has the hyper-param"),
        ({"cases": [Case(SMALL, {})]}, "hyper of fedavg has no client_lr"),
        ({"cases": [Case(SMALL, {**FEDAVG, "server_rl": 1.0})]}, "server_rl.*server_lr"),
        ({"cases": [Case(SMALL, {**FEDAVG, "server_lr": -1.0})]}, r"case 1 of 1 \(.*\): server_lr must lie in"),
    ],
)
def test_bad_cases(asked, said):
    usual = {"cases": [Case(SMALL, FEDAVG)], "rounds": 2, "seeds": 1}
    with pytest.raises(ValueError, match=said), jax.disable_jit():  # nothing is to be compiled
        measure(problems.quadratic, method("fedavg"), **(usual | asked))


@pytest.mark.parametrize(
    ("name", "own", "said"),
    [
        ("fedavgg", {}, "fedavg"),
        ("moon", {}, "method moon also needs features"),
        ("fedavg", {"num_steps": 0}, "num_steps must be"),
        ("fedavg", {"batch_size": 0}, "batch_size must be"),
        ("fedavg", {"num_step": 2}, "num_steps"),
    ],
)
def test_bad_methods(name, own, said):
    with pytest.raises(ValueError, match=said):
        method(name, **own)


def test_clients_take_part_with_their_own_probabilities():
    """Of equal clients that step to the minimizer at once, those that never take part do not matter."""
    case = Case({**SMALL, "zeta": 0.0, "convexity": 1.0}, {"client_lr": 1.0})
    curves = measure(problems.quadratic, method("fedavg"), [case], rounds=300, seeds=2, probabilities=(0.1, 0.0, 0.1))
    present = np.isclose(curves.drift[0, :, 0], 1.0)  # the first round moves all the way, or nobody is there
    assert np.all((curves.distance[0, :, 1] < 1e-20) == present)
    first = [int(np.flatnonzero(row < 1e-20)[0]) for row in curves.distance[0]]
    assert all(1 <= each < 60 for each in first)
    assert max(first) > 1
    for own, said in (
        ({"probabilities": (0.1, 0.1)}, "probabilities has 2 values for 3 clients"),
        ({"probabilities": (0.1,) * 3, "cohort_size": 2}, "cohort_size and probabilities are both given"),
    ):
        with pytest.raises(ValueError, match=said):
            measure(problems.quadratic, method("fedavg"), [case], rounds=2, seeds=1, **own)


def test_local_steps_as_a_hyper_parameter():
    """Cases of one program may differ in K; the curves are those of programs of their own."""
    cases = [Case({**SMALL, "zeta": 1.0}, {"client_lr": 0.2, "num_steps": steps}) for steps in (3, 1)]
    curves = measure(problems.quadratic, method("afa_cd", num_steps=9), cases, rounds=4, seeds=1)
    for found, case in zip(curves.distance, cases, strict=True):
        alone = Case(case.constants, {"client_lr": 0.2})
        own = measure(
            problems.quadratic, method("afa_cd", num_steps=case.hyper["num_steps"]), [alone], rounds=4, seeds=1
        )
        np.testing.assert_allclose(found, own.distance[0], rtol=1e-10)
