"""A clock against a loop over arrivals: who is in time, how long rounds take, and that nothing else changes."""

import heapq
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms import messages as parts
from fedjax_core import Plan, with_part
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6, 4, 7)
N = len(SIZES)
POPULATION = softmax_population(SIZES)
RNG = np.random.default_rng(0)
PROFILE = {
    "seconds_per_example": RNG.lognormal(np.log(0.01), 0.6, N),
    "bytes_per_second_up": RNG.lognormal(np.log(2e3), 0.8, N),
    "bytes_per_second_down": RNG.lognormal(np.log(2e4), 0.8, N),
    "latency": RNG.uniform(0, 0.02, N),
}
COHORTS = ([0, 3, -1, 5, 7, 1], [6, 2, 4, 3, -1, 0], [2, -1, -1, -1, -1, -1])
BYTES = 18 * 8  # of the model
METHODS = {
    "fedavg": ({}, 1, 1),
    "fednova": ({}, 1 + 2 * 8 / BYTES, 1),
    "scaffold": ({"num_clients": N}, 2, 2),
}


def made(name="fedavg", **options):
    method = getattr(algorithms, name)
    return method(softmax_loss, optax.sgd(0.1), **{"batch_size": 4, "num_epochs": 2, **METHODS[name][0], **options})


def by_hand(ids, limit, first, examples, up, down):
    """(the clients that take part, seconds): arrivals one after the other, until the server waits for nobody."""
    arrivals = []
    for i in ids:
        if i < 0 or SIZES[i] == 0:
            continue
        seconds = PROFILE["latency"][i] + down / PROFILE["bytes_per_second_down"][i]
        seconds += examples(i) * PROFILE["seconds_per_example"][i] + up / PROFILE["bytes_per_second_up"][i]
        heapq.heappush(arrivals, (seconds, i))
    taking, now, wanted = [], 0.0, first or N
    while arrivals and len(taking) < wanted:
        seconds, client = heapq.heappop(arrivals)
        if seconds > limit:
            now = limit
            break
        now = seconds
        taking.append(client)
    return taking, now


def clocked(method, limit=np.inf, first=None, **profile):
    part = parts.deadline(limit, first=first, **{**PROFILE, **profile})
    return with_part(method, part, like=POPULATION)


def rounds(algorithm, cohorts=COHORTS):
    state, run, told = algorithm.init(softmax_params()), jax.jit(algorithm.round), []
    for t, ids in enumerate(cohorts):
        state, metrics = run(state, POPULATION.cohort(ids), jax.random.key(t))
        told.append(metrics)
    return state, told


