"""Methods whose server keeps a total over clients and rounds, on a model in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, continue_rounds, samplers

N = 200


def loss(params, batch, key):
    return -(params["w"] * batch["x"].astype(params["w"].dtype))


def features(params, batch, key):
    return params["w"] * batch["x"].astype(params["w"].dtype)[:, None]


MAKERS = {
    "mifa": lambda **s: algorithms.mifa(loss, optax.sgd(0.1), num_clients=N, **s),
    "fedvarp": lambda **s: algorithms.fedvarp(loss, optax.sgd(0.1), num_clients=N, **s),
    "afa_cs": lambda **s: algorithms.afa_cs(loss, optax.sgd(0.1), num_clients=N, **s),
    "fedamd": lambda **s: algorithms.fedamd(loss, optax.sgd(0.1), num_clients=N, **s),
    "scaffold": lambda **s: algorithms.scaffold(loss, optax.sgd(0.1), num_clients=N, **s),
    "scaffold_m": lambda **s: algorithms.scaffold_m(loss, optax.sgd(0.1), num_clients=N, **s),
    "feddyn": lambda **s: algorithms.feddyn(loss, optax.sgd(0.1), num_clients=N, **s),
    "ewc": lambda **s: algorithms.ewc(loss, optax.sgd(0.1), **s),
    "moon": lambda **s: algorithms.moon(loss, optax.sgd(0.1), features=features, num_clients=N, **s),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_keeps_its_dtypes_from_round_to_round(name):
    population = Population.from_sizes({"x": np.ones(N, np.float32)}, np.ones(N, np.int64))
    method = MAKERS[name](batch_size=1)
    state = jax.eval_shape(method.init, {"w": jnp.zeros((), jnp.bfloat16)})
    new, _ = jax.eval_shape(method.round, state, population.cohort(np.arange(2)), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert method.params(new)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "total", "expected"),
    [("mifa", lambda state: state.mean, 0.1), ("scaffold", lambda state: state.control, -1.0)],
)
def test_a_total_over_rounds_does_not_stop_growing(name, total, expected):
    """One client a round; in bfloat16 a mean that grows by 1/200 of itself is lost in its rounding."""
    population = Population.from_sizes({"x": np.ones(N, np.float32)}, np.ones(N, np.int64))
    method = MAKERS[name](batch_size=1, num_steps=1)
    run = continue_rounds(method, samplers.schedule(np.arange(N)[:, None]), N)
    state, _ = jax.jit(run)(method.init({"w": jnp.zeros((), jnp.bfloat16)}), population, jax.random.key(0))
    np.testing.assert_allclose(float(total(state)["w"]), expected, rtol=2e-2)
