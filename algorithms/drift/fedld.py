"""FedLD."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


def fedld(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    logits: fc.LogitsFn,
    lam: fc.Scalar = 0.1,
    kept: fc.Scalar = 0.8,
    penalty: str = "example",
    penalized: str = "probabilities",
    aggregation: str = "principal",
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedLD: a penalty on confidence in local training, and updates rebuilt from the directions that clients share.

    Client, from y = x:  q_b = softmax(logits of example b under y);
                         y <- y - lr grad_y (loss + lam mean_b log(1 + ||q_b||^2)), K times;  g_i = y_i - x.
    Server, for every leaf by itself, in the first round:  x <- x + server_lr sum_S p_i g_i.
            Later:  s_1 >= s_2 >= ... and e_j = eigenvalues and eigenvectors of (sqrt(p_i p_l) <g_i, g_l>)_il;
                    w_j = sum_i sqrt(p_i) e_ji g_i;
                    r_i = sum_{j <= k} (s_j / sum s) ||g_i|| sign(<g_i, w_j>) w_j / ||w_j||;
                    x <- x + server_lr sum_S p_i r_i.

    p_i are the clients' weights, which sum to 1 over the n participants (1 / n each in the paper), and k is
    kept n, rounded down but at least 1. What the directions beyond k would have carried is lost, not shared out.

    Down: x (1P). Up: y_i - x (1P). The server must see every single update, so secure aggregation cannot hide them.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      logits: `logits(params, batch, key) -> float[B, C]`, the scores of the C classes for each example. With a model
        of `models` it is `lambda params, batch, key: model.apply(params, batch["x"], key)`.
      lam: weight of the penalty.
      kept: share of the principal directions that is kept, in (0, 1].
      penalty: "example" for the mean over examples, as the paper's figure has it; "batch" for the log(1 + sum_b
        ||q_b||^2) of released code, one logarithm for all (real) examples of a batch.
      penalized: "probabilities", or "logits" to put the logits in the place of q_b.
      aggregation: "principal", or "mean" for the first round's rule in all rounds.
      server_lr: 1 replaces the model by the rebuilt average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The training loss that is reported includes the penalty.

    Differences: the paper's figure does not say whether its f(x) are probabilities or logits; released code takes
    probabilities. The paper weighs all participants alike. Its k would be 0 for a single participant. A client whose
    update is orthogonal to w_j up to rounding gets the sign 0, and directions that rounding alone has made are left
    out; released code has fixed thresholds. Its step that flips w_j has no effect, as r_i does not depend on the sign
    of w_j, and is left out. The first round is the one in which `state.round` is 0, whoever takes part. Released code
    multiplies lr by (round x local epochs) / (warm-up epochs) while that is below 1, counting rounds from 0: nothing
    moves in its first round, and the plain mean is that of the first round with a move. It also takes the plain mean
    for arrays of one entry, for which the rule here gives less where clients do not agree.

    Paper: Zeng, Guo, Wang, Wang, Zhou, Qu, "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
    2024.
    """
    fc.checks.scalar("lam", lam, low=0)
    fc.checks.scalar("kept", kept, low=0, high=1, low_open=True)
    fc.checks.one_of("penalty", penalty, ("example", "batch"))
    fc.checks.one_of("penalized", penalized, ("probabilities", "logits"))
    fc.checks.one_of("aggregation", aggregation, ("principal", "mean"))
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def confidence(y: fc.Params, batch: fc.Batch) -> fc.Array:
        """The penalty of a batch, float[]."""
        q = fc.masks.call(logits, y, batch.examples, batch.key, mask=batch.mask)
        size = batch.mask.shape[0]
        if jnp.ndim(q) != 2 or q.shape[0] != size:
            raise ValueError(
                f"logits must return one row of class scores per example, float[{size}, C], but returned shape "
                f"{list(jnp.shape(q))}: do not average over the batch, and take one position of a sequence"
            )
        square = jnp.sum(jnp.square(jax.nn.softmax(q) if penalized == "probabilities" else q), axis=1)
        if penalty == "batch":
            return jnp.log1p(jnp.sum(fc.sums.widen(jnp.where(batch.mask, square, 0)))).astype(square.dtype)
        return fc.batch_loss(lambda *_: jnp.log1p(square), y, batch)

    def objective(y: fc.Params, batch: fc.Batch) -> fc.Array:
        return fc.batch_loss(loss_fn, y, batch) + lam * confidence(y, batch)

    def direction(y, batch, x, _):
        return fc.tasks.value_and_grad(objective)(y, batch)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        def rebuilt(updates: fc.Params, weights: fc.Array) -> fc.Params:
            plain = fc.sums.weighted(fc.sums.shares(weights), updates)
            return optax.tree.where(state.round == 0, plain, principal_mean(updates, weights, kept))

        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction)
        aggregator = fc.stacked(rebuilt) if aggregation == "principal" else None
        results = clients.run(program, state.params, cohort, key, aggregator=aggregator)
        return state._replace(params=fc.add_scaled(state.params, server_lr, results.aggregate)), results

    return fc.federated(fc.ModelState, update)


