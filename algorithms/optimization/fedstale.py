"""FedStale and FedVARP."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedau import (
    check_probabilities,
    interval_table,
    inverse_probabilities,
    mean_interval,
)
from algorithms.optimization.fedavg import displacement_program, plain_gradient
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
    PyTree,
    Scalar,
    checks,
    client_table,
    gather,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    stacked,
    sums,
)


class FedStaleState(NamedTuple):
    """Global model x, every client's last displacement h_i, their mean H = sum_i p_i h_i, and the rounds done.

    `intervals` is a table of every client's participation if the probabilities are estimated, () if not.
    """

    params: Params
    updates: ClientTable
    mean: Params
    intervals: Any
    round: Array


def fedstale(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    beta: Scalar = 0.5,
    probabilities: Any = "uniform",
    cutoff: int = 50,
    skip_empty: bool = True,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedStale: the last updates of the absent clients take part, with a weight beta.

    Client, from y = x:  y <- y - lr g_i(y), K times;  d_i = y_i - x.
    Server:              x <- x + server_lr (beta H + sum_S (p_i / prob_i) (d_i - beta h_i)),  H = sum_i p_i h_i;
                         then h_i <- d_i for the participants. All h_i begin at 0.

    The update has mean sum_i p_i d_i for every beta. beta = 0 is FedAvg with inverse probabilities, beta = 1 FedVARP.

    Down: x (1P). Up: d_i (1P). The server keeps N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      beta: weight of the stale updates. It should be larger the more the clients' data differ, and smaller the more
        their participation differs.
      probabilities: prob_i, each client's probability of taking part: float[num_clients] in (0, 1], one number for
        all, "uniform" (|S| / N, for cohorts that are all equally likely) or "estimated" (1 / prob_i is the mean
        interval between the client's rounds, as in FedAU).
      cutoff: longest interval, for "estimated".
      skip_empty: leave the model alone in a round without participants; if not, it moves by beta H.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The weights give p_i.

    Differences: the authors' code also applies weight decay to the global model in every round; here only what
    client_optimizer does.

    Paper: Rodio, Neglia, "FedStale: Leveraging Stale Client Updates in Federated Learning", 2024, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.positive_int("cutoff", cutoff, "an interval has at least one round")
    checks.scalar("server_lr", server_lr, low=0)
    checks.scalar("beta", beta, low=0)
    check_probabilities(probabilities, num_clients, "estimated")
    estimated = isinstance(probabilities, str) and probabilities == "estimated"
    clients = local_training(**local)
    gradient = plain_gradient(loss_fn)

    def init(params: Params) -> FedStaleState:
        zeros = optax.tree.zeros_like(params)
        intervals = interval_table(num_clients) if estimated else ()
        return FedStaleState(params, client_table(num_clients, zeros), sums.wide_zeros(params), intervals, jnp.int32(0))

    def round(state: FedStaleState, cohort: Cohort, key: Key) -> tuple[FedStaleState, Metrics]:
        intervals = state.intervals
        if estimated:
            inverse, own = mean_interval(gather(intervals, cohort), state.round, cutoff)
            intervals = scatter(intervals, cohort, own)
        else:
            inverse = inverse_probabilities(probabilities, cohort)

        program = displacement_program(gradient, optimizer_at(client_optimizer, state.round))
        results = clients.run(program, state.params, (), cohort, key, aggregator=stacked())
        d, h = results.aggregate, gather(state.updates, cohort)
        p = results.weights / num_clients
        fresh = cohort_sum(p * inverse, jax.tree.map(lambda d, h: d - beta * h, sums.widen(d), sums.widen(h)))
        direction = jax.tree.map(lambda mean, fresh: beta * mean + fresh, state.mean, fresh)
        params = move(state.params, server_lr, direction)
        if skip_empty:
            params = optax.tree.where(cohort.num_participants > 0, params, state.params)
        updates, mean = remember(state.updates, state.mean, cohort, d, p)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedStaleState(params, updates, mean, intervals, state.round + 1), metrics

    return global_algorithm(init, round)


def fedvarp(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedVARP: the last updates of the absent clients stand in for them, which removes the variance of sampling.

    Client, from y = x:  y <- y - lr g_i(y), K times;  d_i = y_i - x.
    Server:              x <- x + server_lr (mean_i h_i + mean_S (d_i - h_i)), the first mean over all N clients;
                         then h_i <- d_i for the participants. All h_i begin at 0.

    Down: x (1P). Up: d_i (1P). The server keeps N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights p_i the
        means are sum_i p_i h_i and (N / |S|) sum_S p_i (d_i - h_i).

    Differences: the paper's h_i are in the units of a gradient, d_i / (lr K), and its server step has lr K in it; the
    same for equal work and a constant rate. Its cohorts are all equally likely; for other participation take
    `fedstale` with beta = 1 and the probabilities.

    Paper: Jhunjhunwala, Sharma, Nagarkatti, Joshi, "FedVARP: Tackling the Variance Due to Partial Client
    Participation in Federated Learning", 2022.
    """
    return fedstale(loss_fn, client_optimizer, num_clients=num_clients, beta=1.0, server_lr=server_lr, **local)


def cohort_sum(weights: Array, rows: PyTree) -> PyTree:
    """sum_S weights_i rows_i: leaves [C, ...] become [...], in float32 at least; weights float[C]."""
    return sums.weighted(weights, rows)


def remember(table: ClientTable, mean: PyTree, cohort: Cohort, updates: PyTree, p: Array) -> tuple[ClientTable, PyTree]:
    """Enters the cohort's updates in a table of last updates and moves the table's mean along.

    The mean over all clients changes by sum_S p_i (new_i - old_i): no row but the cohort's is looked at.

    Args:
      table: last updates, leaves [num_clients, ...].
      mean: sum_i p_i (row i) over all clients, leaves [...], float32 at least.
      cohort: who takes part.
      updates: the cohort's updates, leaves [C, ...].
      p: float[C], the clients' weights, 0 in empty slots.
    """
    change = optax.tree.sub(sums.widen(updates), gather(table, cohort))
    return scatter(table, cohort, updates), optax.tree.add(mean, cohort_sum(p, change))
