"""FedZO, FedProx-ZO and SCAFFOLD-ZO: methods for gradients, run on finite differences."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import controls
from algorithms.zeroth_order.estimators import Estimate, finite_differences, num_queries


class Queries(NamedTuple):
    """Queries made in this round by all participants, corrections included, float[]: more than int32 can count."""

    queries: fc.Array


def fedzo(
    loss_fn: fc.LossValuesFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_directions: int = 20,
    mu: fc.Scalar = 0.01,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    loss_fn: fc.LossValuesFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    proximal: fc.Scalar = 1.0,
    num_directions: int = 20,
    mu: fc.Scalar = 0.01,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    proximal: fc.Scalar,
    num_directions: int,
    mu: fc.Scalar,
    server_lr: fc.Scalar,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Both, FedZO with proximal = 0."""
    _check(num_directions, mu, server_lr)
    fc.checks.scalar("proximal", proximal, low=0)
    clients = fc.local_training(**local)
    estimate = finite_differences(loss_fn, num_directions=num_directions, mu=mu)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        pull = jnp.where(state.round > 0, proximal, 0)

        def direction(y, batch, x, _):
            value, g = estimate(y, batch)
            return value, fc.add_scaled(g, pull, optax.tree.sub(y, x))

        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction)
        results = clients.run(program, state.params, cohort, key)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        queries = fc.sums.total(results.steps) * num_queries(num_directions, state.params)
        return state._replace(params=params), results, Queries(queries)

    return fc.federated(fc.ModelState, update)


class ScaffoldZOState(NamedTuple):
    """Global model x, control c and the clients' c_i (both () in option I), and the number of rounds done."""

    params: fc.Params
    control: fc.Params
    client_controls: fc.ClientTable
    round: fc.Counter = 0


def scaffold_zo(
    loss_fn: fc.LossValuesFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    option: str = "II",
    num_directions: int = 20,
    mu: fc.Scalar = 0.01,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.one_of("option", option, ("I", "II"))
    _check(num_directions, mu, server_lr)
    clients = fc.local_training(**local)
    estimate = finite_differences(loss_fn, num_directions=num_directions, mu=mu)

    def init(params: fc.Params) -> ScaffoldZOState:
        return ScaffoldZOState(params, *controls.start(params if option == "II" else (), num_clients))

    def direction(y, batch, shared, c_i):
        _, c = shared
        value, g = estimate(y, batch)
        return value, controls.corrected(g, c, c_i), g

    def update(state: ScaffoldZOState, cohort: fc.Cohort, key: fc.Key):
        control_key, key = jax.random.split(key)
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        each = num_queries(num_directions, state.params)
        if option == "I":
            at_x = clients.one_step().run(one_estimate(estimate), state.params, cohort, control_key)
            # The c_i have gone up in that pass, and x down; of the local steps only y_i - x goes up.
            program = fc.local_descent(optimizer, direction, start=fc.first_part)
            shared = fc.Message(state.params, 0), at_x.aggregate
            results = clients.run(program, shared, cohort, key, client_inputs=at_x.outputs)
            queries = (fc.sums.total(at_x.steps) + fc.sums.total(results.steps)) * each
            delta = results.aggregate
            results = fc.merge_phases(results, bytes_of=[at_x])
        else:
            program = fc.local_descent(
                optimizer, direction, start=fc.first_part, upload=controls.upload, with_mean=True
            )
            c_i = fc.gather(state.client_controls, cohort)
            shared = state.params, fc.sums.cast_like(state.control, state.params)
            results = clients.run(program, shared, cohort, key, client_inputs=c_i)
            queries = fc.sums.total(results.steps) * each
            delta, change = results.aggregate
            control, client_controls = controls.updated(state, change, results, cohort, num_clients)
            state = state._replace(control=control, client_controls=client_controls)
        params = fc.add_scaled(state.params, server_lr, delta)
        return state._replace(params=params), results, Queries(queries)

    return fc.federated(init, update)


def one_estimate(estimate: Estimate) -> fc.ClientProgram:
    """A program of one step that uploads, and keeps as output, an estimate of the gradient at the shared params."""

    def client_step(x, carry, batch):
        value, g = estimate(x, batch)
        return g, value

    return fc.ClientProgram(lambda x, own, key: optax.tree.zeros_like(x), client_step, lambda x, g: (g, g))


def _check(num_directions: int, mu: fc.Scalar, server_lr: fc.Scalar) -> None:
    fc.checks.positive_int("num_directions", num_directions, "an estimate needs at least one direction")
    fc.checks.scalar("mu", mu, low=0, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
