"""Ditto."""

from typing import NamedTuple, Unpack

import optax

import fedjax_core as fc


class DittoState(NamedTuple):
    """Global model x, every client's own model v_i, and the number of rounds done."""

    params: fc.Params
    personal: fc.ClientTable
    round: fc.Counter = 0


def ditto(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    lam: fc.Scalar = 1.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Ditto: beside FedAvg's model every client trains one of its own, which is held near the global one.

    Client, from y = x and its own v = v_i:  y <- y - lr g_i(y);  v <- v - lr (g_i(v) + lam (v - x)), K times, both on
                                             one batch;  v_i <- v.
    Server:                                  x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer of both models at once, started anew in every round, or a function of the round,
        or of the round and the client's id, giving one.
      num_clients: size of the population.
      lam: how strongly a client's own model is held near x. 0 is training alone.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The global model is FedAvg's, whatever lam. The view "personal" has each client's own.

    Differences: the algorithm of the paper lets the two models have numbers of steps of their own; here, as in the
    released code, they take their steps together.

    Paper: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", 2021, algorithm
    1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("lam", lam, low=0)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def direction(models, batch, x, own):
        y, v = models
        loss, g = gradient(y, batch)
        _, g_own = gradient(v, batch)
        return loss, (g, fc.add_scaled(g_own, lam, optax.tree.sub(v, x)))

    def upload(done: fc.Descent, x: fc.Params):
        y, v = done.params
        return optax.tree.sub(y, x), v

    def update(state: DittoState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, direction, start=lambda x, v: (x, v), upload=upload)
        own = fc.gather(state.personal, cohort)
        results = clients.run(program, state.params, cohort, key, client_inputs=own)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        return DittoState(params, fc.scatter(state.personal, cohort, results.outputs)), results

    own_model = fc.View(lambda state: (), lambda shared, v: v, lambda state: state.personal)
    return fc.federated(
        lambda params: DittoState(params, fc.client_table(num_clients, params)), update, views={"personal": own_model}
    )
