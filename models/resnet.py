"""ResNet-18 with group normalization, for small images."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from fedjax_core import Array
from models._common import PARAM_DTYPE, Model, Staged, build, check_image_shape, check_inputs, check_positive, plain
from models.convolution import Backend
from models.convolution import convolution as select_convolution

# Stage s has two blocks of width * 2**s channels and starts with this stride.
_STAGE_STRIDES = (1, 2, 2, 2)


class _Block(nn.Module):
    """[B, H, W, C] -> [B, H / stride, W / stride, width]: two 3x3 convolutions and a shortcut."""

    width: int
    stride: int
    project: bool
    num_groups: int
    convolution: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(_conv, convolution=self.convolution)
        norm = partial(nn.GroupNorm, self.num_groups, param_dtype=PARAM_DTYPE)
        y = nn.relu(norm(name="norm_1")(conv(self.width, 3, self.stride, name="conv_1")(x)))
        y = norm(name="norm_2")(conv(self.width, 3, 1, name="conv_2")(y))
        if self.project:
            x = norm(name="shortcut_norm")(conv(self.width, 1, self.stride, name="shortcut")(x))
        return nn.relu(x + y)


def _conv(width: int, size: int, stride: int, convolution: Callable[..., Array], name: str | None = None) -> nn.Conv:
    # Padded by size // 2 on each side, as in the reference code, and not SAME, which for stride 2 pads
    # unevenly. No bias: the normalization that follows would undo it.
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=convolution,
        param_dtype=PARAM_DTYPE,
        name=name,
    )


class _ResNet(Staged):
    width: int
    num_groups: int
    num_classes: int
    convolution: Callable[..., Array]

    def setup(self) -> None:
        self.stem = _conv(self.width, 3, 1, self.convolution)
        self.stem_norm = nn.GroupNorm(self.num_groups, param_dtype=PARAM_DTYPE)
        blocks = []
        for stage, stage_stride in enumerate(_STAGE_STRIDES):
            for stride in (stage_stride, 1):
                width = self.width * 2**stage
                blocks.append(_Block(width, stride, stride != 1, self.num_groups, self.convolution))
        self.block = blocks
        self.head = nn.Dense(self.num_classes, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool], Array]]:
        return {
            "stem": lambda x, _: nn.relu(self.stem_norm(self.stem(x))),
            **{f"block_{i}": plain(block) for i, block in enumerate(self.block)},
            "pool": lambda x, _: jnp.mean(x, axis=(1, 2)),
            "head": plain(self.head),
        }


def resnet18_gn(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    *,
    width: int = 64,
    num_groups: int = 2,
    convolution: Backend | Callable[..., Array] = "auto",
) -> Model:
    """ResNet-18 with group normalization: 11,173,962 parameters for 3 channels and 10 classes.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016
    (https://arxiv.org/abs/1512.03385), with the stem used for CIFAR (one 3x3 convolution of stride 1, no
    pooling) and projection shortcuts. Batch statistics fail on clients with few classes: Hsieh, Phanishayee,
    Mutlu and Gibbons, "The Non-IID Data Quagmire of Decentralized Machine Learning", 2020
    (https://arxiv.org/abs/1910.00189). Group normalization: Wu and He, 2018
    (https://arxiv.org/abs/1803.08494). It has no running statistics, so the model stays a pure function.

    Args:
      input_shape: (H, W, C) of one image; `apply` takes [B, H, W, C]. Any size works, 8x8 and up makes sense.
      num_classes: number of logits.
      width: channels of the first stage; the others have 2, 4 and 8 times as many.
      num_groups: groups of each normalization; must divide `width`.
      convolution: see `models.convolution.convolution`.

    Returns:
      A `Model` with outputs [B, num_classes] and features [B, 8 * width].
    """
    shape = check_image_shape(input_shape, smallest=1)
    width, num_groups = check_positive("width", width), check_positive("num_groups", num_groups)
    if width % num_groups:
        raise ValueError(f"num_groups must divide width={width}, got {num_groups}; choose one of its divisors.")
    module = _ResNet(width, num_groups, check_positive("num_classes", num_classes), select_convolution(convolution))
    return build(module, (1, *shape), PARAM_DTYPE, partial(check_inputs, input_shape=shape))
