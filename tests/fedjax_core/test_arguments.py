"""Arguments in each other's place and functions of another kind: a sentence of the library's own, before JAX speaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import (
    HostPopulation,
    Plan,
    Population,
    Weighted,
    client_statistics,
    continue_rounds,
    evaluate,
    evaluate_clients,
    evaluate_personal,
    samplers,
    simulate,
    simulate_staged,
)

KEY = jax.random.key(0)
PARAMS = {"w": jnp.zeros(3)}
EXAMPLES = {"x": np.ones((6, 3), np.float32), "y": np.zeros(6, np.int32)}
POPULATION = Population.from_sizes(EXAMPLES, [3, 3])
HOST = HostPopulation.from_sizes(EXAMPLES, [3, 3])
COHORT = POPULATION.cohort([0, 1])
SAMPLER = samplers.uniform(2, 1)
TWO = {"w": jnp.zeros((2, 3))}


def loss(params, batch, key):
    return batch["x"] @ params["w"]


def metric(params, batch):
    return {"score": batch["x"] @ params["w"]}


def fedavg(loss=loss, optimizer=None):
    return algorithms.fedavg(loss, optax.sgd(0.1) if optimizer is None else optimizer, batch_size=2)


STATE = fedavg().init(PARAMS)


def run(algorithm=None, sampler=SAMPLER, num_rounds=2, params=PARAMS, population=POPULATION, key=KEY):
    return simulate(algorithm or fedavg(), sampler, num_rounds)(params, population, key)


def staged(algorithm=None, sampler=SAMPLER, num_rounds=2, params=PARAMS, population=HOST, key=KEY):
    return simulate_staged(algorithm or fedavg(), sampler, num_rounds)(params, population, key)


class Uncallable:
    init = update = 3


NAN = {"w": np.array([0.0, np.nan, 1.0])}
ROWS = [
    # Functions of other arguments.
    ("sampler of the key", lambda: run(sampler=lambda key: jnp.zeros(1, int)), TypeError, ["sampler", "(key, round)"]),
    ("sampler of three", lambda: run(sampler=lambda k, t, s: jnp.zeros(1, int)), TypeError, ["sampler", "(k, t, s)"]),
    ("staged sampler", lambda: staged(sampler=lambda key: jnp.zeros(1, int)), TypeError, ["sampler", "(key, round)"]),
    ("sampler not called", lambda: run(sampler=samplers.uniform), TypeError, ["samplers.uniform", "cohort_size"]),
    ("staged, not called", lambda: staged(sampler=samplers.full), TypeError, ["samplers.full", "num_clients"]),
    ("sampler in Python", lambda: run(sampler=lambda k, t: [int(t)]), TypeError, ["sampler looks", "schedule"]),
    ("loss of two", lambda: fedavg(lambda params, batch: 0), TypeError, ["loss_fn", "(params, batch, key)"]),
    ("loss of five", lambda: fedavg(lambda p, b, k, m, n: 0), TypeError, ["loss_fn", "(p, b, k, m, n)"]),
    ("no metric", lambda: evaluate(None, PARAMS, EXAMPLES), TypeError, ["metric_fn", "NoneType"]),
    ("no metric of clients", lambda: evaluate_clients("accuracy", PARAMS, POPULATION), TypeError, ["metric_fn"]),
    ("no personal metric", lambda: evaluate_personal(None, TWO, POPULATION, [0, 1]), TypeError, ["metric_fn"]),
    ("metric with a key", lambda: evaluate(lambda p, b, k: b["y"], PARAMS, EXAMPLES), TypeError, ["metric_fn", "k"]),
    ("optimizer that is none", lambda: run(fedavg(optimizer=Uncallable())), TypeError, ["client_optimizer"]),
    ("class of optimizers", lambda: run(fedavg(optimizer=Uncallable)), TypeError, ["client_optimizer", "round"]),
    ("optimizer of three", lambda: run(fedavg(optimizer=lambda t, i, j: 0)), TypeError, ["(t, i, j)", "optax.sgd"]),
    ("server's", lambda: algorithms.fedopt(loss, optax.sgd(0.1), Uncallable()), TypeError, ["server_optimizer"]),
    (
        "rates as a list",
        lambda: run(fedavg(optimizer=lambda t, i: optax.sgd([0.1, 0.2][i]))),
        TypeError,
        ["client_optimizer looks", "jnp.asarray(rates)"],
    ),
    (
        "rates in numpy",
        lambda: run(fedavg(optimizer=lambda t, i: optax.sgd(np.ones(2)[i]))),
        TypeError,
        ["client_optimizer looks", "jnp.asarray(rates)"],
    ),
    (
        "rate by if",
        lambda: run(fedavg(optimizer=lambda t: optax.sgd(0.1 if t < 3 else 0.01))),
        TypeError,
        ["client_optimizer looks", "jnp.where"],
    ),
    # What a loss or a metric gives back.
    ("loss in a pair", lambda: run(fedavg(lambda p, b, k: (loss(p, b, k), 1))), ValueError, ["tuple", "alone"]),
    ("loss in a column", lambda: run(fedavg(lambda p, b, k: loss(p, b, k)[:, None])), ValueError, ["[2, 1]", "axes"]),
    ("mean loss", lambda: run(fedavg(lambda p, b, k: loss(p, b, k).mean())), ValueError, ["float", "do not average"]),
    ("loss of integers", lambda: run(fedavg(lambda p, b, k: b["y"])), ValueError, ["int32[2]", "astype(float)"]),
    ("metric in words", lambda: evaluate(lambda p, b: "good", PARAMS, EXAMPLES), ValueError, ["metric", "'good'"]),
    (
        "negative weight",
        lambda: evaluate(lambda p, b: Weighted(b["x"][:, 0], b["y"] - 2), PARAMS, EXAMPLES),
        ValueError,
        ["at least 0", "-2"],
    ),
    (
        "a client's negative weight",
        lambda: evaluate_clients(lambda p, b: Weighted(b["x"][:, 0], b["y"] - 2), PARAMS, POPULATION),
        ValueError,
        ["at least 0", "-2"],
    ),
    # In each other's place.
    ("sampler first", lambda: simulate(SAMPLER, fedavg(), 2), TypeError, ["algorithm", "ValidSampler", "order"]),
    ("rounds second", lambda: simulate(fedavg(), 2, SAMPLER), TypeError, ["sampler", "int"]),
    ("population first", lambda: run(params=POPULATION, population=PARAMS), TypeError, ["Population", "order"]),
    ("key first", lambda: run(params=KEY, key=PARAMS), TypeError, ["params", "a random key", "order"]),
    ("key as population", lambda: run(population=KEY), TypeError, ["population", "a random key", "from_sizes"]),
    ("state as params", lambda: run(params=STATE), TypeError, ["ModelState", "algorithm.params(state)"]),
    ("cohort as population", lambda: run(population=COHORT), TypeError, ["Cohort", "algorithm.round"]),
    ("staged cohort", lambda: staged(population=COHORT), TypeError, ["HostPopulation", "Cohort"]),
    ("examples as population", lambda: run(population=EXAMPLES), TypeError, ["dict", "Population.from_sizes"]),
    ("host population", lambda: run(population=HOST), TypeError, ["HostPopulation", "simulate_staged"]),
    ("population on the device", lambda: staged(population=POPULATION), TypeError, ["Population", "use simulate"]),
    ("population as cohort", lambda: fedavg().round(STATE, POPULATION, KEY), TypeError, ["cohort(ids)", "order"]),
    ("state as model", lambda: evaluate(metric, STATE, EXAMPLES), TypeError, ["algorithm.params(state)"]),
    ("model second", lambda: evaluate_clients(metric, POPULATION, PARAMS), TypeError, ["Population", "order"]),
    ("evaluated cohort", lambda: evaluate_clients(metric, PARAMS, COHORT), TypeError, ["population", "Cohort"]),
    ("one model", lambda: evaluate_personal(metric, PARAMS, POPULATION, [0, 1]), ValueError, ["[3]", "[C, ...]"]),
    ("number of lanes", lambda: evaluate_personal(metric, TWO, POPULATION, [0, 1], plan=4), TypeError, ["Plan(lanes"]),
    ("params of one run", lambda: staged(key=jax.random.split(KEY)), ValueError, ["params['w']", "[3]", "2 keys"]),
    # Numbers.
    ("NaN", lambda: run(params=NAN), ValueError, ["params['w']", "NaN", "(1,)"]),
    ("NaN staged", lambda: staged(params=NAN), ValueError, ["params['w']", "NaN"]),
    ("NaN in bfloat16", lambda: fedavg().init({"w": jnp.asarray([jnp.inf], jnp.bfloat16)}), ValueError, ["infinite"]),
    ("client_statistics of pairs", lambda: client_statistics(jnp.zeros((2, 2))), ValueError, ["[2, 2]", "num_clients"]),
    ("client_statistics of nothing", lambda: client_statistics(None), ValueError, ["float[num_clients]"]),
    ("client_statistics of complex", lambda: client_statistics(jnp.ones(2, complex)), ValueError, ["complex"]),
    # Too few for the run.
    ("short schedule", lambda: run(sampler=samplers.schedule([[0]])), ValueError, ["1 rounds", "repeat=True"]),
    ("staged schedule", lambda: staged(sampler=samplers.schedule([[0]])), ValueError, ["1 rounds", "repeat=True"]),
    (
        "schedule that ends later",
        lambda: continue_rounds(fedavg(), samplers.schedule([[0], [1]]), 2)(
            STATE._replace(round=jnp.int32(1)), POPULATION, KEY
        ),
        ValueError,
        ["2 rounds", "round 2"],
    ),
    ("too few rates", lambda: run(fedavg(optimizer=lambda t, i: optax.sgd(jnp.ones(1)[i]))), ValueError, ["client 1"]),
    (
        "too few rates, taken",
        lambda: staged(fedavg(optimizer=lambda t, i: optax.sgd(jnp.take(jnp.ones(1), i)))),
        ValueError,
        ["client 1", "one entry for each client"],
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused_with_a_sentence(call, kind, words):
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_too_few_rates_are_found_where_they_are_traced():
    @jax.jit
    def final(rates):
        return run(fedavg(optimizer=lambda t, i: optax.sgd(rates[i])))[0].params

    with pytest.raises(ValueError, match="client 1, the last of 2"):
        final(jnp.ones(1))
    assert np.isfinite(final(jnp.ones(2))["w"]).all()
    jax.eval_shape(lambda: run(fedavg(optimizer=lambda t, i: optax.sgd(jnp.ones(1)[i % 1]))))


def test_a_schedule_that_repeats():
    sampler = samplers.schedule([[0, -1], [1, 0]], repeat=True)
    assert [np.asarray(sampler(KEY, t)).tolist() for t in range(4)] == 2 * [[0, -1], [1, 0]]
    _, metrics = jax.eval_shape(lambda: run(sampler=sampler, num_rounds=5))
    assert metrics.loss.shape == (5,)
    with pytest.raises(TypeError, match="repeat"):
        samplers.schedule([[0]], repeat=3)
    with pytest.raises(ValueError, match="1 rounds"):  # also under jit, where a simulation begins at 0
        jax.eval_shape(lambda: run(sampler=samplers.schedule([[0]])))


def test_a_spread_over_no_clients_is_not_a_number():
    for higher in (True, False):
        for values in (jnp.full(3, jnp.nan), jnp.zeros(0), [np.nan]):
            assert np.isnan(client_statistics(values, higher_is_better=higher)).all()
    assert client_statistics([1, 2, 3]).mean == 2


def test_an_error_of_ones_own_says_what_the_function_was_given():
    with pytest.raises(KeyError) as caught:
        run(fedavg(lambda params, batch, key: batch["image"] @ params["w"]))
    notes = [note for note in caught.value.__notes__ if "loss_fn was called with params {['w'] float" in note]
    assert len(notes) == 1
    assert "['x'] float32[2, 3]" in notes[0]


@pytest.mark.parametrize(
    "function",
    [
        jax.jit(loss),
        functools.partial(lambda scale, params, batch, key: scale * loss(params, batch, key), 2.0),
        lambda *args: loss(*args),
        lambda params, batch, key=None: loss(params, batch, key),
        functools.wraps(metric)(lambda params, batch, key: loss(params, batch, key)),
    ],
    ids=["jit", "partial", "any", "default", "wraps a function of two"],
)
def test_functions_that_can_be_called_are_taken(function):
    jax.eval_shape(lambda: run(fedavg(function)))


def test_negative_weights_under_jit_and_of_personal_models_give_no_number():
    def negative(params, batch):
        return Weighted(batch["x"] @ params["w"], jnp.where(jnp.arange(len(batch["x"])) == 0, -1, 2))

    assert np.isnan(jax.jit(lambda p: evaluate(negative, p, EXAMPLES))(PARAMS))
    assert np.isnan(evaluate_personal(negative, TWO, POPULATION, [0, 1])).all()


def test_parameters_that_a_compiled_function_has_closed_over_are_looked_at():
    assert jax.jit(lambda key: run(key=key)[0].params["w"])(KEY).shape == (3,)
    array = jnp.asarray(NAN["w"], jnp.float32)
    with pytest.raises(ValueError, match="NaN"):
        jax.eval_shape(lambda key: run(params={"w": array}, key=key), KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algorithms.fedavg(loss, optax.sgd(0.1), server_lr=1e39), "server_lr must be at most"),
        (lambda: algorithms.fedavg(loss, optax.sgd(0.1), server_lr=float("inf")), "server_lr must be at most"),
        (lambda: algorithms.fedavg_ipw(loss, optax.sgd(0.1), probabilities=np.full(2, 1e-50)), "must lie in"),
        (lambda: algorithms.fedavg(loss, optax.sgd(0.1), weights=np.array([1e-50, 1.0])), "no more than 0"),
        (lambda: fedavg().client_params(STATE, np.array([-2])), "ids holds -2"),
        (lambda: scaffold().client_params(scaffold().init(PARAMS), np.array([2])), "ids holds 2: clients are numbered"),
        (lambda: Plan(mesh=2), "mesh must be a jax.sharding.Mesh, got int"),
        (lambda: fedavg().round(STATE._replace(round=jnp.int32(-5)), COHORT, KEY), "state.round is -5"),
        (lambda: run(algorithms.fedavg(loss, optax.sgd(0.1), batch_size=2**31 - 1)), "batch_size=2147483647"),
        (lambda: run(algorithms.fednova(loss, optax.sgd(-0.1), batch_size=2)), "climbs"),
        (lambda: run(fedavg(optimizer=lambda rate: optax.sgd(rate))), "takes|function"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(call, message):
    with jax.enable_x64(False), pytest.raises((TypeError, ValueError), match=message):
        call()


def scaffold():
    return algorithms.scaffold(loss, optax.sgd(0.1), num_clients=2, batch_size=2)


def test_traced_weights_near_the_largest_float_count_and_negative_ones_spoil_the_result():
    def moved(weights):
        algorithm = algorithms.fedavg(loss, optax.sgd(0.1), batch_size=3, weights=weights)
        return algorithm.round(algorithm.init(PARAMS), COHORT, KEY)[0].params["w"]

    with jax.enable_x64(False):
        step = jax.jit(moved)
        expected = step(jnp.ones(2))
        assert (expected != 0).all()
        np.testing.assert_allclose(step(jnp.full(2, 1e38)), expected, rtol=1e-6)
        np.testing.assert_allclose(step(jnp.full(2, 1e-30)), expected, rtol=1e-6)
        assert np.isnan(step(-jnp.ones(2))).all()
