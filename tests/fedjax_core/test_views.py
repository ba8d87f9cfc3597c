"""How methods predict, what they do beside their rounds, and what they draw before the first."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from fedjax_core import messages
from tests.problems import assert_trees_close, softmax_loss, softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
POPULATION = softmax_population(SIZES)
KEY = jax.random.key(3)


class PersonalState(NamedTuple):
    params: fc.Params
    heads: fc.ClientTable
    draws: jax.Array
    round: fc.Counter = 0


def joined(shared, row):
    return {"w": shared["w"], "b": row}


FINE_TUNED = fc.Adaptation(
    fc.ClientProgram(
        init=lambda shared, row, key: joined(shared, row),
        step=lambda shared, params, batch: _descend(params, batch),
        final=lambda shared, params: ((), params["b"]),
    ),
    fc.local_work(batch_size=2, num_epochs=2, order="sequential"),
)


def _descend(params, batch):
    loss, gradient = fc.value_and_grad(softmax_loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss


def personal(events=None):
    """A shared weight, and a bias that stays at home and is what the client's last round has made of it."""
    work = fc.local_training(batch_size=2, num_epochs=1, order="sequential")
    program = fc.ClientProgram(
        init=lambda shared, own, key: joined(shared, own),
        step=lambda shared, params, batch: _descend(params, batch),
        final=lambda shared, params: ({"w": params["w"] - shared["w"]}, params["b"]),
    )

    def init(params, key):
        heads = jax.vmap(lambda k: params["b"] + jax.random.normal(k, params["b"].shape))(
            jax.random.split(key, len(SIZES))
        )
        return PersonalState({"w": params["w"]}, fc.ClientTable(heads), jax.random.normal(key))

    def update(state, cohort, key):
        results = work.run(program, state.params, cohort, key, client_inputs=fc.gather(state.heads, cohort))
        params = fc.add_scaled(state.params, 1.0, results.aggregate)
        return state._replace(params=params, heads=fc.scatter(state.heads, cohort, results.outputs)), results

    view = fc.View(lambda state: state.params, joined, lambda state: state.heads)
    views = {"personal": view, "fine-tuned": view._replace(adapt=FINE_TUNED)}
    return fc.federated(init, update, views=views, events=events)


def trained(algorithm, rounds=2):
    state = algorithm.init(softmax_params(), KEY)
    for t in range(rounds):
        state, _ = jax.jit(algorithm.round)(state, POPULATION.cohort([0, 3, -1, 5]), jax.random.key(t))
    return state


def accuracy(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return {"loss": softmax_loss(params, batch, KEY), "accuracy": jnp.argmax(logits, axis=1) == batch["y"]}


def test_every_method_has_a_global_view():
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1))
    state = method.init(softmax_params())
    assert set(method.views) == {"global"}
    assert method.personal is method.views["global"]
    chex.assert_trees_all_equal(method.views["global"].shared(state), method.params(state))
    stacked = method.client_params(state, [4, 1])
    chex.assert_trees_all_equal(stacked, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), softmax_params()))


@pytest.mark.parametrize("plan", [fc.Plan(lanes=1), fc.Plan(lanes=3)])
def test_a_client_predicts_with_its_own_row(plan):
    method = personal()
    state = trained(method)
    found = fc.evaluate_view(accuracy, method.personal, state, POPULATION, batch_size=2, plan=plan)
    stacked = method.client_params(state, np.arange(len(SIZES)))
    assert_trees_close(
        found, fc.evaluate_personal(accuracy, stacked, POPULATION, np.arange(len(SIZES)), plan=plan), rtol=1e-12
    )
    for i, size in enumerate(SIZES):
        if size:
            own = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            values = accuracy(own, POPULATION.client(i))
            assert found["loss"][i] == pytest.approx(float(values["loss"].mean()), rel=1e-12)
            assert found["accuracy"][i] == pytest.approx(np.mean(np.asarray(values["accuracy"])), rel=1e-12)
        else:
            assert np.isnan(found["loss"][i])
    some = fc.evaluate_view(accuracy, method.personal, state, POPULATION, [5, -1, 0])
    np.testing.assert_array_equal(some["loss"], np.asarray(found["loss"])[[5, 2, 0]])
    globally = method.views["global"]
    with pytest.raises(KeyError):  # the shared part alone is no model
        fc.evaluate_view(accuracy, globally, state, POPULATION)


