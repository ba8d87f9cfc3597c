"""FedStale and FedVARP."""

from typing import NamedTuple, Unpack

import jax
import optax

import fedjax_core as fc
from algorithms.parts import participation
from algorithms.parts.memory import remember


class FedStaleState(NamedTuple):
    """Global model x, every client's last displacement h_i, their mean H = sum_i p_i h_i, and the rounds done.

    `intervals` is a table of every client's participation if the probabilities are estimated, () if not.
    """

    params: fc.Params
    updates: fc.ClientTable
    mean: fc.Params
    intervals: fc.PyTree
    round: fc.Counter = 0


def fedstale(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    beta: fc.Scalar = 0.5,
    probabilities: str | fc.ArrayLike = "uniform",
    cutoff: int = 50,
    skip_empty: bool = True,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.positive_int("cutoff", cutoff, "an interval has at least one round")
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.scalar("beta", beta, low=0)
    participation.check_probabilities(probabilities, num_clients, "estimated")
    estimated = isinstance(probabilities, str) and probabilities == "estimated"
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedStaleState:
        updates = fc.client_table(num_clients, optax.tree.zeros_like(params))
        intervals = participation.interval_table(num_clients) if estimated else ()
        return FedStaleState(params, updates, fc.sums.wide_zeros(params), intervals)

    def update(state: FedStaleState, cohort: fc.Cohort, key: fc.Key):
        intervals = state.intervals
        if estimated:
            inverse, own = participation.mean_interval(fc.gather(intervals, cohort), state.round, cutoff)
            intervals = fc.scatter(intervals, cohort, own)
        else:
            inverse = participation.inverse_probabilities(probabilities, cohort)
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key, aggregator=fc.stacked())
        d, h = results.aggregate, fc.gather(state.updates, cohort)
        p = results.weights / num_clients
        change = jax.tree.map(lambda d, h: d - beta * h, fc.sums.widen(d), fc.sums.widen(h))
        fresh = fc.sums.weighted(p * inverse, change)
        direction = jax.tree.map(lambda mean, fresh: beta * mean + fresh, state.mean, fresh)
        updates, mean = remember(state.updates, state.mean, cohort, d, p)
        return FedStaleState(fc.add_scaled(state.params, server_lr, direction), updates, mean, intervals), results

    return fc.federated(init, update, skip_empty=skip_empty)


def fedvarp(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
