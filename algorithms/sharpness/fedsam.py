"""FedSAM, FedASAM and MoFedSAM."""

from typing import Unpack

import jax
import optax

import fedjax_core as fc
from algorithms.drift.fedcm import FedCMState
from algorithms.parts import unequal_work
from algorithms.parts.averaging import averaging
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
    fc.checks.scalar("alpha", alpha, low=0, high=1, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.one_of("aggregation", aggregation, unequal_work.RULES)
    clients = fc.local_training(**local)
    gradient = sam_gradient(loss_fn, rho)

    def init(params: fc.Params) -> FedCMState:
        return FedCMState(params, optax.tree.zeros_like(params))

    def direction(y, batch, shared, _):
        _, D = shared
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, d: alpha * g + (1 - alpha) * d, g, D)

    def update(state: FedCMState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(
            fc.measured(fc.optimizer_at(client_optimizer, state.round)),
            direction,
            start=fc.first_part,
            upload=unequal_work.upload(aggregation),
        )
        results = clients.run(program, (state.params, state.direction), (), cohort, key)
        decrease, D, _ = unequal_work.mean(results.aggregate, aggregation)
        return FedCMState(fc.add_scaled(state.params, -server_lr, decrease), D), results

    return fc.federated(init, update)
