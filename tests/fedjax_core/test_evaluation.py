"""Global and per-client evaluation against sums written out."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import (
    HostPopulation,
    Population,
    Weighted,
    client_statistics,
    evaluate,
    evaluate_clients,
    evaluate_examples,
    evaluate_personal,
)

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
    got = client_statistics(jnp.asarray([*values, np.nan]))
    np.testing.assert_allclose(got.mean, values.mean())
    np.testing.assert_allclose(got.std, values.std())
    np.testing.assert_allclose(got.worst_decile, values[:3].mean())
    np.testing.assert_allclose(
        client_statistics(jnp.asarray(values), higher_is_better=False).worst_decile, values[-3:].mean()
    )


def every_evaluator(metric, population, batch_size=4):
    """Means by each of the evaluators of one model: (over all examples, per client, per client with a model each)."""
    number = population.num_clients

    @jax.jit
    def evaluated(population):
        return (
            evaluate(metric, jnp.zeros(2), population.examples, batch_size=batch_size),
            evaluate_clients(metric, jnp.zeros(2), population, batch_size=batch_size),
            evaluate_personal(metric, jnp.zeros((number, 2)), population, jnp.arange(number), batch_size=batch_size),
        )

    return evaluated(population)


def means_by_hand(values, weights):
    ends = np.cumsum([0, *SIZES])
    with np.errstate(invalid="ignore"):
        return [np.sum(values[a:b] * weights[a:b]) / np.sum(weights[a:b]) for a, b in pairwise(ends)]


def test_numbers_of_every_kind_give_the_same_means_everywhere(population):
    kinds = (bool, jnp.uint8, jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32)

    def metric(params, batch):
        large = 200 * (batch["y"] % 2)  # 256 of them are too many for a byte
        return {"hit": [(batch["x"][:, 0] > 0).astype(k) for k in kinds], "large": [large.astype(k) for k in kinds[1:]]}

    hit, large = np.asarray(population.examples["x"][:, 0] > 0), 200 * (np.arange(sum(SIZES)) % 2)
    for found in every_evaluator(metric, population):
        for name, truth in (("hit", hit), ("large", large)):
            expected = means_by_hand(truth, np.ones(len(truth))) if found[name][0].ndim else truth.mean()
            for dtype, value in zip(kinds[-len(found[name]) :], found[name], strict=True):
                np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=5e-3)
                assert value.dtype == (dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float))
    raw = jax.eval_shape(lambda: evaluate_examples(metric, jnp.zeros(2), population.examples))
    assert [value.dtype for value in raw["hit"]] == [jnp.dtype(kind) for kind in kinds]  # as the metric gives them


def test_short_floats_of_many_examples():
    sizes = [5, 3000, 700, 0]
    x = np.random.default_rng(0).uniform(size=sum(sizes)).astype(np.float32)
    many = Population.from_sizes({"x": x}, sizes)

    def metric(params, batch):
        return [(batch["x"] > 0.5).astype(d) for d in (jnp.bfloat16, jnp.float16)]

    expected = [np.mean(x[a:b] > 0.5) if b > a else np.nan for a, b in pairwise(np.cumsum([0, *sizes]))]
    for dtype in (0, 1):
        overall, clients, personal = every_evaluator(metric, many, 128)
        np.testing.assert_allclose(float(overall[dtype]), np.mean(x > 0.5), rtol=4e-3)
        for found in (clients, personal):
            np.testing.assert_allclose(np.asarray(found[dtype], np.float64), expected, rtol=4e-3)
    rough = client_statistics(jnp.asarray(x, jnp.bfloat16))
    np.testing.assert_allclose([float(rough.mean), float(rough.std)], [x.mean(), x.std()], rtol=1e-2)


def test_weighted_values(population):
    """Texts of several lengths: the tokens count, a text without one counts for nothing, whatever its value is."""
    weights = np.array([0, *np.arange(1, sum(SIZES)) % 4])
    weights[3:10] = 0  # all that client 2 has

    def metric(params, batch):
        weight = jnp.where((batch["y"] >= 3) & (batch["y"] < 10), 0, batch["y"] % 4)
        pair = Weighted(jnp.where(weight > 0, batch["x"][:, 0], jnp.nan), weight)
        return {"score": pair, "two": pair._replace(value=batch["x"])}

    values = np.asarray(population.examples["x"])
    overall, clients, personal = every_evaluator(metric, population)
    np.testing.assert_allclose(overall["score"], np.average(values[:, 0], weights=weights))
    np.testing.assert_allclose(overall["two"], np.average(values, axis=0, weights=weights))
    expected = np.stack([means_by_hand(values[:, k], weights) for k in (0, 1)], axis=1)
    assert np.isnan(expected[[1, 2]]).all()
    for found in (clients, personal):
        np.testing.assert_allclose(found["score"], expected[:, 0])
        np.testing.assert_allclose(found["two"], expected)
    raw = evaluate_examples(metric, jnp.zeros(2), population.examples, batch_size=5)["score"]
    np.testing.assert_array_equal(raw.weight, weights)


def test_no_examples_and_no_clients():
    empty = Population.from_sizes({"x": np.zeros((0, 2), np.float32), "y": np.zeros(0, np.int32)}, [0, 0])
    overall, clients, personal = every_evaluator(metric_fn, empty)
    assert np.isnan(overall["score"])
    assert np.isnan(clients["score"]).all()
    assert np.isnan(personal["score"]).all()
    assert evaluate_examples(metric_fn, PARAMS, empty.examples)["score"].shape == (0,)


def test_populations_on_the_host_and_numbers_that_do_not_fit_are_refused(population):
    """The rows of a `HostPopulation` may lie in another order than its clients, so its examples alone will not do."""
    host = HostPopulation.from_sizes(jax.tree.map(np.asarray, population.examples), SIZES)
    with pytest.raises(TypeError, match=r"population must be a Population, got HostPopulation: pass .*to_device"):
        evaluate_clients(metric_fn, PARAMS, host)
    with pytest.raises(TypeError, match=r"population must be a Population, got HostPopulation: pass .*to_device"):
        evaluate_personal(metric_fn, jnp.zeros((5, 2)), host, jnp.arange(5))
    with pytest.raises(TypeError, match=r"examples must be a pytree of arrays .* got a Population"):
        evaluate(metric_fn, PARAMS, population)
    with jax.enable_x64(False):
        for wide in (np.array([2**33 + 5]), np.array([1e300])):
            with pytest.raises(ValueError, match="does not fit"):
                evaluate(lambda params, batch: batch["y"], PARAMS, {"y": wide})


WRONG = [
    ("an average", lambda b: {"loss": b["x"][:, 0], "accuracy": jnp.mean(b["x"])}, ["metric['accuracy']", "float64[]"]),
    ("a Python number", lambda b: {"accuracy": 0.5}, ["metric['accuracy']", "float 0.5"]),
    ("nothing", lambda b: {"loss": b["x"][:, 0], "accuracy": None}, ["metric['accuracy']", "NoneType"]),
    ("an empty tree", lambda b: {}, ["returned nothing"]),
    ("a string", lambda b: ["high"], ["metric[0]", "str 'high'"]),
    ("complex numbers", lambda b: b["x"][:, 0] * 1j, ["metric is complex", "real number"]),
    ("classes first", lambda b: {"accuracy": b["x"].T}, ["metric['accuracy']", "float64[2, "]),
    ("keys", lambda b: jax.random.split(jax.random.key(0), len(b["x"])), ["metric is key<fry>"]),
    ("a weight for all", lambda b: {"f1": Weighted(b["x"][:, 0], jnp.ones(()))}, ["metric['f1'] (its weight)"]),
    ("a sum in a pair", lambda b: {"f1": Weighted(b["x"].sum(), b["x"][:, 0])}, ["metric['f1']", "float64[]"]),
]


@pytest.mark.parametrize(("values", "words"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_metrics_that_cannot_be_averaged_are_refused_by_name_in_every_evaluator(population, values, words):
    def metric(params, batch):
        return values(batch)

    calls = [
        lambda: evaluate(metric, PARAMS, population.examples),
        lambda: evaluate_examples(metric, PARAMS, population.examples),
        lambda: evaluate_clients(metric, PARAMS, population),
        lambda: evaluate_personal(metric, jnp.zeros((5, 2)), population, jnp.arange(5)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="metric") as error:
            jax.eval_shape(call)
        assert all(word in str(error.value) for word in words), error.value


def test_a_metric_of_the_whole_batch_is_given_the_mask(population):
    """How far each example is from the mean of its batch: with one batch a client, padding must not be in that mean."""

    def metric(params, batch, mask):
        x = batch["x"][:, 0]
        return jnp.square(x - jnp.sum(jnp.where(mask, x, 0)) / jnp.sum(mask))

    x, ends, batch_size = np.asarray(population.examples["x"][:, 0]), np.cumsum([0, *SIZES]), 8

    def one(a, b):  # batches of a client's own
        rows = [x[k : min(k + batch_size, b)] for k in range(a, b, batch_size)]
        return sum(np.square(r - r.mean()).sum() for r in rows) / max(b - a, 1) if b > a else np.nan

    _, _, personal = every_evaluator(metric, population, batch_size)
    np.testing.assert_allclose(personal, [one(a, b) for a, b in pairwise(ends)], rtol=1e-6)
