"""FedDyn."""

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
    client_weights,
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


class FedDynState(NamedTuple):
    """Global model x, every client's shift H_i, the mean of the H_i over all clients, and the number of rounds done."""

    params: Params
    shift: Params
    client_shifts: ClientTable
    round: Array


def feddyn(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    alpha: Scalar = 0.1,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedDyn: a linear term per client aligns local with global stationary points.

    Client, from y = x:  y <- y - lr (g_i(y) + alpha_i (y - x + H_i)), K times;  H_i <- H_i + y_i - x.
    Server:              H <- H + (1 / N) sum_S (y_i - x);  x <- mean_S y_i + H.

    H_i = -(accumulated gradient of client i) / alpha_i, and H is the mean of the H_i over all N clients.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      alpha: regularization, above 0.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. Weights p_i of the
        clients enter as alpha_i = alpha / (N p_i), as in the authors' code; the averages above stay plain.

    Differences: none. The paper writes the same recursion with gradients, h = -alpha H. The authors' repository
    also reports averages of local models; the server model defined here is theirs.

    Paper: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic
    Regularization", 2021, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("alpha", alpha, low=0, low_open=True)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedDynState:
        # In float32 at least: displacements of a bfloat16 model are soon lost in the rounding of their sum over rounds.
        zeros = sums.wide_zeros(params)
        return FedDynState(params, zeros, client_table(num_clients, zeros), jnp.int32(0))

    def round(state: FedDynState, cohort: Cohort, key: Key) -> tuple[FedDynState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)
        relative = client_weights(clients.weights, cohort)  # N p_i

        def client_init(x: Params, client_input: Any, key: Key) -> Any:
            shift, alpha_i = client_input
            return x, optimizer.init(x), shift, alpha_i

        def client_step(x: Params, carry: Any, batch: Batch) -> Any:
            y, opt_state, shift, alpha_i = carry
            loss, g = gradient(y, batch)
            g = jax.tree.map(
                lambda g, y, x, h: (g + alpha_i.astype(g.dtype) * (y - x + h)).astype(g.dtype), g, y, x, shift
            )
            y, opt_state = descend(optimizer, y, opt_state, g)
            return (y, opt_state, shift, alpha_i), loss

        def client_final(x: Params, carry: Any) -> Any:
            y, _, shift, _ = carry
            displacement = optax.tree.sub(y, x)
            return displacement, optax.tree.add(shift, displacement)

        alphas = alpha / jnp.where(relative > 0, relative, 1)
        inputs = (gather(state.client_shifts, cohort), alphas)
        program = ClientProgram(client_init, client_step, client_final)
        plain = clients._replace(weights="uniform")
        results = plain.run(program, state.params, inputs, cohort, key)
        share = jnp.sum(results.weights) / num_clients
        shift = move(state.shift, share, results.aggregate)
        moved = jax.tree.map(lambda x, d, h: (x + d + h).astype(x.dtype), state.params, results.aggregate, shift)
        params = optax.tree.where(cohort.num_participants > 0, moved, state.params)
        client_shifts = scatter(state.client_shifts, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedDynState(params, shift, client_shifts, state.round + 1), metrics

    return global_algorithm(init, round)
