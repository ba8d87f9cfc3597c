"""SCAFFOLD."""

from typing import Any, NamedTuple, Unpack

import optax

import fedjax_core as fc
from algorithms.parts import controls


class ScaffoldState(NamedTuple):
    """Global model x, server control c, every client's control c_i, and the number of rounds done."""

    params: fc.Params
    control: fc.Params
    client_controls: fc.ClientTable
    round: fc.Counter = 0


def scaffold(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar = 1.0,
    option: str = "II",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.one_of("option", option, ("I", "II"))
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)
    gradient_at_x = fc.kept_by_client(fc.full_gradient_program(loss_fn))

    def init(params: fc.Params) -> ScaffoldState:
        return ScaffoldState(params, *controls.start(params, num_clients))

    def direction(y, batch, shared, own):
        (_, c), (c_i, _) = shared, own
        loss, g = gradient(y, batch)
        return loss, controls.corrected(g, c, c_i), g

    def upload(done, shared):
        (x, _), (c_i, at_x) = shared, done.own
        c_i_new = at_x if option == "I" else done.mean
        return (optax.tree.sub(done.params, x), optax.tree.sub(c_i_new, c_i)), c_i_new

    def update(state: ScaffoldState, cohort: fc.Cohort, key: fc.Key):
        x: Any = state.params
        at_x: fc.PyTree = ()
        passes: list[fc.ClientResults] = []
        if option == "I":
            passes = [clients.full_pass().run(gradient_at_x, x, cohort, key)]
            at_x, x = passes[0].outputs, fc.Message(x, 0)  # clients have x from the first pass
        program = fc.local_descent(
            fc.optimizer_at(client_optimizer, state.round),
            direction,
            start=fc.first_part,
            upload=upload,
            with_mean=option == "II",
        )
        shared = x, fc.sums.cast_like(state.control, state.params)
        own = fc.gather(state.client_controls, cohort), at_x
        results = clients.run(program, shared, cohort, key, client_inputs=own)
        delta, change = results.aggregate
        params = fc.add_scaled(state.params, server_lr, delta)
        control, client_controls = controls.updated(state, change, results, cohort, num_clients)
        return ScaffoldState(params, control, client_controls), fc.merge_phases(results, bytes_of=passes)

    return fc.federated(init, update)
