"""Losses and metrics: one value per example, padding, bad labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import Model, losses, metrics

K = 4


def _identity_model():
    """A model whose outputs are its inputs times a scalar, so that tests choose the logits."""

    def apply(params, x, key=None):
        return params * x if key is None else params * x + jax.random.normal(key, x.shape)

    return Model(lambda key: jnp.ones(()), apply, apply)


MODEL, ONE = _identity_model(), jnp.ones(())
LOGITS = jax.random.normal(jax.random.key(0), (3, K))
LABELS = jnp.array([0, 3, 1])
TOKEN_LOGITS = jax.random.normal(jax.random.key(1), (3, 5, K))
TOKEN_LABELS = jnp.array([[1, 2, 3, 0, 1], [2, 1, 9, 9, 9], [9, 9, 9, 9, 9]])  # 9 pads


def _log_prob(logits):
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.quick
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_optax_per_example(smoothing):
    loss = losses.cross_entropy(MODEL, smoothing)(ONE, {"x": LOGITS, "y": LABELS}, None)
    target = optax.smooth_labels(jax.nn.one_hot(LABELS, K), smoothing)
    assert loss.shape == (3,)
    np.testing.assert_allclose(loss, optax.softmax_cross_entropy(LOGITS, target), rtol=1e-5)


def test_label_smoothing_may_be_traced():
    def loss(e):
        return losses.cross_entropy(MODEL, e)(ONE, {"x": LOGITS, "y": LABELS}, None)

    grid = jax.vmap(loss)(jnp.array([0.0, 0.1]))
    np.testing.assert_allclose(grid, jnp.stack([loss(0.0), loss(0.1)]), rtol=1e-5)


def test_losses_pass_the_key_and_metrics_do_not():
    data = {"x": LOGITS, "y": LABELS}
    loss_fn = losses.cross_entropy(MODEL)
    a, b = loss_fn(ONE, data, jax.random.key(0)), loss_fn(ONE, data, jax.random.key(1))
    assert (a != b).all()
    np.testing.assert_allclose(metrics.classification(MODEL)(ONE, data)["loss"], loss_fn(ONE, data))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, K, 100])
def test_a_label_outside_its_range_gives_nan_and_no_gradient(label, smoothing):
    loss_fn = losses.cross_entropy(MODEL, smoothing)
    data = {"x": LOGITS, "y": LABELS.at[1].set(label)}
    loss = jax.jit(loss_fn)(ONE, data, None)
    np.testing.assert_array_equal(jnp.isnan(loss), [False, True, False])

    # A masked example may hold any label: the gradient is that of the others.
    def masked(params, data, mask):
        return jnp.where(mask, loss_fn(params, data, None), 0).sum()

    got = jax.grad(masked)(ONE, data, jnp.array([True, False, True]))
    kept = {"x": LOGITS[::2], "y": LABELS[::2]}
    np.testing.assert_allclose(got, jax.grad(masked)(ONE, kept, jnp.ones(2, bool)), rtol=1e-5)
    report = metrics.classification(MODEL)(ONE, data)
    assert jnp.isnan(report["loss"][1])
    assert report["accuracy"][1] == 0


def test_sequence_loss_is_the_mean_over_real_targets():
    loss = losses.sequence_cross_entropy(MODEL, pad_id=9)(ONE, {"x": TOKEN_LOGITS, "y": TOKEN_LABELS}, None)
    log_prob = _log_prob(TOKEN_LOGITS)
    want = [
        -np.mean([log_prob[0, t, y] for t, y in enumerate([1, 2, 3, 0, 1])]),
        -np.mean([log_prob[1, t, y] for t, y in enumerate([2, 1])]),
        0.0,
    ]
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8])
def test_padding_gives_no_gradient_and_no_nan(dtype):
    loss_fn = losses.sequence_cross_entropy(MODEL, pad_id=-1)
    y = jnp.where(TOKEN_LABELS == 9, -1, TOKEN_LABELS).astype(dtype)
    gradient = jax.grad(lambda x: loss_fn(ONE, {"x": x, "y": y}, None).sum())(TOKEN_LOGITS)
    assert not gradient[1, 2:].any()
    assert not gradient[2].any()
    assert gradient[0].any()
    assert jnp.isfinite(gradient).all()


def test_without_pad_id_every_target_counts():
    y = jnp.zeros((3, 5), int)
    loss = losses.sequence_cross_entropy(MODEL)(ONE, {"x": TOKEN_LOGITS, "y": y}, None)
    np.testing.assert_allclose(loss, -_log_prob(TOKEN_LOGITS)[:, :, 0].mean(1), rtol=1e-5)
    bad = losses.sequence_cross_entropy(MODEL)(ONE, {"x": TOKEN_LOGITS, "y": TOKEN_LABELS}, None)
    np.testing.assert_array_equal(jnp.isnan(bad), [False, True, True])


def test_classification_metrics():
    y = jnp.argmax(LOGITS, axis=1).at[0].add(1) % K
    report = metrics.classification(MODEL)(ONE, {"x": LOGITS, "y": y})
    np.testing.assert_array_equal(report["accuracy"], [0, 1, 1])
    np.testing.assert_allclose(report["loss"], -_log_prob(LOGITS)[np.arange(3), y], rtol=1e-5)


def test_sequence_metrics():
    best = jnp.argmax(TOKEN_LOGITS, axis=-1)
    y = jnp.where(TOKEN_LABELS == 9, 9, best).at[0, 0].set((best[0, 0] + 1) % K)
    data = {"x": TOKEN_LOGITS, "y": y}
    report = metrics.sequence(MODEL, pad_id=9)(ONE, data)
    np.testing.assert_allclose(report["accuracy"].value[:2], [0.8, 1], rtol=1e-6)
    np.testing.assert_array_equal(report["accuracy"].weight, [5, 2, 0])  # a sequence of padding counts for nothing
    np.testing.assert_array_equal(report["loss"].weight, [5, 2, 0])
    np.testing.assert_allclose(report["loss"].value, losses.sequence_cross_entropy(MODEL, 9)(ONE, data), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)])
def test_squared_error_is_the_mean_over_the_output(shape):
    x, y = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape), jnp.ones(shape)
    loss = losses.squared_error(MODEL)(ONE, {"x": x, "y": y}, None)
    np.testing.assert_allclose(loss, ((np.asarray(x) - 1) ** 2).reshape(3, -1).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "data", "message"),
    [
        (losses.cross_entropy, {"x": LOGITS}, r"batch must be a dict with 'x' .* got keys \['x'\]"),
        (losses.cross_entropy, (LOGITS, LABELS), "batch must be a dict .* got tuple"),
        (losses.cross_entropy, {"x": LOGITS, "y": LABELS * 1.0}, "integer labels, got dtype float"),
        (losses.cross_entropy, {"x": LOGITS, "y": LABELS[:, None]}, r"shape \(3,\) to fit logits"),
        (losses.cross_entropy, {"x": TOKEN_LOGITS, "y": LABELS}, r"logits \[B, K\]"),
        (losses.sequence_cross_entropy, {"x": LOGITS, "y": LABELS}, r"logits \[B, T, V\]"),
        (losses.squared_error, {"x": LOGITS[:, :1], "y": LABELS * 1.0}, r"outputs \(3, 1\), got \(3,\)"),
    ],
)
def test_batches_are_checked_when_traced(factory, data, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(factory(MODEL), ONE, data, None)
    if factory is not losses.squared_error:
        metric = metrics.classification if factory is losses.cross_entropy else metrics.sequence
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(metric(MODEL), ONE, data)


def test_label_smoothing_is_checked():
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1: "):
        losses.cross_entropy(MODEL, 1.0)
