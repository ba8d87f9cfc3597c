"""CCVR: moments that are exactly those of all features together, and a head trained on what is drawn of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import algorithms
import fedjax_core as fc
from algorithms.personalization import ccvr
from tests.algorithms.personalization import heads
from tests.algorithms.personalization.heads import CLASSES, LOCAL, MODEL, SGD, TASK, run
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_equal

KEY = jax.random.key(7)
EVERYBODY = POPULATION.cohort(np.arange(len(SIZES)))
PLANE = fc.Task(
    lambda key: {"head": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}},
    lambda params, examples, *, key, mask: (heads.head(params, examples["z"]), ()),
    heads.loss,
    lambda outputs, examples, mask: {"accuracy": jnp.argmax(outputs, -1) == examples["y"]},
    lambda params, examples, key=None, mask=None: examples["z"],
    heads.head,
    heads.paths,
)


def make(**settings):
    return algorithms.ccvr(TASK, SGD, **(LOCAL | settings))


def moments(*clients, batch_size=2, plan=None):
    """What each client sends, and the moments of all, of features and classes given client by client."""
    population = fc.Population.from_clients(
        [{"z": np.asarray(z, float), "y": np.asarray(y, np.int32)} for z, y in clients]
    )
    program = ccvr.moments_program(PLANE, lambda examples: examples["y"], 2, 2)
    work = fc.local_work(batch_size, order="sequential")
    cohort, params = population.cohort(np.arange(len(clients))), PLANE.init(KEY)

    def sent(aggregator):
        return fc.for_each_client(program, params, cohort, KEY, work=work, plan=plan, aggregator=aggregator)

    total = sent(fc.mapped(ccvr.summands, fc.weighted_sum()))
    return sent(fc.stacked()).aggregate, ccvr.union(total.aggregate), total.bytes_up


FIRST = ([(0, 0), (2, 0), (1, 3)], [0, 0, 0])
SECOND = ([(4, 1), (6, 5)], [0, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_moments_of_two_clients_are_those_of_the_union(batch_size):
    sent, found, size = moments(FIRST, SECOND, batch_size=batch_size)
    np.testing.assert_allclose(found.means[0], (2.6, 1.8), rtol=1e-14)
    np.testing.assert_allclose(found.covariances[0], [[5.8, 3.4], [3.4, 4.7]], rtol=1e-13)
    np.testing.assert_allclose(found.covariances[0], np.cov(np.concatenate([FIRST[0], SECOND[0]]).T), rtol=1e-13)
    for i, (z, _) in enumerate((FIRST, SECOND)):
        np.testing.assert_allclose(sent.covariances[i, 0], np.cov(np.transpose(z)), rtol=1e-13)
    np.testing.assert_array_equal(found.counts, (5, 0))
    np.testing.assert_array_equal(found.covariances[1], 0)
    np.testing.assert_array_equal(size, [(2 + 3 + 1) * 8] * 2)


def test_biased_covariances_would_not_be():
    sent, found, _ = moments(FIRST, SECOND)
    shrunk = (sent.counts - 1) / jnp.maximum(sent.counts, 1)
    biased = sent._replace(covariances=sent.covariances * shrunk[:, :, None, None])
    total = jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(ccvr.summands)(biased))
    assert np.abs(ccvr.union(total).covariances - found.covariances).max() > 0.1


def test_a_client_of_one_example_counts_by_its_mean():
    sent, found, _ = moments(FIRST, ([(6, 5)], [0]), ([(1, 1), (0, 0)], [1, 0]))
    np.testing.assert_array_equal(sent.covariances[1], 0)
    everything = np.array([*FIRST[0], (6, 5), (0, 0)], float)
    np.testing.assert_allclose(found.covariances[0], np.cov(everything.T), rtol=1e-13)
    np.testing.assert_allclose(found.means, [everything.mean(0), (1, 1)], rtol=1e-14)
    assert np.linalg.eigvalsh(found.covariances).min() > -1e-13


def test_lanes_find_the_same_moments():
    several = (FIRST, SECOND, ([(1.5, 2)] * 3, [1, 0, 1]))
    plain, found = (moments(*several, plan=fc.Plan(lanes=lanes))[1] for lanes in (1, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14), found, plain)


def test_what_is_drawn_has_the_moments():
    covariances = jnp.array([[[5.8, 3.4], [3.4, 4.7]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0], [0, 0]]])
    of = ccvr.Moments(jnp.array([5.0, 3, 1]), jnp.array([(2.6, 1.8), (0, 0), (7, 7)]), covariances)
    z = np.asarray(ccvr.drawn(KEY, of, 40_000, 1e-6))
    np.testing.assert_allclose(z.mean(1), of.means, atol=0.05)
    for c in range(3):
        np.testing.assert_allclose(np.cov(z[c].T), covariances[c], atol=0.1)


def test_only_the_head_changes_after_the_last_round():
    method = make(virtual_features=20, head_epochs=3)
    state, losses = run(method)
    expected, others = run(algorithms.fedavg(TASK, SGD, **LOCAL))
    assert_trees_equal(state, expected)
    assert losses == others
    end = jax.jit(lambda state, cohort: fc.run_events(method, "after", state, cohort, KEY))
    after = end(state, EVERYBODY)
    assert_trees_equal(after.params["body"], state.params["body"])
    assert np.abs(after.params["head"]["kernel"] - state.params["head"]["kernel"]).max() > 1e-3
    nobody = end(state, POPULATION.cohort([-1] * len(SIZES)))
    assert_trees_equal(nobody, state)


def test_no_epochs_is_fedavg():
    method = make(head_epochs=0)
    state = method.init(MODEL)
    assert_trees_equal(fc.run_events(method, "after", state, EVERYBODY, KEY), state)


def test_features_that_are_normal_get_the_head_that_tells_them_apart():
    """Two classes of opposite means, which the two clients hold one each."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 2)) + np.repeat([[2, 0], [-2, 0]], 200, axis=0)
    population = fc.Population.from_sizes({"z": z, "y": np.repeat(np.arange(2, dtype=np.int32), 200)}, [200, 200])
    method = algorithms.ccvr(PLANE, SGD, batch_size=50)
    state = fc.run_events(method, "after", method.init(PLANE.init(KEY)), population.cohort([0, 1]), KEY)
    assert fc.evaluate(PLANE, state.params, population.examples)["accuracy"] > 0.96
    slope = np.asarray(state.params["head"]["kernel"])
    assert slope[0, 0] - slope[0, 1] > 5 * abs(slope[1, 0] - slope[1, 1])


def test_a_class_that_nobody_holds_is_not_drawn():
    """Its score is drawn down by the others, and no feature of its own holds it up."""
    held = np.asarray(POPULATION.examples["y"]) != 2
    examples = jax.tree.map(lambda leaf: np.asarray(leaf)[held], POPULATION.examples)
    population = fc.Population.from_sizes(examples, [len(examples["y"])])
    method = make(virtual_features=50)
    state = method.init(MODEL)
    after = fc.run_events(method, "after", state, population.cohort([0]), KEY)
    assert after.params["head"]["bias"][CLASSES - 1] < state.params["head"]["bias"][CLASSES - 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"virtual_features": 0}, "virtual_features must be an integer of at least 1"),
        ({"head_batch_size": 0}, "head_batch_size must be an integer of at least 1"),
        ({"head_epochs": -1}, "head_epochs must be"),
        ({"head_lr": -1.0}, "head_lr must lie in"),
        ({"jitter": -1.0}, "jitter must lie in"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)
