"""Masked mean losses, their gradients, and client optimizers."""

import inspect
import weakref
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from jax.experimental import checkify

from fedjax_core import checks, dependence, masks, sums, tasks
from fedjax_core.batching import Batch
from fedjax_core.clients import ClientProgram, current_client, current_population_size
from fedjax_core.lengths import stand_in
from fedjax_core.types import Array, Counter, Key, LossFn, Need, Params, PyTree, Scalar

ClientOptimizer: TypeAlias = Annotated[
    optax.GradientTransformation
    | Callable[[Counter], optax.GradientTransformation]
    | Callable[[Counter, Array], optax.GradientTransformation],
    Need("client optimizer"),
]
"""An optax optimizer; or a function of the round (int32[]) that gives one, for learning rates that decay over rounds:
`lambda t: optax.sgd(0.1 * 0.998**t)`; or of the round and the client's id (int32[] both), for learning rates that
differ by client: `lambda t, i: optax.sgd(rates[i])`, with `rates` a jax array [num_clients]."""


def batch_loss(loss_fn: LossFn, params: Params, batch: Batch) -> Array:
    """Mean loss over the real examples of a batch, float[].

    Padding has no part in it, nor in its gradient, where the loss of an example depends on that example alone. A loss
    that looks at the whole batch takes a parameter `mask` and leaves padding out itself; see `fedjax_core.masks`. One
    that does so without a mask is warned of, where its program shows it (`fedjax_core.dependence`).

    Raises:
      ValueError: if the loss function does not return one value per example.
    """
    values: Any = dependence.losses_of(loss_fn, params, batch.examples, batch.key, batch.mask)
    size = batch.mask.shape[0]
    if not isinstance(values, jax.Array) or values.shape != (size,) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return one loss per example, float[{size}], but returned {_instead_of_losses(values, size)}"
        )
    total = jnp.sum(sums.widen(jnp.where(batch.mask, values, 0)))
    return (total / jnp.maximum(jnp.sum(batch.mask), 1).astype(total.dtype)).astype(values.dtype)


def _instead_of_losses(values: object, size: int) -> str:
    """What a loss function has returned, and the fix."""
    if not isinstance(values, jax.Array):
        fix = "return the array of the losses alone, without other outputs beside it"
        return f"{type(values).__name__}: {fix}"
    got = f"{values.dtype}{list(values.shape)}"
    if values.shape != (size,):
        fix = "sum or average over all axes but the first" if values.shape[:1] == (size,) else ""
        return f"{got}: {fix or 'do not average over the batch, the library does that with the padding masked out'}"
    return f"{got}: a loss is a real float, cast it with astype(float) if that is meant"


def value_and_grad(loss_fn: LossFn) -> Callable[..., tuple[Array, Params]]:
    """Mean loss over a batch and its gradient: `(params, batch) -> (float[], gradient)`.

    Anything more that it is given is ignored, so that it is a direction for `local_descent`. The loss may be a `Task`.
    """
    checks.takes(
        "loss_fn",
        loss_fn,
        ("params", "batch", "key"),
        example="a function (params, batch, key) -> float[B]",
        named=masks.named_arguments(loss_fn),
    )
    gradient = tasks.value_and_grad(lambda params, batch: batch_loss(loss_fn, params, batch))
    return lambda params, batch, *_: gradient(params, batch)


