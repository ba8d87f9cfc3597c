"""The mask for losses that look at the whole batch: who gets it, and that padding then has no part in the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, for_each_client, full_gradient_program, local_work, masks

MASK = jnp.array([True, False])


def plain(params, batch, key):
    return "no mask"


def masked(params, batch, key=None, mask=None):
    return mask


def named_only(params, batch, key, *, mask):
    return mask


def by_position_only(params, batch, key, mask=None, /):
    return "no mask"


def anything(*args, **settings):
    return settings.get("mask", "no mask")


@functools.wraps(masked)
def handing_on(*args, **settings):
    return masked(*args, **settings)


@functools.wraps(masked)
def keeping_back(params, batch, key):
    return "no mask"


class Loss:
    def __call__(self, params, batch, key, mask):
        return mask

    def method(self, params, batch, key, mask):
        return mask


TAKING = [
    masked,
    named_only,
    handing_on,
    Loss(),
    Loss().method,
    functools.partial(named_only),
    functools.partial(masked, key=None),
    functools.partial(lambda scale, params, batch, key=None, mask=None: mask, 2.0),
    lambda p, b, k=None, mask=None: mask,
    jax.jit(masked),
    jax.checkpoint(masked),
    functools.partial(jax.jit(masked)),
]
NOT_TAKING = [
    plain,
    by_position_only,
    anything,
    keeping_back,
    functools.partial(masked, mask="no mask"),
    lambda p, b, k: "no mask",
]


@pytest.mark.parametrize("function", TAKING)
def test_a_parameter_named_mask_is_given_the_mask(function):
    assert masks.takes_mask(function)
    rest = () if isinstance(function, functools.partial) and function.keywords else (None,)
    np.testing.assert_array_equal(masks.call(function, 0.0, jnp.zeros(2), *rest, mask=MASK), MASK)
    np.testing.assert_array_equal(masks.call(function, 0.0, jnp.zeros(2), *rest), [True, True])


@pytest.mark.parametrize("function", NOT_TAKING)
def test_others_are_called_as_they_are(function):
    assert not masks.takes_mask(function)
    rest = () if isinstance(function, functools.partial) else (None,)
    assert masks.call(function, 0.0, jnp.zeros(2), *rest, mask=MASK) == "no mask"


RNG = np.random.default_rng(0)
SEVEN = Population.from_sizes({"x": RNG.normal(size=(7, 3)), "y": RNG.integers(0, 2, 7)}, [7])
PARAMS = {"a": jnp.asarray(RNG.normal(size=(3, 4))), "b": jnp.asarray(RNG.normal(size=(4, 2)))}


def normalized(params, examples, mask):
    """A hidden layer with batch normalization over the examples that count."""
    h = examples["x"] @ params["a"]
    share = mask[:, None] / jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(share * h, axis=0)
    return (h - mean) / jnp.sqrt(jnp.sum(share * jnp.square(h - mean), axis=0) + 1e-5)


def batch_norm(params, batch, key, mask):
    logits = jax.nn.relu(normalized(params, batch, mask)) @ params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def contrastive(params, batch, key, mask):
    """Every example's own row against those of the others in the batch."""
    z, other = batch["x"] @ params["a"], batch["x"][:, ::-1] @ params["a"]
    scores = jnp.where(mask, z @ other.T, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(z.shape[0]))


def after_a_round(make, size, **settings):
    algorithm = make(batch_size=size, order="sequential", **settings)
    state = algorithm.init(PARAMS)
    state, metrics = jax.jit(algorithm.round)(state, SEVEN.cohort(np.arange(1)), jax.random.key(0))
    return algorithm.params(state), metrics.loss


def fal(**local):
    return algorithms.fal(batch_norm, optax.sgd(0.5), rho=0.1, random_start=False, low=-np.inf, high=np.inf, **local)


def moon(**local):
    def features(params, batch, key, mask):
        return normalized(params, batch, mask)

    return algorithms.moon(batch_norm, optax.sgd(0.5), features=features, num_clients=1, mu=5.0, **local)


def fedld(**local):
    return algorithms.fedld(
        batch_norm, optax.sgd(0.5), logits=lambda p, b, k, mask: normalized(p, b, mask) @ p["b"], **local
    )


METHODS = [
    lambda **local: algorithms.fedavg(batch_norm, optax.sgd(0.5), **local),
    lambda **local: algorithms.fedavg(contrastive, optax.sgd(0.5), **local),
    fal,
    moon,
    fedld,
]


@pytest.mark.parametrize("make", METHODS, ids=["batch norm", "contrastive", "fal", "moon", "fedld"])
def test_padding_has_no_part_in_a_model_whose_loss_takes_the_mask(make):
    (full, full_loss), (padded, padded_loss) = (after_a_round(make, size) for size in (7, 16))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), full, padded)
    np.testing.assert_allclose(full_loss, padded_loss)
    assert max(np.abs(a - b).max() for a, b in zip(padded.values(), PARAMS.values(), strict=True)) > 0.01


def test_without_the_mask_padding_counts_as_examples():
    """What the mask is for: the same loss that cannot see it gives another model."""

    def unaware(params, batch, key):
        return batch_norm(params, batch, key, jnp.ones(batch["y"].shape, bool))

    def make(**local):
        return algorithms.fedavg(unaware, optax.sgd(0.5), **local)

    (full, _), (padded, _) = (after_a_round(make, size) for size in (7, 16))
    assert np.abs(full["b"] - padded["b"]).max() > 1e-3


def test_the_full_gradient_takes_the_mask():
    found = [
        for_each_client(
            full_gradient_program(batch_norm),
            PARAMS,
            SEVEN.cohort(np.arange(1)),
            jax.random.key(0),
            work=local_work(size, order="sequential"),
        ).aggregate["b"]
        for size in (7, 16)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)
