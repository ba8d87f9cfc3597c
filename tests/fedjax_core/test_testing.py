"""The checks for methods of one's own say what is wrong with a method that is wrong."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import reference, testing

PROBLEM = testing.classification()
NUM_CLIENTS = PROBLEM.population.num_clients
gradient = fc.value_and_grad(PROBLEM.loss_fn)


class State(NamedTuple):
    params: Any
    rows: Any
    round: Any = 0


def displacement(state, results, cohort):
    return optax.tree.add(state.params, results.aggregate)


def counted(state, results, cohort):
    """Every client's row counts the rounds that it took part in."""
    return fc.scatter(state.rows, cohort, fc.gather(state.rows, cohort) + 1)


def method(
    *,
    move=displacement,
    rows=counted,
    table=lambda: fc.client_table(NUM_CLIENTS, jnp.int32(1)),
    direction=gradient,
    upload=None,
    draw=None,
    program=fc.local_descent,
    run=lambda training, *arguments: training.run(*arguments),
    lr=0.1,
    skip_empty=True,
    **local,
):
    """Plain averaging that keeps a row for every client; each case below spoils a part of it."""
    training = fc.local_training(batch_size=4, **local)

    def difference(done, x):
        return optax.tree.sub(done.params, x), done.params["b"]

    client = program(optax.sgd(lr), lambda y, batch, shared, own: direction(y, batch), upload=upload or difference)

    def update(state, cohort, key):
        results = run(training, client, state.params, cohort, key if draw is None else draw)
        return State(move(state, results, cohort), rows(state, results, cohort), state.round), results

    return fc.federated(lambda params: State(params, table()), update, skip_empty=skip_empty)


def without_the_mask(params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(PROBLEM.loss_fn(p, batch.examples, batch.key)))(params)


def from_outputs(state, results, cohort):
    moved = displacement(state, results, cohort)
    return {**moved, "b": jnp.mean(results.outputs, axis=0).astype(moved["b"].dtype)}


def scaled(factor):
    """A server that takes its step times a factor of these three."""
    return lambda *given: optax.tree.add(given[0].params, optax.tree.scale(factor(*given), given[1].aggregate))


def by_slot(state, results, cohort):
    return jnp.where(cohort.ids[0] == jnp.max(cohort.ids), 1.5, 1.0)


def shrinking(state, results, cohort):
    return optax.tree.scale(0.9, displacement(state, results, cohort))


def in_double(state, results, cohort):
    return jax.tree.map(lambda leaf: leaf + jnp.zeros((), jnp.float64), displacement(state, results, cohort))


def with_data(state, results, cohort):
    moved = displacement(state, results, cohort)
    return {**moved, "b": moved["b"] + jnp.sum(jnp.asarray(np.ones(1000))) * 0}


def rounded(state, results, cohort):
    """Loses in single precision what it keeps in double."""
    large = jax.tree.map(lambda leaf: leaf + 1e6, displacement(state, results, cohort))
    return jax.tree.map(lambda leaf: leaf - 1e6, jax.lax.optimization_barrier(large))


CALLS = itertools.count(1)


def drawn_by_python(state, results, cohort):
    shape = jax.ShapeDtypeStruct((), state.params["b"].dtype)
    return jax.pure_callback(lambda: np.asarray(next(CALLS), shape.dtype), shape)


def counting_traces(state, results, cohort):
    return 1.0 + next(CALLS)


def over_all_members(state, results, cohort):
    norm = optax.tree.norm(results.aggregate)
    shape = jax.ShapeDtypeStruct(norm.shape, norm.dtype)

    def largest(x):
        return np.full_like(x, np.max(x))

    return jax.pure_callback(largest, shape, norm, vmap_method="broadcast_all")


def half_upload(done, x):
    return {"w": done.params["w"] - x["w"]}, ()


def half(state, results, cohort):
    return {**state.params, "w": state.params["w"] + results.aggregate["w"]}


def all_clients(state, results, cohort):
    return fc.ClientTable(state.rows.rows + 1)


@jax.tree_util.register_pytree_node_class
class Unpicklable:
    def __init__(self, value):
        self.value, self.open = value, lambda: value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def few_rows(*, move=displacement, **settings):
    right = method(move=move, **settings)
    view = fc.View(right.params, lambda shared, row: shared, lambda state: fc.ClientTable(jnp.zeros((2, 1))))
    return right._replace(views={"personal": view})


def twice(**settings):
    right = method(**settings)

    def round(state, cohort, key):
        state, metrics = right.round(state, cohort, key)
        return state._replace(round=state.round + 1), metrics

    return right._replace(round=round)


def wrong(sentence, **spoiled):
    return (lambda **settings: method(**spoiled, **settings)), sentence


