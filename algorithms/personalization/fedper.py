"""FedPer and LG-FedAvg: a part of the model stays at home; and training without any federation."""

from typing import Unpack

import fedjax_core as fc
from algorithms.parts import personal as parts


def fedper(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    personal: fc.Where = "head",
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedPer: a shared base and, for every client, a head of its own, trained together.

    Client, from (y, h) = (x, h_i):  (y, h) <- (y, h) - lr g_i(y, h), K times;  h_i <- h.
    Server:                          x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (P less the head). Up: y_i - x (the same).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      personal: which leaves of the model stay at home, as `fedjax_core.partition` takes it: paths, an expression, a
        function. None, `()`, is FedAvg; all of them is training alone.
      server_lr: 1 replaces the base by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The global model has the head that everybody began with. The view "personal" has each client's own.

    Differences: the paper weighs clients by their number of examples (`weights="examples"`).

    Paper: Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers", 2019, algorithms 1
    and 2.
    """

    def cut(params: fc.Params):
        return fc.partition(params, personal)

    return parts.trained_jointly(loss_fn, client_optimizer, cut, num_clients, server_lr, fc.local_training(**local))


def lg_fedavg(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    shared: fc.Where = "head",
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """LG-FedAvg: every client has a representation of its own, and the layers on top of it are shared.

    Client, from (v, y) = (v_i, x):  (v, y) <- (v, y) - lr g_i(v, y), K times;  v_i <- v.
    Server:                          x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (the top layers). Up: y_i - x (the same).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      shared: which leaves of the model are shared, as `fedjax_core.partition` takes it: paths, an expression, a
        function; all others stay at home. All of them is FedAvg, none, `()`, training alone.
      server_lr: 1 replaces the shared layers by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The global model has the representation that everybody began with. The view "personal" has each client's own.

    Differences: the authors begin with a model that FedAvg has trained; give it to `init`.

    Paper: Liang, Liu, Liu, Allen, Auerbach, Brent, Salakhutdinov, Morency, "Think Locally, Act Globally: Federated
    Learning with Local and Global Representations", 2020, algorithm 1.
    """

    def cut(params: fc.Params):
        top, own = fc.partition(params, shared)
        return own, top

    return parts.trained_jointly(loss_fn, client_optimizer, cut, num_clients, server_lr, fc.local_training(**local))
