"""The autoencoder, what it is trained by, and detection by its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

import models
from models import detection, losses, metrics


@pytest.mark.parametrize(
    ("model", "shape", "count", "features"),
    [
        # 160 + 4,640 down, 50,208 to the code, 51,744 back, 4,624 + 2,320 up, 17 in the head
        (models.autoencoder(), (28, 28, 1), 113_713, 16),
        (models.autoencoder((8, 12, 3), channels=(4,), latent=5), (8, 12, 3), 1_336, 4),
        (models.autoencoder((8, 8, 1), channels=(2, 3, 4), latent=2), (8, 8, 1), 419, 2),
    ],
)
def test_parameter_counts_and_shapes(model, shape, count, features):
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
    assert models.num_parameters(params) == count
    assert jax.eval_shape(model.apply, params, x).shape == (5, *shape)
    assert jax.eval_shape(model.features, params, x).shape == (5, *shape[:2], features)


def test_it_is_the_layers_that_its_page_says():
    model = models.autoencoder((4, 4, 1), channels=(2, 3), latent=2)
    params, x = model.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4, 4, 1))

    def convolved(y, name):
        y = jax.lax.conv_general_dilated(
            y, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + params[name]["bias"]

    def dense(y, name):
        return y @ params[name]["kernel"] + params[name]["bias"]

    y = x
    for name in ("down_0", "down_1"):
        y = jax.nn.relu(convolved(y, name))
        y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    code = dense(y.reshape(2, -1), "code")
    y = jax.nn.relu(dense(code, "decode")).reshape(2, 1, 1, 3)
    for name in ("up_0", "up_1"):
        y = jax.nn.relu(convolved(np.kron(y, np.ones((1, 2, 2, 1))), name))
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), dense(y, "head"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.run(params, x, stop="decode"), code, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.autoencoder((28, 28)), r"input_shape must be \(height, width, channels\), got \(28, 28\)"),
        (lambda: models.autoencoder((6, 8, 1)), r"a height and width that 4 divides, .* got \(6, 8, 1\)"),
        (lambda: models.autoencoder((2, 4, 1)), r"at least 4x4 pixels .* got \(2, 4, 1\)"),
        (lambda: models.autoencoder(channels=()), "channels must hold at least one width"),
        (lambda: models.autoencoder(latent=0), "latent must be"),
    ],
)
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


DOUBLE = models.Model(lambda key: {}, lambda params, x, key=None: 2 * x, lambda params, x, key=None: x)


def test_reconstruction_is_the_squared_error_of_the_inputs():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    expected = np.mean(np.square(x), axis=(1, 2))
    task = models.task(DOUBLE, "reconstruction")
    outputs, _ = task.forward({}, {"x": x}, key=None, mask=None)
    for batch in ({"x": x}, {"x": x, "y": jnp.zeros(2, int)}):
        np.testing.assert_allclose(losses.reconstruction(DOUBLE)({}, batch, None), expected, rtol=1e-6)
        np.testing.assert_allclose(metrics.reconstruction(DOUBLE)({}, batch)["loss"], expected, rtol=1e-6)
        np.testing.assert_allclose(task.loss(outputs, batch, jnp.ones(2, bool)), expected, rtol=1e-6)
        np.testing.assert_allclose(task.metrics(outputs, batch, jnp.ones(2, bool))["loss"], expected, rtol=1e-6)


def test_a_model_with_other_outputs_is_named():
    narrow = DOUBLE._replace(apply=lambda params, x, key=None: x[:, :1])
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 1\) and its inputs \(2, 3\)"):
        losses.reconstruction(narrow)({}, {"x": jnp.ones((2, 3))}, None)
    with pytest.raises(ValueError, match="batch must be a dict with 'x'"):
        losses.reconstruction(DOUBLE)({}, {"inputs": jnp.ones((2, 3))}, None)


def test_detection_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    anomalous = rng.uniform(size=60) < 0.3
    scores = rng.normal(size=60) + 1.5 * anomalous
    found = detection.detection(jnp.asarray(scores), jnp.asarray(anomalous), 0.9)
    expected = precision_recall_fscore_support(anomalous, scores > 0.9, average="binary")[:3]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    nothing = detection.detection(jnp.zeros(4), jnp.array([True, False, False, True]), 1.0)
    np.testing.assert_array_equal(nothing, [0, 0, 0])


def test_thresholds():
    scores = jnp.array([1.0, 2.0, 3.0, 6.0])
    deviation = np.std([1.0, 2.0, 3.0, 6.0])
    assert float(detection.threshold(scores)) == pytest.approx(3 + 3 * deviation)
    assert float(detection.threshold(scores, z=1.0)) == pytest.approx(3 + deviation)
    assert float(detection.threshold(scores, quantile=0.5)) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: detection.threshold(jnp.ones(3), z=1.0, quantile=0.5), "z=1.0 and quantile=0.5 are both given"),
        (lambda: detection.threshold(jnp.ones(0)), "scores must be float"),
        (lambda: detection.threshold(jnp.ones(3), quantile=2.0), "quantile must lie in"),
        (lambda: detection.detection(jnp.ones(3), jnp.ones(2, bool), 0.5), "one entry for each example"),
    ],
)
def test_what_detection_cannot_use_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
