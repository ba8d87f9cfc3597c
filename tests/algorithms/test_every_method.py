"""What every method must do. A new factory in `algorithms.__all__` is tested here by being there."""

import inspect
import pickle
from functools import cache, partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import algorithms
from fedjax_core import (
    HostPopulation,
    Plan,
    clients,
    continue_rounds,
    continue_staged,
    init_on_host,
    samplers,
    simulate,
)
from tests import reference
from tests.problems import (
    assert_trees_close,
    assert_trees_equal,
    softmax_features,
    softmax_loss,
    softmax_params,
    softmax_population,
)

NUM_CLIENTS = 7
SIZES = (1, 9, 4, 0, 13, 6, 2)  # from one example up, one client empty, batch size dividing hardly any
BATCH = 4
KEY = jax.random.key(11)

# One worker gets all tests of a method, so that they share its compiled functions.
METHODS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in algorithms.__all__]
every_method = pytest.mark.parametrize("name", METHODS)
SAMPLER = samplers.uniform(NUM_CLIENTS, 4)
with_client_state = pytest.mark.parametrize(
    "name", [m for m in METHODS if "num_clients" in inspect.signature(getattr(algorithms, m.values[0])).parameters]
)


# Counts of the size of this problem; and in single precision it takes a box wide enough for values to differ by far
# more than their rounding, and more noise than that of a solve.
SETTINGS = {
    "fzoos": {
        **{"initial": 4, "active": 2, "active_candidates": 8, "survey": 5, "survey_candidates": 12},
        **{"capacity": 40, "neighbors": 24, "num_features": 50, "feature_neighbors": 30},
        **{"radius": 0.5, "noise": 1e-2, "ridge": 1e-2},
    }
}


def make(name, *, lr=0.1, optimizer=None, plan=None, **settings):
    factory = getattr(algorithms, name)
    parameters = inspect.signature(factory).parameters
    if "num_clients" in parameters:
        settings.setdefault("num_clients", NUM_CLIENTS)
    if "features" in parameters:
        settings.setdefault("features", softmax_features)
    if "inputs" in parameters:
        settings.setdefault("inputs", lambda params, batch: {"w": batch["x"]})
        settings.setdefault("layers", {"w": 5})
    if "logits" in parameters:
        settings.setdefault("logits", lambda params, batch, key: batch["x"] @ params["w"] + params["b"])
    settings = {**SETTINGS.get(name, {}), **settings}
    if name != "fedsgd":  # fedsgd has no epochs
        settings.setdefault("num_epochs", 1)  # up to four local steps; the plain loop is slow
    return factory(softmax_loss, optimizer or optax.sgd(lr), batch_size=BATCH, plan=plan, **settings)


def hyperparameters(name):
    """Names and values of a method's float hyper-parameters, here."""
    parameters = inspect.signature(getattr(algorithms, name)).parameters.values()
    own = SETTINGS.get(name, {})
    return {p.name: own.get(p.name, p.default) for p in parameters if isinstance(p.default, float)}


@cache
def population(dtype=np.float64):
    return softmax_population(SIZES, dtype=dtype)


def jit_at_most(traces, function):
    """`jax.jit(function)` that fails when it is traced more than `traces` times."""
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        assert count <= traces, f"traced {count} times, expected at most {traces}"
        return function(*args)

    return jax.jit(counted)


def defaults(name):
    """Every float that a method can be swept over. Python's numbers leave the model's precision as it is."""
    return {"lr": 0.1, **hyperparameters(name)}


@cache
def jitted_round(name):
    """Traced twice in this whole file, for float64 and float32, whatever the ids, sizes, keys and populations."""
    traced = jit_at_most(2, lambda values, *args: make(name, **values).round(*args))
    return partial(traced, defaults(name))


@cache
def two_rounds_at(name):
    """`run(values, state, population, key)`, two rounds at any values of the hyper-parameters."""
    return jit_at_most(1, lambda values, *args: continue_rounds(make(name, **values), SAMPLER, 2)(*args))


def two_rounds(name):
    return partial(two_rounds_at(name), defaults(name))