def optimizer_at(optimizer: ClientOptimizer, round: Counter) -> optax.GradientTransformation:
    """The client optimizer of a round: in a client's program that client's, elsewhere that of client 0.

    Raises:
      TypeError: if `optimizer` is neither an optax optimizer nor a function that gives one, or is a function of a
        learning rate (`optax.sgd`) that would take the round for one.
    """
    if callable(optimizer) and checks.not_called(optimizer):
        name = getattr(getattr(optimizer, "func", optimizer), "__name__", "optimizer")
        raise TypeError(
            f"client_optimizer is the function {name} itself, which makes no optimizer from the round's number: call "
            "it with a learning rate (a schedule is given to an optimizer), for example optax.sgd(0.1), or pass "
            "lambda round: optax.sgd(0.1 * 0.99**round)"
        )
    if _takes_client(optimizer):
        by_client: Any = optimizer

        def own() -> optax.GradientTransformation:
            size = current_population_size()
            if size is not None:
                _check_reach(by_client, size)
            return optimizer_at(lambda t: _made(by_client, t, current_client()), round)

        return optax.GradientTransformation(
            lambda params: own().init(params), lambda updates, state, params=None: own().update(updates, state, params)
        )
    chosen: Any = optimizer
    if callable(optimizer):
        example = "optax.sgd(0.1), lambda round: optax.sgd(0.1 * 0.99**round), or lambda round, client: ..."
        checks.takes("client_optimizer", optimizer, ("round",), example=example)
        chosen = _made(optimizer, round)
    if not checks.is_optimizer(chosen):
        raise TypeError(
            f"client_optimizer must be an optax optimizer or a function of the round that returns one, got "
            f"{type(optimizer).__name__}: pass for example optax.sgd(0.1)"
        )
    return chosen


def _made(optimizer: Callable[..., optax.GradientTransformation], *args: Counter) -> optax.GradientTransformation:
    """`optimizer(*args)`, which may compute with its arguments but not look at them."""
    try:
        return optimizer(*args)
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(_LOOKS) from error
    except (jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError) as error:
        raise TypeError(_LOOKS) from error


_LOOKS = (
    "client_optimizer looks at the number of the round or of the client, which is not known while a round is compiled: "
    "choose by jnp.where(round < 100, 0.1, 0.01) or jnp.asarray(rates)[client] in the place of if and of numpy arrays "
    "and lists"
)

_reached: "weakref.WeakKeyDictionary[Any, set[int]]" = weakref.WeakKeyDictionary()


def _check_reach(by_client: Callable[..., optax.GradientTransformation], num_clients: int) -> None:
    """Raises ValueError if the optimizer of the last client reads beyond the end of an array.

    JAX would give the last entry instead. What cannot be tried out passes.
    """
    try:
        if num_clients in _reached.setdefault(by_client, set()):
            return
        _reached[by_client].add(num_clients)
    except TypeError:  # no hash or no weak reference
        pass

    def step(client: Array):
        optimizer, zero = by_client(jnp.int32(0), client), jnp.zeros(())
        return optimizer.update(jnp.ones(()), optimizer.init(zero), zero)[0]

    try:
        closed = jax.make_jaxpr(step)(jax.ShapeDtypeStruct((), jnp.int32))
        with jax.ensure_compile_time_eval():
            consts = [stand_in(const) for const in closed.consts]
            tried = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, consts))
            found = jax.jit(checkify.checkify(tried, errors=checkify.index_checks))(jnp.int32(num_clients - 1))[0].get()
    except Exception:
        return
    if found:
        _reached.pop(by_client, None)
        raise ValueError(
            f"client_optimizer of client {num_clients - 1}, the last of {num_clients}, reads beyond the end of an "
            f"array ({str(found).strip().rstrip('.')}): give one entry for each client"
        )


def _takes_client(optimizer: Callable[..., optax.GradientTransformation]) -> bool:
    """Whether it is a function that needs two arguments, the round and the client's id."""
    if not callable(optimizer):
        return False
    try:
        parameters = inspect.signature(optimizer).parameters.values()
    except (TypeError, ValueError):  # it has no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


class Descent(NamedTuple):
    """Where a client's local descent is, and at its end what it has come to.

    Attributes:
      params: the local model y.
      opt_state: of the client's optimizer.
      own: the client's input, as `for_each_client` was given it.
      mean: mean over the local steps of what a direction returns in the third place; while they are taken its sum;
        () where directions return nothing there.
      steps: int32[], local steps taken; () where there is no mean to take.
    """

    params: Params
    opt_state: PyTree
    own: PyTree
    mean: PyTree = ()
    steps: PyTree = ()


