"""What goes into a layer, multiplied by its weight, must be what comes out of it, for every kind of layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import capture

B = 3


def outputs(module, params, x):
    """Path of each watched layer to its outputs without the bias, which are zeros in these tests."""
    _, state = module.apply({"params": params}, x, capture_intermediates=True)
    flat = jax.tree_util.tree_flatten_with_path(state["intermediates"])[0]
    names = {jax.tree_util.keystr(path[:-2], simple=True, separator="/"): leaf for path, leaf in flat}
    return {f"{name}/kernel" if name else "kernel": leaf for name, leaf in names.items()}


def check(module, x, kernels):
    """Rows times kernels are outputs: of the layers at these paths, and no other layers are seen."""
    x = jnp.asarray(x)
    params = module.init(jax.random.key(0), x)["params"]

    def apply(params, x):
        return module.apply({"params": params}, x)

    found = jax.jit(capture.layer_inputs(apply))(params, x)
    assert set(found) == set(kernels)
    assert capture.layer_widths(apply, params, x) == {path: rows.shape[1] for path, rows in found.items()}
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    expected = outputs(module, params, x)
    for path, rows in found.items():
        product = rows @ flat[path].reshape(rows.shape[1], -1)
        np.testing.assert_allclose(product, expected[path].reshape(product.shape), rtol=1e-10, atol=1e-12)
    return found


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(B, 4), (B, 5, 4), (B, 2, 3, 4)])
def test_dense(shape):
    check(nn.Dense(6, param_dtype=float), normal(*shape), ["kernel"])


CONVOLUTIONS = {
    "one dimension": (dict(kernel_size=3), (7, 2)),
    "causal": (dict(kernel_size=(3,), padding="CAUSAL"), (7, 2)),
    "same": (dict(kernel_size=(3, 3)), (6, 5, 2)),
    "valid with strides": (dict(kernel_size=(3, 2), strides=(2, 1), padding="VALID"), (7, 6, 2)),
    "uneven padding": (dict(kernel_size=(2, 3), padding=((1, 0), (0, 2))), (5, 5, 2)),
    "circular and dilated": (dict(kernel_size=(3, 3), kernel_dilation=2, padding="CIRCULAR"), (6, 6, 2)),
    "three dimensions": (dict(kernel_size=(2, 2, 2)), (3, 4, 3, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    settings, shape = CONVOLUTIONS[name]
    check(nn.Conv(4, param_dtype=float, **settings), normal(B, *shape), ["kernel"])


def test_the_convolutions_of_this_library():
    layer = nn.Conv(
        4, (3, 3), strides=2, conv_general_dilated=models.convolution.dot_conv_general_dilated, param_dtype=float
    )
    check(layer, normal(B, 6, 5, 2), ["kernel"])


def test_every_group_of_a_grouped_convolution_is_in_the_rows():
    layer = nn.Conv(6, (3, 3), feature_group_count=2, param_dtype=float)
    x = jnp.asarray(normal(B, 4, 4, 4))
    params = layer.init(jax.random.key(0), x)["params"]
    rows = capture.layer_inputs(lambda params, x: layer.apply({"params": params}, x))(params, x)["kernel"]
    rows = rows.reshape(B, 4, 4, 2, -1)
    kernel = params["kernel"].reshape(rows.shape[-1], 2, 3)
    product = jnp.einsum("bhwgd,dgf->bhwgf", rows, kernel).reshape(B, 4, 4, 6)
    np.testing.assert_allclose(product, layer.apply({"params": params}, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, 1, (1, 2), (2, 1), (-2, -1)])
def test_dense_of_any_axes(axis):
    """The order of the contracted axes is that of the kernel's."""
    layer = nn.DenseGeneral((2, 5), axis=axis, param_dtype=float)
    check(layer, normal(B, 4, 3), ["kernel"])


def test_attention_projections():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, param_dtype=float)(x, x[:, :3])

    paths = [f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")]
    found = check(Attention(), normal(B, 5, 6), paths)
    assert [found[path].shape for path in paths] == [(B * 5, 6), (B * 3, 6), (B * 3, 6), (B * 5, 8)]


def test_a_layer_that_is_used_twice_has_both_uses_of_each_example_together():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, param_dtype=float)
            return layer(layer(x))

    x = jnp.asarray(normal(B, 4))
    params = Twice().init(jax.random.key(0), x)["params"]
    rows = capture.layer_inputs(lambda params, x: Twice().apply({"params": params}, x))(params, x)["Dense_0/kernel"]
    np.testing.assert_array_equal(rows[::2], x)
    np.testing.assert_allclose(rows[1::2], x @ params["Dense_0"]["kernel"], rtol=1e-12)


MODELS = {
    "mlp": (models.mlp((4, 4, 1), 3, hidden=(8, 6)), jnp.zeros((B, 4, 4, 1)), {"dense_0": 16, "dense_1": 8, "head": 6}),
    "cnn": (
        models.cnn((8, 8, 3), 3, channels=(4, 5), hidden=6),
        jnp.zeros((B, 8, 8, 3)),
        {"conv_0": 75, "conv_1": 100, "dense": 20, "head": 6},
    ),
    "transformer": (
        models.transformer(7, 5, num_layers=1, dim=4, num_heads=2),
        jnp.zeros((B, 5), int),
        {f"block_0/{name}": 4 for name in ("query", "key", "value", "out", "up")} | {"block_0/down": 16, "head": 4},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_the_models_and_the_examples_their_samples_belong_to(name):
    model, x, widths = MODELS[name]
    params = model.init(jax.random.key(0))
    expected = {f"{layer}/kernel": width for layer, width in widths.items()}
    assert capture.layer_widths(model.apply, params, x) == expected
    x = x + jnp.arange(B).astype(x.dtype).reshape(B, *[1] * (x.ndim - 1))  # example b is all b
    inputs = jax.jit(capture.layer_inputs(model.apply))
    together, alone = inputs(params, x), inputs(params, x[1:2])
    for path, rows in together.items():
        each = rows.reshape(B, -1, rows.shape[1])
        np.testing.assert_allclose(each[1], alone[path], rtol=1e-10, atol=1e-12)


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(4, param_dtype=float))(x)


class TimeFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.swapaxes(x, 0, 1))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Looped(), "i/kernel cannot be read, because it runs in a loop or another"),
        (TimeFirst(), r"Dense_0/kernel have shape \[5, 3, 4\] for 3 examples"),
        (nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), r"kernel has batch_dims \(0,\)"),
        (nn.Conv(4, (3,), mask=np.ones((3, 4, 4))), "kernel has a mask"),
    ],
)
def test_what_cannot_be_read_is_named(module, words):
    x = jnp.asarray(normal(B, 5, 4))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    inputs = capture.layer_inputs(lambda params, x: module.apply({"params": params}, x))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(inputs, params, x)
