"""FedAU, and FedAvg with known participation probabilities."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from algorithms.optimization.fedavg import FedAvgState, Gradient, displacement_program, plain_gradient
from fedjax_core import (
    Algorithm,
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
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
    gather,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    weighted_sum,
)


class Intervals(NamedTuple):
    """A client's participation up to its last round, int32[] each: intervals that have ended, and rounds in them."""

    ended: Array
    rounds: Array


class FedAUState(NamedTuple):
    """Global model x, every client's intervals, and the number of rounds done."""

    params: Params
    intervals: ClientTable
    round: Array


def fedau(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    cutoff: int = 50,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.positive_int("cutoff", cutoff, "an interval has at least one round")
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    gradient = plain_gradient(loss_fn)

    def init(params: Params) -> FedAUState:
        return FedAUState(params, interval_table(num_clients), jnp.int32(0))

    def round(state: FedAUState, cohort: Cohort, key: Key) -> tuple[FedAUState, Metrics]:
        program = weighted_program(gradient, client_optimizer, state.round)
        w, intervals = mean_interval(gather(state.intervals, cohort), state.round, cutoff)
        results = clients.run(program, state.params, w, cohort, key, aggregator=weighted_sum())
        params = move(state.params, server_lr / num_clients, results.aggregate)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedAUState(params, scatter(state.intervals, cohort, intervals), state.round + 1), metrics

    return global_algorithm(init, round)


def fedavg_ipw(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    probabilities: Any = 1.0,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    check_probabilities(probabilities)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    gradient = plain_gradient(loss_fn)

    def init(params: Params) -> FedAvgState:
        return FedAvgState(params, jnp.int32(0))

    def round(state: FedAvgState, cohort: Cohort, key: Key) -> tuple[FedAvgState, Metrics]:
        program = weighted_program(gradient, client_optimizer, state.round)
        inverse = inverse_probabilities(probabilities, cohort)
        results = clients.run(program, state.params, inverse, cohort, key, aggregator=weighted_sum())
        params = move(state.params, server_lr / cohort.num_clients, results.aggregate)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedAvgState(params, state.round + 1), metrics

    return global_algorithm(init, round)


def weighted_program(gradient: Gradient, client_optimizer: ClientOptimizer, round: Array) -> ClientProgram:
    """Local training as in FedAvg; the client's input w_i is a factor of what it uploads, w_i (y_i - x)."""
    plain = displacement_program(gradient, optimizer_at(client_optimizer, round))

    def client_init(x: Params, w: Array, key: Key) -> Any:
        return plain.init(x, (), key), w

    def client_step(x: Params, carry: Any, batch: Batch) -> Any:
        carry, w = carry
        carry, loss = plain.step(x, carry, batch)
        return (carry, w), loss

    def client_final(x: Params, carry: Any) -> Any:
        carry, w = carry
        displacement, _ = plain.final(x, carry)
        return jax.tree.map(lambda d: w.astype(d.dtype) * d, displacement), ()

    return ClientProgram(client_init, client_step, client_final)


def interval_table(num_clients: int) -> ClientTable:
    """No client has taken part yet."""
    return client_table(num_clients, Intervals(jnp.int32(0), jnp.int32(0)))


def mean_interval(intervals: Intervals, round: Array, cutoff: int) -> tuple[Array, Intervals]:
    """The mean length of the intervals that ended before a round, and the intervals of a client that takes part in it.

    Args:
      intervals: int32[C] each.
      round: int32[], rounds done.
      cutoff: longest interval.

    Returns:
      float[C], 1 where no interval has ended; and the clients' new intervals.
    """
    away = (round - intervals.rounds) // cutoff  # intervals that the cutoff has ended since
    ended, rounds = intervals.ended + away, intervals.rounds + away * cutoff
    mean = jnp.where(ended > 0, rounds, 1).astype(jnp.result_type(float)) / jnp.maximum(ended, 1)
    return mean, Intervals(ended + 1, jnp.full_like(rounds, round + 1))


def check_probabilities(probabilities: Any, num_clients: int | None = None, *others: str) -> None:
    """Checks probabilities of taking part: "uniform", one number or float[num_clients] (of tracers the shape).

    `others` are further words that the method knows.

    Raises:
      ValueError: for another string, a probability outside (0, 1], or another shape.
    """
    if isinstance(probabilities, str):
        checks.one_of("probabilities", probabilities, ("uniform", *others))
        return
    shape = np.shape(probabilities)
    if shape == ():
        checks.scalar("probabilities", probabilities, low=0, high=1, low_open=True)
        return
    if len(shape) != 1 or num_clients not in (None, shape[0]):
        raise ValueError(
            f"probabilities must be one number or float[{num_clients or 'num_clients'}], got shape {list(shape)}: pass "
            "each client's probability of taking part"
        )
    if checks.is_concrete(probabilities):
        rates = np.asarray(probabilities)
        bad = rates[~((rates > 0) & (rates <= 1))]
        if bad.size:
            raise ValueError(
                f"probabilities must lie in (0, 1], got {bad[0]}: leave clients that never take part out of the "
                "population"
            )


def inverse_probabilities(probabilities: Any, cohort: Cohort) -> Array:
    """float[C], 1 / prob_i of each slot's client; "uniform" is |S| / N for all of them."""
    if isinstance(probabilities, str):
        rates = jnp.maximum(cohort.num_participants, 1).astype(jnp.result_type(float)) / cohort.num_clients
    else:
        rates = jnp.asarray(probabilities, jnp.result_type(float))
        if rates.ndim:
            cohort.check_per_client("probabilities", rates)
    return 1 / jnp.broadcast_to(rates if rates.ndim == 0 else rates[jnp.maximum(cohort.ids, 0)], cohort.ids.shape)
