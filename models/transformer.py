"""A small transformer: a decoder that predicts the next token, or an encoder that classifies a text."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from fedjax_core import Array, checks
from models._common import PARAM_DTYPE, Model, Staged, Tokens, build, check_positive, check_tokens, embed, plain
from models.attention import attention, mean_of_tokens

# Weights start at this standard deviation; those that write to the residual stream at this over sqrt(2
# layers).
_STDDEV = 0.02


def _dense(width: int, stddev: float = _STDDEV) -> nn.Dense:
    return nn.Dense(width, kernel_init=nn.initializers.normal(stddev), param_dtype=PARAM_DTYPE)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, param_dtype=PARAM_DTYPE)


class _Block(nn.Module):
    """[B, T, dim] -> [B, T, dim]: self-attention and a perceptron, each normalized first and added.

    Position t attends to the positions s with seen[..., t, s], or to all.
    """

    parameter_groups: ClassVar = {"attention": ("query", "key", "value", "out")}

    dim: int
    num_heads: int
    mlp_dim: int
    dropout: float
    residual_stddev: float

    def setup(self) -> None:
        self.attention_norm = _norm()
        self.query, self.key, self.value = (_dense(self.dim) for _ in range(3))
        self.out = _dense(self.dim, self.residual_stddev)
        self.mlp_norm = _norm()
        self.up = _dense(self.mlp_dim)
        self.down = _dense(self.dim, self.residual_stddev)
        self.drop = nn.Dropout(self.dropout)

    def attention(self, x: Array, seen: Array | None) -> Array:
        return self.out(attention(self.query(x), self.key(x), self.value(x), self.num_heads, seen))

    def __call__(self, x: Array, seen: Array | None, train: bool) -> Array:
        x = x + self.drop(self.attention(self.attention_norm(x), seen), deterministic=not train)
        return x + self.drop(self.down(nn.gelu(self.up(self.mlp_norm(x)))), deterministic=not train)


class _Transformer(Staged):
    vocab_size: int
    max_len: int
    num_layers: int
    dim: int
    num_heads: int
    mlp_dim: int
    dropout: float
    num_classes: int | None
    pad_token: int | None

    def setup(self) -> None:
        table = partial(nn.Embed, embedding_init=nn.initializers.normal(_STDDEV), param_dtype=PARAM_DTYPE)
        self.embed = table(self.vocab_size, self.dim)
        self.position = table(self.max_len, self.dim)
        residual_stddev = _STDDEV / (2 * self.num_layers) ** 0.5
        self.block = [
            _Block(self.dim, self.num_heads, self.mlp_dim, self.dropout, residual_stddev)
            for _ in range(self.num_layers)
        ]
        self.norm = _norm()
        self.drop = nn.Dropout(self.dropout)
        self.head = _dense(self.vocab_size if self.num_classes is None else self.num_classes)

    def stages(self) -> dict[str, Callable[[Any, bool], Any]]:
        return {
            "embed": self.embed_tokens,
            **{f"block_{i}": partial(self.through, block) for i, block in enumerate(self.block)},
            "norm": lambda x, _: x._replace(values=self.norm(x.values)),
            "pool": lambda x, _: x.values if self.num_classes is None else mean_of_tokens(*x),
            "head": plain(self.head),
        }

    def embed_tokens(self, x: Array, train: bool) -> Tokens:
        y = embed(self.embed, x) + self.position(jnp.arange(x.shape[1]))
        mask = None if self.pad_token is None else x != self.pad_token
        return Tokens(self.drop(y, deterministic=not train), mask)

    def through(self, block: _Block, x: Tokens, train: bool) -> Tokens:
        T = x.values.shape[1]
        seen = None if x.mask is None else x.mask[:, None, None, :]
        if self.num_classes is None:
            seen = jnp.tril(jnp.ones((T, T), bool))
        return x._replace(values=block(x.values, seen, train))


def transformer(
    vocab_size: int,
    max_len: int,
    num_layers: int,
    dim: int,
    num_heads: int,
    mlp_ratio: int = 4,
    dropout: float = 0.0,
    num_classes: int | None = None,
    pad_token: int | None = None,
) -> Model:
    """Token plus learned position embeddings, pre-norm blocks, a final norm, a dense head: a causal decoder, or, given
    classes, an encoder of whole texts.

    Vaswani et al., "Attention Is All You Need", 2017 (https://arxiv.org/abs/1706.03762), in the pre-norm form
    of Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, with its
    initialization and its tanh GELU. The head has its own weights and a bias. Dropout acts on the embeddings
    and on what each sublayer adds, not on attention weights.

    Every weight is one matrix at a plain path ("block_0/query/kernel" [dim, dim], "block_0/up/kernel" [dim,
    mlp_ratio dim]), which is what adapters and partitions by path want. A decoder needs no mask for sequences padded on
    the right: a position never sees a later one.

    With `num_classes` every position sees all others, the head is applied to the mean over positions, and positions
    that hold `pad_token` are neither seen nor part of the mean, so that a text's logits do not depend on how far it
    was padded.

    Args:
      vocab_size: number V of tokens; inputs are in 0..V-1, and a token outside gives NaN.
      max_len: longest sequence.
      num_layers: number of blocks.
      dim: width of the residual stream.
      num_heads: attention heads; must divide `dim`.
      mlp_ratio: width of a block's perceptron over `dim`.
      dropout: rate at training, in [0, 1).
      num_classes: number K of classes of a text, or None to predict the next token.
      pad_token: the token that fills up a text to be classified, in 0..V-1; None if there is none.

    Returns:
      A `Model` from int[B, T] tokens, T <= max_len, to logits [B, T, V] and features [B, T, dim]; with `num_classes` to
      logits [B, K] and features [B, dim].
    """
    dim, num_heads = check_positive("dim", dim), check_positive("num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}; choose num_heads among its divisors.")
    checks.scalar("dropout", dropout, low=0, high=1, high_open=True)
    max_len = check_positive("max_len", max_len)
    if num_classes is None and pad_token is not None:
        raise ValueError(
            f"pad_token={pad_token} is for texts to be classified: give num_classes too, or leave it out and tell the "
            "loss what padding is (sequence_cross_entropy's pad_id)."
        )
    module = _Transformer(
        check_positive("vocab_size", vocab_size),
        max_len,
        check_positive("num_layers", num_layers),
        dim,
        num_heads,
        check_positive("mlp_ratio", mlp_ratio) * dim,
        dropout,
        None if num_classes is None else check_positive("num_classes", num_classes),
        pad_token,
    )
    return build(module, (1, 1), int, partial(check_tokens, max_len=max_len))
