"""Codecs: unbiased or contractive as they promise, exact at their ends, and what is kept back comes later."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms import messages as parts
from algorithms.messages import codecs
from fedjax_core import sizes
from fedjax_core.messages import with_part
from tests.problems import softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 5, 4))
KEY = jax.random.key(0)


def vectors():
    rng = np.random.default_rng(0)
    one_hot = np.zeros(50)
    one_hot[7] = -3
    return {
        "normal": rng.normal(size=50),
        "equal": np.full(50, -2.0),
        "one_hot": one_hot,
        "zeros": np.zeros(50),
        "ties": np.repeat([1.0, -2.0, 2.0, 0.5, 0.0], 10),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", vectors())
@pytest.mark.parametrize("k", [1, 7, 15, 50])
def test_the_k_largest_are_those_of_a_sort_with_ties_by_index(name, k, dtype):
    x = vectors()[name].astype(dtype)
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    expected = np.zeros_like(x)
    expected[kept] = x[kept]
    sent = jax.jit(lambda x: codecs.spread(sizes.opened(codecs.kept_largest(x, k)), 50))
    found = np.asarray(sent(jnp.asarray(x)))
    np.testing.assert_array_equal(found, expected)
    assert np.sum((x - found) ** 2) <= (1 - k / 50) * np.sum(x**2) * (1 + 1e-6), "contractive"


def trained(part, rounds, method=None):
    """The model after each of some rounds, and the state at the end."""
    method = method or algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    algorithm = with_part(method, part, like=POPULATION)
    state, run = algorithm.init(softmax_params()), jax.jit(algorithm.round)
    models = [algorithm.params(state)]
    for t in range(rounds):
        state, metrics = run(state, POPULATION.cohort([0, 1, 2]), jax.random.key(t))
        models.append(algorithm.params(state))
    return models, state, metrics


def test_what_top_k_keeps_back_is_what_was_not_sent():
    """Telescoping: all that was sent and what is left is all that there was, whoever the client is."""
    part, seen = parts.top_k(0.1), []

    def recording(state, asked, key):
        results, state, info = part.around(state, asked, key)
        return results, state, (results.aggregate, info)

    watched = part._replace(around=recording)
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    algorithm = with_part(method, watched, like=POPULATION)
    state, run = algorithm.init(softmax_params()), jax.jit(algorithm.round)
    sums = 0.0
    for t in range(30):
        x = algorithm.params(state)
        plain, _ = method.round(state.method, POPULATION.cohort([0, 1, 2]), jax.random.key(t))
        wanted = jax.tree.map(jnp.subtract, plain.params, x)
        state, metrics = run(state, POPULATION.cohort([0, 1, 2]), jax.random.key(t))
        sent = jax.tree.map(jnp.subtract, algorithm.params(state), x)
        flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (wanted, sent)]
        sums = sums + flat[0] - flat[1]
        seen.append(metrics)
    left = np.mean(np.asarray(state.passes[0].rows), axis=0)
    np.testing.assert_allclose(sums, left, rtol=1e-9, atol=1e-12)
    assert np.abs(left).max() > 1e-3, "something is kept back"


def test_without_feedback_nothing_is_kept():
    _, state, metrics = trained(parts.top_k(0.3, feedback=False), 2)
    assert state.passes == ((),)
    assert 0 < metrics.extra.passes[0].error < 0.7


def test_clients_that_are_not_drawn_keep_what_they_have():
    algorithm = with_part(
        algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2), parts.top_k(0.1), like=POPULATION
    )
    state = algorithm.init(softmax_params())
    state, _ = algorithm.round(state, POPULATION.cohort([0, 1]), jax.random.key(0))
    rows = np.asarray(state.passes[0].rows)
    assert (rows[:2] != 0).any(axis=1).all()
    assert (rows[2] == 0).all()
    state, _ = algorithm.round(state, POPULATION.cohort([2, -1]), jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(state.passes[0].rows)[:2], rows[:2])


def test_stochastic_rounding_is_unbiased_and_within_its_variance():
    part = parts.stochastic_rounding(2, chunk=16)
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=8, num_steps=1)  # the same gradient each time
    algorithm = with_part(method, part, like=POPULATION)
    state = algorithm.init(softmax_params())
    cohort = POPULATION.cohort([1])
    once = jax.jit(jax.vmap(lambda key: algorithm.params(algorithm.round(state, cohort, key)[0])))
    found = once(jax.random.split(jax.random.key(0), 4000))
    exact = method.params(method.round(state.method, cohort, jax.random.key(0))[0])
    for many, one, x in zip(*map(jax.tree.leaves, (found, exact, algorithm.params(state))), strict=True):
        many, moved = np.asarray(many), np.asarray(one) - np.asarray(x)
        error = many.std(axis=0, ddof=1) / np.sqrt(len(many))
        assert (np.abs(many.mean(axis=0) - one) <= 5 * error + 1e-12).all()
        assert (many.var(axis=0) <= (np.ptp(np.r_[moved.ravel()]) / 3) ** 2 / 4 * 30 + 1e-12).all()


def test_an_upload_of_equal_entries_is_rounded_to_itself():
    for bits in (1, 8):
        part = parts.stochastic_rounding(bits)
        constant = algorithms.fedavg(lambda p, b, k: jnp.sum(p["w"]) * jnp.ones(b["y"].shape), optax.sgd(0.5))
        (_, after), _, _ = trained(part, 1, constant)
        assert np.ptp(np.asarray(after["w"] - softmax_params()["w"])) < 1e-7


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.top_k(0.0), "share must lie in"),
        (lambda: parts.top_k(1.5), "share must lie in"),
        (lambda: parts.stochastic_rounding(0), "bits must be an integer from 1 to 16, got 0"),
        (lambda: parts.stochastic_rounding(17), "bits must be"),
        (lambda: parts.stochastic_rounding(8, chunk=0), "chunk must be an integer of at least 1"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(("share", "sent"), [(0.07, 7), (0.29, 29), (0.071, 8), (0.001, 1), (1.0, 100)])
def test_the_share_of_a_hundred_entries_is_what_it_says(share, sent):
    method = algorithms.fedavg(lambda p, b, k: jnp.sum(p) * jnp.ones(b["y"].shape), optax.sgd(0.1), batch_size=2)
    algorithm = with_part(method, parts.top_k(share), like=POPULATION)
    start = jnp.zeros(100)
    state, _ = algorithm.round(algorithm.init(start), POPULATION.cohort([0]), KEY)
    assert np.count_nonzero(algorithm.params(state)) == sent


# 18 entries: 15 of w, 3 of b.
@pytest.mark.parametrize(
    ("part", "up"),
    [
        (parts.top_k(0.1), 2 * (4 + 5 / 8)),
        (parts.top_k(0.1, feedback=False), 2 * (4 + 5 / 8)),
        (parts.top_k(1.0), 18 * (4 + 5 / 8)),
        (parts.stochastic_rounding(8), 18 + 8),
        (parts.stochastic_rounding(3, chunk=5), 18 * 3 / 8 + 4 * 8),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_metrics_report_the_true_size_of_what_is_sent(part, up, dtype):
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    algorithm = with_part(method, part, like=POPULATION)
    _, metrics = algorithm.round(algorithm.init(softmax_params(dtype=dtype)), POPULATION.cohort([0, -1]), KEY)
    assert float(metrics.bytes_up) == pytest.approx(up, rel=1e-6)
    assert metrics.bytes_down == 18 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("part", [parts.top_k(0.1), parts.stochastic_rounding(8)])
def test_an_upload_of_integers_goes_as_it_is(part):
    """It has no rows that keep nothing, nor bytes of a code."""
    method = algorithms.frl(softmax_loss, optax.sgd(0.1), batch_size=2)
    plain = method.round(method.init(softmax_params(), KEY), POPULATION.cohort([0, 1]), KEY)[1]
    algorithm = with_part(method, part, like=POPULATION)
    state, metrics = algorithm.round(algorithm.init(softmax_params(), KEY), POPULATION.cohort([0, 1]), KEY)
    assert state.passes == ((),)
    assert metrics.bytes_up == plain.bytes_up


def test_scalars_beside_the_coded_entries_count_as_they_are():
    """FedNova uploads the length of its local steps beside the model, Mime its gradients in a pass of their own."""
    one = 2 * (4 + 5 / 8)
    for name, up in (("fednova", one + 2 * 8), ("mime", 2 * one)):
        method = getattr(algorithms, name)(softmax_loss, optax.sgd(0.1), batch_size=2)
        algorithm = with_part(method, parts.top_k(0.1), like=POPULATION)
        _, metrics = algorithm.round(algorithm.init(softmax_params()), POPULATION.cohort([0, 1]), KEY)
        assert metrics.bytes_up == up


LARGE = 2000


def uploading(x, *codecs_around):
    """FedAvg whose only client uploads x once, with codecs around it: what the server makes of it, and the bytes."""
    method = algorithms.fedavg(lambda p, b, k: -jnp.sum(p * x) * jnp.ones(b["y"].shape), optax.sgd(1.0), num_steps=1)
    for part in codecs_around:
        method = with_part(method, part, like=POPULATION)
    state, metrics = method.round(method.init(jnp.zeros(x.size)), POPULATION.cohort([0]), KEY)
    return np.asarray(method.params(state)), float(metrics.bytes_up)


def test_what_top_k_sends_is_rounded_by_a_codec_around_it():
    """Values alone, on a grid of their own; places go as they are, and every byte counts once."""
    x = np.random.default_rng(0).normal(size=LARGE)
    kept = np.sort(np.argsort(-np.abs(x))[:40])
    found, up = uploading(x, parts.top_k(0.02), parts.stochastic_rounding(8, chunk=16))
    assert up == 40 * (1 + 11 / 8) + 3 * 8
    np.testing.assert_array_equal(np.flatnonzero(found), kept)
    grid = np.repeat([np.ptp(x[kept][i : i + 16]) / 255 for i in (0, 16, 32)], 16)[:40]
    assert (np.abs(found - x)[kept] <= grid).all()
    again, up = uploading(x, parts.top_k(0.02), parts.top_k(0.5), parts.stochastic_rounding(8))
    assert up == 20 * (1 + 6 / 8) + 8 + 40 * 11 / 8  # a place among the forty, and the forty places
    np.testing.assert_array_equal(np.flatnonzero(again), np.sort(np.argsort(-np.abs(x))[:20]))


@pytest.mark.parametrize("outer", [parts.top_k(0.1), parts.stochastic_rounding(16)])
def test_codes_are_not_coded_again(outer):
    with pytest.raises(
        TypeError, match=f"{outer.name} stands around a codec that leaves no floats to code: put it near"
    ):
        uploading(np.ones(LARGE), parts.stochastic_rounding(8), outer)
