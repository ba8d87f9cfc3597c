"""What is refused before a round, and what is made right: parameters, keys, sizes, samplers, numbers that do not fit.

Each row: a mistake, the error, and words of the message.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import algorithms
from fedjax_core import (
    Algorithm,
    ClientProgram,
    HostPopulation,
    Plan,
    Population,
    checks,
    client_mesh,
    client_weights,
    continue_rounds,
    continue_staged,
    for_each_client,
    init_on_host,
    keys,
    local_work,
    place,
    replicated,
    samplers,
    simulate,
    simulate_staged,
    simulation,
)
from tests.problems import softmax_loss, softmax_params, softmax_population

SGD = optax.sgd(0.1)
KEY = jax.random.key(0)
OLD_KEY = np.asarray(jax.random.key_data(KEY))  # what old code makes, uint32[2]
PARAMS = softmax_params()
POPULATION = softmax_population((3, 2, 4, 1))
HOST = HostPopulation.from_flat(jax.tree.map(np.asarray, POPULATION.examples), np.asarray(POPULATION.offsets))
FEDAVG = algorithms.fedavg(softmax_loss, SGD)
STATEFUL = ("scaffold", "feddyn", "mifa", "fedvarp", "fedau", "fedgamma", "fedfix", "afa_cd", "afa_cs", "moon")


def fedavg(**settings):
    return algorithms.fedavg(softmax_loss, settings.pop("optimizer", SGD), **settings)


def scaffold(num_clients):
    return algorithms.scaffold(softmax_loss, SGD, num_clients=num_clients)


def one_round(algorithm, key=KEY, cohort=None, state=None):
    state = algorithm.init(PARAMS) if state is None else state
    cohort = POPULATION.cohort([0, 1]) if cohort is None else cohort
    return jax.eval_shape(algorithm.round, state, cohort, key)


def run(sampler, algorithm=FEDAVG, population=POPULATION, key=KEY):
    return jax.eval_shape(simulate(algorithm, sampler, 2), PARAMS, population, key)


def staged(sampler, algorithm=FEDAVG, key=KEY):
    return simulate_staged(algorithm, sampler, 2)(PARAMS, HOST, key)


def population_of(**leaves):
    return Population.from_sizes(leaves, [2])


def host_of(**leaves):
    return HostPopulation.from_sizes(leaves, [2])


def drawing(*rows):
    """A sampler of one's own that has promised nothing."""
    table = np.asarray(rows, np.int32)
    return lambda key, round: jnp.asarray(table)[round % len(table)]


class Drawn(NamedTuple):
    params: jax.Array
    round: jax.Array


# A method that is no more than what it draws, and compiles in no time.
DRAWS = Algorithm(
    lambda params: Drawn(jnp.zeros(4), jnp.int32(0)),
    lambda state, cohort, key: (
        Drawn(state.params.at[cohort.ids].add(jax.random.normal(key, cohort.ids.shape)), state.round + 1),
        cohort.num_participants,
    ),
    lambda state: state.params,
)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))


class NormalizedNNX(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)


def mlp():
    return eqx.nn.MLP(2, 1, 3, 1, key=KEY)


def begun(rounds):
    return FEDAVG.init(PARAMS)._replace(round=jnp.int32(rounds))


