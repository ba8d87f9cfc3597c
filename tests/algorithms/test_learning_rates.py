"""Learning rates that differ by client: `lambda round, client: optax.sgd(rates[client])` in every method and plan."""

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
    optimizer_at,
    reference,
    samplers,
    simulate,
    simulate_staged,
)
from tests.algorithms.test_every_method import METHODS, make, params_of, population
from tests.problems import Q3_A, Q3_B, Q3_START, q3_population, quadratic_loss

RATES = np.array([0.1, 0.2, 0.05])
KEY = jax.random.key(0)


def by_client(rates=RATES, decay=1.0):
    return lambda t, i: optax.sgd(jnp.asarray(rates)[i] * decay**t)


def run(name, rounds=1, optimizer=None, copies=(1, 2, 4), **settings):
    """The state after some rounds of all clients, through the plain loop: clients of 1, 2 and 4 steps."""
    algorithm = getattr(algorithms, name)(quadratic_loss, optimizer or by_client(), batch_size=1, **settings)
    state, people = algorithm.init(jnp.asarray(Q3_START)), q3_population(copies)
    with reference.plain_loop():
        for _ in range(rounds):
            state, _ = algorithm.round(state, people.cohort(np.arange(3)), KEY)
    return algorithm, state


def local_models(x, rates=RATES, steps=(1, 2, 4)):
    models = []
    for i, (lr, k) in enumerate(zip(rates, steps, strict=True)):
        y = x
        for _ in range(k):
            y = y - lr * Q3_A[i] @ (y - Q3_B[i])
        models.append(y)
    return np.stack(models)


def expected_fedavg(rounds, decay=1.0):
    x = Q3_START
    for t in range(rounds):
        x = local_models(x, RATES * decay**t).mean(0)
    return x


def test_fedavg():
    _, state = run("fedavg", rounds=2, optimizer=by_client(decay=0.5))
    np.testing.assert_allclose(state.params, expected_fedavg(2, decay=0.5), rtol=1e-12)


def test_methods_that_divide_by_the_length_take_each_clients_own():
    lengths = RATES * (1, 2, 4)
    moved = Q3_START - local_models(Q3_START)
    _, state = run("fednova")
    expected = lengths.mean() * (moved / lengths[:, None]).mean(0)
    np.testing.assert_allclose(state.params, Q3_START - expected, rtol=1e-12)
    for name in ("fedcm", "fedavg_m"):
        _, state = run(name, aggregation="normalized", **{"alpha" if name == "fedcm" else "beta": 1.0})
        np.testing.assert_allclose(state.direction, (moved / lengths[:, None]).mean(0), rtol=1e-12)
        _, state = run(name, **{"alpha" if name == "fedcm" else "beta": 1.0})
        np.testing.assert_allclose(state.direction, moved.mean(0) / lengths.mean(), rtol=1e-12)


@pytest.mark.parametrize("name", ["fedsgd", "mimelite"])
def test_steps_of_one_gradient(name):
    """Methods whose programs use the optimizer elsewhere than in a step of their own state."""
    settings = {"momentum": 0.0} if name == "mimelite" else {}
    _, state = run(name, copies=(1, 1, 1), **settings)
    np.testing.assert_allclose(state.params, local_models(Q3_START, steps=(1, 1, 1)).mean(0), rtol=1e-12)


