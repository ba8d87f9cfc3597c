"""SCAFFOLD."""

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
    full_gradient_program,
    gather,
    global_client_params,
    local_training,
    local_work,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    value_and_grad,
)


class ScaffoldState(NamedTuple):
    """Global model x, server control c, every client's control c_i, and the number of rounds done."""

    params: Params
    control: Params
    client_controls: ClientTable
    round: Array


def scaffold(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    server_lr: Scalar = 1.0,
    option: str = "II",
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """SCAFFOLD: control variates cancel the drift of the clients.

    Client, from y = x:  y <- y - lr (g_i(y) + c - c_i), K times;
                         c_i+ = grad f_i(x) (option I) or the mean of the K raw gradients g_i(y) (option II).
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  c <- c + (1 / N) sum_S (c_i+ - c_i).

    Down: x, c (2P). Up: y_i - x, c_i+ - c_i (2P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round giving one.
      num_clients: size of the population, N.
      server_lr: 1 replaces the model by the average.
      option: "II" reuses the gradients of the local steps; "I" makes an extra pass over the client's examples at x.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: option II is usually written c_i - c + (x - y_i) / (K lr), which equals the mean of the raw
    gradients for plain SGD with a constant step; the mean holds for any client optimizer and any number of steps.

    Paper: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning", 2020, algorithm 1.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("server_lr", server_lr, low=0)
    checks.one_of("option", option, ("I", "II"))
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> ScaffoldState:
        zeros = optax.tree.zeros_like(params)
        return ScaffoldState(params, zeros, client_table(num_clients, zeros), jnp.int32(0))

    def round(state: ScaffoldState, cohort: Cohort, key: Key) -> tuple[ScaffoldState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)
        controls = gather(state.client_controls, cohort)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, _ = shared
            c_i, full_gradient = client_input
            c_i_new = full_gradient if option == "I" else optax.tree.zeros_like(x)
            return x, optimizer.init(x), c_i, c_i_new, jnp.int32(0)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            _, c = shared
            y, opt_state, c_i, c_i_new, k = carry
            loss, g = gradient(y, batch)
            corrected = jax.tree.map(lambda g, c, c_i: g + (c - c_i), g, c, c_i)
            y, opt_state = descend(optimizer, y, opt_state, corrected)
            if option == "II":  # a sum of gradients until client_final
                c_i_new = optax.tree.add(c_i_new, g)
            return (y, opt_state, c_i, c_i_new, k + 1), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            y, _, c_i, c_i_new, k = carry
            if option == "II":
                c_i_new = jax.tree.map(lambda g: g / k.astype(g.dtype), c_i_new)
            return (optax.tree.sub(y, x), optax.tree.sub(c_i_new, c_i)), c_i_new

        if option == "I":
            full = clients._replace(work=local_work(clients.work.batch_size, order="sequential"))
            inputs = controls, full.run(full_gradient_program(loss_fn), state.params, (), cohort, key).outputs
        else:
            inputs = controls, ()
        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, (state.params, state.control), inputs, cohort, key)
        displacement, control_change = results.aggregate
        params = move(state.params, server_lr, displacement)
        # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
        share = jnp.sum(results.weights) / num_clients
        control = move(state.control, share, control_change)
        client_controls = scatter(state.client_controls, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return ScaffoldState(params, control, client_controls, state.round + 1), metrics

    def client_params(state: ScaffoldState, ids: Array) -> Params:
        return global_client_params(state.params, ids)

    return Algorithm(init, round, lambda state: state.params, client_params)
