"""Closed forms, limits and identities of the methods, from their papers' mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, measured, reference, samplers, simulate
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_OPTIMUM,
    Q3_START,
    assert_trees_close,
    assert_trees_equal,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

STEPS = {"batch_size": 1, "num_steps": 2}
N = {"num_clients": 3}
KEY = jax.random.key(0)


def make(name, lr=0.1, loss=quadratic_loss, **settings):
    return getattr(algorithms, name)(loss, optax.sgd(lr), **settings)


def run(algorithm, cohorts, population=None, params=Q3_START):
    """State after the rounds, and metrics stacked over them.

    A short run goes through the plain loop, which compiles nothing (every plan is tested against it elsewhere).
    """
    population = population or q3_population()
    if len(cohorts) > 4:
        simulation = jax.jit(simulate(algorithm, samplers.schedule(np.asarray(cohorts)), len(cohorts)))
        return simulation(jnp.asarray(params), population, KEY)
    state, rows = algorithm.init(jnp.asarray(params)), []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, population.cohort(ids), KEY)
            rows.append(metrics)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def gradient(x):
    return np.einsum("nij,nj->i", Q3_A, x - Q3_B) / 3


def same_runs(a, b, cohorts=PART, rtol=1e-12, **kwargs):
    assert_trees_close(run(a, cohorts, **kwargs)[0].params, run(b, cohorts, **kwargs)[0].params, rtol=rtol, atol=1e-13)


# FedAvg


def test_one_full_step_with_everyone_is_gradient_descent():
    x = Q3_START
    for _ in range(3):
        x = x - 0.1 * gradient(x)
    for name, settings in {
        "fedavg": {"batch_size": 1},
        "fedsgd": {"batch_size": 1},
        "fedprox": {"batch_size": 1},
    }.items():
        np.testing.assert_allclose(run(make(name, **settings), FULL)[0].params, x, rtol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fedavg_fixed_point_solves_its_equation_and_is_not_the_optimum(steps):
    contraction = [np.eye(2) - np.linalg.matrix_power(np.eye(2) - 0.1 * a, steps) for a in Q3_A]
    fixed = np.linalg.solve(sum(contraction), sum(m @ b for m, b in zip(contraction, Q3_B, strict=True)))
    state, _ = run(make("fedavg", batch_size=1, num_steps=steps), [[0, 1, 2]] * 400)
    np.testing.assert_allclose(state.params, fixed, atol=1e-12)
    assert (np.linalg.norm(fixed - Q3_OPTIMUM) > 1e-3) == (steps > 1)


def test_server_lr_zero_changes_no_bit():
    for name in ("fedavg", "fedprox", "fedsam", "fednova", "fedcm", "fedavgm"):
        np.testing.assert_array_equal(run(make(name, server_lr=0.0, **STEPS), FULL)[0].params, Q3_START)


def test_small_steps_scaled_up_become_a_gradient_step():
    errors = []
    for lr in (1e-2, 1e-3):
        state, _ = run(make("fedavg", lr=lr, server_lr=0.1 / (lr * 4), batch_size=1, num_steps=4), [[0, 1, 2]])
        errors.append(np.linalg.norm(state.params - (Q3_START - 0.1 * gradient(Q3_START))))
    assert errors[1] < errors[0] / 8  # first order in lr


def test_duplicating_a_client_doubles_its_weight():
    twice = Population.from_clients([q3_population().client(i) for i in (0, 1, 1)])
    weighted = make("fedavg", weights=np.array([1.0, 2.0, 0.0]), **STEPS)
    assert_trees_close(run(make("fedavg", **STEPS), FULL, twice)[0], run(weighted, FULL)[0], rtol=1e-12)


def test_weights_by_examples():
    population = q3_population((1, 2, 4))
    by_size = make("fedavg", weights="examples", batch_size=4)
    by_hand = make("fedavg", weights=np.array([1.0, 2.0, 4.0]), batch_size=4)
    assert_trees_close(run(by_size, PART, population)[0], run(by_hand, PART, population)[0], rtol=1e-12)


def test_fedsgd_does_not_depend_on_the_batch_size():
    population, start = softmax_population((5, 1, 8)), softmax_params()
    results = [
        jax.jit(simulate(make("fedsgd", loss=softmax_loss, batch_size=b), samplers.full(3), 3))(start, population, KEY)[
            0
        ]
        for b in (1, 3, 8)
    ]
    for other in results[1:]:
        assert_trees_close(other, results[0], rtol=1e-11)


def test_learning_rate_may_depend_on_the_round():
    decayed = algorithms.fedavg(quadratic_loss, lambda t: optax.sgd(0.1 * 0.5**t), **STEPS)
    state, _ = run(decayed, FULL)
    by_hand = jnp.asarray(Q3_START)
    for t in range(3):
        by_hand = run(make("fedavg", lr=0.1 * 0.5**t, **STEPS), FULL[:1], params=by_hand)[0].params
    np.testing.assert_allclose(state.params, by_hand, rtol=1e-13)


# Server optimizers


def test_fedavgm_without_momentum_is_fedavg():
    same_runs(make("fedavgm", momentum=0.0, **STEPS), make("fedavg", **STEPS))
    same_runs(make("fedopt", **STEPS), make("fedavg", **STEPS))


def test_fedavgm_dampening_is_a_rescaled_server_lr():
    same_runs(make("fedavgm", dampening=True, **STEPS), make("fedavgm", server_lr=0.1, **STEPS))


def test_fedavgm_on_a_constant_displacement():
    ramp = lambda params, batch, key: batch["c"] @ params  # noqa: E731  linear: the same displacement every round
    population = Population.from_clients([{"c": np.array([[1.0, -2.0]])}])
    d = -0.2 * np.array([1.0, -2.0])
    for nesterov, total in ((False, 1 + 1.9 + 2.71), (True, 1.9 + 2.71 + 3.439)):
        algorithm = make("fedavgm", loss=ramp, momentum=0.9, nesterov=nesterov, **STEPS)
        state, _ = run(algorithm, [[0], [0], [0]], population)
        np.testing.assert_allclose(state.params, Q3_START + total * d, rtol=1e-12)


def test_adaptive_servers_with_huge_tau_are_fedavg_and_damped_fedavgm():
    tau = 1e8
    same_runs(make("fedadagrad", server_lr=tau, tau=tau, **STEPS), make("fedavg", **STEPS), rtol=1e-6)
    momentum = make("fedavgm", momentum=0.9, dampening=True, **STEPS)
    same_runs(make("fedadam", server_lr=tau, tau=tau, **STEPS), momentum, rtol=1e-6)
    same_runs(make("fedyogi", server_lr=tau, tau=tau, **STEPS), momentum, rtol=1e-6)


def test_first_adam_step_moves_every_coordinate_by_the_server_lr():
    state, _ = run(make("fedadam", server_lr=0.1, tau=0.0, initial_accumulator=0.0, **STEPS), FULL[:1])
    np.testing.assert_allclose(np.abs(state.params - Q3_START), 0.1, rtol=1e-12)


def test_adam_and_yogi_agree_in_the_first_round_from_zero():
    zero = {"initial_accumulator": 0.0, **STEPS}
    same_runs(make("fedadam", **zero), make("fedyogi", **zero), cohorts=FULL[:1])


# FedProx


def test_fedprox_without_penalty_is_fedavg_bit_for_bit():
    assert_trees_equal(run(make("fedprox", mu=0.0, **STEPS), PART), run(make("fedavg", **STEPS), PART))


def test_fedprox_fixed_point_of_exact_local_solves():
    state, _ = run(make("fedprox", lr=0.25, mu=0.5, batch_size=1, num_steps=200), [[0, 1, 2]] * 300)
    np.testing.assert_allclose(state.params, (0.00690597, 0.11004022), atol=1e-7)


# SCAFFOLD and FedDyn


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_reaches_the_optimum_with_partial_participation(option):
    cohorts = [[t % 3, (t + 1) % 3] for t in range(600)]
    state, _ = run(make("scaffold", option=option, **N, **STEPS), cohorts)
    np.testing.assert_allclose(state.params, Q3_OPTIMUM, atol=1e-10)
    at_optimum = np.einsum("nij,nj->ni", Q3_A, Q3_OPTIMUM - Q3_B)
    np.testing.assert_allclose(state.client_controls.rows, at_optimum, atol=1e-9)
    np.testing.assert_allclose(state.control, 0, atol=1e-9)


def test_fedavg_does_not():
    state, _ = run(make("fedavg", **STEPS), [[0, 1, 2]] * 600)
    assert np.linalg.norm(state.params - Q3_OPTIMUM) > 1e-3


@pytest.mark.parametrize("weights", ["uniform", "examples", np.array([1.0, 5.0, 2.0])])
def test_scaffold_control_is_the_mean_of_the_clients(weights):
    state, _ = run(make("scaffold", weights=weights, batch_size=1, **N), PART, q3_population((1, 2, 4)))
    p = np.array([1, 2, 4]) if isinstance(weights, str) and weights == "examples" else weights
    p = np.ones(3) if isinstance(p, str) else p
    np.testing.assert_allclose(state.control, np.average(state.client_controls.rows, axis=0, weights=p), rtol=1e-12)


def test_scaffold_option_two_is_the_usual_formula_for_sgd():
    """c_i - c + (x - y_i) / (K lr), written out for two rounds."""
    algorithm = make("scaffold", **N, **STEPS)
    before, _ = run(algorithm, PART[:1])
    after, _ = run(algorithm, PART[:2])
    c = np.asarray(before.control)
    for i in PART[1]:
        y, c_i = np.asarray(before.params), np.asarray(before.client_controls.rows[i])
        for _ in range(2):
            y = y - 0.1 * (Q3_A[i] @ (y - Q3_B[i]) - c_i + c)
        np.testing.assert_allclose(after.client_controls.rows[i], c_i - c + (before.params - y) / 0.2, rtol=1e-11)


def test_scaffold_weighted_reaches_the_weighted_optimum():
    p = np.array([1.0, 5.0, 2.0])
    optimum = np.linalg.solve(np.einsum("n,nij->ij", p, Q3_A), np.einsum("n,nij,nj->i", p, Q3_A, Q3_B))
    for name in ("scaffold", "feddyn"):
        state, _ = run(make(name, weights=p, **N, **STEPS), [[0, 1, 2]] * 1500)
        np.testing.assert_allclose(state.params, optimum, atol=1e-8)


def test_feddyn_keeps_the_mean_of_the_shifts_and_reaches_the_optimum():
    algorithm = make("feddyn", alpha=0.5, **N, **STEPS)
    state, _ = run(algorithm, PART)
    np.testing.assert_allclose(state.shift, state.client_shifts.rows.mean(0), rtol=1e-12)
    state, _ = run(algorithm, [[t % 3, (t + 1) % 3] for t in range(900)])
    np.testing.assert_allclose(state.params, Q3_OPTIMUM, atol=1e-10)
    at_optimum = np.einsum("nij,nj->ni", Q3_A, Q3_OPTIMUM - Q3_B)
    np.testing.assert_allclose(-0.5 * state.client_shifts.rows, at_optimum, atol=1e-9)


def test_feddyn_with_one_step_averages_gradients_exponentially():
    algorithm = make("feddyn", alpha=0.5, batch_size=1, num_steps=1, **N)
    before, _ = run(algorithm, PART[:2])
    after, _ = run(algorithm, PART)
    for i in PART[2]:
        g = Q3_A[i] @ (before.params - Q3_B[i])
        old, new = -0.5 * before.client_shifts.rows[i], -0.5 * after.client_shifts.rows[i]
        np.testing.assert_allclose(new, 0.95 * old + 0.05 * g, rtol=1e-11)


# FedNova


@pytest.mark.parametrize(
    ("momentum", "mu", "norms"), [(None, 0.0, (1, 2, 4)), (0.9, 0.0, (1, 2.9, 9.049)), (None, 0.5, (1, 1.95, 3.709875))]
)
def test_fednova_lengths_match_the_closed_forms(momentum, mu, norms):
    optimizer = optax.sgd(0.1, momentum=momentum)
    optimizer, model, found = measured(optimizer, mu), np.zeros(2), []
    state = optimizer.init(model)
    for _ in range(4):
        _, state = optimizer.update(model, state, model)
        found.append(float(state.damped_length / 0.1))
    np.testing.assert_allclose([found[0], found[1], found[3]], norms, rtol=1e-6)


def test_fednova_with_equal_work_is_fedavg():
    same_runs(make("fednova", **STEPS), make("fedavg", **STEPS))


def test_fednova_on_linear_losses():
    """Constant gradients: the update is lr tau_eff times their mean, whatever the numbers of steps."""
    slopes = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    population = Population.from_clients([{"c": np.repeat(slopes[i : i + 1], k, 0)} for i, k in enumerate((1, 2, 4))])
    ramp = lambda params, batch, key: batch["c"] @ params  # noqa: E731
    state, metrics = run(make("fednova", loss=ramp, batch_size=1), FULL[:1], population)
    np.testing.assert_allclose(state.params, Q3_START - 0.1 * (7 / 3) * slopes.mean(0), rtol=1e-12)
    np.testing.assert_allclose(metrics.extra.effective_length, 0.1 * 7 / 3, rtol=1e-12)
    assert metrics.bytes_up[0] == 4 * 8


def test_fednova_with_a_changing_rate_takes_old_gradients_too_at_the_rate_of_the_round():
    """The rule of the authors' code, written out: what the server remembers is divided by the round's rate."""
    rate = lambda t: 0.1 * 0.7**t  # noqa: E731
    optimizer = lambda t: optax.sgd(rate(t))  # noqa: E731
    algorithm = algorithms.fednova(quadratic_loss, optimizer, server_momentum=0.9, batch_size=1)
    state, _ = run(algorithm, [[0, 1, 2]] * 4, q3_population((1, 2, 4)))
    x, v = Q3_START, 0
    for t in range(4):
        means = []
        for i, k in enumerate((1, 2, 4)):
            y = x
            for _ in range(k):
                y = y - rate(t) * Q3_A[i] @ (y - Q3_B[i])
            means.append((x - y) / k)
        v = 0.9 * v + (7 / 3) * np.mean(means, axis=0) / rate(t)
        x = x - rate(t) * v
    np.testing.assert_allclose(state.params, x, rtol=1e-12)


# FedExP


def fixed_displacements(deltas):
    """A population and loss whose clients move by exactly the given displacements (one step of size 1)."""
    population = Population.from_clients([{"d": np.asarray(d, np.float64)[None]} for d in deltas])
    return population, lambda params, batch, key: -(batch["d"] @ params)


def exp_step(deltas, eps):
    population, loss = fixed_displacements(deltas)
    algorithm = make("fedexp", lr=1.0, loss=loss, eps=eps, batch_size=1)
    params = np.zeros(len(deltas[0]))
    state, metrics = run(algorithm, [list(range(len(deltas)))], population, params)
    return float(metrics.extra.server_lr[0]), np.asarray(state.params)


def test_fedexp_step_sizes():
    assert exp_step([[1.0, 2.0]] * 4, 0.0)[0] == 1  # identical updates: FedAvg
    np.testing.assert_allclose(exp_step(np.eye(4) * 3, 0.0)[0], 2)  # four orthogonal ones: M / 2
    deltas = np.random.default_rng(0).normal(size=(5, 5)) * 10
    steps = [exp_step(deltas, eps)[0] for eps in (0.0, 10.0, 100.0, 1e9)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 1
    np.testing.assert_allclose(exp_step(deltas * 7, 0.0)[0], steps[0])
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    np.testing.assert_allclose(exp_step(deltas @ rotation, 3.0)[0], exp_step(deltas, 3.0)[0])


def test_fedexp_cancelling_updates_divide_nothing_by_zero():
    for eps in (0.0, 1e-3):
        step, params = exp_step([[1.0, -1.0], [-1.0, 1.0]], eps)
        assert np.isfinite(step)
        np.testing.assert_array_equal(params, 0)


# FedCM and sharpness-aware methods


def test_fedcm_with_only_fresh_gradients_is_fedavg():
    same_runs(make("fedcm", alpha=1.0, **STEPS), make("fedavg", **STEPS))


def test_fedcm_direction_on_linear_losses():
    population, loss = fixed_displacements([[-2.0, 1.0]])
    state, _ = run(make("fedcm", loss=loss, alpha=0.3, **STEPS), [[0]] * 4, population)
    np.testing.assert_allclose(state.direction, (1 - 0.7**4) * np.array([2.0, -1.0]), rtol=1e-12)


def test_fedcm_stationary_point_is_that_of_fedavg_with_a_smaller_step():
    a, _ = run(make("fedcm", alpha=0.4, **STEPS), [[0, 1, 2]] * 800)
    b, _ = run(make("fedavg", lr=0.04, **STEPS), [[0, 1, 2]] * 800)
    np.testing.assert_allclose(a.params, b.params, atol=1e-12)


def test_sharpness_aware_limits():
    same_runs(make("fedsam", rho=0.0, **STEPS), make("fedavg", **STEPS))
    same_runs(make("fedasam", rho=0.0, **STEPS), make("fedavg", **STEPS))
    same_runs(make("mofedsam", rho=0.1, alpha=1.0, **STEPS), make("fedsam", rho=0.1, **STEPS))
    same_runs(make("mofedsam", rho=0.0, alpha=0.3, **STEPS), make("fedcm", alpha=0.3, **STEPS))
    # Arrays with one axis are biases to the adaptive rule: T = 1, which is plain FedSAM.
    same_runs(make("fedasam", rho=0.1, eta=0.3, **STEPS), make("fedsam", rho=0.1, **STEPS))


def test_sam_gradient_on_a_quadratic():
    state, _ = run(make("fedsam", rho=0.3, batch_size=1, num_steps=1), [[1]])
    g = Q3_A[1] @ (Q3_START - Q3_B[1])
    np.testing.assert_allclose(state.params, Q3_START - 0.1 * (g + 0.3 * Q3_A[1] @ g / np.linalg.norm(g)), rtol=1e-12)


def test_sam_at_a_stationary_point_stays_there():
    population = Population.from_clients([{"A": Q3_A[:1], "b": Q3_START[None]}])
    for name in ("fedsam", "fedasam"):
        state, _ = run(make(name, **STEPS), [[0]], population)
        np.testing.assert_array_equal(state.params, Q3_START)


def test_asam_scales_with_the_weights():
    """One step on a matrix parameter, against the formula."""
    w = np.array([[1.0, -2.0], [0.5, 3.0]])
    loss = lambda params, batch, key: 0.5 * batch["a"] * jnp.sum(params**2)  # noqa: E731
    population = Population.from_clients([{"a": np.array([2.0])}])
    state, _ = run(make("fedasam", loss=loss, rho=0.3, eta=0.1, batch_size=1), [[0]], population, w)
    g, t = 2 * w, np.abs(w) + 0.1
    at = w + 0.3 * t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(state.params, w - 0.1 * 2 * at, rtol=1e-12)


# What goes over the wire


@pytest.mark.parametrize(
    ("name", "down", "up", "settings"),
    [
        ("fedavg", 1, 1, {}),
        ("fedsgd", 1, 1, {}),
        ("fedavgm", 1, 1, {}),
        ("fedadam", 1, 1, {}),
        ("fedprox", 1, 1, {}),
        ("scaffold", 2, 2, N),
        ("feddyn", 1, 1, N),
        ("fedexp", 1, 1, {}),
        ("fedsam", 1, 1, {}),
        ("fednova", 1, 2.0, {}),  # two scalars more, P = 2
        ("fedcm", 2, 1.5, {}),
        ("mofedsam", 2, 1.5, {}),
    ],
)
def test_bytes_down_and_up_in_units_of_the_model(name, down, up, settings):
    _, metrics = run(make(name, batch_size=1, **settings), FULL[:1])
    assert metrics.bytes_down[0] == 8 * 2 * down
    assert metrics.bytes_up[0] == 8 * 2 * up
