"""FedNova."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class FedNovaState(NamedTuple):
    """Global model x, server momentum v in the units of a gradient times steps, and the number of rounds done."""

    params: fc.Params
    velocity: fc.Params
    round: fc.Counter = 0


class FedNovaMetrics(NamedTuple):
    """Effective length of the round's local work: sum_S p_i T_i."""

    effective_length: fc.Array


def fednova(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    mu: fc.Scalar = 0.0,
    server_lr: fc.Scalar = 1.0,
    server_momentum: fc.Scalar = 0.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedNova: normalizes displacements by the amount of local work, so that busy clients do not count double.

    Client, from y = x:  y <- y - lr (g_i(y) + mu (y - x)), K_i times (or with momentum);
                         A_i = lr ||a_i||_1, where the displacement is -lr sum_k a_i,k g_i,k;
                         T_i = the same without the proximal term (lr K_i for plain SGD).
    Server:              D = (sum_S p_i T_i) sum_S p_i (y_i - x) / A_i,  sum_S p_i = 1;
                         v <- server_momentum v + D / lr;  x <- x + server_lr lr v, with this round's lr =
                         (sum_S p_i T_i) / (sum_S p_i T_i / lr_i).

    Down: x (1P). Up: (y_i - x) / A_i, T_i and T_i / lr_i (1P + 2).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer that is linear in small gradients (SGD, maybe with momentum, clipping, weight
        decay), started anew in every round, or a function of the round, or of the round and the client's id, giving
        one.
      mu: proximal weight of the local solver.
      server_lr: step size of the server.
      server_momentum: momentum on the server, in [0, 1). What it remembers is without lr, as in the authors' code, so
        that old gradients too are taken at the rate of the round.
      **local: batch_size, num_epochs or num_steps (arrays give clients different work), order, weights, plan; see
        `LocalOptions`.

    Differences: A_i and T_i are found by running the same optimizer on one scalar whose gradient is 1 (+ mu z), which
    gives the paper's closed forms for plain, momentum and proximal SGD and holds for learning rates that change. The
    lr_i of the server's momentum is the length of the optimizer's first step. The paper leaves the effective number of
    steps to the server; T_i in it, not A_i, is the choice of the authors' code (with mu it takes the number of steps,
    also where clients have momentum). With momentum and mu together that code adds both counts in every step, a <- (1 -
    lr mu) (a + counter) + 1, which is more than the weights of the gradients sum to; here A_i is that sum.

    Paper: Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", 2020, equations 4 and 5.
    """
    fc.checks.scalar("mu", mu, low=0)
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.scalar("server_momentum", server_momentum, low=0, high=1, high_open=True)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedNovaState:
        return FedNovaState(params, fc.sums.wide_zeros(params))

    def direction(y, batch, x, _):
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, y, x: g + mu * (y - x), g, y, x)

    def update(state: FedNovaState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def upload(done, x):
            T_i, A_i, lr_i = done.opt_state.length, done.opt_state.damped_length, fc.first_length(optimizer)
            tau_i = T_i / jnp.where(lr_i > 0, lr_i, 1)
            return (fc.per_length(optax.tree.sub(done.params, x), A_i), T_i, tau_i), ()

        program = fc.local_descent(fc.measured(optimizer, mu), direction, upload=upload)
        results = clients.run(program, state.params, cohort, key)
        normalized, T, tau = results.aggregate
        velocity = jax.tree.map(
            lambda v, d: (server_momentum * v + tau.astype(v.dtype) * d).astype(v.dtype), state.velocity, normalized
        )
        lr = T / jnp.where(tau > 0, tau, 1)
        state = FedNovaState(fc.add_scaled(state.params, server_lr * lr, velocity), velocity)
        return state, results, FedNovaMetrics(T)

    return fc.federated(init, update)