def three_rounds(round_fn, algorithm, cohorts, population, params=None):
    state = algorithm.init(softmax_params() if params is None else params)
    metrics = []
    for t, ids in enumerate(cohorts):
        state, info = round_fn(state, population.cohort(np.asarray(ids)), jax.random.fold_in(KEY, t))
        metrics.append(info)
    return state, metrics


COHORTS = [[0, 4, 2, 1], [5, -1, 1, 6], [3, 2, 0, 4]]  # partial participation, an empty slot, an empty client


def by_plain_loop(name, cohorts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "for_each_client", reference.for_each_client)
        algorithm = make(name)
        return three_rounds(algorithm.round, algorithm, cohorts, population())


@cache
def reference_rounds(name):
    return by_plain_loop(name, COHORTS)


@every_method
@pytest.mark.parametrize("plan", ["sequential", "mesh with lanes"])
def test_every_plan_gives_the_result_of_a_plain_loop(name, plan):
    algorithm = make(name)
    if plan == "sequential":
        round_fn = jitted_round(name)
    else:  # two lanes on each device
        mesh = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
        round_fn = jax.jit(make(name, plan=Plan(lanes=4, mesh=mesh)).round)
    got = three_rounds(round_fn, algorithm, COHORTS, population())
    assert_trees_close(got, reference_rounds(name), rtol=1e-12, atol=1e-13)


@every_method
def test_float32_stays_float32_and_agrees(name):
    params = softmax_params(dtype=np.float32)
    algorithm = make(name)
    state, metrics = three_rounds(jitted_round(name), algorithm, COHORTS, population(np.float32), params)
    initial = algorithm.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, initial)
    expected, _ = reference_rounds(name)
    assert_trees_close(
        jax.tree.map(lambda leaf: leaf.astype(np.float64), algorithm.params(state)),
        algorithm.params(expected),
        1e-4,
        1e-5,
    )
    assert all(m.update_norm > 0 for m in metrics)


@every_method
def test_cohort_order_does_not_matter(name):
    algorithm = make(name)
    once = three_rounds(jitted_round(name), algorithm, COHORTS, population())
    again = three_rounds(jitted_round(name), algorithm, [ids[::-1] for ids in COHORTS], population())
    assert_trees_close(again, once, rtol=1e-12, atol=1e-13)


@every_method
def test_empty_slots_and_empty_clients_change_nothing(name):
    algorithm = make(name)
    padded = three_rounds(jitted_round(name), algorithm, [[4, -1, 1, 3], [-1, 3, 2, -1]], population())
    bare = by_plain_loop(name, [[4, 1], [2]])
    assert_trees_close(padded, bare, rtol=1e-12, atol=1e-13)
    assert [int(m.participants) for m in padded[1]] == [2, 1]


@every_method
def test_an_empty_cohort_leaves_the_model_unchanged(name):
    algorithm = make(name)
    before, _ = three_rounds(jitted_round(name), algorithm, COHORTS, population())
    for ids in ([-1, -1, -1, -1], [3, -1, -1, -1]):
        after, metrics = jitted_round(name)(before, population().cohort(np.asarray(ids)), KEY)
        assert_trees_equal(algorithm.params(after), algorithm.params(before))
        assert_trees_equal(after._replace(round=0), before._replace(round=0))
        assert metrics.participants == 0
        assert metrics.update_norm == 0
        assert np.isnan(metrics.loss)  # nobody has measured one
        measured = {"fzoos": metrics.extra._replace(value=0)} if name == "fzoos" else {}
        chex.assert_tree_all_finite((after, metrics._replace(loss=0, extra=measured.get(name, metrics.extra))))


@every_method
def test_only_participants_rows_change(name):
    algorithm = make(name)
    before, _ = three_rounds(jitted_round(name), algorithm, COHORTS, population())
    after, _ = jitted_round(name)(before, population().cohort(np.array([5, 1, -1, -1])), KEY)
    absent = np.array([0, 2, 3, 4, 6])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if old.shape[:1] == (NUM_CLIENTS,):
            np.testing.assert_array_equal(old[absent], new[absent])
            kept = name == "fedamd"  # a participant that is no anchor keeps its row
            assert kept or not np.array_equal(old[1], new[1])


