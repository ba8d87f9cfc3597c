"""OCFL: one-shot clustered federated learning."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts import clusters as parts


class OCFLState(NamedTuple):
    """The clusters' models, who is in which, the last temperature, and the number of rounds done.

    Attributes:
      params: the models x_1 to x_k, leaves [k, ...]; those of no cluster are as the model was when clusters were made.
      members: int32[k], clients of each cluster; those without examples stay in the first.
      clusters: rows, the cluster of each client, int32[].
      temperature: float[], of the last round that all clients took part in; 2 before the first, above all others.
      clustered: int32[], the round, from 1 on, in which clusters were made; 0 before.
      round: rounds done.
    """

    params: fc.Params
    members: fc.Array
    clusters: fc.ClientTable
    temperature: fc.Array
    clustered: fc.Array
    round: fc.Counter = 0


class OCFLMetrics(NamedTuple):
    """When clusters are made.

    Attributes:
      temperature: float[], of this round where it was taken, else the last one.
      clusters: int32[], how many clusters there are after the round.
    """

    temperature: fc.Array
    clusters: fc.Array


def ocfl(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    num_models: int = 3,
    clusterer: str | parts.Clusterer = "linkage",
    p: fc.Scalar = 2.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """OCFL: clients are put into clusters once, in the round in which their updates begin to drift apart.

    Client, from y = x_c, c its cluster:  y <- y - lr g_i(y), K times;  d_i = y - x_c.
    Server, while there is one cluster:   G_ij = 1 - cos(d_i, d_j);
             T = (sum_{i != j} G_ij^p)^{1/p} / (n (n - 1) 2^p)^{1/p}; if it is higher than in the round before, clusters
             are made of G, once and for all, each with a copy of x;
         then, for every cluster:         x_c <- x_c + server_lr mean_c d_i.

    Down: x_c (1P). Up: y_i - x_c (1P). The server holds the uploads of all participants.

    The temperature T lies in [0, 1]; for p = 2 it is half the root mean square of the distances. It falls while clients
    learn what they have in common, and rises when their optima diverge. The first round cannot make clusters, nor one
    whose temperature is that of the round before.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, n.
      num_models: k, the most clusters that there can be. 1 is FedAvg.
      clusterer: "linkage", complete linkage into k clusters; "medoids", k-medoids; "affinity", affinity propagation,
        which finds the number of clusters itself; or a function `(G float[C, C], taking bool[C]) -> int[C]` that JAX
        can trace, in which slots with the same number are a cluster. Where there are more than k clusters, the nearest
        are joined by complete linkage until there are k.
      p: of the temperature, at least 1.
      server_lr: 1 replaces each model by its average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The means are weighted by
        the weights; the paper's are not (`weights="uniform"`).

    The temperature is taken, and clusters are made, in rounds in which all clients take part (draw them all,
    `samplers.full`); others train what there is, and a cluster without participants keeps its model. The view
    "personal" has each client's cluster's model; the global model is that of the largest cluster.

    Differences: the paper runs HDBSCAN, mean shift, affinity propagation and k-means of other libraries, whose results
    the ones here do not reproduce. Its code measures distances over all entries of a model's state, also over counters
    that no gradient changes and that are alike for all clients, which drives T to 0; here it is parameters alone.

    Paper: Zuziak, Pellungrini, Rinzivillo, "One-Shot Clustering for Federated Learning", 2024, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    k = fc.checks.positive_int("num_models", num_models, "one model is FedAvg")
    if not callable(clusterer):
        fc.checks.one_of("clusterer", clusterer, ("linkage", "medoids", "affinity"))
    else:
        example = "a function (distances, taking) -> int[C]"
        fc.checks.takes("clusterer", clusterer, ("distances", "taking"), example=example)
    fc.checks.scalar("p", p, low=1)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> OCFLState:
        members = jnp.zeros(k, jnp.int32).at[0].set(num_clients)
        table = fc.client_table(num_clients, jnp.int32(0))
        return OCFLState(parts.copies(params, k), members, table, jnp.full((), 2.0, float), jnp.int32(0))

    def found(distances: fc.Array, taking: fc.Array) -> fc.Array:
        """int32[C], the number of each slot's cluster, below k."""
        together = jnp.zeros(taking.shape, jnp.int32)
        begun = None
        if callable(clusterer):
            labels = jnp.asarray(clusterer(distances, taking))
            if labels.shape != taking.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
                raise ValueError(
                    f"clusterer must return int[{taking.shape[0]}], a number for each slot, got "
                    f"{labels.dtype}{list(labels.shape)}"
                )
            begun = parts.first_slots(labels, taking)
        elif clusterer == "medoids":
            begun = parts.medoids(distances, taking, k)
        elif clusterer == "affinity":
            begun = parts.affinity(distances, taking)
        if begun is not None:
            begun = parts.first_slots(begun, taking)
        groups = parts.complete_linkage(distances, taking, k, parents=together, begun=begun)
        return parts.numbered(groups, taking)

    def update(state: OCFLState, cohort: fc.Cohort, key: fc.Key):
        own = fc.gather(state.clusters, cohort)
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        results = parts.trained(clients, optimizer, gradient, state.params, own, cohort, key)
        d, weights = results.aggregate, results.weights
        asks = (jnp.sum(cohort.ids >= 0) == num_clients) & (state.clustered == 0)

        def measured() -> tuple[fc.Array, fc.Array]:
            G = parts.cosine_distances(parts.gram(d, cohort.mask))
            return G, temperature(G, cohort.mask, p)

        unmeasured = jnp.zeros((cohort.ids.shape[0],) * 2), jnp.zeros(())
        G, T = jax.lax.cond(asks, measured, lambda: unmeasured)
        makes = asks & (state.temperature < T)
        now = jax.lax.cond(
            makes,
            lambda: parts.by_number(cohort, lambda order: found(G[order][:, order], cohort.mask[order])),
            lambda: own,
        )
        moved = jax.ops.segment_sum((cohort.mask & (now > 0) & makes).astype(jnp.int32), now, k)
        members = state.members + moved - jnp.where(jnp.arange(k) == 0, jnp.sum(moved, dtype=jnp.int32), 0)
        new = OCFLState(
            parts.moved(alike_until(state, makes), d, weights, now, server_lr),
            members,
            fc.scatter(state.clusters, cohort, now),
            jnp.where(asks, T, state.temperature).astype(state.temperature.dtype),
            jnp.where(makes, state.round + 1, state.clustered).astype(state.clustered.dtype),
            state.round,
        )
        return new, results, OCFLMetrics(new.temperature, jnp.sum(members > 0, dtype=jnp.int32))

    def alike_until(state: OCFLState, makes: fc.Array) -> fc.Params:
        """The models before the step: where clusters are made, copies of the one that there was."""
        return jax.tree.map(lambda leaf: jnp.where(makes, leaf[:1], leaf), state.params)

    return fc.federated(
        init,
        update,
        lambda state: parts.model_of(state.params, jnp.argmax(state.members)),
        views={"personal": parts.own_model(lambda state: state.clusters)},
    )


def temperature(distances: fc.Array, taking: fc.Array, p: fc.Scalar = 2.0) -> fc.Array:
    """float[] in [0, 1], (sum_{i != j} G_ij^p)^{1/p} / (n (n - 1) 2^p)^{1/p}; 0 of less than two slots."""
    pairs = taking[:, None] & taking & ~jnp.eye(taking.shape[0], dtype=bool)
    # Halves of distances are at most 1, so that no power of them is too large.
    halves = jnp.where(pairs, distances / 2, 0) ** p
    mean = jnp.sum(halves) / jnp.maximum(jnp.sum(pairs), 1)
    return mean ** (1 / jnp.asarray(p, mean.dtype))
