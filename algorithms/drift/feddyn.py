"""FedDyn."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class FedDynState(NamedTuple):
    """Global model x, the mean H of the H_i over all clients, every client's shift H_i, and the rounds done."""

    params: fc.Params
    shift: fc.Params
    client_shifts: fc.ClientTable
    round: fc.Counter = 0


def feddyn(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    alpha: fc.Scalar = 0.1,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("alpha", alpha, low=0, low_open=True)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedDynState:
        # In float32 at least: displacements of a bfloat16 model are soon lost in the rounding of their sum over rounds.
        zeros = fc.sums.wide_zeros(params)
        return FedDynState(params, zeros, fc.client_table(num_clients, zeros))

    def direction(y, batch, x, own):
        H_i, alpha_i = own
        loss, g = gradient(y, batch)
        pulled = lambda g, y, x, h: (g + alpha_i.astype(g.dtype) * (y - x + h)).astype(g.dtype)  # noqa: E731
        return loss, jax.tree.map(pulled, g, y, x, H_i)

    def upload(done, x):
        H_i, _ = done.own
        delta = optax.tree.sub(done.params, x)
        return delta, optax.tree.add(H_i, delta)

    def update(state: FedDynState, cohort: fc.Cohort, key: fc.Key):
        relative = fc.client_weights(clients.weights, cohort)  # N p_i
        alphas = alpha / jnp.where(relative > 0, relative, 1)
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction, upload=upload)
        own = fc.gather(state.client_shifts, cohort), alphas
        results = clients._replace(weights="uniform").run(program, state.params, cohort, key, client_inputs=own)
        shift = fc.add_scaled(state.shift, jnp.sum(results.weights) / num_clients, results.aggregate)
        params = jax.tree.map(lambda x, d, h: (x + d + h).astype(x.dtype), state.params, results.aggregate, shift)
        shifts = fc.scatter(state.client_shifts, cohort, results.outputs)
        return FedDynState(params, shift, shifts), results

    return fc.federated(init, update)
