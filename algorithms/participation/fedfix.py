"""FedFix: asynchronous, buffered and fixed-interval aggregation."""

from typing import NamedTuple, Unpack

import fedjax_core as fc
from algorithms.parts import participation, stale


class FedFixState(NamedTuple):
    """Global model x, the model x_i that each client has received last, and the number of the server's steps."""

    params: fc.Params
    starts: fc.ClientTable
    round: fc.Counter = 0


def fedfix(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    probabilities: str | fc.ArrayLike = "uniform",
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    participation.check_probabilities(probabilities, num_clients)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedFixState:
        return FedFixState(params, fc.client_table(num_clients, params))

    def update(state: FedFixState, cohort: fc.Cohort, key: fc.Key):
        program = stale.descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        inverse = participation.inverse_probabilities(probabilities, cohort)
        own = fc.gather(state.starts, cohort), inverse
        results = clients.run(program, (), cohort, key, client_inputs=own, aggregator=fc.weighted_sum())
        params = fc.add_scaled(state.params, server_lr / num_clients, results.aggregate)
        return FedFixState(params, stale.received(state.starts, cohort, params)), stale.downloads(
            results, cohort, params
        )

    return fc.federated(init, update)
