"""FedAvg-M, SCAFFOLD-M and their variance-reduced forms FedAvg-M-VR and SCAFFOLD-M-VR."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.drift.fedcm import fedcm
from algorithms.parts import controls, unequal_work


def fedavg_m(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    beta: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAvg-M: the previous global direction in every local step, which makes FedAvg robust to heterogeneous clients.

    Client, from y = x:  y <- y - lr (beta g_i(y) + (1 - beta) G), K times.
    Server:              G <- mean_S (x - y_i) / (lr K);  x <- x - server_lr (lr K) G.

    The paper's server step is gamma = server_lr lr K. With everyone taking part, beta of order sqrt(N K / R) over R
    rounds and gamma of order beta, it converges at a constant lr without any bound on how unlike the clients are.

    With unequal work lr K is mean_S lr K_i, or with aggregation="normalized" G is mean_S (x - y_i) / (lr K_i).

    Down: x, G (2P). Up: x - y_i and lr K_i (1P + 1; the scalar is known where all do the same work).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      beta: weight of the fresh gradient, in (0, 1]; 1 is FedAvg.
      server_lr: 1 replaces the model by the average.
      aggregation: "mean" or "normalized", for clients with unequal work; see `fedcm`.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: none for equal work. The update is that of FedCM with alpha = beta; what is new in the paper is the
    theory. Not to be confused with FedAvgM (`fedavgm`), whose momentum is on the server alone.

    Paper: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", 2024,
    FedAvg-M.
    """
    fc.checks.scalar("beta", beta, low=0, high=1, low_open=True)
    return fedcm(loss_fn, client_optimizer, alpha=beta, server_lr=server_lr, aggregation=aggregation, **local)


class FedAvgMVRState(NamedTuple):
    """Global model x, direction G (uphill), the server step that led to x, and the number of rounds done.

    The model before is x + step G.
    """

    params: fc.Params
    direction: fc.Params
    step: fc.Array
    round: fc.Counter = 0


