"""Models without convolutions: logistic regression and the multi-layer perceptron."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn

from fedjax_core import Array
from models._common import PARAM_DTYPE, Model, Staged, build, check_inputs, check_positive, check_sizes, plain


class _Perceptron(Staged):
    hidden: tuple[int, ...]
    num_classes: int
    dropout: tuple[float, ...]

    def setup(self) -> None:
        self.dense = [nn.Dense(width, param_dtype=PARAM_DTYPE) for width in self.hidden]
        self.drop = [nn.Dropout(rate) for rate in self.dropout]
        # The convex case starts at zero, the usual start of logistic regression, so that no seed matters.
        kernel_init = nn.initializers.lecun_normal() if self.hidden else nn.initializers.zeros
        self.head = nn.Dense(self.num_classes, kernel_init=kernel_init, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool], Array]]:
        def hidden(layer: nn.Dense, drop: nn.Dropout) -> Callable[[Array, bool], Array]:
            return lambda x, train: drop(nn.relu(layer(x)), deterministic=not train)

        return {
            "flatten": lambda x, _: x.reshape(x.shape[0], -1),
            **{f"dense_{i}": hidden(*both) for i, both in enumerate(zip(self.dense, self.drop, strict=True))},
            "head": plain(self.head),
        }


def logistic_regression(input_shape: Sequence[int] = (8, 8, 1), num_classes: int = 10) -> Model:
    """Multinomial logistic regression: flatten, one dense layer, logits.

    The parameters start at zero, whatever the key. The features are the flattened input.

    Args:
      input_shape: shape of one example, any rank; `apply` takes [B, *input_shape].
      num_classes: number of logits.

    Returns:
      A `Model` with outputs [B, num_classes] and features [B, prod(input_shape)].
    """
    return mlp(input_shape, num_classes, hidden=())


def mlp(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    hidden: Sequence[int] = (200, 200),
    dropout: Sequence[float] | None = None,
) -> Model:
    """Multi-layer perceptron: flatten, dense layers with ReLU, a dense head.

    The defaults are the "2NN" of McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient
    Learning of Deep Networks from Decentralized Data", 2017 (https://arxiv.org/abs/1602.05629): 199,210
    parameters.

    Args:
      input_shape: shape of one example, any rank; `apply` takes [B, *input_shape].
      num_classes: number of logits.
      hidden: widths of the hidden layers; none makes it a logistic regression.
      dropout: rate at training after each hidden layer, in [0, 1); none unless given.

    Returns:
      A `Model` with outputs [B, num_classes] and features [B, hidden[-1]].
    """
    shape = check_sizes("input_shape", input_shape)
    hidden = check_sizes("hidden", hidden)
    rates = (0.0,) * len(hidden) if dropout is None else tuple(dropout)
    if len(rates) != len(hidden) or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"dropout must hold a rate in [0, 1) for each of the {len(hidden)} hidden layers, got {dropout!r}; 0 turns "
            "it off."
        )
    module = _Perceptron(hidden, check_positive("num_classes", num_classes), rates)
    return build(module, (1, math.prod(shape)), PARAM_DTYPE, partial(check_inputs, input_shape=shape))
