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
    "a stream of plain examples": (
        lambda: fc.stream({"x": jnp.ones(3)}, POPULATION.cohort([0]), KEY, fc.local_work()),
        "population must be a Population, got dict: make one of examples and sizes",
    ),
    "groups merged without results": (
        lambda: fc.Groups.by_modulo(POPULATION.num_clients, 2).merge(POPULATION.cohort([0]), [(), ()]),
        r"results\[0\] must be ClientResults",
    ),
    "groups of a population": (
        lambda: fc.Groups.by_modulo(POPULATION.num_clients, 2).split(POPULATION),
        r"cohort must be a Cohort, got Population: pass population\.cohort\(ids\)",
    ),
    "groups that joined different things": (
        lambda: fc.Groups.by_modulo(POPULATION.num_clients, 2).join(COHORT, [{"a": jnp.zeros(2)}, jnp.zeros(2)]),
        r"values\[1\] has the structure .*, and values\[0\] .*: compute the same in each group",
    ),
    "a part of a tree by a function of the path alone": (
        lambda: fc.partition(PARAMS, lambda path: True),
        r"where is called with \(path, leaf\), but its parameters are \(path\): pass lambda path, leaf",
    ),
    "a rule before the method": (
        lambda: fc.with_statistics("average", FEDAVG),
        r"algorithm must be an Algorithm, got 'average': the order is \(algorithm, rule\)",
    ),
    "a start of another model": (
        lambda: algorithms.ifca(**OPTIONS, num_clients=4, start=lambda key: {"w": jnp.zeros((2, 2))}).init(PARAMS, KEY),
        r"start\(key\) and params have different structures: params has the leaf \['b'\]",
    ),
    "a start of other shapes": (
        lambda: algorithms.ifca(
            **OPTIONS, num_clients=4, start=lambda key: jax.tree.map(lambda leaf: leaf[:1], PARAMS)
        ).init(PARAMS, KEY),
        r"start\(key\)\['b'\] is float64\[1\] but params\['b'\] is float64\[3\]",
    ),
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


TABLE = fc.client_table(4, PARAMS)
PROGRAM = fc.full_gradient_program(softmax_loss)


def passed(program=PROGRAM, **options):
    return fc.for_each_client(program, PARAMS, COHORT, KEY, **{"work": fc.local_work(4)} | options)


def updated(update, init=fc.ModelState):
    method = fc.federated(init, update)
    return method.round(method.init(PARAMS), COHORT, KEY)


OTHERS |= {
    "an update that returns the state": (
        lambda: updated(lambda state, cohort, key: state),
        r"update must return \(state, results\) or .* got ModelState: return the state and what for_each",
    ),
    "an update that returns nothing": (lambda: updated(lambda state, cohort, key: None), "got NoneType: return"),
    "an update that returns the mean": (
        lambda: updated(lambda state, cohort, key: (state, state.params)),
        r"with the ClientResults of a pass, got \(ModelState, dict\)",
    ),
    "an update that returns four": (
        lambda: updated(lambda state, cohort, key: (state, passed(), (), ())),
        r"got \(ModelState, ClientResults, tuple, tuple\)",
    ),
    "an update that returns params": (
        lambda: updated(lambda state, cohort, key: (state.params, passed())),
        "update must return the state, changed or not, but returned dict and not ModelState",
    ),
    "an update that drops a leaf": (
        lambda: updated(lambda state, cohort, key: (state._replace(params={"w": state.params["w"]}), passed())),
        "update must return the state, .* one of structure",
    ),
    "an update of the state alone": (lambda: updated(lambda state: state), r"update is called with \(state, cohort, k"),
    "an init that returns params": (
        lambda: updated(lambda state, cohort, key: None, init=lambda params: params),
        "init must return a NamedTuple with the fields params and round, got dict: write a class",
    ),
    "a view's model of one argument": (
        lambda: view(STATE, fc.View(lambda state: state.params, lambda shared: shared)),
        r"view.model is called with \(shared, row\), but its parameters are \(shared\)",
    ),
    "a view of params": (lambda: view(STATE, fc.View(PARAMS)), "view.shared must be a function, got"),
    "a program to adapt": (
        lambda: view(STATE, fc.View(lambda s: s.params, adapt=PROGRAM), adapt_on=POPULATION, key=KEY),
        r"view.adapt must be an Adaptation or None, got ClientProgram: pass Adaptation\(program, work\)",
    ),
    "functions in a tuple": (
        lambda: passed(tuple(PROGRAM)),
        r"program must be a ClientProgram, got an object of type tuple: pass ClientProgram\(init, step, final\)",
    ),
    "a program's init without a key": (
        lambda: passed(PROGRAM._replace(init=lambda shared: shared)),
        r"program.init is called with \(shared, client_input, key\), but its parameters are \(shared\)",
    ),
    "a program's step without what is shared": (
        lambda: passed(PROGRAM._replace(step=lambda carry, batch: carry)),
        r"program.step is called with \(shared, carry, batch\)",
    ),
    "work in numbers": (lambda: passed(work=4), "work must be LocalWork, got .*: pass local_work"),
    "a table of another kind": (lambda: fc.gather(PARAMS, COHORT), "table must be a ClientTable, got dict: make one"),
    "a cohort for a table": (lambda: fc.gather(COHORT, TABLE), "table must be a ClientTable, got Cohort: .*order"),
    "rows into params": (lambda: fc.scatter(PARAMS, COHORT, PARAMS), "table must be a ClientTable"),
}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (PARAMS, r"rows\['b'\] has shape \[3\], but 2 slots have rows of shape \[2, 3\]: write one row for each"),
        (TABLE.rows, r"rows\['b'\] has shape \[4, 3\], but 2 slots"),
        ({"w": PARAMS["w"]}, "rows have the structure .* write what gather returned"),
    ],
)
def test_rows_that_do_not_fit_are_not_broadcast(rows, match):
    with pytest.raises(ValueError, match=match):
        fc.scatter(TABLE, COHORT, rows)


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments(case):
    call, match = OTHERS[case]
    with pytest.raises((TypeError, ValueError), match=match):
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
