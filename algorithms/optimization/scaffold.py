"""SCAFFOLD."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import Gradient, plain_gradient
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
    global_algorithm,
    local_training,
    local_work,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    sums,
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
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
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
    checks.one_of("option", option, ("I", "II"))
    return controlled_averaging(
        plain_gradient(loss_fn),
        client_optimizer,
        num_clients=num_clients,
        server_lr=server_lr,
        new_control=full_gradient_program(loss_fn) if option == "I" else None,
        **local,
    )


def controlled_averaging(
    gradient: Gradient,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    server_lr: Scalar,
    new_control: ClientProgram | None = None,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """SCAFFOLD along any local direction g; c_i+ is the mean of the K g, or what `new_control` would upload at x."""
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)

    def init(params: Params) -> ScaffoldState:
        zeros = optax.tree.zeros_like(params)
        return ScaffoldState(params, sums.wide_zeros(params), client_table(num_clients, zeros), jnp.int32(0))

    def round(state: ScaffoldState, cohort: Cohort, key: Key) -> tuple[ScaffoldState, Metrics]:
        controls = gather(state.client_controls, cohort)
        given: Any = ()
        if new_control is not None:
            whole = clients._replace(work=local_work(clients.work.batch_size, order="sequential"))
            given = whole.run(kept_by_the_client(new_control), state.params, (), cohort, key).outputs
        optimizer = optimizer_at(client_optimizer, state.round)
        program = controlled_program(gradient, optimizer, given=new_control is not None)
        sent = state.params, sums.cast_like(state.control, state.params)
        results = clients.run(program, sent, (controls, given), cohort, key)
        displacement, control_change = results.aggregate
        params = move(state.params, server_lr, displacement)
        # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
        share = jnp.sum(results.weights) / num_clients
        control = move(state.control, share, control_change)
        client_controls = scatter(state.client_controls, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return ScaffoldState(params, control, client_controls, state.round + 1), metrics

    return global_algorithm(init, round)


def kept_by_the_client(program: ClientProgram) -> ClientProgram:
    """The program with its upload as output instead: nothing is sent."""
    return program._replace(final=lambda shared, carry: ((), program.final(shared, carry)[0]))


def controlled_program(
    gradient: Gradient, optimizer: optax.GradientTransformation, *, given: bool = False
) -> ClientProgram:
    """Local training along g + c - c_i, from the shared (x, c) and the input (c_i, c_i+).

    Uploads y_i - x and c_i+ - c_i, and keeps c_i+. That is the mean of the K directions g, or the input if it is given.
    """

    def client_init(shared: Any, client_input: Any, key: Key) -> Any:
        x, _ = shared
        c_i, c_i_new = client_input
        return x, optimizer.init(x), c_i, c_i_new if given else sums.start_tree(x), jnp.int32(0)

    def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
        x, c = shared
        y, opt_state, c_i, c_i_new, k = carry
        loss, g = gradient(x, y, batch)
        corrected = jax.tree.map(lambda g, c, c_i: g + (c - c_i), g, c, c_i)
        y, opt_state = descend(optimizer, y, opt_state, corrected)
        if not given:  # a sum of gradients until client_final
            c_i_new = sums.add_tree(c_i_new, g)
        return (y, opt_state, c_i, c_i_new, k + 1), loss

    def client_final(shared: Any, carry: Any) -> Any:
        x, _ = shared
        y, _, c_i, c_i_new, k = carry
        if not given:
            c_i_new = sums.mean_tree(c_i_new, k, x)
        return (optax.tree.sub(y, x), optax.tree.sub(c_i_new, c_i)), c_i_new

    return ClientProgram(client_init, client_step, client_final)
