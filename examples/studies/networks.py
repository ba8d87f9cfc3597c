"""Networks of the published settings that the library does not have by name; each is named in a configuration file."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp


class SigmoidRegression(nn.Module):
    """What FedML and FLUTE call logistic regression: their ten outputs go through a sigmoid before the softmax.

    Scores then lie in (0, 1), so that the softmax is nearly flat and gradients are small: accuracy rises slowly.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """Images [B, H, W, C] to scores [B, K]."""
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.sigmoid(nn.Dense(self.num_classes, kernel_init=uniform)(x.reshape(len(x), -1)))


class SmallCNN(nn.Module):
    """NIID-Bench's simple-cnn: 5x5 convolutions of 6 and 16 channels with pooling, layers of 120 and 84."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """Images [B, H, W, C] to scores [B, K]."""
        for channels in (6, 16):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class DropoutCNN(nn.Module):
    """pfl-research's simple_cnn: 3x3 convolutions of 32 and 64 channels, pooling, a layer of 128, and dropout."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [B, H, W, C] to scores [B, K]."""
        glorot = nn.initializers.glorot_uniform()
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID", kernel_init=glorot)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.25, deterministic=not train)(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(128, kernel_init=glorot)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=glorot)(x)


class ImageNetResNet18(nn.Module):
    """The ResNet-18 of torchvision with group normalization of two groups: a 7x7 stem of stride 2, and pooling.

    11,181,642 parameters for ten classes. On images of 32x32 the first stage sees 8x8 pixels, a sixteenth of what it
    sees in `models.resnet18_gn`, whose stem is the one for small images.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """Images [B, H, W, C] to scores [B, K]."""
        normed = partial(nn.GroupNorm, 2)

        def conv(width, size, stride):
            start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
            pad = size // 2
            return nn.Conv(width, (size, size), stride, padding=pad, use_bias=False, kernel_init=start)

        x = nn.relu(normed()(conv(64, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(4):
            width = 64 * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                y = nn.relu(normed()(conv(width, 3, stride)(x)))
                y = normed()(conv(width, 3, 1)(y))
                if stride == 2:
                    x = normed()(conv(width, 1, 2)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def sigmoid_regression(num_classes):
    """The model of `mnist_logistic.toml`."""
    return SigmoidRegression(num_classes)


def small_cnn(num_classes):
    """The model of `niid_*.toml`."""
    return SmallCNN(num_classes)


def dropout_cnn(num_classes):
    """The model of `pfl_cifar10_*.toml`."""
    return DropoutCNN(num_classes)


def imagenet_resnet18_gn(num_classes):
    """The model of `flsimulator_cifar10.toml`."""
    return ImageNetResNet18(num_classes)
