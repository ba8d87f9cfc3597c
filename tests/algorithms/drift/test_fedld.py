"""FedLD: the spec's figures, traces of an independent NumPy program, and the properties of penalty and aggregation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.drift.fedld import principal_mean
from fedjax_core import Population, reference
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_START,
    assert_trees_close,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

KEY = jax.random.key(0)
STEPS = {"batch_size": 1, "num_steps": 2}
ROWS = np.array([[3.0, 0, 4], [1, 2, 2], [0, -1, 0]])
rebuild = jax.jit(principal_mean)


def by_hand(rows, kept, p=None):
    """The released code's order of steps: directions one by one, each client's projection rescaled."""
    n = len(rows)
    p = np.full(n, 1 / n) if p is None else np.asarray(p) / np.sum(p)
    weighted = np.sqrt(p)[:, None] * rows
    s, e = np.linalg.eigh(weighted @ weighted.T)
    revised = np.zeros_like(rows)
    for j in np.argsort(-s)[: max(int(n * kept), 1)]:
        w = weighted.T @ e[:, j]
        if np.linalg.norm(w) < 1e-12:
            continue
        for i, g in enumerate(rows):
            projection = (g @ w) * w / (w @ w)
            if np.linalg.norm(projection) > 1e-12:
                length = s[j] / s.sum() * np.linalg.norm(g)
                revised[i] += length * projection / np.linalg.norm(projection)
    return p @ revised


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0.4, (1.15288278, 0.34735500, 1.64918184)),
        (0.8, (1.18063124, 0.22663440, 1.65521039)),
        (1.0, (1.18085889, 0.22667832, 1.65504200)),
    ],
)
def test_golden_rows(kept, expected):
    np.testing.assert_allclose(rebuild(ROWS, np.ones(3), kept), expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(by_hand(ROWS, kept), expected, rtol=0, atol=1e-7)


@pytest.mark.quick
@pytest.mark.parametrize(("kept", "expected"), [(0.5, (0.8, 0, 0)), (1.0, (0.8, 0.1, 0))])
def test_orthogonal_rows(kept, expected):
    rows = np.array([[2.0, 0, 0], [0, 1, 0], [9, 9, 9]])
    np.testing.assert_allclose(rebuild(rows, np.array([1.0, 1, 0]), kept), expected, atol=1e-12)


def test_equal_rows_come_back_whatever_is_kept():
    row = np.random.default_rng(0).normal(size=(2, 3, 2))
    for kept in (0.01, 0.5, 1.0):
        np.testing.assert_allclose(rebuild(np.stack([row] * 4), np.ones(4), kept), row, rtol=1e-12)
    # Leaves of one number are always of that kind: the plain mean.
    numbers = np.array([3.0, -1.0, 0.5])
    np.testing.assert_allclose(rebuild(numbers, np.ones(3), 1.0), numbers.mean(), rtol=1e-12)
    np.testing.assert_allclose(rebuild(numbers[:1], np.ones(1), 0.8), 3.0, rtol=1e-12)


def test_the_result_moves_with_the_rows():
    rng = np.random.default_rng(1)
    rows, rotation = rng.normal(size=(5, 6)), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    expected = rebuild(rows, np.ones(5), 0.8)
    for factor in (1e-9, 1e9):
        np.testing.assert_allclose(rebuild(factor * rows, np.ones(5), 0.8), factor * expected, rtol=1e-9)
    np.testing.assert_allclose(rebuild(rows @ rotation, np.ones(5), 0.8), expected @ rotation, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rebuild(rows[::-1], np.ones(5), 0.8), expected, rtol=1e-9)
    assert np.linalg.norm(expected) <= np.linalg.norm(rows, axis=1).mean()


def test_slots_without_weight_do_not_count():
    """Neither as rows, nor in the number of directions; not even if they hold no numbers."""
    rng = np.random.default_rng(2)
    rows, p = rng.normal(size=(7, 4)), np.array([1.0, 0, 2, 0, 0.5, 1, 0])
    rows[[1, 3, 6]] = 0
    expected = by_hand(rows[p > 0], 0.5, p[p > 0])
    np.testing.assert_allclose(rebuild(rows, p, 0.5), expected, rtol=1e-9)
    rows[[1, 3, 6]] = np.nan
    np.testing.assert_allclose(rebuild(rows, p, 0.5), expected, rtol=1e-9)
    np.testing.assert_array_equal(rebuild(rows, np.zeros(7), 0.5), 0)


def test_the_number_of_directions_is_rounded_down_in_both_precisions():
    rows = np.linalg.qr(np.random.default_rng(3).normal(size=(10, 10)))[0] * np.arange(1, 11)[:, None]
    for kept, count in ((0.7, 7), (0.69, 6), (0.3, 3), (0.05, 1)):  # orthogonal rows: the count is that of the parts
        for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-4)):
            got = rebuild(rows.astype(dtype), np.ones(10), np.asarray(kept, dtype))
            parts = np.abs(rows @ np.asarray(got, np.float64))
            assert got.dtype == dtype
            assert np.sum(parts > tolerance) == count


def q3_logits(params, batch, key):
    """A_i (y - b_i), as the scores of two classes."""
    return jnp.einsum("bij,bj->bi", batch["A"], params - batch["b"])


def make(logits=q3_logits, loss_fn=quadratic_loss, **settings):
    return algorithms.fedld(loss_fn, optax.sgd(0.1), logits=logits, **{**STEPS, **settings})


def run(algorithm, cohorts, population=None, start=Q3_START):
    """Global models after every round and the metrics, through the plain loop, which compiles nothing."""
    population = population or q3_population()
    state, models, rows = algorithm.init(jax.tree.map(jnp.asarray, start)), [], []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, population.cohort(ids), KEY)
            models.append(state.params)
            rows.append(metrics)
    return models, rows


def penalty_slope(z, penalized):
    """Gradient of log(1 + ||q||^2) in the logits z."""
    if penalized == "logits":
        return 2 * z / (1 + z @ z)
    q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return 2 * q * (q - q @ q) / (1 + q @ q)


@pytest.mark.quick
@pytest.mark.parametrize(("cohorts", "penalized"), [(FULL, "probabilities"), (PART, "logits")])
def test_golden_trace(cohorts, penalized):
    models, _ = run(make(lam=2.0, kept=0.7, penalized=penalized, server_lr=0.8), cohorts)
    x = Q3_START
    for t, ids in enumerate(cohorts):
        rows = []
        for i in ids:
            y = x
            for _ in range(2):
                z = Q3_A[i] @ (y - Q3_B[i])
                y = y - 0.1 * (z + 2.0 * Q3_A[i].T @ penalty_slope(z, penalized))
            rows.append(y - x)
        x = x + 0.8 * (np.mean(rows, 0) if t == 0 else by_hand(np.array(rows), 0.7))
        np.testing.assert_allclose(models[t], x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_without_penalty_and_directions_it_is_fedavg(cohorts):
    expected = run(algorithms.fedavg(quadratic_loss, optax.sgd(0.1), server_lr=0.5, **STEPS), cohorts)
    got = run(make(lam=0.0, aggregation="mean", server_lr=0.5), cohorts)
    assert_trees_close(got, expected, rtol=1e-12)


def first_loss(q, **settings):
    """The reported loss of one step on examples with these probabilities and no other loss."""
    algorithm = make(
        lambda params, batch, key: batch["x"],
        lambda params, batch, key: jnp.zeros(len(batch["x"])),
        lam=1.0,
        batch_size=4,
        num_steps=1,
        **settings,
    )
    population = Population.from_clients([{"x": np.log(np.asarray(q, float))}])
    return float(run(algorithm, [[0]], population)[1][0].loss)


def test_value_of_the_penalty():
    sure, q = (0.999999, 5e-7, 5e-7), (0.7, 0.2, 0.1)
    assert first_loss([q, q, q]) == pytest.approx(0.43178242, abs=1e-8)
    assert first_loss([q, q], penalty="batch") == pytest.approx(0.73236789, abs=1e-8)
    assert first_loss([sure]) == pytest.approx(np.log(2), abs=1e-5)
    assert first_loss([(1 / 3, 1 / 3, 1 / 3)]) == pytest.approx(np.log(4 / 3), rel=1e-9)
    z = np.log(np.array(q))
    assert first_loss([q], penalized="logits") == pytest.approx(np.log1p(z @ z), rel=1e-9)


def test_padding_has_no_part_in_the_penalty_of_a_batch():
    """Batches of five slots for clients of four, six and one examples, against the loop that has no padding."""
    algorithm = algorithms.fedld(
        softmax_loss,
        optax.sgd(0.1),
        logits=lambda params, batch, key: batch["x"] @ params["w"] + params["b"],
        lam=5.0,
        penalty="batch",
        batch_size=5,
    )
    population, params = softmax_population((4, 6, 1)), softmax_params()
    models, rows = run(algorithm, [[0, 1, 2]], population, params)
    state, metrics = jax.jit(algorithm.round)(algorithm.init(params), population.cohort([0, 1, 2]), KEY)
    assert_trees_close((state.params, metrics), (models[0], rows[0]), rtol=1e-12)


def test_bytes_down_and_up():
    _, rows = run(make(), FULL[:1])
    assert (rows[0].bytes_down, rows[0].bytes_up) == (16, 16)
