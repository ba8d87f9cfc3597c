"""The one interface every model has, and the checks of shapes the factories share."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core import Array, Key, Params, checks

# Layers take this as their `param_dtype`: the Python type, unlike flax's own default of jnp.float32, follows
# jax_enable_x64, so the same model is float64 in a golden-trace test and float32 in a run.
PARAM_DTYPE = float


class Model(NamedTuple):
    """A pure model: parameters in, outputs out; knows nothing about clients.

    Shapes: B examples in a batch, d features, T tokens in a sequence.

    Attributes:
      init: `init(key) -> params`, a plain nested dict of arrays. The last layer is always the top-level entry
        "head", a dense layer {"kernel": [d, outputs], "bias": [outputs]}; everything else is the body.
      apply: `apply(params, x, key=None) -> outputs [B, ...]`. A key means training (dropout draws from it);
        None means evaluation, which is deterministic.
      features: `features(params, x, key=None) -> representation [B, d]` ([B, T, d] for sequence models), what
        the head is applied to.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Array]
    features: Callable[..., Array]


def num_parameters(params: Params) -> int:
    """Number of scalars in a pytree of arrays, or of the shapes `jax.eval_shape` gives."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


# Under jit the forward pass that flax runs to find the shapes is dead code, and a deep network's many small
# initializers are compiled together. Flax modules compare by their fields, so that equal models share this.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _init(module: nn.Module, shape: tuple[int, ...], dtype: type, key: Key) -> Params:
    return module.init(key, jnp.zeros(shape, dtype))["params"]


def build(module: nn.Module, shape: tuple[int, ...], dtype: type, check: Callable[[Any], None]) -> Model:
    """Wrap a flax module as a `Model`.

    The module has a method `features(x, train)`, a submodule `head`, and `__call__(x, train)` that composes
    them. `shape` and `dtype` are of a batch it can be initialized on; `check` raises ValueError on an
    unusable `x`.
    """

    def init(key: Key) -> Params:
        return _init(module, shape, dtype, key)

    def run(method: str | None, params: Params, x: Array, key: Key | None) -> Array:
        check(x)
        rngs = None if key is None else {"dropout": key}
        outputs: Any = module.apply({"params": params}, x, key is not None, rngs=rngs, method=method)
        return outputs

    def apply(params: Params, x: Array, key: Key | None = None) -> Array:
        return run(None, params, x, key)

    def features(params: Params, x: Array, key: Key | None = None) -> Array:
        return run("features", params, x, key)

    return Model(init, apply, features)


def check_positive(name: str, value: object) -> int:
    """Returns `value` as an int, or raises ValueError unless it is an integer of at least 1."""
    return checks.positive_int(name, value, "pass a positive size")


def check_sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return `values` as a tuple of positive ints, or raise ValueError naming the first bad entry."""
    if isinstance(values, int):
        raise ValueError(f"{name} must be a sequence of sizes, got {values!r}; write ({values},).")
    return tuple(check_positive(f"{name}[{i}]", value) for i, value in enumerate(values))


def check_image_shape(input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Return `input_shape` as (H, W, C), or raise ValueError unless H and W are at least `smallest`."""
    shape = check_sizes("input_shape", input_shape)
    if len(shape) != 3:
        raise ValueError(
            f"input_shape must be (height, width, channels), got {shape}; a gray image has 1 channel, "
            "so 28x28 pixels are (28, 28, 1)."
        )
    if min(shape[:2]) < smallest:
        raise ValueError(
            f"input_shape must be at least {smallest}x{smallest} pixels for this model, got {shape}; "
            "enlarge the images or use logistic_regression or mlp."
        )
    return shape[0], shape[1], shape[2]


def check_inputs(x: Array, input_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` is [B, *input_shape]."""
    shape = jnp.shape(x)
    if len(shape) >= 1 and shape[1:] == input_shape:
        return
    expected = ", ".join(["B", *map(str, input_shape)])
    if shape == input_shape:
        fix = "add the batch axis with x[None]"
    elif (*shape[1:], 1) == input_shape:
        fix = "add the channel axis with x[..., None]"
    else:
        fix = "reshape x, or build the model with the input_shape of your data"
    raise ValueError(f"x must have shape [{expected}], got {shape}; {fix}.")


def check_tokens(x: Array, max_len: int | None = None) -> None:
    """Raise ValueError unless `x` is int[B, T] with T at least 1 and at most `max_len`."""
    shape, dtype = jnp.shape(x), jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"x must hold integer tokens, got dtype {dtype}; convert it with x.astype('int32').")
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"x must have shape [B, T] with T >= 1, got {shape}; pass a batch of token sequences.")
    if max_len is not None and shape[1] > max_len:
        raise ValueError(
            f"x must have at most max_len={max_len} tokens a sequence, got {shape[1]}; "
            "shorten the sequences or build the model with a larger max_len."
        )


def embed(table: nn.Embed, tokens: Array) -> Array:
    """Look up int[B, T] tokens in an [V, d] table -> [B, T, d]; a token outside 0..V-1 gives NaN.

    Without this jnp.take would read a negative token, such as a padding of -1, as the last row of the table.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    return table(jnp.where(tokens < 0, table.num_embeddings, tokens))
