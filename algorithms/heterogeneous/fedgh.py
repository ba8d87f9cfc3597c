"""FedGH."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts.architectures import check_headers, check_models, checked_tasks, head_of, put
from algorithms.parts.prototypes import Pairs, class_means, in_order


class FedGHState(NamedTuple):
    """The server's header, the clients' models, and the number of rounds done.

    Attributes:
      params: the leaves of the header H, in one order for all groups.
      first: for each group the model that it began with.
      clients: for each group rows, each client's model as it was when it had trained last.
      round: rounds done.
    """

    params: tuple[fc.Array, ...]
    first: tuple[fc.Params, ...]
    clients: tuple[fc.ClientTable, ...]
    round: fc.Counter = 0


def fedgh(
    tasks: fc.TaskOfEachGroup,
    client_optimizer: fc.ClientOptimizer,
    *,
    groups: fc.GroupsOfClients,
    num_classes: fc.NumClasses,
    header: fc.Where | None = None,
    labels: Callable[[fc.Examples], fc.Array] = lambda examples: examples["y"],
    server_lr: fc.Scalar = 0.01,
    server_epochs: int = 1,
    full_batch: bool = False,
    own_start: bool = False,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedGH: clients of any architecture, and one header for all that the server trains on the means of their classes.

    Client, from its own extractor and y = (theta_i, H):  y <- y - lr g_i(y), K times;
             r_ic = mean of theta_i(x) over its training examples of class c, for each class that it holds.
    Server:  H <- H - server_lr grad_H CE(H(r_ic), c), for one pair (i, c) after the other.

    Down: H, from the second round on. Up: r_ic and c for each class that i holds. No model, and no extractor of any
    size.

    Args:
      tasks: a `Task` for each group, with features [B, d] and a head of one shape for all; without statistics.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      groups: which architecture each client has.
      num_classes: number of classes.
      header: which leaves of the models are the header; those that the task calls "head" unless given.
      labels: `labels(examples) -> int[B]`, the class of each example.
      server_lr: of the server; 0 leaves the header as it began.
      server_epochs: passes of the server over the pairs.
      full_batch: whether the server takes a step on the mean over all pairs, in the place of one for each pair in the
        order of clients' numbers and then of classes.
      own_start: whether every client begins with a model of its own, drawn by its task's init, as in the paper; unless
        so, all of a group begin with the model that `init` is given.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    `init(models)` takes a tuple of one model for each group; the server begins with the header of the first. In the
    first round clients train the headers that they begin with. In the view "personal" a client predicts with its
    extractor and the header that it has trained itself, in the view "global" with the server's new one. `params` gives
    for each group the extractor that it began with under the server's header, a model for a client nobody has seen.

    Differences: the released code never steps the server's header, so that it stays as it was drawn: `server_lr=0`. It
    averages the means of batches; here they are exact. Clients count alike; `weights` are those of the metrics alone.

    Paper: Yi, Wang, Liu, Shi, Yu, "FedGH: Heterogeneous Federated Learning with Generalized Global Header", 2023,
    algorithm 1.
    """
    if not isinstance(groups, fc.Groups):
        raise TypeError(f"groups must be Groups, got {type(groups).__name__}: pass for example Groups.by_modulo(10, 2)")
    tasks = checked_tasks(tasks, len(groups))
    fc.checks.positive_int("num_classes", num_classes, "the number of classes")
    fc.checks.positive_int("server_epochs", server_epochs, "1 is the paper's")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradients = [fc.value_and_grad(task) for task in tasks]

    def init(models: tuple[fc.Params, ...], key: fc.Key | None = None) -> FedGHState:
        check_models(models, tasks)
        headers = [headers_of(g, model) for g, model in enumerate(models)]
        check_headers(headers)
        tables = tuple(groups.table(g, model) for g, model in enumerate(models))
        if own_start:
            if key is None:
                raise ValueError("own_start=True draws the clients' models: call init(models, jax.random.key(0))")
            tables = tuple(table._replace(rows=drawn(g, models[g], key)) for g, table in enumerate(tables))
        return FedGHState(tuple(headers[0]), tuple(models), tables)

    def drawn(g: int, like: fc.Params, key: fc.Key) -> fc.Params:
        own = jax.vmap(tasks[g].init)(fc.keys.derive(key, jnp.asarray(groups.members(g))))
        return fc.sums.cast_like(own, like)

    def with_header(g: int, model: fc.Params, leaves: Any) -> fc.Params:
        return put(jax.tree.unflatten(jax.tree.structure(head_of(tasks[g], model, header)), leaves), model)

    def train(g: int, state: FedGHState) -> fc.ClientProgram:
        def start(sent: Any, own: fc.Params) -> fc.Params:
            leaves, has_begun = sent
            begun = [jnp.where(has_begun, h, o) for h, o in zip(leaves, headers_of(g, own), strict=True)]
            return with_header(g, own, begun)

        optimizer = fc.optimizer_at(client_optimizer, state.round)
        return fc.local_descent(optimizer, gradients[g], start=start, upload=lambda done, sent: ((), done.params))

    def headers_of(g: int, model: fc.Params) -> list[fc.Array]:
        return jax.tree.leaves(head_of(tasks[g], model, header))

    def update(state: FedGHState, cohort: fc.Cohort, key: fc.Key):
        has_begun = state.round > 0
        sent = fc.Message((state.params, has_begun), jnp.where(has_begun, fc.num_bytes(state.params), 0))
        results, tables, prototypes = [], [], []
        for g, (table, part) in enumerate(zip(state.clients, groups.split(cohort), strict=True)):
            trained = clients.run(train(g, state), sent, part, key, fc.gather(table, part))
            program = class_means(tasks[g], state.first[g], cohort.examples, labels, num_classes)
            means = clients.full_pass().run(program, (), part, key, trained.outputs, aggregator=fc.stacked())
            results.append(fc.merge_phases(trained, bytes_of=[means]))
            tables.append(fc.scatter(table, part, trained.outputs))
            prototypes.append(means.aggregate)
        pairs = in_order(cohort, groups.join(cohort, prototypes))
        return state._replace(params=taught(state, pairs), clients=tuple(tables)), groups.merge(cohort, results)

    def taught(state: FedGHState, pairs: Pairs) -> tuple[fc.Array, ...]:
        def loss(h: Any, r: fc.Array, c: fc.Array) -> fc.Array:
            assert tasks[0].head is not None
            outputs = tasks[0].head(with_header(0, state.first[0], h), r)
            if outputs.shape[-1] != num_classes:
                raise ValueError(
                    f"num_classes must be {outputs.shape[-1]}, the outputs of the tasks' head, got {num_classes}: the "
                    "server would be sent no means of the other classes, or of classes that the head does not know"
                )
            return optax.softmax_cross_entropy_with_integer_labels(outputs, c)

        def on_pair(h: Any, pair: Pairs) -> tuple[Any, None]:
            one = jax.tree.map(lambda leaf: leaf[None], pair)
            step = jax.grad(lambda h: loss(h, one.means, one.classes)[0])(h)
            return optax.tree.where(pair.held, fc.add_scaled(h, -server_lr, step), h), None

        def on_all(h: Any) -> Any:
            def mean(h: Any) -> fc.Array:
                losses = jnp.where(pairs.held, loss(h, pairs.means, pairs.classes), 0)
                return fc.sums.total(losses) / jnp.maximum(jnp.sum(pairs.held), 1)

            return fc.add_scaled(h, -server_lr, jax.grad(mean)(h))

        def epoch(_: Any, h: Any) -> Any:
            return on_all(h) if full_batch else jax.lax.scan(on_pair, h, pairs)[0]

        trained: tuple[fc.Array, ...] = jax.lax.fori_loop(0, server_epochs, epoch, state.params)
        return trained

    def heads(state: FedGHState) -> tuple[fc.Params, ...]:
        cut = [head_of(task, model, header) for task, model in zip(tasks, state.first, strict=True)]
        return tuple(jax.tree.unflatten(jax.tree.structure(head), state.params) for head in cut)

    nothing: tuple[Any, ...] = ((),) * len(groups)
    own = fc.View(lambda state: nothing, lambda shared, row: row, lambda state: state.clients, groups=groups)
    return fc.federated(
        init,
        update,
        lambda state: tuple(map(put, heads(state), state.first)),
        views={"personal": own, "global": own._replace(shared=heads, model=put)},
    )
