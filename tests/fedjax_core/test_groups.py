"""Groups of clients with models of different structure, against a plain loop over clients."""

import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import samplers
from fedjax_core.clients import check_tables
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params, softmax_population

SIZES = (2, 3, 1, 0, 4, 2, 3)
GROUPS = fc.Groups([0, 1, 0, 1, 1, 0, 0])
THREE = fc.Groups([0, 1, 0, 1, 1, 2, 0])
POPULATION = softmax_population(SIZES)
KEY = jax.random.key(3)
SGD = optax.sgd(0.1)


def hidden_params(width, seed=0):
    rng = np.random.default_rng(seed)
    return {"u": jnp.asarray(rng.normal(size=(5, width))), "v": jnp.asarray(rng.normal(size=(width, 3)))}


MODELS = (softmax_params(), hidden_params(2))


def loss_fn(params, batch, key):
    """Of any of the models."""
    if "w" in params:
        return softmax_loss(params, batch, key)
    logits = jnp.tanh(batch["x"] @ params["u"]) @ params["v"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


class State(NamedTuple):
    """The mean of the clients' losses as the server's number, and a model for every client."""

    params: jax.Array
    models: tuple[fc.ClientTable, ...]
    round: fc.Counter = 0


def alone(groups=GROUPS, **local):
    """Every client trains a model of its own, and the server keeps the mean of what they send, a number each."""
    clients = fc.local_training(batch_size=2, order="sequential", **local)
    gradient = fc.value_and_grad(loss_fn)
    sent = lambda done, shared: (shared + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(done.params)), done.params)  # noqa: E731

    def init(models):
        return State(jnp.zeros(()), tuple(groups.table(g, model) for g, model in enumerate(models)))

    def update(state, cohort, key):
        program = fc.local_descent(SGD, gradient, start=lambda shared, own: own, upload=sent)
        results, tables = [], []
        for table, part in zip(state.models, groups.split(cohort), strict=True):
            own = fc.gather(table, part)
            result = clients.run(program, state.params, part, key, own, aggregator=fc.weighted_sum())
            tables.append(fc.scatter(table, part, result.outputs))
            results.append(result)
        merged = groups.merge(cohort, results)
        mean = sum(merged.aggregate) / jnp.maximum(cohort.num_participants, 1)
        return State(mean, tuple(tables)), merged

    view = fc.View(
        lambda state: ((),) * len(groups), lambda shared, row: row, lambda state: state.models, groups=groups
    )
    return fc.federated(init, update, views={"personal": view})


def reference(cohorts):
    """The models, the server's number and the losses of the rounds, by a loop over single batches."""
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: jnp.mean(loss_fn(params, batch, None))))
    models = {i: MODELS[g] for i, g in enumerate(GROUPS.of)}
    number, losses = 0.0, []
    for ids in cohorts:
        sent, loss = [], []
        for i in [i for i in ids if i >= 0 and SIZES[i]]:
            at = [jax.tree.map(lambda leaf, k=k: leaf[k : k + 2], POPULATION.client(i)) for k in range(0, SIZES[i], 2)]
            of_steps = []
            for batch in at:
                value, g = gradient(models[i], batch)
                models[i] = jax.tree.map(lambda y, d: y - 0.1 * d, models[i], g)
                of_steps.append(value)
            loss.append(np.average(of_steps, weights=[len(batch["y"]) for batch in at]))
            sent.append(number + sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(models[i])))
        number = np.mean(sent) if sent else number
        losses.append(np.mean(loss) if loss else np.nan)
    return models, number, losses


COHORTS = [[0, 4, 5, 2], [6, -1, 3, 1], [2, 0, -1, -1], [-1, 3, -1, -1]]  # a group absent, a client empty


@functools.cache
def compiled():
    return jax.jit(alone().round)


def rounds():
    state, losses = alone().init(MODELS), []
    for ids in COHORTS:
        state, metrics = compiled()(state, POPULATION.cohort(np.asarray(ids)), KEY)
        losses.append(metrics.loss)
    return state, losses


