"""Bytes on the wire: what arrays weigh, what messages state, and what rounds report."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from fedjax_core import Message, reference, sizes
from tests.problems import assert_trees_equal, softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 5, 0, 8, 2, 6))
IDS = np.array([1, -1, 3, 2, 0])
KEY = jax.random.key(0)
TREE = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": np.zeros(5, np.int8), "c": np.zeros((0, 7))}


@pytest.mark.parametrize(
    ("tree", "count"),
    [
        (TREE, 12 + 5),
        (jax.eval_shape(lambda: TREE), 17),
        (np.zeros(3, bool), 3),
        (1.0, 8),
        ((), 0),
        (jax.random.key(0), 8),
        (jax.random.split(jax.random.key(0, impl="rbg"), 3), 3 * 16),
        (jax.eval_shape(lambda: jax.random.key(0, impl="rbg")), 16),
    ],
)
def test_arrays_weigh_shape_times_itemsize(tree, count):
    assert sizes.num_bytes(tree) == count
    assert sizes.sent_bytes(tree) == count
    assert sizes.sent_bytes((Message(tree, 2.5), tree)) == 2.5 + count


def test_messages_are_opened_however_deep():
    tree = {"a": Message((Message(TREE, 7.0), 1.0), 3), "b": 2.0}
    assert sizes.sent_bytes(tree) == 3 + 8, "the envelope counts, whatever is in it"
    assert_trees_equal(sizes.opened(tree), {"a": (TREE, 1.0), "b": 2.0})
    assert sizes.has_message(tree)
    assert not sizes.has_message(sizes.opened(tree))


def program(upload):
    """Clients that send `upload(own, shared)`."""
    return fc.ClientProgram(
        lambda shared, own, key: own,
        lambda shared, own, batch: (own, jnp.sum(batch.mask) * 1.0),
        lambda shared, own: (upload(own, shared), own),
    )


def passed(run, upload, shared=(), **options):
    own = jnp.arange(1.0, 6.0)
    return run(program(upload), shared, POPULATION.cohort(IDS), KEY, own, work=fc.local_work(batch_size=2), **options)


@pytest.mark.parametrize("run", [fc.for_each_client, reference.for_each_client])
def test_by_default_the_bytes_of_the_arrays_count(run):
    results = passed(run, lambda own, shared: TREE, shared=(TREE, jax.random.key(1)))
    np.testing.assert_array_equal(results.bytes_up, [17, 0, 17, 0, 17])  # slots 1 and 3 take no part
    np.testing.assert_array_equal(results.bytes_down, [25, 0, 25, 0, 25])


@pytest.mark.parametrize("run", [fc.for_each_client, reference.for_each_client])
@pytest.mark.parametrize("aggregator", [None, fc.stacked(), fc.mapped(lambda tree: tree["w"], fc.weighted_sum())])
def test_messages_state_the_size_of_each_client_and_only_payloads_arrive(run, aggregator):
    sizes_down = np.array([1.0, 2.0, 3.0, 4.0, 5.0])

    def upload(own, shared):
        return {"w": Message(own * shared[0], 10 * own), "rest": jnp.zeros(2, jnp.float32)}

    shared = Message(jnp.float32(2), sizes_down), jnp.zeros(3, jnp.int16)
    results = passed(run, upload, shared, aggregator=aggregator)
    np.testing.assert_array_equal(results.bytes_up, [18, 0, 38, 0, 58])
    np.testing.assert_array_equal(results.bytes_down, [7, 0, 9, 0, 11])
    plain = passed(
        run, lambda own, shared: sizes.opened(upload(own, shared)), sizes.opened(shared), aggregator=aggregator
    )
    assert_trees_equal(results.aggregate, plain.aggregate)
    assert_trees_equal(results.outputs, plain.outputs)


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_stated_sizes_are_the_same_under_every_plan_and_under_vmap(lanes):
    def round(factor):
        return passed(
            fc.for_each_client, lambda own, shared: Message(own, factor * own), plan=fc.Plan(lanes=lanes)
        ).bytes_up

    factors = jnp.array([1.0, 3.0])
    expected = np.array([[1, 0, 3, 0, 5]]) * np.asarray(factors)[:, None]
    np.testing.assert_array_equal(jax.jit(jax.vmap(round))(factors), expected)


def test_a_size_that_is_known_is_a_constant():
    """What is stated as a number, or counted, is not carried through the loop over clients."""

    def rows(size):
        def made(own):
            return fc.for_each_client(
                program(lambda own, shared: Message(own, size(own))),
                (),
                POPULATION.cohort(IDS),
                KEY,
                own,
                work=fc.local_work(batch_size=2),
            )

        return len(str(jax.make_jaxpr(made)(jnp.arange(5.0))))

    assert rows(lambda own: 3.0) < rows(lambda own: own)


def test_metrics_are_means_over_participants_and_0_without():
    def metrics(ids, upload):
        cohort = POPULATION.cohort(np.asarray(ids))
        own = jnp.arange(1.0, len(ids) + 1)
        results = fc.for_each_client(program(upload), TREE, cohort, KEY, own, work=fc.local_work(batch_size=2))
        told = fc.round_metrics(results, cohort, jnp.zeros(1), jnp.ones(1))
        return float(told.bytes_up), float(told.bytes_down)

    assert metrics(IDS, lambda own, shared: Message(own, own)) == (3.0, 17.0)
    assert metrics([-1, 2], lambda own, shared: Message(own, 5)) == (0.0, 0.0)


def test_counts_beyond_32_bits_are_floats_that_are_exact_where_all_are_alike():
    """7e9 parameters in float32, in single precision, for a number of participants that does not divide it."""
    with jax.enable_x64(False):
        large, other = np.float32(28e9), np.float32(1_234_567)
        counts = np.array([large] * 7 + [0.0], np.float32)
        population = softmax_population([1] * 8, dtype=np.float32)
        cohort = population.cohort(np.array([*range(7), -1]))
        results = fc.ClientResults(
            (), (), jnp.ones(8), jnp.ones(8), jnp.ones(8, jnp.int32), 8, counts, counts / large * other
        )
        told = fc.round_metrics(results, cohort, jnp.zeros(1), jnp.zeros(1))
        assert told.bytes_up.dtype == jnp.float32
        assert (float(told.bytes_up), float(told.bytes_down)) == (float(large), float(other))


@pytest.mark.parametrize("size", ["8", None, -1.0, np.inf, True, np.zeros(2), np.complex64(1)])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=r"the upload has a Message of bytes=.*at least 0"):
        passed(fc.for_each_client, lambda own, shared: Message(own, size))
    with pytest.raises(ValueError, match=r"shared has a Message of bytes=.*float\[5\] with one for each slot"):
        passed(fc.for_each_client, lambda own, shared: own, Message(jnp.zeros(1), size))


def test_half_precision_counts_2_bytes_a_number():
    params = softmax_params(dtype=jnp.bfloat16)
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    _, metrics = method.round(method.init(params), POPULATION.cohort(IDS), KEY)
    assert (metrics.bytes_up, metrics.bytes_down) == (36, 36)


def test_bytes_beside_a_pass():
    cohort = POPULATION.cohort(IDS)
    np.testing.assert_array_equal(fc.bytes_for_each(cohort, (TREE, Message((), 3))), [20, 0, 20, 0, 20])
