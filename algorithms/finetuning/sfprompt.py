"""SFPrompt."""

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts.pruning import pruned


class SFPromptMetrics(NamedTuple):
    """What a participant has sent and received, up and down together, float[] each, means over the participants.

    Attributes:
      model_bytes: of the prompt and the tail.
      smashed_bytes: of activations and their gradients at the two cuts.
      kept: examples that are left after pruning.
    """

    model_bytes: fc.Array
    smashed_bytes: fc.Array
    kept: fc.Array


def sfprompt(
    model: fc.SplitModel,
    client_optimizer: fc.ClientOptimizer,
    *,
    keep: fc.Scalar = 0.5,
    self_epochs: int = 10,
    scored: str = "after",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """SFPrompt: prompt and tail of a frozen model are trained, of which the server runs the body.

    Trained: x = (p, W_t), a soft prompt in the head and the tail. Frozen: W_h with the clients, W_b with the server.

    Client, from y = x:
      1. alone, U epochs:  y <- y - lr grad loss(tail(head(y))), without the body.
      2. pruning:  e_j = ||softmax(tail(head(y, x_j))) - onehot(y_j)||; the ceil(gamma n) largest stay, in their order.
      3. with the server, each batch of those, E epochs:
           s = head(y) up;  r = body(s) down;  g_r = d loss(tail(y, r)) / d r up;  g_s = g_r d body / d s down;
           y <- y - lr (d loss / d y at r  +  g_s d head / d y).
    Server:  x <- sum_S w_k y_k.

    Down: x, and r and g_s for each example and epoch of phase 3. Up: y_k - x, and s and g_r. Phases 1 and 2 send
    nothing. The metrics count all of it.

    Args:
      model: an `fc.Split`, head, body, tail and loss; `models.split` cuts one of this package. The frozen parameters
        are the population's public data.
      client_optimizer: optax optimizer, started anew in both phases of every round, or a function of the round, or of
        the round and the client's id, giving one.
      keep: gamma, share of a client's examples that stay for phase 3, at least one; 1 prunes nothing, and 0 leaves
        phases 2 and 3 out (a number then, not a traced one).
      self_epochs: U; 0 leaves phase 1 out.
      scored: e_j are of the model "after" phase 1, or "before" it, as received.
      **local: batch_size, num_epochs (E) or num_steps, order, weights, plan; see `LocalOptions`. Phase 1 takes over all
        but the amount of work. `weights="examples"` are n_k before pruning.

    Differences: for a loss that is no cross-entropy e_j is the norm of its derivative by the outputs, which for
    cross-entropy is the formula above. No code of the authors is known. A re-implementation by others scores before
    phase 1 and takes plain means, which are the default here too; its gradients do not cross the cuts (it hands on the
    mean of activations, with a new optimizer for each example). Each phase starts the optimizer anew.

    Paper: Cao, Zhu, Gong, "SFPrompt: Communication-Efficient Split Federated Fine-Tuning for Large Pre-Trained Models
    over Resource-Limited Devices", 2024.
    """
    if not isinstance(model, fc.Split):
        raise TypeError(
            f"model must be an fc.Split, got {type(model).__name__}: pass models.split(...) or fc.Split(...)"
        )
    fc.checks.scalar("keep", keep, low=0, high=1)
    fc.checks.one_of("scored", scored, ("after", "before"))
    self_epochs = fc.checks.count("self_epochs", self_epochs, "0 leaves that phase out")
    prunes = not (fc.checks.is_concrete(keep) and keep == 1)
    splits = not (fc.checks.is_concrete(keep) and keep == 0)
    if not splits and not self_epochs:
        raise ValueError("keep=0 and self_epochs=0 leave nothing to train: raise one of them")
    clients = fc.local_training(**local)
    alone = clients._replace(work=clients.work._replace(num_epochs=self_epochs, num_steps=None))

    def mean_loss(outputs: fc.Array, batch: fc.Batch) -> fc.Array:
        return fc.batch_loss(lambda outputs, examples, key: model.loss(outputs, examples), outputs, batch)

    def shortcut(y: fc.Params, public: Any, examples: fc.Examples, key: fc.Key | None) -> fc.Array:
        return model.tail(y, public, model.head(y, public, examples, key), key)

    def split_gradient(y: fc.Params, public: Any, batch: fc.Batch) -> tuple[fc.Array, fc.Params]:
        """Loss and gradient of a batch by what crosses the two cuts, and nothing else."""
        s, head_back = jax.vjp(lambda y: model.head(y, public, batch.examples, batch.key), y)
        r, body_back = jax.vjp(lambda s: model.body(public, s, batch.key), s)
        loss, tail_back = jax.vjp(lambda y, r: mean_loss(model.tail(y, public, r, batch.key), batch), y, r)
        of_tail, g_r = tail_back(jnp.ones_like(loss))
        (g_s,) = body_back(g_r)
        (of_head,) = head_back(g_s)
        return loss, optax.tree.add(of_tail, of_head)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        public, examples = cohort.public, cohort.examples
        x: Any = state.params
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def own_gradient(y, batch, x, own):
            return jax.value_and_grad(lambda y: mean_loss(shortcut(y, public, batch.examples, batch.key), batch))(y)

        def sent(done, x):
            return optax.tree.sub(done.params, x), ()

        own: Any = ()
        if not splits:
            results = alone.run(fc.local_descent(optimizer, own_gradient, upload=sent), x, cohort, key)
            return averaged(state, cohort, [results], jnp.zeros_like(cohort.sizes), ((), ()))
        passes: list[fc.ClientResults] = []
        if self_epochs:
            program = fc.local_descent(optimizer, own_gradient, upload=lambda done, x: ((), done.params))
            passes.append(alone.run(program, x, cohort, jax.random.fold_in(key, 1)))
            x, own = fc.Message(x, 0), passes[-1].outputs  # x goes down once
        # From here on a batch holds the rows of its examples, of which pruning makes others.
        num_rows = fc.checks.leading_axis(examples)
        rows = replace(cohort, examples=jnp.arange(num_rows, dtype=jnp.int32))

        def read(batch: fc.Batch) -> fc.Batch:
            return batch._replace(examples=jax.tree.map(lambda leaf: leaf[batch.examples], examples))

        def score(x, now, batch):
            y, scores = now
            found = _derivative_norms(model.loss, shortcut(y, public, read(batch).examples, None), read(batch))
            there = jnp.where(batch.mask, batch.examples, num_rows)
            return (y, scores.at[there].set(found.astype(scores.dtype), mode="drop")), jnp.zeros(())

        if prunes:
            scoring = fc.ClientProgram(
                lambda x, own, key: (own if self_epochs and scored == "after" else x, jnp.zeros(num_rows)),
                score,
                lambda x, done: ((), done[1]),
            )
            passes.append(clients.full_pass().run(scoring, x, rows, jax.random.fold_in(key, 2), client_inputs=own))
            x, rows = fc.Message(state.params, 0), pruned(rows, jnp.sum(passes[-1].outputs, axis=0), keep)

        def step(x, now, batch):
            (y, opt_state), count = now
            loss, g = split_gradient(y, public, read(batch))
            return (fc.optimizer_step(optimizer, y, opt_state, g), count + jnp.sum(batch.mask, dtype=jnp.int32)), loss

        def start(x, own, key):
            y = own if self_epochs else x
            return (y, optimizer.init(y)), jnp.int32(0)

        program = fc.ClientProgram(start, step, lambda x, done: (optax.tree.sub(done[0][0], x), done[1]))
        with_server = clients._replace(weights=_before_pruning(clients.weights, cohort))
        passes.append(with_server.run(program, x, rows, key, client_inputs=own))
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), examples)
        s = jax.eval_shape(model.head, state.params, public, one, key)
        return averaged(state, cohort, passes, rows.sizes, (s, jax.eval_shape(model.body, public, s, key)))

    def averaged(state: fc.ModelState, cohort: fc.Cohort, passes: list[fc.ClientResults], kept: fc.Array, cut: Any):
        """The new model and what has traveled, `cut` being what one example's s and r are."""
        (s, r), (*before, results) = cut, passes
        merged = fc.merge_phases(results, bytes_of=before)  # the loss is that of the whole model
        of_model = merged.bytes_up + merged.bytes_down
        examples = results.outputs.astype(of_model.dtype) if jax.tree.leaves(cut) else jnp.zeros_like(of_model)
        up = examples * (fc.num_bytes(s) + fc.num_bytes(_floats(r)))
        down = examples * (fc.num_bytes(r) + fc.num_bytes(_floats(s)))
        merged = merged._replace(bytes_up=merged.bytes_up + up, bytes_down=merged.bytes_down + down)
        params = fc.add_scaled(state.params, 1.0, results.aggregate)
        extra = [fc.mean_over_participants(values, cohort) for values in (of_model, up + down, kept)]
        return state._replace(params=params), merged, SFPromptMetrics(*extra)

    return fc.federated(fc.ModelState, update)


def _derivative_norms(loss: Any, outputs: fc.Array, batch: fc.Batch) -> fc.Array:
    """float[B], norms of the derivatives of each example's loss by its outputs."""
    g = jax.grad(lambda outputs: jnp.sum(jnp.where(batch.mask, loss(outputs, batch.examples), 0)))(outputs)
    return jnp.sqrt(jnp.sum(jnp.square(fc.sums.widen(g)).reshape(g.shape[0], -1), axis=1))


def _before_pruning(weights: fc.Weights, cohort: fc.Cohort) -> fc.Weights:
    """Weights by the numbers of examples as an array, which pruning does not change."""
    if not (isinstance(weights, str) and weights == "examples"):
        return weights
    if cohort.population_size is None:
        raise ValueError(
            'weights="examples" needs the size of the population: make the cohort by population.cohort(ids)'
        )
    ids = jnp.where(cohort.mask, cohort.ids, cohort.population_size)
    return jnp.ones(cohort.population_size).at[ids].set(cohort.sizes.astype(float), mode="drop")


def _floats(tree: Any) -> list[Any]:
    """The leaves that have gradients."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