def principal_mean(updates: fc.Params, weights: fc.Array, kept: fc.Scalar) -> fc.Params:
    """The mean of updates rebuilt from their principal directions, every leaf by itself: the server's rule of `fedld`.

    All directions are combinations of the updates, so that only their C x C products are needed: the result is
    sum_i a_i g_i with a = sqrt(p) sum_{j <= k} e_j (s_j / sum s) (sum_i p_i ||g_i|| sign(e_ji)) / sqrt(s_j), because
    <g_i, w_j> = s_j e_ji / sqrt(p_i) and ||w_j|| = sqrt(s_j).

    Args:
      updates: the updates of C clients, leaves [C, ...].
      weights: float[C], at least 0; a client with weight 0 has no part in the result.
      kept: share of the directions that is kept.

    Returns:
      Leaves [...]; zeros if no weight is above 0.
    """
    leaves, treedef = jax.tree.flatten(updates)
    dtype = jnp.result_type(jnp.float32, *leaves)
    p = fc.sums.shares(weights).astype(dtype)
    root = jnp.sqrt(p)
    rows = [jnp.where(p[:, None] > 0, leaf.reshape(leaf.shape[0], -1), 0).astype(dtype) for leaf in leaves]
    gram = jnp.stack([jnp.matmul(g, g.T, precision=jax.lax.Precision.HIGHEST) for g in rows])
    k = jnp.maximum(jnp.floor(kept * jnp.sum(p > 0) + 1e-4), 1)  # 0.7 * 10 is 7 whatever the precision
    rounding = 4 * p.shape[0] * jnp.finfo(dtype).eps

    def coefficients(gram: fc.Array) -> fc.Array:
        s, e = fc.linalg.eigh(root[:, None] * root * gram)
        norm = jnp.sqrt(jnp.diagonal(gram))
        s, e = s[::-1], e[:, ::-1]  # the largest first
        principal = (jnp.arange(s.shape[0]) < k) & (s > rounding * s[0])
        length = jnp.sqrt(jnp.where(principal, s, 1))
        # The cosine of g_i and w_j is sqrt(s_j) e_ji / (sqrt(p_i) ||g_i||); below rounding it has no sign.
        sign = jnp.where(length * jnp.abs(e) > rounding * (root * norm)[:, None], jnp.sign(e), 0)
        share = jnp.where(principal, s / jnp.where(s[0] > 0, jnp.sum(s), 1), 0)
        return root * (e @ (share * ((p * norm) @ sign) / length))

    parts = zip(jax.vmap(coefficients)(gram), rows, leaves, strict=True)
    means = [
        jnp.matmul(a, g, precision=jax.lax.Precision.HIGHEST).reshape(leaf.shape[1:]).astype(leaf.dtype)
        for a, g, leaf in parts
    ]
    return jax.tree.unflatten(treedef, means)