def test_rounds_are_those_of_single_clients():
    models, number, losses = reference(COHORTS)
    state, got = rounds()
    for i, (g, row) in enumerate(zip(GROUPS.of, GROUPS.rows, strict=True)):
        own = jax.tree.map(lambda leaf, row=row: leaf[row], state.models[g].rows)
        assert_trees_close(own, models[i], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state.params, number, rtol=1e-12)
    np.testing.assert_allclose(got, losses, rtol=1e-12)


def test_a_mesh_and_staged_tables_give_the_same():
    method, mesh = alone(), fc.client_mesh(min(2, len(jax.devices())))
    sampler = samplers.uniform(7, 4)
    simulated = jax.jit(fc.simulate(method, sampler, 4))
    state, metrics = simulated(MODELS, POPULATION, KEY)
    on_mesh = alone(plan=fc.Plan(lanes=2 * mesh.size, mesh=mesh))
    placed = fc.place(method.init(MODELS), fc.shardings(method.init(MODELS), mesh))
    assert_trees_close(fc.continue_rounds(on_mesh, sampler, 4)(placed, POPULATION, KEY)[0], state, rtol=1e-12)
    host = fc.HostPopulation.from_flat(jax.tree.map(np.asarray, POPULATION.examples), np.asarray(POPULATION.offsets))
    began = fc.init_on_host(method.init, MODELS, num_clients=7)
    run = fc.continue_staged(method, sampler, 2, horizon=4)
    half, first = run(began, host, KEY)
    assert isinstance(half.models[1].rows["u"], np.ndarray)
    assert half.models[1].rows["u"].shape == (3, 5, 2)
    done, second = run(pickle.loads(pickle.dumps(half)), host, KEY)
    assert_trees_equal(done, state)
    losses = np.concatenate([first.loss, second.loss])
    np.testing.assert_array_equal(losses, metrics.loss)
    # Several simulations at once.
    keys = jax.random.split(KEY, 2)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), MODELS)
    both = fc.init_on_host(jax.vmap(method.init), many, num_clients=7, axis=1)
    both, _ = fc.continue_staged(method, sampler, 4)(both, host, keys)
    each = [simulated(MODELS, POPULATION, key)[0] for key in keys]
    assert_trees_close(both, jax.tree.map(lambda *leaves: np.stack(leaves), *each), rtol=1e-12)


def test_views_predict_with_the_model_of_each_client():
    method, (state, _) = alone(), rounds()
    ids = [5, -1, 0, 3, 4, 6]

    def metric(params, batch):
        return {"loss": loss_fn(params, batch, None), "width": jnp.full(len(batch["y"]), len(params))}

    got = jax.jit(lambda state: fc.evaluate_view(metric, method.personal, state, POPULATION, ids))(state)
    for at, i in enumerate(ids):
        if i < 0 or not SIZES[i]:
            assert np.isnan(got["loss"][at])
            continue
        model = jax.tree.map(lambda leaf: leaf[0], method.client_params(state, [i]))
        np.testing.assert_allclose(got["loss"][at], jnp.mean(loss_fn(model, POPULATION.client(i), None)), rtol=1e-12)
    by_group = tuple((lambda params, batch, g=g: {"group": jnp.full(len(batch["y"]), g)}) for g in range(2))
    found = fc.evaluate_view(by_group, method.personal, state, POPULATION)["group"]
    np.testing.assert_array_equal(found, np.where(np.asarray(SIZES) > 0, GROUPS.of, np.nan))
    stacked = method.client_params(state, GROUPS.members(1))
    assert_trees_equal(stacked, state.models[1].rows)


def test_split_puts_clients_first_and_leaves_no_idle_slot():
    cohort = POPULATION.cohort(np.arange(7)[::-1])
    parts = THREE.split(cohort)
    assert [part.ids.tolist() for part in parts] == [[6, 2, 0], [4, 3, 1], [5]]
    for part in parts:
        np.testing.assert_array_equal(part.sizes, np.asarray(SIZES)[part.ids])
        np.testing.assert_array_equal(part.starts, POPULATION.offsets[part.ids])
        assert (part.population_size, part.table_size, part.num_clients) == (7, 7, 7)
        assert part.examples is cohort.examples
    few = jax.jit(lambda ids: [part.ids for part in THREE.split(POPULATION.cohort(ids))])(np.array([5, -1, 4, 1]))
    assert [ids.tolist() for ids in few] == [[-1, -1, -1], [4, 1, -1], [5]]
    assert few[0].shape == (3,)