def first_part(shared: PyTree, own: PyTree) -> Params:
    """The first part of what the server has sent: where a client starts that is sent the model and more."""
    return shared[0]


def local_descent(
    optimizer: optax.GradientTransformation,
    direction: Callable[..., Any],
    *,
    start: Callable[[Any, Any], Params] = lambda shared, own: shared,
    upload: Callable[[Descent, Any], tuple[Any, Any]] | None = None,
    with_mean: bool = False,
) -> ClientProgram:
    """A client that descends, step by step, along a direction of its own: y <- y - lr d(y), from y = start.

    Args:
      optimizer: the client's optimizer of this round; it decides what a step along d is.
      direction: `direction(y, batch, shared, own) -> (loss, d)` with loss float[], uphill as a gradient is; `shared` is
        what the server has sent, and `own` the client's input. With `with_mean` a third value beside them, a pytree
        with the structure and shapes of the model.
      start: `start(shared, own)`, the model to start from; what the server has sent unless given.
      upload: `upload(done, shared) -> (upload, output)` from the finished `Descent`; the displacement y - start and
        nothing to keep unless given.
      with_mean: whether the mean of the third values over the local steps is wanted.
    """

    def init(shared: PyTree, own: PyTree, key: Key) -> Descent:
        y = start(shared, own)
        running = (sums.start_tree(y), jnp.int32(0)) if with_mean else ()
        return Descent(y, optimizer.init(y), own, *running)

    def step(shared: PyTree, now: Descent, batch: Batch) -> tuple[Descent, Array]:
        loss, d, *observed = direction(now.params, batch, shared, now.own)
        y, opt_state = optimizer_step(optimizer, now.params, now.opt_state, d)
        now = now._replace(params=y, opt_state=opt_state)
        if with_mean:
            now = now._replace(mean=sums.add_tree(now.mean, observed[0]), steps=now.steps + 1)
        return now, loss

    def final(shared: PyTree, done: Descent) -> tuple[PyTree, PyTree]:
        begun = start(shared, done.own)
        if with_mean:
            done = done._replace(mean=sums.mean_tree(done.mean, done.steps, begun))
        return (optax.tree.sub(done.params, begun), ()) if upload is None else upload(done, shared)

    return ClientProgram(init, step, final)


def optimizer_step(
    optimizer: optax.GradientTransformation, params: Params, opt_state: PyTree, direction: Params
) -> tuple[Params, Any]:
    """One optimizer step against `direction` (a gradient, corrected or not): returns (params, opt_state)."""
    updates, opt_state = optimizer.update(direction, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def add_scaled(params: Params, scale: Scalar, direction: Params) -> Params:
    """`params + scale * direction`, in the dtype of the parameters and rounded once."""

    def one(p: Array, d: Array) -> Array:
        wide = sums.accumulator(p.dtype)
        return (p.astype(wide) + jnp.asarray(scale, wide) * d.astype(wide)).astype(p.dtype)

    return jax.tree.map(one, params, direction)


def scale(factor: Scalar, tree: Params) -> Params:
    """`factor * tree`, every leaf in its own dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, tree)


def full_gradient_program(loss_fn: LossFn) -> ClientProgram:
    """A program that uploads the gradient of a client's mean loss at the shared params.

    Run it for one epoch (`local_work(batch_size, order="sequential")`); the batch size then only bounds memory.
    """
    gradient = value_and_grad(loss_fn)

    def init(shared: Params, client_input: PyTree, key: Key):
        return sums.start_tree(shared), jnp.int32(0)

    def step(shared: Params, carry: PyTree, batch: Batch):
        total, count = carry
        loss, grads = gradient(shared, batch)
        size = jnp.sum(batch.mask, dtype=jnp.int32)
        scaled = jax.tree.map(lambda g: size.astype(g.dtype) * g, sums.widen(grads))
        return (sums.add_tree(total, scaled), count + size), loss

    def final(shared: Params, carry: PyTree):
        total, count = carry
        return sums.mean_tree(total, count, shared), ()

    return ClientProgram(init, step, final)
