"""Anarchic federated averaging, AFA-CD and AFA-CS."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.participation.fedfix import FedFixState
from algorithms.parts import stale
from algorithms.parts.memory import remember


class AFACSState(NamedTuple):
    """Global model x, the model x_i that each client received last, its last G_i, their mean, and the steps done."""

    params: fc.Params
    starts: fc.ClientTable
    updates: fc.ClientTable
    mean: fc.Params
    round: fc.Counter = 0


def afa_cd(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """AFA-CD: clients come when they like, with as many local steps as they like, from the model they had.

    Client, from y = x_i:  y <- y - lr g_i(y), K_i times;  G_i = (y_i - x_i) / K_i;  x_i is the model that it received
                           when it came last.
    Server:                x <- x + server_lr mean_S G_i over the m clients S that have come;  x_i <- x for them.

    A round is one step of the server and its cohort are the clients that have come (`samplers.deliveries`, or any
    other sampler). All clients begin with the first model.

    Down: x to those who came (1P). Up: G_i (1P). In a simulation the x_i take N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      server_lr: step size of the server, in local steps: with equal work K makes it FedAvg.
      **local: batch_size, num_epochs or num_steps (an array gives every client its own K_i), order, weights, plan; see
        `LocalOptions`.

    Differences: the paper's G_i is divided by the local rate too, and its server step multiplied by it. Its clients may
    pull the model at any time, and may come twice in one step; here they receive it when they deliver. No code of the
    authors was found to compare with.

    Paper: Yang, Zhang, Khanduri, Liu, "Anarchic Federated Learning", 2022, AFA-CD.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedFixState:
        return FedFixState(params, fc.client_table(num_clients, params))

    def update(state: FedFixState, cohort: fc.Cohort, key: fc.Key):
        program = stale.descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        own = fc.gather(state.starts, cohort), one_over_steps(clients.work, cohort)
        results = clients.run(program, (), cohort, key, client_inputs=own)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        return FedFixState(params, stale.received(state.starts, cohort, params)), stale.downloads(
            results, cohort, params
        )

    return fc.federated(init, update)


def afa_cs(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """AFA-CS: AFA-CD that averages the last contributions of all clients, whenever they came.

    Client, from y = x_i:  y <- y - lr g_i(y), K_i times;  G_i <- (y_i - x_i) / K_i;  x_i is the model that it received
                           when it came last.
    Server:                x <- x + server_lr sum_i p_i G_i over all N clients;  x_i <- x for those who came.

    A round is one step of the server and its cohort are the clients that have come (`samplers.deliveries`, or any
    other sampler). All clients begin with the first model and G_i = 0.

    Down: x to those who came (1P). Up: the change of G_i (1P). Clients keep G_i; in a simulation it takes 2 N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      server_lr: step size of the server, in local steps.
      **local: batch_size, num_epochs or num_steps (an array gives every client its own K_i), order, weights, plan; see
        `LocalOptions`. The weights give p_i.

    Differences: those of `afa_cd`. Without participants the model stays.

    Paper: Yang, Zhang, Khanduri, Liu, "Anarchic Federated Learning", 2022, AFA-CS.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> AFACSState:
        starts = fc.client_table(num_clients, params)
        updates = fc.client_table(num_clients, optax.tree.zeros_like(params))
        return AFACSState(params, starts, updates, fc.sums.wide_zeros(params))

    def update(state: AFACSState, cohort: fc.Cohort, key: fc.Key):
        program = stale.descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        own = fc.gather(state.starts, cohort), one_over_steps(clients.work, cohort)
        results = clients.run(program, (), cohort, key, client_inputs=own, aggregator=fc.stacked())
        p = results.weights / num_clients
        updates, mean = remember(state.updates, state.mean, cohort, results.aggregate, p)
        params = fc.add_scaled(state.params, server_lr, mean)
        starts = stale.received(state.starts, cohort, params)
        return AFACSState(params, starts, updates, mean), stale.downloads(results, cohort, params)

    return fc.federated(init, update)


def one_over_steps(work: fc.LocalWork, cohort: fc.Cohort) -> fc.Array:
    """float[C], 1 / K_i of each slot's client."""
    return 1 / jnp.maximum(work.steps(cohort.ids, cohort.sizes), 1).astype(jnp.result_type(float))