def fedavg_m_vr(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    beta: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAvg-M-VR: FedAvg-M whose direction follows the model by differences of gradients on the same batch.

    Client, from y = x:  y <- y - lr (g_i(y) + (1 - beta) (G - g_i(x_prev))), both g_i on one batch, K times.
    Server:              G <- mean_S (x - y_i) / (lr K);  x_prev <- x;  x <- x - server_lr (lr K) G.

    With unequal work lr K is mean_S lr K_i, or with aggregation="normalized" G is mean_S (x - y_i) / (lr K_i).

    Down: x, G and the last server step, which give x_prev (2P + 1). Up: x - y_i and lr K_i (1P + 1). Two
    gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      beta: weight of the fresh gradient, in (0, 1]; 1 is FedAvg.
      server_lr: 1 replaces the model by the average; the paper's server step is gamma = server_lr lr K.
      aggregation: "mean" or "normalized", for clients with unequal work; see `fedcm`.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: the paper starts G from a gradient at the first model; here it starts from 0, and the error of G that
    this makes shrinks by 1 - beta every round. `state._replace(direction=...)` starts it elsewhere.

    Paper: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", 2024,
    FedAvg-M-VR.
    """
    fc.checks.scalar("beta", beta, low=0, high=1, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.one_of("aggregation", aggregation, unequal_work.RULES)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedAvgMVRState:
        return FedAvgMVRState(params, optax.tree.zeros_like(params), jnp.zeros(()))

    def direction(y, batch, shared, _):
        x, G, step = shared
        loss, g = gradient(y, batch)
        _, at_previous = gradient(fc.add_scaled(x, step, G), batch)
        return loss, jax.tree.map(lambda g, d, b: g + (1 - beta) * (d - b), g, G, at_previous)

    def update(state: FedAvgMVRState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(
            fc.measured(fc.optimizer_at(client_optimizer, state.round)),
            direction,
            start=fc.first_part,
            upload=unequal_work.upload(aggregation),
        )
        results = clients.run(program, (state.params, state.direction, state.step), cohort, key)
        decrease, G, length = unequal_work.mean(results.aggregate, aggregation)
        return FedAvgMVRState(fc.add_scaled(state.params, -server_lr, decrease), G, server_lr * length), results

    return fc.federated(init, update)


class ScaffoldMState(NamedTuple):
    """Global model x, direction G (uphill), the server step that led to x, server control c, every client's control
    c_i, and the number of rounds done.

    The model before is x + step G.
    """

    params: fc.Params
    direction: fc.Params
    step: fc.Array
    control: fc.Params
    client_controls: fc.ClientTable
    round: fc.Counter = 0


def scaffold_m(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    beta: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """SCAFFOLD-M: SCAFFOLD with the previous global direction in every local step.

    Client, from y = x:  y <- y - lr (beta (g_i(y) - c_i + c) + (1 - beta) G), K times;
                         c_i+ = mean of the K raw gradients g_i(y).
    Server:              G <- mean_S (x - y_i) / (lr K);  x <- x - server_lr (lr K) G;
                         c <- c + (1 / N) sum_S (c_i+ - c_i).

    With unequal work lr K is mean_S lr K_i, or with aggregation="normalized" G is mean_S (x - y_i) / (lr K_i).

    Down: x, G, c (3P). Up: x - y_i, lr K_i and c_i+ - c_i (2P + 1).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      num_clients: size of the population, N.
      beta: weight of the fresh gradient, in (0, 1]; 1 is SCAFFOLD.
      server_lr: 1 replaces the model by the average; the paper's server step is gamma = server_lr lr K.
      aggregation: "mean" or "normalized", for clients with unequal work; see `fedcm`.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: none known. Clients need only the sum beta c + (1 - beta) G, so 2P down and, since c_i+ follows from
    y_i for plain SGD, 1P up would do; what is counted is what the paper sends.

    Paper: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", 2024,
    SCAFFOLD-M.
    """
    fc.checks.scalar("beta", beta, low=0, high=1, low_open=True)
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, shared, c_i):
        _, c, G = shared
        loss, g = gradient(y, batch)
        # v = beta (g - c_i + c) + (1 - beta) G
        v = jax.tree.map(lambda g, c, c_i, d: g + beta * (c - c_i) + (1 - beta) * (d - g), g, c, c_i, G)
        return loss, v, g

    return _controlled(
        direction,
        client_optimizer,
        num_clients=num_clients,
        server_lr=server_lr,
        aggregation=aggregation,
        download=lambda state: (state.direction,),
        **local,
    )


def scaffold_m_vr(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    beta: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """SCAFFOLD-M-VR: SCAFFOLD-M whose direction follows the model by differences of gradients on the same batch.

    Client, from y = x:  y <- y - lr (g_i(y) + beta (c - c_i) + (1 - beta) (G - g_i(x_prev))), K times, both g_i on
                         one batch;  c_i+ = mean of the K raw gradients g_i(y).
    Server:              G <- mean_S (x - y_i) / (lr K);  x_prev <- x;  x <- x - server_lr (lr K) G;
                         c <- c + (1 / N) sum_S (c_i+ - c_i).

    With unequal work lr K is mean_S lr K_i, or with aggregation="normalized" G is mean_S (x - y_i) / (lr K_i).

    Down: x, G, c and the last server step, which with G gives x_prev (3P + 1). Up: x - y_i, lr K_i and c_i+ - c_i
    (2P + 1). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      num_clients: size of the population, N.
      beta: weight of the fresh gradient, in (0, 1]; 1 is SCAFFOLD.
      server_lr: 1 replaces the model by the average; the paper's server step is gamma = server_lr lr K.
      aggregation: "mean" or "normalized", for clients with unequal work; see `fedcm`.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: the paper starts G and the c_i from gradients at the first model; here they start from 0, and the
    error of G that this makes shrinks by about 1 - beta every round. `state._replace(...)` starts them elsewhere.

    Paper: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", 2024,
    SCAFFOLD-M-VR.
    """
    fc.checks.scalar("beta", beta, low=0, high=1, low_open=True)
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, shared, c_i):
        x, c, G, step = shared
        loss, g = gradient(y, batch)
        _, b = gradient(fc.add_scaled(x, step, G), batch)
        # v = g - b + beta (b - c_i + c) + (1 - beta) G, the model before last standing in b
        v = jax.tree.map(lambda g, c, c_i, d, b: g + beta * (c - c_i) + (1 - beta) * (d - b), g, c, c_i, G, b)
        return loss, v, g

    return _controlled(
        direction,
        client_optimizer,
        num_clients=num_clients,
        server_lr=server_lr,
        aggregation=aggregation,
        download=lambda state: (state.direction, state.step),  # x_prev = x + step G
        **local,
    )


def _controlled(
    direction: Callable[..., Any],
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    server_lr: fc.Scalar,
    aggregation: str,
    download: Callable[[ScaffoldMState], tuple[fc.PyTree, ...]],
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """The two parts that both have: SCAFFOLD's controls, and the global direction G.

    Args:
      direction: `direction(y, batch, (x, c, *download), c_i) -> (loss, v, g)`.
      download: what a method sends besides x and c, from its state.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.one_of("aggregation", aggregation, unequal_work.RULES)
    clients = fc.local_training(**local)
    decrease_of = unequal_work.upload(aggregation)

    def init(params: fc.Params) -> ScaffoldMState:
        zeros = optax.tree.zeros_like(params)
        return ScaffoldMState(params, zeros, jnp.zeros(()), *controls.start(params, num_clients))

    def upload(done, shared):
        c_i, c_i_new = done.own, done.mean
        return (decrease_of(done, shared)[0], optax.tree.sub(c_i_new, c_i)), c_i_new

    def update(state: ScaffoldMState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.measured(fc.optimizer_at(client_optimizer, state.round))
        program = fc.local_descent(optimizer, direction, start=fc.first_part, upload=upload, with_mean=True)
        shared = state.params, fc.sums.cast_like(state.control, state.params), *download(state)
        results = clients.run(program, shared, cohort, key, client_inputs=fc.gather(state.client_controls, cohort))
        work, change = results.aggregate
        decrease, G, length = unequal_work.mean(work, aggregation)
        params = fc.add_scaled(state.params, -server_lr, decrease)
        control, client_controls = controls.updated(state, change, results, cohort, num_clients)
        return ScaffoldMState(params, G, server_lr * length, control, client_controls), results

    return fc.federated(init, update)
