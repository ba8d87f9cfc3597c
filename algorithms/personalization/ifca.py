"""IFCA."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_core as fc
from algorithms.parts.clusters import model_of


class IFCAState(NamedTuple):
    """The k models, who has chosen them, and the number of rounds done.

    Attributes:
      params: the models x_1 to x_k, leaves [k, ...].
      members: float[k], weight of the clients that chose each model in the last round.
      choices: rows, the model that each client chose last, int32[]; 0 before it has.
      round: rounds done.
    """

    params: fc.Params
    members: fc.Array
    choices: fc.ClientTable
    round: fc.Counter = 0


def ifca(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    num_models: int = 2,
    start: Callable[[fc.Key], fc.Params] | None = None,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """IFCA: k models, each trained by the clients whose examples it fits best.

    Client:  j_i = argmin_j f_i(x_j) on its own training examples, the lowest of equals;
             from y = x_j, j = j_i:  y <- y - lr g_i(y), K times.
    Server:  x_j <- x_j + server_lr sum_{i in S, j_i = j} w_i (y_i - x_j) / sum_{i in S, j_i = j} w_i;
             a model that nobody chooses stays.

    Down: x_1 to x_k (kP). Up: j_i and y_i - x_j (1P + 1).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      num_models: k. 1 is FedAvg.
      start: `start(key) -> params`, which draws the models but the first, that of `init(params, key)`: for example the
        `init` of a model. Unless given, each has the entries of every leaf of the first in an order of its own, which
        is as if drawn anew where a leaf's entries were drawn independently. It must make models differ.
      server_lr: 1 replaces each model by its average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    A client chooses in a pass over its examples before it trains. In the view "personal" a client predicts with the
    model that its examples choose; `client_params` gives the one it chose when it took part last. The models are no
    parts of one model and their average is none: the global model is the one that most of the last round's clients
    chose.

    Differences: the paper also has a form that averages gradients (take `num_steps=1` and full batches), and one whose
    lower layers are shared by all models, which is left out. It restarts several times and keeps the best.

    Paper: Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated Learning", 2020, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.positive_int("num_models", num_models, "one model is FedAvg")
    fc.checks.scalar("server_lr", server_lr, low=0)
    if start is not None:
        fc.checks.function("start", start, "the init of a model, key -> params")
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)
    choosing = choice(loss_fn, num_models)

    def init(params: fc.Params, key: fc.Key) -> IFCAState:
        drawn = [(start or reordered(params))(k) for k in fc.keys.split(key, num_models - 1)]
        for other in drawn:  # whatever its dtypes
            fc.checks.same_structure("start(key)", _zeros(other), _zeros(params), "params")
        others = [fc.sums.cast_like(other, params) for other in drawn]
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, *others)
        return IFCAState(models, jnp.zeros(num_models), fc.client_table(num_clients, jnp.int32(0)))

    def upload(done: fc.Descent, models: fc.Params):
        return (done.own, optax.tree.sub(done.params, model_of(models, done.own))), ()

    def update(state: IFCAState, cohort: fc.Cohort, key: fc.Key):
        before = fc.gather(state.choices, cohort)
        choices = clients.full_pass().run(choosing, state.params, cohort, key, client_inputs=before)
        chosen, models = choices.outputs, fc.Message(state.params, 0)  # clients have them from the first pass
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, gradient, start=model_of, upload=upload)
        results = clients.run(
            program, models, cohort, key, client_inputs=chosen, aggregator=fc.segment_mean(num_models)
        )
        step, members = results.aggregate
        params = fc.add_scaled(state.params, server_lr, step)
        state = IFCAState(params, members, fc.scatter(state.choices, cohort, chosen))
        return state, fc.merge_phases(results, bytes_of=[choices])

    personal = fc.View(
        lambda state: state.params,
        model_of,
        lambda state: state.choices,
        fc.Adaptation(choosing, clients.full_pass().work),
    )
    return fc.federated(
        init, update, lambda state: model_of(state.params, jnp.argmax(state.members)), views={"personal": personal}
    )


def _zeros(tree: fc.Params) -> fc.Params:
    return jax.tree.map(lambda leaf: np.zeros(np.shape(leaf)), tree)


def choice(loss_fn: fc.LossFn, num_models: int) -> fc.ClientProgram:
    """A client that finds which of the models loses least on its examples; without any it keeps its choice."""

    def init(models, before, key):
        return before, fc.sums.start((num_models,), jnp.result_type(float)), jnp.bool_(False)

    def step(models, carry, batch):
        before, total, _ = carry
        losses = jax.vmap(lambda params: fc.batch_loss(loss_fn, params, batch))(models).astype(jnp.result_type(float))
        return (before, fc.sums.add(total, jnp.sum(batch.mask) * losses), jnp.bool_(True)), jnp.min(losses)

    def final(models, carry):
        before, total, seen = carry
        losses = fc.sums.value(total)
        best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses)).astype(jnp.int32)
        return (), jnp.where(seen, best, before)

    return fc.ClientProgram(init, step, final)


def reordered(params: fc.Params) -> Callable[[fc.Key], fc.Params]:
    """Draws models of which every leaf has the entries of that of `params`, in an order of its own."""

    def draw(key: fc.Key) -> fc.Params:
        leaves, treedef = jax.tree.flatten(params)
        orders = fc.keys.split(key, len(leaves))
        mixed = [
            jax.random.permutation(k, leaf.ravel()).reshape(leaf.shape) for k, leaf in zip(orders, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, mixed)

    return draw
