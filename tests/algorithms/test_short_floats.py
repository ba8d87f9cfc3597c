"""Methods that keep totals over clients and rounds, or decompose matrices, on models in bfloat16 and float16."""

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
    "fedspeed": lambda **s: algorithms.fedspeed(loss, optax.sgd(0.1), num_clients=N, lam=1.0, **s),
    "fedsmoo": lambda **s: algorithms.fedsmoo(loss, optax.sgd(0.1), num_clients=N, lam=1.0, rho=0.1, **s),
    "fedlex": lambda **s: algorithms.fedlex(loss, optax.sgd(0.1), momentum=0.99, num_maps=N, **s),
    "autoflip": lambda **s: algorithms.autoflip(loss, optax.sgd(0.1), structured=False, **s),
    "fednova": lambda **s: algorithms.fednova(loss, optax.sgd(0.1), server_momentum=0.99, **s),
    "fedadam": lambda **s: algorithms.fedadam(loss, optax.sgd(0.1), b2=0.999, initial_accumulator=0, **s),
    "fedyogi": lambda **s: algorithms.fedyogi(loss, optax.sgd(0.1), **s),
    "mime": lambda **s: algorithms.mime(loss, optax.sgd(0.1), momentum=0.99, **s),
    "fedexp": lambda **s: algorithms.fedexp(loss, optax.sgd(0.1), **s),
    "fedzo": lambda **s: algorithms.fedzo(loss, optax.sgd(0.1), **s),
    "scaffold_zo": lambda **s: algorithms.scaffold_zo(loss, optax.sgd(0.1), num_clients=N, mu=0.5, **s),
    "fzoos": lambda **s: algorithms.fzoos(
        loss,
        optax.sgd(0.1),
        num_clients=N,
        queries=algorithms.FZooSQueries(capacity=8, initial=2, active=1, survey=2),
        surrogate=algorithms.FZooSSurrogate(neighbors=4, num_features=3),
        **s,
    ),
    "fot": lambda **s: algorithms.fot(
        loss, optax.sgd(0.1), inputs=lambda p, b: {"w": b["x"][:, None]}, layers={"w": 1}, **s
    ),
    "ewc": lambda **s: algorithms.ewc(loss, optax.sgd(0.1), **s),
    "moon": lambda **s: algorithms.moon(loss, optax.sgd(0.1), features=features, num_clients=N, **s),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_state_keeps_its_dtypes_from_round_to_round(name, dtype):
    population = Population.from_sizes({"x": np.ones(N, np.float32)}, np.ones(N, np.int64))
    method = MAKERS[name](batch_size=1)
    state = jax.eval_shape(method.init, {"w": jnp.zeros(1 if name == "fot" else (), dtype)})
    cohort, key = population.cohort(np.arange(2)), jax.random.key(0)
    news = [jax.eval_shape(method.round, state, cohort, key)[0]]
    news += [jax.eval_shape(event.run, state, cohort, key) for event in method.events.values()]
    for new in news:
        assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, state)
        assert jax.eval_shape(method.params, new)["w"].dtype == dtype


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


FADED = 1 - 0.99**400
TOTALS = {
    "fedspeed": (lambda state: state.correction, N, -0.1),
    "fedsmoo": (lambda state: state.dual, N, -0.1),
    "feddyn": (lambda state: state.shift, N, 0.1),
    "scaffold_zo": (lambda state: state.control, N, -1.0),
    "fedlex": (lambda state: state.velocity, 400, 0.1 * FADED),
    "fednova": (lambda state: state.velocity, 400, 100 * FADED),
    "fedadam": (lambda state: state.opt_state.v, 400, 0.01 * (1 - 0.999**400)),
    "mime": (lambda state: state.opt_state[0].ema, 400, -FADED),
}


@pytest.mark.parametrize("name", TOTALS)
def test_the_same_step_again_and_again_adds_up(name):
    """One client a round, always from a model of 0, so that only what the method remembers can go wrong."""
    total, num_rounds, expected = TOTALS[name]
    population = Population.from_sizes({"x": np.ones(N, np.float32)}, np.ones(N, np.int64))
    method = MAKERS[name](batch_size=1, num_steps=1)
    start = {"w": jnp.zeros((), jnp.bfloat16)}

    def body(state, i):
        return method.round(state._replace(params=start), population.cohort(i[None]), jax.random.key(0))

    state, _ = jax.jit(lambda ids: jax.lax.scan(body, method.init(start), ids))(jnp.arange(num_rounds) % N)
    np.testing.assert_allclose(float(total(state)["w"]), expected, rtol=5e-3)


def test_clients_of_feddyn_and_its_kin_remember_small_steps():
    """A thousand visits of one client, each a step that is lost in the rounding of what a bfloat16 would hold."""
    population = Population.from_sizes({"x": np.ones(1, np.float32)}, [1])
    method = algorithms.feddyn(loss, optax.sgd(0.1), num_clients=1, alpha=1e-6, batch_size=1, num_steps=1)
    start = {"w": jnp.zeros((), jnp.bfloat16)}

    def body(state, i):
        return method.round(state._replace(params=start), population.cohort(jnp.arange(1)), jax.random.key(0))

    state, _ = jax.jit(lambda ids: jax.lax.scan(body, method.init(start), ids))(jnp.arange(1000))
    np.testing.assert_allclose(float(state.client_shifts.rows["w"][0]), 100, rtol=5e-3)


def test_small_numbers_in_float16_have_a_length():
    """Their squares are 0 in float16, in which the radius of FedSAM's perturbation would not be rho."""

    def small(params, batch, key):
        return params["w"] ** 2 * batch["x"].astype(jnp.float16) * jnp.float16(1e-4)

    population = Population.from_sizes({"x": np.ones(1, np.float32)}, [1])
    method = algorithms.fedsam(small, optax.sgd(100.0), rho=1.0, batch_size=1, num_steps=1)
    state = method.init({"w": jnp.ones((), jnp.float16)})
    state, _ = jax.jit(method.round)(state, population.cohort(jnp.arange(1)), jax.random.key(0))
    # From 1 the perturbation leads to 2, where the gradient is 4e-4.
    np.testing.assert_allclose(float(state.params["w"]), 1 - 0.04, rtol=1e-3)
