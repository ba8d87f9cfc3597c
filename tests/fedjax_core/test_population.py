"""Populations, cohorts, and the rows of per-client state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core import Population, client_table, gather, scatter


def make(sizes):
    clients = [{"x": np.full((n, 2), i, np.float32), "y": np.full(n, i)} for i, n in enumerate(sizes)]
    return Population.from_clients(clients)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_clients_come_back_as_they_went_in(sizes):
    population = make(sizes)
    assert population.num_clients == len(sizes)
    assert population.num_examples == sum(sizes)
    np.testing.assert_array_equal(population.sizes, sizes)
    for i, n in enumerate(sizes):
        own = population.client(i)
        assert own["x"].shape == (n, 2)
        assert (np.asarray(own["y"]) == i).all()


def test_the_three_ways_to_build_agree():
    flat = {"x": np.arange(6.0), "y": np.arange(6)}
    a = Population.from_flat(flat, [0, 2, 2, 6])
    b = Population.from_sizes(flat, [2, 0, 4])
    c = Population.from_clients(
        [jax.tree.map(lambda leaf, s=s: leaf[s], flat) for s in (slice(0, 2), slice(2, 2), slice(2, 6))]
    )
    for other in (b, c):
        jax.tree.map(np.testing.assert_array_equal, a, other)


def test_cohort_marks_empty_slots_and_empty_clients():
    cohort = make([3, 0, 5]).cohort([2, -1, 1, 0])
    np.testing.assert_array_equal(cohort.ids, [2, -1, 1, 0])
    np.testing.assert_array_equal(cohort.sizes, [5, 0, 0, 3])
    np.testing.assert_array_equal(cohort.mask, [True, False, False, True])
    assert cohort.num_participants == 2
    assert cohort.starts[0] == 3


def test_part_of_a_cohort_has_the_same_slots():
    cohort = make([3, 0, 2, 1]).cohort([3, -1, 0, 1, 2])
    part = cohort.only(np.array([True, True, True, True, False]))
    np.testing.assert_array_equal(part.ids, [3, -1, 0, 1, -1])
    np.testing.assert_array_equal(part.mask, [True, False, True, False, False])
    np.testing.assert_array_equal(part.starts, cohort.starts)
    assert part.num_participants == 2


def test_ids_out_of_range_are_empty_slots_inside_jit():
    population = make([3, 2])
    cohort = jax.jit(lambda p, ids: p.cohort(ids))(population, jnp.array([1, 2, -7]))
    np.testing.assert_array_equal(cohort.ids, [1, -1, -1])
    np.testing.assert_array_equal(cohort.mask, [True, False, False])


def test_building_a_cohort_does_not_copy_the_examples():
    population = make([3, 2])
    assert population.cohort([1]).examples["x"] is population.examples["x"]


def test_scatter_writes_participants_only_and_gather_reads_them_back():
    population = make([3, 0, 5, 1])
    cohort = population.cohort([3, -1, 1, 0])
    table = client_table(4, {"w": jnp.zeros(2)})
    rows = {"w": jnp.arange(8.0).reshape(4, 2) + 1}
    written = scatter(table, cohort, rows)
    np.testing.assert_array_equal(written.rows["w"], [[7, 8], [0, 0], [0, 0], [1, 2]])
    np.testing.assert_array_equal(gather(written, cohort)["w"][np.array([0, 3])], [[1, 2], [7, 8]])


def test_population_is_a_pytree():
    population = make([3, 2])
    doubled = jax.tree.map(lambda leaf: leaf, population)
    assert isinstance(doubled, Population)
    assert len(jax.tree.leaves(population)) == 3


@pytest.mark.quick
def test_a_population_of_one_client():
    assert make([4]).cohort(np.array([0])).num_participants == 1
