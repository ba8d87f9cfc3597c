"""The one interface every model has, and the checks of shapes the factories share."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core import Array, Key, Params, checks
from models import groups

# Layers take this as their `param_dtype`: the Python type, unlike flax's own default of jnp.float32, follows
# jax_enable_x64, so the same model is float64 in a golden-trace test and float32 in a run.
PARAM_DTYPE = float


Stage = int | str | None
"""A stage by its number or its name; None for the end."""


def no_stages(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("this model has no stages, so it runs only as a whole: use apply, or a model of this package")


def no_groups(kind: str) -> tuple[str, ...]:
    raise ValueError(
        f"this model does not know which of its parameters are {kind!r}: choose them by path with "
        "fedjax_core.partition, or ask models.groups.module_paths about a flax module"
    )


AnyModel = TypeVar("AnyModel", bound=tuple[Any, ...])
"""A `Model` or a `StatisticsModel`."""


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
      stages: names of the model's stages in order, the last of them "head"; none for a model that runs only as a whole.
      run: `run(params, x, start=None, stop=None, key=None)`: from stage `start` to before stage `stop`, names or
        numbers as in a slice. `run(params, x)` is `apply`, `run(params, x, 0, "head")` is `features`, and a model cut
        at any stage gives the same bits, with the same key on both sides: `run(params, run(params, x, 0, k), k)`. What
        stands between two stages is an array [B, ...] or, inside a transformer, `Tokens`. Only the parameters of the
        stages that run are read. ValueError for an unknown stage, or a `stop` before `start`.
      paths: `paths(kind) -> paths of parameters`, by the type of the module they belong to, for
        `fedjax_core.partition`: "attention", "bias", "convolution", "dense", "embedding", "head", "norm" or "recurrent"
        (`models.groups`). ValueError if the model has none of that kind.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Array]
    features: Callable[..., Array]
    stages: tuple[str, ...] = ()
    run: Callable[..., Any] = no_stages
    paths: Callable[[str], tuple[str, ...]] = no_groups


class Tokens(NamedTuple):
    """What stands between the stages of a transformer.

    Attributes:
      values: float[B, T, d].
      mask: bool[B, T], False where there is padding, which no token attends to; None without padding.
    """

    values: Array
    mask: Array | None = None


def num_parameters(params: Params) -> int:
    """Number of scalars in a pytree of arrays, or of the shapes `jax.eval_shape` gives."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


# Under jit the forward pass that flax runs to find the shapes is dead code, and a deep network's many small
# initializers are compiled together. Flax modules compare by their fields, so that equal models share this.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _init(module: nn.Module, shape: tuple[int, ...], dtype: type, key: Key) -> Params:
    return module.init(key, jnp.zeros(shape, dtype))["params"]


class Staged(nn.Module):
    """A flax module that is a chain of stages."""

    def stages(self) -> dict[str, Callable[[Any, bool], Any]]:
        """Name -> `stage(x, train)`, in order; the last is "head". A submodule is used in one stage only.

        Dropout draws by the path of its module and the number of calls before, hence the same wherever the chain is
        cut. Parameters are made by submodules, so that the names are known without any.
        """
        raise NotImplementedError

    def __call__(self, x: Any, train: bool = False) -> Any:
        return chain(0, None, train)(self, x)


def chain(first: int, last: int | None, *options: Any) -> Callable[[Any, Any], Any]:
    """`run(module, x)`: the stages of a module with these numbers one after another, each `stage(x, *options)`."""

    def run(module: Any, x: Any) -> Any:
        for stage in list(module.stages().values())[first:last]:
            x = stage(x, *options)
        return x

    return run


def plain(layer: Callable[[Any], Any]) -> Callable[[Any, bool], Any]:
    """A layer that does the same in training as a stage."""
    return lambda x, train: layer(x)


def build(module: Staged, shape: tuple[int, ...], dtype: type, check: Callable[[Any], None]) -> Model:
    """Wrap a `Staged` module as a `Model`.

    `shape` and `dtype` are of a batch it can be initialized on; `check` raises ValueError on an unusable `x`.
    """
    names: Any = module.apply({}, method=lambda bound: tuple(bound.stages()))

    def init(key: Key) -> Params:
        return _init(module, shape, dtype, key)

    def run(params: Params, x: Any, start: Stage = None, stop: Stage = None, key: Key | None = None) -> Any:
        first, last = span(names, start, stop)
        if first == 0:
            check(x)

        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, rngs=rngs, method=chain(first, last, key is not None))

    def apply(params: Params, x: Any, key: Key | None = None) -> Array:
        return run(params, x, key=key)

    def features(params: Params, x: Any, key: Key | None = None) -> Array:
        return run(params, x, stop="head", key=key)

    example = jax.ShapeDtypeStruct(shape, jnp.result_type(dtype))
    return Model(init, apply, features, names, run, groups.paths_of(module, example))


def span(stages: tuple[str, ...], start: Stage, stop: Stage) -> tuple[int, int]:
    """The numbers of the first stage that runs and of the first that does not any more."""
    number = {name: i for i, name in enumerate(stages)}

    def index(argument: str, stage: Stage, default: int) -> int:
        if stage is None:
            return default
        if isinstance(stage, str) and stage in number:
            return number[stage]
        if isinstance(stage, int) and not isinstance(stage, bool) and -len(stages) <= stage <= len(stages):
            return stage + len(stages) if stage < 0 else stage
        raise ValueError(
            f"{argument} must be a stage, {', '.join(stages)}, or a number up to {len(stages)}, got {stage!r}: pick one"
        )

    first, last = index("start", start, 0), index("stop", stop, len(stages))
    if first > last:
        raise ValueError(f"stop={stop!r} comes before start={start!r}: the stages run in the order {', '.join(stages)}")
    return first, last


def map_inputs(model: AnyModel, function: Callable[[Any], Any]) -> AnyModel:
    """The model of `x`, from one of `function(x)`; cut at a stage, the function belongs to the first part.

    Args:
      model: a `Model` or a `StatisticsModel`.
      function: of the inputs.
    """
    of: Any = model

    def run(params: Params, x: Any, start: Stage = None, stop: Stage = None, *rest: Any, **named: Any) -> Any:
        first, last = span(of.stages, start, stop) if of.stages else (0, 1)
        return of.run(params, function(x) if first == 0 < last else x, start, stop, *rest, **named)

    changed: AnyModel = of._replace(
        apply=lambda params, x, key=None, *rest, **named: of.apply(params, function(x), key, *rest, **named),
        features=lambda params, x, key=None, *rest, **named: of.features(params, function(x), key, *rest, **named),
        run=run,
    )
    return changed


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
