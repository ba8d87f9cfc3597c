"""FedSMOO."""

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


class FedSmooState(NamedTuple):
    """Global model x, global perturbation s, mean of the h_i of all clients, every client's (h_i, mu_i), and the number
    of rounds done."""

    params: Params
    perturbation: Params
    dual: Params
    client_duals: ClientTable
    round: Array


def fedsmoo(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    lam: Scalar = 10.0,
    rho: Scalar = 0.1,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedSMOO: dynamic regularization of the model, as in FedDyn, and of the sharpness-aware perturbation as well.

    Client, from y = x:  u = g_i(y) - mu_i - s;  s_i = rho u / ||u||;  mu_i <- mu_i + s_i - s;
                         y <- y - lr (g_i(y + s_i) - h_i + (y - x) / lam), both g_i on one batch, K times;
                         h_i <- h_i - (y_i - x) / lam.
    Server:              x <- mean_S y_i - lam h,  h = (1 / N) sum of the h_i of all clients;
                         s <- rho m / ||m||,  m = mean_S mu_i.

    The duals h_i pull the models together, the duals mu_i the perturbations s_i towards one, s, so that clients look
    for a minimum that is flat for all.

    Down: x, s (2P). Up: y_i - x, from which the server follows h, and mu_i (2P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      lam: the proximal term is ||y - x||^2 / (2 lam), above 0; large is weak.
      rho: radius of the perturbations (over all parameters together); 0 makes this FedDyn with its alpha = 1 / lam.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. All averages have the
        same weights.

    Differences: in the paper m also has a term in the clients' last s_i; the authors' code leaves it out, as small
    beside mu_i, and so does this. Their code also clips the gradient, with a part of the proximal term in it.

    Paper: Sun, Shen, Chen, Ding, Tao, "Dynamic Regularized Sharpness Aware Minimization in Federated Learning:
    Approaching Global Consistency and Smooth Landscape", 2023, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("lam", lam, low=0, low_open=True)
    checks.scalar("rho", rho, low=0)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def of_radius_rho(u: Params) -> Params:
        norm = sums.norm(u)
        return jax.tree.map(lambda u: u * (rho / jnp.where(norm > 0, norm, 1)).astype(u.dtype), u)

    def init(params: Params) -> FedSmooState:
        zeros = optax.tree.zeros_like(params)
        # The dual variables sum up displacements of all rounds: in float32 at least, or a bfloat16 model's are lost.
        duals = sums.wide_zeros(params)
        return FedSmooState(params, zeros, duals, client_table(num_clients, (duals, zeros)), jnp.int32(0))

    def round(state: FedSmooState, cohort: Cohort, key: Key) -> tuple[FedSmooState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, duals: Any, key: Key) -> Any:
            x, _ = shared
            return x, optimizer.init(x), *duals

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            x, s = shared
            y, opt_state, h_i, mu_i = carry
            loss, g = gradient(y, batch)
            s_i = of_radius_rho(jax.tree.map(lambda g, mu, s: g - mu - s, g, mu_i, s))
            mu_i = jax.tree.map(lambda mu, s_i, s: mu + s_i - s, mu_i, s_i, s)
            _, g = gradient(optax.tree.add(y, s_i), batch)
            g = jax.tree.map(lambda g, h, y, x: (g - h + (y - x) / lam).astype(g.dtype), g, h_i, y, x)
            y, opt_state = descend(optimizer, y, opt_state, g)
            return (y, opt_state, h_i, mu_i), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            y, _, h_i, mu_i = carry
            displacement = optax.tree.sub(y, x)
            return (displacement, mu_i), (optax.tree.add_scale(h_i, -1 / lam, displacement), mu_i)

        program = ClientProgram(client_init, client_step, client_final)
        duals = gather(state.client_duals, cohort)
        results = clients.run(program, (state.params, state.perturbation), duals, cohort, key)
        displacement, mean_mu = results.aggregate
        dual = move(state.dual, -jnp.sum(results.weights) / num_clients / lam, displacement)
        params = move(optax.tree.add(state.params, displacement), -lam, dual)
        params, perturbation = optax.tree.where(
            cohort.num_participants > 0, (params, of_radius_rho(mean_mu)), (state.params, state.perturbation)
        )
        client_duals = scatter(state.client_duals, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedSmooState(params, perturbation, dual, client_duals, state.round + 1), metrics

    return global_algorithm(init, round)
