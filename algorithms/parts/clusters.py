"""Clusters of clients: a model of each, and how they are found from what clients send.

C is the number of slots of a cohort, k that of models. Clusters are found among the slots in the order of the clients'
numbers (`by_number`), so that ties do not depend on the order of a cohort.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import columns

Clusterer: TypeAlias = Callable[[fc.Array, fc.Array], fc.Array]
"""`clusterer(distances float[C, C], taking bool[C]) -> int[C]`: slots with the same number are a cluster."""

_FAR = 2.0
"""The largest cosine distance, which stands for one that is not a number."""


def copies(params: fc.Params, k: int) -> fc.Params:
    """The same model k times, leaves [k, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (k, *jnp.shape(leaf))), params)


def model_of(models: fc.Params, j: fc.Array) -> fc.Params:
    """Model j of leaves [k, ...]."""
    return jax.tree.map(lambda leaf: leaf[j], models)


def own_model(clusters: Callable[..., fc.ClientTable]) -> fc.View:
    """Each client predicts with the model of its cluster, of a state whose models are `params`."""
    return fc.View(lambda state: state.params, model_of, clusters)


def trained(
    clients: fc.LocalTraining,
    optimizer: optax.GradientTransformation,
    gradient: Callable[..., fc.PyTree],
    models: fc.Params,
    clusters: fc.Array,
    cohort: fc.Cohort,
    key: fc.Key,
) -> fc.ClientResults:
    """Every client trains the model of its cluster, int32[C]; the aggregate are the displacements, leaves [C, ...]."""
    program = fc.local_descent(optimizer, gradient, start=model_of)
    sent = fc.Message(models, fc.num_bytes(model_of(models, jnp.int32(0))))  # a client gets its cluster's alone
    return clients.run(program, sent, cohort, key, client_inputs=clusters, aggregator=fc.stacked())


def moved(
    models: fc.Params, displacements: fc.Params, weights: fc.Array, clusters: fc.Array, scale: fc.Scalar
) -> fc.Params:
    """Each model plus scale times the weighted mean of its clients' displacements; one without clients stays.

    Clients are added one after the other, to the sum of their cluster alone.
    """
    k = jax.tree.leaves(models)[0].shape[0]
    few = weights.shape[0] <= fc.sums.FEW
    total = jax.ops.segment_sum(weights, clusters, k)

    def first(leaf: fc.Array) -> fc.sums.Running:
        return fc.sums.start((k, *leaf.shape[1:]), fc.sums.accumulator(leaf.dtype), few=few)

    def step(totals: fc.PyTree, row: fc.PyTree) -> tuple[fc.PyTree, None]:
        displacement, weight, j = row

        def one(total: fc.sums.Running, leaf: fc.Array) -> fc.sums.Running:
            leaf = fc.sums.widen(leaf)
            new = fc.sums.add(model_of(total, j), weight.astype(leaf.dtype) * leaf)
            return jax.tree.map(lambda rows, row: rows.at[j].set(row), total, new)

        leaves = [one(*each) for each in zip(totals, jax.tree.leaves(displacement), strict=True)]
        return leaves, None

    leaves, treedef = jax.tree.flatten(displacements)
    sums, _ = jax.lax.scan(step, [first(leaf) for leaf in leaves], (displacements, weights, clusters))
    divisor = jnp.where(total > 0, total, 1)

    def mean(running: fc.sums.Running, leaf: fc.Array) -> fc.Array:
        value = fc.sums.value(running)
        return (value / fc.sums.across(divisor, value).astype(value.dtype)).astype(leaf.dtype)

    means = [mean(*each) for each in zip(sums, leaves, strict=True)]
    return fc.add_scaled(models, scale, jax.tree.unflatten(treedef, means))