@pytest.mark.parametrize("groups", [fc.Groups.by_modulo(7, 3), fc.Groups([0, 1, 2, 0, 1, 2, 1]), fc.Groups([0] * 7)])
def test_join_is_the_inverse_of_split(groups):
    for ids in ([4, 0, -1, 6, 2], [-1, -1], [3], [6, 5, 4, 3, 2, 1, 0]):
        cohort = POPULATION.cohort(np.asarray(ids))
        parts = groups.split(cohort)
        joined = groups.join(cohort, [{"id": part.ids + 1.0} for part in parts])["id"]
        np.testing.assert_array_equal(joined, np.asarray(ids) + 1)
        for number, part in enumerate(parts):
            there = np.asarray(part.ids)[np.asarray(part.ids) >= 0]
            np.testing.assert_array_equal(there, [i for i in ids if i >= 0 and groups.of[i] == number])


def test_groups_know_their_members():
    assert len(THREE) == 3
    assert THREE.sizes.tolist() == [3, 3, 1]
    assert THREE.members(1).tolist() == [1, 3, 4]
    assert THREE.rows.tolist() == [0, 0, 1, 1, 2, 0, 2]
    assert THREE.index(1).tolist() == [-1, 0, -1, 1, 2, -1, -1]
    assert fc.Groups.by_modulo(5, 2).of.tolist() == [0, 1, 0, 1, 0]
    assert fc.Groups.by_modulo(3, 2) == fc.Groups([0, 1, 0])
    assert hash(fc.Groups.by_modulo(3, 2)) == hash(fc.Groups([0, 1, 0]))
    assert fc.Groups([0, 1]) != fc.Groups([1, 0])
    assert repr(THREE) == "Groups of 3, 3, 1 clients"


def test_tables_of_a_group_have_rows_of_its_clients_alone():
    table = THREE.table(1, {"v": jnp.zeros(2)})
    assert table.rows["v"].shape == (3, 2)
    cohort = POPULATION.cohort([4, 0, -1, 1])
    new = fc.scatter(table, cohort, {"v": jnp.arange(8.0).reshape(4, 2)})  # of all groups: only its own are written
    np.testing.assert_array_equal(new.rows["v"], [[6, 7], [0, 0], [0, 1]])
    np.testing.assert_array_equal(fc.gather(new, cohort)["v"][jnp.array([0, 3])], [[0, 1], [6, 7]])
    assert new.index is table.index


def test_parts_keep_rows_of_a_group_alone_and_pass_nothing_by():
    remembers = fc.Part(
        lambda state, asked, key: (asked.run(), state, ()), lambda upload, num: fc.client_table(num, jnp.zeros(2))
    )
    wrapped = fc.with_part(alone(), remembers, like=POPULATION)
    state = wrapped.init(MODELS)
    assert [jax.tree.leaves(table.rows)[0].shape[0] for table in fc.clients.tables_of(state.passes)] == [4, 3]
    step = jax.jit(wrapped.round)
    for ids in COHORTS:
        state, _ = step(state, POPULATION.cohort(np.asarray(ids)), KEY)
    assert_trees_close(state.method, rounds()[0], rtol=1e-12)


def test_what_a_round_asks_of_a_client_is_what_the_pass_of_its_group_does():
    """Known before the round, and counted once for each client."""
    tells = fc.Part(admission=fc.Admission(lambda state, cohort, traffic, key: (cohort, state, traffic)))
    wrapped = fc.with_part(alone(), tells, like=POPULATION)
    _, metrics = jax.jit(wrapped.round)(wrapped.init(MODELS), POPULATION.cohort([4, 0, -1, 3, 1]), KEY)
    traffic = metrics.extra.admission
    np.testing.assert_array_equal(traffic.examples, [4, 2, 0, 0, 3])
    np.testing.assert_array_equal(traffic.bytes_up, [8, 8, 0, 0, 8])
    np.testing.assert_array_equal(traffic.bytes_down, [8, 8, 0, 0, 8])


