"""Federated LoRA."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc
from algorithms.parts import low_rank


class FedLoRAState(NamedTuple):
    """The adapter of the largest rank, every client's rank, and the number of rounds done."""

    params: fc.Params
    ranks: fc.ClientTable
    round: fc.Counter = 0


def fedlora(
    loss_fn: fc.AdapterLossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    rule: str = "factors",
    ranks: Any = None,
    alpha: fc.Scalar = 16.0,
    scaling: str = "rank",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Federated LoRA: clients of different ranks train low-rank changes of a frozen model, and only these travel.

    A layer's part {"A": [in, r], "B": [r, out]} changes its weight by c A B, c = alpha / r. Client k has rank r_k <= r,
    c_k = alpha / r_k, and the first r_k columns of A and rows of B; D_k = c_k A_k B_k.

    Client, from the first r_k columns and rows:  y <- y - lr g_k(y), K times.
    Server, "factors":   A <- sum_S w_k A_k;  B <- sum_S w_k B_k.
            "norms":     the same with weights w_k ||A_k B_k||_F, for each layer.
            "products":  D = sum_S w_k D_k = P S Q';  A <- P_r;  B <- S_r Q_r' / c;  client k: B_k = S Q' / c_k.

    "factors" is FedIT, with zeros where a client has nothing; "norms" is HetLoRA's weighing; "products" is FlexLoRA, by
    singular values: the mean of what the clients do, up to the values cut off. Leaves that belong to no such part, such
    as a head, are averaged as in FedAvg.

    Down, up: r_k (in + out) numbers for each layer, and the other leaves; up r_k too. The metrics count these bytes.

    Args:
      loss_fn: `loss_fn(adapter, batch, key) -> float[B]`, or with a fourth parameter `public`, in which it finds the
        frozen model; its own scale is that of the largest rank, c = alpha / r.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      rule: "factors", "norms" or "products".
      ranks: r_k, int[N]; the adapter's own for all unless given.
      alpha: as in the loss.
      scaling: what c is: "rank" for alpha / r, "root" for alpha / sqrt(r), "constant" for alpha.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: HetLoRA also lets clients prune their ranks, which is not done here. A round's adapter is trained in
    place of FedIT's own optimizer state, which its clients start anew too.

    Paper: Zhang, Vahidian, Kuo, Li, Zhang, Yu, Zhou, Chen, "Towards Building the FederatedGPT: Federated Instruction
    Tuning", 2024; Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models", 2024; Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
    and Client Resources", 2024.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.one_of("rule", rule, ("factors", "norms", "products"))
    fc.checks.one_of("scaling", scaling, ("rank", "root", "constant"))
    fc.checks.scalar("alpha", alpha)
    own_ranks = None if ranks is None else low_rank.ranks_of_clients(ranks, num_clients)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def strength(rank: Any) -> Any:
        return {"rank": alpha / rank, "root": alpha / rank**0.5, "constant": alpha}[scaling]

    def init(params: fc.Params) -> FedLoRAState:
        most = low_rank.rank_of(params)
        own = np.full(num_clients, most) if own_ranks is None else own_ranks
        if own.max() > most:
            raise ValueError(
                f"ranks[{own.argmax()}] is {own.max()}, but the adapter's rank is {most}: make it of a larger rank, "
                f"models.adapters.lora({own.max()}), or lower the clients'"
            )
        return FedLoRAState(params, fc.ClientTable(jnp.asarray(own, jnp.int32)))

    def received(x: fc.Params, rank: fc.Array) -> fc.Params:
        """A client's part of the server's adapter, with which it does D cut to its rank, or its factors' product."""
        times = strength(low_rank.rank_of(x)) / strength(rank) if rule == "products" else 1.0
        return low_rank.cut(x, rank, times)

    def in_loss(y: fc.Params, rank: fc.Array) -> fc.Params:
        """What the loss takes, whose scale is that of the largest rank, for a client's own adapter."""
        return low_rank.cut(y, rank, strength(rank) / strength(low_rank.rank_of(y)))

    def sent(x: fc.Params, rank: fc.Array) -> fc.Message:
        """An adapter as it travels, without the columns and rows beyond a client's rank (or those of all clients)."""
        of_rank = fc.num_bytes(low_rank.pairs_of(x))
        return fc.Message(x, fc.num_bytes(x) - of_rank + of_rank / low_rank.rank_of(x) * rank)

    def direction(y: fc.Params, batch: fc.Batch, x: fc.Params, rank: fc.Array):
        cut, backward = jax.vjp(lambda y: in_loss(y, rank), y)
        loss, g = gradient(cut, batch)
        return loss, backward(g)[0]

    def upload(done: fc.Descent, x: fc.Params):
        return (sent(low_rank.cut(done.params, done.own), done.own), done.own), ()

    def update(state: FedLoRAState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(
            fc.optimizer_at(client_optimizer, state.round), direction, start=received, upload=upload
        )
        ranks = fc.gather(state.ranks, cohort)
        results = clients.run(
            program,
            sent(state.params, ranks),
            cohort,
            key,
            client_inputs=ranks,
            aggregator=fc.mapped(lambda upload: summand(*upload), fc.weighted_mean()),
        )
        return state._replace(params=finished(results.aggregate, state.params)), results

    def summand(y: fc.Params, rank: fc.Array) -> fc.Params:
        def of_part(part):
            product = part["A"] @ part["B"]
            if rule == "products":
                return strength(rank) * product
            norm = fc.sums.norm(product) if rule == "norms" else jnp.ones((), product.dtype)
            return {"A": norm * part["A"], "B": norm * part["B"], "norm": norm}

        return low_rank.map_pairs(of_part, y)

    def finished(mean: fc.Params, old: fc.Params) -> fc.Params:
        def of_part(was, part):
            if rule != "products":
                some = part["norm"] > 0
                norm = jnp.where(some, part["norm"], 1)
                return {name: jnp.where(some, part[name] / norm, was[name]).astype(was[name].dtype) for name in "AB"}
            r = was["A"].shape[1]
            P, S, Q = fc.linalg.svd(part)
            A, B = low_rank.to_rank(P, r, 1), low_rank.to_rank(S[:, None] * Q, r, 0) / strength(r)
            return {"A": A.astype(was["A"].dtype), "B": B.astype(was["B"].dtype)}

        return low_rank.map_pairs(of_part, old, mean)

    def in_prediction(x: fc.Params, rank: fc.Array) -> fc.Params:
        return in_loss(received(x, rank), rank)

    personal = fc.View(lambda state: state.params, in_prediction, lambda state: state.ranks)
    return fc.federated(init, update, views={"personal": personal}, main="global")
