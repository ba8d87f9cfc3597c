"""Mime and MimeLite."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import optax

import fedjax_core as fc


class MimeState(NamedTuple):
    """Global model x, the state s of the base optimizer, and the number of rounds done."""

    params: fc.Params
    opt_state: fc.PyTree
    round: fc.Counter = 0


def mime(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    momentum: fc.Scalar = 0.9,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, x, c):
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, at_x, c: g - at_x + c, g, gradient(x, batch)[1], c)

    return _frozen(loss_fn, client_optimizer, direction, momentum, server_lr, download=lambda c: (c,), **local)


def mimelite(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    momentum: fc.Scalar = 0.9,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    gradient = fc.value_and_grad(loss_fn)
    return _frozen(loss_fn, client_optimizer, gradient, momentum, server_lr, download=lambda c: (), **local)


def _frozen(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    direction: Callable[..., Any],
    momentum: fc.Scalar,
    server_lr: fc.Scalar,
    *,
    download: Callable[[fc.Params], tuple[fc.Params, ...]],
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Local steps with the state s of the base optimizer as the server has it, along a direction of the method's.

    Args:
      direction: `direction(y, batch, x, *download) -> (loss, g)`.
      download: what a method sends besides x and s, from the mean gradient c at x.
    """
    fc.checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient_at_x = fc.full_gradient_program(loss_fn)

    def base_optimizer(round: fc.Counter) -> optax.GradientTransformation:
        return optax.chain(optax.ema(momentum, debias=False), fc.optimizer_at(client_optimizer, round))

    def init(params: fc.Params) -> MimeState:
        return MimeState(params, base_optimizer(0).init(fc.sums.widen(params)))

    def update(state: MimeState, cohort: fc.Cohort, key: fc.Key):
        optimizer = base_optimizer(state.round)
        full = clients.full_pass().run(gradient_at_x, state.params, cohort, key)
        c = full.aggregate

        def client_step(shared, y, batch):
            x, s, *downloaded = shared
            loss, g = direction(y, batch, x, *downloaded)
            step, _ = optimizer.update(g, s, y)
            return optax.apply_updates(y, step), loss

        program = fc.ClientProgram(
            init=lambda shared, own, key: shared[0],
            step=client_step,
            final=lambda shared, y: (optax.tree.sub(y, shared[0]), ()),
        )
        shared = fc.Message(state.params, 0), state.opt_state, *download(c)  # clients have x from the first pass
        results = clients.run(program, shared, cohort, key)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        _, opt_state = optimizer.update(fc.sums.widen(c), state.opt_state, fc.sums.widen(state.params))
        return MimeState(params, opt_state), fc.merge_phases(results, bytes_of=[full])

    return fc.federated(init, update)
