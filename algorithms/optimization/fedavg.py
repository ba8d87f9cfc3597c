"""FedAvg, local SGD and FedSGD."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
import optax

from fedjax_core import (
    Algorithm,
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
    Cohort,
    Key,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checks,
    descend,
    full_gradient_program,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    value_and_grad,
)


class FedAvgState(NamedTuple):
    """Global model x and the number of rounds done."""

    params: Params
    round: Array


Gradient = Callable[[Params, Params, Batch], tuple[Array, Params]]
"""`(x, y, batch) -> (loss, direction)`: what local model y descends along when the global model is x."""


def plain_gradient(loss_fn: LossFn) -> Gradient:
    """The gradient of the batch's mean loss at y."""
    gradient = value_and_grad(loss_fn)
    return lambda x, y, batch: gradient(y, batch)


def displacement_program(gradient: Gradient, optimizer: optax.GradientTransformation) -> ClientProgram:
    """Local training from the global model x along `gradient`; uploads the displacement delta_i = y_i - x."""

    def client_init(x: Params, client_input: Any, key: Key) -> Any:
        return x, optimizer.init(x)

    def client_step(x: Params, carry: Any, batch: Batch) -> Any:
        y, opt_state = carry
        loss, g = gradient(x, y, batch)
        return descend(optimizer, y, opt_state, g), loss

    def client_final(x: Params, carry: Any) -> Any:
        y, _ = carry
        return optax.tree.sub(y, x), ()

    return ClientProgram(client_init, client_step, client_final)


def averaging(
    gradient: Gradient, client_optimizer: ClientOptimizer, *, server_lr: Scalar, **local: Unpack[LocalOptions]
) -> Algorithm:
    """FedAvg along any local direction: x <- x + server_lr sum_S w_i (y_i - x)."""
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)

    def init(params: Params) -> FedAvgState:
        return FedAvgState(params, jnp.int32(0))

    def round(state: FedAvgState, cohort: Cohort, key: Key) -> tuple[FedAvgState, Metrics]:
        program = displacement_program(gradient, optimizer_at(client_optimizer, state.round))
        results = clients.run(program, state.params, (), cohort, key)
        params = move(state.params, server_lr, results.aggregate)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedAvgState(params, state.round + 1), metrics

    return global_algorithm(init, round)


def fedavg(
    loss_fn: LossFn, client_optimizer: ClientOptimizer, *, server_lr: Scalar = 1.0, **local: Unpack[LocalOptions]
) -> Algorithm:
    """FedAvg: local training on every participant, then the average of the results.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x),  sum_S w_i = 1.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: the paper weighs clients by their number of examples (`weights="examples"`); the default here is
    the plain average that most later papers use.

    Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", 2017, algorithm 1.
    """
    return averaging(plain_gradient(loss_fn), client_optimizer, server_lr=server_lr, **local)


def local_sgd(loss_fn: LossFn, client_optimizer: ClientOptimizer, **local: Unpack[LocalOptions]) -> Algorithm:
    """Local SGD: FedAvg without a server step size; give it `samplers.full`, so that everyone takes part.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- mean_i y_i.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Paper: Stich, "Local SGD Converges Fast and Communicates Little", 2019, algorithm 1.
    """
    return fedavg(loss_fn, client_optimizer, server_lr=1.0, **local)


def fedsgd(
    loss_fn: LossFn, client_optimizer: ClientOptimizer, *, server_lr: Scalar = 1.0, **local: Unpack[LocalOptions]
) -> Algorithm:
    """FedSGD: one step per round on the full gradient of every participant (FedAvg with K = 1 and full batches).

    Client:  y_i = x - lr grad f_i(x), the gradient taken over all its examples.
    Server:  x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer for the one step, or a function of the round, or of the round and the client's
        id, giving one.
      server_lr: 1 replaces the model by the average.
      **local: batch_size (only bounds memory here), weights, plan. Epochs, steps and order have no meaning.

    Raises:
      ValueError: if num_epochs, num_steps or order is given.

    Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", 2017, section 2.
    """
    checks.scalar("server_lr", server_lr, low=0)
    for name in ("num_epochs", "num_steps", "order"):
        if name in local:
            raise ValueError(
                f"{name}={local[name]!r} means nothing to fedsgd, which takes one full-gradient step: leave it out"
            )
    clients = local_training(**local, order="sequential")
    whole = full_gradient_program(loss_fn)

    def init(params: Params) -> FedAvgState:
        return FedAvgState(params, jnp.int32(0))

    def round(state: FedAvgState, cohort: Cohort, key: Key) -> tuple[FedAvgState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_final(x: Params, carry: Any) -> Any:
            g, _ = whole.final(x, carry)
            return optimizer.update(g, optimizer.init(x), x)[0], ()

        results = clients.run(whole._replace(final=client_final), state.params, (), cohort, key)
        params = move(state.params, server_lr, results.aggregate)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedAvgState(params, state.round + 1), metrics

    return global_algorithm(init, round)
