"""Queries, finite differences and surrogates: dense NumPy, a SciPy optimum, and what must hold of any of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import qmc

from algorithms.zeroth_order import estimators, surrogate
from fedjax_core import Batch

D, N = 4, 20
NOISE = 1e-6
KERNELS = pytest.mark.parametrize("kernel", ["matern", "rbf"])
X = np.array([0.3, 0.5, 0.2, 0.6])


def correlation(kernel, s):
    t = np.sqrt(5) * s
    return (1 + t + t**2 / 3) * np.exp(-t) if kernel == "matern" else np.exp(-(s**2) / 2)


def points(count=N, seed=0, width=0.3):
    return X + width * (2 * qmc.Halton(D, seed=seed).random(count) - 1)


def values(x):
    return np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] - 2 * x[:, 3] ** 2


def stored(x=None, capacity=32, dtype=np.float64):
    x = points() if x is None else x
    history = surrogate.empty_history(capacity, jnp.asarray(X, dtype))
    return surrogate.push(history, jnp.asarray(x, dtype), jnp.asarray(values(x), dtype))


def near(history, count=24):
    return surrogate.nearest(history, history.points.dtype.type(X), count=count)


def posterior(history, kernel, lengthscale):
    return surrogate.condition(near(history), jnp.asarray(lengthscale), kernel=kernel, noise=NOISE)


def batch(d=D):
    zero = jnp.int32(0)
    return Batch({"a": jnp.zeros((1, d))}, jnp.ones(1, bool), jax.random.key(0), zero, zero, zero + 1)


def dense(kernel, lengthscale, z, x=None):
    """Mean float[d] and variance of the gradient at X + z, in units of the scaled values, with nothing clever."""
    x = points() if x is None else x
    y = values(x)
    u = (y - y.min()) / (y.max() - y.min())
    k = correlation(kernel, np.linalg.norm(x[:, None] - x, axis=-1) / lengthscale) + NOISE * np.eye(len(x))
    offset = X + z - x
    s = np.linalg.norm(offset, axis=1) / lengthscale
    h = 5 / 3 * (1 + np.sqrt(5) * s) * np.exp(-np.sqrt(5) * s) if kernel == "matern" else np.exp(-(s**2) / 2)
    slope = -h[:, None] * offset / lengthscale**2
    prior = D * (5 / 3 if kernel == "matern" else 1) / lengthscale**2
    return slope.T @ np.linalg.solve(k, u) * (y.max() - y.min()), prior - np.trace(slope.T @ np.linalg.solve(k, slope))


@pytest.mark.quick
@KERNELS
def test_gradient_and_its_variance_are_those_of_a_dense_computation(kernel):
    process = posterior(stored(), kernel, 0.7)
    mean, _ = dense(kernel, 0.7, np.zeros(D))
    np.testing.assert_allclose(surrogate.gradient_mean(process, kernel=kernel), mean, rtol=1e-8)
    z = np.random.default_rng(1).uniform(-0.4, 0.4, (7, D))
    expected = [dense(kernel, 0.7, row)[1] for row in z]
    np.testing.assert_allclose(surrogate.gradient_variance(process, jnp.asarray(z), kernel=kernel), expected, rtol=1e-7)


@KERNELS
def test_lengthscale_is_the_optimum_that_scipy_finds(kernel):
    got = surrogate.fit_lengthscale(near(stored()), kernel=kernel, noise=NOISE)
    x = points()
    r, y = np.linalg.norm(x[:, None] - x, axis=-1), values(x)
    u = (y - y.min()) / (y.max() - y.min())

    def cost(log_l):
        k = correlation(kernel, r / np.exp(log_l)) + NOISE * np.eye(N)
        return u @ np.linalg.solve(k, u) / 2 + np.linalg.slogdet(k)[1] / 2

    typical = np.sqrt((r**2).sum() / (N * (N - 1)))
    grid = np.log(typical) + np.linspace(np.log(0.1), np.log(100), 300)
    start = int(np.argmin([cost(g) for g in grid]))
    best = minimize_scalar(cost, bounds=(grid[start - 1], grid[start + 1]), method="bounded", options={"xatol": 1e-10})
    np.testing.assert_allclose(np.log(got), best.x, atol=1e-6)


def test_lengthscale_stays_in_its_range():
    constant = stored()._replace(values=jnp.zeros(32))  # every lengthscale explains it, the longest best
    lone = near(stored(points(1)))  # no distances at all
    fit = partial(surrogate.fit_lengthscale, kernel="matern", noise=NOISE, shortest=0.5, longest=2.0)
    r = np.linalg.norm(points()[:, None] - points(), axis=-1)
    typical = np.sqrt((r**2).sum() / (N * (N - 1)))
    np.testing.assert_allclose(fit(near(constant)), 2 * typical, rtol=1e-6)
    rough = stored()._replace(values=jnp.asarray(np.resize([1.0, -1.0], 32)))  # no point is like its neighbors
    np.testing.assert_allclose(fit(near(rough), shortest=1.5, longest=6.0), 1.5 * typical, rtol=1e-6)
    assert 0.5 <= fit(lone) <= 2.0


@pytest.mark.quick
@KERNELS
def test_variance_is_the_prior_without_data_never_negative_and_never_grows(kernel):
    z = jnp.asarray(np.random.default_rng(2).uniform(-0.3, 0.3, (9, D)))
    variance = [
        np.asarray(surrogate.gradient_variance(posterior(stored(points(n)), kernel, 0.4), z, kernel=kernel))
        for n in (1, 2, 5, 12, 20)
    ]
    empty = surrogate.gradient_variance(
        posterior(surrogate.empty_history(32, jnp.asarray(X)), kernel, 0.4), z, kernel=kernel
    )
    prior = D * (5 / 3 if kernel == "matern" else 1) / 0.4**2
    np.testing.assert_allclose(empty, prior, rtol=1e-14)
    for before, after in zip([np.asarray(empty), *variance], variance, strict=False):
        assert (after <= before + 1e-9 * prior).all()
        assert (after >= 0).all()
    assert (variance[-1] < 0.99 * prior).all()


@KERNELS
def test_gradient_of_a_linear_function_is_its_slope_and_of_one_point_zero(kernel):
    slope = np.array([1.0, -2.0, 0.5, 3.0])
    x = points(32, width=0.05)
    history = surrogate.push(surrogate.empty_history(32, jnp.asarray(X)), jnp.asarray(x), jnp.asarray(x @ slope))
    found = surrogate.fit_lengthscale(near(history), kernel=kernel, noise=NOISE)
    got = surrogate.gradient_mean(posterior(history, kernel, found), kernel=kernel)
    np.testing.assert_allclose(got, slope, rtol=0.02)
    alone = surrogate.push(surrogate.empty_history(32, jnp.asarray(X)), jnp.asarray(X[None]), jnp.ones(1))
    np.testing.assert_array_equal(surrogate.gradient_mean(posterior(alone, kernel, 1.0), kernel=kernel), 0)


@KERNELS
def test_single_precision_agrees_with_double_within_the_condition_number(kernel):
    """The same lengthscale: what differs is a solve, whose error is condition number times epsilon, at worst."""
    single, double = (
        surrogate.gradient_mean(posterior(stored(dtype=dtype), kernel, dtype(0.7)), kernel=kernel)
        for dtype in (np.float32, np.float64)
    )
    assert single.dtype == np.float32
    r = np.linalg.norm(points()[:, None] - points(), axis=-1)
    condition = np.linalg.cond(correlation(kernel, r / 0.7) + NOISE * np.eye(N))
    error = np.linalg.norm(single - double) / np.linalg.norm(double)
    assert error < condition * np.finfo(np.float32).eps
    assert error < 0.02


@KERNELS
def test_points_that_nearly_coincide_have_a_factor_in_single_precision(kernel):
    history = stored(X + 1e-4 * (points() - X), dtype=np.float32)
    found = surrogate.fit_lengthscale(near(history), kernel=kernel, noise=NOISE)
    process = posterior(history, kernel, found)
    assert np.isfinite(process.factor).all()
    assert np.isfinite(surrogate.gradient_mean(process, kernel=kernel)).all()


@pytest.mark.quick
def test_history_is_a_ring_and_neighbors_are_the_nearest():
    history = surrogate.empty_history(5, jnp.asarray(X))
    x = points(8)
    for i in range(0, 8, 2):
        history = surrogate.push(history, jnp.asarray(x[i : i + 2]), jnp.asarray(values(x[i : i + 2])))
    assert history.asked == 8
    kept = x[3:]  # the last five
    order = np.argsort(np.linalg.norm(kept - X, axis=1))
    got = near(history, 3)
    np.testing.assert_allclose(got.offsets, (kept - X)[order[:3]], atol=1e-15)
    y = values(kept[order[:3]])
    np.testing.assert_allclose(got.targets, (y - y.min()) / (y.max() - y.min()), atol=1e-12)
    np.testing.assert_allclose(got.targets * got.scale + got.low, y, atol=1e-12)


def test_a_query_without_a_value_is_passed_over():
    history = stored()
    spoiled = history._replace(values=history.values.at[4].set(jnp.nan))
    without = stored(np.delete(points(), 4, axis=0))
    for got, expected in zip(near(spoiled), near(without), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_clients_at_once_give_what_each_gives_alone():
    histories = [stored(points(N, seed)) for seed in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *histories)

    def gradient(history):
        neighbors = surrogate.nearest(history, jnp.asarray(X), count=24)
        found = surrogate.fit_lengthscale(neighbors, kernel="matern", noise=NOISE)
        return surrogate.gradient_mean(
            surrogate.condition(neighbors, found, kernel="matern", noise=NOISE), kernel="matern"
        )

    np.testing.assert_allclose(
        jax.jit(jax.vmap(gradient))(together), [gradient(history) for history in histories], rtol=1e-6
    )


@pytest.mark.quick
def test_features_stand_for_the_kernel_and_their_gradient_is_exact_and_linear():
    features = surrogate.random_features(0, 20000, 0.5, jnp.asarray(X))
    w, b = np.asarray(features.frequencies), np.asarray(features.phases)

    def phi(x):
        return np.sqrt(2 / 20000) * np.cos(x @ w + b)

    x = points(6)
    exact = np.exp(-((np.linalg.norm(x[:, None] - x, axis=-1) / 0.5) ** 2) / 2)
    np.testing.assert_allclose(phi(x) @ phi(x).T, exact, atol=0.03)
    nu = np.random.default_rng(3).normal(size=(2, 20000))
    steps = 1e-5 * np.eye(D)
    difference = (phi(X + steps) - phi(X - steps)) @ nu.T / 2e-5
    s = [np.asarray(surrogate.features_gradient(features, jnp.asarray(row), jnp.asarray(X))) for row in nu]
    np.testing.assert_allclose(np.transpose(s), difference, rtol=1e-6, atol=1e-6)
    mixed = surrogate.features_gradient(features, jnp.asarray(0.3 * nu[0] + 0.7 * nu[1]), jnp.asarray(X))
    np.testing.assert_allclose(mixed, 0.3 * s[0] + 0.7 * s[1], atol=1e-12)


def test_fitted_weights_are_the_ridge_regression_of_the_values():
    features = surrogate.random_features(1, 50, 1.0, jnp.asarray(X))
    got = surrogate.fit_weights(features, near(stored()), jnp.asarray(X), ridge=1e-3)
    x, y = points(), values(points())
    phi = np.sqrt(2 / 50) * np.cos(x @ np.asarray(features.frequencies) + np.asarray(features.phases))
    expected = np.linalg.solve(phi.T @ phi + 1e-3 * np.eye(50), phi.T @ (y - y.min()))  # the primal form
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize("q", [1, 3, D])
def test_directions_are_orthonormal_and_differences_of_a_linear_function_exact(q):
    slope = np.array([1.0, -2.0, 0.5, 3.0])
    s = np.asarray(estimators.orthonormal_directions(jax.random.key(4), q, jnp.asarray(X)))
    np.testing.assert_allclose(s @ s.T, np.eye(q), atol=1e-12)
    estimate = estimators.finite_differences(
        lambda x, examples, key: jnp.asarray([x @ slope]), num_directions=q, mu=0.01
    )
    value, g = estimate(jnp.asarray(X), batch())
    np.testing.assert_allclose(value, X @ slope)
    if q == D:
        np.testing.assert_allclose(g, slope / D, rtol=1e-10)
    else:  # the part of the slope in the span of the directions
        assert np.linalg.norm(g) < np.linalg.norm(slope) / q
    assert estimators.num_queries(q, jnp.asarray(X)) == q + 1


def test_differences_of_a_quadratic_are_off_by_half_mu_times_the_curvature():
    a = np.diag([1.0, 2.0, 3.0, 4.0])
    key = jax.random.split(batch().key)[0]
    s = np.asarray(estimators.orthonormal_directions(key, 2, jnp.asarray(X)))
    estimate = estimators.finite_differences(
        lambda x, examples, key: jnp.asarray([x @ a @ x / 2]), num_directions=2, mu=0.1
    )
    _, g = estimate(jnp.asarray(X), batch())
    expected = (s @ a @ X + 0.05 * np.einsum("si,ij,sj->s", s, a, s)) @ s / 2
    np.testing.assert_allclose(g, expected, rtol=1e-11)


def test_estimates_average_to_the_gradient_over_d():
    slope = np.array([1.0, -2.0, 0.5, 3.0])
    estimate = estimators.finite_differences(
        lambda x, examples, key: jnp.asarray([x @ slope]), num_directions=2, mu=0.01
    )
    keys = jax.random.split(jax.random.key(5), 4000)
    _, g = jax.jit(jax.vmap(lambda key: estimate(jnp.asarray(X), batch()._replace(key=key))))(keys)
    error = np.std(g, axis=0) / np.sqrt(len(keys))
    assert (np.abs(np.mean(g, axis=0) - slope / D) < 4.5 * error).all()


def test_more_directions_than_parameters_are_as_many_as_parameters():
    assert estimators.num_queries(20, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}) == 8


def host_values(queries):
    return [examples["a"].sum(1) + params["w"].sum() for params, examples in queries]


def test_a_host_function_gets_all_queries_of_a_step_at_once():
    calls = []

    def function(queries):
        calls.append(queries)
        return host_values(queries)

    loss = estimators.host_loss(function)
    params = {"w": jnp.arange(24.0).reshape(2, 3, 4)}  # two clients, three queries each
    examples = {"a": jnp.arange(10.0).reshape(2, 5, 1)}  # five examples a client
    over_queries = jax.vmap(lambda p, e: loss(p, e), (0, None))
    got = jax.jit(jax.vmap(over_queries))(params, examples)
    assert len(calls) == 1
    assert [query[0]["w"].shape for query in calls[0]] == [(4,)] * 6
    assert calls[0][0][1]["a"].shape == (5, 1)
    expected = np.asarray(params["w"]).sum(-1)[:, :, None] + np.asarray(examples["a"])[:, None, :, 0]
    np.testing.assert_array_equal(got, expected)


def test_a_host_function_of_the_wrong_shape_is_told_so():
    loss = estimators.host_loss(lambda queries: [[0.0]] * len(queries))
    with pytest.raises(Exception, match=r"float\[5\] for each of 1 queries"):
        jax.block_until_ready(loss({"w": jnp.zeros(4)}, {"a": jnp.zeros((5, 1))}))
