"""APFL."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class Own(NamedTuple):
    """What a client keeps: its model v and its share alpha, float[]."""

    v: fc.Params
    alpha: fc.Array


class APFLState(NamedTuple):
    """Global model x, every client's own model and share, and the number of rounds done."""

    params: fc.Params
    personal: fc.ClientTable
    round: fc.Counter = 0


def apfl(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    alpha: fc.Scalar = 0.5,
    adaptive: bool = True,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """APFL: a client predicts with a mixture of a model of its own and the global one, whose shares it learns.

    Client, from w = x and its own v = v_i, a = alpha_i, with u = a v + (1 - a) w:
             w <- w - lr g_i(w);  v <- v - lr a g_i(u);
             a <- clip(a - lr <v - w, g_i(u)>, 0, 1) if adaptive, all three from the old values, K times;
             v_i <- v;  alpha_i <- a.
    Server:  x <- x + server_lr sum_S w_i (w_i - x).
    A client predicts with alpha_i v_i + (1 - alpha_i) x.

    Down: x (1P). Up: w_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer of w, v and a at once, started anew in every round, or a function of the round,
        or of the round and the client's id, giving one.
      num_clients: size of the population.
      alpha: the share of its own model with which each client begins. 0 leaves v alone, 1 trains it alone, if it is not
        adaptive.
      adaptive: whether clients learn their shares.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The global model is FedAvg's. The view "personal" has each client's mixture.

    Differences: none. Two libraries run other methods under this name: one trains v on the loss of v alone and then
    puts the mixture in its place, the other mixes the outputs of the two models.

    Paper: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("alpha", alpha, low=0, high=1)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> APFLState:
        dtype = fc.sums.accumulator(jnp.result_type(*jax.tree.leaves(params)))
        return APFLState(params, fc.client_table(num_clients, Own(params, jnp.asarray(alpha, dtype))))

    def update(state: APFLState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def client_init(x, own, key):
            return (x, *own), optimizer.init((x, *own))

        def client_step(x, carry, batch):
            (w, v, a), opt_state = carry
            loss, g = gradient(w, batch)
            _, g_u = gradient(mixed(w, Own(v, a)), batch)
            apart = optax.tree.vdot(fc.sums.widen(optax.tree.sub(v, w)), fc.sums.widen(g_u))
            d = g, fc.scale(a, g_u), jnp.where(adaptive, apart, 0).astype(a.dtype)
            (w, v, a), opt_state = fc.optimizer_step(optimizer, (w, v, a), opt_state, d)
            return ((w, v, jnp.clip(a, 0, 1)), opt_state), loss

        def client_final(x, carry):
            (w, v, a), _ = carry
            return optax.tree.sub(w, x), Own(v, a)

        program = fc.ClientProgram(client_init, client_step, client_final)
        own = fc.gather(state.personal, cohort)
        results = clients.run(program, state.params, cohort, key, client_inputs=own)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        return APFLState(params, fc.scatter(state.personal, cohort, results.outputs)), results

    own_mixture = fc.View(lambda state: state.params, mixed, lambda state: state.personal)
    return fc.federated(init, update, views={"personal": own_mixture})


def mixed(w: fc.Params, own: Own) -> fc.Params:
    """a v + (1 - a) w."""
    return jax.tree.map(lambda v, w: own.alpha.astype(w.dtype) * v + (1 - own.alpha).astype(w.dtype) * w, own.v, w)