@every_method
def test_same_key_same_bits_other_key_other_bits(name):
    algorithm = make(name)
    state, cohort = algorithm.init(softmax_params()), population().cohort(np.array([1, 4, 2, 5]))
    first = jitted_round(name)(state, cohort, jax.random.key(3))
    assert_trees_equal(jitted_round(name)(state, cohort, jax.random.key(3)), first)
    other = jitted_round(name)(state, cohort, jax.random.key(4))
    deterministic = name == "fedsgd"  # the full gradient draws nothing
    assert bool(other[1].update_norm == first[1].update_norm) == deterministic


@with_client_state
def test_client_state_in_host_memory_gives_the_same_bits(name):
    """A method that touches its tables through the cohort alone cannot tell that they hold the cohort's rows alone."""
    algorithm = make(name)
    state = init_on_host(algorithm.init, softmax_params(), num_clients=NUM_CLIENTS)
    assert any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
    host = HostPopulation.from_flat(jax.tree.map(np.asarray, population().examples), np.asarray(population().offsets))
    staged, _ = continue_staged(algorithm, SAMPLER, 3)(state, host, KEY)
    expected = algorithm.init(softmax_params())
    sample_key, train_key = jax.random.split(KEY)
    for t in range(3):
        cohort = population().cohort(SAMPLER(sample_key, t))
        expected, _ = jitted_round(name)(expected, cohort, jax.random.fold_in(train_key, t))
    assert_trees_equal(staged, expected)


@every_method
def test_scanned_rounds_equal_single_rounds_bit_for_bit(name):
    algorithm = make(name)
    expected, rows = algorithm.init(softmax_params()), []
    state, first = two_rounds(name)(expected, population(), KEY)
    state, second = two_rounds(name)(state, population(), KEY)
    sample_key, train_key = jax.random.split(KEY)
    for t in range(4):
        cohort = population().cohort(SAMPLER(sample_key, t))
        expected, info = jitted_round(name)(expected, cohort, jax.random.fold_in(train_key, t))
        rows.append(info)
    assert_trees_equal(state, expected)
    scanned = jax.tree.map(lambda *leaves: np.concatenate(leaves), first, second)
    assert_trees_equal(scanned, jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


@every_method
def test_seeds_and_every_float_vmap_like_a_loop(name):
    values = defaults(name)

    def final(values, key):
        values = dict(values)
        algorithm = make(name, lr=values.pop("lr"), **values)
        state, metrics = simulate(algorithm, SAMPLER, 2)(softmax_params(), population(), key)
        return algorithm.params(state), metrics

    # One member per hyper-parameter, each with that one lowered, and a seed of its own: all in one compile.
    names = list(values)
    batch = {n: jnp.asarray([values[n] * (0.8 if m == n else 1.0) for m in names]) for n in names}
    keys = jax.random.split(jax.random.key(5), len(names))
    together = jax.jit(jax.vmap(final))(batch, keys)
    for m in range(len(names)):
        alone = {n: float(v[m]) for n, v in batch.items()}
        algorithm = make(name, **alone)
        state, metrics = two_rounds_at(name)(alone, algorithm.init(softmax_params()), population(), keys[m])
        expected = algorithm.params(state), metrics
        assert_trees_close(jax.tree.map(lambda leaf, m=m: leaf[m], together), expected, rtol=1e-11, atol=1e-12)


@every_method
def test_other_ids_sizes_keys_and_values_do_not_retrace(name):
    state = make(name).init(softmax_params())
    other = softmax_population(SIZES[::-1], seed=9)  # other clients, sizes and values, as many examples
    for t, (clients_, ids) in enumerate([(population(), [0, 1, 2, 4]), (other, [3, -1, 5, 6]), (other, [-1] * 4)]):
        state, _ = jitted_round(name)(state, clients_.cohort(np.asarray(ids)), jax.random.key(t))
    assert state.round == 3  # jitted_round itself fails when it is traced once more


@every_method
def test_no_large_array_becomes_a_constant(name):
    run = simulate(make(name), SAMPLER, 2)
    jaxpr = jax.make_jaxpr(run)(softmax_params(), population(), KEY)
    assert sum(np.size(c) for c in jaxpr.consts) < 64


@every_method
def test_state_survives_save_and_restore(name, tmp_path):
    state, _ = two_rounds(name)(make(name).init(softmax_params()), population(), KEY)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    for again in (
        restored,
        flax.serialization.from_bytes(make(name).init(softmax_params()), flax.serialization.to_bytes(state)),
        pickle.loads(pickle.dumps(state)),
    ):
        chex.assert_trees_all_equal_structs(again, state)
        assert_trees_equal(again, state)
    assert_trees_equal(two_rounds(name)(restored, population(), KEY), two_rounds(name)(state, population(), KEY))


@every_method
def test_client_params_are_one_model_per_client(name):
    algorithm = make(name)
    state, _ = three_rounds(jitted_round(name), algorithm, COHORTS, population())
    stacked = algorithm.client_params(state, jnp.array([2, 0, 5]))
    jax.tree.map(lambda rows, one: chex.assert_shape(rows, (3, *one.shape)), stacked, algorithm.params(state))


@every_method
def test_a_state_can_be_donated(name):
    """No buffer is in a state twice, nor are the caller's params in it."""
    algorithm, params = make(name), softmax_params()
    state = algorithm.init(params)
    assert_no_buffer_twice((params, state))
    assert_no_buffer_twice((params, jax.jit(algorithm.init)(params)))
    state, _ = jitted_round(name)(state, population().cohort(np.array([0, 4, 2, 1])), KEY)
    assert_no_buffer_twice((params, state))


@pytest.mark.parametrize("name", ["ewc", "scaffold_m"])
def test_donated_rounds_give_the_same_numbers(name):
    """From one set of params as often as one likes."""
    algorithm, params = make(name), softmax_params()
    expected, cohort = algorithm.init(params), population().cohort(np.array([0, 4, 2, 1]))
    donated = jax.jit(algorithm.round, donate_argnums=0)
    for _ in range(2):
        state = algorithm.init(params)
        for t in range(2):
            state, _ = donated(state, cohort, jax.random.key(t))
    for t in range(2):
        expected, _ = jitted_round(name)(expected, cohort, jax.random.key(t))
    assert_trees_equal(state, expected)
    assert not params["w"].is_deleted()


def assert_no_buffer_twice(tree):
    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in arrays}) == len(arrays)


