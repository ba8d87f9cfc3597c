"""FedGAMMA."""

from typing import Unpack

from algorithms.optimization.fedsam import sam_gradient
from algorithms.optimization.scaffold import controlled_averaging
from fedjax_core import Algorithm, ClientOptimizer, LocalOptions, LossFn, Scalar


def fedgamma(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    rho: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedGAMMA: sharpness-aware local steps whose drift is cancelled by control variates.

    Client, from y = x:  g = g_i(y);  q = g_i(y + rho g / ||g||), both on one batch;
                         y <- y - lr (q + c - c_i), K times;  c_i+ = mean of the K gradients q.
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  c <- c + (1 / N) sum_S (c_i+ - c_i).

    Down: x, c (2P). Up: y_i - x, c_i+ - c_i (2P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      rho: radius of the perturbation; the norm is over all parameters together. 0 is SCAFFOLD (option II).
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: released code writes c_i+ as c_i - c + (x - y_i) / (K lr), which equals the mean of the q for plain SGD
    with a constant step, and clips the corrected gradient.

    Paper: Dai, Yang, Sun, Liu, Shen, Tao, "FedGAMMA: Federated Learning with Global Sharpness-Aware Minimization",
    2023, algorithm 1.
    """
    return controlled_averaging(
        sam_gradient(loss_fn, rho), client_optimizer, num_clients=num_clients, server_lr=server_lr, **local
    )
