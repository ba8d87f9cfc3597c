"""A model of a user's own as a `models.Model`: a flax module, a Haiku transform, a pair of functions.

`--model my_models:net` names a function (or a flax module class) that is given those of these arguments that it has,
by name: `input_shape`, `num_classes`, `vocabulary_size`, `dataset`. What it returns is one of

* a `models.Model`, or a `models.StatisticsModel`;
* a flax linen module, called as `module(x)`, or `module(x, train=...)`, `module(x, training=...)`,
  `module(x, deterministic=...)`;
* what `haiku.transform` or `haiku.without_apply_rng` returns;
* anything with `init(key) -> params` and `apply(params, x)` or `apply(params, x, key)`, or the two as a pair.

Outputs are logits [B, K], or [B, T, K] for sequences; inputs are the data set's, images as normalized floats.
"""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_core.types import Key, Params
from models import Model, StatisticsModel, groups
from pipelines.common import own
from pipelines.data.dataset import Dataset, normalized

_TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False}


def build(name: str, dataset: Dataset) -> Model | StatisticsModel:
    """The model that `name`, of the form `module:name`, stands for.

    Raises:
      ValueError: if there is none of that name, it needs arguments that it cannot be given, fails, returns something
        else, keeps state besides its parameters, or its outputs are no logits of the data set's classes.
    """
    found = own.find("model", name)
    if not callable(found) or isinstance(found, nn.Module) or _has_functions(found):
        made = found
    else:
        known = {
            "input_shape": dataset.input_shape,
            "num_classes": dataset.num_classes,
            "vocabulary_size": dataset.vocabulary_size,
            "dataset": dataset,
        }
        arguments = own.arguments("model", name, known)
        with own.explain_errors("model", name):
            made = found(**arguments)
    with own.explain_errors("model", name):
        model = _as_model(name, made, _example(dataset))
        _check(name, model, dataset)
    return model


def _as_model(name: str, made: Any, example: Any) -> Model | StatisticsModel:
    if isinstance(made, Model | StatisticsModel):
        return made
    if isinstance(made, nn.Module):
        return _of_flax(name, made, example)
    if isinstance(made, tuple) and not _has_functions(made) and len(made) == 2 and all(map(callable, made)):
        init, apply = made
    elif _has_functions(made):
        init, apply = made.init, made.apply
    else:
        raise ValueError(
            f"model {name!r} gives {type(made).__name__}: return a models.Model, a flax linen module, or something "
            "with init(key) -> params and apply(params, x) (docs/frameworks.md has one for nnx, Equinox and Haiku)"
        )
    if type(made).__name__ == "TransformedWithState" or type(made).__name__ == "MultiTransformedWithState":
        raise ValueError(_stateful(name, "the state of hk.transform_with_state"))
    if type(made).__module__.startswith("haiku."):
        return _model(name, lambda key: init(key, example), *_haiku(apply))
    return _model(name, init, apply)


def _of_flax(name: str, module: nn.Module, example: Any) -> Model:
    flag = next((key for key in _TRAINING if key in inspect.signature(type(module).__call__).parameters), None)

    def variables(key: jax.Array) -> Any:
        named: dict[str, Any] = {} if flag is None else {flag: not _TRAINING[flag]}
        return module.init({"params": key, "dropout": key}, example, **named)

    others = sorted(set(jax.eval_shape(variables, jax.random.key(0))) - {"params"})
    if others:
        raise ValueError(_stateful(name, f"the collections {', '.join(others)}"))

    def run(params: Params, x: Any, key: Key, method: Any = None) -> Any:
        named: dict[str, Any] = {} if flag is None else {flag: (key is not None) == _TRAINING[flag]}
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, rngs=rngs, method=method, **named)

    features = getattr(type(module), "features", None)
    return Model(
        lambda key: variables(key)["params"],
        lambda params, x, key=None: run(params, x, key),
        _no_features(name) if features is None else lambda params, x, key=None: run(params, x, key, "features"),
        paths=groups.paths_of(module, example, **({} if flag is None else {flag: not _TRAINING[flag]})),
    )


def _haiku(apply: Callable[..., Any]) -> tuple[Callable[..., Any]]:
    """The apply of a transform in the order of the others; a key is handed on where it takes one."""
    if list(inspect.signature(apply).parameters)[1:2] == ["rng"]:
        # One rng in training and in evaluation: a transform has no other sign of which it is.
        return (lambda params, x, key=None: apply(params, key, x),)
    return (lambda params, x, key=None: apply(params, x),)


def _model(name: str, init: Callable[..., Any], apply: Callable[..., Any]) -> Model:
    parameters = list(inspect.signature(apply).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return Model(init, apply, _no_features(name))
    return Model(init, lambda params, x, key=None: apply(params, x), _no_features(name))


def _no_features(name: str) -> Callable[..., Any]:
    def features(params: Params, x: Any, key: Key | None = None) -> Any:
        raise ValueError(
            f"model {name!r} has no function features(params, x, key), which this method needs: return a models.Model "
            "that has one"
        )

    return features


def _has_functions(made: Any) -> bool:
    return (
        callable(getattr(made, "init", None)) and callable(getattr(made, "apply", None)) and not isinstance(made, type)
    )


def _example(dataset: Dataset) -> Any:
    """One input as the model sees it, [1, ...]."""
    x = dataset.train["x"]
    dtype = jnp.result_type(float) if dataset.normalization or jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32
    return jnp.zeros((1, *dataset.input_shape), dtype)


def _check(name: str, model: Model | StatisticsModel, dataset: Dataset) -> None:
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((3, *dataset.input_shape), dataset.train["x"].dtype)
    outputs = jax.eval_shape(normalized(model, dataset.normalization).apply, params, x)
    if isinstance(model, StatisticsModel):
        outputs = outputs[0]
    expected = (3, *dataset.train["y"].shape[1:], dataset.num_classes)
    shape = getattr(outputs, "shape", None)
    if shape != expected:
        got = type(outputs).__name__ if shape is None else f"shape {list(shape)}"
        raise ValueError(
            f"model {name!r} gives outputs of {got} for inputs {list(x.shape)} and {dataset.num_classes} classes: make "
            f"them logits {list(expected)}"
        )


def _stateful(name: str, what: str) -> str:
    return (
        f"model {name!r} keeps {what} besides its parameters, which a function of parameters and inputs cannot update: "
        "use group or layer normalization (docs/frameworks.md), take --model cnn_bn, or return a "
        "models.StatisticsModel, whose batch normalization is told which rows of a batch are padding"
    )
