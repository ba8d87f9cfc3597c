"""FedAU, and FedAvg with known participation probabilities."""

from typing import NamedTuple, Unpack

import fedjax_core as fc
from algorithms.parts import participation


class FedAUState(NamedTuple):
    """Global model x, every client's intervals, and the number of rounds done."""

    params: fc.Params
    intervals: fc.ClientTable
    round: fc.Counter = 0


def fedau(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    cutoff: int = 50,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAU: weighs a participant by the mean interval between its rounds, an estimate of 1 / its probability.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- x + (server_lr / N) sum_S w_i (y_i - x), w_i from the rounds before this one:
                         w_i = mean length of client i's intervals, 1 before the first. An interval ends in the round
                         in which the client takes part, or after `cutoff` rounds.

    Down: x (1P). Up: y_i - x (1P; times w_i, if the client keeps it to itself).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      cutoff: longest interval in rounds, K in the paper. 1 gives every participant weight 1, the average over all
        clients where the absent ones count as standing still. As many as there are rounds: no cutoff.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the sum is over N p_i w_i (y_i - x).

    Differences: the paper updates w_i, the number of intervals and the rounds since the last one for all clients in
    every round. The lengths of the ended intervals sum to the rounds that they cover, and absent clients only reach
    cutoffs, so two integers that change when the client takes part give the same w_i.

    Paper: Wang, Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", 2024,
    algorithms 1 and 2.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.positive_int("cutoff", cutoff, "an interval has at least one round")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedAUState:
        return FedAUState(params, participation.interval_table(num_clients))

    def update(state: FedAUState, cohort: fc.Cohort, key: fc.Key):
        w, own = participation.mean_interval(fc.gather(state.intervals, cohort), state.round, cutoff)
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, gradient, upload=participation.weighted)
        results = clients.run(program, state.params, cohort, key, client_inputs=w, aggregator=fc.weighted_sum())
        params = fc.add_scaled(state.params, server_lr / num_clients, results.aggregate)
        return FedAUState(params, fc.scatter(state.intervals, cohort, own)), results

    return fc.federated(init, update)


def fedavg_ipw(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    probabilities: fc.ArrayLike = 1.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAvg-IPW: FedAvg that weighs each participant by the inverse of its known probability of taking part.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- x + (server_lr / N) sum_S (y_i - x) / prob_i.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      probabilities: prob_i, each in (0, 1]; float[num_clients], or one number for all. 1 is the average over all
        clients where the absent ones count as standing still. "uniform" is |S| / N, for cohorts that are all equally
        likely; with uniform weights that is FedAvg.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the sum is over N p_i (y_i - x) / prob_i.

    Differences: none. These are the baselines "known participation statistics" and, with probability 1, "average
    over all" of the paper.

    Paper: Wang, Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", 2024,
    baselines of the experiments.
    """
    participation.check_probabilities(probabilities)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, gradient, upload=participation.weighted)
        w = participation.inverse_probabilities(probabilities, cohort)
        results = clients.run(program, state.params, cohort, key, client_inputs=w, aggregator=fc.weighted_sum())
        params = fc.add_scaled(state.params, server_lr / cohort.num_clients, results.aggregate)
        return state._replace(params=params), results

    return fc.federated(fc.ModelState, update)
