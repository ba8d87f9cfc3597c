"""A head for every task: what an example sees, and what it changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import heads, losses, metrics

T, K = 3, 2
BODY = models.mlp((4,), T * K, hidden=(5,))
MODEL = heads.multi_head(BODY, T)


def examples():
    rng = np.random.default_rng(0)
    x = {"inputs": jnp.asarray(rng.normal(size=(4, 4))), "task": jnp.array([0, 2, 1, 2])}
    return {"x": x, "y": jnp.array([0, 1, 1, 0])}


def test_an_example_meets_the_head_of_its_own_task():
    params, batch = MODEL.init(jax.random.key(0)), examples()
    z, out = MODEL.features(params, batch["x"]), MODEL.apply(params, batch["x"])
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    for i, t in enumerate([0, 2, 1, 2]):
        own = slice(t * K, (t + 1) * K)
        np.testing.assert_allclose(out[i], z[i] @ kernel[:, own] + bias[own], rtol=1e-12)
    assert metrics.classification(MODEL)(params, batch)["accuracy"].shape == (4,)


def test_the_heads_of_other_tasks_get_no_gradient():
    params, batch = MODEL.init(jax.random.key(0)), examples()
    one = jax.tree.map(lambda leaf: leaf[1:2], batch)  # of task 2
    gradient = jax.grad(lambda params: losses.cross_entropy(MODEL)(params, one).sum())(params)["head"]
    np.testing.assert_array_equal(gradient["kernel"][:, : 2 * K], 0)
    np.testing.assert_array_equal(gradient["bias"][: 2 * K], 0)
    assert np.abs(gradient["kernel"][:, 2 * K :]).max() > 0


def test_a_task_that_is_not_there_is_answered_with_nan():
    params, x = MODEL.init(jax.random.key(0)), examples()["x"]
    out = MODEL.apply(params, {**x, "task": jnp.array([-1, 3, 0, 1])})
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2:]).all()


def test_outputs_that_cannot_be_divided_among_the_tasks():
    model = heads.multi_head(BODY, 4)
    with pytest.raises(ValueError, match="num_tasks must divide the model's 6 outputs, got 4"):
        model.apply(BODY.init(jax.random.key(0)), examples()["x"])


def test_dropout_of_the_perceptron_acts_at_training_alone():
    model = models.mlp((4,), 3, hidden=(200, 100), dropout=(0.2, 0.5))
    params, x = model.init(jax.random.key(0)), jnp.ones((1, 4))
    kept = model.features(params, x)
    dropped = model.features(params, x, jax.random.key(1))
    active = np.asarray(kept) > 0
    assert 0.3 < np.mean(np.asarray(dropped)[active] == 0) < 0.7
    np.testing.assert_array_equal(model.features(params, x), kept)
    for rates in ((0.2,), (0.2, 1.0)):
        with pytest.raises(ValueError, match=r"a rate in \[0, 1\) for each of the 2 hidden layers"):
            models.mlp((4,), 3, hidden=(200, 100), dropout=rates)
