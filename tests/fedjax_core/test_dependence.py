"""Losses that look at other examples of their batch are found, and others are not taken for such."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import algorithms
import models
from fedjax_core import dependence, testing
from models import losses

KEY = jax.random.key(0)
PROBLEM = testing.classification()
LOGISTIC = PROBLEM.loss_fn
BATCH = {"x": jnp.ones((4, 5)), "y": jnp.zeros(4, jnp.int32)}


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"]


def normalized(params, batch, key):
    h = logits(params, batch)
    return jnp.sum((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5), 1)


def contrastive(params, batch, key):
    h = logits(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(h @ h.T, jnp.arange(4))


MIXING = {
    "normalized": normalized,
    "contrastive": contrastive,
    "in a compiled function": jax.jit(normalized),
    "ranked": lambda p, b, key: jnp.sort(logits(p, b)[:, 0]),
    "summed up": lambda p, b, key: jnp.cumsum(logits(p, b)[:, 0]),
    "of a regularizer": lambda p, b, key: LOGISTIC(p, b, key) + jnp.square(logits(p, b)).mean(),
    "through a transpose": lambda p, b, key: logits(p, b).T.mean(1)[0] + LOGISTIC(p, b, key),
}
ALONE = {
    "plain": LOGISTIC,
    "penalty of the parameters": lambda p, b, key: LOGISTIC(p, b, key) + jnp.square(p["w"]).sum(),
    "a sum that is not used": lambda p, b, key: (b["x"].sum(), LOGISTIC(p, b, key))[1],
    "noise": lambda p, b, key: LOGISTIC(p, {**b, "x": b["x"] + jax.random.normal(key, b["x"].shape)}, key),
    "of batches": lambda p, b, key: jax.vmap(lambda x: jnp.square(x @ p["w"]).sum())(b["x"]),
    "pairs within an example": lambda p, b, key: jnp.einsum("bi,bj->b", b["x"], logits(p, b)),
    "reshaped": lambda p, b, key: logits(p, b).reshape(4, 3, 1).sum((1, 2)),
}


@pytest.mark.parametrize("name", [*MIXING, *ALONE])
def test_what_a_loss_looks_at(name):
    loss_fn = {**MIXING, **ALONE}[name]
    assert bool(dependence.mixes(loss_fn, PROBLEM.params, BATCH, KEY)) == (name in MIXING)


MLP, CNN = (
    models.mlp((4, 4, 1), 3, hidden=(4,)),
    models.cnn((4, 4, 1), 3, channels=(2,), hidden=4, convolution="native"),
)
LM = models.transformer(5, 6, num_layers=1, dim=4, num_heads=1)


@pytest.mark.parametrize("model", [MLP, CNN, LM], ids=["mlp", "cnn", "transformer"])
def test_models_look_at_one_example_at_a_time(model):
    params = jax.eval_shape(model.init, KEY)
    if model is LM:
        tokens = jnp.zeros((4, 6), jnp.int32)
        assert not dependence.mixes(losses.sequence_cross_entropy(model), params, {"x": tokens, "y": tokens}, KEY)
        return
    batch = {"x": jnp.zeros((4, 4, 4, 1)), "y": jnp.zeros(4, jnp.int32)}
    assert not dependence.mixes(losses.cross_entropy(model), params, batch, KEY)
    # Through the whole network, up to where labels are looked up: what comes before would be found.
    assert dependence.mixes(lambda p, b, key: model.apply(p, b["x"]).mean(0), params, batch, KEY)


def traced(loss_fn):
    method = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=4)
    arguments = method.init(PROBLEM.params), PROBLEM.population.cohort([0, 1]), KEY
    return jax.eval_shape(method.round, *arguments)


def test_a_method_warns_once_and_not_of_a_loss_with_a_mask():
    def mine(params, batch, key):
        return normalized(params, batch, key)

    def masked(params, batch, key, mask):
        return normalized(params, batch, key)

    with pytest.warns(UserWarning, match=r"give it a parameter mask, bool\[B\]"):
        traced(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss_fn in (mine, masked, LOGISTIC):
            traced(loss_fn)
