"""FRL: federated rank learning."""

import functools
import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts import rankings
from algorithms.parts.selection import largest


class FRLState(NamedTuple):
    """The sub-network and what it is made of.

    Attributes:
      params: theta * m, the model, and the leaves that are not ranked.
      weights: theta, the frozen weights of the leaves that are ranked.
      scores: the first scores of every ranked leaf, [n], from the least important on.
      ranking: R of every ranked leaf, int32[n], its edges from the least important on.
      round: number of rounds done.
    """

    params: fc.Params
    weights: fc.Params
    scores: fc.Params
    ranking: fc.PyTree
    round: fc.Counter = 0


class FRLMetrics(NamedTuple):
    """What was voted.

    Attributes:
      refused: int32[], participants whose vote was no ranking, and did not count.
    """

    refused: fc.Array


class _Fixed(NamedTuple):
    """What no round changes: theta, the first scores, and the leaves that are not ranked."""

    weights: fc.Params
    scores: fc.Params
    others: fc.Params


def frl(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    kept: fc.Scalar = 0.5,
    sent: fc.Scalar = 1.0,
    importance: str = "signed",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FRL: clients vote on which weights of a fixed random network to keep, by rankings of its edges.

    For every leaf with n edges, theta = +-sqrt(2 / fan_in) and first scores S0 ~ U[-1, 1] / sqrt(fan_in), sorted:
    Client, from s[R[j]] = S0[j]:  m = 1 for the edges of the n - floor((1 - kept) n) highest scores, else 0;
                                   s <- s - lr theta * grad f_i(theta * m), for every edge, kept or not, K times;
                                   R_i = argsort(s).
    Server:                        V = sum_S argsort(R_i);  R <- argsort(V).

    argsort(R_i) is the place of every edge in the client's ranking. Sorting is stable: of equals the edge with the
    lower number comes first.

    Down: R. Up: R_i. Both are integers, n ceil(log2 n) bits for every leaf. theta and S0 come from a seed. A vote that
    is no ranking (an edge twice, a number that is no edge) does not count. Whatever M malicious clients send, an edge
    that is ahead of another by more than M (n - 1) in the votes of the others stays ahead.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer of the scores, started anew in every round, or a function of the round, or of
        the round and the client's id, giving one. The paper's is
        `optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.4, 0.9))`.
      kept: share of the edges of every leaf that is kept, in (0, 1].
      sent: share of the edges of every leaf that clients list, the highest, in (0, 1]; to the others they give place
        0. Below 1 it is the paper's sparse form, of sent n ceil(log2 n) bits up.
      importance: "signed" scores; "abs", their absolute values, by which edges are then kept and ranked alike; or
        "released", which ranks scores and keeps the largest absolute values, as released code does.
      **local: batch_size, num_epochs or num_steps, order, plan; see `LocalOptions`. Every client has one vote, so
        there are no weights.

    The leaves with two axes or more are ranked, fan_in being the product of all axes but the last. The others, biases
    and scales, stay as the model begins: 0 and 1 in most libraries, where the paper has none. `init` needs a key.

    Differences: released code keeps the edges at both ends of the ranking (`importance="released"`), the paper's text
    those at its top.

    Paper: Mozaffari, Shejwalkar, Houmansadr, "Every Vote Counts: Ranking-Based Training of Federated Learning to
    Resist Poisoning Attacks", 2023.
    """
    fc.checks.scalar("kept", kept, low=0, low_open=True, high=1)
    fc.checks.scalar("sent", sent, low=0, low_open=True, high=1)
    fc.checks.one_of("importance", importance, ("signed", "abs", "released"))
    weights = local.get("weights", "uniform")
    if not isinstance(weights, str) or weights != "uniform":
        raise ValueError(f"weights={weights!r:.60} means nothing to frl, where every client has one vote: leave it out")
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def ranked_by(s: fc.Array) -> fc.Array:
        return jnp.abs(s) if importance == "abs" else s

    def masked(theta: fc.Array, s: fc.Array) -> fc.Array:
        by = s if importance == "signed" else jnp.abs(s)
        return jnp.where(largest(by, rankings.listed(kept, s.size), ties="last"), theta, 0)

    def through(g: fc.Array, theta: fc.Array, s: fc.Array) -> fc.Array:
        """The gradient of a score, straight through the mask."""
        return theta * g if importance == "signed" else jnp.sign(s) * theta * g

    def init(params: fc.Params, key: fc.Key) -> FRLState:
        ranked, others = _ranked(params)
        theta, first = _drawn(ranked, key)
        ranking = jax.tree.map(lambda s: rankings.ranking(ranked_by(s.reshape(-1))), first)
        scores = jax.tree.map(lambda s, r: s.reshape(-1)[r], first, ranking)
        fixed = _Fixed(theta, scores, others)
        return FRLState(model(first, fixed), theta, scores, ranking)

    def start(shared: tuple[fc.PyTree, _Fixed], own: fc.PyTree = ()) -> fc.Params:
        """The scores of a ranking."""
        ranking, fixed = shared

        def one(theta: fc.Array, r: fc.Array, first: fc.Array) -> fc.Array:
            return jnp.zeros_like(first).at[r].set(first, unique_indices=True).reshape(theta.shape)

        return jax.tree.map(one, fixed.weights, ranking, fixed.scores)

    def model(s: fc.Params, fixed: _Fixed) -> fc.Params:
        return fc.combine(jax.tree.map(masked, fixed.weights, s), fixed.others)

    def direction(s, batch, shared, own):
        _, fixed = shared
        loss, g = gradient(model(s, fixed), batch)
        return loss, jax.tree.map(through, _ranked(g)[0], fixed.weights, s)

    def upload(done: fc.Descent, shared: fc.PyTree) -> tuple[fc.Message, tuple[()]]:
        def vote(s: fc.Array) -> fc.Array:
            return rankings.first_left_out(rankings.ranking(ranked_by(s.reshape(-1))), rankings.listed(sent, s.size))

        return fc.Message(jax.tree.map(vote, done.params), _size(done.params, sent)), ()

    def counted(votes: fc.PyTree) -> tuple[fc.PyTree, fc.Array]:
        """The places that a client gives to edges and 1, or zeros."""
        valid = [rankings.is_ranking(vote, rankings.listed(sent, vote.size)) for vote in jax.tree.leaves(votes)]
        counts = functools.reduce(jnp.logical_and, valid).astype(jnp.uint32)
        return jax.tree.map(lambda vote: counts * rankings.reputation(vote), votes), counts

    def update(state: FRLState, cohort: fc.Cohort, key: fc.Key):
        _check_votes(state.ranking, cohort)
        fixed = _Fixed(state.weights, state.scores, _ranked(state.params)[1])
        # What is fixed is made of the seed: it goes along, and is not sent.
        shared = fc.Message((state.ranking, fixed), _size(state.ranking, 1.0))
        program = fc.local_descent(
            fc.optimizer_at(client_optimizer, state.round), direction, start=start, upload=upload
        )
        results = clients.run(program, shared, cohort, key, aggregator=fc.mapped(counted, fc.integer_sum()))
        votes, count = results.aggregate
        new = jax.tree.map(lambda v, old: jnp.where(count > 0, rankings.ranking(v), old), votes, state.ranking)
        state = state._replace(params=model(start((new, fixed)), fixed), ranking=new)
        return state, results, FRLMetrics(cohort.num_participants - count.astype(jnp.int32))

    return fc.federated(init, update)


def _ranked(params: fc.Params) -> tuple[fc.Params, fc.Params]:
    """(the leaves that are ranked, the others)."""
    if not any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "frl ranks the edges of leaves with two axes or more, and the model has none: take a model with a kernel"
        )
    ranked, others = fc.partition(params, lambda path, leaf: jnp.ndim(leaf) > 1)
    return ranked, others


def _drawn(ranked: fc.Params, key: fc.Key) -> tuple[fc.Params, fc.Params]:
    """Frozen weights and first scores, drawn in float32: the same in both precisions."""
    leaves, treedef = jax.tree.flatten(ranked)
    weights, scores = [], []
    for leaf, own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        one, other = jax.random.split(own)
        fan_in = math.prod(leaf.shape[:-1])
        sign = jnp.sign(jax.random.normal(one, leaf.shape, jnp.float32)).astype(leaf.dtype)
        uniform = jax.random.uniform(other, leaf.shape, jnp.float32, -1, 1).astype(leaf.dtype)
        weights.append(sign * jnp.asarray(math.sqrt(2 / fan_in), leaf.dtype))
        scores.append(uniform * jnp.asarray(1 / math.sqrt(fan_in), leaf.dtype))
    return jax.tree.unflatten(treedef, weights), jax.tree.unflatten(treedef, scores)


def _size(ranked: fc.PyTree, share: fc.Scalar) -> fc.Scalar:
    """Bytes of the listed edges, each in the bits that their number takes."""
    sizes = [leaf.size for leaf in jax.tree.leaves(ranked)]
    return sum(rankings.listed(share, n) * (n - 1).bit_length() for n in sizes) / 8


def _check_votes(ranking: fc.PyTree, cohort: fc.Cohort) -> None:
    slots, most = cohort.ids.shape[0], max(leaf.shape[0] for leaf in jax.tree.leaves(ranking)) - 1
    if slots * most >= 2**32:
        raise ValueError(
            f"the cohort has {slots} slots, and of a leaf of {most + 1} edges the votes of so many clients pass 2^32, "
            f"which cannot be counted: take cohorts of at most {2**32 // most}"
        )
