"""FedFix: asynchronous, buffered and fixed-interval aggregation."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from algorithms.optimization.fedau import check_probabilities, inverse_probabilities
from algorithms.optimization.fedavg import Gradient, displacement_program, plain_gradient
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
    gather,
    global_algorithm,
    global_client_params,
    local_training,
    move,
    num_scalars,
    optimizer_at,
    round_metrics,
    scatter,
    weighted_sum,
)


class FedFixState(NamedTuple):
    """Global model x, the model x_i that each client has received last, and the number of the server's steps."""

    params: Params
    starts: ClientTable
    round: Array


def fedfix(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    probabilities: Any = "uniform",
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedFix: clients deliver when done and go on from the model of that moment; also asynchronous FedAvg and FedBuff.

    Client, from y = x_i:  y <- y - lr g_i(y), K times;  x_i is the model that it received when it delivered last.
    Server:                x <- x + server_lr sum_S (p_i / prob_i) (y_i - x_i);  x_i <- x for those who delivered.

    A round is one step of the server and its cohort S are the clients that deliver then: one (asynchronous FedAvg), a
    given number (FedBuff), or those who are done after a fixed interval (FedFix). `samplers.deliveries` finds them
    from the clients' computing times. All clients begin with the first model.

    Down: x to those who delivered (1P). Up: y_i - x_i (1P). In a simulation the x_i take N models.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      probabilities: prob_i, the share of the server's steps at which client i delivers, so that it weighs p_i in the
        long run; float[num_clients] in (0, 1] (`Deliveries.shares`), or one number for all. "uniform" is |S| / N. For
        the "identical" weights of the paper take 1 / N (asynchronous, w = 1) or c / N (a buffer of c, w = 1 / c): then
        fast clients count for more.
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The weights give p_i.

    Differences: none in the update. FedBuff as its authors run it also divides by a power of the staleness and has the
    early clients of a buffer go on at once; here, as in the code of this paper, they wait. Local work is done when it
    is delivered, from the model received before, which gives the same numbers.

    Paper: Fraboni, Vidal, Kameni, Lorenzi, "A General Theory for Federated Optimization with Asynchronous and
    Heterogeneous Clients Updates", 2023.
    """
    checks.positive_int("num_clients", num_clients, "the size of the population")
    check_probabilities(probabilities, num_clients)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    gradient = plain_gradient(loss_fn)

    def init(params: Params) -> FedFixState:
        return FedFixState(params, client_table(num_clients, params), jnp.int32(0))

    def round(state: FedFixState, cohort: Cohort, key: Key) -> tuple[FedFixState, Metrics]:
        program = stale_program(gradient, client_optimizer, state.round)
        inputs = gather(state.starts, cohort), inverse_probabilities(probabilities, cohort)
        results = clients.run(program, (), inputs, cohort, key, aggregator=weighted_sum())
        params = move(state.params, server_lr / num_clients, results.aggregate)
        starts = scatter(state.starts, cohort, global_client_params(params, cohort.ids))
        metrics = stale_metrics(round_metrics(results, cohort, state.params, params), params)
        return FedFixState(params, starts, state.round + 1), metrics

    return global_algorithm(init, round)


def stale_program(gradient: Gradient, client_optimizer: ClientOptimizer, round: Array) -> ClientProgram:
    """Local training from the client's own x_i; its input is x_i and a factor w_i: it uploads w_i (y_i - x_i)."""
    plain = displacement_program(gradient, optimizer_at(client_optimizer, round))

    def client_init(shared: Any, client_input: Any, key: Key) -> Any:
        start, w = client_input
        return plain.init(start, (), key), start, w

    def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
        carry, start, w = carry
        carry, loss = plain.step(start, carry, batch)
        return (carry, start, w), loss

    def client_final(shared: Any, carry: Any) -> Any:
        carry, start, w = carry
        displacement, _ = plain.final(start, carry)
        return jax.tree.map(lambda d: w.astype(d.dtype) * d, displacement), ()

    return ClientProgram(client_init, client_step, client_final)


def stale_metrics(metrics: Metrics, params: Params) -> Metrics:
    """Counts the new model as downloaded, which those who have delivered receive after the step."""
    return metrics._replace(downloaded=jnp.int32(num_scalars(params)))
