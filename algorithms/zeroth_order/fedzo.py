"""FedZO, FedProx-ZO and SCAFFOLD-ZO: methods for gradients, run on finite differences."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import displacement_program
from algorithms.optimization.scaffold import controlled_program
from algorithms.zeroth_order.estimators import Estimate, finite_differences, num_queries
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
    sums,
)


class FedZOState(NamedTuple):
    """Global model x, the number of rounds done, and queries made so far by all clients, int32[]."""

    params: Params
    round: Array
    queries: Array


class Queries(NamedTuple):
    """Queries made in this round by all participants, corrections included, int32[]."""

    queries: Array


def fedzo(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_directions: int = 20,
    mu: Scalar = 0.01,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedZO: FedAvg on gradients that are estimated from function values.

    Client, from y = x:  s_1 .. s_q random directions of length 1 at right angles;
                         g = (1 / q) sum_s (f_i(y + mu s) - f_i(y)) / mu s;  y <- y - lr g, K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). K (q + 1) queries per participant.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; f_i is its mean over the batch. It need not have a gradient,
        nor be JAX (`algorithms.zeroth_order.estimators.host_loss`). For a function that is no mean over examples give
        each client one example, which holds whatever the function needs.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one. The mean of g is grad f_i / d, with d parameters, so plain SGD wants d times the
        rate that it has with gradients; Adam does not mind.
      num_directions: q; at most d are used.
      mu: length of the difference.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. A batch size of at least
        the largest client's number of examples makes f_i exact.

    Differences: the paper draws one direction at a time, uniformly from the sphere, and multiplies by d. This is the
    estimator that Shu et al. (FZooS, 2023) compare with, whose code spends one query more per round, on f_i(x) at the
    start, which here the first step makes. That code also keeps the old x of a round that has not made F smaller, in
    this as in all its methods; here the new x is taken (`fzoos(safeguard=True)` has that rule).

    Paper: Fang, Yu, Jiang, Shi, Jones, Zhou, "Communication-Efficient Stochastic Zeroth-Order Optimization for
    Federated Learning", 2022, algorithm 1.
    """
    return _fedzo(
        loss_fn, client_optimizer, proximal=0.0, num_directions=num_directions, mu=mu, server_lr=server_lr, **local
    )


def fedprox_zo(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    proximal: Scalar = 1.0,
    num_directions: int = 20,
    mu: Scalar = 0.01,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedProx-ZO: FedProx on gradients that are estimated from function values.

    Client, from y = x:  y <- y - lr (g + proximal (y - x)), K times, g as in FedZO.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). K (q + 1) queries per participant.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; f_i is its mean over the batch; see `fedzo`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      proximal: weight of the pull back to x; 0 is FedZO. Note that g is about grad f_i / d.
      num_directions: q; at most d are used.
      mu: length of the difference.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: as in the code that was released with the paper, the pull is absent in the first round. That code also
    keeps the old x of a round that has not made F smaller; here the new x is taken.

    Paper: Shu, Lin, Dai, Low, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
    2023, section 6 (a baseline).
    """
    return _fedzo(
        loss_fn, client_optimizer, proximal=proximal, num_directions=num_directions, mu=mu, server_lr=server_lr, **local
    )


def _fedzo(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    proximal: Scalar,
    num_directions: int,
    mu: Scalar,
    server_lr: Scalar,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    _check(num_directions, mu, server_lr)
    checks.scalar("proximal", proximal, low=0)
    clients = local_training(**local)
    estimate = finite_differences(loss_fn, num_directions=num_directions, mu=mu)

    def init(params: Params) -> FedZOState:
        return FedZOState(params, jnp.int32(0), jnp.int32(0))

    def round(state: FedZOState, cohort: Cohort, key: Key) -> tuple[FedZOState, Metrics]:
        pull = jnp.where(state.round > 0, proximal, 0)

        def gradient(x: Params, y: Params, batch: Batch) -> tuple[Array, Params]:
            value, g = estimate(y, batch)
            return value, move(g, pull, optax.tree.sub(y, x))

        program = displacement_program(gradient, optimizer_at(client_optimizer, state.round))
        results = clients.run(program, state.params, (), cohort, key)
        params = move(state.params, server_lr, results.aggregate)
        queries = jnp.sum(results.steps, dtype=jnp.int32) * num_queries(num_directions, state.params)
        metrics = round_metrics(results, cohort, state.params, params, Queries(queries))
        return FedZOState(params, state.round + 1, state.queries + queries), metrics

    return global_algorithm(init, round)


class ScaffoldZOState(NamedTuple):
    """Global model x, control c and the clients' c_i (both () in option I), rounds, queries as in FedZO."""

    params: Params
    control: Params
    client_controls: ClientTable
    round: Array
    queries: Array


