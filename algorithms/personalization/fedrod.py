"""FedRoD."""

from typing import Unpack

import jax
import optax

import fedjax_core as fc
from algorithms.parts import classifiers
from algorithms.parts.architectures import head_of, put
from algorithms.parts.personal import PersonalState


def fedrod(
    task: fc.TaskWithHead,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    labels: classifiers.Labels = lambda examples: examples["y"],
    zero_start: bool = False,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedRoD: a generic head learns as if a client's classes were equally frequent, its own one the rest.

    Client, from (y, G) = x and P = P_i, with z = features of y (constant in l_p, as G is) and n its class counts:
             l_g = CE(G(z) + log n, c);  l_p = CE(G(z) + P(z), c);
             (y, G) <- (y, G) - lr grad l_g;  P <- P - lr grad l_p, K times, both on one batch;  P_i <- P.
    Server:  x <- x + server_lr sum_S w_i (x_i - x).
    All predict with G(z), a client with G(z) + P_i(z).

    Down: x (1P). Up: x_i - x (1P).

    Args:
      task: a `Task` with features [B, d] and a head that is one dense layer; its loss is not used.
      client_optimizer: optax optimizer of model and own head at once, started anew in every round, or a function of the
        round, or of the round and the client's id, giving one.
      num_clients: size of the population.
      labels: `labels(examples) -> int[B]`, the class of each example.
      zero_start: whether the clients' own heads begin at zero, so that all first predict alike; else they begin as the
        generic head.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    A client counts its classes anew in every round, in a pass over its labels. One that it does not hold is left out of
    l_g. The training loss that is reported is l_g + l_p. The view "personal" has each client's own head.

    Differences: the paper's other form, in which a network makes the own heads of class frequencies, is left out. A
    re-implementation by others predicts with P alone.

    Paper: Chen, Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", 2022, section
    4.
    """
    classifiers.check(task, labels)
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def init(params: fc.Params) -> PersonalState:
        classifiers.dense(task, params)
        own = head_of(task, params, None)
        own = optax.tree.zeros_like(own) if zero_start else own
        return PersonalState(params, fc.client_table(num_clients, own))

    def direction(models, batch, x, own):
        def risks(models, examples, key, mask):
            model, P = models
            z, outputs = classifiers.features_and_outputs(task, model, examples, key, mask)
            z, generic = jax.lax.stop_gradient((z, outputs))
            y = classifiers.classes_of(labels, examples)
            l_g = classifiers.cross_entropy(classifiers.balanced(outputs, own.counts), y)
            return l_g + classifiers.cross_entropy(generic + classifiers.of_head(task, put(P, model), z), y)

        return fc.value_and_grad(risks)(models, batch)

    def upload(done: fc.Descent, x: fc.Params):
        model, P = done.params
        return optax.tree.sub(model, x), P

    def update(state: PersonalState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, direction, start=lambda x, own: (x, own.own), upload=upload)
        counted = classifiers.count(clients, labels, classifiers.num_classes(task, state.params), cohort, key)
        own = counted.outputs._replace(own=fc.gather(state.personal, cohort))
        results = clients.run(program, state.params, cohort, key, client_inputs=own)
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        state = PersonalState(params, fc.scatter(state.personal, cohort, results.outputs))
        return state, fc.merge_phases(results, bytes_of=[counted])

    def both_heads(x: fc.Params, P: fc.Params) -> fc.Params:
        return put(optax.tree.add(head_of(task, x, None), P), x)

    own_head = fc.View(lambda state: state.params, both_heads, lambda state: state.personal)
    return fc.federated(init, update, views={"personal": own_head})
