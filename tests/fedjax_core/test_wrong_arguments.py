"""What is told to somebody who gives the public functions something else than they take: argument, value and fix."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.problems import softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 5, 0, 8))
PARAMS, KEY, COHORT = softmax_params(), jax.random.key(0), POPULATION.cohort([0, 1])
OPTIONS = {"loss_fn": softmax_loss, "client_optimizer": optax.sgd(0.1), "batch_size": 4}
FEDAVG = algorithms.fedavg(**OPTIONS)
SCAFFOLD = algorithms.scaffold(**OPTIONS, num_clients=4)
FEDREP = algorithms.fedrep(**OPTIONS, num_clients=4, personal="b", head_epochs=1)
IFCA = algorithms.ifca(**OPTIONS, num_clients=4)
STATE, OF_FEDREP, OF_IFCA = FEDAVG.init(PARAMS), FEDREP.init(PARAMS), IFCA.init(PARAMS, KEY)


def accuracy(params, batch):
    return jnp.argmax(batch["x"] @ params["w"] + params["b"], -1) == batch["y"]


def view(state, of, **options):
    return fc.evaluate_view(accuracy, of, state, POPULATION, **options)


def event(run):
    """A method with an event, which is run."""
    method = fc.Algorithm(FEDAVG.init, FEDAVG.round, FEDAVG.params, events={"explore": fc.Event(run, "before")})
    return fc.run_events(method, "before", STATE, COHORT, KEY)


TASK = fc.Task(
    lambda key: PARAMS,
    lambda params, examples, *, key, mask: (examples["x"] @ params["w"] + params["b"], ()),
    lambda outputs, examples, mask: optax.softmax_cross_entropy_with_integer_labels(outputs, examples["y"]),
    lambda outputs, examples, mask: {"accuracy": jnp.argmax(outputs, -1) == examples["y"]},
)


def task(**changes):
    return dataclasses.replace(TASK, **changes)


def trained(**changes):
    method = algorithms.fedavg(**OPTIONS | {"loss_fn": task(**changes)})
    return method.round(method.init(PARAMS), COHORT, KEY)


STATES = {
    "round": (
        lambda: SCAFFOLD.round(STATE, COHORT, KEY),
        r"state must be a state of this method, got the state ModelState, which has no field 'control': pass alg",
    ),
    "round under jit": (lambda: jax.jit(SCAFFOLD.round)(STATE, COHORT, KEY), "no field 'control': pass algorithm.init"),
    "round of a pair": (
        lambda: FEDAVG.round((STATE, None), COHORT, KEY),
        r"state must be .* got tuple: a round returns \(state, metrics\), pass the first",
    ),
    "rounds": (
        lambda: fc.continue_rounds(SCAFFOLD, fc.samplers.full(4), 2)(STATE, POPULATION, KEY),
        "state must be a state of this method, got the state ModelState",
    ),
    "a part around the method": (
        lambda: fc.with_part(
            SCAFFOLD, fc.Part(lambda state, asked, key: (asked.run(), state, ())), like=POPULATION
        ).round(STATE, COHORT, KEY),
        "state must be a state of this method, got the state ModelState, which has no field",
    ),
    "params": (lambda: IFCA.params(STATE), "state must be a state of this method, got the state Mod.* 'members'"),
    "params of params": (lambda: FEDAVG.params(PARAMS), "got dict, which has no field 'params': pass algorithm.init"),
    "params of a pair": (lambda: FEDAVG.params((STATE, None)), r"got tuple, .*a round returns \(state, metrics\)"),
    "client_params": (lambda: FEDREP.client_params(STATE, [0]), "got the state ModelState, which has no .*'personal'"),
    "view": (lambda: view(STATE, FEDREP.personal), "state must be a state of this method, got the state ModelState"),
    "view of a pair": (lambda: view((OF_FEDREP, 0), FEDREP.personal), r"got tuple, .*a round returns \(state, met"),
    "view that adapts": (
        lambda: view(OF_FEDREP, IFCA.personal, adapt_on=POPULATION, key=KEY),
        "got the state PersonalState, which has no field 'choices'",
    ),
    "event": (lambda: fc.run_events(FEDREP, "after", STATE, COHORT, KEY), "got the state ModelState, .* 'personal'"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_other_methods(case):
    call, match = STATES[case]
    with pytest.raises(TypeError, match=match):
        call()


def test_mistakes_inside_of_a_method_stay_what_they_are():
    def round(state, cohort, key):
        return state.params["w"].nothing, ()

    with pytest.raises(AttributeError, match="nothing"):
        fc.Algorithm(FEDAVG.init, round, FEDAVG.params).round(STATE, COHORT, KEY)


OTHERS = {
    "events of a factory": (
        lambda: fc.run_events(algorithms.fedavg, "after", STATE, COHORT, KEY),
        "algorithm must be an Algorithm, got the function fedavg: call it first",
    ),
    "an event that returns nothing": (
        lambda: event(lambda state, cohort, key: None),
        "event 'explore' must return the state, changed or not, but returned NoneType and not ModelState: return state",
    ),
    "an event that returns a pair": (lambda: event(lambda state, cohort, key: (state, ())), "returned tuple and not"),
    "an event that returns params": (lambda: event(lambda s, cohort, key: s.params), "returned dict and not ModelS"),
    "an event that changes shapes": (
        lambda: event(lambda s, cohort, key: s._replace(params=jax.tree.map(lambda leaf: leaf[0], s.params))),
        r"event 'explore' changed state.params\['b'\] from shape \[3\] to \[\]: keep the shapes",
    ),
    "an event that drops a leaf": (
        lambda: event(lambda s, cohort, key: s._replace(params={"w": s.params["w"]})),
        "event 'explore' must return the state, .* one of structure",
    ),
    "an event of the state alone": (
        lambda: event(lambda state: state),
        r"events\['explore'\].run is called with \(state, cohort, key\), but its parameters are \(state\): pass",
    ),
    "an event that is no function": (lambda: event("explore"), r"events\['explore'\].run must be a function, got"),
    "views in a list": (
        lambda: fc.Algorithm(FEDAVG.init, FEDAVG.round, FEDAVG.params, [FEDREP.personal]),
        r"views must be a dict by name, got list: pass \{name: ...\}",
    ),
    "events in a list": (
        lambda: fc.Algorithm(FEDAVG.init, FEDAVG.round, FEDAVG.params, events=[]),
        "events must be a dict by name, got list",
    ),
    "a method without round": (lambda: fc.Algorithm(FEDAVG.init, None, FEDAVG.params), "round must be a function"),
    "rows that are no table": (
        lambda: view(STATE, fc.View(lambda s: s.params, lambda shared, row: row, lambda s: s.params)),
        r"rows\(state\) must be a ClientTable or None, got dict: keep what is each",
    ),
    "a cohort to adapt on": (
        lambda: view(OF_IFCA, IFCA.personal, adapt_on=COHORT, key=KEY),
        "adapt_on must be a Population, got Cohort: pass the population that it was drawn from",
    ),
    "examples to adapt on": (
        lambda: view(OF_IFCA, IFCA.personal, adapt_on=POPULATION.examples, key=KEY),
        "adapt_on must be a Population, got dict: make one",
    ),
    "forward without statistics": (
        lambda: trained(forward=lambda params, examples, *, key, mask: examples["x"] @ params["w"]),
        r"forward must return \(outputs, statistics\), got an array float64\[4, 3\]: return \(outputs, \(\)\)",
    ),
    "forward in evaluation": (
        lambda: fc.evaluate(
            task(forward=lambda params, examples, *, key, mask: examples["x"]), PARAMS, POPULATION.examples
        ),
        r"forward must return \(outputs, statistics\), got an array",
    ),
    "forward of three": (
        lambda: trained(forward=lambda params, examples, *, key, mask: (examples["x"], (), ())),
        r"forward must return \(outputs, statistics\), got a tuple of 3",
    ),
    "statistics of a task without": (
        lambda: trained(forward=lambda params, examples, *, key, mask: (examples["x"], examples["x"])),
        r"forward returned statistics, and the task has none: give the task has_statistics=True",
    ),
    "forward without mask": (
        lambda: task(forward=lambda params, examples, *, key: (examples, ())),
        r"forward is called with \(model, examples, key=..., mask=...\), but its parameters are \(params, examples,",
    ),
    "statistics without frozen": (lambda: task(has_statistics=True), r"forward is called with .*, frozen=...\), but"),
    "fields in another order": (
        lambda: fc.Task(TASK.forward, TASK.init, TASK.loss, TASK.metrics),
        r"init is called with \(key\), but its parameters are",
    ),
    "a loss without mask": (
        lambda: task(loss=lambda outputs, examples: outputs),
        r"loss is called with \(outputs, examples, mask\), but its parameters are \(outputs, examples\): pass",
    ),
    "metrics without mask": (lambda: task(metrics=lambda outputs, examples: {}), r"metrics is called with \(outputs, "),
    "features of params alone": (lambda: task(features=lambda params: params), "features is called with"),
    "a head of features alone": (lambda: task(head=lambda features: features), "head is called with"),
    "a task without loss": (lambda: task(loss=None), "loss must be a function, got"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments(case):
    call, match = OTHERS[case]
    with pytest.raises(TypeError, match=match):
        call()


def test_views_and_events_that_are_not_there():
    with pytest.raises(KeyError, match=r"the method has no view 'personal': its views are 'global'"):
        FEDAVG.views["personal"]
    with pytest.raises(KeyError, match=r"the method has no event 'explore': its events are 'heads'"):
        FEDREP.events["explore"]
    with pytest.raises(KeyError, match="its events are none"):
        FEDAVG.events["explore"]
    assert FEDAVG.views.get("personal") is None
    assert "personal" not in FEDAVG.views
    views = {"global": 1, "personal": 2}
    by_name = type(FEDAVG.views)("view", views)
    for again in (copy.copy(by_name), pickle.loads(pickle.dumps(by_name))):
        assert again == views
        with pytest.raises(KeyError, match="'global', 'personal'"):
            again["prototype"]