TWICE, OUTSIDE, NO_CLIENT = drawing([0, 1, 1]), drawing([0, 1, 2], [0, 7, -1]), drawing([0, -1, -1])
MASK = np.array([True, False, True, False])
ROWS = [
    # parameters
    ("integer leaf", lambda: FEDAVG.init({"w": jnp.zeros(3), "seen": jnp.int32(7)}), TypeError, ["['seen']", "int32"]),
    ("Python integer", lambda: FEDAVG.init({"w": 1.0, "n": 3}), TypeError, ["params['n']", "3", "leave it out"]),
    ("boolean leaf", lambda: FEDAVG.init({"mask": np.ones(2, bool)}), TypeError, ["['mask']", "bool", "close over"]),
    ("complex leaf", lambda: FEDAVG.init({"w": jnp.zeros(2, complex)}), TypeError, ["['w']", "complex", "imaginary"]),
    ("text leaf", lambda: FEDAVG.init({"w": jnp.zeros(2), "name": "mlp"}), TypeError, ["['name']", "'mlp'", "arrays"]),
    ("key leaf", lambda: FEDAVG.init({"w": jnp.zeros(2), "k": KEY}), TypeError, ["params['k']", "random key"]),
    ("function", lambda: FEDAVG.init(lambda x: x), TypeError, ["params", "function", "model.init"]),
    ("no arrays", lambda: FEDAVG.init(None), ValueError, ["params", "without arrays", "NoneType"]),
    ("array of objects", lambda: FEDAVG.init({"w": np.array([None])}), TypeError, ["params['w']", "object"]),
    ("equinox model", lambda: FEDAVG.init(mlp()), TypeError, ["params", "function", "equinox.partition"]),
    ("too large", lambda: checks.params({"w": np.longdouble(0)}), TypeError, ["['w']"]),
    (
        "flax batch_stats",
        lambda: FEDAVG.init(Normalized().init(KEY, jnp.zeros((2, 2)))),
        TypeError,
        ["'batch_stats'", "params['params']", "GroupNorm"],
    ),
    (
        "batch_stats further down",
        lambda: FEDAVG.init({"encoder": Normalized().init(KEY, jnp.zeros((2, 2)))}),
        TypeError,
        ["['encoder']['batch_stats']", "running statistic"],
    ),
    ("nnx BatchStat", lambda: FEDAVG.init(nnx.state(NormalizedNNX(nnx.Rngs(0)))), TypeError, ["norm", "nnx"]),
    # keys
    (
        "a seed",
        lambda: FEDAVG.round(begun(0), POPULATION.cohort([0]), 0),
        TypeError,
        ["key", "int 0", "jax.random.key(seed)"],
    ),
    ("floats for a key", lambda: one_round(FEDAVG, np.zeros(2)), TypeError, ["key", "float64[2]", "jax.random.key"]),
    ("several keys", lambda: one_round(FEDAVG, keys.split(KEY)), ValueError, ["one random key", "[2]", "jax.vmap"]),
    ("several old keys", lambda: one_round(FEDAVG, np.stack([OLD_KEY] * 3)), ValueError, ["one random key", "[3]"]),
    ("several keys in a run", lambda: run(samplers.full(4), key=keys.split(KEY)), ValueError, ["key", "[2]", "vmap"]),
    ("keys of two axes, staged", lambda: staged(samplers.full(4), key=KEY[None, None]), ValueError, ["key", "[1, 1]"]),
    # the arguments of a round and of a run
    (
        "population as cohort",
        lambda: one_round(FEDAVG, cohort=POPULATION),
        TypeError,
        ["cohort", "Population", "(ids)"],
    ),
    ("ids as cohort", lambda: one_round(FEDAVG, cohort=np.arange(2)), TypeError, ["cohort", "population.cohort(ids)"]),
    ("params as state", lambda: one_round(FEDAVG, state=PARAMS), TypeError, ["state", "dict", "algorithm.init"]),
    (
        "factory as algorithm",
        lambda: simulate(algorithms.fedavg, samplers.full(4), 2),
        TypeError,
        ["fedavg", "call it"],
    ),
    ("no algorithm", lambda: continue_rounds(3, samplers.full(4), 2), TypeError, ["algorithm", "int", "init"]),
    ("ids as sampler", lambda: run([0, 1]), TypeError, ["sampler", "list", "samplers.schedule"]),
    ("rounds of floats", lambda: simulate(FEDAVG, samplers.full(4), 2.0), ValueError, ["num_rounds", "2.0"]),
    (
        "rounds beyond int32",
        lambda: simulate(FEDAVG, samplers.full(4), 2**31),
        ValueError,
        ["num_rounds", "2147483647"],
    ),
    ("counter at its end", lambda: FEDAVG.round(begun(2**31 - 1), POPULATION.cohort([0]), KEY), ValueError, ["round"]),
    (
        "run to its end",
        lambda: continue_rounds(FEDAVG, NO_CLIENT, 2)(begun(2**31 - 2), POPULATION, KEY),
        ValueError,
        ["2 "],
    ),
    (
        "host population in memory",
        lambda: simulate(FEDAVG, samplers.full(4), 1)(PARAMS, HOST, KEY),
        TypeError,
        ["HostPopulation", "staged"],
    ),
    # sizes
    ("sampler of more clients", lambda: run(samplers.uniform(60, 2)), ValueError, ["60 clients", "has 4"]),
    ("sampler of fewer clients", lambda: run(samplers.full(3)), ValueError, ["3 clients", "has 4"]),
    ("compiled sampler", lambda: run(jax.jit(samplers.uniform(60, 2))), ValueError, ["60 clients", "has 4"]),
    ("schedule of others", lambda: run(samplers.schedule([[0, 9]])), ValueError, ["client 9", "has 4 clients"]),
    ("sampler of others, staged", lambda: staged(samplers.uniform(60, 2)), ValueError, ["60 clients", "has 4"]),
    ("method of others, staged", lambda: staged(samplers.full(4), scaffold(5)), ValueError, ["5 rows", "4 clients"]),
    ("weights of others", lambda: one_round(fedavg(weights=np.ones(5))), ValueError, ["weights", "5", "4 clients"]),
    ("steps of others", lambda: one_round(fedavg(num_steps=np.ones(5, int))), ValueError, ["num_steps", "5", "4 cl"]),
    ("epochs of others", lambda: one_round(fedavg(num_epochs=[1, 2])), ValueError, ["num_epochs", "2 ent", "4 cl"]),
    (
        "weights of others, staged",
        lambda: staged(samplers.full(4), fedavg(weights=np.ones(5))),
        ValueError,
        ["weights", "5", "4 clients"],
    ),
    (
        "probabilities of others",
        lambda: one_round(algorithms.fedavg_ipw(softmax_loss, SGD, probabilities=np.full(3, 0.5))),
        ValueError,
        ["probabilities", "3", "4 clients"],
    ),
    ("no slots", lambda: POPULATION.cohort([]), ValueError, ["ids", "empty", "[-1]"]),
    ("sampler without slots", lambda: run(lambda k, r: jnp.zeros(0, jnp.int32)), ValueError, ["sampler", "int32[0]"]),
    ("sampler of floats", lambda: run(lambda k, r: jnp.zeros(2)), ValueError, ["sampler", "float64[2]"]),
    # what only a run shows
    (
        "client drawn twice",
        lambda: simulate(FEDAVG, TWICE, 2)(PARAMS, POPULATION, KEY),
        ValueError,
        ["round 0", "client 1"],
    ),
    (
        "client that is none",
        lambda: simulate(FEDAVG, OUTSIDE, 2)(PARAMS, POPULATION, KEY),
        ValueError,
        ["round 1", "7"],
    ),
    ("drawn twice, staged", lambda: staged(TWICE), ValueError, ["round 0", "client 1", "one slot"]),
    ("none, staged", lambda: staged(OUTSIDE), ValueError, ["round 1", "7", "0 to 3"]),
    ("client 99", lambda: POPULATION.client(99), ValueError, ["client 99", "0 to 3"]),
    ("client -1", lambda: POPULATION.client(-1), ValueError, ["client -1", "0 to 3"]),
    ("client -1 on the host", lambda: HOST.client(-1), ValueError, ["client -1", "0 to 3"]),
    ("client 4 on the host", lambda: HOST.client(4), ValueError, ["client 4", "0 to 3"]),
    ("id beyond int32", lambda: POPULATION.cohort([2**32]), ValueError, ["4294967296", "0 to 3"]),
    ("mask as ids", lambda: POPULATION.cohort(MASK), ValueError, ["ids", "bool[4]", "flatnonzero"]),
    ("schedule beyond int32", lambda: samplers.schedule([[2**32]]), ValueError, ["cohorts", "4294967296"]),
    # examples
    ("objects", lambda: population_of(x=np.array([1, None])), TypeError, ["examples['x']", "object", "numbers"]),
    ("texts", lambda: host_of(x=np.array(["a", "b"])), TypeError, ["examples['x']", "encode"]),
    ("dates", lambda: population_of(x=np.zeros(2, "datetime64[D]")), TypeError, ["examples['x']", "datetime64"]),
    ("bfloat16 NaN", lambda: population_of(x=jnp.asarray([1, jnp.nan], jnp.bfloat16)), ValueError, ["['x']", "(1,)"]),
    ("complex NaN", lambda: population_of(x=np.array([1, 1j * np.nan])), ValueError, ["['x']", "(1,)"]),
    (
        "sizes beyond int32",
        lambda: Population.from_sizes({"x": np.zeros(2)}, [2**31, 2]),
        ValueError,
        ["sizes", "int32"],
    ),
    (
        "unsigned offsets",
        lambda: Population.from_flat({"x": np.zeros(2)}, np.array([0, 2, 1], np.uint64)),
        ValueError,
        ["1"],
    ),
    # local work
    ("optax.sgd", lambda: one_round(fedavg(optimizer=optax.sgd)), TypeError, ["client_optimizer", "optax.sgd(0.1)"]),
    (
        "part of optax.adam",
        lambda: one_round(fedavg(optimizer=functools.partial(optax.adam, b1=0.5))),
        TypeError,
        ["client_optimizer", "adam", "call it"],
    ),
    ("server's sgd", lambda: algorithms.fedopt(softmax_loss, SGD, optax.sgd), TypeError, ["server_optimizer", "optax"]),
    (
        "function of a rate",
        lambda: one_round(fedavg(optimizer=lambda lr: optax.sgd(lr))),
        TypeError,
        ["client_optimizer", "optax.sgd(0.1)"],
    ),
    ("misspelt option", lambda: fedavg(batchsize=3), TypeError, ["batchsize", "batch_size?"]),
    ("no loss", lambda: algorithms.fedavg(SGD, softmax_loss), TypeError, ["loss_fn", "GradientTransformation"]),
    ("weights of zero", lambda: fedavg(weights=np.zeros(4)), ValueError, ["weights", "0 for every client"]),
    ("weight NaN", lambda: fedavg(weights=[1.0, np.nan]), ValueError, ["weights", "nan", "finite"]),
    ("weight infinite", lambda: fedavg(weights=[1.0, np.inf]), ValueError, ["weights", "inf", "finite"]),
    ("epochs beyond int32", lambda: fedavg(num_epochs=2**31), ValueError, ["num_epochs", "2147483648"]),
    ("steps beyond int32", lambda: fedavg(num_steps=np.array([1, 2**40])), ValueError, ["num_steps", "1099511627776"]),
    ("batch beyond int32", lambda: fedavg(batch_size=2**31), ValueError, ["batch_size", "2147483648"]),
    (
        "epochs times batches",
        lambda: fedavg(num_epochs=2**30, batch_size=1).round(FEDAVG.init(PARAMS), POPULATION.cohort([0]), KEY),
        ValueError,
        ["num_epochs=1073741824", "3221225472"],
    ),
]


