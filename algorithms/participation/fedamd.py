"""FedAMD."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class Anchor(NamedTuple):
    """A client's last full gradient v_i, and whether it has had one, bool[]."""

    gradient: fc.Params
    known: fc.Array


class Miner(NamedTuple):
    """A client in the middle of its local steps: model, the one before, and the direction q that follows them."""

    params: fc.Params
    previous: fc.Params
    direction: fc.Params
    opt_state: fc.PyTree


class FedAMDState(NamedTuple):
    """Global model x, every client's anchor, the sums of N p_i v_i and of N p_i over known ones, the rounds."""

    params: fc.Params
    anchors: fc.ClientTable
    total: fc.Params
    weight: fc.Array
    round: fc.Counter = 0


class FedAMDMetrics(NamedTuple):
    """Participants that were anchors, and participants that took part for the first time, int32[] each."""

    anchors: fc.Array
    newcomers: fc.Array


def fedamd(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    probability: fc.Scalar = 0.2,
    period: int = 0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAMD: some participants refresh their full gradients, the others descend along the mean of all clients'.

    Anchor (with probability p_t):   v_i <- grad f_i(x).
    Miner (all others), from y = x:  q = V;  q <- q + g_i(y) - g_i(y_prev), both on one batch;  y <- y - lr q, K times.
    Server:                          x <- x + server_lr mean_miners (y_i - x);  V = mean_i v_i over all N clients.

    V is the mean at the start of the round for all miners. Their first step is -lr V.

    Down: x, V (2P), to an anchor x (1P). Up: y_i - x, or v_i of an anchor (1P); a miner that takes part for the first
    time sends its v_i too (2P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one. K lr is about the length of a step on the mean loss of all clients, so lr must be
        smaller than FedAvg's.
      num_clients: size of the population, N.
      probability: p_t, the same in every round (the paper's constant probability), in [0, 1].
      period: m above 0 makes p_t 1 in the rounds 0, m, 2m, ... and 0 in the others (the paper's sequential
        probability); 0 leaves it to `probability`.
      server_lr: 1 replaces the model by the miners' average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The local work is a
        miner's; an anchor takes the gradient of all its examples, for which batch_size only bounds memory.

    Differences: the paper has v_i of every client from a first pass over all of them. Here a client joins when it first
    takes part: it computes v_i before the miners start, and V is the mean over the clients that have joined. With a
    first cohort of everyone the two are the same. The paper's large batch is all of a client's examples, as in its
    experiments.

    Paper: Wu, Guo, Qu, He, Liu, Gao, "Anchor Sampling for Federated Learning with Partial Client Participation", 2023,
    algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("probability", probability, low=0, high=1)
    if period != 0:
        fc.checks.positive_int("period", period, "a number of rounds, or 0 for a constant probability")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)
    gradient_at_x = fc.full_gradient_program(loss_fn)

    def init(params: fc.Params) -> FedAMDState:
        anchors = fc.client_table(num_clients, Anchor(optax.tree.zeros_like(params), jnp.bool_(False)))
        return FedAMDState(params, anchors, fc.sums.wide_zeros(params), jnp.zeros(()))

    def update(state: FedAMDState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def client_init(shared, own, key):
            x, V = shared
            return Miner(x, x, V, optimizer.init(x))

        def client_step(shared, now, batch):
            loss, g = gradient(now.params, batch)
            _, g_previous = gradient(now.previous, batch)
            q = jax.tree.map(lambda q, g, g_prev: q + (g - g_prev), now.direction, g, g_previous)
            y, opt_state = fc.optimizer_step(optimizer, now.params, now.opt_state, q)
            return Miner(y, now.params, q, opt_state), loss

        def client_final(shared, done):
            x, _ = shared
            return optax.tree.sub(done.params, x), ()

        coin_key, key = jax.random.split(key)
        anchor = draw_anchors(coin_key, cohort, probability if period == 0 else state.round % period == 0)
        old = fc.gather(state.anchors, cohort)
        new = cohort.mask & ~old.known
        weights = fc.client_weights(clients.weights, cohort)

        asked = cohort.only(anchor | new)
        full = clients.full_pass().run(gradient_at_x, state.params, asked, key, aggregator=fc.stacked())
        v = full.aggregate
        total = optax.tree.add(state.total, fc.sums.weighted(weights * new, v))
        weight = state.weight + jnp.sum(weights * new)
        V = jax.tree.map(lambda leaf: leaf / jnp.where(weight > 0, weight, 1).astype(leaf.dtype), total)
        V = fc.sums.cast_like(V, state.params)

        program = fc.ClientProgram(client_init, client_step, client_final)
        # An anchor gets x and sends v_i; a miner gets x and V and sends y_i - x, and v_i if it is new.
        x = fc.Message(state.params, jnp.where(asked.mask, 0, fc.num_bytes(state.params)))
        miners = clients.run(program, (x, V), cohort.only(cohort.mask & ~anchor), key)
        params = fc.add_scaled(state.params, server_lr, miners.aggregate)

        change = optax.tree.sub(fc.sums.widen(v), old.gradient)
        total = optax.tree.add(total, fc.sums.weighted(weights * (anchor & old.known), change))
        anchors = fc.scatter(state.anchors, asked, Anchor(v, asked.mask))
        # The loss is a miner's that of its steps, and an anchor's the one at x.
        measured = full._replace(steps=jnp.where(anchor, full.steps, 0))
        results = fc.merge_phases(measured, miners)
        counts = FedAMDMetrics(jnp.sum(anchor, dtype=jnp.int32), jnp.sum(new, dtype=jnp.int32))
        return FedAMDState(params, anchors, total, weight), results, counts

    return fc.federated(init, update)


def draw_anchors(key: fc.Key, cohort: fc.Cohort, probability: fc.Scalar) -> fc.Array:
    """bool[C]: each participant is an anchor with the given probability, by a coin of its own."""
    coins = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (), jnp.float32))(
        jnp.maximum(cohort.ids, 0)
    )
    return cohort.mask & (coins < probability)