def test_bytes_and_executed_steps_of_groups_add_up():
    cohort = POPULATION.cohort([0, 4, -1, 3])
    parts = GROUPS.split(cohort)
    program = fc.ClientProgram(
        lambda shared, own, key: jnp.zeros(()), lambda shared, c, batch: (c, c), lambda shared, c: (jnp.zeros(2), ())
    )
    work = fc.local_work(2)
    results = [fc.for_each_client(program, jnp.zeros(3 + g), part, KEY, work=work) for g, part in enumerate(parts)]
    merged = GROUPS.merge(cohort, results)
    np.testing.assert_array_equal(merged.bytes_up, [16, 16, 0, 0])
    np.testing.assert_array_equal(merged.bytes_down, [24, 32, 0, 0])
    np.testing.assert_array_equal(merged.steps, [1, 2, 0, 0])
    np.testing.assert_array_equal(merged.weights, [1, 1, 0, 0])
    assert merged.executed_steps == sum(r.executed_steps for r in results)
    assert len(merged.aggregate) == len(merged.outputs) == 2


BAD = [
    (lambda: fc.Groups([0, 2, 0]), ValueError, "group 1 has no clients.*without gaps"),
    (lambda: fc.Groups([0, 10**9]), ValueError, "group 1 has no clients"),
    (lambda: fc.Groups([0, -1]), ValueError, "group -1 for client 1"),
    (lambda: fc.Groups([0.0, 1.0]), ValueError, r"of must be a 1-d array of integers, got float64\[2\]"),
    (lambda: fc.Groups([]), ValueError, "of must be a 1-d array of integers"),
    (lambda: fc.Groups([[0, 1]]), ValueError, r"of must be .*int64\[1, 2\]"),
    (lambda: jax.jit(fc.Groups)(np.array([0, 1])), TypeError, "of must be known"),
    (lambda: fc.Groups.by_modulo(2, 3), ValueError, "num_groups=3 but there are 2 clients"),
    (lambda: fc.Groups.by_modulo(2, 0), ValueError, "num_groups"),
    (lambda: THREE.members(3), ValueError, "there is no group 3: groups are numbered 0 to 2"),
    (lambda: THREE.table(-1, 0.0), ValueError, "there is no group -1"),
    (lambda: fc.Groups([0, 1]).split(POPULATION.cohort([0])), ValueError, "groups are of 2 clients, .* has 7"),
    (lambda: THREE.split(THREE.split(POPULATION.cohort([0]))[0]), ValueError, "is that of a group already"),
    (lambda: THREE.join(POPULATION.cohort([0]), [0]), ValueError, "values has 1 entries, but there are 3 groups"),
    (
        lambda: THREE.join(POPULATION.cohort([0, 1]), [jnp.zeros(3)] * 3),
        ValueError,
        r"shape \[3\] for a group of 2 slots",
    ),
    (
        lambda: check_tables(fc.Groups([0, 1]).table(0, jnp.zeros(())), POPULATION.cohort([0])),
        ValueError,
        "rows for 2 clients, but the population has 7: make the method with groups",
    ),
    (lambda: alone().client_params(alone().init(MODELS), [0, 1]), ValueError, r"groups 0 and 1.*groups.members\(0\)"),
    (lambda: alone().client_params(alone().init(MODELS), [7]), ValueError, "clients are numbered 0 to 6"),
    (
        lambda: jax.jit(lambda ids: alone().client_params(alone().init(MODELS), ids))(np.array([0])),
        TypeError,
        "ids are traced.*evaluate_view",
    ),
    (
        lambda: fc.evaluate_view((loss_fn,), alone().personal, alone().init(MODELS), POPULATION),
        ValueError,
        "metric_fn has 1 entries, but the view has 2 groups",
    ),
    (
        lambda: fc.evaluate_view(
            tuple(lambda p, b, g=g: {f"loss{g}": b["x"][:, 0]} for g in range(2)),
            alone().personal,
            alone().init(MODELS),
            POPULATION,
        ),
        ValueError,
        "make all groups' metrics the same",
    ),
    (
        lambda: fc.evaluate_view((loss_fn,), fc.View(lambda state: state), softmax_params(), POPULATION),
        TypeError,
        "metric_fn is a tuple, and the view has no groups",
    ),
    (lambda: fc.with_statistics(alone(), "average"), TypeError, "differ in architecture"),
    (
        lambda: fc.init_on_host(alone().init, MODELS, num_clients=6),
        ValueError,
        "without num_clients=6 rows",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
