"""What every method must do. A new factory in `algorithms.__all__` is tested here by being there.

The checks are those of `fedjax_core.testing`, which users have for methods of their own. Those that compile a program
each run on a fifth of the methods, another one every day, and on all of them with `-m slow`; FEDJAX_CORE_TURN is the
number of the fifth (see tests/conftest.py).
"""

import inspect
import os
import re
from functools import cache
from pathlib import Path

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import algorithms
from algorithms import messages
from algorithms.parts.options import grouped, option_tuples
from fedjax_core import Groups, Plan, Split, Task, aggregation, clients, needs, testing
from fedjax_core.messages import Admission, Part, with_part
from tests.problems import (
    assert_trees_close,
    assert_trees_equal,
    every_part,
    softmax_features,
    softmax_loss,
    softmax_params,
    softmax_population,
)

SIZES = (1, 9, 4, 0, 13, 6, 2)  # from one example up, one client empty, batch size dividing hardly any
TURNS = 5
TURN = int(os.environ["FEDJAX_CORE_TURN"]) % TURNS

# One worker gets all tests of a method, so that they share its compiled functions.
METHODS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in algorithms.__all__]
every_method = pytest.mark.parametrize("name", METHODS)


def is_later(number):
    """Whether the method of that number is tested in depth another day."""
    return number % TURNS != TURN


def a_third(methods):
    """The methods of which those are marked as slow whose day it is not."""
    return [
        pytest.param(*one.values, marks=[*one.marks, *[pytest.mark.slow] * is_later(number)])
        for number, one in enumerate(methods)
    ]


# Counts of the size of this problem; and in single precision it takes a box wide enough for values to differ by far
# more than their rounding, and more noise than that of a solve.
SETTINGS = {
    "fedrep": {"head_epochs": 2},
    "fedetf": {"alternations": 1, "alternation_epochs": 1},
    "fedloge": {"etf_steps": 3},
    "lg_fedavg": {"shared": "w"},
    # Of a linear model the student is taught from the start, and Adam would make long steps of rounding.
    "feddf": {
        **{"server_steps": 3, "server_batch_size": 4},
        **{"ensemble": "probabilities", "server_optimizer": optax.sgd(0.5)},
    },
    "fzoos": {
        **{"initial": 4, "active": 2, "active_candidates": 8, "survey": 5, "survey_candidates": 12},
        **{"capacity": 40, "neighbors": 24, "num_features": 50, "feature_neighbors": 30, "feature_lengthscale": 1.0},
        **{"radius": 0.5, "noise": 1e-2, "ridge": 1e-2},
    },
    "sfprompt": {"self_epochs": 1},  # the plain loop is slow
}

# In stored order the second round of fzoos solves what single precision cannot.
ORDER = {"fzoos": {"order": "shuffled"}}

# What the checks have to know of a method.
KNOWN = {
    "cfl": {"rows_may_stay": True},  # a client stays in its cluster until that is split
    "fedamd": {"rows_may_stay": True},  # a participant that is no anchor keeps its row
    "fedlora": {"rows_may_stay": True},  # a client's rank is its own for good
    "fedsgd": {"random": False},  # the full gradient draws nothing
    "fzoos": {"undefined_if_empty": ("value",)},
    "ifca": {"rows_may_stay": True},  # a client may choose the same model again
    "ocfl": {"rows_may_stay": True},  # clusters are made once
}

# Rankings change by whole places, if at all: not by a tenth of what moves a model.
RATES = {"frl": 20.0}


def merged(adapter):
    """The model with its weight made of two factors, as methods have it that train adapters."""
    return {"w": adapter["w"]["A"] @ adapter["w"]["B"], "b": adapter["b"]}