WRONG = {
    "a_round_equals_a_plain_loop": wrong(
        r"a plain loop over clients: state.params.b\[0\] is .*, expected .* \(3 of 3 numbers there differ, by up to "
        r".*; allowed is 1e-12\); leave out the rows of a batch that batch.mask excludes",
        direction=without_the_mask,
    ),
    "cohort_order_does_not_matter": wrong(
        "the order of the clients in a cohort changes the result.*never by their slot", move=scaled(by_slot)
    ),
    "empty_slots_and_clients_change_nothing": wrong(
        "empty slots or clients without examples change the result.*cohort.num_participants instead of",
        move=scaled(lambda state, results, cohort: cohort.num_participants / cohort.ids.shape[0]),
    ),
    "an_empty_cohort_changes_only_the_counter": wrong(
        r"a round without participants changes the state: params.b\[0\].*keep what there was",
        move=shrinking,
        skip_empty=False,
    ),
    "only_participants_rows_change": wrong(
        r"clients 1 and 6 took part, and the state of the absent clients \[0, 2, 3, 4, 5\] changes", rows=all_clients
    ),
    "same_key_same_bits": wrong("the same state, cohort and key give other bits", move=scaled(drawn_by_python)),
    "seeds_and_floats_vmap_like_a_loop": wrong(
        "by vmap over seeds and hyper-parameters, differ from single rounds of each: 1.state.params.*no number over",
        move=scaled(over_all_members),
    ),
    "other_arguments_do_not_retrace": (twice, "state.round is 6 after three rounds"),
    "no_large_constants": wrong(r"holds 1000 numbers as constants, in arrays of \[.*1000.*\]", move=with_data),
    "dtypes_stay": wrong(
        r"another type of state than init: params.b is float64\[3\], expected float32", move=in_double
    ),
    "state_survives_pickling": wrong(
        "a state cannot be pickled and read again .*: make it of arrays in NamedTuples",
        table=lambda: Unpicklable(jnp.zeros(())),
        rows=lambda state, results, cohort: state.rows,
    ),
    "views_give_a_model_to_every_client": (
        few_rows,
        r"the rows of the view 'personal' are not one for each of \d+ clients",
    ),
    "the_server_uses_only_uploads": wrong("put into the upload what the server uses", move=from_outputs),
    "metrics_count_bytes_and_participants": wrong(
        "metrics count 120 bytes up, fewer than the 144 of a model", upload=half_upload, move=half
    ),
    "lanes_on_a_mesh_equal_a_plain_loop": wrong(
        "lanes on a mesh do not give the result of a plain loop.*results.executed_steps",
        move=scaled(lambda state, results, cohort: results.executed_steps / 10),
    ),
    "another_key_gives_other_numbers": wrong(
        r"another key gives the same numbers \(an update of length 0\.\d+\)", draw=jax.random.key(0)
    ),
    "scanned_rounds_equal_single_rounds": wrong(
        "rounds in one compiled loop give other bits.*fixed when a round is traced", move=scaled(counting_traces)
    ),
    "client_state_in_host_memory_gives_the_same_bits": wrong(
        "per-client state in host memory gives other bits.*only by fedjax_core.gather and scatter",
        move=scaled(lambda state, results, cohort: jnp.mean(state.rows.rows)),
    ),
    "float32_agrees_with_float64": wrong("not that in float64 up to rounding.*allowed is 0.0001", move=rounded),
}
WITH_A_TEST_OF_ITS_OWN = {"a_state_can_be_donated"}  # `federated` makes no method that is wrong there


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_is_told_what_is_wrong(name):
    make, sentence = WRONG[name]
    with pytest.raises(AssertionError, match=sentence) as raised:
        testing.properties(make, PROBLEM, floats={"lr": 0.1})[name]()
    assert raised.value.__notes__ == [f"(checked: {name.replace('_', ' ')})"]


def test_messages_hide_nothing_from_the_check_of_what_the_server_uses():
    """Where uploads are in envelopes, and where outputs of one pass go down in the next."""

    def sealed(done, x):
        return fc.Message(optax.tree.sub(done.params, x), 1.0), done.params["b"]

    honest = testing.properties(lambda **settings: method(upload=sealed, **settings), PROBLEM, floats={"lr": 0.1})
    honest["the_server_uses_only_uploads"]()
    honest["metrics_count_bytes_and_participants"]()
    spoiled = {"upload": sealed, "move": from_outputs}
    with pytest.raises(AssertionError, match="the server's state is made of the outputs"):
        testing.properties(lambda **s: method(**spoiled, **s), PROBLEM)["the_server_uses_only_uploads"]()

    def two_passes(**settings):
        clients = fc.local_training(**{"batch_size": 2, **settings})
        kept = fc.kept_by_client(fc.full_gradient_program(PROBLEM.loss_fn))

        def update(state, cohort, key):
            own = clients.full_pass().run(kept, state.params, cohort, key).outputs
            down = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), own)
            send = fc.ClientProgram(
                lambda shared, own, key: (),
                lambda shared, carry, batch: (carry, jnp.zeros(())),
                lambda shared, carry: (shared.payload if isinstance(shared, fc.Message) else shared, ()),
            )
            results = clients.run(send, fc.Message(down, 1.0), cohort, key)
            return fc.ModelState(fc.add_scaled(state.params, -0.1, results.aggregate)), results

        return fc.federated(fc.ModelState, update)

    with pytest.raises(AssertionError, match="what the server sends in a later pass is made of the outputs"):
        testing.properties(two_passes, PROBLEM)["the_server_uses_only_uploads"]()


