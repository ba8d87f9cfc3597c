"""Samplers are pure functions of (key, round); their long-run frequencies are what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import samplers

KEY = jax.random.key(0)


def rounds(sampler, count, key=KEY):
    return np.asarray(jax.jit(jax.vmap(sampler, (None, 0)))(key, jnp.arange(count)))


def frequencies(ids, num_clients):
    counts = np.zeros(num_clients)
    np.add.at(counts, ids[ids >= 0], 1)
    return counts / len(ids)


ALL = {
    "uniform": samplers.uniform(9, 4),
    "full": samplers.full(9),
    "weighted": samplers.weighted(np.arange(1.0, 10.0), 4),
    "bernoulli": samplers.bernoulli(0.4, 9),
    "cyclic": samplers.cyclic(9, 4),
    "periodic": samplers.periodic(0.4, 10, 9),
    "markov": samplers.markov(0.2, 0.3, 9),
    "schedule": samplers.schedule(np.array([[0, 1, -1], [5, 2, 8]])),
}


@pytest.mark.parametrize("name", ALL)
def test_cohorts_are_valid_and_reproducible(name):
    sampler = ALL[name]
    ids = rounds(sampler, 50)
    assert ids.dtype == np.int32
    assert ids.min() >= -1
    assert ids.max() < 9
    for row in ids:
        present = row[row >= 0]
        assert len(np.unique(present)) == len(present)
    # One round alone gives what it gives among others, jitted or not.
    np.testing.assert_array_equal(sampler(KEY, 17), ids[17])
    if name not in ("full", "schedule"):
        assert not np.array_equal(rounds(sampler, 50, jax.random.key(1)), ids)


def test_uniform_covers_clients_evenly():
    ids = rounds(ALL["uniform"], 6000)
    freq = frequencies(ids, 9)
    assert abs(freq - 4 / 9).max() < 5 * np.sqrt(4 / 9 * 5 / 9 / 6000)


def test_uniform_pairs_are_evenly_likely():
    ids = rounds(samplers.uniform(5, 2), 8000)
    pairs = np.zeros((5, 5))
    for row in ids:
        pairs[tuple(sorted(row))] += 1
    upper = pairs[np.triu_indices(5, 1)] / 8000
    assert abs(upper - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 8000)


def test_uniform_over_a_million_clients_is_cheap_and_valid():
    ids = np.asarray(samplers.uniform(1_000_000, 100)(KEY, 3))
    assert len(np.unique(ids)) == 100
    assert ids.max() > 500_000


def test_weighted_first_draws_follow_the_weights():
    weights = np.array([1.0, 2.0, 3.0, 4.0, 0.0])
    ids = rounds(samplers.weighted(weights, 1), 8000)
    freq = frequencies(ids, 5)
    assert abs(freq - weights / 10).max() < 5 * np.sqrt(0.25 / 8000)
    assert freq[4] == 0


def test_weighted_without_replacement_matches_sequential_draws():
    weights = np.array([1.0, 2.0, 3.0])
    ids = rounds(samplers.weighted(weights, 2), 12000)
    p = weights / 6
    left_out = [
        sum(p[a] * p[b] / (1 - p[a]) for a, b in pairs)
        for pairs in ([(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)])
    ]
    freq = 1 - frequencies(ids, 3)
    assert abs(freq - left_out).max() < 0.025


def test_bernoulli_rates_and_edges():
    probabilities = np.array([0.0, 0.1, 0.5, 1.0])
    ids = rounds(samplers.bernoulli(probabilities), 6000)
    freq = frequencies(ids, 4)
    assert freq[0] == 0
    assert freq[3] == 1
    assert abs(freq - probabilities).max() < 5 * np.sqrt(0.25 / 6000)


def test_cyclic_visits_everyone_equally_in_turn():
    ids = rounds(ALL["cyclic"], 9)  # 36 slots over 9 clients
    np.testing.assert_array_equal(frequencies(ids, 9) * 9, np.full(9, 4))
    np.testing.assert_array_equal(ids.reshape(-1)[:9], ids.reshape(-1)[9:18])
    late = ALL["cyclic"](KEY, jnp.int32(9 * 10**8))  # far out, no overflow
    np.testing.assert_array_equal(late, ids[0])


def test_periodic_is_on_for_its_share_of_each_period():
    rates = np.array([0.1, 0.5, 1.0])
    ids = rounds(samplers.periodic(rates, 10), 40)
    on = np.array([[i in row for row in ids] for i in range(3)])
    np.testing.assert_array_equal(on.reshape(3, 4, 10).sum(2), np.repeat([[1], [5], [10]], 4, 1))
    np.testing.assert_array_equal(on[:, :10], on[:, 10:20])


@pytest.mark.parametrize(("turn_on", "turn_off"), [(0.05, 0.2), (0.3, 0.6), (0.9, 0.7), (1.0, 1.0)])
def test_markov_chain_equals_stepping_through_it(turn_on, turn_off):
    sampler = samplers.markov(turn_on, turn_off, 6)
    ids = rounds(sampler, 60)
    state = None
    for t in range(60):
        if t == 0:
            first = jax.random.uniform(jax.random.fold_in(KEY, 0), (6,), jnp.float32)
            state = np.asarray(first < np.float32(turn_on) / (np.float32(turn_on) + np.float32(turn_off)))
        else:
            draw = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, t), (6,), jnp.float32))
            state = np.where(state, draw < np.float32(1) - np.float32(turn_off), draw < np.float32(turn_on))
        np.testing.assert_array_equal(ids[t] >= 0, state)


def test_markov_long_run_share_and_holding_times():
    turn_on, turn_off = 0.1, 0.3
    on = rounds(samplers.markov(turn_on, turn_off, 40), 2000) >= 0
    assert abs(on.mean() - 0.25) < 0.02
    left = on[:-1] & ~on[1:]
    assert abs(left.sum() / on[:-1].sum() - turn_off) < 0.02


def test_schedule_replays_and_then_stops():
    ids = rounds(ALL["schedule"], 4)
    np.testing.assert_array_equal(ids, [[0, 1, -1], [5, 2, 8], [-1, -1, -1], [-1, -1, -1]])


def test_deliveries_in_order_of_time():
    one_by_one = samplers.deliveries([1, 2, 3], 7, buffer=1)
    np.testing.assert_array_equal(one_by_one.cohorts[:, 0], [0, 0, 1, 0, 2, 0, 1])
    np.testing.assert_array_equal(one_by_one.ticks, [1, 2, 2, 3, 3, 4, 4])
    pairs = samplers.deliveries([1, 2, 3], 4, buffer=2)
    np.testing.assert_array_equal(pairs.cohorts, [[0, 1], [0, 2], [0, 1], [0, 1]])
    np.testing.assert_array_equal(pairs.ticks, [2, 3, 4, 6])
    fixed = samplers.deliveries([2, 4, 6], 2, interval=3)
    np.testing.assert_array_equal(fixed.cohorts, [[0, -1, -1], [0, 1, 2]])
    np.testing.assert_array_equal(samplers.deliveries([5, 5], 2, interval=4).cohorts, [[-1, -1], [0, 1]])


def test_deliveries_come_as_often_as_their_times_allow():
    times = np.array([1, 2, 3, 5, 8])
    np.testing.assert_allclose(
        samplers.deliveries(times, 4000, buffer=1).shares, 1 / times / np.sum(1 / times), atol=1e-3
    )
    for interval in (1, 2, 3, 8):
        shares = samplers.deliveries(times, 840, interval=interval).shares
        np.testing.assert_allclose(shares, 1 / np.ceil(times / interval))
    synchronous = samplers.deliveries(times, 3, buffer=5)
    np.testing.assert_array_equal(np.sort(synchronous.cohorts), np.tile(np.arange(5), (3, 1)))
    np.testing.assert_array_equal(synchronous.ticks, [8, 16, 24])


def test_the_only_client_is_drawn():
    sample = jax.jit(samplers.uniform(1, 1))
    assert [sample(KEY, t).tolist() for t in range(3)] == [[0]] * 3


def test_cyclic_cohorts_of_late_rounds_hold_every_client_once_a_cycle():
    """Where the product of the round and the size of a cohort is more than 32 bits hold."""
    num_clients, cohort_size = 1003, 501
    sample = jax.jit(samplers.cyclic(num_clients, cohort_size))
    for round in (2**22, 2**31 - 3):
        ids = [np.asarray(sample(jax.random.key(0), jnp.int32(round + t))) for t in range(2)]
        assert all(len(np.unique(cohort)) == cohort_size for cohort in ids)
        assert not set(ids[0]) & set(ids[1])
    order = np.concatenate([sample(jax.random.key(0), jnp.int32(t)) for t in range(num_clients)])
    late = (2**31 - 1) // num_clients * num_clients - num_clients  # as many whole cycles later
    np.testing.assert_array_equal(sample(jax.random.key(0), jnp.int32(late)), order[:cohort_size])


def test_periodic_with_the_longest_period_has_no_client_twice_as_often():
    sample = samplers.periodic(np.full(200, 0.5), 2**31 - 1)
    present = [np.asarray(sample(jax.random.key(3), jnp.int32(t))) >= 0 for t in (0, 2**30, 2**31 - 2)]
    assert all(60 < p.sum() < 140 for p in present)
    assert (present[0] != present[1]).mean() > 0.9  # half a period later it is the others' turn
