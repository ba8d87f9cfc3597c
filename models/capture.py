"""What goes through a model: the outputs of its stages, and the inputs of its layers.

The inputs of a flax model's layers come as matrices with one row for every use of a layer's weight.

A layer computes `rows @ kernel.reshape(width, -1)` and no more of the data meets its weight. The rows of a dense layer
are its inputs, one per example and position, those of a convolution the patches under its kernel, one per example and
pixel of the output, in the order of the kernel's first axes.

Seen are Dense, DenseGeneral (the projections of flax's attention among them) and Conv of flax.linen, wherever they
stand in a model. Not seen are embeddings, transposed and local convolutions, and weights that a module multiplies by
itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import tracers

from fedjax_core import Array, Key, Params
from models._common import Model, span
from models.batch_norm import StatisticsModel, with_frozen_statistics


def stage_outputs(
    model: Model | StatisticsModel, params: Params, x: Any, stages: Sequence[str] | None = None, key: Key | None = None
) -> dict[str, Any]:
    """What comes out of the stages of a model, in one pass.

    Args:
      model: one with stages.
      params: its parameters; `Variables` of one with running statistics, by which it runs.
      x: a batch [B, ...].
      stages: the names of those to capture; all unless given.
      key: means training, as in `Model.apply`.

    Returns:
      Name -> output: an array [B, ...], or `models.Tokens` inside a transformer. "head" gives what `apply` gives.

    Raises:
      ValueError: for a stage that the model does not have.
    """
    model = with_frozen_statistics(model)
    wanted = model.stages if stages is None else tuple(stages)
    ends = sorted(span(model.stages, stage, None)[0] for stage in wanted)
    outputs: dict[str, Any] = {}
    start = 0
    for end in ends:
        x = model.run(params, x, start, end + 1, key)
        outputs[model.stages[end]] = x
        start = end + 1
    return outputs


def layer_inputs(apply: Callable[..., Any]) -> Callable[[Params, Any], dict[str, Array]]:
    """What goes into the layers, as a function of parameters and inputs like the model itself.

    Args:
      apply: `apply(params, x)`, which calls flax modules: the `apply` of a `Model`, or any other function. Leaves of x
        are [B, ...].

    Returns:
      `inputs(params, x) -> {path: float[samples, width]}`. A path leads to the layer's weight in the parameters, like
      "dense_0/kernel". There are as many samples for each of the B examples, those of the first example first; a layer
      that is used twice has the samples of both uses. It raises ValueError for a layer in a transformation of flax
      (`nn.scan`, `nn.RNN`, `nn.remat`), one without the examples on the first axis, with batch dimensions, or a mask.
    """

    def inputs(params: Params, x: Array) -> dict[str, Array]:
        seen: list[tuple[Any, Array]] = []
        outside = tracers.current_trace()

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any):
            if isinstance(context.module, nn.Dense | nn.DenseGeneral | nn.Conv) and context.method_name == "__call__":
                if tracers.current_trace() != outside:  # what is seen in there has no value out here
                    path = "/".join((*context.module.path, "kernel"))
                    raise ValueError(
                        f"the inputs of {path} cannot be read, because it runs in a loop or another transformation of "
                        "flax; write that out."
                    )
                seen.append((context.module, args[0]))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            apply(params, x)

        size = jax.tree.leaves(x)[0].shape[0]
        uses: dict[str, list[Array]] = {}
        for layer, value in seen:
            path = "/".join((*layer.path, "kernel"))
            if value.shape[0] != size:
                raise ValueError(
                    f"the inputs of {path} have shape {list(value.shape)} for {size} examples; give it inputs with the "
                    "examples on the first axis."
                )
            rows = _patches(path, layer, value) if isinstance(layer, nn.Conv) else _vectors(path, layer, value)
            uses.setdefault(path, []).append(rows.reshape(size, -1, rows.shape[-1]))
        return {path: jnp.concatenate(rows, 1).reshape(-1, rows[0].shape[-1]) for path, rows in uses.items()}

    return inputs


def layer_widths(apply: Callable[..., Any], params: Params, x: Array) -> dict[str, int]:
    """Path of every layer's weight to the width of its inputs, for parameters and inputs or their shapes."""
    return {path: rows.shape[1] for path, rows in jax.eval_shape(layer_inputs(apply), params, x).items()}


def _vectors(path: str, layer, x: Array) -> Array:
    """The inputs of a dense layer, [..., width], the contracted axes last and, as in flax's kernels, in order."""
    if getattr(layer, "batch_dims", ()):
        raise ValueError(f"{path} has batch_dims {layer.batch_dims}, a weight of its own for each; leave them out.")
    axis = getattr(layer, "axis", -1)
    axes = sorted(a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis))
    moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: -len(axes)], -1)


def _patches(path: str, layer, x: Array) -> Array:
    """The patches under a convolution's kernel, [B, pixels and groups, width], from the same convolution itself.

    A kernel that is an identity copies each patch to the channels of its pixel, whatever the strides, padding and
    dilation. With groups of channels each group's patch is a row: all groups' weights have the same protection.
    """
    if layer.mask is not None:
        raise ValueError(f"{path} has a mask, which is no part of the parameters; leave it out.")
    kernel_size = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
    channels, groups = x.shape[-1] // layer.feature_group_count, layer.feature_group_count
    width = math.prod(kernel_size) * channels
    identity = jnp.eye(width, dtype=x.dtype).reshape(*kernel_size, channels, width)
    kernel = jnp.tile(identity, (1,) * (len(kernel_size) + 1) + (groups,))
    copy = layer.clone(
        parent=None, features=groups * width, use_bias=False, dtype=None, precision=jax.lax.Precision.HIGHEST
    )
    return copy.apply({"params": {"kernel": kernel}}, x).reshape(x.shape[0], -1, width)
