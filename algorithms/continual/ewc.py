"""FedAvg with EWC."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class EWCState(NamedTuple):
    """Global model x, every parameter's importance F and center c, the number of tasks ended and of rounds done."""

    params: fc.Params
    importance: fc.Params
    center: fc.Params
    task: fc.Array
    round: fc.Counter = 0


def ewc(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    lam: fc.Scalar = 1.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
    fc.checks.scalar("lam", lam, low=0)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> EWCState:
        return EWCState(params, fc.sums.wide_zeros(params), params, jnp.int32(0))

    def direction(y, batch, shared, _):
        _, F, c = shared
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, F, y, c: (g + lam * F * (y - c)).astype(g.dtype), g, F, y, c)

    def update(state: EWCState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction, start=fc.first_part)
        results = clients.run(program, (state.params, state.importance, state.center), cohort, key)
        return state._replace(params=fc.add_scaled(state.params, server_lr, results.aggregate)), results

    def end_task(state: EWCState, cohort: fc.Cohort, key: fc.Key) -> EWCState:
        F_t = clients.full_pass().run(fisher_program(loss_fn), state.params, cohort, key).aggregate
        total = optax.tree.add(state.importance, F_t)
        # (F c + F_t x) / (F + F_t), and c where nothing is known.
        share = jax.tree.map(lambda F_t, F: F_t / jnp.where(F > 0, F, 1), F_t, total)
        center = jax.tree.map(
            lambda c, share, x: (c + share * (x - c)).astype(c.dtype), state.center, share, state.params
        )
        return state._replace(importance=total, center=center, task=state.task + 1)

    return fc.federated(init, update, events={"end_task": fc.Event(end_task, "task")})


def fisher_program(loss_fn: fc.LossFn) -> fc.ClientProgram:
    """Uploads the mean of a client's squared gradients, one an example, at the shared params; run it for one epoch."""

    def client_init(x: fc.Params, client_input: fc.PyTree, key: fc.Key):
        return fc.sums.start_tree(x), jnp.int32(0)

    def client_step(x: fc.Params, carry: fc.PyTree, batch: fc.Batch):
        total, n = carry

        def loss(x: fc.Params, example: fc.Examples, number: fc.Array) -> fc.Array:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            with fc.tasks.reading(frozen=True):  # one example has no variance
                return fc.masks.call(loss_fn, x, alone, jax.random.fold_in(batch.key, number))[0]

        size = batch.mask.shape[0]
        losses, g = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(x, batch.examples, jnp.arange(size))
        squares = jax.tree.map(jnp.square, fc.sums.widen(g))
        total = fc.sums.add_tree(total, fc.sums.weighted(batch.mask, squares))
        count = jnp.sum(batch.mask, dtype=jnp.int32)
        summed = jnp.sum(fc.sums.widen(jnp.where(batch.mask, losses, 0)))
        mean = (summed / jnp.maximum(count, 1).astype(summed.dtype)).astype(losses.dtype)
        return (total, n + count), mean

    def client_final(x: fc.Params, carry: fc.PyTree):
        total, n = carry
        # As wide as it is summed: the square of a small gradient is 0 in float16.
        return fc.sums.mean_tree(total, n, fc.sums.widen(x)), ()

    return fc.ClientProgram(client_init, client_step, client_final)
