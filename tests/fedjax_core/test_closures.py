"""A compiled function may close over states, cohorts and populations: what can be checked is checked on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import continue_rounds, evaluate, evaluate_clients, samplers, simulate
from tests.problems import assert_trees_close, softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 1, 4, 2))
SCAFFOLD = algorithms.scaffold(softmax_loss, optax.sgd(0.1), batch_size=2, num_clients=4)
STATE = SCAFFOLD.init(softmax_params())
IDS = jnp.array([1, 3])
COHORT = POPULATION.cohort([2, 0])
KEY = jax.random.key(3)
SAMPLER = samplers.uniform(4, 2)
SCHEDULE = samplers.schedule(np.array([[0, 1], [2, 3], [1, 3]]))


def losses(params, batch):
    return {"loss": softmax_loss(params, batch, None)}


CALLS = {
    "init": (lambda x: SCAFFOLD.init(softmax_params()), 0.0),
    "round": (lambda key: SCAFFOLD.round(STATE, COHORT, key), KEY),
    "round of traced ids": (lambda ids: SCAFFOLD.round(STATE, POPULATION.cohort(ids), KEY), jnp.array([2, 0])),
    "client_params": (lambda x: SCAFFOLD.client_params(STATE, IDS), 0.0),
    "simulate": (lambda key: simulate(SCAFFOLD, SAMPLER, 2)(softmax_params(), POPULATION, key), KEY),
    "continue_rounds": (lambda key: continue_rounds(SCAFFOLD, SAMPLER, 2)(STATE, POPULATION, key), KEY),
    "a schedule": (lambda key: continue_rounds(SCAFFOLD, SCHEDULE, 2)(STATE, POPULATION, key), KEY),
    "evaluate": (lambda x: evaluate(losses, softmax_params(), POPULATION.examples), 0.0),
    "evaluate_clients": (lambda x: evaluate_clients(losses, softmax_params(), POPULATION), 0.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_under_jit_it_gives_what_it_gives_without(name):
    function, argument = CALLS[name]
    assert_trees_close(jax.jit(function)(argument), function(argument), rtol=1e-9, atol=1e-12)


def test_what_is_wrong_with_what_is_closed_over_is_still_said():
    late = STATE._replace(round=jnp.int32(2**31 - 1))
    with pytest.raises(ValueError, match="beyond 2147483647"):
        jax.jit(lambda key: SCAFFOLD.round(late, COHORT, key))(KEY)
    with pytest.raises(ValueError, match="ids holds 9: clients are numbered 0 to 3"):
        jax.jit(lambda x: SCAFFOLD.client_params(STATE, np.array([9])))(0.0)
