"""Models with batch normalization, whose running statistics are state; see `fedjax_core.with_statistics`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core import Array, Key, Params, Variables, checks
from models import groups
from models._common import (
    PARAM_DTYPE,
    Model,
    Stage,
    chain,
    check_image_shape,
    check_inputs,
    check_positive,
    check_sizes,
    no_groups,
    no_stages,
    span,
)
from models.convolution import Backend, max_pool_2x2
from models.convolution import convolution as select_convolution


class StatisticsModel(NamedTuple):
    """A pure model with running statistics; knows nothing about clients. B examples in a batch, d features.

    Attributes:
      init: `init(key) -> Variables(params, statistics)`. The last layer is the top-level entry "head" of params.
      apply: `apply(variables, x, key=None, mask=None, frozen=False) -> (outputs [B, ...], statistics)`. A key means
        training: each batch is normalized by its own statistics, and the running ones move towards them. None means
        evaluation, by the running ones, and so does frozen=True as far as they are concerned. mask, bool[B], is False
        in rows that are padding, which no statistic counts.
      features: the same with the representation [B, d] that the head is applied to in place of outputs.
      head: `head(params, features) -> outputs`.
      paths: `paths(kind)`, as of a `Model`; "norm" are the scales and biases of the normalizations.
      stages: names of the model's stages in order, the last of them "head"; none for a model that runs only as a whole.
      run: `run(variables, x, start=None, stop=None, key=None, mask=None, frozen=False) -> (outputs, statistics)`, from
        stage `start` to before stage `stop` as of a `Model`. The statistics are all of the model's, of which those of
        the stages that run have moved.
    """

    init: Callable[[Key], Variables]
    apply: Callable[..., tuple[Array, Any]]
    features: Callable[..., tuple[Array, Any]]
    head: Callable[[Params, Array], Array]
    paths: Callable[[str], tuple[str, ...]] = no_groups
    stages: tuple[str, ...] = ()
    run: Callable[..., tuple[Any, Any]] = no_stages


def with_frozen_statistics(model: Model | StatisticsModel) -> Model:
    """The model as a plain one, of `Variables` whose statistics are used and stay as they are.

    Args:
      model: one without statistics is returned as it is.
    """
    if not isinstance(model, StatisticsModel):
        return model
    of: StatisticsModel = model

    def apply(variables: Variables, x: Any, key: Key | None = None) -> Array:
        return of.apply(variables, x, key, None, True)[0]

    def features(variables: Variables, x: Any, key: Key | None = None) -> Array:
        return of.features(variables, x, key, None, True)[0]

    def run(variables: Variables, x: Any, start: Stage = None, stop: Stage = None, key: Key | None = None) -> Any:
        return of.run(variables, x, start, stop, key, None, True)[0]

    def paths(kind: str) -> tuple[str, ...]:
        return tuple(f"params/{path}" for path in of.paths(kind))

    return Model(of.init, apply, features, of.stages, run, paths)


def batch_norm(x: Array, norm: nn.BatchNorm, running: bool, mask: Array | None) -> Array:
    """[B, ..., C], normalized by a flax layer that counts real rows only.

    Args:
      x: [B, ..., C].
      norm: the layer.
      running: whether by the running statistics.
      mask: bool[B]; where no row is real, as in a step that is thrown away, all are taken, for the mean of none is NaN.
    """
    rows = None
    if mask is not None:
        rows = (mask | ~jnp.any(mask)).reshape(-1, *[1] * (x.ndim - 1))
    y: Array = norm(x, use_running_average=running, mask=rows)
    return y


class _CNN(nn.Module):
    channels: tuple[int, ...]
    hidden: int
    num_classes: int
    momentum: float
    convolution: Callable[..., Array]

    def setup(self) -> None:
        # Without a bias: the normalization that follows would undo it.
        self.conv = [
            nn.Conv(width, (5, 5), use_bias=False, conv_general_dilated=self.convolution, param_dtype=PARAM_DTYPE)
            for width in self.channels
        ]
        norm = partial(nn.BatchNorm, momentum=self.momentum, epsilon=1e-5, param_dtype=PARAM_DTYPE)
        self.norm = [norm() for _ in self.channels]
        self.dense = nn.Dense(self.hidden, use_bias=False, param_dtype=PARAM_DTYPE)
        self.dense_norm = norm()
        self.head = nn.Dense(self.num_classes, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Array, bool, Array | None], Array]]:
        """Name -> `stage(x, running, mask)`, in order; the last is "head"."""

        def pooled(layer: nn.Conv, norm: nn.BatchNorm) -> Callable[[Array, bool, Array | None], Array]:
            return lambda x, running, mask: max_pool_2x2(nn.relu(batch_norm(layer(x), norm, running, mask)))

        def dense(x: Array, running: bool, mask: Array | None) -> Array:
            return nn.relu(batch_norm(self.dense(x.reshape(x.shape[0], -1)), self.dense_norm, running, mask))

        return {
            **{f"conv_{i}": pooled(*layers) for i, layers in enumerate(zip(self.conv, self.norm, strict=True))},
            "dense": dense,
            "head": lambda x, running, mask: self.head(x),
        }

    def __call__(self, x: Array, running: bool = True, mask: Array | None = None) -> Array:
        outputs: Array = chain(0, None, running, mask)(self, x)
        return outputs


def cnn_bn(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 512,
    momentum: float = 0.9,
    convolution: Backend | Callable[..., Array] = "auto",
) -> StatisticsModel:
    """The network of `cnn` with batch normalization after each convolution and the dense layer, in place of biases.

    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015 (https://arxiv.org/abs/1502.03167). Its running statistics are state: wrap a method by
    `fedjax_core.with_statistics`.

    Args:
      input_shape: (H, W, C) of one image, H and W at least 4; `apply` takes [B, H, W, C].
      num_classes: number of logits.
      channels: output channels of the convolutions; each halves the image.
      hidden: width of the dense layer.
      momentum: weight of the running statistics in what a batch makes of them, in [0, 1). With the few steps of a
        client 0.9 suits better than the 0.99 of long runs.
      convolution: see `models.convolution.convolution`.

    Returns:
      A `StatisticsModel` with outputs [B, num_classes] and features [B, hidden].
    """
    widths = check_sizes("channels", channels)
    shape = check_image_shape(input_shape, smallest=2 ** len(widths))
    checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    module = _CNN(
        widths,
        check_positive("hidden", hidden),
        check_positive("num_classes", num_classes),
        momentum,
        select_convolution(convolution),
    )
    return _build(module, (1, *shape), partial(check_inputs, input_shape=shape))


@partial(jax.jit, static_argnums=(0, 1))
def _init(module: nn.Module, shape: tuple[int, ...], key: Key) -> Any:
    return module.init(key, jnp.zeros(shape, PARAM_DTYPE))


def _build(module: _CNN, shape: tuple[int, ...], check: Callable[[Any], None]) -> StatisticsModel:
    def init(key: Key) -> Variables:
        variables = _init(module, shape, key)
        # flax begins with float32, and a step makes float64 of them where the model is.
        statistics = jax.tree.map(lambda leaf: leaf.astype(PARAM_DTYPE), variables["batch_stats"])
        return Variables(variables["params"], statistics)

    names: Any = module.apply({}, method=lambda bound: tuple(bound.stages()))

    def run(
        variables: Variables,
        x: Array,
        start: Stage = None,
        stop: Stage = None,
        key: Key | None = None,
        mask: Array | None = None,
        frozen: bool = False,
    ) -> tuple[Array, Any]:
        first, last = span(names, start, stop)
        if first == 0:
            check(x)
        running = key is None or frozen
        stages = chain(first, last, running, mask)
        given = {"params": variables.params, "batch_stats": variables.statistics}
        if running:
            evaluated: Any = module.apply(given, x, method=stages)
            return evaluated, variables.statistics
        outputs, updated = module.apply(given, x, method=stages, mutable=["batch_stats"])
        return outputs, updated["batch_stats"]

    def apply(
        variables: Variables, x: Array, key: Key | None = None, mask: Array | None = None, frozen: bool = False
    ) -> tuple[Array, Any]:
        return run(variables, x, key=key, mask=mask, frozen=frozen)

    def features(
        variables: Variables, x: Array, key: Key | None = None, mask: Array | None = None, frozen: bool = False
    ) -> tuple[Array, Any]:
        return run(variables, x, stop="head", key=key, mask=mask, frozen=frozen)

    def head(params: Params, z: Array) -> Array:
        return z @ params["head"]["kernel"] + params["head"]["bias"]

    example = jax.ShapeDtypeStruct(shape, jnp.result_type(PARAM_DTYPE))
    return StatisticsModel(init, apply, features, head, groups.paths_of(module, example), names, run)