def test_a_right_method_passes_with_float64_off():
    jax.config.update("jax_enable_x64", False)
    try:
        testing.check_algorithm(method, floats={"lr": 0.1})
        assert jnp.ones(1).dtype == np.float32
    finally:
        jax.config.update("jax_enable_x64", True)


def test_every_check_is_named_once_has_a_wrong_method_and_says_what_it_checks():
    names = (*testing.CHEAP, *testing.DEEP)
    assert len(set(names)) == len(names)
    assert set(names) == set(WRONG) | WITH_A_TEST_OF_ITS_OWN
    assert all(getattr(testing.Subject, name).__doc__ for name in names)
    assert list(testing.properties(method)) == list(names)


def test_a_state_that_changes_its_shape():
    """`federated` says it of an update; of a round made otherwise the check does."""
    growing = {"table": lambda: jnp.zeros(2), "rows": lambda *given: jnp.zeros(3), "skip_empty": False}
    by_update = testing.properties(lambda **settings: method(**growing, **settings), PROBLEM)
    with pytest.raises(TypeError, match=r"update changed state.rows from shape \[2\] to \[3\]"):
        by_update["dtypes_stay"]()

    def by_hand(**settings):
        staying = {**growing, "rows": lambda *given: jnp.zeros(2)}
        algorithm = method(**staying, **settings)

        def round(state, cohort, key):
            new, metrics = algorithm.round(state, cohort, key)
            return new._replace(rows=jnp.zeros(3)), metrics

        return algorithm._replace(round=round)

    with pytest.raises(AssertionError, match=r"another type of state than init: rows is float64\[3\], expected"):
        testing.properties(by_hand, PROBLEM)["dtypes_stay"]()


def test_a_state_with_one_array_twice_cannot_be_donated():
    subject = testing.Subject(method, PROBLEM)
    begun = subject.algorithm.init(subject.params)
    subject.__dict__["done"] = testing.Rounds(begun._replace(params={**begun.params, "b": subject.params["b"]}), [])
    sentence = "the state that a round returns cannot be donated: state.params.b is the same buffer as params.b; copy"
    with pytest.raises(AssertionError, match=sentence):
        subject.check("a_state_can_be_donated")


def test_a_row_of_a_participant_that_stays():
    options = {"rows": lambda state, results, cohort: state.rows}
    with pytest.raises(AssertionError, match="client 1 took part, and its state stays as it was"):
        testing.Subject(lambda **settings: method(**options, **settings), PROBLEM).check(
            "only_participants_rows_change"
        )


def test_what_draws_may_not_be_said_to_draw_nothing():
    subject = testing.Subject(method, PROBLEM, random=False)
    with pytest.raises(AssertionError, match=r"another key gives other numbers .*, and random=False was said"):
        subject.check("another_key_gives_other_numbers")


def test_clients_are_run_by_the_plain_loop_whatever_for_each_client_is_called():
    """A method that imported the function, and does not go through `local_training`, is checked as well."""
    run_clients = fc.for_each_client

    def direct(training, *arguments):
        return run_clients(*arguments, work=training.work, plan=training.plan)

    spoiled = {"move": from_outputs, "run": direct}
    checks = testing.properties(lambda **settings: method(**spoiled, **settings), PROBLEM)
    with pytest.raises(AssertionError, match="put into the upload what the server uses"):
        checks["the_server_uses_only_uploads"]()
    cohort, key = PROBLEM.population.cohort([0, 1]), jax.random.key(0)
    algorithm = method(run=direct)
    with reference.plain_loop(), pytest.raises(TypeError, match="the plain loop cannot run inside"):
        jax.jit(algorithm.round)(algorithm.init(PROBLEM.params), cohort, key)


@pytest.mark.parametrize(
    ("make", "options", "error", "sentence"),
    [
        (method, {"problem": testing.classification(sizes=(3, 0, 2))}, ValueError, "problem has 2 clients with exam"),
        (method, {"problem": PROBLEM.population}, TypeError, "problem must be a Problem, got Population: pass"),
        (method, {"floats": {"lr": None}}, ValueError, r"floats\['lr'\] must be a finite number, got None"),
        (method, {"floats": {"lr": float("nan")}}, ValueError, r"floats\['lr'\] must be a finite number, got nan"),
        (method(), {}, TypeError, "make must be a function, got"),
        (lambda **settings: method, {}, TypeError, "make must return an Algorithm, got function without init and"),
    ],
)
def test_bad_arguments(make, options, error, sentence):
    with pytest.raises(error, match=sentence):
        testing.check_algorithm(make, **options)


def test_a_check_that_is_not_there():
    with pytest.raises(ValueError, match="name must be one of"):
        testing.Subject(method).check("nothing")
