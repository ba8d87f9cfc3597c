"""`for_each_client` on random problems: plans, batching, randomness, groups under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core import (
    ClientProgram,
    ClientResults,
    Plan,
    Population,
    for_each_client,
    local_work,
    reference,
    round_metrics,
    stacked,
    weighted_sum,
)
from tests.problems import assert_trees_close, assert_trees_equal, softmax_population

CAPACITY = 8  # slots and clients in the random problems, so that few shapes are compiled
TOTAL = 60


def init(shared, client_input, key):
    return {"w": shared["w"] * 1.0, "own": client_input, "noise": jax.random.normal(key), "seen": jnp.zeros(())}


def step(shared, carry, batch):
    mask = batch.mask.astype(shared["w"].dtype)
    x = batch.examples["x"] * mask[:, None]
    residual = (x @ carry["w"] - carry["own"]) * mask
    draw = jax.random.uniform(batch.key)
    w = carry["w"] - 0.1 * (residual @ x) / mask.sum() + 0.01 * draw
    return carry | {"w": w, "seen": carry["seen"] + mask.sum()}, (residual**2).sum() / mask.sum()


def final(shared, carry):
    return carry["w"] - shared["w"], carry


PROGRAM = ClientProgram(init, step, final)


def population_of(sizes):
    """A population of CAPACITY clients and TOTAL rows; rows past the sizes belong to a last, unused client."""
    sizes = [*sizes, *[0] * (CAPACITY - len(sizes))]
    sizes.append(TOTAL - sum(sizes))
    return softmax_population(sizes)


def call(runner, plan, work, weights, population, ids, key):
    shared = {"w": jnp.arange(5.0) / 5}
    inputs = jnp.linspace(-1, 1, ids.shape[0])
    return runner(PROGRAM, shared, population.cohort(ids), key, inputs, work=work, weights=weights, plan=plan)


PLANS = [Plan(lanes=1), Plan(lanes=3), Plan(lanes=CAPACITY)]
WORKS = [
    local_work(batch_size=3, num_epochs=2),
    local_work(batch_size=4, num_steps=5),
    local_work(batch_size=7, order="sequential"),
    local_work(batch_size=2, num_epochs=np.array([1, 3, 2, 1, 1, 2, 1, 1, 1])),
]
compiled = {
    (p, w, weights): jax.jit(
        lambda *args, p=p, w=w, weights=weights: call(for_each_client, PLANS[p], WORKS[w], weights, *args)
    )
    for p in range(len(PLANS))
    for w in range(len(WORKS))
    for weights in ("uniform", "examples")
}


@given(
    sizes=st.lists(st.integers(0, 7), min_size=CAPACITY, max_size=CAPACITY),
    absent=st.sets(st.integers(0, CAPACITY - 1), max_size=CAPACITY - 1),
    order=st.permutations(range(CAPACITY)),
    work=st.integers(0, len(WORKS) - 1),
    weights=st.sampled_from(["uniform", "examples"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_every_plan_equals_the_plain_loop(sizes, absent, order, work, weights, seed):
    population = population_of(sizes)
    ids = jnp.array([-1 if i in absent else i for i in order])
    key = jax.random.key(seed)
    expected = call(reference.for_each_client, None, WORKS[work], weights, population, ids, key)
    for plan in range(len(PLANS)):
        got = compiled[plan, work, weights](population, ids, key)
        assert bool(jnp.isfinite(got.loss).all())
        if expected is None:  # no client took part
            assert not np.asarray(got.steps).any()
            assert not np.asarray(got.aggregate).any()
            continue
        assert_trees_close(
            got._replace(executed_steps=expected.executed_steps, weights=expected.weights),
            expected,
            rtol=1e-12,
            atol=1e-13,
        )
        assert int(got.executed_steps) >= int(expected.steps.sum())


def test_float32_plans_agree():
    population = softmax_population((5, 1, 8, 3), dtype=np.float32)
    ids = jnp.arange(4)
    results = []
    for plan in PLANS:
        shared, inputs = {"w": jnp.arange(5, dtype=np.float32) / 5}, jnp.linspace(-1, 1, 4, dtype=np.float32)

        def run32(population, ids, plan=plan, shared=shared, inputs=inputs):
            program = PROGRAM._replace(
                init=lambda s, i, k: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), init(s, i, k)),
                step=lambda s, c, b: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), step(s, c, b)),
            )
            return for_each_client(
                program,
                shared,
                population.cohort(ids),
                jax.random.key(0),
                client_inputs=inputs,
                work=WORKS[0],
                plan=plan,
            )

        results.append(jax.jit(run32)(population, ids))
    for other in results[1:]:
        assert results[0].aggregate.dtype == np.float32
        assert_trees_close(
            other._replace(executed_steps=()), results[0]._replace(executed_steps=()), rtol=1e-5, atol=1e-6
        )


def test_a_clients_result_does_not_depend_on_the_others():
    population = population_of([3, 7, 2, 5, 1, 6, 4, 7])
    run = compiled[1, 0, "uniform"]
    key = jax.random.key(2)
    together = run(population, jnp.arange(CAPACITY), key).outputs
    alone = run(population, jnp.array([-1, 1, -1, -1, -1, -1, -1, -1]), key).outputs
    assert_trees_equal(jax.tree.map(lambda leaf: leaf[1], together), jax.tree.map(lambda leaf: leaf[1], alone))


def epoch_orders(order, key, size, batch_size, num_steps):
    """The rows each step sees, -1 for padding."""
    population = Population.from_clients([{"row": np.arange(size)}])

    def collect(shared, carry, batch):
        return carry.at[batch.step].set(jnp.where(batch.mask, batch.examples["row"], -1)), jnp.zeros(())

    program = ClientProgram(
        lambda s, i, k: jnp.full((num_steps, batch_size), -2), collect, lambda s, carry: ((), carry)
    )
    work = local_work(batch_size=batch_size, num_steps=num_steps, order=order)
    return np.asarray(for_each_client(program, (), population.cohort([0]), key, work=work).outputs[0])


def test_epochs_see_every_example_once_in_an_order_of_their_own():
    rows = epoch_orders("shuffled", jax.random.key(0), size=7, batch_size=3, num_steps=9)
    for epoch in rows.reshape(3, 9):
        assert sorted(epoch[epoch >= 0]) == list(range(7))
        assert (epoch[7:] == -1).all()
    assert len({tuple(e) for e in rows.reshape(3, 9)}) == 3
    again = epoch_orders("shuffled", jax.random.key(1), size=7, batch_size=3, num_steps=9)
    assert not np.array_equal(rows, again)


def test_sequential_order_is_the_stored_order():
    rows = epoch_orders("sequential", jax.random.key(0), size=5, batch_size=2, num_steps=4)
    np.testing.assert_array_equal(rows, [[0, 1], [2, 3], [4, -1], [0, 1]])


def test_draws_with_replacement_are_uniform_and_repeat():
    rows = epoch_orders("replacement", jax.random.key(0), size=5, batch_size=100, num_steps=50)
    freq = np.bincount(rows.reshape(-1), minlength=5) / rows.size
    assert abs(freq - 0.2).max() < 5 * np.sqrt(0.16 / rows.size)


def test_packing_wastes_little_on_log_normal_sizes():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(3, 0.8, 64)).astype(int) + 1
    population = Population.from_sizes({"x": np.zeros((sizes.sum(), 1))}, sizes)
    program = ClientProgram(lambda s, i, k: jnp.zeros(()), lambda s, c, b: (c + 1, jnp.zeros(())), lambda s, c: ((), c))
    results = for_each_client(
        program,
        (),
        population.cohort(np.arange(64)),
        jax.random.key(0),
        work=local_work(batch_size=1),
        plan=Plan(lanes=16),
    )
    np.testing.assert_array_equal(results.outputs, sizes)
    assert int(results.steps.sum()) / int(results.executed_steps) > 0.95


@pytest.mark.parametrize(
    ("width", "plan", "together"), [(4, None, True), (4, Plan(lanes=1), False), (400, None, False)]
)
def test_tiny_programs_train_side_by_side_unless_told_otherwise(width, plan, together):
    """All execute as many steps as the longest needs; one after another they execute their own."""
    sizes = [5, 1, 3, 0, 2]
    program = ClientProgram(
        lambda shared, own, key: jnp.zeros(width),
        lambda shared, carry, batch: (carry + 1, jnp.zeros(())),
        lambda shared, carry: (carry, carry),
    )
    cohort = softmax_population(sizes).cohort(jnp.arange(5))
    results = for_each_client(program, (), cohort, jax.random.key(0), work=local_work(1), plan=plan)
    assert int(results.executed_steps) == (5 * 5 if together else 11)
    np.testing.assert_array_equal(results.outputs[:, 0], sizes)


def test_vmap_puts_all_members_in_one_queue():
    """Seeds, learning rates and even populations batch into groups of one loop; results match a Python loop."""
    sizes = [(3, 9, 1, 4), (6, 2, 8, 1)]
    populations = [softmax_population(s, seed=i) for i, s in enumerate(sizes)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *populations)
    keys = jax.random.split(jax.random.key(0), 2)
    rates = jnp.array([0.1, 0.2, 0.3])

    def run(population, key, rate, ids):
        def scaled(shared, carry, batch):  # closes over a traced value
            carry, loss = step(shared, carry, batch)
            return carry | {"w": carry["w"] * (1 - rate)}, loss * rate

        return for_each_client(
            PROGRAM._replace(step=scaled),
            {"w": jnp.arange(5.0) * rate},
            population.cohort(ids),
            key,
            client_inputs=jnp.ones(4) * rate,
            work=WORKS[0],
            aggregator=weighted_sum(),
            plan=Plan(lanes=2),
        )

    ids = jnp.array([2, -1, 0, 3])
    over_rates = jax.vmap(run, (None, None, 0, None))
    both = jax.jit(jax.vmap(over_rates, (0, 0, None, None)))(stacked, keys, rates, ids)
    for p in range(2):
        for r in range(3):
            alone = run(populations[p], keys[p], rates[r], ids)
            got = jax.tree.map(lambda leaf, p=p, r=r: leaf[p, r], both)
            assert_trees_close(
                got._replace(executed_steps=()), alone._replace(executed_steps=()), rtol=1e-12, atol=1e-13
            )
    # One queue: the lanes of all six members together run hardly more steps than there are.
    steps = int(both.steps.sum())
    assert steps / int(both.executed_steps[0, 0]) > 0.9


def test_vmap_over_a_mesh():
    mesh = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
    population = softmax_population((3, 9, 1, 4, 5))
    keys = jax.random.split(jax.random.key(0), 3)

    def run(plan, key):
        shared = {"w": jnp.arange(5.0)}
        return for_each_client(
            PROGRAM,
            shared,
            population.cohort(np.array([0, 1, 4])),
            key,
            client_inputs=jnp.ones(3),
            work=WORKS[0],
            plan=plan,
        )

    on_mesh = jax.jit(jax.vmap(lambda key: run(Plan(lanes=4, mesh=mesh), key)))(keys)
    single = jax.vmap(lambda key: run(Plan(lanes=1), key))(keys)
    assert_trees_close(on_mesh._replace(executed_steps=()), single._replace(executed_steps=()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lanes", [1, 2])
def test_keys_may_travel_in_the_carry(lanes):
    program = ClientProgram(
        lambda s, i, key: key,
        lambda s, key, b: (jax.random.split(key)[0], jnp.zeros(())),
        lambda s, key: (jax.random.uniform(key), ()),
    )
    population = softmax_population((3, 2))
    results = for_each_client(
        program, (), population.cohort([0, 1]), jax.random.key(0), work=WORKS[0], plan=Plan(lanes=lanes)
    )
    assert 0 < float(results.aggregate) < 1


@pytest.mark.parametrize("plan", PLANS[1:2])
def test_stacked_uploads_are_those_of_each_slot(plan):
    """Outputs stay beside them, and slots without a participant hold zeros."""
    population, ids = population_of([4, 0, 3, 5]), np.array([3, -1, 1, 2, 0])
    inputs = jnp.linspace(-1, 1, 5)

    def run(runner, plan):
        cohort = population.cohort(ids)
        options = {"work": WORKS[0], "weights": "examples", "plan": plan, "aggregator": stacked()}
        return runner(PROGRAM, {"w": jnp.arange(5.0) / 5}, cohort, jax.random.key(3), inputs, **options)

    results = run(for_each_client, plan)
    expected = run(reference.for_each_client, None)
    assert_trees_close((results.aggregate, results.outputs), (expected.aggregate, expected.outputs), 1e-12)
    np.testing.assert_allclose(results.aggregate[0], results.outputs["w"][0] - jnp.arange(5.0) / 5, rtol=1e-12)
    np.testing.assert_array_equal(results.aggregate[1:3], 0)


def test_a_rule_for_stacked_uploads_gets_the_weights():
    population, ids = population_of([4, 0, 3, 5]), np.array([3, -1, 1, 2])
    rule = stacked(lambda uploads, weights: (weights @ uploads / weights.sum(), weights))
    options = {"work": WORKS[0], "weights": "examples", "aggregator": rule}
    arguments = PROGRAM, {"w": jnp.ones(5)}, population.cohort(ids), jax.random.key(3), jnp.zeros(4)
    mean, weights = for_each_client(*arguments, **options).aggregate
    np.testing.assert_array_equal(weights > 0, [True, False, False, True])
    options |= {"aggregator": None}
    np.testing.assert_allclose(mean, for_each_client(*arguments, **options).aggregate, rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "loss", "ids", "expected"),
    [
        ([1.0, 3.0, 0.0], [2.0, 4.0, 8.0], [0, 1, 2], 3.5),
        ([0.0, 0.0, 0.0], [2.0, 4.0, 9.0], [0, 1, -1], 3.0),  # participants who all weigh nothing count alike
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1, -1, -1], np.nan),
    ],
)
def test_the_loss_of_a_round_is_the_mean_over_participants_and_unknown_without(weights, loss, ids, expected):
    results = ClientResults(
        aggregate=(),
        outputs=(),
        weights=jnp.array(weights),
        loss=jnp.array(loss),
        steps=jnp.ones(3, jnp.int32),
        executed_steps=jnp.int32(3),
        bytes_up=jnp.ones(3),
        bytes_down=jnp.ones(3),
    )
    cohort = population_of([1, 2, 3]).cohort(np.array(ids))
    metrics = round_metrics(results, cohort, jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_allclose(metrics.loss, expected)
