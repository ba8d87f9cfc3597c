"""What attacks change of an upload, and what they leave as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms import messages as parts
from fedjax_core import Population, with_part
from tests.problems import softmax_loss, softmax_params, softmax_population

# Six clients around 1, two of them malicious, and two around -1.
PLACES = np.array([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, -1.0, -1.01])
MALICIOUS = np.isin(np.arange(8), [4, 5])


@pytest.mark.parametrize(
    ("attack", "first"),
    [
        (None, 1.0),
        (parts.sign_flip(MALICIOUS, factor=2.0), 0.25 + (0.75 + 0.76 + 0.74 + 0.77 - 2 * 0.73 - 2 * 0.75) / 6),
        (parts.inner_product_manipulation(MALICIOUS, epsilon=1.0), None),
        (parts.alie(MALICIOUS, z=0.5), None),
    ],
    ids=["nobody", "sign_flip", "ipm", "alie"],
)
def test_a_malicious_client_attacks_the_cluster_that_it_is_in(attack, first):
    """IFCA's clients send an update and the number of its model, which no attack turns into another number."""
    population = Population.from_sizes({"c": PLACES}, [1] * 8)

    def loss_fn(params, batch, key):
        return 0.5 * jnp.square(params["w"] - batch["c"])

    method = algorithms.ifca(
        loss_fn, optax.sgd(1.0), num_clients=8, start=lambda key: {"w": jnp.float64(-0.25)}, batch_size=1
    )
    algorithm = method if attack is None else with_part(method, attack, like=population)
    start = algorithm.init({"w": jnp.float64(0.25)}, jax.random.key(1))
    state, _ = algorithm.round(start, population.cohort(np.arange(8)), jax.random.key(0))
    state = state if attack is None else state.method
    np.testing.assert_array_equal(state.members, [6, 2])
    models = state.params["w"]
    assert models[1] == pytest.approx(-1.005)
    assert models[0] == pytest.approx(first) if first else models[0] < 0.9


@pytest.mark.parametrize("attack", [parts.sign_flip, parts.alie, parts.inner_product_manipulation])
def test_rankings_are_refused(attack):
    population = softmax_population((3, 5, 4))
    method = with_part(
        algorithms.frl(softmax_loss, optax.sgd(0.1)), attack(np.array([True, False, False])), like=population
    )
    state = method.init(softmax_params(), jax.random.key(0))
    with pytest.raises(TypeError, match=r"makes others of the floats .* clients upload int32: take a method"):
        method.round(state, population.cohort([0, 1]), jax.random.key(1))
