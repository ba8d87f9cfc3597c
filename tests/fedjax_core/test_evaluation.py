"""Global and per-client evaluation against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import Population, evaluate, evaluate_clients, evaluate_examples, evaluate_personal, spread

SIZES = (3, 0, 7, 1, 12)


@pytest.fixture(scope="module")
def population():
    rng = np.random.default_rng(0)
    return Population.from_sizes({"x": rng.normal(size=(sum(SIZES), 2)), "y": np.arange(sum(SIZES))}, SIZES)


def metric_fn(params, batch):
    return {"score": batch["x"] @ params, "y": batch["y"] * 1.0}


PARAMS = jnp.array([1.0, -2.0])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 1000])
def test_every_example_counts_once(population, batch_size):
    values = evaluate_examples(metric_fn, PARAMS, population.examples, batch_size=batch_size)
    np.testing.assert_allclose(values["y"], np.arange(sum(SIZES)))
    np.testing.assert_allclose(values["score"], population.examples["x"] @ PARAMS, rtol=1e-12)
    means = evaluate(metric_fn, PARAMS, population.examples, batch_size=batch_size)
    np.testing.assert_allclose(means["y"], np.mean(np.arange(sum(SIZES))))


def test_one_row_per_client(population):
    rows = jax.jit(lambda p, pop: evaluate_clients(metric_fn, p, pop, batch_size=4))(PARAMS, population)
    for i in range(len(SIZES)):
        own = np.asarray(population.client(i)["x"] @ PARAMS)
        expected = own.mean() if len(own) else np.nan
        np.testing.assert_allclose(rows["score"][i], expected, rtol=1e-12)


def test_personal_models_each_on_its_own_client(population):
    ids = np.array([4, -1, 1, 0, 2])
    models = jnp.stack([PARAMS * (k + 1) for k in range(5)])
    rows = evaluate_personal(metric_fn, models, population, ids, batch_size=4)
    for slot, i in enumerate(ids):
        own = np.asarray(population.client(i)["x"] @ models[slot]) if i >= 0 else np.zeros(0)
        np.testing.assert_allclose(rows["score"][slot], own.mean() if len(own) else np.nan, rtol=1e-12)


def test_spread_over_clients():
    values = np.linspace(0, 1, 25)
    got = spread(jnp.asarray([*values, np.nan]))
    np.testing.assert_allclose(got.mean, values.mean())
    np.testing.assert_allclose(got.std, values.std())
    np.testing.assert_allclose(got.worst_decile, values[:3].mean())
    np.testing.assert_allclose(spread(jnp.asarray(values), higher_is_better=False).worst_decile, values[-3:].mean())
