"""FedGAMMA."""

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
    global_client_params,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    value_and_grad,
)


class FedGammaState(NamedTuple):
    """Global model x, server control c, every client's control c_i, and the number of rounds done."""

    params: Params
    control: Params
    client_controls: ClientTable
    round: Array


def fedgamma(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    rho: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedGAMMA: sharpness-aware local steps whose drift is cancelled by control variates.

    Client, from y = x:  g = g_i(y);  q = g_i(y + rho g / ||g||), both on one batch;
                         y <- y - lr (q + c - c_i), K times;  c_i+ = mean of the K gradients q.
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  c <- c + (1 / N) sum_S (c_i+ - c_i).

    Down: x, c (2P). Up: y_i - x, c_i+ - c_i (2P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round giving one.
      num_clients: size of the population, N.
      rho: radius of the perturbation; the norm is over all parameters together. 0 is SCAFFOLD (option II).
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: released code writes c_i+ as c_i - c + (x - y_i) / (K lr), which equals the mean of the q for plain SGD
    with a constant step, and clips the corrected gradient.

    Paper: Dai, Yang, Sun, Liu, Shen, Tao, "FedGAMMA: Federated Learning with Global Sharpness-Aware Minimization",
    2023, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("rho", rho, low=0)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedGammaState:
        zeros = optax.tree.zeros_like(params)
        return FedGammaState(params, zeros, client_table(num_clients, zeros), jnp.int32(0))

    def round(state: FedGammaState, cohort: Cohort, key: Key) -> tuple[FedGammaState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, c_i: Params, key: Key) -> Any:
            x, _ = shared
            return x, optimizer.init(x), c_i, optax.tree.zeros_like(x), jnp.int32(0)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            _, c = shared
            y, opt_state, c_i, total, k = carry
            loss, g = gradient(y, batch)
            norm = optax.tree.norm(g)
            _, q = gradient(move(y, rho / jnp.where(norm > 0, norm, 1), g), batch)
            corrected = jax.tree.map(lambda q, c, c_i: q + (c - c_i), q, c, c_i)
            y, opt_state = descend(optimizer, y, opt_state, corrected)
            return (y, opt_state, c_i, optax.tree.add(total, q), k + 1), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            y, _, c_i, total, k = carry
            c_i_new = jax.tree.map(lambda q: q / k.astype(q.dtype), total)
            return (optax.tree.sub(y, x), optax.tree.sub(c_i_new, c_i)), c_i_new

        program = ClientProgram(client_init, client_step, client_final)
        controls = gather(state.client_controls, cohort)
        results = clients.run(program, (state.params, state.control), controls, cohort, key)
        displacement, control_change = results.aggregate
        params = move(state.params, server_lr, displacement)
        # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
        control = move(state.control, jnp.sum(results.weights) / num_clients, control_change)
        client_controls = scatter(state.client_controls, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedGammaState(params, control, client_controls, state.round + 1), metrics

    def client_params(state: FedGammaState, ids: Array) -> Params:
        return global_client_params(state.params, ids)

    return Algorithm(init, round, lambda state: state.params, client_params)