def by_number(cohort: fc.Cohort, find: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """[C] of what `find(order)` gives for the slots in the order of clients' numbers, int[C], brought back."""
    order = jnp.argsort(cohort.ids, stable=True)
    found = find(order)
    return jnp.zeros_like(found).at[order].set(found, unique_indices=True)


def gram(displacements: fc.Params, taking: fc.Array) -> fc.Array:
    """float[C, C], the inner products of displacements, leaves [C, ...], whole models as vectors; 0 of other slots."""

    def product(rows: fc.Array) -> fc.Array:
        rows = jnp.where(taking[:, None], fc.sums.widen(rows), 0)
        return jnp.matmul(rows, rows.T, precision="highest").astype(found.dtype)

    found = jnp.zeros((taking.shape[0],) * 2)
    for leaf in jax.tree.leaves(displacements):
        found = columns.added(leaf, found, product)
    return found


def cosine_distances(gram: fc.Array) -> fc.Array:
    """float[C, C] in [0, 2], 1 - cos of each two vectors with this Gram matrix; 0 of one to itself.

    A vector of zeros has cosine 0 with all others, one that is not finite is as far from them as can be.
    """
    norm = jnp.sqrt(jnp.diagonal(gram))
    # One after the other: the product of two squares may be too small or too large for a float where they are not.
    cosine = gram / jnp.where(norm > 0, norm, 1)[:, None] / jnp.where(norm > 0, norm, 1)
    distances = jnp.where(jnp.isfinite(cosine), jnp.clip(1 - cosine, 0, _FAR), _FAR)
    return jnp.where(jnp.eye(gram.shape[0], dtype=bool), 0, distances)


def complete_linkage(
    distances: fc.Array, taking: fc.Array, wanted: fc.Array | int, *, parents: fc.Array, begun: fc.Array | None = None
) -> fc.Array:
    """Joins in every parent cluster the two groups that are nearest, until so many are left.

    The distance of two groups is the largest of two of their members (complete linkage). Of equally near pairs the
    first is joined.

    Args:
      distances: float[C, C], symmetric.
      taking: bool[C], the slots that are looked at; the others are groups of their own.
      wanted: int[k], groups that are to be left of each parent cluster, or one number for all.
      parents: int32[C], the parent cluster of each slot, below k.
      begun: int32[C], groups to begin with, by their first slots; each slot alone unless given.

    Returns:
      int32[C], the first slot of the group of each slot.
    """
    n = taking.shape[0]
    slots = jnp.arange(n, dtype=jnp.int32)
    begun = slots if begun is None else begun
    alive = taking & (begun == slots)
    wanted = jnp.broadcast_to(jnp.asarray(wanted), (n,) if jnp.ndim(wanted) == 0 else jnp.shape(wanted))[parents]
    of_parent = parents[:, None] == parents
    above = slots[:, None] < slots
    far = jnp.where(taking[:, None] & taking, distances, -jnp.inf)
    for _ in range(2):  # of groups: the largest over the members of one, then of the other
        far = jax.ops.segment_max(far, begun, n).T

    def pairs(alive: fc.Array) -> fc.Array:
        count = jnp.sum(of_parent & alive, axis=1)
        return alive[:, None] & alive & of_parent & above & (count > wanted)[:, None]

    def step(now: tuple[fc.Array, fc.Array, fc.Array]) -> tuple[fc.Array, fc.Array, fc.Array]:
        groups, alive, far = now
        nearest = jnp.argmin(jnp.where(pairs(alive), far, jnp.inf))
        i, j = nearest // n, nearest % n
        joined = jnp.maximum(far[i], far[j])
        far = far.at[i].set(joined).at[:, i].set(joined)
        return jnp.where(groups == j, i.astype(groups.dtype), groups), alive.at[j].set(False), far

    groups, _, _ = jax.lax.while_loop(lambda now: jnp.any(pairs(now[1])), step, (begun, alive, far))
    return groups


def medoids(distances: fc.Array, taking: fc.Array, k: int, *, most: int = 50) -> fc.Array:
    """k-medoids: int32[C], for each slot the nearest of k of them, to which all are as near as the search finds.

    Medoids are chosen one by one, each where the sum of distances to the nearest falls most, and then moved to the
    middle of their clusters until none moves, `most` times at most.
    """
    n = taking.shape[0]
    usable = jnp.where(taking[:, None] & taking, distances, 0)

    def add(number: fc.Array, now: tuple[fc.Array, fc.Array]) -> tuple[fc.Array, fc.Array]:
        chosen, nearest = now
        free = taking & ~jnp.any((jnp.arange(k) < number)[:, None] & (chosen[:, None] == jnp.arange(n)), axis=0)
        cost = jnp.sum(jnp.where(taking[:, None], jnp.minimum(nearest[:, None], distances), 0), axis=0)
        best = jnp.argmin(jnp.where(free, cost, jnp.inf)).astype(jnp.int32)
        best = jnp.where(jnp.any(free), best, chosen[0])  # there may be fewer slots than medoids
        return chosen.at[number].set(best), jnp.minimum(nearest, distances[:, best])

    chosen, _ = jax.lax.fori_loop(0, k, add, (jnp.zeros(k, jnp.int32), jnp.full(n, jnp.inf)))

    def assigned(chosen: fc.Array) -> fc.Array:
        return jnp.argmin(distances[:, chosen], axis=1)

    def move(now: tuple[fc.Array, fc.Array, fc.Array]) -> tuple[fc.Array, fc.Array, fc.Array]:
        chosen, _, number = now
        own = (assigned(chosen) == jnp.arange(k)[:, None]) & taking  # [k, C]
        cost = jnp.where(own, own.astype(usable.dtype) @ usable, jnp.inf)
        better = jnp.where(jnp.any(own, axis=1), jnp.argmin(cost, axis=1).astype(jnp.int32), chosen)
        return better, jnp.any(better != chosen), number + 1

    begun = chosen, jnp.bool_(True), jnp.int32(0)
    chosen, _, _ = jax.lax.while_loop(lambda now: now[1] & (now[2] < most), move, begun)
    return jnp.where(taking, chosen[assigned(chosen)], jnp.arange(n, dtype=jnp.int32))


def affinity(distances: fc.Array, taking: fc.Array, *, steps: int = 200, damping: float = 0.5) -> fc.Array:
    """Affinity propagation: int32[C], the exemplar of each slot; how many there are it finds itself.

    Similarities are -distances, and each slot prefers itself as much as the median of those of two slots.

    Paper: Frey, Dueck, "Clustering by Passing Messages Between Data Points", 2007.
    """
    n = taking.shape[0]
    itself = jnp.eye(n, dtype=bool)
    pair = taking[:, None] & taking
    preference = jnp.nanmedian(jnp.where(pair & ~itself, -distances, jnp.nan))
    low = jnp.asarray(-1e3, distances.dtype)  # of slots that are not looked at: far below any similarity
    # Of equal sums the first slot wins: without this, equal slots would go on being each other's exemplars.
    tie = 1e-6 * jnp.arange(n, dtype=distances.dtype)[::-1] / n
    s = jnp.where(itself, jnp.where(jnp.isnan(preference), 0, preference), -distances) + tie
    s = jnp.where(pair | itself, s, low)

    def step(_: fc.Array, now: tuple[fc.Array, fc.Array]) -> tuple[fc.Array, fc.Array]:
        r, a = now
        both = a + s
        best = jnp.argmax(both, axis=1)
        at_best = jnp.arange(n) == best[:, None]
        second = jnp.max(jnp.where(at_best, -jnp.inf, both), axis=1)
        others = jnp.where(at_best, second[:, None], jnp.max(both, axis=1)[:, None])
        r = damping * r + (1 - damping) * (s - others)
        gains = jnp.where(itself, r, jnp.maximum(r, 0))
        total = jnp.sum(gains, axis=0) - gains
        a = damping * a + (1 - damping) * jnp.where(itself, total, jnp.minimum(total, 0))
        return r, a

    zeros = jnp.zeros_like(s)
    r, a = jax.lax.fori_loop(0, steps, step, (zeros, zeros)) if n > 1 else (zeros, zeros)
    exemplar = taking & (jnp.diagonal(r + a) > 0)
    exemplar = jnp.where(jnp.any(exemplar), exemplar, jnp.arange(n) == jnp.argmax(taking))
    nearest = jnp.argmax(jnp.where(exemplar, s, -jnp.inf), axis=1)
    slots = jnp.arange(n)
    return jnp.where(taking & ~exemplar, nearest, slots).astype(jnp.int32)


def first_slots(labels: fc.Array, taking: fc.Array) -> fc.Array:
    """int32[C], the first slot with the label of each slot; its own for a slot that is not looked at."""
    same = (labels[:, None] == labels) & taking
    return jnp.where(taking, jnp.argmax(same, axis=1), jnp.arange(taking.shape[0])).astype(jnp.int32)


def numbered(groups: fc.Array, taking: fc.Array) -> fc.Array:
    """int32[C], the groups, by their first slots, numbered from 0 on in their order; 0 for slots not looked at."""
    begins = taking & (groups == jnp.arange(groups.shape[0]))
    return jnp.where(taking, (jnp.cumsum(begins) - 1)[groups], 0).astype(jnp.int32)
