"""The block of a bidirectional transformer, in the forms that the pretrained families have."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core import Array
from models._common import PARAM_DTYPE, Tokens
from models.attention import attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Block(nn.Module):
    """[B, T, dim] -> [B, T, dim]: self-attention and a perceptron, each added to its input.

    Normalized before (`pre_norm`) or after the sum, with a factor for every channel of what is added (`layer_scale`),
    and a perceptron with a gate (`gated`), half of whose inner width is the gate.
    """

    dim: int
    num_heads: int
    mlp_dim: int
    epsilon: float
    activation: str
    pre_norm: bool
    dropout: float = 0.0
    qkv_bias: bool = True
    layer_scale: bool = False
    gated: bool = False
    parameter_groups: ClassVar = {"attention": ("query", "key", "value", "out")}

    def setup(self) -> None:
        dense = partial(nn.Dense, param_dtype=PARAM_DTYPE)
        self.query, self.key, self.value = (dense(self.dim, use_bias=self.qkv_bias) for _ in range(3))
        self.out = dense(self.dim)
        self.attention_norm, self.mlp_norm = norm(self.epsilon), norm(self.epsilon)
        self.up = dense(self.mlp_dim * 2 if self.gated else self.mlp_dim)
        self.down = dense(self.dim)
        self.drop = nn.Dropout(self.dropout)
        if self.layer_scale:
            self.attention_scale = self.param("attention_scale", nn.initializers.ones, (self.dim,), PARAM_DTYPE)
            self.mlp_scale = self.param("mlp_scale", nn.initializers.ones, (self.dim,), PARAM_DTYPE)

    def attend(self, x: Array, seen: Array | None) -> Array:
        y = self.out(attention(self.query(x), self.key(x), self.value(x), self.num_heads, seen))
        return y * self.attention_scale if self.layer_scale else y

    def perceptron(self, x: Array) -> Array:
        hidden = self.up(x)
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            hidden = jax.nn.silu(gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        y = self.down(hidden)
        return y * self.mlp_scale if self.layer_scale else y

    def __call__(self, x: Tokens, train: bool) -> Tokens:
        drop = partial(self.drop, deterministic=not train)
        y, seen = x.values, None if x.mask is None else x.mask[:, None, None, :]
        if self.pre_norm:
            y = y + drop(self.attend(self.attention_norm(y), seen))
            y = y + drop(self.perceptron(self.mlp_norm(y)))
        else:
            y = self.attention_norm(y + drop(self.attend(y, seen)))
            y = self.mlp_norm(y + drop(self.perceptron(y)))
        return x._replace(values=y)


def norm(epsilon: float) -> nn.LayerNorm:
    """Layer normalization whose variance is not a difference of two large numbers, as the checkpoints were trained."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, param_dtype=PARAM_DTYPE)


def settings(config: Mapping[str, Any], needed: tuple[str, ...], only: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The needed entries of a config.json, or ValueError if one is missing, or another has a value unknown here."""
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(
            f"config has no entry {missing[0]!r}, which a model of type {config.get('model_type')!r} needs"
        )
    for name, known in only.items():
        if name in config and config[name] not in known:
            raise ValueError(
                f"config has {name}={config[name]!r}, which this library does not compute: it knows "
                f"{', '.join(map(repr, known))}"
            )
    return {name: config[name] for name in needed}
