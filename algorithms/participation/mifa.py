"""MIFA."""

from typing import NamedTuple, Unpack

import optax

import fedjax_core as fc
from algorithms.parts.memory import remember


class MIFAState(NamedTuple):
    """Global model x, every client's last displacement h_i, their mean H = sum_i p_i h_i, and the rounds done."""

    params: fc.Params
    updates: fc.ClientTable
    mean: fc.Params
    round: fc.Counter = 0


def mifa(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """MIFA: the average over all clients of their last updates, for participation that follows no known law.

    Client, from y = x:  y <- y - lr g_i(y), K times;  h_i <- y_i - x.
    Server:              x <- x + server_lr sum_i p_i h_i over all N clients. All h_i begin at 0.

    Down: x (1P). Up: y_i - x (1P; the change of h_i, if clients keep their own). The server keeps N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The weights give p_i.

    Differences: the paper keeps gradients, (x - y_i) / lr, and multiplies by the rate of the current round, the same
    for a constant rate. It has everyone take part in the first round; here a client counts as standing still until it
    has taken part. In a round without participants the model stays.

    Paper: Gu, Huang, Zhang, Huang, "Fast Federated Learning in the Presence of Arbitrary Device Unavailability", 2021,
    algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> MIFAState:
        updates = fc.client_table(num_clients, optax.tree.zeros_like(params))
        return MIFAState(params, updates, fc.sums.wide_zeros(params))

    def update(state: MIFAState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key, aggregator=fc.stacked())
        p = results.weights / num_clients
        updates, mean = remember(state.updates, state.mean, cohort, results.aggregate, p)
        return MIFAState(fc.add_scaled(state.params, server_lr, mean), updates, mean), results

    return fc.federated(init, update)
