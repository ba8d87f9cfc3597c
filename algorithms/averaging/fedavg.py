"""FedAvg, local SGD and FedSGD."""

from typing import Unpack

import fedjax_core as fc


def fedavg(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key)
        return state._replace(params=fc.add_scaled(state.params, server_lr, results.aggregate)), results

    return fc.federated(fc.ModelState, update)


def local_sgd(
    loss_fn: fc.LossFn, client_optimizer: fc.ClientOptimizer, **local: Unpack[fc.LocalOptions]
) -> fc.Algorithm:
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
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.FullPassOptions],
) -> fc.Algorithm:
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
    fc.checks.scalar("server_lr", server_lr, low=0)
    for name, value in local.items():
        if name in ("num_epochs", "num_steps", "order"):
            raise ValueError(
                f"{name}={value!r} means nothing to fedsgd, which takes one full-gradient step: leave it out"
            )
    clients = fc.local_training(**local).full_pass()
    full_gradient = fc.full_gradient_program(loss_fn)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def displacement(x, carry):
            g, _ = full_gradient.final(x, carry)
            return optimizer.update(g, optimizer.init(x), x)[0], ()

        results = clients.run(full_gradient._replace(final=displacement), state.params, cohort, key)
        return state._replace(params=fc.add_scaled(state.params, server_lr, results.aggregate)), results

    return fc.federated(fc.ModelState, update)