@pytest.mark.quick
@pytest.mark.parametrize(("call", "kind", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused_with_a_sentence(call, kind, words):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("leaf", [[2**33 + 5, 7], np.array([3_000_000_000, 1]), np.array([1e300, 1]), [-(2**40), 1]])
def test_numbers_that_32_bits_cannot_hold(leaf, tmp_path):
    leaf = np.asarray(leaf)
    file = tmp_path / "x.npy"
    np.save(file, leaf)
    with jax.enable_x64(False):
        for build in (population_of, host_of):
            with pytest.raises(ValueError, match=r"examples\['x'\] holds .* does not fit"):
                build(x=leaf)
        with pytest.raises(ValueError, match=r"params\['w'\]" if leaf.dtype.kind == "f" else "int64"):
            checks.params({"w": leaf}) if leaf.dtype.kind == "f" else population_of(x=leaf)
        # A memory map is read cohort by cohort.
        mapped = HostPopulation.from_sizes({"x": np.load(file, mmap_mode="r")}, [1, 1])
        method = algorithms.fedavg(lambda p, b, k: p * b["x"].astype(np.float32), SGD, batch_size=1)
        with pytest.raises(ValueError, match=r"examples\['x'\] holds .* does not fit"):
            simulate_staged(method, samplers.full(2), 1)(jnp.float32(0), mapped, KEY)
    # With 64 bits they stay what they are.
    np.testing.assert_array_equal(population_of(x=leaf).examples["x"], leaf)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("num_clients", [3, 60])
def test_a_method_of_another_population(name, num_clients):
    more = {"features": lambda p, b, k: b["x"] @ p["w"]} if name == "moon" else {}
    method = getattr(algorithms, name)(softmax_loss, SGD, num_clients=num_clients, **more)
    with pytest.raises(ValueError, match=rf"{num_clients} clients.* has 4.*num_clients=4"):
        one_round(method)


def test_a_method_of_ones_own_is_checked_too():
    state = FEDAVG.init(PARAMS)
    own = Algorithm(lambda params: state, lambda state, cohort, key: (state, key), lambda s: s)
    assert own.round(state, POPULATION.cohort([0]), OLD_KEY)[1] == KEY
    other = own._replace(round=lambda state, cohort, key: (state, 0))
    for method in (own, other):
        with pytest.raises(TypeError, match="cohort"):
            method.round(state, POPULATION, KEY)
        with pytest.raises(TypeError, match=r"params\['n'\]"):
            method.init({"n": 1})
    with pytest.raises(TypeError, match="cohort"):
        for_each_client(ClientProgram(*[None] * 3), (), POPULATION, KEY, work=local_work())


def test_parameters_may_be_python_floats_and_hold_nothing_in_places():
    params = checks.params({"w": 1.5, "none": None, "half": np.zeros(2, np.float16)})
    assert not jnp.asarray(params["w"]).weak_type
    assert params["half"].dtype == np.float16
    FEDAVG.init(eqx.partition(mlp(), eqx.is_inexact_array)[0])
    FEDAVG.init({"params": softmax_params()})
    FEDAVG.init(nnx.state(NormalizedNNX(nnx.Rngs(0)), nnx.Param))


@pytest.mark.parametrize("kind", ["old", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind_give_the_numbers_of_their_seed(kind):
    key = OLD_KEY if kind == "old" else jax.random.key(0, impl=kind)
    several = np.stack([OLD_KEY] * 2) if kind == "old" else jnp.stack([key] * 2)
    simulation = simulate(DRAWS, samplers.uniform(4, 2), 2)
    want = simulation(PARAMS, POPULATION, KEY)[0].params
    np.testing.assert_array_equal(simulation(PARAMS, POPULATION, key)[0].params, want)
    # Under vmap keys of the kind rbg draw from the first one of the batch.
    several = several[::-1] if kind == "old" else several.at[0].set(jax.random.key(1, impl=kind))
    together = jax.vmap(simulation, (None, None, 0))(PARAMS, POPULATION, several)[0].params
    np.testing.assert_array_equal(together[1], want)
    assert keys.typed(several).shape == (2,)
    # Keys whose halves differ stay apart.
    data = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 1, 2]], np.uint32)
    assert len(np.unique(jax.random.key_data(keys.typed(data)), axis=0)) == 3


def test_split_and_folded_rbg_keys_become_those_of_their_seed():
    rbg = jax.random.key(3, impl="rbg")
    for make in (lambda key: jax.random.split(key, 3), lambda key: jax.random.fold_in(key, 7)):
        got, want = keys.typed(make(rbg)), make(jax.random.key(3))
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(want))


