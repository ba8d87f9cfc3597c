"""FedSAM, FedASAM and MoFedSAM."""

from typing import Unpack

import fedjax_core as fc
from algorithms.parts.averaging import averaging
from algorithms.parts.global_direction import with_global_direction
from algorithms.parts.sharpness import sam_gradient


def fedsam(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    rho: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedSAM: local steps along the gradient at the worst point nearby, which seeks flat minima.

    Client, from y = x:  g = g_i(y);  e = rho g / ||g||;  y <- y - lr g_i(y + e), both on one batch, K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      rho: radius of the perturbation; the norm is over all parameters together.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Paper: Qu, Li, Duan, Liu, Tang, Lu, "Generalized Federated Learning via Sharpness Aware Minimization", 2022,
    algorithm 1; Caldarola, Caputo, Ciccone, "Improving Generalization in Federated Learning by Seeking Flat
    Minima", 2022.
    """
    return averaging(sam_gradient(loss_fn, rho), client_optimizer, server_lr=server_lr, **local)


def fedasam(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    rho: fc.Scalar = 0.5,
    eta: fc.Scalar = 0.2,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedASAM: FedSAM whose perturbation scales with the size of each weight.

    Client, from y = x:  g = g_i(y);  T = |y| + eta for weights, 1 for biases;  e = rho T^2 g / ||T g||;
                         y <- y - lr g_i(y + e), both on one batch, K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      rho: radius of the perturbation.
      eta: keeps the perturbation of small weights alive.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: a bias is taken to be any array with fewer than two axes, since parameters carry no other mark.

    Paper: Caldarola, Caputo, Ciccone, "Improving Generalization in Federated Learning by Seeking Flat Minima", 2022,
    section 4.
    """
    fc.checks.scalar("eta", eta, low=0)
    return averaging(sam_gradient(loss_fn, rho, eta), client_optimizer, server_lr=server_lr, **local)


def mofedsam(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    rho: fc.Scalar = 0.1,
    alpha: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """MoFedSAM: FedSAM with the previous global direction in every local step, as in FedCM.

    Client, from y = x:  g = g_i(y);  e = rho g / ||g||;  y <- y - lr (alpha g_i(y + e) + (1 - alpha) D), K times.
    Server:              D <- mean_S (x - y_i) / (lr K);  x <- x - server_lr (lr K) D.

    With unequal work lr K is mean_S lr K_i, or with aggregation="normalized" D is mean_S (x - y_i) / (lr K_i).

    Down: x, D (2P). Up: x - y_i and lr K_i (1P + 1). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      rho: radius of the perturbation.
      alpha: weight of the fresh gradient, in (0, 1]; 1 is FedSAM.
      server_lr: 1 replaces the model by the average.
      aggregation: "mean" or "normalized", for clients with unequal work; see `fedcm`.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Paper: Qu, Li, Duan, Liu, Tang, Lu, "Generalized Federated Learning via Sharpness Aware Minimization", 2022,
    algorithm 2.
    """
    return with_global_direction(
        sam_gradient(loss_fn, rho),
        client_optimizer,
        alpha=alpha,
        server_lr=server_lr,
        aggregation=aggregation,
        **local,
    )
