"""The convolutional network of the FedAvg paper."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn

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


class _CNN(Staged):
    channels: tuple[int, ...]
    hidden: int
    num_classes: int
    convolution: Callable[..., Array]

    def setup(self) -> None:
        self.conv = [
            nn.Conv(width, (5, 5), conv_general_dilated=self.convolution, param_dtype=PARAM_DTYPE)
            for width in self.channels
        ]
        self.dense = nn.Dense(self.hidden, param_dtype=PARAM_DTYPE)
        self.head = nn.Dense(self.num_classes, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool], Array]]:
        def pooled(layer: nn.Conv) -> Callable[[Array, bool], Array]:
            # ReLU is monotone, so pooling first gives the same numbers from a quarter of the work.
            return lambda x, _: nn.relu(max_pool_2x2(layer(x)))

        return {
            **{f"conv_{i}": pooled(layer) for i, layer in enumerate(self.conv)},
            "dense": lambda x, _: nn.relu(self.dense(x.reshape(x.shape[0], -1))),
            "head": plain(self.head),
        }


def cnn(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 512,
    convolution: Backend | Callable[..., Array] = "auto",
) -> Model:
    """Two 5x5 convolutions (32 and 64 channels, each with 2x2 max pooling), a dense layer of 512, a head.

    McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", 2017 (https://arxiv.org/abs/1602.05629): 1,663,370 parameters for 28x28 gray
    images and 10 classes, as in the paper.

    Args:
      input_shape: (H, W, C) of one image, H and W at least 4; `apply` takes [B, H, W, C].
      num_classes: number of logits.
      channels: output channels of the convolutions; each halves the image.
      hidden: width of the dense layer.
      convolution: see `models.convolution.convolution`.

    Returns:
      A `Model` with outputs [B, num_classes] and features [B, hidden].
    """
    widths = check_sizes("channels", channels)
    shape = check_image_shape(input_shape, smallest=2 ** len(widths))
    module = _CNN(
        widths,
        check_positive("hidden", hidden),
        check_positive("num_classes", num_classes),
        select_convolution(convolution),
    )
    return build(module, (1, *shape), PARAM_DTYPE, partial(check_inputs, input_shape=shape))
