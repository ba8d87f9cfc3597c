"""Sums over many, and of short float types: against NumPy in double precision."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import (
    ClientProgram,
    Plan,
    Population,
    client_weights,
    for_each_client,
    full_gradient_program,
    local_work,
    mean_over_participants,
    sums,
    weighted_mean,
    weighted_sum,
)

MANY = 3000
TENTH = float(np.float32(0.1))
HALF = (jnp.bfloat16, jnp.float16)


def equal_clients(count, values=1.0):
    return Population.from_sizes({"x": np.full(count, values, np.float32)}, np.ones(count, np.int64))


def run(upload, count, weights="uniform", aggregator=None, plan=None, value=1.0):
    """The aggregate of `upload(x)` over clients of one example each."""
    program = ClientProgram(
        lambda shared, own, key: jnp.zeros((), jnp.float32),
        lambda shared, carry, batch: (batch.examples["x"][0], batch.examples["x"][0]),
        lambda shared, carry: (upload(carry), ()),
    )

    def one(cohort):
        work = local_work(batch_size=1, num_steps=1)
        return for_each_client(
            program, (), cohort, jax.random.key(0), work=work, weights=weights, aggregator=aggregator, plan=plan
        ).aggregate

    return jax.jit(one)(equal_clients(count, value).cohort(np.arange(count)))


@pytest.mark.parametrize("lanes", [1, MANY])
def test_the_sum_over_many_clients_is_that_of_double_precision(lanes):
    # One after the other, in float32, the sum of 3,000 tenths is off by some 1e-5 of itself.
    total = run(lambda x: x * jnp.float32(0.1), MANY, aggregator=weighted_sum(), plan=Plan(lanes=lanes))
    np.testing.assert_allclose(float(total), MANY * TENTH, rtol=1e-6)


def test_a_running_sum_does_not_drift_and_keeps_infinity_and_nan():
    def last(x, few):
        total = sums.start((), jnp.float32, few=few)
        return sums.value(jax.lax.fori_loop(0, 10**6, lambda _, t: sums.add(t, x), total))

    last = jax.jit(last, static_argnums=1)
    np.testing.assert_allclose(float(last(jnp.float32(0.1), False)), 1e6 * TENTH, rtol=1e-6)
    assert abs(float(last(jnp.float32(0.1), True)) / (1e6 * TENTH) - 1) > 1e-3  # what it would be without
    assert np.isposinf(last(jnp.float32(np.inf), False))
    assert np.isnan(last(jnp.float32(np.nan), False))


@pytest.mark.parametrize(("seeds", "mesh"), [(3, False), (1, True), (3, True)])
def test_sums_of_several_seeds_in_lanes_of_their_own_and_on_a_mesh(seeds, mesh):
    count = 300
    plan = Plan(lanes=count * seeds + count * seeds % 2, mesh=jax.make_mesh((2,), ("clients",)) if mesh else None)
    population = equal_clients(count)
    program = ClientProgram(
        lambda shared, own, key: jnp.float32(0), lambda shared, c, b: (shared, shared), lambda shared, c: (c, ())
    )

    def one(x):
        cohort = population.cohort(np.arange(count))
        work = local_work(batch_size=1)
        return for_each_client(
            program, x, cohort, jax.random.key(0), work=work, aggregator=weighted_sum(), plan=plan
        ).aggregate

    xs = jnp.linspace(0.1, 0.7, seeds, dtype=jnp.float32)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(xs), count * np.asarray(xs, np.float64), rtol=1e-6)


def test_uploads_of_short_floats_keep_their_dtype_and_their_mean():
    """600 times 200 is beyond float16, and so is a weight of 70,000; their mean is not."""
    means = run(lambda x: [((x * 0.1).astype(d), (x * 200).astype(d)) for d in HALF], 600, np.full(600, 7e4))
    for dtype, (small, large) in zip(HALF, means, strict=True):
        assert small.dtype == large.dtype == dtype
        np.testing.assert_allclose(float(small), float(dtype(0.1)), rtol=1e-3)
        assert float(large) == 200
    # A summand of one's own is summed in float32 as well.
    own = weighted_mean()._replace(lift=lambda upload, weight: upload, finish=lambda total: total)
    totals = run(lambda x: [x.astype(d) for d in HALF], 600, aggregator=own, plan=Plan(lanes=600))
    assert [total.dtype for total in totals] == list(HALF)
    assert [float(total) for total in totals] == [600, 600]


def test_integers_are_averaged_as_numbers():
    """Under example weights (0.5, 1, 1.5) the mean of three equal uploads is the upload; own sums of integers stay."""
    cohort = Population.from_sizes({"x": np.arange(6, dtype=np.float32)}, [1, 2, 3]).cohort(np.arange(3))
    program = ClientProgram(
        lambda shared, own, key: jnp.int32(0),
        lambda shared, carry, batch: (carry, jnp.float32(0)),
        lambda shared, carry: ((jnp.arange(4), jnp.array([True, False])), ()),
    )
    mean = weighted_mean()
    both = mean._replace(
        lift=lambda upload, weight: (mean.lift(upload, weight), upload[0]),
        finish=lambda total: (mean.finish(total[0]), total[1]),
    )
    work = local_work(batch_size=1)
    (numbers, flags), total = for_each_client(
        program, (), cohort, jax.random.key(0), work=work, weights="examples", aggregator=both
    ).aggregate
    np.testing.assert_allclose(numbers, [0, 1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(flags, [1, 0])
    assert jnp.issubdtype(numbers.dtype, jnp.floating)
    assert jnp.issubdtype(flags.dtype, jnp.floating)
    np.testing.assert_array_equal(total, [0, 3, 6, 9])
    assert jnp.issubdtype(total.dtype, jnp.integer)


@pytest.mark.parametrize("dtype", HALF)
def test_the_training_loss_of_a_long_client(dtype):
    halves = Population.from_sizes({"l": np.repeat([1.0, 3.0], 30000).astype(np.float32)}, [60000])
    algorithm = algorithms.fedavg(
        lambda p, b, k: (b["l"] + 0 * p).astype(dtype), optax.sgd(0.1), order="sequential", batch_size=3
    )
    state = algorithm.init(jnp.zeros(()))
    _, metrics = jax.jit(algorithm.round)(state, halves.cohort(np.arange(1)), jax.random.key(0))
    assert float(metrics.loss) == 2
    assert metrics.loss.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_models_of_short_floats(dtype):
    """Losses beyond float16 in their sum, norms beyond it in their square, and steps too short for a sum of them."""
    population = Population.from_sizes({"x": np.full(400, 2.0, np.float32)}, [400])
    cohort = population.cohort(np.arange(1))
    algorithm = algorithms.fedavg(
        lambda p, b, k: 2000 + p["w"][0] * b["x"].astype(dtype), optax.sgd(1.0), batch_size=400
    )
    state, metrics = jax.jit(algorithm.round)(algorithm.init({"w": jnp.zeros(9, dtype)}), cohort, jax.random.key(0))
    np.testing.assert_allclose(float(metrics.loss), 2000, rtol=1e-2)
    assert state.params["w"].dtype == dtype
    np.testing.assert_allclose(np.asarray(state.params["w"], np.float64), [-2, *[0] * 8], rtol=3e-2)

    # The gradient of 400 batches of one, added up one after the other in bfloat16, stops at 256.
    program = full_gradient_program(lambda p, b, k: p * b["x"].astype(dtype))
    work = local_work(batch_size=1, order="sequential")
    found = for_each_client(program, jnp.zeros((), dtype), cohort, jax.random.key(0), work=work)
    assert found.aggregate.dtype == dtype
    np.testing.assert_allclose(float(found.aggregate), 2)

    np.testing.assert_allclose(float(sums.norm({"a": jnp.full(4, 300, dtype)})), 600)


def test_segments_and_totals():
    rng = np.random.default_rng(0)
    sizes = np.array([0, 1, 5000, 127, 128, 129, 0, 20000, 0])
    offsets = np.cumsum([0, *sizes])
    values = rng.uniform(size=(sizes.sum(), 2)).astype(np.float32)
    values[1] = np.nan
    expected = np.stack([values[a:b].astype(np.float64).sum(0) for a, b in pairwise(offsets)])
    found = jax.jit(sums.of_segments)(values, offsets)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found[2]).all()
    assert not np.isnan(np.delete(found, 2, axis=0)).any()
    tenths = jnp.full(10**6, 0.1, jnp.float32)
    np.testing.assert_allclose(float(jax.jit(sums.total)(tenths)), 1e6 * TENTH, rtol=1e-6)
    found = jax.jit(sums.of_segments)(tenths, jnp.array([0, 10**6]))
    np.testing.assert_allclose(found, [1e6 * TENTH], rtol=5e-6)
    np.testing.assert_allclose(
        sums.weighted(jnp.arange(300.0), values[10:310]), np.arange(300) @ values[10:310].astype(np.float64), rtol=1e-6
    )
    assert sums.total(jnp.zeros((0, 3))).shape == (3,)
    np.testing.assert_array_equal(sums.of_segments(jnp.zeros(0), jnp.zeros(3, jnp.int32)), [0, 0])


def test_weights_that_are_near_the_limits_of_a_float():
    cohort = equal_clients(4).cohort(np.arange(4))
    for scale in (1e300, 1e-300, 1.0):
        weights = client_weights(np.array([1.0, 2.0, 3.0, 2.0]) * scale, cohort)
        np.testing.assert_allclose(weights, [0.5, 1, 1.5, 1], rtol=1e-6)
    traced = jax.jit(lambda w: client_weights(w, cohort))(jnp.array([1.0, 2.0, 3.0, 2.0], jnp.float32) * 1e38)
    np.testing.assert_allclose(traced, [0.5, 1, 1.5, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.0, 0.0], ["weights", "0 for every client"]),
        ([1.0, np.nan], ["weights", "nan", "client 1"]),
        ([np.inf, 1.0], ["weights", "inf", "client 0"]),
        ([1.0, -2.0], ["weights", "-2", "client 1"]),
    ],
)
def test_weights_that_give_no_mean(weights, words):
    with pytest.raises(ValueError, match="weights") as error:
        client_weights(np.asarray(weights), equal_clients(2).cohort(np.arange(2)))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("value", "dtype"), [(100.0, np.float16), (4_000_000, np.int32)])
def test_means_over_participants_do_not_overflow(value, dtype):
    cohort = Population.from_sizes({"x": np.zeros((800, 1), np.float32)}, [1] * 800).cohort(np.arange(800))
    assert mean_over_participants(jnp.full(800, value, dtype), cohort) == value


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1.0, 1e19, 1e25, 1e37])
def test_a_norm_is_right_where_its_square_is_not(scale):
    values = np.array([[3.0, -4.0], [0.0, 12.0]]) * scale
    tree = {"a": jnp.float32(values[0]), "b": jnp.float32(values[1]), "none": jnp.zeros((0, 2))}
    kept = np.concatenate([tree["a"], tree["b"]]).astype(np.float64)
    expected = np.linalg.norm(kept)
    for norm in (sums.norm, jax.jit(sums.norm)):
        np.testing.assert_allclose(float(norm(tree)), expected, rtol=1e-6)


def test_norms_of_nothing_of_infinity_and_of_nan():
    assert sums.norm({}) == sums.norm([jnp.zeros((0, 3))]) == sums.norm(jnp.zeros(3)) == 0
    for value in (np.inf, -np.inf):
        assert sums.norm(jnp.array([1.0, value])) == np.inf
    assert np.isnan(sums.norm(jnp.array([1.0, np.nan])))
    assert sums.norm(jnp.asarray([300.0, 400.0], jnp.float16)) == 500
    tree = [jnp.array([0.1, 0.7]), jnp.array([[0.3]])]
    assert sums.norm(tree) == jnp.sqrt(sums.norm(tree, squared=True))  # to the last bit, for division is by powers of 2
    gradient = jax.grad(lambda x: sums.norm(x))(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(gradient, [0.6, 0.8], rtol=1e-15)


def test_the_update_norm_of_a_large_step_is_a_number():
    fedavg = algorithms.fedavg(
        lambda params, batch, key: params["w"] * batch["x"], optax.sgd(1.0), batch_size=1, num_epochs=1
    )
    population = equal_clients(2, 1e25)
    round_fn = jax.jit(fedavg.round)
    _, metrics = round_fn(fedavg.init({"w": jnp.float32(0)}), population.cohort([0, 1]), jax.random.key(0))
    np.testing.assert_allclose(float(metrics.update_norm), 1e25, rtol=1e-6)
