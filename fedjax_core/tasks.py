"""What is learned: a task, that is a model with its loss, its metrics and the statistics that it keeps.

Whatever takes a loss function `loss_fn(params, batch, key)` takes a `Task` in its place, for a task can be called like
one. Beyond that a task knows how to evaluate, and may have statistics: what a forward pass updates and no gradient
does, such as the running means of batch normalization. They are state, which `fedjax_core.with_statistics` carries
through the rounds of a method.

While a method is traced, the statistics of whoever is at work stand in a context of this module. A task that is called
on parameters alone finds them there, and what its forward pass makes of them is left there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.extend.core as extend
import jax.numpy as jnp

from fedjax_core import checks, masks
from fedjax_core.types import Array, Examples, Key, LossFn, Params, PyTree, Variables


def _no_groups(kind: str) -> tuple[str, ...]:
    raise ValueError(
        f"the task does not know which of its parameters are {kind!r}: choose them by path with fedjax_core.partition, "
        "or give the task paths=model.paths"
    )


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned, as pure functions; change one by `dataclasses.replace(task, metrics=...)`.

    Shapes: B examples in a batch. A model is its parameters, or `Variables` if it has statistics.

    Attributes:
      init: `init(key) -> model`.
      forward: `forward(model, examples, *, key, mask) -> (outputs, statistics)`: any outputs, and the statistics after
        this pass (`()` without any). A key means training, None evaluation. mask, bool[B], is False where the batch is
        padded: what looks at the whole batch leaves those rows out. With statistics it takes a keyword
        `frozen` too, True for training that reads the statistics as evaluation does and leaves them as they are.
      loss: `loss(outputs, examples, mask) -> float[B]`, one value per example.
      metrics: `metrics(outputs, examples, mask) -> {name: values}`: [B, ...] floats, integers or booleans, or
        `Weighted` where examples do not count the same (tokens, not windows).
      features: `features(model, examples, key=None, mask=None) -> [B, ...]`, what the head is applied to; None if the
        task has none. Like the task itself it may be called on the parameters alone.
      head: `head(params, features) -> outputs`; None if there is none.
      paths: `paths(kind) -> paths of parameters`, for `fedjax_core.partition`.
      has_statistics: whether a model is `Variables`.
    """

    init: Callable[[Key], Params]
    forward: Callable[..., tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, Examples, Array], Array]
    metrics: Callable[[PyTree, Examples, Array], PyTree]
    features: Callable[..., Array] | None = None
    head: Callable[[Params, Array], PyTree] | None = None
    paths: Callable[[str], tuple[str, ...]] = _no_groups
    has_statistics: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError for what is no function, or cannot be called with the arguments above."""
        checks.takes("init", self.init, ("key",), example="a function key -> model")
        named = ("key", "mask", "frozen") if self.has_statistics else ("key", "mask")
        example = f"a function (model, examples, *, {', '.join(named)}) -> (outputs, statistics)"
        checks.takes("forward", self.forward, ("model", "examples"), named=named, example=example)
        arguments = ("outputs", "examples", "mask")
        checks.takes("loss", self.loss, arguments, example="a function (outputs, examples, mask) -> float[B]")
        example = "a function (outputs, examples, mask) -> {name: [B, ...]}"
        checks.takes("metrics", self.metrics, arguments, example=example)
        if self.features is not None:
            example = "a function (model, examples, key=None, mask=None) -> [B, ...]"
            checks.takes("features", self.features, ("model", "examples", "key", "mask"), example=example)
        if self.head is not None:
            checks.takes("head", self.head, ("params", "features"), example="a function (params, features) -> outputs")

    def __call__(self, params: Params, examples: Examples, key: Key | None = None, mask: Array | None = None) -> Array:
        """The task as a loss function: float[B], one loss per example.

        Args:
          params: a model; of a task with statistics also its parameters alone, where `with_statistics` has them.
          examples: leaves [B, ...].
          key: randomness of training; None for evaluation.
          mask: bool[B]; every row is an example unless given.

        Raises:
          TypeError: if statistics are needed and not there.
        """
        mask = _whole(examples) if mask is None else mask
        return self.loss(self.outputs(params, examples, key, mask), examples, mask)

    def outputs(self, params: Params, examples: Examples, key: Key | None = None, mask: Array | None = None) -> PyTree:
        """What the model makes of examples; arguments as for the loss."""
        mask = _whole(examples) if mask is None else mask
        if not self.has_statistics:
            return _pair(self.forward(params, examples, key=key, mask=mask), statistics=False)[0]
        frozen = {"frozen": True} if key is not None and is_frozen() else {}
        result = self.forward(model_of(params), examples, key=key, mask=mask, **frozen)
        outputs, statistics = _pair(result, statistics=True)
        if key is not None and not frozen and not isinstance(params, Variables):
            record(statistics)
        return outputs


def _pair(result: Any, *, statistics: bool) -> tuple[PyTree, PyTree]:
    """What a forward pass returned, or TypeError unless it is (outputs, statistics)."""
    if not isinstance(result, tuple) or len(result) != 2:
        if isinstance(result, tuple):
            got = f"a tuple of {len(result)}"
        elif isinstance(result, jax.Array):
            got = f"an array {result.dtype}{list(result.shape)}"
        else:
            got = checks.described(result)
        raise TypeError(
            f"forward must return (outputs, statistics), got {got}: return (outputs, ()) where there are no statistics"
        )
    if not statistics and jax.tree.leaves(result[1]):
        raise TypeError(
            "forward returned statistics, and the task has none: give the task has_statistics=True and models "
            "Variables(params, statistics), or return (outputs, ()), with outputs that are several in one pytree"
        )
    return result


def _whole(examples: Examples) -> Array:
    return jnp.ones(checks.leading_axis(examples), bool)


class _Call(NamedTuple):
    """The outputs of a task that is made of plain functions: what they are called with."""

    params: Params
    key: Key | None


def as_task(
    loss_fn: LossFn | Task,
    metric_fn: Callable[..., PyTree] | None = None,
    init: Callable[[Key], Params] | None = None,
) -> Task:
    """The task that plain functions make; a task stays what it is.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`, with a mask if it takes one; or a task.
      metric_fn: `metric_fn(params, batch)`, see `fedjax_core.evaluate`; the loss alone unless given.
      init: `init(key) -> params`.

    Raises:
      TypeError: if an argument is no function, or a task is to have other metrics (take `dataclasses.replace`).
    """
    if isinstance(loss_fn, Task):
        if metric_fn is not None or init is not None:
            raise TypeError(
                "loss_fn is a task, which has metrics and an init of its own: change them by dataclasses.replace"
            )
        return loss_fn
    checks.function("loss_fn", loss_fn, "a function (params, batch, key) -> float[B], or a Task")
    if metric_fn is not None:
        checks.function("metric_fn", metric_fn, "a function (params, batch) -> float[B]")

    def no_init(key: Key) -> Params:
        raise ValueError("the task is made of functions without an init: give as_task one, or make the model yourself")

    def loss(outputs: _Call, examples: Examples, mask: Array) -> Array:
        return masks.call(loss_fn, outputs.params, examples, outputs.key, mask=mask, name="loss_fn")

    def metrics(outputs: _Call, examples: Examples, mask: Array) -> PyTree:
        if metric_fn is None:
            return {"loss": loss(outputs, examples, mask)}
        return masks.call(metric_fn, outputs.params, examples, mask=mask, name="metric_fn")

    return Task(init or no_init, lambda params, examples, *, key, mask: (_Call(params, key), ()), loss, metrics)


def as_metric(metric_fn: Callable[..., PyTree] | Task) -> Callable[..., PyTree]:
    """The metrics of a task as a function `(params, batch, mask)`; a function stays what it is."""
    if not isinstance(metric_fn, Task):
        return metric_fn
    task = metric_fn

    def metrics(params: Params, examples: Examples, mask: Array | None = None) -> PyTree:
        mask = _whole(examples) if mask is None else mask
        return task.metrics(task.outputs(params, examples, None, mask), examples, mask)

    return metrics


# The statistics of whoever is at work.


class _Seen:
    """What the evaluations in one trace have made of the statistics: the first counts, () without any.

    A step may evaluate several points, such as one that a perturbation has found; the first is where the client is.
    """

    def __init__(self) -> None:
        self.statistics: PyTree = ()
        self.trace = current_trace()


class _Current(NamedTuple):
    statistics: PyTree
    frozen: bool
    seen: _Seen | None


_CURRENT: ContextVar[_Current | None] = ContextVar("statistics", default=None)


def current_trace() -> Any:
    """What tells one trace from another, and from no trace."""
    return extend.get_opaque_trace_state(convention="flax")


@contextmanager
def _set(current: _Current | None) -> Iterator[None]:
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def using(statistics: PyTree, *, frozen: bool = False) -> Iterator[None]:
    """Inside, tasks that are called on parameters have these statistics. They are read and nothing is updated."""
    with _set(_Current(statistics, frozen, None)):
        yield


@contextmanager
def reading(*, frozen: bool = False) -> Iterator[None]:
    """Inside, statistics are not updated: for evaluations that are no training, such as those of an attack.

    Args:
      frozen: whether they are constants meanwhile, for batches that have no statistics of their own (one example).
    """
    current = _CURRENT.get()
    with _set(None if current is None else current._replace(seen=None, frozen=frozen or current.frozen)):
        yield


@contextmanager
def updating(statistics: PyTree) -> Iterator[_Seen]:
    """Inside, tasks have these statistics; `seen.statistics` is what the first evaluation makes of them."""
    seen = _Seen()
    with _set(_Current(statistics, False, seen)):
        yield seen


def record(statistics: PyTree) -> None:
    """Leaves what a forward pass has made of the statistics.

    Raises:
      TypeError: if the pass is inside of a transformation, out of which no number could get this way.
    """
    current = _CURRENT.get()
    if current is None or current.seen is None:
        return
    seen = current.seen
    if seen.trace != current_trace():
        raise TypeError(
            "the method evaluates the task inside of a transformation of its own (jax.vmap, jax.grad, lax.cond), where "
            "its statistics cannot be updated: freeze them, with_statistics(method, 'frozen'), or take gradients by "
            "fedjax_core.value_and_grad"
        )
    if not jax.tree.leaves(seen.statistics):
        seen.statistics = statistics


def value_and_grad(function: Callable[..., Array]) -> Callable[..., tuple[Array, Params]]:
    """`jax.value_and_grad(function)` of a function that may evaluate tasks, whose statistics get out of it."""
    plain = jax.value_and_grad(function)

    def with_statistics(*args: Any) -> tuple[Array, PyTree]:
        current = _CURRENT.get()
        assert current is not None
        with updating(current.statistics) as seen:
            value = function(*args)
        return value, seen.statistics

    gradient = jax.value_and_grad(with_statistics, has_aux=True)

    def call(params: Params, *args: Any) -> tuple[Array, Params]:
        if isinstance(params, Variables):
            raise TypeError(
                "the gradient is taken of parameters, and got Variables: pass variables.params, inside of a method "
                "that with_statistics has wrapped"
            )
        current = _CURRENT.get()
        if current is None or current.seen is None:
            return plain(params, *args)
        (value, statistics), grads = gradient(params, *args)
        if jax.tree.leaves(statistics):
            record(statistics)
        return value, grads

    return call


def model_of(params: Params) -> Variables:
    """The model with its statistics: those it has, or of parameters alone those of whoever is at work.

    Raises:
      TypeError: if there are none.
    """
    if isinstance(params, Variables):
        return params
    current = _CURRENT.get()
    if current is None:
        raise TypeError(
            "the task has statistics, and was called on parameters without them: wrap the method, "
            "fedjax_core.with_statistics(method, 'average'), and begin with its init(task.init(key)); outside of a "
            "method pass Variables(params, statistics)"
        )
    return Variables(params, current.statistics)


def is_frozen() -> bool:
    """Whether statistics are constants, which a model that trains reads as in evaluation."""
    current = _CURRENT.get()
    return current is not None and current.frozen