@pytest.mark.parametrize("devices", [1, 2])
def test_an_invalid_cohort_under_jit(devices):
    mesh = client_mesh(devices)
    work = local_work(batch_size=4)

    def round(state, cohort, key):
        program = ClientProgram(lambda s, i, k: s, lambda s, c, b: (c + 1, jnp.sum(c)), lambda s, c: (c, ()))
        plan = Plan(mesh=mesh if devices > 1 else None)
        moved = for_each_client(program, state.params, cohort, key, work=work, plan=plan).aggregate
        return Drawn(moved, state.round + 1), cohort.num_participants

    method = DRAWS._replace(round=round)
    sampler = lambda key, t: jnp.where(t == 1, jnp.array([0, 0]), jnp.array([0, 1]))  # noqa: E731
    args = place((PARAMS, POPULATION, KEY), replicated(mesh))
    fine, participants = jax.jit(simulate(method, sampler, 1))(*args)
    assert participants.tolist() == [2]
    assert (fine.params == 1).all()
    # With one device it is an error; where several are, the others would wait for ever for one that fails.
    simulation_of_two = jax.jit(simulate(method, sampler, 2))
    with pytest.warns(RuntimeWarning, match="in round 1 the sampler's ids holds client 0 more than once"):
        bad, participants = jax.block_until_ready(simulation_of_two(*args))
    assert jnp.isnan(bad.params).all()
    assert participants.tolist() == [0, 0]


