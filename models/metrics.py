"""Evaluation: `metric_fn(params, batch) -> {name: float[B]}`, one value per example, or {name: `fedjax_core.Weighted`}.

The caller takes the (masked) mean, weighted where there are weights. Batches are those of `models.losses`, and so is
what a label outside its range does to "loss"; it is never counted as right. Evaluation runs the model without a key: no
dropout. B examples.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from fedjax_core import Array, Params, Weighted
from models import losses
from models._common import Model
from models.losses import Batch, check_labels, label_loss, split_batch, token_mean

MetricFn: TypeAlias = Callable[[Params, Batch], dict[str, Any]]


def classification(model: Model) -> MetricFn:
    """Cross-entropy and accuracy (0 or 1) of a classifier: {"loss": [B], "accuracy": [B]}."""

    def metric_fn(params: Params, batch: Batch) -> dict[str, Array]:
        x, y = split_batch(batch)
        logits = model.apply(params, x)
        y = check_labels(y, logits, ndim=1)
        return {"loss": label_loss(logits, y), "accuracy": _hits(logits, y)}

    return metric_fn


def sequence(model: Model, pad_id: int | None = None) -> MetricFn:
    """The same per token: the means over the targets of each sequence that are not `pad_id`, which are its weight.

    {"loss": `Weighted`, "accuracy": `Weighted`}. So every token counts the same, not every sequence, and exp(loss) of
    all of them is the perplexity. A sequence that is all padding has weight 0: there is nothing to be right about.
    Where all sequences are full this is the mean over sequences, as in `losses.sequence_cross_entropy`.
    """

    def metric_fn(params: Params, batch: Batch) -> dict[str, Weighted]:
        x, y = split_batch(batch)
        logits = model.apply(params, x)
        y = check_labels(y, logits, ndim=2)
        tokens = jnp.full(y.shape[:1], y.shape[1]) if pad_id is None else jnp.sum(y != pad_id, axis=1)
        weight = tokens.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return {
            "loss": Weighted(token_mean(label_loss(logits, y), y, pad_id), weight),
            "accuracy": Weighted(token_mean(_hits(logits, y), y, pad_id), weight),
        }

    return metric_fn


def reconstruction(model: Model) -> MetricFn:
    """Squared error of what an autoencoder makes of its inputs: {"loss": [B]}; batch["x"] is enough."""
    loss_fn = losses.reconstruction(model)
    return lambda params, batch: {"loss": loss_fn(params, batch, None)}


def _hits(logits: Array, y: Array) -> Array:
    """1 where the largest logit is the label's, else 0, in the dtype of the logits."""
    return (jnp.argmax(logits, axis=-1) == y).astype(logits.dtype)