def scaffold_zo(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    option: str = "II",
    num_directions: int = 20,
    mu: Scalar = 0.01,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """SCAFFOLD-ZO: SCAFFOLD on gradients that are estimated from function values.

    Client, from y = x:  y <- y - lr (g + c - c_i), K times, g as in FedZO.
    Option I:            c_i = one more estimate at x, and c = sum_S w_i c_i, both in a pass before the local steps.
    Option II:           c_i = the mean of the K raw g of the client's last round; c <- c + (1 / N) sum_S (c_i+ - c_i).
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x, c (2P). Up: y_i - x, and c_i or c_i+ - c_i (2P). K (q + 1) queries per participant, q + 1 more in option I.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; f_i is its mean over the batch; see `fedzo`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      option: "I" or "II". There is no correction in the first round with "II".
      num_directions: q; at most d are used.
      mu: length of the difference.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: in the released code the pass of option I ends the round, at the new x, its queries are not counted,
    and there is no correction in the first round. Here it begins the next round, at the same point, so that it is made
    by the clients that need it when not everyone takes part. The code also keeps the old x of a round that has not made
    F smaller; here the new x is taken.

    Paper: Shu, Lin, Dai, Low, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
    2023, section 6 (a baseline).
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.one_of("option", option, ("I", "II"))
    _check(num_directions, mu, server_lr)
    clients = local_training(**local)
    once = clients._replace(work=clients.work._replace(num_epochs=None, num_steps=1))
    estimate = finite_differences(loss_fn, num_directions=num_directions, mu=mu)

    def init(params: Params) -> ScaffoldZOState:
        zeros = optax.tree.zeros_like(params) if option == "II" else ()
        control = sums.widen(zeros)
        return ScaffoldZOState(params, control, client_table(num_clients, zeros), jnp.int32(0), jnp.int32(0))

    def round(state: ScaffoldZOState, cohort: Cohort, key: Key) -> tuple[ScaffoldZOState, Metrics]:
        control_key, key = jax.random.split(key)
        estimates = jnp.int32(0)
        optimizer = optimizer_at(client_optimizer, state.round)
        program = controlled_program(lambda x, y, batch: estimate(y, batch), optimizer)
        if option == "I":
            pass_at_x = once.run(one_estimate(estimate), state.params, (), cohort, control_key)
            c, c_i, estimates = pass_at_x.aggregate, pass_at_x.outputs, jnp.sum(pass_at_x.steps, dtype=jnp.int32)
            # The c_i have gone up in that pass; of the local steps only y_i - x does.
            moved = program._replace(final=lambda shared, carry: (program.final(shared, carry)[0][0], ()))
            results = clients.run(moved, (state.params, c), (c_i, ()), cohort, key)
            results = results._replace(uploaded=results.uploaded + pass_at_x.uploaded)
            displacement, control_change = results.aggregate, ()
        else:
            given = gather(state.client_controls, cohort), ()
            sent = state.params, sums.cast_like(state.control, state.params)
            results = clients.run(program, sent, given, cohort, key)
            displacement, control_change = results.aggregate
        params = move(state.params, server_lr, displacement)
        queries = (estimates + jnp.sum(results.steps, dtype=jnp.int32)) * num_queries(num_directions, state.params)
        if option == "II":
            share = jnp.sum(results.weights) / num_clients
            state = state._replace(
                control=move(state.control, share, control_change),
                client_controls=scatter(state.client_controls, cohort, results.outputs),
            )
        metrics = round_metrics(results, cohort, state.params, params, Queries(queries))
        return state._replace(params=params, round=state.round + 1, queries=state.queries + queries), metrics

    return global_algorithm(init, round)


def one_estimate(estimate: Estimate) -> ClientProgram:
    """A program of one step that uploads, and keeps as output, an estimate of the gradient at the shared params."""

    def client_init(x: Params, client_input: Any, key: Key) -> Params:
        return optax.tree.zeros_like(x)

    def client_step(x: Params, carry: Params, batch: Batch) -> Any:
        value, g = estimate(x, batch)
        return g, value

    return ClientProgram(client_init, client_step, lambda x, g: (g, g))


def _check(num_directions: int, mu: Scalar, server_lr: Scalar) -> None:
    checks.positive_int("num_directions", num_directions, "an estimate needs at least one direction")
    checks.scalar("mu", mu, low=0, low_open=True)
    checks.scalar("server_lr", server_lr, low=0)
