"""Image models: the papers' sizes, input checks, and the one compilation of the ResNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import losses


def _shapes(model, x):
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct(x, jnp.float32)
    out, features = (jax.eval_shape(f, params, x).shape for f in (model.apply, model.features))
    return models.num_parameters(params), out, features


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "x", "count", "outputs", "features"),
    [
        (models.logistic_regression(), (5, 8, 8, 1), 650, 10, 64),
        (models.logistic_regression((7,), 2), (5, 7), 16, 2, 7),
        (models.mlp(), (5, 28, 28, 1), 199_210, 10, 200),
        (models.cnn(), (5, 28, 28, 1), 1_663_370, 10, 512),
        (models.cnn((9, 7, 3), 4), (5, 9, 7, 3), 121_796, 4, 512),
        (models.resnet18_gn(), (5, 32, 32, 3), 11_173_962, 10, 512),
        (models.resnet18_gn((5, 7, 1), 3, width=4), (5, 5, 7, 1), 44_319, 3, 32),
    ],
    ids=["logistic", "flat", "2NN", "cnn", "cnn-odd", "resnet18", "resnet-odd"],
)
def test_parameter_counts_and_shapes(model, x, count, outputs, features):
    assert _shapes(model, x) == (count, (5, outputs), (5, features))


def test_logistic_regression_starts_at_zero_and_keeps_the_input():
    model = models.logistic_regression((2, 2, 1), 3)
    params, x = model.init(jax.random.key(0)), jnp.arange(8.0).reshape(2, 2, 2, 1)
    assert all(not leaf.any() for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(model.features(params, x), x.reshape(2, 4))


def test_cnn_is_the_papers_network():
    """Against the layers in the paper's order: convolution, ReLU, pooling."""
    model = models.cnn((8, 8, 1), 3, channels=(2, 3), hidden=5)
    params, x = model.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    y = x
    for name in ("conv_0", "conv_1"):
        y = jax.lax.conv_general_dilated(
            y, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.nn.relu(y + params[name]["bias"])
        y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    y = jax.nn.relu(y.reshape(2, -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    y = y @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), y, rtol=1e-4, atol=1e-5)


def test_resnet_trains_under_vmap():
    """One compilation: two clients' steps in a scan, on labels that are easy to see."""
    model = models.resnet18_gn((8, 8, 1), 2, width=4)
    loss_fn = losses.cross_entropy(model)
    y = jnp.arange(6) % 2
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1)) + 2.0 * y[:, None, None, None]

    def train(params):
        def step(params, _):
            loss, gradient = jax.value_and_grad(lambda p: loss_fn(p, {"x": x, "y": y}, None).mean())(params)
            return jax.tree.map(lambda p, g: p - 0.005 * g, params, gradient), loss

        return jax.lax.scan(step, params, length=8)

    rng = np.random.default_rng(1)

    def start(path, leaf):
        """Draws like those of init, from numpy: compiling the initializers takes longer than the training."""
        if len(leaf.shape) > 1:
            deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            return jnp.asarray(rng.normal(scale=deviation, size=(2, *leaf.shape)), jnp.float32)
        return jnp.full((2, *leaf.shape), float(path[-1].key == "scale"), jnp.float32)

    clients = jax.tree_util.tree_map_with_path(start, jax.eval_shape(model.init, jax.random.key(0)))
    trained, curve = jax.jit(jax.vmap(train))(clients)
    assert curve.shape == (2, 8)
    assert (curve[:, -1] < 0.5 * curve[:, 0]).all()
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained)} == {2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.logistic_regression(num_classes=0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: models.mlp(num_classes=2.5), "num_classes must be an integer of at least 1, got 2.5"),
        (lambda: models.mlp((8, 8, 1), 10, hidden=(10, 0)), r"hidden\[1\] must be .* got 0"),
        (lambda: models.mlp((8, 8, 1), 10, hidden=10), r"hidden must be a sequence .* write \(10,\)"),
        (lambda: models.mlp((8, 0), 10), r"input_shape\[1\] must be"),
        (lambda: models.cnn((28, 28)), r"input_shape must be \(height, width, channels\), got \(28, 28\)"),
        (lambda: models.cnn((3, 28, 1)), r"at least 4x4 pixels .* got \(3, 28, 1\)"),
        (lambda: models.cnn(hidden=0), "hidden must be"),
        (lambda: models.cnn(convolution="fast"), "convolution must be 'auto', 'dots', 'native'"),
        (lambda: models.resnet18_gn(num_groups=3), "num_groups must divide width=64, got 3"),
        (lambda: models.resnet18_gn(width=True), "width must be an integer of at least 1, got True"),
    ],
)
def test_factory_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((5, 8, 8), r"x must have shape \[B, 8, 8, 1\], got \(5, 8, 8\); add the channel axis"),
        ((8, 8, 1), "add the batch axis"),
        ((5, 1, 8, 8), "reshape x, or build the model"),
        ((), "reshape x"),
    ],
)
@pytest.mark.parametrize("factory", [models.logistic_regression, models.mlp, models.cnn, models.resnet18_gn])
def test_inputs_are_checked_when_traced(factory, x, message):
    model = factory((8, 8, 1), 3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    for f in (model.apply, model.features):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(f, params, jax.ShapeDtypeStruct(x, jnp.float32))
