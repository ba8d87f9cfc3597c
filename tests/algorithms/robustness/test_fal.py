"""FAL: traces of an independent NumPy program on a linear model, where the best attack is known, and the adversary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.robustness.fal import pgd, robust
from fedjax_core import Population, evaluate
from tests.problems import FULL, PART, assert_trees_close, softmax_loss, softmax_params, softmax_population

KEY = jax.random.key(0)
START = jnp.array([1.0, -0.5])
NO_BOX = {"low": -np.inf, "high": np.inf}
ONE_STEP = {"rho": 0.5, "step_size": 0.5, "attack_steps": 1, **NO_BOX}
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def margins(w, batch):
    return batch["y"] * (batch["x"] @ w)


def logistic_loss(w, batch, key):
    return jax.nn.softplus(-margins(w, batch))


def logistic_clients():
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(4, 2)), "y": rng.choice([-1.0, 1.0], 4)} for _ in range(3)]


def run(algorithm, cohorts, population=None, start=START):
    """Global models after every round and the last metrics."""
    population = population or Population.from_clients(logistic_clients())
    state, models, round_fn = algorithm.init(start), [], jax.jit(algorithm.round)
    for ids in cohorts:
        state, metrics = round_fn(state, population.cohort(ids), KEY)
        models.append(algorithm.params(state))
    return models, metrics


@partial(jax.jit, static_argnames=("loss_fn", "attack_steps", "norm", "random_start"))
def attacked(params, batch, key, *, loss_fn=softmax_loss, low=0.0, high=1.0, **settings):
    return pgd(loss_fn, low=low, high=high, **settings)(params, batch, key)


def make(name="fal", loss_fn=logistic_loss, **settings):
    return getattr(algorithms, name)(loss_fn, optax.sgd(0.3), **{"batch_size": 4, "num_steps": 2, **settings})


def worst_inputs(w, x, y, rho, norm):
    """The worst inputs of a linear model: each margin falls by rho ||w||_1 or rho ||w||_2."""
    direction = np.sign(w) if norm == "linf" else w / np.linalg.norm(w)
    return x - rho * y[:, None] * direction


@pytest.mark.quick
@NORMS
def test_golden_trace(norm):
    cohorts = [[0, 1, 2], [0, 1, -1], [1, 2, -1], [0, 2, -1]]
    settings = {"rho": 0.3, "step_size": 0.1, "attack_steps": 4, "random_start": False}
    models, _ = run(make(norm=norm, server_lr=0.8, **settings, **NO_BOX), cohorts)
    x = np.asarray(START)
    for ids, model in zip(cohorts, models, strict=True):
        local_models = []
        for i in [i for i in ids if i >= 0]:
            client, w = logistic_clients()[i], x
            for _ in range(2):
                inputs = worst_inputs(w, client["x"], client["y"], 0.3, norm)
                slope = -client["y"] / (1 + np.exp(client["y"] * (inputs @ w)))
                w = w - 0.3 * (slope @ inputs) / 4
            local_models.append(w)
        x = x + 0.8 * (np.mean(local_models, 0) - x)
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-7)


def test_radius_zero_is_fedavg_whatever_the_inputs_and_the_box():
    expected = run(make("fedavg"), PART)
    for norm in ("linf", "l2"):
        assert_trees_close(run(make(rho=0.0, norm=norm), PART), expected, rtol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize(("norm", "margin"), [("l2", -7.5), ("linf", -8.5)])
def test_one_step_as_long_as_the_radius_finds_the_worst_input_of_a_linear_model(norm, margin):
    w, batch = jnp.array([3.0, -4.0]), {"x": jnp.array([[1.0, 2.0]]), "y": jnp.ones(1)}
    np.testing.assert_allclose(margins(w, batch), [-5])
    worst = attacked(w, batch, None, loss_fn=logistic_loss, norm=norm, **ONE_STEP)
    np.testing.assert_allclose(margins(w, worst), [margin], rtol=1e-12)
    # A random start does not keep it from getting there, if there are steps enough.
    more = {**ONE_STEP, "attack_steps": 40, "random_start": True}
    worst = attacked(w, batch, KEY, loss_fn=logistic_loss, norm=norm, **more)
    np.testing.assert_allclose(margins(w, worst), [margin], rtol=1e-9)


def test_one_long_step_is_the_fast_gradient_sign():
    population, params = softmax_population((8,)), softmax_params()
    batch = population.examples
    gradient = jax.grad(lambda x: jnp.sum(softmax_loss(params, {**batch, "x": x}, KEY)))(batch["x"])
    for step_size in (0.5, 3.0):
        got = attacked(params, batch, KEY, norm="linf", **{**ONE_STEP, "step_size": step_size})
        np.testing.assert_allclose(got["x"], batch["x"] + 0.5 * np.sign(gradient), rtol=1e-12)


def distances(d, norm):
    return np.abs(d).max(1) if norm == "linf" else np.linalg.norm(d, axis=1)


@NORMS
@pytest.mark.parametrize("attack_steps", [1, 7])
def test_attacks_stay_in_the_ball_and_the_box_and_use_the_ball(norm, attack_steps):
    params, batch = softmax_params(), dict(softmax_population((30,)).examples)
    batch["x"] = jax.nn.sigmoid(batch["x"])
    settings = {"rho": 0.3, "step_size": 0.2, "attack_steps": attack_steps, "norm": norm, "random_start": True}
    boxed = attacked(params, batch, KEY, **settings)["x"]
    assert distances(boxed - batch["x"], norm).max() <= 0.3 + 1e-12
    assert (boxed >= 0).all()
    assert (boxed <= 1).all()
    assert ((boxed == 0) | (boxed == 1)).any()
    free = attacked(params, batch, KEY, **settings, **NO_BOX)["x"]
    assert (distances(free - batch["x"], norm) > 0.3 - 1e-9).mean() > (0.2 if attack_steps == 1 else 0.9)


@NORMS
def test_inputs_outside_the_box_go_no_farther(norm):
    params, batch = softmax_params(), softmax_population((30,)).examples
    moved = attacked(params, batch, KEY, rho=0.3, step_size=0.1, attack_steps=5, norm=norm)["x"]
    assert distances(moved - batch["x"], norm).max() <= 0.3 + 1e-12
    above, below = batch["x"] > 1, batch["x"] < 0
    assert (moved[above] <= batch["x"][above]).all()
    assert (moved[below] >= batch["x"][below]).all()
    assert (moved[above] < batch["x"][above]).any()


@NORMS
def test_bytes_are_attacked_in_units_of_255(norm):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5)).astype(np.uint8)
    batch = {**softmax_population((12,)).examples, "x": jnp.asarray(pixels)}
    settings = {"rho": 0.1, "step_size": 0.04, "attack_steps": 3, "norm": norm, "random_start": True}

    def scaled_loss(params, batch, key):
        return softmax_loss(params, {**batch, "x": batch["x"] / 255}, key)

    got = attacked(softmax_params(), batch, KEY, loss_fn=scaled_loss, **settings)["x"]
    floats = attacked(softmax_params(), {**batch, "x": pixels / 255}, KEY, **settings)["x"]
    np.testing.assert_allclose(got / 255, floats, atol=1e-12)
    assert got.dtype == np.float64


@NORMS
def test_the_loss_grows_with_the_radius(norm):
    params, batch = softmax_params(), softmax_population((20,)).examples
    metric_fn = lambda params, batch: softmax_loss(params, batch, None)  # noqa: E731

    @jax.jit
    def under_attack(rho):
        attack = pgd(softmax_loss, rho=rho, step_size=rho / 2, attack_steps=4, norm=norm, **NO_BOX)
        return evaluate(robust(metric_fn, attack), params, batch)

    values = [float(evaluate(metric_fn, params, batch)), *map(float, map(under_attack, (0.0, 0.1, 0.2, 0.4)))]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
    assert (np.diff(values[1:]) > 0.01).all()


def test_random_starts_fill_the_ball():
    """Uniform: in 2 dimensions a quarter of the ball lies within half its radius."""
    batch = {"x": jnp.zeros((4000, 2)), "y": jnp.ones(4000)}
    for norm in ("linf", "l2"):
        still = {**ONE_STEP, "step_size": 0.0}
        x = attacked(jnp.ones(2), batch, KEY, loss_fn=logistic_loss, norm=norm, random_start=True, **still)["x"]
        np.testing.assert_allclose((distances(x, norm) < 0.25).mean(), 0.25, atol=0.03)
        np.testing.assert_allclose(x.mean(0), 0, atol=0.03)


def test_no_gradient_flows_through_the_attack():
    """With one step a client does what FedAvg does on inputs attacked beforehand."""
    population, params = softmax_population((4, 4, 4)), softmax_params()
    settings = {"rho": 0.4, "step_size": 0.3, "attack_steps": 3, "norm": "l2"}
    local = {"batch_size": 4, "num_steps": 1}
    algorithm = make(loss_fn=softmax_loss, random_start=False, **settings, **local)
    models, metrics = run(algorithm, FULL[:1], population, params)
    moved = Population.from_clients([attacked(params, population.client(i), KEY, **settings) for i in range(3)])
    expected, other = run(make("fedavg", softmax_loss, **local), FULL[:1], moved, params)
    assert_trees_close((models, metrics), (expected, other), rtol=1e-12)


def test_a_random_start_without_a_key_is_an_error():
    attack = pgd(logistic_loss, random_start=True, **ONE_STEP)
    with pytest.raises(ValueError, match="random_start=True but the key is None"):
        attack(jnp.ones(2), {"x": jnp.ones((1, 2)), "y": jnp.ones(1)}, None)
