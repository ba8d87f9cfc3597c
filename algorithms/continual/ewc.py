"""FedAvg with EWC."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.continual.tasks import ContinualAlgorithm
from fedjax_core import (
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
    Cohort,
    Examples,
    Key,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checked_round,
    checks,
    descend,
    global_algorithm,
    local_training,
    local_work,
    masks,
    move,
    optimizer_at,
    round_metrics,
    sums,
    value_and_grad,
)


class EWCState(NamedTuple):
    """Global model x, every parameter's importance F and center c, the number of tasks ended and of rounds done."""

    params: Params
    importance: Params
    center: Params
    task: Array
    round: Array


def ewc(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    lam: Scalar = 1.0,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> ContinualAlgorithm:
    """EWC: FedAvg in which parameters that earlier tasks depend on are held where those tasks have left them.

    Client, from y = x:  y <- y - lr (g_i(y) + lam F (y - c)), K times, entry by entry.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).
    End of a task:       F_t = sum_S w_i mean_j (grad l_ij(x))^2, over the examples j of client i;
                         c <- (F c + F_t x) / (F + F_t);  F <- F + F_t.

    Down: x, F, c (3P). Up: y_i - x (1P). At the end of a task: x down (1P), the mean over j up (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      lam: weight of the penalty (lam / 2) sum F (y - c)^2; 0 is FedAvg. lr lam F must stay below 2 in every entry.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. At the end of a task a
        client goes over its examples once, holding the gradients of batch_size of them, P each.

    The training loss that is reported is without the penalty.

    Differences: the paper has one learner. F_t is the empirical Fisher information, at the labels that are there, and
    averaged over the cohort like the models. The penalties of all tasks, (lam / 2) sum_t F_t (y - x_t)^2, are kept as
    the one that they add up to, but for a constant.

    Paper: Kirkpatrick et al., "Overcoming Catastrophic Forgetting in Neural Networks", 2017, equation 3.
    """
    checks.scalar("lam", lam, low=0)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
    whole = clients._replace(work=local_work(clients.work.batch_size, order="sequential"))
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> EWCState:
        return EWCState(params, sums.wide_zeros(params), params, jnp.int32(0), jnp.int32(0))

    def round(state: EWCState, cohort: Cohort, key: Key) -> tuple[EWCState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, _, _ = shared
            return x, optimizer.init(x)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            _, F, c = shared
            y, opt_state = carry
            loss, g = gradient(y, batch)
            g = jax.tree.map(lambda g, F, y, c: (g + lam * F * (y - c)).astype(g.dtype), g, F, y, c)
            return descend(optimizer, y, opt_state, g), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _, _ = shared
            y, _ = carry
            return optax.tree.sub(y, x), ()

        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, (state.params, state.importance, state.center), (), cohort, key)
        params = move(state.params, server_lr, results.aggregate)
        metrics = round_metrics(results, cohort, state.params, params)
        return state._replace(params=params, round=state.round + 1), metrics

    def end_task(state: EWCState, cohort: Cohort, key: Key) -> EWCState:
        F_t = whole.run(fisher_program(loss_fn), state.params, (), cohort, key).aggregate
        total = optax.tree.add(state.importance, F_t)
        # (F c + F_t x) / (F + F_t), and c where nothing is known.
        share = jax.tree.map(lambda F_t, F: F_t / jnp.where(F > 0, F, 1), F_t, total)
        center = jax.tree.map(
            lambda c, share, x: (c + share * (x - c)).astype(c.dtype), state.center, share, state.params
        )
        return state._replace(importance=total, center=center, task=state.task + 1)

    return ContinualAlgorithm(**global_algorithm(init, round)._asdict(), end_task=checked_round(end_task))


def fisher_program(loss_fn: LossFn) -> ClientProgram:
    """Uploads the mean of a client's squared gradients, one an example, at the shared params; run it for one epoch."""

    def client_init(x: Params, client_input: Any, key: Key) -> Any:
        return sums.start_tree(x), jnp.int32(0)

    def client_step(x: Params, carry: Any, batch: Batch) -> Any:
        total, n = carry

        def loss(x: Params, example: Examples, number: Array) -> Array:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            return masks.call(loss_fn, x, alone, jax.random.fold_in(batch.key, number))[0]

        size = batch.mask.shape[0]
        losses, g = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(x, batch.examples, jnp.arange(size))
        squares = jax.tree.map(jnp.square, sums.widen(g))
        total = sums.add_tree(total, sums.weighted(batch.mask, squares))
        count = jnp.sum(batch.mask, dtype=jnp.int32)
        summed = jnp.sum(sums.widen(jnp.where(batch.mask, losses, 0)))
        mean = (summed / jnp.maximum(count, 1).astype(summed.dtype)).astype(losses.dtype)
        return (total, n + count), mean

    def client_final(x: Params, carry: Any) -> Any:
        total, n = carry
        # As wide as it is summed: the square of a small gradient is 0 in float16.
        return sums.mean_tree(total, n, sums.widen(x)), ()

    return ClientProgram(client_init, client_step, client_final)
