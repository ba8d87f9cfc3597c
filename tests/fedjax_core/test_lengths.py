"""The length of local work: what it is for optimizers that are linear in small gradients, and who is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import measured, per_length
from tests.problems import Q3_START, q3_population, quadratic_loss

BY_LENGTH = ["fednova", "fedcm", "mofedsam", "fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr"]


def after(optimizer, steps, mu=0.0):
    optimizer, model = measured(optimizer, mu), jnp.zeros(2)
    state = optimizer.init(model)
    for _ in range(steps):
        _, state = optimizer.update(model, state, model)
    return state.damped_length


HALVING = optax.sgd(lambda count: 0.1 * 0.5**count)
LINEAR = {
    "sgd": (optax.sgd(0.1), 0.3),
    "momentum": (optax.sgd(0.1, momentum=0.5), 0.1 * (1 + 1.5 + 1.75)),
    "nesterov": (optax.sgd(0.1, momentum=0.5, nesterov=True), 0.1 * (1.5 + 1.75 + 1.875)),
    "schedule": (HALVING, 0.175),
    "inject_hyperparams": (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), 0.3),
    "clipping": (optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(0.1)), 0.3),
    "clipping entries": (optax.chain(optax.clip(0.01), optax.sgd(0.1)), 0.3),
    "clipping the update": (optax.chain(optax.sgd(0.1), optax.clip(0.01)), 0.3),
    "weight decay": (optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), 0.3),
    "decoupled weight decay": (optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.05)), 0.3),
    "averaged momentum": (optax.chain(optax.ema(0.5, debias=False), optax.sgd(0.1)), 0.1 * (0.5 + 0.75 + 0.875)),
    "not if not finite": (optax.apply_if_finite(optax.sgd(0.1), 3), 0.3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_length_is_the_sum_of_the_weights_of_the_gradients(name):
    optimizer, expected = LINEAR[name]
    np.testing.assert_allclose(after(optimizer, 3), expected, rtol=1e-6)


def test_a_proximal_term_shortens_it():
    for optimizer in (optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(0.1))):
        np.testing.assert_allclose(after(optimizer, 2, mu=0.5), 0.1 * (1 + 0.95), rtol=1e-6)


def test_nothing_is_divided_by_zero():
    assert after(optax.sgd(0.0), 3) == 0
    np.testing.assert_array_equal(per_length({"w": jnp.ones(2)}, jnp.zeros(()))["w"], 1)


NOT_LINEAR = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adam with a large eps": lambda lr: optax.adam(lr, eps=0.1),
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "yogi": optax.yogi,
    "lion": optax.lion,
    "signs": lambda lr: optax.chain(optax.scale_by_sign(), optax.sgd(lr)),
    "lars": optax.lars,
    "lamb": optax.lamb,
    "normalized": lambda lr: optax.chain(optax.normalize_by_update_norm(), optax.sgd(lr)),
    "not negative": lambda lr: optax.chain(optax.sgd(lr), optax.keep_params_nonnegative()),
    "masked by structure": lambda lr: optax.chain(optax.masked(optax.set_to_zero(), {"w": True}), optax.sgd(lr)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_other_optimizers_are_refused(name):
    with pytest.raises(ValueError, match="divides what a client has moved by the length of its local work"):
        measured(NOT_LINEAR[name](0.1)).init(jnp.zeros(2))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_methods_refuse_them_while_tracing_whatever_is_traced(name):
    def one_round(build, lr):
        settings = {"num_clients": 3} if name.startswith("scaffold") else {}
        algorithm = getattr(algorithms, name)(quadratic_loss, build(lr), batch_size=1, **settings)
        cohort = q3_population((1, 2, 4)).cohort(np.arange(3))
        return algorithm.round(algorithm.init(jnp.asarray(Q3_START)), cohort, jax.random.key(0))

    with pytest.raises(ValueError, match="client_optimizer that is linear in small gradients"):
        jax.eval_shape(lambda lr: one_round(optax.adam, lr), jnp.float64(0.1))
    clipped = lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr, momentum=0.9))  # noqa: E731
    jax.eval_shape(jax.vmap(lambda lr: one_round(clipped, lr)), jnp.array([0.1, 0.2]))