@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_a_view_adapts_before_it_predicts(at_once):
    method = personal()
    state, held_out = trained(method), softmax_population((2, 0, 4, 1, 3, 2), seed=5)
    found = fc.evaluate_view(
        accuracy, method.views["fine-tuned"], state, held_out, adapt_on=POPULATION, key=KEY, at_once=at_once
    )
    stacked = method.client_params(state, np.arange(len(SIZES)))
    for i, size in enumerate(SIZES):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        start, examples = own, POPULATION.client(i)
        for _ in range(2):
            for at in range(0, size, 2):
                batch = {k: v[at : at + 2] for k, v in examples.items()}
                gradient = jax.grad(lambda p, batch=batch: softmax_loss(p, batch, KEY).mean())(own)
                own = jax.tree.map(lambda p, g: p - 0.1 * g, own, gradient)
        predicting = {"w": start["w"], "b": own["b"]}
        tests = held_out.client(i)
        expected = float(accuracy(predicting, tests)["loss"].mean()) if len(tests["y"]) else np.nan
        assert found["loss"][i] == pytest.approx(expected, rel=1e-11, nan_ok=True)


def bias_alone(num_epochs, first=None):
    """Fine-tuning of the bias, by the client's own examples in their order."""

    def step(shared, b, batch):
        loss, gradient = fc.value_and_grad(lambda b, *rest: softmax_loss(joined(shared, b), *rest))(b, batch)
        return b - 0.1 * gradient, loss

    program = fc.ClientProgram(lambda shared, b, key: b, step, lambda shared, b: ((), b))
    return fc.Adaptation(program, fc.local_work(batch_size=2, num_epochs=num_epochs, order="sequential"), first)


def test_a_client_may_make_several_passes_before_it_predicts():
    """What one gives is the row of the next; a client without examples predicts as it is."""
    method = personal()
    state, held_out = trained(method), softmax_population((2, 0, 4, 1, 3, 2), seed=5)
    chain = bias_alone(1, bias_alone(2, bias_alone(1)))
    assert [phase.work.num_epochs for phase in chain.phases()] == [1, 2, 1]
    found, expected = (
        fc.evaluate_view(accuracy, method.personal._replace(adapt=adapt), state, held_out, adapt_on=POPULATION, key=KEY)
        for adapt in (chain, bias_alone(4))
    )
    chex.assert_trees_all_equal(found, expected)
    plain = fc.evaluate_view(accuracy, method.personal, state, held_out)
    assert found["loss"][2] == plain["loss"][2]
    assert found["loss"][0] != plain["loss"][0]


def test_evaluation_holds_one_body_and_a_row_for_each_client():
    clients, dim = 50, 128

    class State(NamedTuple):
        params: fc.Params
        heads: fc.ClientTable

    population = fc.Population.from_sizes({"x": np.ones((clients, dim), np.float32)}, [1] * clients)
    state = State(jnp.ones((dim, dim), jnp.float32), fc.ClientTable(jnp.ones((clients, dim), jnp.float32)))
    view = fc.View(lambda s: s.params, lambda body, head: (body, head), lambda s: s.heads)

    def metric(model, batch):
        return (batch["x"] @ model[0]) @ model[1]

    run = jax.jit(lambda state, population: fc.evaluate_view(metric, view, state, population, batch_size=1))
    held = run.lower(state, population).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * state.params.nbytes + 4 * state.heads.rows.nbytes


