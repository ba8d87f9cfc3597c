"""MIFA."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import displacement_program, plain_gradient
from algorithms.optimization.fedstale import remember
from fedjax_core import (
    Algorithm,
    Array,
    ClientOptimizer,
    ClientTable,
    Cohort,
    Key,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checks,
    client_table,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    stacked,
    sums,
)


class MIFAState(NamedTuple):
    """Global model x, every client's last displacement h_i, their mean H = sum_i p_i h_i, and the rounds done."""

    params: Params
    updates: ClientTable
    mean: Params
    round: Array


def mifa(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    gradient = plain_gradient(loss_fn)

    def init(params: Params) -> MIFAState:
        zeros = optax.tree.zeros_like(params)
        return MIFAState(params, client_table(num_clients, zeros), sums.wide_zeros(params), jnp.int32(0))

    def round(state: MIFAState, cohort: Cohort, key: Key) -> tuple[MIFAState, Metrics]:
        program = displacement_program(gradient, optimizer_at(client_optimizer, state.round))
        results = clients.run(program, state.params, (), cohort, key, aggregator=stacked())
        p = results.weights / num_clients
        updates, mean = remember(state.updates, state.mean, cohort, results.aggregate, p)
        params = optax.tree.where(cohort.num_participants > 0, move(state.params, server_lr, mean), state.params)
        metrics = round_metrics(results, cohort, state.params, params)
        return MIFAState(params, updates, mean, state.round + 1), metrics

    return global_algorithm(init, round)
