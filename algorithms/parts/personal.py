"""Models of which clients keep a part to themselves, and models that are adapted before they predict."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

import fedjax_core as fc

Cut: TypeAlias = Callable[[fc.Params], tuple[Any, Any]]
"""`cut(params) -> (personal part, shared part)`, each with a `Hole` where the other has the leaf."""


class PersonalState(NamedTuple):
    """Global model, every client's own part, and the number of rounds done.

    Attributes:
      params: the shared part as the server has it, the personal part as it began: what a new client is given.
      personal: rows, every client's personal part.
      round: rounds done.
    """

    params: fc.Params
    personal: fc.ClientTable
    round: fc.Counter = 0


def begun(params: fc.Params, cut: Cut, num_clients: int) -> PersonalState:
    """The first state, in which all clients have the same personal part."""
    return PersonalState(params, fc.client_table(num_clients, cut(params)[0]))


def own_part(cut: Cut) -> fc.View:
    """Each client predicts with the shared part and its own."""
    return fc.View(
        lambda state: cut(state.params)[1], lambda shared, own: fc.combine(own, shared), lambda state: state.personal
    )


def moved(state: PersonalState, cut: Cut, step: fc.Params, scale: fc.Scalar) -> fc.Params:
    """The global model whose shared part has moved by `scale * step`."""
    first, shared = cut(state.params)
    params: fc.Params = fc.combine(first, fc.add_scaled(shared, scale, step))
    return params


def trained_jointly(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    cut: Cut,
    num_clients: int,
    server_lr: fc.Scalar,
    clients: fc.LocalTraining,
) -> fc.Algorithm:
    """Clients train both parts together; the server averages the shared part, and the personal one stays at home."""
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    gradient = fc.value_and_grad(loss_fn)

    def upload(done: fc.Descent, shared: fc.Params):
        own, now = cut(done.params)
        return optax.tree.sub(now, shared), own

    def update(state: PersonalState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(
            fc.optimizer_at(client_optimizer, state.round),
            gradient,
            start=lambda shared, own: fc.combine(own, shared),
            upload=upload,
        )
        own = fc.gather(state.personal, cohort)
        results = clients.run(program, cut(state.params)[1], cohort, key, client_inputs=own)
        params = moved(state, cut, results.aggregate, server_lr)
        return PersonalState(params, fc.scatter(state.personal, cohort, results.outputs)), results

    return fc.federated(lambda params: begun(params, cut, num_clients), update, views={"personal": own_part(cut)})


def tuned(loss_fn: fc.LossFn, optimizer: optax.GradientTransformation, work: fc.LocalWork) -> fc.View:
    """Each client predicts with the global model after local steps of its own from there."""
    program = fc.local_descent(optimizer, fc.value_and_grad(loss_fn), upload=lambda done, shared: ((), done.params))
    return fc.View(
        lambda state: state.params,
        # One that has no examples, and is not asked to adapt, has nothing of its own.
        lambda shared, own: own if jax.tree.leaves(own) else shared,
        adapt=fc.Adaptation(program, work),
    )
