"""Mime and MimeLite."""

from typing import Any, NamedTuple, Unpack

import jax
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
    full_gradient_program,
    global_algorithm,
    local_training,
    local_work,
    move,
    optimizer_at,
    round_metrics,
    sums,
    value_and_grad,
)


class MimeState(NamedTuple):
    """Global model x, the state s of the base optimizer, and the number of rounds done."""

    params: Params
    opt_state: Any
    round: Array


def mime(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    momentum: Scalar = 0.9,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """Mime: local steps that imitate a centralized optimizer, with its state frozen and their drift corrected.

    Clients first send G_i = grad f_i(x), all their examples; c = mean_S G_i.
    Client, from y = x:  y <- y + U(g_i(y) - g_i(x) + c, s), both g_i on one batch, K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  s <- V(c, s).

    U(g, s) is the base optimizer's update for the gradient g, V(g, s) its next state: s changes once a round. With
    `optax.sgd(lr)` they are U = -lr m' and V = m', where m' = momentum m + (1 - momentum) g.

    Down: x, then c and s (2P + |s|; 3P + 1 for SGD). Up: G_i, then y_i - x (2P). Two gradients per step, and one pass
    over the client's examples.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: base optimizer, or a function of the round, or of the round and the client's id, giving one
        (with a state of the same structure).
      momentum: decay of the average of gradients that the base optimizer is given, in [0, 1); choose 0 for one with
        momentum of its own (`optax.adam` makes this MimeAdam).
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. c and the displacements
        have the same weights.

    Differences: the paper has no server_lr. The average m starts from 0 and is not debiased.

    Paper: Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh, "Breaking the Centralized Barrier for Cross-Device
    Federated Learning", 2021, algorithm 1 (Mime).
    """
    return _mime(loss_fn, client_optimizer, corrected=True, momentum=momentum, server_lr=server_lr, **local)


def mimelite(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    momentum: Scalar = 0.9,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """MimeLite: Mime without the correction, local steps with the frozen state of a centralized optimizer.

    Client, from y = x:  y <- y + U(g_i(y), s), K times;  G_i = grad f_i(x), all its examples.
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  s <- V(mean_S G_i, s).

    U(g, s) is the base optimizer's update for the gradient g, V(g, s) its next state: s changes once a round. With
    `optax.sgd(lr)` they are U = -lr m' and V = m', where m' = momentum m + (1 - momentum) g.

    Down: x, s (1P + |s|; 2P + 1 for SGD). Up: y_i - x, G_i (2P). One pass over the client's examples besides the steps.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: base optimizer, or a function of the round, or of the round and the client's id, giving one
        (with a state of the same structure).
      momentum: decay of the average of gradients that the base optimizer is given, in [0, 1); choose 0 for one with
        momentum of its own (`optax.adam` makes this MimeLiteAdam). With 0 and SGD it is FedAvg.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The G_i and the
        displacements have the same weights.

    Differences: the paper has no server_lr. The average m starts from 0 and is not debiased.

    Paper: Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh, "Breaking the Centralized Barrier for Cross-Device
    Federated Learning", 2021, algorithm 1 (MimeLite).
    """
    return _mime(loss_fn, client_optimizer, corrected=False, momentum=momentum, server_lr=server_lr, **local)


def _mime(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    corrected: bool,
    momentum: Scalar,
    server_lr: Scalar,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """Mime, or MimeLite without the correction."""
    checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    whole = clients._replace(work=local_work(clients.work.batch_size, order="sequential"))
    gradient = value_and_grad(loss_fn)

    def base_optimizer(round: Array) -> optax.GradientTransformation:
        return optax.chain(optax.ema(momentum, debias=False), optimizer_at(client_optimizer, round))

    def init(params: Params) -> MimeState:
        return MimeState(params, base_optimizer(jnp.int32(0)).init(sums.widen(params)), jnp.int32(0))

    def round(state: MimeState, cohort: Cohort, key: Key) -> tuple[MimeState, Metrics]:
        optimizer = base_optimizer(state.round)
        full = whole.run(full_gradient_program(loss_fn), state.params, (), cohort, key)
        c = full.aggregate

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, *_ = shared
            return x

        def client_step(shared: Any, y: Params, batch: Batch) -> Any:
            x, s, c = shared
            loss, g = gradient(y, batch)
            if corrected:
                g = jax.tree.map(lambda g, at_x, c: g - at_x + c, g, gradient(x, batch)[1], c)
            update, _ = optimizer.update(g, s, y)
            return optax.apply_updates(y, update), loss

        def client_final(shared: Any, y: Params) -> Any:
            x, *_ = shared
            return optax.tree.sub(y, x), ()

        program = ClientProgram(client_init, client_step, client_final)
        shared = (state.params, state.opt_state, c if corrected else ())
        results = clients.run(program, shared, (), cohort, key)
        results = results._replace(uploaded=results.uploaded + full.uploaded)
        params = move(state.params, server_lr, results.aggregate)
        _, refreshed = optimizer.update(sums.widen(c), state.opt_state, sums.widen(state.params))
        opt_state = optax.tree.where(cohort.num_participants > 0, refreshed, state.opt_state)
        metrics = round_metrics(results, cohort, state.params, params)
        return MimeState(params, opt_state, state.round + 1), metrics

    return global_algorithm(init, round)
