"""FedSMOO."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class Duals(NamedTuple):
    """A client's dual variables: h_i of the model, mu_i of the perturbation."""

    model: fc.Params
    perturbation: fc.Params


class FedSmooState(NamedTuple):
    """Global model x, global perturbation s, mean of the h_i of all clients, every client's duals, the rounds done."""

    params: fc.Params
    perturbation: fc.Params
    dual: fc.Params
    client_duals: fc.ClientTable
    round: fc.Counter = 0


class Local(NamedTuple):
    """A client in the middle of its round."""

    params: fc.Params
    opt_state: fc.PyTree
    duals: Duals


def fedsmoo(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    lam: fc.Scalar = 10.0,
    rho: fc.Scalar = 0.1,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("lam", lam, low=0, low_open=True)
    fc.checks.scalar("rho", rho, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def of_radius_rho(u: fc.Params) -> fc.Params:
        norm = fc.sums.norm(u)
        return jax.tree.map(lambda u: u * (rho / jnp.where(norm > 0, norm, 1)).astype(u.dtype), u)

    def init(params: fc.Params) -> FedSmooState:
        zeros = optax.tree.zeros_like(params)
        # The duals sum up displacements of all rounds: in float32 at least, or a bfloat16 model's are lost.
        duals = fc.sums.wide_zeros(params)
        return FedSmooState(params, zeros, duals, fc.client_table(num_clients, Duals(duals, zeros)))

    def update(state: FedSmooState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def client_init(shared, duals, key):
            x, _ = shared
            return Local(x, optimizer.init(x), duals)

        def client_step(shared, now, batch):
            (x, s), (y, opt_state, (h_i, mu_i)) = shared, now
            loss, g = gradient(y, batch)
            s_i = of_radius_rho(jax.tree.map(lambda g, mu, s: g - mu - s, g, mu_i, s))
            mu_i = jax.tree.map(lambda mu, s_i, s: mu + s_i - s, mu_i, s_i, s)
            _, g = gradient(optax.tree.add(y, s_i), batch)
            g = jax.tree.map(lambda g, h, y, x: (g - h + (y - x) / lam).astype(g.dtype), g, h_i, y, x)
            return Local(*fc.optimizer_step(optimizer, y, opt_state, g), Duals(h_i, mu_i)), loss

        def client_final(shared, done):
            (x, _), (h_i, mu_i) = shared, done.duals
            delta = optax.tree.sub(done.params, x)
            return (delta, mu_i), Duals(optax.tree.add_scale(h_i, -1 / lam, delta), mu_i)

        program = fc.ClientProgram(client_init, client_step, client_final)
        duals = fc.gather(state.client_duals, cohort)
        results = clients.run(program, (state.params, state.perturbation), cohort, key, client_inputs=duals)
        delta, mean_mu = results.aggregate
        dual = fc.add_scaled(state.dual, -jnp.sum(results.weights) / num_clients / lam, delta)
        params = fc.add_scaled(optax.tree.add(state.params, delta), -lam, dual)
        rows = fc.scatter(state.client_duals, cohort, results.outputs)
        return FedSmooState(params, of_radius_rho(mean_mu), dual, rows), results

    return fc.federated(init, update)
