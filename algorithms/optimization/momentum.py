"""FedAvg-M, SCAFFOLD-M and their variance-reduced forms FedAvg-M-VR and SCAFFOLD-M-VR."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import plain_gradient
from algorithms.optimization.fedcm import AGGREGATIONS, client_momentum, local_work_done, mean_work_done
from fedjax_core import (
    Algorithm,
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
    ClientTable,
    Cohort,
    Key,
    Length,
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


def fedavg_m(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    beta: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedAvg-M: the previous global direction in every local step, which makes FedAvg proof against unlike clients.

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
    checks.scalar("beta", beta, low=0, high=1, low_open=True)
    return client_momentum(
        plain_gradient(loss_fn), client_optimizer, alpha=beta, server_lr=server_lr, aggregation=aggregation, **local
    )


class FedAvgMVRState(NamedTuple):
    """Global model x, direction G (uphill), the server step that led to x, and the number of rounds done.

    The model before is x + step G.
    """

    params: Params
    direction: Params
    step: Array
    round: Array


def fedavg_m_vr(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    beta: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    checks.scalar("beta", beta, low=0, high=1, low_open=True)
    checks.scalar("server_lr", server_lr, low=0)
    checks.one_of("aggregation", aggregation, AGGREGATIONS)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedAvgMVRState:
        return FedAvgMVRState(params, optax.tree.zeros_like(params), jnp.zeros(()), jnp.int32(0))

    def round(state: FedAvgMVRState, cohort: Cohort, key: Key) -> tuple[FedAvgMVRState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, _, _ = shared
            return x, optimizer.init(x), Length.start(optimizer)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            x, direction, step = shared
            y, opt_state, length = carry
            loss, g = gradient(y, batch)
            _, before = gradient(move(x, step, direction), batch)
            v = jax.tree.map(lambda g, d, b: g + (1 - beta) * (d - b), g, direction, before)
            y, opt_state = descend(optimizer, y, opt_state, v)
            return (y, opt_state, length.extend(optimizer)), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _, _ = shared
            y, _, length = carry
            return local_work_done(optax.tree.sub(x, y), length, aggregation), ()

        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, (state.params, state.direction, state.step), (), cohort, key)
        decrease, direction, length = mean_work_done(results.aggregate, aggregation)
        step = server_lr * length
        params = move(state.params, -server_lr, decrease)
        anybody = cohort.num_participants > 0
        direction, step = optax.tree.where(anybody, (direction, step), (state.direction, state.step))
        metrics = round_metrics(results, cohort, state.params, params)
        return FedAvgMVRState(params, direction, step, state.round + 1), metrics

    return global_algorithm(init, round)


class ScaffoldMState(NamedTuple):
    """Global model x, direction G (uphill), the server step that led to x, server control c, every client's control
    c_i, and the number of rounds done.

    The model before is x + step G.
    """

    params: Params
    direction: Params
    step: Array
    control: Params
    client_controls: ClientTable
    round: Array


def scaffold_m(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    beta: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    return _scaffold_momentum(
        loss_fn,
        client_optimizer,
        reduced=False,
        num_clients=num_clients,
        beta=beta,
        server_lr=server_lr,
        aggregation=aggregation,
        **local,
    )


def scaffold_m_vr(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    beta: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    return _scaffold_momentum(
        loss_fn,
        client_optimizer,
        reduced=True,
        num_clients=num_clients,
        beta=beta,
        server_lr=server_lr,
        aggregation=aggregation,
        **local,
    )


def _scaffold_momentum(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    reduced: bool,
    num_clients: int,
    beta: Scalar,
    server_lr: Scalar,
    aggregation: str,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """SCAFFOLD-M, variance-reduced or not."""
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("beta", beta, low=0, high=1, low_open=True)
    checks.scalar("server_lr", server_lr, low=0)
    checks.one_of("aggregation", aggregation, AGGREGATIONS)
    clients = local_training(**local)
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> ScaffoldMState:
        zeros = optax.tree.zeros_like(params)
        return ScaffoldMState(
            params, zeros, jnp.zeros(()), sums.wide_zeros(params), client_table(num_clients, zeros), jnp.int32(0)
        )

    def round(state: ScaffoldMState, cohort: Cohort, key: Key) -> tuple[ScaffoldMState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, c_i: Params, key: Key) -> Any:
            x, *_ = shared
            return x, optimizer.init(x), Length.start(optimizer), c_i, sums.start_tree(x), jnp.int32(0)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            x, direction, c, step = shared
            y, opt_state, length, c_i, total, k = carry
            loss, g = gradient(y, batch)
            # g itself in the place of the gradient at x_prev gives beta (g - c_i + c) + (1 - beta) G.
            before = gradient(move(x, step, direction), batch)[1] if reduced else g
            v = jax.tree.map(
                lambda g, c, c_i, d, b: g + beta * (c - c_i) + (1 - beta) * (d - b), g, c, c_i, direction, before
            )
            y, opt_state = descend(optimizer, y, opt_state, v)
            return (y, opt_state, length.extend(optimizer), c_i, sums.add_tree(total, g), k + 1), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, *_ = shared
            y, _, length, c_i, total, k = carry
            c_i_new = sums.mean_tree(total, k, x)
            upload = local_work_done(optax.tree.sub(x, y), length, aggregation), optax.tree.sub(c_i_new, c_i)
            return upload, c_i_new

        program = ClientProgram(client_init, client_step, client_final)
        control = sums.cast_like(state.control, state.params)
        shared = (state.params, state.direction, control, state.step if reduced else ())
        results = clients.run(program, shared, gather(state.client_controls, cohort), cohort, key)
        mean, control_change = results.aggregate
        decrease, direction, length = mean_work_done(mean, aggregation)
        step = server_lr * length
        params = move(state.params, -server_lr, decrease)
        anybody = cohort.num_participants > 0
        direction, step = optax.tree.where(anybody, (direction, step), (state.direction, state.step))
        # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
        control = move(state.control, jnp.sum(results.weights) / num_clients, control_change)
        client_controls = scatter(state.client_controls, cohort, results.outputs)
        metrics = round_metrics(results, cohort, state.params, params)
        return ScaffoldMState(params, direction, step, control, client_controls, state.round + 1), metrics

    return global_algorithm(init, round)
