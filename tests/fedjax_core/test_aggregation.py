"""Means that not all clients have a part in, against plain loops over the uploads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc

CLIENTS = 7
SEGMENTS = np.array([2, 0, 2, 4, 0, 9, -1])  # nobody in 1 and 3; 9 and -1 are no segments
WEIGHTS = np.array([1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 4.0])
RNG = np.random.default_rng(0)
VALUES = {"a": RNG.normal(size=(CLIENTS, 5, 3)), "n": RNG.integers(0, 9, (CLIENTS, 5))}
COUNTS = RNG.integers(0, 3, (CLIENTS, 5)) * (np.arange(5) != 3)  # nobody holds class 3


def aggregated(aggregator, uploads, ids=range(CLIENTS), plan=None):
    """The aggregate where client i uploads `uploads[i]`, leaves [C, ...]."""
    population = fc.Population.from_sizes({"x": np.zeros((CLIENTS, 1))}, [1] * CLIENTS)
    cohort = population.cohort(np.asarray(ids))
    program = fc.ClientProgram(
        lambda shared, own, key: own, lambda shared, own, batch: (own, jnp.zeros(())), lambda shared, own: (own, ())
    )
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[jnp.maximum(cohort.ids, 0)], uploads)
    work = fc.local_work(batch_size=1, num_steps=1)
    return fc.for_each_client(
        program, (), cohort, jax.random.key(0), rows, work=work, weights=WEIGHTS, aggregator=aggregator, plan=plan
    ).aggregate


@pytest.mark.parametrize("plan", [fc.Plan(lanes=1), fc.Plan(lanes=3)])
@pytest.mark.parametrize("ids", [range(CLIENTS), [3, -1, 0, 2], [-1, -1]])
def test_segment_mean_is_a_mean_within_each_segment(ids, plan):
    found = aggregated(fc.segment_mean(5), (SEGMENTS, VALUES), ids, plan)
    share = WEIGHTS / WEIGHTS.mean()
    for segment in range(5):
        members = [i for i in ids if i >= 0 and SEGMENTS[i] == segment]
        assert found.weight[segment] == pytest.approx(sum(share[i] for i in members))
        for name, leaf in VALUES.items():
            expected = sum(share[i] * leaf[i] for i in members) / sum(share[i] for i in members) if members else 0
            np.testing.assert_allclose(found.mean[name][segment], np.broadcast_to(expected, leaf[0].shape), rtol=1e-13)


@pytest.mark.parametrize("plan", [fc.Plan(lanes=1), fc.Plan(lanes=3)])
@pytest.mark.parametrize("ids", [range(CLIENTS), [3, -1, 0, 2], [-1, -1]])
def test_elementwise_mean_weighs_each_entry(ids, plan):
    """Prototypes [5, 3] by the counts [5] of their classes, whose rows nobody holds stay 0."""
    values = VALUES["a"].copy()
    values[COUNTS == 0] = np.nan  # the prototype of a class that a client does not hold
    held = {"p": COUNTS, "q": {"all": COUNTS > 0}}
    found = aggregated(fc.elementwise_mean(), ({"p": values, "q": {"all": VALUES["n"]}}, held), ids, plan)
    share = WEIGHTS / WEIGHTS.mean()
    for weights, leaf, mean, weight in (
        (COUNTS, VALUES["a"], found.mean["p"], found.weight["p"]),
        (COUNTS > 0, VALUES["n"], found.mean["q"]["all"], found.weight["q"]["all"]),
    ):
        for entry in range(5):
            total, summed = 0.0, np.zeros(leaf.shape[2:])
            for i in ids:
                if i >= 0:
                    total += share[i] * weights[i, entry]
                    summed = summed + share[i] * weights[i, entry] * leaf[i, entry]
            assert weight[entry] == pytest.approx(total)
            np.testing.assert_allclose(mean[entry], summed / total if total else 0 * summed, rtol=1e-13, atol=1e-15)


def test_a_negative_weight_does_not_cancel_others_unseen():
    counts = COUNTS.astype(float)
    counts[0, 1] = -1
    found = aggregated(fc.elementwise_mean(), (VALUES["a"], counts), [0, 1, 2], None)
    np.testing.assert_array_equal(np.isnan(found.mean).any(axis=1), np.arange(5) == 1)


def test_one_weight_stands_for_all_leaves_below_it():
    """With the same weight everywhere it is the weighted mean, and with one segment too."""
    uploads = {"a": VALUES["a"], "b": {"c": VALUES["a"][:, 0]}}
    plain = aggregated(fc.weighted_mean(), uploads)
    by_entry = aggregated(fc.elementwise_mean(), (uploads, np.ones(CLIENTS)))
    in_one = aggregated(fc.segment_mean(1), (np.zeros(CLIENTS, np.int32), uploads))
    for ours in (by_entry.mean, jax.tree.map(lambda leaf: leaf[0], in_one.mean)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), ours, plain)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, bool])
def test_means_have_the_dtype_of_what_they_are_means_of(dtype):
    """Sums of short floats are taken in float32: 7 times 20,000 is beyond float16."""
    value = jnp.full((CLIENTS, 2), 20_000, dtype)
    mean = jnp.dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    segments = aggregated(fc.segment_mean(2), (np.ones(CLIENTS, int), value))
    entries = aggregated(fc.elementwise_mean(), (value, jnp.full((CLIENTS, 2), 1000, jnp.int32)))
    for found in (segments.mean[1], entries.mean):
        assert found.dtype == mean
        np.testing.assert_allclose(found.astype(float), value[0].astype(float), rtol=1e-6)


def test_nan_of_one_segment_is_not_that_of_another():
    values = np.where(SEGMENTS[:, None] == 2, np.nan, VALUES["a"][:, 0])
    found = aggregated(fc.segment_mean(5), (SEGMENTS, values))
    assert np.isnan(found.mean[2]).all()
    assert np.isfinite(found.mean[np.array([0, 1, 3, 4])]).all()


@pytest.mark.parametrize("aggregator", [fc.segment_mean(3), fc.elementwise_mean()])
def test_no_rule_for_one_mean_can_take_their_place(aggregator):
    assert aggregator.mean_of is None
    assert fc.mapped(lambda upload: upload, aggregator).mean_of is None


@pytest.mark.parametrize(
    ("make", "uploads", "words"),
    [
        (lambda: fc.segment_mean(0), (), "num_segments must be an integer of at least 1"),
        (lambda: fc.segment_mean(2), VALUES["a"], "needs uploads .index, value., got"),
        (lambda: fc.segment_mean(2), (np.zeros(CLIENTS), VALUES), r"with the index int\[\] .* got float64\[\]"),
        (lambda: fc.segment_mean(2), (COUNTS, VALUES), r"with the index int\[\] .* got int64\[5\]"),
        (lambda: fc.elementwise_mean(), VALUES["a"], "needs uploads .values, weights., got"),
        (
            lambda: fc.elementwise_mean(),
            (VALUES["a"], np.ones((CLIENTS, 3))),
            r"weights of shape \[3\] for values of shape \[5, 3\]: give a weight for each entry",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, uploads, words):
    with pytest.raises(ValueError, match=words):
        aggregated(make(), uploads)
