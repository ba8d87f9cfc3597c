"""FedNova."""

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
    Cohort,
    Key,
    Length,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checks,
    descend,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    round_metrics,
    sums,
    value_and_grad,
)


class FedNovaState(NamedTuple):
    """Global model x, server momentum v in the units of a gradient times steps, and the number of rounds done."""

    params: Params
    velocity: Params
    round: Array


class FedNovaMetrics(NamedTuple):
    """Effective length of the round's local work: sum_S p_i T_i."""

    effective_length: Array


def fednova(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    mu: Scalar = 0.0,
    server_lr: Scalar = 1.0,
    server_momentum: Scalar = 0.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedNova: normalizes displacements by the amount of local work, so that busy clients do not count double.

    Client, from y = x:  y <- y - lr (g_i(y) + mu (y - x)), K_i times (or with momentum);
                         A_i = lr ||a_i||_1, where the displacement is -lr sum_k a_i,k g_i,k;
                         T_i = the same without the proximal term (lr K_i for plain SGD).
    Server:              D = (sum_S p_i T_i) sum_S p_i (y_i - x) / A_i,  sum_S p_i = 1;
                         v <- server_momentum v + D / lr;  x <- x + server_lr lr v, with this round's lr.

    Down: x (1P). Up: (y_i - x) / A_i and T_i (1P + 1).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer that is linear in small gradients (SGD, maybe with momentum, clipping, weight
        decay), started anew in every round, or a function of the round, or of the round and the client's id, giving
        one.
      mu: proximal weight of the local solver.
      server_lr: step size of the server.
      server_momentum: momentum on the server, in [0, 1). What it remembers is without lr, as in the authors' code, so
        that old gradients too are taken at the rate of the round; where clients have rates of their own, at the lr with
        sum_S p_i T_i = lr sum_S p_i T_i / lr_i.
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
    checks.scalar("mu", mu, low=0)
    checks.scalar("server_lr", server_lr, low=0)
    checks.scalar("server_momentum", server_momentum, low=0, high=1, high_open=True)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedNovaState:
        return FedNovaState(params, sums.wide_zeros(params), jnp.int32(0))

    def round(state: FedNovaState, cohort: Cohort, key: Key) -> tuple[FedNovaState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(x: Params, client_input: Any, key: Key) -> Any:
            return x, optimizer.init(x), Length.start(optimizer), Length.start(optimizer)

        def client_step(x: Params, carry: Any, batch: Batch) -> Any:
            y, opt_state, length, plain_length = carry
            loss, g = gradient(y, batch)
            g = jax.tree.map(lambda g, y, x: g + mu * (y - x), g, y, x)
            y, opt_state = descend(optimizer, y, opt_state, g)
            return (y, opt_state, length.extend(optimizer, mu), plain_length.extend(optimizer)), loss

        def client_final(x: Params, carry: Any) -> Any:
            y, _, length, plain_length = carry
            # The rate is known to the server, which has given the optimizer.
            first_step = -Length.start(optimizer).extend(optimizer).z
            return (length.normalize(optax.tree.sub(y, x)), -plain_length.z), (-plain_length.z, first_step)

        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, state.params, (), cohort, key)
        normalized, effective_length = results.aggregate
        lengths, rates = results.outputs
        lr = common_rate(lengths, rates, results.weights)
        velocity = jax.tree.map(
            lambda v, d: (server_momentum * v + (effective_length / lr).astype(v.dtype) * d).astype(v.dtype),
            state.velocity,
            normalized,
        )
        velocity = optax.tree.where(cohort.num_participants > 0, velocity, state.velocity)
        step = jnp.where(cohort.num_participants > 0, server_lr * lr, 0.0)
        params = move(state.params, step, velocity)
        metrics = round_metrics(results, cohort, state.params, params, FedNovaMetrics(effective_length))
        return FedNovaState(params, velocity, state.round + 1), metrics

    return global_algorithm(init, round)


def common_rate(lengths: Array, rates: Array, weights: Array) -> Array:
    """float[], the lr between D and the steps that it stands for, (sum_S p_i T_i) / (sum_S p_i T_i / lr_i).

    Args:
      lengths: float[C], T_i.
      rates: float[C], lr_i.
      weights: float[C], 0 in slots that took no part.

    Returns:
      That of all where all are equal; 1 where nobody has moved.
    """
    taken = (weights > 0) & (rates > 0)
    largest = jnp.max(jnp.where(taken, rates, 0))
    # In proportion to the largest, so that equal rates cost no rounding.
    ratio = jnp.where(taken, rates / jnp.where(largest > 0, largest, 1), 1)
    work = jnp.where(taken, weights.astype(lengths.dtype) * lengths, 0)
    steps = jnp.sum(work / ratio)
    return jnp.where(steps > 0, largest * (jnp.sum(work) / jnp.where(steps > 0, steps, 1)), 1)