@pytest.mark.parametrize(
    ("name", "limit", "first"),
    [
        ("fedavg", np.inf, None),
        ("fednova", 0.2, None),
        ("scaffold", np.inf, 2),
        ("fedavg", 0.25, 3),
        ("fedavg", 1e-6, 2),
    ],
)
def test_rounds_are_those_of_the_clients_that_are_in_time(name, limit, first):
    """The method is given the cohort that a loop over arrivals has found, and the clock adds up its seconds."""
    _, up, down = METHODS[name]
    method, elapsed = made(name, plan=Plan(lanes=1)), 0.0
    state, told = rounds(clocked(method, limit, first))
    expected, run = method.init(softmax_params()), jax.jit(method.round)
    for t, (ids, metrics) in enumerate(zip(COHORTS, told, strict=True)):
        taking, seconds = by_hand(ids, limit, first, lambda i: 2 * SIZES[i], up * BYTES, down * BYTES)
        left = POPULATION.cohort([i if i in taking else -1 for i in ids])
        expected, plain = run(expected, left, jax.random.key(t))
        elapsed += seconds
        info = metrics.extra.admission
        np.testing.assert_allclose(info.seconds, seconds, rtol=1e-12)
        np.testing.assert_allclose(info.elapsed, elapsed, rtol=1e-12)
        assert info.late == sum(i >= 0 and SIZES[i] > 0 for i in ids) - len(taking)
        assert metrics.participants == len(taking) == plain.participants
    assert_trees_equal(state.method, expected)
    np.testing.assert_allclose(fc.sums.value(state.admission.elapsed), elapsed, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_without_a_deadline_no_bit_of_the_method_changes(name):
    method = made(name)
    (state, told), (expected, plain) = rounds(clocked(method)), rounds(method)
    assert_trees_equal(state.method, expected)
    for metrics, other in zip(told, plain, strict=True):
        assert metrics.extra.admission.late == 0
        assert_trees_equal(metrics._replace(extra=metrics.extra.method), other)


def test_of_equal_times_the_lower_number_is_first_in_whatever_slot():
    alike = {"seconds_per_example": 0.0, "bytes_per_second_up": np.inf, "bytes_per_second_down": np.inf, "latency": 1.0}
    algorithm = clocked(made("scaffold"), first=2, **alike)
    for ids in ([5, 3, 0, 7], [7, 0, 3, 5]):
        state, (metrics,) = rounds(algorithm, [ids])
        moved = np.asarray(state.method.client_controls.rows["b"]).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(moved), [0, 3])
        assert metrics.extra.admission.seconds == 1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_epochs": 3}, lambda n: 3 * n),
        (
            {"num_epochs": None, "num_steps": 3},
            lambda n: sum(len(range(n)[4 * (s % -(-n // 4)) :][:4]) for s in range(3)),
        ),
        ({"num_epochs": None, "num_steps": 3, "order": "replacement"}, lambda n: 12),
        ({"num_epochs": np.arange(N) + 1}, None),
    ],
)
def test_examples_are_counted_as_often_as_they_are_seen(options, count):
    work = fc.local_work(batch_size=4, **options)
    ids, sizes = jnp.arange(N), jnp.asarray(SIZES)
    expected = [(count or (lambda n, i=i: (i + 1) * n))(n) if n else 0 for i, n in enumerate(SIZES)]
    np.testing.assert_array_equal(work.examples(ids, sizes), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_a_codec_inside_of_it_makes_rounds_shorter(inside):
    """A clock counts the bytes that the parts inside leave, and not those of parts around it."""
    codec = parts.top_k(0.1)
    seconds = {"seconds_per_example": 0.0, "bytes_per_second_up": 1.0, "bytes_per_second_down": np.inf, "latency": 0.0}
    clock = parts.deadline(**seconds)
    algorithm = made()
    for part in (codec, clock) if inside else (clock, codec):
        algorithm = with_part(algorithm, part, like=POPULATION)
    _, (metrics,) = rounds(algorithm, [[0, 1]])
    told = metrics.extra.admission if inside else metrics.extra.method.admission
    assert told.seconds == (2 * (4 + 5 / 8) if inside else BYTES)
    assert metrics.bytes_up == 2 * (4 + 5 / 8)


def test_seeds_and_deadlines_under_vmap_and_lanes():
    """Deadlines as an axis, of simulations in packed lanes; each is what it is alone in one lane."""

    def run(limit, key, plan):
        method = clocked(made("scaffold", plan=plan), limit)
        return fc.simulate(method, fc.samplers.uniform(N, 5), 3)(softmax_params(), POPULATION, key)

    limits, keys = jnp.asarray([0.15, 0.3]), jax.random.split(jax.random.key(3), 2)
    together = jax.jit(jax.vmap(partial(run, plan=Plan(lanes=2))))(limits, keys)
    alone = jax.jit(partial(run, plan=Plan(lanes=1)))
    for member in range(2):
        expected = alone(limits[member], keys[member])
        found = jax.tree.map(lambda leaf, m=member: leaf[m], together)
        for one, other in zip(found, expected, strict=True):
            assert_trees_close(one, other, rtol=1e-11, atol=1e-12)
    late = np.asarray(together[1].extra.admission.late)
    assert late.any(), "somebody is late"
    assert (late < 5).any(), "and somebody is not"


def test_who_arrives_first_is_no_choice_beside_a_private_part():
    """The absence of one client lets another one in, which changes the sum by more than one clip."""
    privacy = parts.client_level_dp(0.5, 1.0, expected=2.0)
    first = parts.deadline(first=1, seconds_per_example=0.1)
    unsaid = fc.Part(admission=fc.Admission(lambda state, cohort, traffic, key: (cohort, state, ())), name="mine")
    for clock in (first, unsaid):
        with pytest.raises(TypeError, match=f"with {clock.name} it depends on other clients .*client_level_dp hides"):
            with_part(with_part(made(), privacy, like=POPULATION), clock, like=POPULATION)
        with pytest.raises(TypeError, match=f"with {clock.name} it depends on other clients"):
            with_part(with_part(made(), clock, like=POPULATION), privacy, like=POPULATION)
    for clock in (
        parts.deadline(1.0, seconds_per_example=0.1),
        unsaid._replace(admission=unsaid.admission._replace(apart=True)),
    ):
        with_part(with_part(made(), privacy, like=POPULATION), clock, like=POPULATION)


def test_private_rounds_that_nobody_reaches_have_noise():
    private = with_part(made(), parts.client_level_dp(0.5, 1.0, expected=2.0), like=POPULATION)
    _, (metrics,) = rounds(clocked(private, 1e-6), [[0, 1]])
    assert metrics.participants == 0
    assert metrics.update_norm > 0
    assert metrics.extra.admission.seconds == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "limit must lie in"),
        ({"limit": np.nan}, "limit must lie in"),
        ({"first": 0}, "first must be an integer of at least 1"),
        ({"first": 2.5}, "first must be an integer"),
        ({"seconds_per_example": -1.0}, "seconds_per_example must be a number of at least 0, and finite"),
        ({"seconds_per_example": [0.1, np.inf]}, "seconds_per_example must be a number of at least 0, and finite"),
        ({"latency": [[0.1]]}, "latency must be a number"),
        ({"latency": "slow"}, "latency must be a number"),
        ({"bytes_per_second_up": 0.0}, "bytes_per_second_up must be a number above 0"),
        ({"bytes_per_second_down": [1.0, np.nan]}, "bytes_per_second_down must be a number above 0"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        parts.deadline(**{"seconds_per_example": 0.1, **options})


def test_a_profile_of_other_clients_is_named():
    algorithm = clocked(made(), latency=np.zeros(N + 1))
    with pytest.raises(ValueError, match=f"latency has {N + 1} entries, but the population has {N} clients"):
        algorithm.round(algorithm.init(softmax_params()), POPULATION.cohort([0]), jax.random.key(0))