PLANS = {
    "sequential": lambda: Plan(lanes=1),
    "two lanes": lambda: Plan(lanes=2),
    "a lane each": lambda: Plan(lanes=3),
    "mesh": lambda: Plan(lanes=2, mesh=jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_and_a_vmap_over_rates(plan):
    people = q3_population((1, 2, 4))

    def final(rates):
        method = algorithms.fedavg(quadratic_loss, by_client(rates), batch_size=1, plan=PLANS[plan]())
        return simulate(method, samplers.full(3), 2)(jnp.asarray(Q3_START), people, KEY)[0].params

    got = jax.jit(jax.vmap(final))(jnp.stack([RATES, 2 * RATES]))
    np.testing.assert_allclose(got[0], expected_fedavg(2), rtol=1e-12)
    np.testing.assert_allclose(got[1], local_models(local_models(Q3_START, 2 * RATES).mean(0), 2 * RATES).mean(0))


def test_staged_from_host_memory():
    people = q3_population((1, 2, 4))
    host = HostPopulation.from_flat(jax.tree.map(np.asarray, people.examples), np.asarray(people.offsets))
    method = algorithms.scaffold(quadratic_loss, by_client(), num_clients=3, batch_size=1)
    staged, _ = simulate_staged(method, samplers.uniform(3, 2), 3)(jnp.asarray(Q3_START), host, KEY)
    whole, _ = jax.jit(simulate(method, samplers.uniform(3, 2), 3))(jnp.asarray(Q3_START), people, KEY)
    np.testing.assert_allclose(staged.params, whole.params, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_asks_for_the_client(name):
    """In all that its programs do with the optimizer: outside of a program the client would be a plain 0."""
    asked = []

    def optimizer(t, i):
        asked.append(i)
        return optax.sgd(jnp.full(7, 0.1)[i])

    algorithm = make(name, optimizer=optimizer)
    state = algorithm.init(params_of(name), KEY)
    asked.clear()
    jax.eval_shape(algorithm.round, state, population().cohort(np.array([0, 4, 2, 1])), KEY)
    assert any(isinstance(i, jax.core.Tracer) for i in asked)


def test_a_rate_that_is_not_asked_for_is_not_carried():
    """The id is carried from step to step only where a program asks for it."""
    people = Population.from_sizes({"x": np.ones(4, np.float32)}, [2, 2])

    def num_integers(optimizer):
        method = algorithms.fedavg(lambda p, b, k: p * b["x"], optimizer, batch_size=2)
        state = method.init(jnp.float32(0))
        text = str(jax.make_jaxpr(method.round)(state, people.cohort(jnp.arange(2)), KEY))
        return text.count("i32[]")

    plain = num_integers(optax.sgd(0.1))
    assert num_integers(lambda t: optax.sgd(0.1)) <= plain + 1
    assert num_integers(lambda t, i: optax.sgd(jnp.ones(2)[i])) > plain + 1


def test_functions_of_the_round_with_more_optional_arguments_stay_functions_of_the_round():
    for function in (lambda t, lr=0.1: optax.sgd(lr), lambda t, *, lr=0.1: optax.sgd(lr)):
        update, _ = optimizer_at(function, jnp.int32(0)).update(jnp.ones(()), optax.sgd(0.1).init(jnp.ones(())))
        np.testing.assert_allclose(update, -0.1)
    with pytest.raises(TypeError, match="client_optimizer must be an optax optimizer"):
        optimizer_at(lambda t, i: 0.1, jnp.int32(0)).init(jnp.ones(()))


@pytest.mark.parametrize("rates", [RATES, np.array([0.0, 0.2, 0.05])])
def test_fednova_remembers_gradients_times_steps_of_every_client_at_its_own_rate(rates):
    """Client 0 decays on its own: its rate is nothing that the others' gradients could be divided by."""
    own_decay = jnp.array([0.5, 1.0, 0.8])
    steps, m = np.array([1, 2, 4]), 0.7

    def optimizer(t, i):
        return optax.sgd(jnp.asarray(rates)[i] * own_decay[i] ** t)

    _, state = run("fednova", rounds=3, optimizer=optimizer, server_momentum=m)
    x, v = Q3_START, 0
    for t in range(3):
        lr = rates * np.asarray(own_decay) ** t
        moved = x - local_models(x, lr)
        directions = moved / np.where(lr > 0, lr * steps, 1)[:, None]
        common = (lr * steps).mean() / steps[lr > 0].sum() * 3
        v = m * v + (lr * steps).mean() / common * directions.mean(0)
        x = x - common * v
    np.testing.assert_allclose(state.params, x, rtol=1e-12)


def test_fednova_with_equal_rates_by_client_is_that_of_one_rate():
    one, by_id = (
        run("fednova", rounds=2, optimizer=optimizer, server_momentum=0.7)[1]
        for optimizer in (optax.sgd(0.1), lambda t, i: optax.sgd(jnp.full(3, 0.1)[i]))
    )
    np.testing.assert_array_equal(one.params, by_id.params)
