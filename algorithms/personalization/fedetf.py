"""FedETF."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import classifiers
from algorithms.parts.architectures import head_of, put


class ETFModel(NamedTuple):
    """A model whose head is the projection to u, float[C], and the scale s, float[]."""

    model: fc.Params
    scale: fc.Array


class FedETFState(NamedTuple):
    """Model and scale of the server, the frame M float[C, C], which stays as it is, and the number of rounds done."""

    params: ETFModel
    etf: fc.Array
    round: fc.Counter = 0


def fedetf(
    task: fc.TaskWithHead,
    client_optimizer: fc.ClientOptimizer,
    *,
    labels: classifiers.Labels = lambda examples: examples["y"],
    alternations: int = 20,
    alternation_epochs: int = 3,
    etf_lr: fc.Scalar = 0.1,
    projection_lr: fc.Scalar = 0.05,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedETF: one fixed classifier for all, whose classes are as far apart as they can be, and balanced risks.

    Client, from (y, s) = x, with u = y(examples) in R^C, M a simplex ETF [C, C] and n its class counts:
             l = CE(s M' u / |u| + log n, c);  (y, s) <- (y, s) - lr grad l, K times.
    Server:  x <- x + server_lr sum_S w_i (x_i - x).
    Before it predicts a client trains x as in the first round, and then alternations times:
             M <- M - etf_lr grad_M CE(s M' u / |u|, c), alternation_epochs epochs;
             y's head <- y's head - projection_lr grad CE(s M' u / |u|, c), alternation_epochs epochs.

    Down: x and s (1P + 1). M is drawn once. Up: what they have moved by (1P + 1).

    Args:
      task: a `Task` with features [B, d] and a head that is one dense layer, which is the projection to u; its loss is
        not used.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      labels: `labels(examples) -> int[B]`, the class of each example.
      alternations: how often a client that adapts turns from M to the projection; 0 leaves both as training has them.
      alternation_epochs: epochs on each of them.
      etf_lr: rate on M, of plain gradient descent.
      projection_lr: rate on the projection.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    s begins at 1. M is drawn by the key of `init`, without one by that of seed 0. A client counts its classes anew in
    every round, in a pass over its labels. The view "global" has the average, "personal" what a client makes of it.
    Their models are models of the task: M and s are multiplied into the head, which gives s M' u. It predicts the same
    classes as s M' u / |u|, with another loss.

    Differences: the authors' optimizers in the alternations may have momentum; these are plain.

    Paper: Li, Shang, He, Lin, Wu, "No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with
    Synthetic and Fixed Classifier", 2023, sections 3 and 4.
    """
    classifiers.check(task, labels)
    if alternations != 0:
        fc.checks.positive_int("alternations", alternations, "turns from M to the projection, or 0 for none")
    fc.checks.positive_int("alternation_epochs", alternation_epochs, "epochs on M, and as many on the projection")
    fc.checks.scalar("etf_lr", etf_lr, low=0)
    fc.checks.scalar("projection_lr", projection_lr, low=0)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def init(params: fc.Params, key: fc.Key | None = None) -> FedETFState:
        classes, dtype = classifiers.num_classes(task, params), classifiers.dense(task, params).kernel.dtype
        M = classifiers.simplex_etf(jax.random.key(0) if key is None else key, classes, classes, dtype)
        return FedETFState(ETFModel(params, jnp.ones((), dtype)), M)

    def of_unit(u: fc.Array, scale: fc.Array, M: fc.Array) -> fc.Array:
        return scale * jnp.matmul(u / classifiers.length(u), M)

    def train(round: fc.Counter, **ends: Any) -> fc.ClientProgram:
        def direction(y, batch, shared, own):
            def risk(y, examples, key, mask):
                outputs = of_unit(task.outputs(y.model, examples, key, mask), y.scale, shared[1])
                c = classifiers.classes_of(labels, examples)
                return classifiers.cross_entropy(classifiers.balanced(outputs, own.counts), c)

            return fc.value_and_grad(risk)(y, batch)

        return fc.local_descent(fc.optimizer_at(client_optimizer, round), direction, start=fc.first_part, **ends)

    def update(state: FedETFState, cohort: fc.Cohort, key: fc.Key):
        counted = classifiers.count(clients, labels, len(state.etf), cohort, key)
        shared = (state.params, fc.Message(state.etf, 0))  # clients have M
        results = clients.run(train(state.round), shared, cohort, key, client_inputs=counted.outputs)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        return state._replace(params=params), fc.merge_phases(results, bytes_of=[counted])

    # Before a client predicts: it counts, trains as in the first round, and alternates.

    def tune_direction(parts, batch, shared, trained):
        def risk(parts, examples, key, mask):
            head, M = parts
            z, _ = classifiers.features_and_outputs(task, trained.model, examples, key, mask)
            u = classifiers.of_head(task, put(head, trained.model), z)
            return classifiers.cross_entropy(of_unit(u, trained.scale, M), classifiers.classes_of(labels, examples))

        loss, (g_head, g_M) = fc.value_and_grad(risk)(parts, batch)
        on_M = batch.epoch % (2 * alternation_epochs) < alternation_epochs
        head_rate, M_rate = jnp.where(on_M, 0, projection_lr), jnp.where(on_M, etf_lr, 0)
        return loss, (fc.scale(head_rate, g_head), fc.scale(M_rate, g_M))

    def tuned(done: fc.Descent, shared):
        head, M = done.params
        return (), (done.own._replace(model=put(head, done.own.model)), M)

    tuning = fc.local_descent(
        optax.sgd(1.0),
        tune_direction,
        start=lambda shared, trained: (head_of(task, trained.model, None), shared[1]),
        upload=tuned,
    )
    counting = fc.Adaptation(classifiers.counting(labels, lambda shared: len(shared[1])), clients.full_pass().work)
    training = fc.Adaptation(train(jnp.int32(0), upload=lambda done, shared: ((), done.params)), clients.work, counting)
    epochs = clients.work._replace(num_epochs=2 * alternations * alternation_epochs, num_steps=None)
    adapt = fc.Adaptation(tuning, epochs, training) if alternations else training

    def folded(params: ETFModel, M: fc.Array) -> fc.Params:
        """The model whose head gives s M' u."""
        head = classifiers.dense(task, params.model)
        by_class = params.scale * M
        bias = jnp.matmul(head.bias, by_class) if len(head.bias) else 0.0
        return classifiers.with_dense(task, params.model, jnp.matmul(head.kernel, by_class), bias)

    def predicting(shared: tuple[ETFModel, fc.Array], row: Any) -> fc.Params:
        if not jax.tree.leaves(row):  # of a client that is not asked to adapt
            return folded(*shared)
        return folded(*row) if alternations else folded(row, shared[1])

    personal = fc.View(lambda state: (state.params, state.etf), predicting, adapt=adapt)
    return fc.federated(init, update, lambda state: folded(state.params, state.etf), views={"personal": personal})
