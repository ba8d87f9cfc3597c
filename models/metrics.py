"""Evaluation: `metric_fn(params, batch) -> {name: float[B]}`, one value per example.

The caller takes the (masked) mean. Batches are those of `models.losses`, and so is what a label outside its
range does to "loss"; it is never counted as right. Evaluation runs the model without a key: no dropout. B
examples.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from models._common import Array, Model, Params
from models.losses import Batch, check_labels, label_loss, split_batch, token_mean

MetricFn: TypeAlias = Callable[[Params, Batch], dict[str, Array]]


def classification(model: Model) -> MetricFn:
    """Cross-entropy and accuracy (0 or 1) of a classifier: {"loss": [B], "accuracy": [B]}."""

    def metric_fn(params: Params, batch: Batch) -> dict[str, Array]:
        x, y = split_batch(batch)
        logits = model.apply(params, x)
        y = check_labels(y, logits, ndim=1)
        return {"loss": label_loss(logits, y), "accuracy": _hits(logits, y)}

    return metric_fn


def sequence(model: Model, pad_id: int | None = None) -> MetricFn:
    """The same over the targets of each sequence that are not `pad_id`: {"loss": [B], "accuracy": [B]}.

    Both are 0 for a sequence that is all padding; a caller should mask such examples.
    """

    def metric_fn(params: Params, batch: Batch) -> dict[str, Array]:
        x, y = split_batch(batch)
        logits = model.apply(params, x)
        y = check_labels(y, logits, ndim=2)
        return {
            "loss": token_mean(label_loss(logits, y), y, pad_id),
            "accuracy": token_mean(_hits(logits, y), y, pad_id),
        }

    return metric_fn


def _hits(logits: Array, y: Array) -> Array:
    """1 where the largest logit is the label's, else 0, in the dtype of the logits."""
    return (jnp.argmax(logits, axis=-1) == y).astype(logits.dtype)
