"""Server optimizers: FedAvgM, FedAdagrad, FedAdam, FedYogi, and any optax optimizer (`fedopt`)."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class FedOptState(NamedTuple):
    """Global model x, the server optimizer's state and the number of rounds done."""

    params: fc.Params
    opt_state: fc.PyTree
    round: fc.Counter = 0


def fedopt(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedOpt: the mean displacement of the clients as a gradient for any optax optimizer on the server.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- ServerOpt(x, -D),  D = sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). A round without participants changes neither x nor the optimizer's state.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_optimizer: optax optimizer, kept over rounds; `optax.sgd(1.0)` unless given, which is FedAvg.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: `optax.adam` and its relatives correct their bias, which the paper does not; use `fedadam`,
    `fedyogi` and `fedadagrad` for the paper's rules.

    Paper: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", 2021,
    algorithm 1.
    """
    server = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    fc.checks.optimizer("server_optimizer", server)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedOptState:
        return FedOptState(params, server.init(fc.sums.widen(params)))

    def update(state: FedOptState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key)
        # In float32 at least: a mean with b2 = 0.99 in bfloat16 stops within 20 % of what it should be.
        pseudo_gradient = optax.tree.scale(-1, fc.sums.widen(results.aggregate))
        x, opt_state = fc.optimizer_step(server, fc.sums.widen(state.params), state.opt_state, pseudo_gradient)
        return FedOptState(fc.sums.cast_like(x, state.params), opt_state), results

    return fc.federated(init, update)


def fedavgm(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 1.0,
    momentum: fc.Scalar = 0.9,
    nesterov: bool = False,
    dampening: bool = False,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAvgM: FedAvg with momentum on the server.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              D = sum_S w_i (y_i - x);  v <- momentum v + D;  x <- x + server_lr v
                         (nesterov: x <- x + server_lr (D + momentum v)).

    Down: x (1P). Up: y_i - x (1P). A round without participants changes neither x nor v.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_lr: step size of the server.
      momentum: weight of the past, in [0, 1).
      nesterov: look ahead by one step.
      dampening: weigh D by 1 - momentum, the other scaling in use: the same as server_lr times 1 - momentum.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: the paper's text describes Nesterov; released code defaults to the heavy ball, as here. Not to be
    confused with FedAvg-M, whose momentum enters the clients' steps.

    Paper: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019, section 4.3.
    """
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    scale = server_lr * (1 - momentum) if dampening else server_lr
    return fedopt(loss_fn, client_optimizer, optax.sgd(scale, momentum, nesterov), **local)


def fedadagrad(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 0.03,
    tau: fc.Scalar = 1e-3,
    initial_accumulator: fc.Scalar = 1e-6,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAdagrad: Adagrad on the server.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              D = sum_S w_i (y_i - x);  v <- v + D^2;  x <- x + server_lr D / (sqrt(v) + tau).

    Down: x (1P). Up: y_i - x (1P). A round without participants changes nothing.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_lr: step size of the server.
      tau: degree of adaptivity, added outside the root.
      initial_accumulator: v at the start; the paper asks for at least tau^2.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Paper: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", 2021,
    algorithm 2.
    """
    server = _adaptive(lambda v, square: v + square, server_lr, 0.0, tau, initial_accumulator)
    return fedopt(loss_fn, client_optimizer, server, **local)


def fedadam(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 0.03,
    b1: fc.Scalar = 0.9,
    b2: fc.Scalar = 0.99,
    tau: fc.Scalar = 1e-3,
    initial_accumulator: fc.Scalar = 1e-6,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAdam: Adam without bias correction on the server.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              D = sum_S w_i (y_i - x);  m <- b1 m + (1 - b1) D;  v <- b2 v + (1 - b2) D^2;
                         x <- x + server_lr m / (sqrt(v) + tau).

    Down: x (1P). Up: y_i - x (1P). A round without participants changes nothing.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_lr: step size of the server.
      b1: decay of the mean, in [0, 1).
      b2: decay of the mean square, in [0, 1).
      tau: degree of adaptivity, added outside the root.
      initial_accumulator: v at the start; the paper asks for at least tau^2.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: other libraries add bias correction (and then different step sizes are best).

    Paper: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", 2021,
    algorithm 2.
    """
    fc.checks.scalar("b2", b2, low=0, high=1, high_open=True)
    server = _adaptive(lambda v, square: b2 * v + (1 - b2) * square, server_lr, b1, tau, initial_accumulator)
    return fedopt(loss_fn, client_optimizer, server, **local)


def fedyogi(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 0.03,
    b1: fc.Scalar = 0.9,
    b2: fc.Scalar = 0.99,
    tau: fc.Scalar = 1e-3,
    initial_accumulator: fc.Scalar = 1e-6,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedYogi: Yogi without bias correction on the server.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              D = sum_S w_i (y_i - x);  m <- b1 m + (1 - b1) D;
                         v <- v - (1 - b2) D^2 sign(v - D^2);  x <- x + server_lr m / (sqrt(v) + tau).

    Down: x (1P). Up: y_i - x (1P). A round without participants changes nothing.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      server_lr: step size of the server.
      b1: decay of the mean, in [0, 1).
      b2: decay of the mean square, in [0, 1).
      tau: degree of adaptivity, added outside the root.
      initial_accumulator: v at the start; the paper asks for at least tau^2.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Paper: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", 2021,
    algorithm 2.
    """
    fc.checks.scalar("b2", b2, low=0, high=1, high_open=True)

    def second_moment(v: fc.Array, square: fc.Array) -> fc.Array:
        return v - (1 - b2) * square * jnp.sign(v - square)

    server = _adaptive(second_moment, server_lr, b1, tau, initial_accumulator)
    return fedopt(loss_fn, client_optimizer, server, **local)


class _AdaptiveState(NamedTuple):
    m: fc.Params
    v: fc.Params


def _adaptive(
    second_moment: fc.PyTree, server_lr: fc.Scalar, b1: fc.Scalar, tau: fc.Scalar, initial_accumulator: fc.Scalar
) -> optax.GradientTransformation:
    """The paper's server step: no bias correction, tau outside the root (optax has both otherwise)."""
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.scalar("b1", b1, low=0, high=1, high_open=True)
    fc.checks.scalar("tau", tau, low=0)
    fc.checks.scalar("initial_accumulator", initial_accumulator, low=0)

    def init(params: fc.Params) -> _AdaptiveState:
        return _AdaptiveState(optax.tree.zeros_like(params), optax.tree.full_like(params, initial_accumulator))

    def update(
        gradient: fc.Params, state: _AdaptiveState, params: fc.Params | None = None
    ) -> tuple[fc.Params, _AdaptiveState]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, gradient)
        v = jax.tree.map(lambda v, g: second_moment(v, g**2), state.v, gradient)
        updates = jax.tree.map(lambda m, v: -server_lr * m / (jnp.sqrt(v) + tau), m, v)
        return updates, _AdaptiveState(m, v)

    return optax.GradientTransformation(init, update)
