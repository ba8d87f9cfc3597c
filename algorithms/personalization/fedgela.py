"""FedGELA."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import classifiers
from algorithms.parts.architectures import put


def fedgela(
    task: fc.TaskWithHead,
    client_optimizer: fc.ClientOptimizer,
    *,
    labels: classifiers.Labels = lambda examples: examples["y"],
    temperature: fc.Scalar = 0.2,
    unit_features: bool = False,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedGELA: one fixed classifier for all, of which a client scales each class by its share of the examples.

    Client, from y = x, with h = features of y, M a simplex ETF [d, C], n its class counts and phi_c = C n_c / sum n:
             l = CE(phi M' h / T, c);  y <- y - lr grad l, K times.
    Server:  x <- x + server_lr sum_S w_i (y_i - x).
    All predict with M' h, a client with phi M' h after training x as in the first round.

    Down: x (P less the head). M is drawn once. Up: y_i - x (the same).

    Args:
      task: a `Task` with features [B, d], d >= C, and a head that is one dense layer, which M takes the place of; its
        loss is not used.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      labels: `labels(examples) -> int[B]`, the class of each example.
      temperature: T, above 0.
      unit_features: whether h is scaled to length 1 in l.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    M is drawn by the key of `init`, without one by that of seed 0; the head has it as its kernel, and no bias. A class
    that a client does not hold has the score 0, and wins where all that it holds have less. A client counts its classes
    anew in every round, in a pass over its labels. The view "global" has the average, "personal" what a client makes of
    it, without T, as no prediction depends on it; nothing of a client lasts from round to round.

    Differences: how features are normalized is the model's business here, batch normalization for instance, but for
    `unit_features`, which changes no prediction. The released code weighs clients by their number of batches
    (`weights="examples"` is the paper's), and makes M for another width than its network has.

    Paper: Fan, Zhang, Yao, Han, Zhang, Wang, "Federated Learning with Bilateral Curation for Partially Class-Disjoint
    Data", 2023, section 3.
    """
    classifiers.check(task, labels)
    fc.checks.scalar("temperature", temperature, low=0, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def init(params: fc.Params, key: fc.Key | None = None) -> fc.ModelState:
        kernel = classifiers.dense(task, params).kernel
        dim, classes = kernel.shape
        M = classifiers.simplex_etf(jax.random.key(0) if key is None else key, dim, classes, kernel.dtype)
        return fc.ModelState(classifiers.with_dense(task, params, M))

    def cut(params: fc.Params) -> tuple[fc.Params, fc.Params]:
        """The body, and the head with M."""
        head, body = fc.partition(params, task.paths("head"))
        return body, head

    def scaled(body: fc.Params, head: fc.Params, by_class: fc.Array) -> fc.Params:
        """The model whose scores are by_class M' h."""
        model = fc.combine(head, body)
        return classifiers.with_dense(task, model, classifiers.dense(task, model).kernel * by_class)

    def direction(y, batch, shared, own):
        def risk(y, examples, key, mask):
            phi = classifiers.shares(own.counts, jnp.result_type(float))
            model = scaled(y, shared[1], phi / temperature)
            if unit_features:
                h, outputs = classifiers.features_and_outputs(task, model, examples, key, mask)
                outputs = outputs / classifiers.length(h)
            else:
                outputs = task.outputs(model, examples, key, mask)
            return classifiers.cross_entropy(outputs, classifiers.classes_of(labels, examples))

        return fc.value_and_grad(risk)(y, batch)

    def train(round: fc.Counter, **ends: Any) -> fc.ClientProgram:
        return fc.local_descent(fc.optimizer_at(client_optimizer, round), direction, start=fc.first_part, **ends)

    def moved_body(done: fc.Descent, shared: tuple[fc.Params, fc.Params]):
        moved = optax.tree.sub(done.params, shared[0])
        return fc.Message(moved, fc.num_bytes(moved)), ()  # the head is in no upload

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        counted = classifiers.count(clients, labels, classifiers.num_classes(task, state.params), cohort, key)
        body, head = cut(state.params)
        shared = (body, fc.Message(head, 0))  # clients have M
        results = clients.run(train(state.round, upload=moved_body), shared, cohort, key, client_inputs=counted.outputs)
        params = put(fc.add_scaled(body, server_lr, results.aggregate), state.params)
        return state._replace(params=params), fc.merge_phases(results, bytes_of=[counted])

    def classes_of_shared(shared: tuple[fc.Params, fc.Params]) -> int:
        return classifiers.num_classes(task, fc.combine(*shared))

    counting = fc.Adaptation(classifiers.counting(labels, classes_of_shared), clients.full_pass().work)
    training = train(jnp.int32(0), upload=lambda done, shared: ((), (done.params, done.own.counts)))

    def predicting(shared: tuple[fc.Params, fc.Params], row: Any) -> fc.Params:
        # One that is not asked to adapt has nothing of its own.
        body, counts = row if jax.tree.leaves(row) else (shared[0], jnp.zeros(classes_of_shared(shared), jnp.int32))
        return scaled(body, shared[1], classifiers.shares(counts, jnp.result_type(float)))

    own_shares = fc.View(
        lambda state: cut(state.params), predicting, adapt=fc.Adaptation(training, clients.work, counting)
    )
    return fc.federated(init, update, views={"personal": own_shares})