def params_of(name):
    """Where a method starts."""
    params = softmax_params()
    if "tasks" in needs(getattr(algorithms, name)).values():
        return tuple(jax.tree.map(jnp.float64, task.init(jax.random.key(5))) for task in TASKS)
    if "task" in needs(getattr(algorithms, name)).values():
        return jax.tree.map(jnp.float64, TASKS[0].init(jax.random.key(5)))
    if "split" in needs(getattr(algorithms, name)).values():
        return {**params, "prompt": jnp.zeros(params["w"].shape[0], params["w"].dtype)}
    if "adapter loss" not in needs(getattr(algorithms, name)).values():
        return params
    A = jax.random.normal(jax.random.key(5), (params["w"].shape[0], 2), params["w"].dtype)
    return {"w": {"A": A, "B": A.T @ params["w"]}, "b": params["b"]}


def cut():
    """A model in three pieces around what the softmax is of, the one between without parameters."""
    return Split(
        lambda y, public, examples, key: jnp.tanh(examples["x"] + y["prompt"]),
        lambda public, s, key: s + jnp.square(s),
        lambda y, public, r, key: r @ y["w"] + y["b"],
        lambda logits, examples: optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"]),
    )


def task_of(layers):
    """A softmax of as many features as there are classes, which some layers make."""

    def init(key):
        keys = jax.random.split(key, layers)
        body = {f"u{k}": jax.random.normal(keys[k], (3 if k else 5, 3)) for k in range(layers)}
        return {"body": body, "w": jnp.eye(3), "b": jnp.zeros(3)}

    def features(params, examples, key=None, mask=None):
        z = examples["x"]
        for k in range(layers):
            z = jnp.tanh(z @ params["body"][f"u{k}"])
        return z

    def head(params, z):
        return z @ params["w"] + params["b"]

    return Task(
        init,
        lambda params, examples, *, key, mask: (head(params, features(params, examples)), ()),
        lambda outputs, examples, mask: optax.softmax_cross_entropy_with_integer_labels(outputs, examples["y"]),
        lambda outputs, examples, mask: {"accuracy": jnp.argmax(outputs, -1) == examples["y"]},
        features,
        head,
        paths=lambda kind: ("w", "b"),
    )


TASKS = (task_of(1), task_of(2))

# What factories ask for (`fedjax_core.needs`).
BROUGHT = {
    "loss": softmax_loss,
    "adapter loss": lambda params, batch, key: softmax_loss(merged(params), batch, key),
    "split": cut(),
    "num_clients": len(SIZES),
    "num_classes": 3,
    "features": softmax_features,
    "logits": lambda params, batch, key: batch["x"] @ params["w"] + params["b"],
    "inputs": lambda params, batch: {"w": batch["x"]},
    "layers": {"w": 5},
    "personal": "b",
    "public": lambda public: public,
    "task": TASKS[0],
    "tasks": TASKS,
    "groups": Groups([0, 1, 1, 0, 0, 1, 0]),
}


def make(name, *, lr=0.1, optimizer=None, **settings):
    factory = getattr(algorithms, name)
    asked = needs(factory)
    brought = {**BROUGHT, "client optimizer": optimizer or optax.sgd(RATES.get(name, 1) * lr)}
    missing = set(asked.values()) - set(brought)
    assert not missing, f"{name} asks for {missing}: enter what the test's problem has for it in BROUGHT"
    settings = {argument: brought[what] for argument, what in asked.items()} | settings
    settings = {**SETTINGS.get(name, {}), **settings, **ORDER.get(name, {})}
    if name == "fedsgd":  # has neither epochs nor an order
        settings.pop("order", None)
    else:
        settings.setdefault("num_epochs", 1)  # up to four local steps; the plain loop is slow
    return factory(batch_size=4, **grouped(factory, settings))


def hyperparameters(name):
    """Names and values of a method's float hyper-parameters, here."""
    factory = getattr(algorithms, name)
    values = {p.name: p.default for p in inspect.signature(factory).parameters.values()}
    for options in option_tuples(factory).values():
        values |= options._asdict()
    own = SETTINGS.get(name, {})
    return {key: own.get(key, value) for key, value in values.items() if isinstance(value, float)}


def population():
    """The clients, beside examples without labels that some methods want."""
    public = {"x": softmax_population([7], seed=4).examples["x"]}
    return softmax_population(SIZES).with_public(public)


