"""FedAMD."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedstale import cohort_sum
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
    client_weights,
    descend,
    full_gradient_program,
    gather,
    global_algorithm,
    local_training,
    local_work,
    mean_over_participants,
    move,
    num_scalars,
    optimizer_at,
    round_metrics,
    scatter,
    stacked,
    sums,
    value_and_grad,
)


class Bullseye(NamedTuple):
    """A client's last full gradient v_i, and whether it has had one, bool[]."""

    gradient: Params
    known: Array


class FedAMDState(NamedTuple):
    """Global model x, every client's bullseye, the sum of N p_i v_i and of N p_i over those that are known, rounds."""

    params: Params
    bullseyes: ClientTable
    total: Params
    weight: Array
    round: Array


class FedAMDMetrics(NamedTuple):
    """Participants that were anchors, and participants that took part for the first time, int32[] each."""

    anchors: Array
    newcomers: Array


def fedamd(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    probability: Scalar = 0.2,
    period: int = 0,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    checks.positive_int("num_clients", num_clients, "the size of the population")
    checks.scalar("probability", probability, low=0, high=1)
    if period != 0:
        checks.positive_int("period", period, "a number of rounds, or 0 for a constant probability")
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    whole = clients._replace(work=local_work(clients.work.batch_size, order="sequential"))
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedAMDState:
        zeros = optax.tree.zeros_like(params)
        bullseyes = client_table(num_clients, Bullseye(zeros, jnp.bool_(False)))
        return FedAMDState(params, bullseyes, sums.wide_zeros(params), jnp.zeros(()), jnp.int32(0))

    def round(state: FedAMDState, cohort: Cohort, key: Key) -> tuple[FedAMDState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, bullseye = shared
            return x, x, bullseye, optimizer.init(x)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            y, y_prev, q, opt_state = carry
            loss, g = gradient(y, batch)
            _, g_prev = gradient(y_prev, batch)
            q = jax.tree.map(lambda q, g, g_prev: q + (g - g_prev), q, g, g_prev)
            y_next, opt_state = descend(optimizer, y, opt_state, q)
            return (y_next, y, q, opt_state), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            return optax.tree.sub(carry[0], x), ()

        coin_key, key = jax.random.split(key)
        anchor = draw_anchors(coin_key, cohort, probability if period == 0 else state.round % period == 0)
        old = gather(state.bullseyes, cohort)
        new = cohort.mask & ~old.known
        weights = client_weights(clients.weights, cohort)

        asked = cohort.only(anchor | new)
        anchors = whole.run(full_gradient_program(loss_fn), state.params, (), asked, key, aggregator=stacked())
        v = anchors.aggregate
        total = optax.tree.add(state.total, cohort_sum(weights * new, v))
        weight = state.weight + jnp.sum(weights * new)
        mean = jax.tree.map(lambda leaf: leaf / jnp.where(weight > 0, weight, 1).astype(leaf.dtype), total)
        mean = sums.cast_like(mean, state.params)

        program = ClientProgram(client_init, client_step, client_final)
        miners = clients.run(program, (state.params, mean), (), cohort.only(cohort.mask & ~anchor), key)
        params = move(state.params, server_lr, miners.aggregate)

        change = optax.tree.sub(sums.widen(v), old.gradient)
        total = optax.tree.add(total, cohort_sum(weights * (anchor & old.known), change))
        bullseyes = scatter(state.bullseyes, asked, Bullseye(v, asked.mask))
        # An anchor gets x and sends v_i; a miner gets x and V and sends y_i - x, and v_i if it is new.
        uploads = anchor + (cohort.mask & ~anchor) * (1 + new)
        downloads = anchor + (cohort.mask & ~anchor) * 2
        results = miners._replace(
            weights=weights,
            loss=jnp.where(anchor, anchors.loss, miners.loss),
            uploaded=mean_over_participants(uploads, cohort) * num_scalars(state.params),
            downloaded=mean_over_participants(downloads, cohort) * num_scalars(state.params),
        )
        counts = FedAMDMetrics(jnp.sum(anchor, dtype=jnp.int32), jnp.sum(new, dtype=jnp.int32))
        metrics = round_metrics(results, cohort, state.params, params, counts)
        return FedAMDState(params, bullseyes, total, weight, state.round + 1), metrics

    return global_algorithm(init, round)


def draw_anchors(key: Key, cohort: Cohort, probability: Any) -> Array:
    """bool[C]: each participant is an anchor with the given probability, by a coin of its own."""
    coins = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (), jnp.float32))(
        jnp.maximum(cohort.ids, 0)
    )
    return cohort.mask & (coins < probability)
