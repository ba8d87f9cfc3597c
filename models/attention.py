"""Self-attention and pooling over the tokens of a sequence, of whichever transformer."""

import flax.linen as nn
import jax.numpy as jnp

from fedjax_core import Array


def attention(queries: Array, keys: Array, values: Array, num_heads: int, seen: Array | None = None) -> Array:
    """Softmax attention: each token's mean of the values, weighted by how well its query fits the keys.

    Args:
      queries: float[B, T, d]; the heads stand side by side along d.
      keys: float[B, T, d].
      values: float[B, T, d].
      num_heads: H; must divide d.
      seen: bool, broadcast to [B, H, T, T]: token t attends to the tokens s with seen[..., t, s]; None for all.

    Returns:
      float[B, T, d].
    """
    B, T, d = queries.shape
    # Heads before tokens: moved once, where the products would each move them (benchmarks/designs.py).
    q, k, v = (x.reshape(B, T, num_heads, -1).transpose(0, 2, 1, 3) for x in (queries, keys, values))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    if seen is not None:
        # A finite minimum and not -inf: exp gives 0 either way, and no inf - inf can arise in a derivative.
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhts,bhsd->bhtd", nn.softmax(scores), v).transpose(0, 2, 1, 3).reshape(B, T, d)


def mean_of_tokens(values: Array, mask: Array | None = None) -> Array:
    """Mean of float[B, T, d] over the tokens with mask bool[B, T] -> [B, d]; 0 for a sequence without any."""
    if mask is None:
        return jnp.mean(values, axis=1)
    total = jnp.sum(jnp.where(mask[..., None], values, 0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(values.dtype)