@cache
def subject(name):
    problem = testing.Problem(softmax_loss, params_of(name), population())
    floats = {"lr": 0.1, **hyperparameters(name)}
    return testing.Subject(lambda **settings: make(name, **settings), problem, floats=floats, **KNOWN.get(name, {}))


def pytest_generate_tests(metafunc):
    if "deep" not in metafunc.fixturenames:
        return
    everything = metafunc.config.getoption("markexpr") == "slow"
    cases = []
    for number, name in enumerate(algorithms.__all__):
        later = everything or is_later(number)
        marks = [pytest.mark.xdist_group(name), *[pytest.mark.slow] * later]
        has_rows = bool({"num_clients", "groups"} & set(needs(getattr(algorithms, name)).values()))
        cases += [
            pytest.param(name, check, marks=marks)
            for check in testing.DEEP
            if has_rows or not check.startswith("client_state")
        ]
    metafunc.parametrize(("name", "deep"), cases)


@every_method
@pytest.mark.parametrize("check", testing.CHEAP)
def test_method(name, check):
    subject(name).check(check)


def test_method_in_depth(name, deep):
    if deep.startswith("client_state"):
        assert subject(name).has_rows
    subject(name).check(deep)


@every_method
def test_state_survives_save_and_restore(name, tmp_path):
    """And goes on from there to the same bits."""
    state = subject(name).state
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    target = subject(name).algorithm.init(params_of(name), jax.random.key(0))
    for again in (restored, flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))):
        chex.assert_trees_all_equal_structs(again, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(again, state)
        assert_trees_equal(again, state)
        subject(name).goes_on_from(again)


@pytest.mark.parametrize("name", ["ewc", "scaffold_m"])
def test_donated_rounds_give_the_same_numbers(name):
    """From one set of params as often as one likes."""
    algorithm, params = subject(name).algorithm, softmax_params()
    expected, cohort = algorithm.init(params), softmax_population(SIZES).cohort(np.array([0, 4, 2, 1]))
    donated = jax.jit(algorithm.round, donate_argnums=0)
    for _ in range(2):
        state = algorithm.init(params)
        for t in range(2):
            state, _ = donated(state, cohort, jax.random.key(t))
    for t in range(2):
        expected, _ = subject(name).round(expected, [0, 4, 2, 1], jax.random.key(t))
    assert_trees_equal(state, expected)
    assert not params["w"].is_deleted()


def test_rows_of_clients_are_made_of_outputs():
    assert subject("scaffold").made_of_outputs() == (False, False, True)


# With parts between clients and server (`fedjax_core.messages`), around every method.

N = len(SIZES)
MALICIOUS = np.arange(N) == 4
PARTS = every_part(MALICIOUS, top_k=0.4)
IDENTITY = Part(lambda state, asked, key: (asked.run(), state, ()), name="identity")
EVERYBODY = Part(admission=Admission(lambda state, cohort, traffic, key: (cohort, state, ())), name="everybody")
WITHOUT_EFFECT = [EVERYBODY, IDENTITY, messages.sign_flip(np.zeros(N, bool)), messages.alie(np.zeros(N, bool))]


def around(method, parts):
    for part in parts:
        method = with_part(method, part, like=population())
    return method


def by_method(tree):
    """The state or the own metrics of a method out of those with parts around it."""
    while hasattr(tree, "passes"):
        tree = tree.method
    return tree


def started(algorithm, name):
    return algorithm.init(params_of(name), jax.random.key(0)), subject(name).population.cohort([0, 4, 2, 1])


@cache
def passes(name):
    """Of each pass of a round that uploads something: the upload's leaves, the aggregator, what parts refuse it by."""
    found = []

    def looking(state, asked, key):
        upload, refused = asked.upload(), {}
        for part, made in PARTS.items():
            try:
                made.around(made.init(upload, N), asked, key)
            except TypeError as error:
                refused[part] = str(error)
        found.append((jax.tree.leaves(upload), asked.aggregator, refused))
        return asked.run(), state, ()

    algorithm = around(subject(name).algorithm, [Part(looking)])
    state, cohort = started(algorithm, name)
    with clients.replaced(clients.without_steps):
        jax.eval_shape(algorithm.round, state, cohort, jax.random.key(1))
    return found


def takes(upload, aggregator, part):
    """Whether a part can stand around a pass, by what is sent and how it is aggregated."""
    if part in ("coordinate_median", "trimmed_mean", "krum"):
        return getattr(aggregator, "mean_of", None) is not None
    if part == "client_level_dp":
        as_sent = getattr(aggregator, "mean_of", None) is aggregation.itself
        return as_sent and all(np.issubdtype(leaf.dtype, np.floating) for leaf in upload)
    if part in ("sign_flip", "alie", "inner_product_manipulation"):
        return any(np.issubdtype(leaf.dtype, np.floating) for leaf in upload)
    if part == "rank_reversal":
        return all(np.issubdtype(leaf.dtype, np.integer) and leaf.ndim == 1 for leaf in upload)
    return True


def all_take(name, part):
    return all(takes(upload, aggregator, part) for upload, aggregator, _ in passes(name))


def program(name, parts):
    """The traced round of a method with parts around it, what it needs of it, as text."""
    algorithm = around(subject(name).algorithm, parts)

    def round(state, cohort, key):
        state, metrics = algorithm.round(state, cohort, key)
        return by_method(state), metrics._replace(extra=by_method(metrics.extra))

    closed = jax.make_jaxpr(round)(*started(algorithm, name), jax.random.key(1))
    needed, kept = {atom for atom in closed.jaxpr.outvars if not hasattr(atom, "val")}, []
    for equation in reversed(closed.jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {atom for atom in equation.invars if not hasattr(atom, "val")}
            kept.append(equation)
    text = str(closed.jaxpr.replace(eqns=kept[::-1]))
    return re.sub(r"0x[0-9a-f]+", "", text), [np.asarray(const) for const in closed.consts]


def test_every_part_is_there():
    assert set(PARTS) == set(messages.__all__)


@every_method
def test_parts_without_effect_leave_the_program_as_it_is(name):
    """So that they give the same bits: nobody malicious, nobody left out, or nothing done."""
    with jax.enable_x64(True):
        plain, constants = program(name, [])
        wrapped, others = program(name, WITHOUT_EFFECT)
    assert wrapped == plain
    assert_trees_equal(others, constants)


@every_method
def test_a_part_stands_around_a_method_or_says_why_it_cannot(name):
    """Known by what is sent and how it is aggregated: a rule needs a mean, privacy that of floats as they are sent."""
    for upload, aggregator, refused in passes(name):
        assert set(refused) == {part for part in PARTS if not takes(upload, aggregator, part)}
        for part, said in refused.items():
            assert re.match(f"{part} (takes the place|bounds|scales|makes|reverses).*: take a method", said)
    refused = {part for _, _, refused in passes(name) for part in refused}
    page = (Path(__file__).parents[2] / "docs/messages.md").read_text()
    for section, part in (("aggregates in another way", "krum"), ("averages something else", "client_level_dp")):
        listed = page.partition(f"<!-- {section} -->")[2].partition("<!--")[0]
        known = part in refused and (part == "krum" or "krum" not in refused)
        assert (f"`{name}`" in listed) == known, f"docs/messages.md does not say that {part} refuses {name}"


@every_method
def test_a_round_that_was_compiled_before_it_was_wrapped_is_refused(name):
    method = subject(name).algorithm
    compiled = method._replace(round=jax.jit(method.round))
    with pytest.raises(TypeError, match=r"identity is put around was compiled .*jax\.jit\(with_part"):
        started(around(compiled, [IDENTITY]), name)


def private_without_noise(state, asked, key):
    expected = jnp.maximum(asked.cohort.num_participants, 1).astype(float)
    return messages.client_level_dp(np.inf, 0.0, expected=expected).around(state, asked, key)


def without_effect_on_uploads(name, malicious):
    """Parts that change the program, and no number of it where nobody is malicious."""
    private = [Part(private_without_noise, name="client_level_dp")] * all_take(name, "client_level_dp")
    attacks = [messages.sign_flip(malicious), messages.alie(malicious)]
    if passes(name) and all_take(name, "rank_reversal"):
        attacks = [messages.rank_reversal(malicious)]
    return [messages.top_k(1.0), *private, *attacks]


def without_bytes(extra):
    """A method's own metrics but for those that count bytes, of which a codec states others."""
    return {name: value for name, value in extra._asdict().items() if "bytes" not in name} if extra else extra


def rounds_with(name, parts):
    """The rounds of the shared checks, with parts around the method: its state, and the own metrics of each round.

    Nobody is malicious, which the compiler does not know: the code of attacks is run.
    """
    alone, nobody = subject(name), jnp.zeros(N, bool)
    run = jax.jit(lambda bad, values, *arguments: around(alone.make(values), parts(name, bad)).round(*arguments))
    state = around(alone.algorithm, parts(name, nobody)).init(alone.params, alone.key)
    state = jax.device_put(state, jax.devices()[0])
    told = []
    for t, ids in enumerate(alone.cohorts):
        cohort = alone.population.cohort(np.asarray(ids))
        state, metrics = run(nobody, alone.floats, state, cohort, jax.random.fold_in(alone.key, t))
        told.append(without_bytes(by_method(metrics.extra)))
    return by_method(state), told


@pytest.mark.parametrize("name", a_third(METHODS))
def test_parts_without_effect_on_uploads_give_the_same_bits(name):
    """All entries sent, no noise, no clip, nobody malicious."""
    with jax.enable_x64(True):
        state, told = rounds_with(name, without_effect_on_uploads)
        assert_trees_equal(state, subject(name).state)
        assert_trees_equal(told, [without_bytes(info.extra) for info in subject(name).done.metrics])


@pytest.mark.parametrize("name", a_third(METHODS))
def test_parts_of_a_batch_give_the_numbers_of_whole_batches(name):
    """Parts that are all padding are left out of steps, whatever a step of the method is."""
    alone, plan = subject(name), Plan(lanes=1, batch_parts=2)
    cut = testing.Subject(
        lambda **settings: make(name, **{**settings, "plan": plan}),
        alone.problem,
        floats=alone.floats,
        **KNOWN.get(name, {}),
    )
    with jax.enable_x64(True):
        assert_trees_close(by_method(cut.state), by_method(alone.state), **testing.EXACT)


# Plans and meshes, seeds under vmap, staging and resuming with parts that keep rows, attack and take the mean's place.
# Beside these checks, those of one method with each part are in tests/fedjax_core/test_messages.py.
CHECKED = (
    "a_round_equals_a_plain_loop",
    "an_empty_cohort_changes_only_the_counter",
    "only_participants_rows_change",
    "seeds_and_floats_vmap_like_a_loop",
    "other_arguments_do_not_retrace",
    "state_survives_pickling",
    "a_state_can_be_donated",
    "the_server_uses_only_uploads",
    *(check for check in testing.DEEP if not check.startswith("float32")),  # which entries are largest may turn
)


@cache
def wrapped_subject(name, devices):
    attack = PARTS["rank_reversal" if passes(name) and all_take(name, "rank_reversal") else "sign_flip"]
    parts = [PARTS["top_k"], attack, *[PARTS["trimmed_mean"]] * all_take(name, "trimmed_mean")]
    alone = subject(name)
    wrapped = testing.Subject(
        lambda **settings: around(make(name, **settings), parts),
        alone.problem,
        floats=alone.floats,
        **KNOWN.get(name, {}),
    )
    wrapped.devices = devices
    return wrapped


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("check", CHECKED)
def test_method_with_parts(name, check):
    wrapped_subject(name, 2).check(check)


@pytest.mark.slow
@every_method
def test_method_with_parts_on_eight_devices(name):
    wrapped_subject(name, 8).check("lanes_on_a_mesh_equal_a_plain_loop")
