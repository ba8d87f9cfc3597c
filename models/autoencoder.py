"""A convolutional autoencoder."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from fedjax_core import Array
from models._common import (
    PARAM_DTYPE,
    Model,
    Staged,
    build,
    check_image_shape,
    check_inputs,
    check_positive,
    check_sizes,
    plain,
)
from models.convolution import Backend, max_pool_2x2
from models.convolution import convolution as select_convolution


class _Autoencoder(Staged):
    shape: tuple[int, int, int]
    channels: tuple[int, ...]
    latent: int
    convolution: Callable[..., Array]

    def setup(self) -> None:
        def layer(width: int) -> nn.Conv:
            return nn.Conv(width, (3, 3), conv_general_dilated=self.convolution, param_dtype=PARAM_DTYPE)

        height, width, _ = self.shape
        self.small = (height >> len(self.channels), width >> len(self.channels), self.channels[-1])
        self.down = [layer(channels) for channels in self.channels]
        self.code = nn.Dense(self.latent, param_dtype=PARAM_DTYPE)
        self.decode = nn.Dense(self.small[0] * self.small[1] * self.small[2], param_dtype=PARAM_DTYPE)
        # As many as there are on the way down: each is twice as large as the one before.
        self.up = [layer(channels) for channels in (*self.channels[-2::-1], self.channels[0])]
        self.head = nn.Dense(self.shape[-1], param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool], Array]]:
        def pooled(layer: nn.Conv) -> Callable[[Array, bool], Array]:
            return lambda x, _: nn.relu(max_pool_2x2(layer(x)))

        def doubled(layer: nn.Conv) -> Callable[[Array, bool], Array]:
            return lambda x, _: nn.relu(layer(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)))

        return {
            **{f"down_{i}": pooled(layer) for i, layer in enumerate(self.down)},
            "code": lambda x, _: self.code(x.reshape(x.shape[0], -1)),
            "decode": lambda x, _: nn.relu(self.decode(x)).reshape(x.shape[0], *self.small),
            **{f"up_{i}": doubled(layer) for i, layer in enumerate(self.up)},
            "head": plain(self.head),
        }


def autoencoder(
    input_shape: Sequence[int] = (28, 28, 1),
    *,
    channels: Sequence[int] = (16, 32),
    latent: int = 32,
    convolution: Backend | Callable[..., Array] = "auto",
) -> Model:
    """A convolutional autoencoder: images through a narrow code, and back.

    Down: for each of the channels a 3x3 convolution, 2x2 max pooling, ReLU; then a dense layer to the code. Up: a dense
    layer with ReLU; for each of the channels, the last first, pixels doubled, a 3x3 convolution to the channels before
    (the first again at the end), ReLU; then the head, a dense layer of the channels of every pixel. Its outputs are any
    numbers: scale images as they are to come out.

    Train it by `losses.reconstruction`, or `task(model, "reconstruction")`. With the defaults it has 113,713
    parameters, and `run(params, x, stop="decode")` is the code of an image.

    Args:
      input_shape: (H, W, C) of one image, H and W multiples of 2 to the number of the channels; `apply` takes
        [B, H, W, C].
      channels: output channels of the convolutions on the way down; each halves the image.
      latent: width of the code.
      convolution: see `models.convolution.convolution`.

    Returns:
      A `Model` with outputs [B, H, W, C] and features [B, H, W, channels[0]].
    """
    widths = check_sizes("channels", channels)
    if not widths:
        raise ValueError("channels must hold at least one width, got none; pass for example (16, 32).")
    shape = check_image_shape(input_shape, smallest=2 ** len(widths))
    if any(size % 2 ** len(widths) for size in shape[:2]):
        raise ValueError(
            f"input_shape must have a height and width that {2 ** len(widths)} divides, for {len(widths)} channels "
            f"halve them as often, got {shape}; pad the images or take fewer channels."
        )
    module = _Autoencoder(shape, widths, check_positive("latent", latent), select_convolution(convolution))
    return build(module, (1, *shape), PARAM_DTYPE, partial(check_inputs, input_shape=shape))
