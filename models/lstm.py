"""The character model of the FedAvg and LEAF papers."""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core import Array
from models._common import PARAM_DTYPE, Model, Staged, build, check_positive, check_tokens, embed, plain


class _LSTM(nn.Module):
    """[B, T, d] -> [B, T, hidden]; gates in the order input, forget, cell, output along the last axis."""

    hidden: int
    parameter_groups: ClassVar = {"recurrent": ("kernel", "recurrent", "bias")}

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d, h = x.shape[-1], self.hidden
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (d, 4 * h), PARAM_DTYPE)
        recurrent = self.param("recurrent", nn.initializers.orthogonal(), (h, 4 * h), PARAM_DTYPE)
        bias = self.param("bias", _forget_bias, (4 * h,), PARAM_DTYPE)

        # What does not depend on the state is one product for all T steps; only h @ recurrent stays in the
        # loop.
        inputs = jnp.swapaxes(x @ kernel + bias, 0, 1)
        return jnp.swapaxes(_recur(inputs, recurrent), 0, 1)


@jax.custom_vjp
def _recur(inputs: Array, recurrent: Array) -> Array:
    """[T, B, 4 hidden] -> outputs [T, B, hidden] of cells that start from zero.

    Its derivative is written by hand: what autodiff makes of the loop adds to the gradient of `recurrent` at every
    token, a product of depth B, while one product of depth T B behind the loop gives the same at the speed of large
    matrices. With it a local step takes three quarters of the time on a CPU. The price is forward mode: `jax.jvp` of
    the model is refused by JAX (of its gradient it is not).
    """
    return _recur_forward(inputs, recurrent)[0]


def _recur_forward(inputs: Array, recurrent: Array) -> tuple[Array, tuple]:
    def step(carry: tuple[Array, Array], z: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        before, y = carry
        i, f, g, o = jnp.split(z + y @ recurrent, 4, axis=-1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        c = f * before + i * g
        shown = jnp.tanh(c)
        y = o * shown
        return (c, y), (y, before, i, f, g, o, shown)

    zeros = jnp.zeros((*inputs.shape[1:-1], recurrent.shape[0]), inputs.dtype)
    _, (outputs, *kept) = jax.lax.scan(step, (zeros, zeros), inputs)
    return outputs, (outputs, kept, recurrent)


def _recur_backward(residuals: tuple, d_outputs: Array) -> tuple[Array, Array]:
    outputs, kept, recurrent = residuals
    # Transposed once and kept so: the compiler would put it back into the loop and transpose at every token.
    transposed = jax.lax.optimization_barrier(recurrent.T)

    def step(carry: tuple[Array, Array], row: tuple[Array, list[Array]]) -> tuple[tuple[Array, Array], Array]:
        d_c, d_y = carry
        d_output, (before, i, f, g, o, shown) = row
        d_y = d_y + d_output
        d_c = d_c + d_y * o * (1 - shown * shown)
        d_z = jnp.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * before * f * (1 - f),
                d_c * i * (1 - g * g),
                d_y * shown * o * (1 - o),
            ],
            axis=-1,
        )
        return (d_c * f, d_z @ transposed), d_z

    zeros = jnp.zeros_like(outputs[0])
    _, d_inputs = jax.lax.scan(step, (zeros, zeros), (d_outputs, kept), reverse=True)
    previous = jnp.concatenate([zeros[None], outputs[:-1]])
    # One matrix product; the same contraction over two axes is slower on a CPU.
    return d_inputs, previous.reshape(-1, previous.shape[-1]).T @ d_inputs.reshape(-1, d_inputs.shape[-1])


_recur.defvjp(_recur_forward, _recur_backward)


def _forget_bias(key: Array, shape: tuple[int, ...], dtype: type) -> Array:
    """Zeros, except 1 for the forget gate, so that a fresh cell remembers."""
    i, f, g, o = jnp.split(jnp.zeros(shape, dtype), 4)
    return jnp.concatenate([i, f + 1, g, o])


class _CharLSTM(Staged):
    vocab_size: int
    embed_dim: int
    hidden: int
    num_layers: int

    def setup(self) -> None:
        self.embed = nn.Embed(self.vocab_size, self.embed_dim, param_dtype=PARAM_DTYPE)
        self.lstm = [_LSTM(self.hidden) for _ in range(self.num_layers)]
        self.head = nn.Dense(self.vocab_size, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool], Array]]:
        return {
            "embed": lambda x, _: embed(self.embed, x),
            **{f"lstm_{i}": plain(layer) for i, layer in enumerate(self.lstm)},
            "head": plain(self.head),
        }


def char_lstm(vocab_size: int, embed_dim: int = 8, hidden: int = 256, num_layers: int = 2) -> Model:
    """Stacked character LSTM: embedding of 8, two layers of 256, a dense head at each token.

    McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", 2017 (https://arxiv.org/abs/1602.05629), also the Shakespeare model of Caldas et
    al., "LEAF: A Benchmark for Federated Settings", 2018 (https://arxiv.org/abs/1812.01097). It has
    796,672 + 265 vocab_size parameters: 817,872 for LEAF's 80 characters, and 820,522 for the 90 of Reddi et
    al., 2021 (https://arxiv.org/abs/2003.00295). The FedAvg paper says 866,578 without giving its vocabulary;
    no vocabulary gives that number with one bias per gate.

    LEAF predicts only the character after the sequence: that is `apply(params, x)[:, -1]`.

    Args:
      vocab_size: number V of tokens; inputs are in 0..V-1, and a token outside gives NaN.
      embed_dim: width of the embedding.
      hidden: width of each LSTM layer.
      num_layers: number of LSTM layers.

    Returns:
      A `Model` from int[B, T] tokens to logits [B, T, V] and features [B, T, hidden]. Position t sees 0..t.
    """
    module = _CharLSTM(
        check_positive("vocab_size", vocab_size),
        check_positive("embed_dim", embed_dim),
        check_positive("hidden", hidden),
        check_positive("num_layers", num_layers),
    )
    return build(module, (1, 1), int, check_tokens)