def test_with_one_device_the_report_of_an_invalid_cohort_is_an_error(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="in round 1 the sampler's ids holds client 0"):
        simulation._report(3, 1, np.array([0, 0]))
    simulation._report(3, -1, np.array([0, 0]))


def test_a_sampler_of_ones_own_may_return_numpy_arrays():
    run(lambda key, round: np.array([1, 2]))
    with pytest.raises(ValueError, match="client 1 more than once"):
        simulate(FEDAVG, lambda key, round: np.array([1, 1]), 2)(PARAMS, POPULATION, KEY)


def test_inside_jit_wide_ids_are_compared_before_they_are_narrowed():
    with jax.enable_x64(True):
        ids = jax.jit(lambda ids: POPULATION.cohort(ids).ids)(jnp.array([2**33 + 1, 1]))
    np.testing.assert_array_equal(ids, [-1, 1])
    assert ids.dtype == jnp.int32


def test_inside_jit_a_repeated_client_fills_one_slot():
    ids = jax.jit(lambda ids: POPULATION.cohort(ids).ids)(jnp.array([3, -1, 3, 0, -1, 9, 0]))
    np.testing.assert_array_equal(ids, [3, -1, -1, 0, -1, -1, -1])


@pytest.mark.parametrize("weight", [1e-300, 1e300])
def test_weights_of_any_size_only_count_relative_to_each_other(weight):
    cohort = POPULATION.cohort([0, 1, 3])
    plain = np.array([1.0, 2, 3, 4])
    with jax.enable_x64(False):
        want, got = (client_weights(weights, cohort) for weights in (plain, plain * weight))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(want, [0.4, 0.8, 1.6], rtol=1e-6)


def test_state_on_the_host_of_the_right_size_is_taken():
    method = scaffold(4)
    state = init_on_host(method.init, PARAMS, num_clients=4)
    got, _ = continue_staged(method, samplers.uniform(4, 2), 1)(state, HOST, OLD_KEY)
    assert got.round == 1
