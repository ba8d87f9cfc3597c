"""The checks for methods of one's own say what is wrong with a method that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from fedjax_core import testing

PROBLEM = testing.classification()


def displacement(state, results, cohort):
    return optax.tree.add(state.params, results.aggregate)


def method(*, move=displacement, upload=None, init=fc.ModelState, draw=None, skip_empty=True, lr=0.1, **local):
    """Plain averaging, of which each case below spoils a part."""
    training = fc.local_training(batch_size=4, **local)

    def difference(done, x):
        return optax.tree.sub(done.params, x), done.params["b"]

    program = fc.local_descent(optax.sgd(lr), fc.value_and_grad(PROBLEM.loss_fn), upload=upload or difference)

    def update(state, cohort, key):
        results = training.run(program, state.params, (), cohort, key if draw is None else draw)
        return state._replace(params=move(state, results, cohort)), results

    return fc.federated(init, update, skip_empty=skip_empty)


def from_outputs(state, results, cohort):
    moved = displacement(state, results, cohort)
    return {**moved, "b": jnp.mean(results.outputs, axis=0).astype(moved["b"].dtype)}


def by_slot(state, results, cohort):
    """The client in the first slot counts more."""
    first = jnp.where(cohort.ids[0] == jnp.max(cohort.ids), 1.5, 1.0)
    return optax.tree.add(state.params, optax.tree.scale(first, results.aggregate))


def counting_slots(state, results, cohort):
    share = cohort.num_participants / cohort.ids.shape[0]
    return optax.tree.add(state.params, optax.tree.scale(share, results.aggregate))


def shrinking(state, results, cohort):
    return optax.tree.scale(0.9, displacement(state, results, cohort))


def in_double(state, results, cohort):
    return jax.tree.map(lambda leaf: leaf + jnp.zeros((), jnp.float64), displacement(state, results, cohort))


def with_data(state, results, cohort):
    moved = displacement(state, results, cohort)
    return {**moved, "b": moved["b"] + jnp.sum(jnp.asarray(np.ones(1000))) * 0}


def half_upload(done, x):
    return {"w": done.params["w"] - x["w"]}, ()


def half(state, results, cohort):
    return {**state.params, "w": state.params["w"] + results.aggregate["w"]}


WRONG = {
    "the_server_uses_only_uploads": ({"move": from_outputs}, "put into the upload what the server uses"),
    "cohort_order_does_not_matter": ({"move": by_slot}, "the order of the clients in a cohort changes the result"),
    "empty_slots_and_clients_change_nothing": ({"move": counting_slots}, "empty slots or clients without examples"),
    "an_empty_cohort_changes_only_the_counter": (
        {"move": shrinking, "skip_empty": False},
        "a round without participants changes the state",
    ),
    "dtypes_stay": ({"move": in_double}, "another type of state than init"),
    "no_large_constants": ({"move": with_data}, "holds 1000 numbers as constants"),
    "metrics_count_scalars_and_participants": ({"upload": half_upload, "move": half}, "scalars up, fewer than"),
    "another_key_gives_other_numbers": ({"draw": jax.random.key(0)}, "another key gives the same numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_is_told_what_is_wrong(name):
    spoiled, sentence = WRONG[name]
    checks = testing.properties(lambda **settings: method(**spoiled, **settings), PROBLEM)
    with pytest.raises(AssertionError, match=sentence) as raised:
        checks[name]()
    assert raised.value.__notes__ == [f"(checked: {name.replace('_', ' ')})"]


def test_a_right_method_passes_with_float64_off():
    jax.config.update("jax_enable_x64", False)
    try:
        testing.check_algorithm(lambda **settings: method(**settings), floats={"lr": 0.1})
        assert jnp.ones(1).dtype == np.float32
    finally:
        jax.config.update("jax_enable_x64", True)


def test_a_state_that_changes_its_shape_is_traced_again():
    def grow(state, results, cohort):
        return {**displacement(state, results, cohort), "w": jnp.tile(state.params["w"], (2, 1))}

    checks = testing.properties(lambda **settings: method(move=grow, **settings), PROBLEM)
    with pytest.raises(AssertionError, match="another type of state than init"):
        checks["dtypes_stay"]()


def test_a_state_with_one_array_twice_cannot_be_donated():
    subject = testing.Subject(lambda **settings: algorithms.fedavg(PROBLEM.loss_fn, optax.sgd(0.1), **settings))
    shared = subject.algorithm.init(subject.params)
    subject.__dict__["done"] = shared._replace(params={**shared.params, "b": subject.params["b"]}), []
    with pytest.raises(AssertionError, match="cannot be donated"):
        subject.check("a_state_can_be_donated")


def test_every_check_is_named_once_and_says_what_it_checks():
    names = (*testing.CHEAP, *testing.DEEP)
    assert len(set(names)) == len(names)
    assert all(getattr(testing.Subject, name).__doc__ for name in names)
    assert list(testing.properties(lambda **settings: method(**settings))) == list(names)


def test_bad_arguments():
    few = testing.classification(sizes=(3, 0, 2))
    with pytest.raises(ValueError, match="the problem has 2 clients with examples: give it at least 6"):
        testing.check_algorithm(lambda **settings: method(**settings), few)
    with pytest.raises(ValueError, match="name must be"):
        testing.Subject(lambda **settings: method(**settings)).check("nothing")
