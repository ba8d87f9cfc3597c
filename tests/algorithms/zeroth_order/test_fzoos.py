"""FZooS: a trace of an independent NumPy and SciPy program, the invariants of surrogates, and the count of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import solve
from scipy.optimize import minimize_scalar

import algorithms
from algorithms.parts.options import grouped
from algorithms.zeroth_order.estimators import host_loss
from fedjax_core import Plan, Population, reference

D = 3
START = np.array([0.4, 0.7, 0.2])
SIZES = {
    "capacity": 40,
    "neighbors": 12,
    "initial": 4,
    "active": 2,
    "active_candidates": 6,
    "survey": 3,
    "survey_candidates": 8,
    "num_features": 30,
    "feature_neighbors": 15,
    "feature_lengthscale": 1.0,
    "noise": 1e-3,
    "ridge": 1e-2,
    "radius": 0.05,
}
CENTERS = np.array([[0.1, 0.5, 0.3], [0.9, 0.2, 0.6], [0.4, 0.4, 0.8]])
ALL = np.arange(3)


def loss_fn(x, batch, key):
    return jnp.sum((x - batch["c"]) ** 2 * jnp.array([1.0, 2.0, 0.5]), axis=1)


def population(centers=CENTERS):
    return Population.from_sizes({"c": np.asarray(centers)}, [1] * len(centers))


def make(loss=loss_fn, lr=0.05, num_clients=3, **settings):
    settings = SIZES | {"batch_size": 1, "num_steps": 2, "plan": Plan(lanes=1)} | settings
    return algorithms.fzoos(loss, optax.sgd(lr), num_clients=num_clients, **grouped(algorithms.fzoos, settings))


def rounds(cohorts, clients_=None, start=START, **settings):
    """States and metrics of every round, through the plain loop, which compiles little."""
    algorithm = make(**settings)
    state, states, rows = algorithm.init(jnp.asarray(start)), [], []
    with reference.plain_loop():
        for t, ids in enumerate(cohorts):
            cohort = (clients_ or population()).cohort(np.asarray(ids))
            state, metrics = algorithm.round(state, cohort, jax.random.key(t))
            states.append(state)
            rows.append(metrics)
    return states, rows


# The independent program. It shares with the library how keys are derived and what is drawn from them.


def box(key, center, half_width, count):
    return center + half_width * np.asarray(jax.random.uniform(key, (count, D), jnp.float32, -1.0, 1.0), np.float64)


def keys_of(pass_key, client, step):
    step_key = jax.random.split(jax.random.fold_in(pass_key, client), 3)[2]
    return jax.random.split(jax.random.fold_in(step_key, step))[0]


def closest(history, x, count):
    points, values = (np.array(a) for a in history)
    order = np.argsort(np.linalg.norm(points - x, axis=1), kind="stable")[:count]
    y = values[order]
    return points[order], (y - y.min()) / (y.max() - y.min()), y.max() - y.min()


def covariance(x, scale):
    s = np.sqrt(5) * np.linalg.norm(x[:, None] - x, axis=-1) / scale
    return (1 + s + s**2 / 3) * np.exp(-s) + SIZES["noise"] * np.eye(len(x))


def slopes(z, x, scale):
    s = np.sqrt(5) * np.linalg.norm(z - x, axis=1) / scale
    return -(5 / (3 * scale**2) * (1 + s) * np.exp(-s))[:, None] * (z - x)


def best_lengthscale(x, u):
    def cost(log_l):
        k = covariance(x, np.exp(log_l))
        return u @ solve(k, u) / 2 + np.linalg.slogdet(k)[1] / 2

    r = np.linalg.norm(x[:, None] - x, axis=-1)
    typical = np.sqrt((r**2).sum() / (len(x) * (len(x) - 1)))
    grid = np.log(typical) + np.linspace(np.log(0.1), np.log(100), 200)
    i = int(np.argmin([cost(g) for g in grid]))
    if i in (0, 199):
        return np.exp(grid[i])
    found = minimize_scalar(cost, bounds=(grid[i - 1], grid[i + 1]), method="bounded", options={"xatol": 1e-11})
    return np.exp(found.x)


def most_uncertain(key, history, center, half_width, candidates, count):
    x, u, _ = closest(history, center, SIZES["neighbors"])
    scale = best_lengthscale(x, u)
    z = box(key, center, half_width, candidates)
    inverse = np.linalg.inv(covariance(x, scale))
    explained = [np.trace(slopes(row, x, scale).T @ inverse @ slopes(row, x, scale)) for row in z]
    return z[np.argsort(explained, kind="stable")[:count]], scale


def value(i, x):
    return (x - CENTERS[i]) ** 2 @ np.array([1.0, 2.0, 0.5])


def trace_by_hand(cohorts, lr=0.05, steps=2, features_seed=0, decay=1):
    """The global models, and the numbers of queries of each round."""
    w_key, b_key = jax.random.split(jax.random.key(features_seed))
    m = SIZES["num_features"]
    w = np.asarray(jax.random.normal(w_key, (D, m), jnp.float32), np.float64)
    b = np.asarray(jax.random.uniform(b_key, (m,), jnp.float32, 0, 2 * jnp.pi), np.float64)
    histories, last, x, models, counts = {i: ([], []) for i in range(3)}, {}, START, [], []

    def ask(i, points):
        histories[i][0].extend(np.atleast_2d(points))
        histories[i][1].extend(value(i, p) for p in np.atleast_2d(points))

    for t, ids in enumerate(cohorts):
        survey_key, local_key, _ = jax.random.split(jax.random.key(t), 3)
        before, weights = sum(len(h[1]) for h in histories.values()), {}
        for i in ids:
            key = keys_of(survey_key, i, 0)
            ask(i, x)
            if i not in last:
                ask(i, box(key, x, SIZES["radius"], SIZES["initial"]))
                continue
            half_width = max(np.mean(np.abs(x - last[i])) / 2, SIZES["radius"])
            ask(i, most_uncertain(key, histories[i], x, half_width, SIZES["survey_candidates"], SIZES["survey"])[0])
            near, u, scale = closest(histories[i], x, SIZES["feature_neighbors"])
            phi = np.sqrt(2 / m) * np.cos(near @ w + b)
            weights[i] = scale * phi.T @ solve(phi @ phi.T + SIZES["ridge"] * np.eye(len(u)), u)
        nu = np.mean(list(weights.values()), 0) if weights else 0
        for i in ids:
            y = x
            for step in range(steps):
                key = keys_of(local_key, i, step)
                points, found = most_uncertain(
                    key, histories[i], y, SIZES["radius"], SIZES["active_candidates"], SIZES["active"]
                )
                ask(i, points)
                near, u, scale = closest(histories[i], y, SIZES["neighbors"])
                g = scale * slopes(y, near, found).T @ solve(covariance(near, found), u)
                if i in weights:
                    g = g - np.sqrt(2 / m) * w @ (np.sin(y @ w + b) * (nu - weights[i])) / (step + 1) ** decay
                y = y - lr * g
                ask(i, y)
            last[i] = y
        x = np.mean([last[i] for i in ids], 0)
        models.append(x)
        counts.append(sum(len(h[1]) for h in histories.values()) - before)
    return models, counts


COHORTS = [[0, 1, 2], [2, 0], [1, 2, 0]]


@pytest.mark.parametrize("decay", [1, 0])
def test_golden_trace(decay):
    states, rows = rounds([[0, 1, 2], [2, 0, -1], [1, 2, 0]], correction_decay=decay)
    models, counts = trace_by_hand(COHORTS, decay=decay)
    np.testing.assert_allclose([s.params for s in states], models, rtol=0, atol=1e-7)
    assert [int(m.extra.queries) for m in rows] == counts


def test_every_query_is_counted_and_nothing_else():
    """By the function itself, which is not JAX. Client 2 comes later; the safeguard asks everyone once more."""
    asked = []

    def values(queries):
        asked.extend(queries)
        return [np.sum((x - examples["c"]) ** 2, 1) for x, examples in queries]

    algorithm = make(host_loss(values), safeguard=True)
    round_fn, state = jax.jit(algorithm.round), algorithm.init(jnp.asarray(START))
    for t, (ids, expected) in enumerate([([0, 1, -1], 2 * (5 + 6 + 1)), ([1, -1, 2], (4 + 6 + 1) + (5 + 6 + 1))]):
        asked.clear()
        state, metrics = jax.block_until_ready(round_fn(state, population().cohort(np.array(ids)), jax.random.key(t)))
        assert metrics.extra.queries == len(asked) == expected
    np.testing.assert_array_equal(state.memories.rows.history.asked, [11, 21, 11])  # the safeguard's are not stored


def test_all_clients_at_once_give_the_same_as_the_plain_loop():
    expected, _ = rounds([[0, 1, 2]] * 2)
    algorithm = make(plan=Plan(lanes=3))
    state, round_fn = algorithm.init(jnp.asarray(START)), jax.jit(algorithm.round)
    for t in range(2):
        state, _ = round_fn(state, population().cohort(ALL), jax.random.key(t))
    np.testing.assert_allclose(state.params, expected[-1].params, rtol=1e-8)


def test_alike_clients_correct_nothing_and_the_corrections_of_others_cancel():
    """Then no feature has a part in the result: with one client, and where the first step is the last."""
    for everyone, cohort, settings in (
        (population(CENTERS[:1]), [0], {"num_clients": 1}),
        (population(), [0, 1, 2], {"num_steps": 1}),
    ):
        states, _ = rounds([cohort] * 2, everyone, **settings)
        other, _ = rounds([cohort] * 2, everyone, feature_seed=1, **settings)
        np.testing.assert_allclose(states[-1].params, other[-1].params, rtol=1e-9)
    with_more_steps, _ = rounds([[0, 1, 2]] * 2)
    other, _ = rounds([[0, 1, 2]] * 2, feature_seed=1)
    np.testing.assert_array_equal(with_more_steps[0].params, other[0].params)  # none in the first round
    assert not np.allclose(with_more_steps[1].params, other[1].params, rtol=1e-6)


def test_with_the_safeguard_the_function_never_rises():
    def mean(x):
        return np.mean([value(i, np.asarray(x)) for i in range(3)])

    for guarded in (True, False):
        states, rows = rounds([[0, 1, 2]] * 5, lr=1.3, safeguard=guarded)
        seen = np.array([mean(START), *(mean(s.params) for s in states)])
        np.testing.assert_allclose([m.extra.value for m in rows], seen[:-1], rtol=1e-12)
        assert (np.diff(seen) <= 0).all() == guarded  # the step is far too long
        # In the first round all are new, and have no use for features.
        assert [int(m.bytes_up) for m in rows[:2]] == [8 * (3 + 1 + guarded), 8 * (3 + 30 + 1 + guarded)]
        assert [int(m.bytes_down) for m in rows[:2]] == [8 * (3 + 3 * guarded), 8 * (3 + 30 + 3 * guarded)]


def test_the_oldest_queries_make_room():
    states, _ = rounds([[0, 1, 2]] * 5)
    history = states[-1].memories.rows.history
    np.testing.assert_array_equal(history.asked, 5 + 6 + 4 * (4 + 6))
    stored = np.asarray(history.points[0])
    # 51 queries in a ring of 40: the last one, which is the client's last model, lies in row 50 mod 40.
    np.testing.assert_array_equal(stored[10], states[-1].memories.rows.last[0])
    for row, y in zip(stored, np.asarray(history.values[0]), strict=True):
        np.testing.assert_allclose(value(0, row), y, rtol=1e-12)


def test_accuracy_is_reported_and_changes_nothing():
    linear = {"noise": 1e-6, "survey": 6, "neighbors": 20}
    states, rows = rounds([[0, 1, 2]] * 3, diagnose=True, **linear)
    plain, without = rounds([[0, 1, 2]] * 3, **linear)
    np.testing.assert_allclose(states[-1].params, plain[-1].params, rtol=1e-9)
    assert without[0].extra.accuracy == ()
    assert rows[-1].extra.accuracy.cosine > 0.99
    assert rows[-1].extra.accuracy.error < 0.15
    assert rows[0].extra.accuracy.error > rows[-1].extra.accuracy.error


def test_one_step_without_a_correction_is_a_step_along_the_surrogate():
    states, _ = rounds([[0]], num_steps=1, num_clients=1, clients_=population(CENTERS[:1]))
    history = ([], [])
    survey_key, local_key, _ = jax.random.split(jax.random.key(0), 3)
    points = [START, *box(keys_of(survey_key, 0, 0), START, SIZES["radius"], SIZES["initial"])]
    history[0].extend(points), history[1].extend(value(0, p) for p in points)
    more, found = most_uncertain(keys_of(local_key, 0, 0), history, START, SIZES["radius"], 6, 2)
    history[0].extend(more), history[1].extend(value(0, p) for p in more)
    x, u, scale = closest(history, START, 12)
    g = scale * slopes(START, x, found).T @ solve(covariance(x, found), u)
    np.testing.assert_allclose(states[0].params, START - 0.05 * g, atol=1e-7)


def test_it_descends_with_the_other_kernel():
    states, rows = rounds([ALL] * 3, kernel="rbf")
    assert np.mean([value(i, np.asarray(states[-1].params)) for i in range(3)]) < rows[0].extra.value
