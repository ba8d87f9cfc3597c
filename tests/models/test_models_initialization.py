"""Other starts of a model."""

import jax
import numpy as np
import pytest

import models


def test_uniform_start_is_uniform_within_one_over_the_root_of_the_fan_in():
    params = models.initialization.uniform(models.mlp((30,), 50, hidden=(400,))).init(jax.random.key(0))
    for layer, fan_in in (("dense_0", 30), ("head", 400)):
        for name, least in (("kernel", 0.999), ("bias", 0.9)):
            values = np.asarray(params[layer][name]) * np.sqrt(fan_in)
            assert least < np.abs(values).max() <= 1
        kernel = np.asarray(params[layer]["kernel"]) * np.sqrt(fan_in)
        np.testing.assert_allclose(kernel.mean(), 0, atol=0.02)
        np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(3), rtol=0.02)


def test_uniform_start_of_a_convolution_counts_its_window():
    params = models.initialization.uniform(models.cnn((8, 8, 3), channels=(16, 8), hidden=4)).init(jax.random.key(0))
    fan_in = 5 * 5 * 3
    kernel = np.abs(np.asarray(params["conv_0"]["kernel"])) * np.sqrt(fan_in)
    assert 0.99 < kernel.max() <= 1


def test_uniform_start_changes_nothing_but_the_numbers():
    plain = models.mlp((4,), 3, hidden=(5, 5))
    model = models.initialization.uniform(plain)
    shapes = [jax.eval_shape(m.init, jax.random.key(0)) for m in (plain, model)]
    assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), *shapes)
    assert (model.apply, model.features) == (plain.apply, plain.features)
    starts = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(model.init(jax.random.key(i)))]) for i in (0, 1)]
    assert len(np.unique(np.concatenate(starts))) == 2 * len(starts[0])  # no two layers or keys share numbers
    again = model.init(jax.random.key(1))
    np.testing.assert_array_equal(starts[1], np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(again)]))


def test_uniform_start_refuses_other_layers():
    with pytest.raises(ValueError, match=r"parameter '.*norm.*' .* belongs to no dense or convolution layer"):
        models.initialization.uniform(models.resnet18_gn((8, 8, 3), 10)).init(jax.random.key(0))
