"""Losses: `loss_fn(params, batch, key) -> float[B]`, one value per example.

A batch is a dict {"x": inputs, "y": targets}. The caller takes the (masked) mean, so padding does not leak into
it: each of these losses looks at one example at a time.

B examples, K classes, T tokens in a sequence, V tokens in the vocabulary.

A label outside its range cannot raise inside a compiled step. It makes the loss of its example NaN, and that
example gives no gradient, so a caller that masks the example with `jnp.where(mask, loss, 0)` may pad with any
label.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fedjax_core import Array, Key, Params, checks
from models._common import Model

Batch: TypeAlias = Mapping[str, Any]
LossFn: TypeAlias = Callable[[Params, Batch, Key | None], Array]


def cross_entropy(model: Model, label_smoothing: float | Array = 0.0) -> LossFn:
    """Softmax cross-entropy of a classifier with logits [B, K]; batch["y"] is int[B] in 0..K-1.

    Args:
      model: the classifier.
      label_smoothing: weight e in [0, 1) of the uniform distribution in the target, (1 - e) onehot(y) + e / K
        (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567). May be traced.
    """
    checks.scalar("label_smoothing", label_smoothing, low=0, high=1, high_open=True)

    def loss_fn(params: Params, batch: Batch, key: Key | None = None) -> Array:
        x, y = split_batch(batch)
        logits = model.apply(params, x, key)
        return label_loss(logits, check_labels(y, logits, ndim=1), label_smoothing)

    return loss_fn


def sequence_cross_entropy(model: Model, pad_id: int | None = None) -> LossFn:
    """Cross-entropy of a token model with logits [B, T, V]; batch["y"] is int[B, T], the next tokens.

    An example's loss is the mean over its targets that are not `pad_id`, or 0 where it has none. Every
    example counts the same in a mean of these, however long it is.

    Args:
      model: the token model.
      pad_id: target that is left out; it may lie outside 0..V-1 (but a token in "x" may not). None keeps all.
    """

    def loss_fn(params: Params, batch: Batch, key: Key | None = None) -> Array:
        x, y = split_batch(batch)
        logits = model.apply(params, x, key)
        y = check_labels(y, logits, ndim=2)
        return token_mean(label_loss(logits, y), y, pad_id)

    return loss_fn


def squared_error(model: Model) -> LossFn:
    """Squared error, averaged over all axes but B; batch["y"] has the shape of the outputs, [B, ...]."""

    def loss_fn(params: Params, batch: Batch, key: Key | None = None) -> Array:
        x, y = split_batch(batch)
        outputs = model.apply(params, x, key)
        # Broadcasting [B] against [B, 1] would quietly compare every example with every target.
        if jnp.shape(y) != outputs.shape:
            raise ValueError(
                f"batch['y'] must have the shape of the model's outputs {outputs.shape}, got {jnp.shape(y)}; "
                "reshape the targets, for example y[:, None] for one output."
            )
        return jnp.mean(jnp.square(outputs - y).reshape(outputs.shape[0], -1), axis=1)

    return loss_fn


def reconstruction(model: Model) -> LossFn:
    """Squared error of an autoencoder's outputs and its inputs, averaged over all axes but B; batch["x"] is enough."""

    def loss_fn(params: Params, batch: Batch, key: Key | None = None) -> Array:
        x = inputs_of(batch)
        return reconstruction_error(model.apply(params, x, key), x)

    return loss_fn


def reconstruction_error(outputs: Array, x: Array) -> Array:
    """Mean squared difference of each example, [B] of [B, ...]."""
    if jnp.shape(x) != outputs.shape:
        raise ValueError(
            f"the model's outputs have shape {outputs.shape} and its inputs {jnp.shape(x)}; take a model that gives "
            "back what it is given, such as models.autoencoder."
        )
    return jnp.mean(jnp.square(outputs - x).reshape(outputs.shape[0], -1), axis=1)


def inputs_of(batch: Batch) -> Any:
    """Return batch["x"]: what predicts, or is its own target, needs no targets."""
    if isinstance(batch, Mapping) and "x" in batch:
        return batch["x"]
    return split_batch(batch)[0]


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """Return (batch["x"], batch["y"]), or raise ValueError saying what a batch is."""
    if not isinstance(batch, Mapping) or "x" not in batch or "y" not in batch:
        got = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch must be a dict with 'x' (inputs) and 'y' (targets), got {got}; rename its entries.")
    return batch["x"], batch["y"]


def check_labels(y: Array, logits: Array, ndim: int) -> Array:
    """Return `y` as at least int32, or raise ValueError unless it has one label per row of `logits`."""
    if logits.ndim != ndim + 1:
        kind = "[B, K]; for a token model use the sequence one" if ndim == 1 else "[B, T, V]; this is for token models"
        raise ValueError(f"the model's outputs must be logits {kind}, got shape {logits.shape}.")
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise ValueError(
            f"batch['y'] must hold integer labels, got dtype {jnp.result_type(y)}; convert them with "
            "y.astype('int32'), or take the argmax of one-hot rows."
        )
    if jnp.shape(y) != logits.shape[:-1]:
        raise ValueError(
            f"batch['y'] must have shape {logits.shape[:-1]} to fit logits {logits.shape}, "
            f"got {jnp.shape(y)}; pass one integer label for each."
        )
    # uint8 labels, as image files have them, cannot be compared with a class count or a padding id outside
    # 0..255.
    return jnp.asarray(y, jnp.promote_types(jnp.result_type(y), jnp.int32))


def label_loss(logits: Array, y: Array, label_smoothing: float | Array = 0.0) -> Array:
    """Cross-entropy of logits [..., K] and labels int[...]; NaN, with no gradient, outside 0..K-1."""
    inside = (y >= 0) & (y < logits.shape[-1])
    target = jnp.take_along_axis(logits, jnp.where(inside, y, 0)[..., None], axis=-1)[..., 0]
    if not isinstance(label_smoothing, float | int) or label_smoothing != 0:
        target = (1 - label_smoothing) * target + label_smoothing * jnp.mean(logits, axis=-1)
    return jnp.where(inside, jax.nn.logsumexp(logits, axis=-1) - target, jnp.nan)


def token_mean(values: Array, y: Array, pad_id: int | None) -> Array:
    """Mean of values [B, T] over the targets that are not `pad_id` -> [B]; 0 for an example with none."""
    if pad_id is None:
        return jnp.mean(values, axis=1)
    real = y != pad_id
    # Counted as integers and summed in float32 at least: bfloat16 cannot count 512 tokens, nor float16 70,000.
    wide = jnp.promote_types(values.dtype, jnp.float32)
    # where and not a product: a padded position may hold NaN.
    total = jnp.sum(jnp.where(real, values, 0).astype(wide), axis=1)
    return (total / jnp.maximum(jnp.sum(real, axis=1), 1).astype(wide)).astype(values.dtype)