def test_whole_models_of_clients_are_never_all_held():
    """A table of whole models is evaluated so many clients at a time, to the same bits."""
    clients, dim = 40, 400
    population = fc.Population.from_sizes({"x": np.ones((clients, dim), np.float32)}, [1] * clients)
    model = np.random.default_rng(0).normal(size=(clients, dim, dim)).astype(np.float32)
    view = fc.View(lambda s: (), lambda shared, row: row, lambda s: s)

    def metric(model, batch):
        return jnp.sum(batch["x"] @ model, axis=1)

    def held(state):
        run = jax.jit(lambda state: fc.evaluate_view(metric, view, state, population, at_once=3))
        program = run.lower(state).compile()
        return program(state), program.memory_analysis().temp_size_in_bytes / state.rows[0].nbytes

    found, models = held(fc.ClientTable(jnp.asarray(model)))
    assert models < 12  # of 40
    np.testing.assert_allclose(found, model.sum((1, 2)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("ids", [None, [5, -1, 0]])
def test_clients_taken_in_turns_give_the_same_bits(ids, monkeypatch):
    method = personal()
    state = trained(method)
    together = fc.evaluate_view(accuracy, method.personal, state, POPULATION, ids)
    monkeypatch.setattr("fedjax_core.evaluation.MOST_ROWS", 0)
    for at_once in (1, 2, 16):
        in_turns = fc.evaluate_view(accuracy, method.personal, state, POPULATION, ids, at_once=at_once)
        chex.assert_trees_all_equal(in_turns, together)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"view": "personal"}, "view must be a View, got str"),
        ({"adapt_on": POPULATION}, "adapt_on is given, and the view does not adapt"),
        ({"view": personal().views["fine-tuned"]}, "adapt_on is missing, and the view adapts"),
        ({"view": personal().views["fine-tuned"], "adapt_on": POPULATION}, "key is missing, and the view adapts"),
        (
            {"view": personal().views["fine-tuned"], "adapt_on": softmax_population((1, 2)), "key": KEY},
            "adapt_on has 2 clients and population 6",
        ),
        ({"population": softmax_population((1, 2))}, "the state has rows for 6 clients, but the population has 2"),
        ({"at_once": 0}, "at_once must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    method = personal()
    arguments = {"view": method.personal, "state": method.init(softmax_params(), KEY), "population": POPULATION}
    with pytest.raises((TypeError, ValueError), match=words):
        fc.evaluate_view(accuracy, **{**arguments, **change})


def test_a_method_that_draws_needs_a_key():
    method = personal()
    with pytest.raises(ValueError, match=r"init\(params\) needs a key, for this method draws"):
        method.init(softmax_params())
    one, same, other = (method.init(softmax_params(), jax.random.key(k)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert one.draws != other.draws
    plain = algorithms.fedavg(softmax_loss, optax.sgd(0.1))
    chex.assert_trees_all_equal(plain.init(softmax_params()), plain.init(softmax_params(), KEY))
    with pytest.raises(TypeError, match="key"):
        method.init(softmax_params(), 7)


def test_events_are_run_at_their_time_and_in_their_order():
    def times(factor):
        return lambda state, cohort, key: state._replace(draws=factor * state.draws + jnp.sum(cohort.mask))

    method = personal(
        {
            "double": fc.Event(times(2.0), "before"),
            "triple": fc.Event(times(3.0), "before"),
            "end": fc.Event(times(0.0), "after"),
        }
    )
    state, cohort = method.init(softmax_params(), KEY), POPULATION.cohort([0, 1, 2])
    assert fc.run_events(method, "before", state, cohort, KEY).draws == 3 * (2 * state.draws + 2) + 2
    assert fc.run_events(method, "after", state, cohort, KEY).draws == 2
    chex.assert_trees_all_equal(fc.run_events(method, "task", state, cohort, KEY), state)
    with pytest.raises(ValueError, match="when must be"):
        fc.run_events(method, "later", state, cohort, KEY)
    with pytest.raises(TypeError, match="cohort must be a Cohort"):
        method.events["double"].run(state, POPULATION, KEY)


def test_events_and_views_are_what_they_are_said_to_be():
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"events\['explore'\] must be an Event, got function"):
        method._replace(events={"explore": lambda state, cohort, key: state})
    with pytest.raises(ValueError, match=r"events\['explore'\]\.when must be"):
        method._replace(events={"explore": fc.Event(lambda state, cohort, key: state, "sometimes")})
    with pytest.raises(TypeError, match=r"views\['personal'\] must be a View, got function"):
        method._replace(views={"personal": lambda state: state})


def test_parts_leave_views_and_events_as_they_are():
    identity = messages.Part(lambda state, asked, key: (asked.run(), state, ()), name="identity")
    method = personal({"double": fc.Event(lambda s, cohort, key: s._replace(draws=2 * s.draws), "before")})
    wrapped = fc.with_part(method, identity, like=POPULATION)
    state, plain = trained(wrapped), trained(method)
    chex.assert_trees_all_equal(state.method, plain)
    for name, view in wrapped.views.items():
        if name == "personal":
            chex.assert_trees_all_equal(
                fc.evaluate_view(accuracy, view, state, POPULATION),
                fc.evaluate_view(accuracy, method.views[name], plain, POPULATION),
            )
    assert fc.run_events(wrapped, "before", state, POPULATION.cohort([0]), KEY).method.draws == 2 * plain.draws
    chex.assert_trees_all_equal(wrapped.client_params(state, [3, 0]), method.client_params(plain, [3, 0]))
