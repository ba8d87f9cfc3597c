"""FedSpeed."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

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
    descend,
    gather,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    sums,
    value_and_grad,
)


class FedSpeedState(NamedTuple):
    """Global model x, mean of the corrections of all clients, every client's correction h_i, and the number of rounds
    done.

    The mean is () if the server averages over the cohort alone.
    """

    params: Params
    correction: Params
    client_corrections: ClientTable
    round: Array


def fedspeed(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    lam: Scalar = 10.0,
    rho: Scalar = 0.1,
    alpha: Scalar = 1.0,
    normalize: bool = True,
    corrections: str = "all",
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedSpeed: a proximal term whose bias is corrected, and gradients from a little further uphill.

    Client, from y = x:  g = g_i(y);  q = (1 - alpha) g + alpha g_i(y + rho g / ||g||), both on one batch;
                         y <- y - lr (q - h_i + (y - x) / lam), K times;  h_i <- h_i - (y_i - x) / lam.
    Server:              x <- mean_S y_i - lam h,  h = (1 / N) sum of the h_i of all clients (corrections="all"), or
                         x <- mean_S (y_i - lam h_i) (corrections="cohort").

    Down: x (1P). Up: y_i - x, from which the server follows h, or y_i - lam h_i - x for corrections="cohort" (1P). Two
    gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      lam: the proximal term is ||y - x||^2 / (2 lam), above 0; large is weak.
      rho: length of the step uphill (over all parameters together).
      alpha: share of the gradient from uphill, in [0, 1]; 0 makes this FedDyn with its alpha = 1 / lam.
      normalize: divide by ||g||; without it the step uphill is rho g.
      corrections: whose h_i the server takes off: those of "all" clients or of the "cohort".
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. All averages have the
        same weights.

    Differences: the paper averages the corrections of the cohort and steps uphill by rho g; released code averages
    over all clients and normalizes, as is the default here. With everyone taking part the two averages agree. With
    few, the h_i of a cohort, which tend to the gradients at the optimum, do not cancel, and the paper's form stalls.
    Released code also clips the gradient, with a part of the proximal term in it.

    Paper: Sun, Shen, Huang, Ding, Tao, "FedSpeed: Larger Local Interval, Less Communication Round, and Higher
    Generalization Accuracy", 2023, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("lam", lam, low=0, low_open=True)
    checks.scalar("rho", rho, low=0)
    checks.scalar("alpha", alpha, low=0, high=1)
    checks.one_of("corrections", corrections, ("all", "cohort"))
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedSpeedState:
        # In float32 at least, as every sum over rounds: steps of a bfloat16 model are soon lost in the rounding of h.
        zeros = sums.wide_zeros(params)
        mean = zeros if corrections == "all" else ()
        return FedSpeedState(params, mean, client_table(num_clients, zeros), jnp.int32(0))

    def round(state: FedSpeedState, cohort: Cohort, key: Key) -> tuple[FedSpeedState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(x: Params, h_i: Params, key: Key) -> Any:
            return x, optimizer.init(x), h_i

        def client_step(x: Params, carry: Any, batch: Batch) -> Any:
            y, opt_state, h_i = carry
            loss, g = gradient(y, batch)
            norm = sums.norm(g)
            uphill = move(y, rho / jnp.where(norm > 0, norm, 1) if normalize else rho, g)
            q = jax.tree.map(lambda g, u: (1 - alpha) * g + alpha * u, g, gradient(uphill, batch)[1])
            q = jax.tree.map(lambda q, h, y, x: (q - h + (y - x) / lam).astype(q.dtype), q, h_i, y, x)
            y, opt_state = descend(optimizer, y, opt_state, q)
            return (y, opt_state, h_i), loss

        def client_final(x: Params, carry: Any) -> Any:
            y, _, h_i = carry
            displacement = optax.tree.sub(y, x)
            h_i = optax.tree.add_scale(h_i, -1 / lam, displacement)
            amended = optax.tree.add_scale(displacement, -lam, sums.cast_like(h_i, x))
            return displacement if corrections == "all" else amended, h_i

        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, state.params, gather(state.client_corrections, cohort), cohort, key)
        params, mean = optax.tree.add(state.params, results.aggregate), state.correction
        if corrections == "all":
            share = jnp.sum(results.weights) / num_clients
            mean = move(mean, -share / lam, results.aggregate)
            params = move(params, -lam, mean)
        params = optax.tree.where(cohort.num_participants > 0, params, state.params)
        client_corrections = scatter(state.client_corrections, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedSpeedState(params, mean, client_corrections, state.round + 1), metrics

    return global_algorithm(init, round)
