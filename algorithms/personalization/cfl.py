"""CFL: clustered federated learning by recursive bipartition."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts import clusters as parts
from algorithms.parts import columns


class CFLState(NamedTuple):
    """The clusters' models, who is in which, and the number of rounds done.

    Attributes:
      params: the models x_1 to x_k, leaves [k, ...]; those that no cluster has yet are as the model began.
      members: int32[k], clients of each cluster; 0 of those that there are not yet. Clusters are numbered as they come.
      clusters: rows, the cluster of each client, int32[].
      round: rounds done.
    """

    params: fc.Params
    members: fc.Array
    clusters: fc.ClientTable
    round: fc.Counter = 0


class CFLMetrics(NamedTuple):
    """What became of the clusters.

    Attributes:
      clusters: int32[], how many there are after the round.
      splits: int32[], how many were split in it.
      waiting: int32[], how many were to be split and stayed whole, because all k models were taken.
    """

    clusters: fc.Array
    splits: fc.Array
    waiting: fc.Array


def cfl(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    num_models: int = 8,
    eps1: fc.Scalar = 0.4,
    eps2: fc.Scalar = 1.6,
    wait: int = 20,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """CFL: a cluster is split in two when it has come to rest at a point that does not suit its members.

    Client, from y = x_c, c its cluster:  y <- y - lr g_i(y), K times;  d_i = y - x_c.
    Server, for each cluster c of more than two clients, after `wait` rounds:
             if |mean_c d_i| < eps1 and max_c |d_i| > eps2: c is split in two by complete linkage of -cos(d_i, d_j);
             then for all clusters, new ones from their parent's x_c:  x_c <- x_c + server_lr mean_c d_i.

    Down: x_c (1P). Up: y_i - x_c (1P). The server holds the uploads of all participants.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      num_models: k, the most clusters that there can be. Once there are so many, none is split any more, and the
        metrics count those that would be as waiting. 1 is FedAvg.
      eps1: a cluster is at rest where its mean displacement is shorter. It is a length, and goes with the model, the
        learning rate and the local work.
      eps2: its members are not where the longest of their displacements is longer.
      wait: rounds at the beginning in which nothing is split.
      server_lr: 1 replaces each model by its average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The means are weighted by
        the weights; the paper's are not (`weights="uniform"`).

    A cluster is looked at in rounds in which all its clients take part (draw them all, `samplers.full`); in others it
    is trained as it is. The half with the client of the lowest number keeps the cluster's number, the other gets the
    next free one; of clusters that are to be split in one round, and for which there are too few models, the first
    are. Splits are never undone, and no number of one cluster depends on clients of another. The view "personal" has
    each client's cluster's model; the global model is that of the largest cluster.

    Differences: the authors' code keeps the momentum of clients' optimizers from round to round, and lists of clusters
    without an end, where here the optimizer starts anew and there are k models.

    Paper: Sattler, Mueller, Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization
    Under Privacy Constraints", 2020, algorithm 3.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    k = fc.checks.positive_int("num_models", num_models, "one model is FedAvg")
    fc.checks.scalar("eps1", eps1, low=0)
    fc.checks.scalar("eps2", eps2, low=0)
    wait = fc.checks.count("wait", wait, "20 is the paper's")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> CFLState:
        members = jnp.zeros(k, jnp.int32).at[0].set(num_clients)
        return CFLState(parts.copies(params, k), members, fc.client_table(num_clients, jnp.int32(0)))

    def update(state: CFLState, cohort: fc.Cohort, key: fc.Key):
        own = fc.gather(state.clusters, cohort)
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        results = parts.trained(clients, optimizer, gradient, state.params, own, cohort, key)
        d, weights = results.aggregate, results.weights
        products = parts.gram(d, cohort.mask)
        unsuited = is_unsuited(d, weights, products, own, state, cohort) & (state.round >= wait)
        in_use = jnp.sum(state.members > 0, dtype=jnp.int32)
        place = in_use - 1 + jnp.cumsum(unsuited, dtype=jnp.int32)  # of the new half of each
        splits = unsuited & (place < k)

        def halves(order: fc.Array) -> fc.Array:
            distances, taking = parts.cosine_distances(products)[order][:, order], cohort.mask[order]
            wanted = jnp.where(splits, 2, order.shape[0])
            groups = parts.complete_linkage(distances, taking, wanted, parents=own[order])
            lowest = jax.ops.segment_min(jnp.where(taking, groups, order.shape[0]), own[order], k)
            return taking & (groups > lowest[own[order]]) & splits[own[order]]

        leaves = jax.lax.cond(
            jnp.any(splits), lambda: parts.by_number(cohort, halves), lambda: jnp.zeros(cohort.ids.shape, bool)
        )
        now = jnp.where(leaves, place[own], own).astype(own.dtype)
        # A new cluster begins with the model of the one that it was part of.
        parent = jnp.arange(k).at[jnp.where(splits, place, k)].set(jnp.arange(k), mode="drop")
        begun = jax.tree.map(lambda leaf: leaf[parent], state.params)
        gone = jax.ops.segment_sum(leaves.astype(jnp.int32), own, k)
        come = jax.ops.segment_sum(leaves.astype(jnp.int32), now, k)
        new = CFLState(
            parts.moved(begun, d, weights, now, server_lr),
            state.members - gone + come,
            fc.scatter(state.clusters, cohort, now),
            state.round,
        )
        told = (jnp.sum(which, dtype=jnp.int32) for which in (new.members > 0, splits, unsuited & ~splits))
        return new, results, CFLMetrics(*told)

    def is_unsuited(
        d: fc.Params, weights: fc.Array, products: fc.Array, own: fc.Array, state: CFLState, cohort: fc.Cohort
    ) -> fc.Array:
        """bool[k], the clusters that are all there, are at rest, and whose members are not."""
        belongs = own == jnp.arange(k)[:, None]  # [k, C]
        there = jnp.sum(belongs & (cohort.ids >= 0), axis=1) == state.members
        shares = jax.vmap(fc.sums.shares)(jnp.where(belongs, weights, 0))

        def square(rows: fc.Array) -> fc.Array:
            # Zero times what is not finite would reach the other clusters.
            rows = jnp.where(jnp.isfinite(rows), rows, 0)
            mean = jnp.matmul(shares.astype(rows.dtype), rows, precision="highest")
            return jnp.sum(jnp.square(mean), axis=1).astype(shares.dtype)

        squares = jnp.zeros(k, shares.dtype)
        for leaf in jax.tree.leaves(fc.sums.widen(d)):
            squares = columns.added(leaf, squares, square)
        taking = belongs & cohort.mask
        longest = jnp.max(jnp.where(taking, jnp.sqrt(jnp.diagonal(products)), 0), axis=1)
        at_rest = (jnp.sqrt(squares) < eps1) & (longest > eps2) & jnp.isfinite(longest)
        return there & (jnp.sum(taking, axis=1) > 2) & at_rest

    return fc.federated(
        init,
        update,
        lambda state: parts.model_of(state.params, jnp.argmax(state.members)),
        views={"personal": parts.own_model(lambda state: state.clusters)},
    )