@every_method
def test_what_the_server_uses_is_in_the_uploads(name):
    """Of the outputs of client programs, which stay with the clients, only the clients' rows are made."""
    assert not depends_on_outputs(name)[0]


def test_rows_of_clients_are_made_of_outputs():
    assert depends_on_outputs("scaffold") == (False, True)


def depends_on_outputs(name):
    """Whether the server's state after a round, and the clients' rows, depend on what client programs put out."""
    real, algorithm = clients.for_each_client, make(name)

    def round_from(outputs, state, cohort):
        def only_shapes(program, shared, client_inputs, cohort, key, **options):
            call = partial(real, program, **options)
            shapes = jax.eval_shape(call, shared, client_inputs, cohort, key)
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return blank._replace(outputs=jax.tree.map(lambda o: o + outputs.astype(o.dtype), blank.outputs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clients, "for_each_client", only_shapes)
            return clients.split_tables(algorithm.round(state, cohort, KEY)[0])

    state, cohort = algorithm.init(softmax_params()), population().cohort(np.array([0, 4, 2, 1]))

    def depends(part):
        jaxpr = jax.make_jaxpr(lambda *args: round_from(*args)[part])(jnp.zeros(()), state, cohort).jaxpr
        needed = set(filter(is_variable, jaxpr.outvars))
        for eqn in reversed(jaxpr.eqns):
            if needed & set(eqn.outvars):
                needed |= set(filter(is_variable, eqn.invars))
        return jaxpr.invars[0] in needed

    return depends(0), depends(1)


def is_variable(atom):
    return not hasattr(atom, "val")  # literals have one


@every_method
def test_metrics_count_scalars_and_participants(name):
    _, metrics = three_rounds(jitted_round(name), make(name), COHORTS, population())
    size = 5 * 3 + 3
    for info, participants in zip(metrics, (4, 3, 3), strict=True):
        assert info.participants == participants
        assert info.uploaded >= size
        assert info.downloaded >= size
        assert info.loss > 0
