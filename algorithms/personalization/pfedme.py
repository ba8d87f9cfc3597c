"""pFedMe."""

from typing import NamedTuple, Unpack

import jax
import optax

import fedjax_core as fc


class PFedMeState(NamedTuple):
    """Global model x, every client's own model theta_i, and the number of rounds done."""

    params: fc.Params
    personal: fc.ClientTable
    round: fc.Counter = 0


class _Client(NamedTuple):
    """The local model w, its optimizer's state, and the personal model theta."""

    w: fc.Params
    opt_state: fc.PyTree
    theta: fc.Params


def pfedme(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    lam: fc.Scalar = 15.0,
    inner_lr: fc.Scalar = 0.09,
    inner_steps: int = 5,
    mu: fc.Scalar = 0.001,
    warm_start: bool = True,
    beta: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """pFedMe: a client's own model is the proximal point of its loss, and the global one follows their envelopes.

    Client, from w = theta = x, R times on a batch each:
             theta <- theta - inner_lr (g_i(theta) + lam (theta - w) + mu theta), inner_steps times;
             w <- w - lr lam (w - theta);
             theta_i <- theta.
    Server:  x <- (1 - beta) x + beta sum_S w_i y_i, where y_i is the client's last w.

    Down: x (1P). Up: y_i - x (1P).

    lam (w - theta) is the gradient at w of the Moreau envelope min_theta f_i(theta) + lam / 2 |theta - w|^2, as far as
    theta has come to the minimum.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer of w, started anew in every round, or a function of the round, or of the round
        and the client's id, giving one; its learning rate is the paper's eta, 0.005 there.
      num_clients: size of the population.
      lam: how strongly theta is held near w. 0 trains it alone from x, and x stays.
      inner_lr: learning rate of theta; times (lam + the curvature of f_i) it has to stay below 2.
      inner_steps: steps of theta for each of w, all on one batch, the paper's K.
      mu: weight of a penalty mu / 2 |theta|^2, which released code has.
      warm_start: whether theta goes on from where it is when w has moved; otherwise it starts from w again.
      beta: 1 replaces the model by the average, 0 leaves it; above 1 it goes beyond.
      **local: batch_size, num_epochs or num_steps (the paper's R), order, weights, plan; see `LocalOptions`.

    The training loss that is reported is that of theta where each of the R steps begins. The view "personal" has each
    client's theta_i, of the last round in which it took part.

    Differences: the paper solves for theta to a given accuracy; here, as in released code, it takes `inner_steps` steps
    and goes on from the last theta (`warm_start=False` is the other reading).

    Paper: T Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", 2020, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("lam", lam, low=0)
    fc.checks.scalar("inner_lr", inner_lr, low=0)
    fc.checks.positive_int("inner_steps", inner_steps, "5 is the paper's")
    fc.checks.scalar("mu", mu, low=0)
    fc.checks.scalar("beta", beta, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def nearer(theta: fc.Params, w: fc.Params, batch: fc.Batch) -> tuple[fc.Array, fc.Params]:
        loss, g = gradient(theta, batch)
        d = fc.add_scaled(fc.add_scaled(g, lam, optax.tree.sub(theta, w)), mu, theta)
        return loss, fc.add_scaled(theta, -inner_lr, d)

    def proximal(theta: fc.Params, w: fc.Params, batch: fc.Batch) -> tuple[fc.Array, fc.Params]:
        # The first step stands outside of the loop: what it makes of a task's statistics is what the batch does.
        loss, theta = nearer(theta, w, batch)
        with fc.tasks.reading():
            theta = jax.lax.fori_loop(1, inner_steps, lambda _, theta: nearer(theta, w, batch)[1], theta)
        return loss, theta

    def update(state: PFedMeState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def client_init(x, own, key):
            return _Client(x, optimizer.init(x), x)

        def client_step(x, now, batch):
            loss, theta = proximal(now.theta if warm_start else now.w, now.w, batch)
            # Compilers make one factor of two that they know, lr lam, and round otherwise than where they do not.
            d = jax.lax.optimization_barrier(fc.scale(lam, optax.tree.sub(now.w, theta)))
            return _Client(*fc.optimizer_step(optimizer, now.w, now.opt_state, d), theta), loss

        def client_final(x, done):
            return optax.tree.sub(done.w, x), done.theta

        results = clients.run(fc.ClientProgram(client_init, client_step, client_final), state.params, cohort, key)
        params = fc.add_scaled(state.params, beta, results.aggregate)
        return PFedMeState(params, fc.scatter(state.personal, cohort, results.outputs)), results

    own_model = fc.View(lambda state: (), lambda shared, theta: theta, lambda state: state.personal)
    return fc.federated(
        lambda params: PFedMeState(params, fc.client_table(num_clients, params)), update, views={"personal": own_model}
    )
