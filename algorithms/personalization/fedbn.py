"""FedBN."""

from typing import Unpack

import fedjax_core as fc
from algorithms.parts import personal as parts


def fedbn(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    personal: fc.Where | None = None,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedBN: every client has normalizations of its own, and all else is averaged.

    Client, from (y, b) = (x, b_i):  (y, b) <- (y, b) - lr g_i(y, b), K times;  b_i <- b.
    Server:                          x <- x + server_lr sum_S w_i (y_i - x).
    b are scales and biases of the normalizations; their running statistics, where there are any, are the client's too.

    Down: x (P less the normalizations). Up: y_i - x (the same). Nothing of a normalization is sent.

    Args:
      loss_fn: a `Task`, which knows its normalizations by the type of their layers, `models.task(model)` for instance;
        or `loss_fn(params, batch, key) -> float[B]`, with `personal` given.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      personal: which leaves of the model stay at home, as `fedjax_core.partition` takes it; `task.paths("norm")` unless
        given, of batch, layer, group and other normalizations alike. `()` is FedAvg, but for the statistics.
      server_lr: 1 replaces the shared part by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    A task with statistics is carried through the rounds as by `with_statistics(method, "personal")`: begin with
    `init(task.init(key))`. The global model has the scales and biases that everybody began with, and the mean of the
    trained clients' statistics. The view "personal" has each client's own.

    Differences: the released code chooses what stays by "bn" in its name, which misses normalizations that are called
    otherwise, such as those of shortcuts; here the type of the layer says it. A re-implementation by others copies
    parameters only, so that nobody's running statistics are averaged or kept.

    Paper: Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
    2021, algorithm 1.
    """
    if personal is None:
        personal = _norms(loss_fn)

    def cut(params: fc.Params):
        return fc.partition(params, personal)

    method = parts.trained_jointly(loss_fn, client_optimizer, cut, num_clients, server_lr, fc.local_training(**local))
    if isinstance(loss_fn, fc.Task) and loss_fn.has_statistics:
        return fc.with_statistics(method, "personal", num_clients=num_clients)
    return method


def _norms(loss_fn: fc.LossFn) -> tuple[str, ...]:
    if not isinstance(loss_fn, fc.Task):
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}, which does not say what its normalizations are: pass a Task, "
            "models.task(model), or name them, personal=model.paths('norm')"
        )
    try:
        return loss_fn.paths("norm")
    except ValueError as error:
        raise ValueError(
            f"FedBN keeps normalizations at home, and {error}. Take a model that has some, or name what stays at home: "
            "personal='head', or personal=() for nothing"
        ) from None
