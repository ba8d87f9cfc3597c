"""FedRep."""

from typing import Any, Unpack

import fedjax_core as fc
from algorithms.parts import personal as parts
from algorithms.parts.personal import PersonalState


def fedrep(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    personal: fc.Where = "head",
    head_epochs: int = 10,
    head_optimizer: fc.ClientOptimizer | None = None,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedRep: a client first fits its own head to the shared representation, then moves the representation.

    Client, from y = x:  h_i <- h_i - lr grad_h f_i(x, h_i), head_epochs epochs;
                         y <- y - lr grad_y f_i(y, h_i), num_epochs epochs.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).
    After the last round all clients fit their heads to the final x.

    Down: x (P less the head). Up: y_i - x (the same).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round and for each part, or a function of the round, or
        of the round and the client's id, giving one.
      num_clients: size of the population.
      personal: which leaves of the model are the head that stays at home, as `fedjax_core.partition` takes it: paths,
        an expression, a function.
      head_epochs: epochs on the head before those on the representation; 0 leaves the heads as they are.
      head_optimizer: of the head, `client_optimizer` unless given.
      server_lr: 1 replaces the representation by the average.
      **local: batch_size, num_epochs or num_steps (of the representation), order, weights, plan; see `LocalOptions`.

    The global model has the head that everybody began with. The view "personal" has each client's own. The event
    "heads" is what all clients do after the last round.

    Differences: the paper weighs clients by their number of examples (`weights="examples"`). The released code averages
    the heads too and does not use the average.

    Paper: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated
    Learning", 2021, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    if head_epochs != 0:
        fc.checks.positive_int("head_epochs", head_epochs, "epochs on the head, or 0 to leave heads as they are")
    clients = fc.local_training(**local)
    on_head = clients._replace(work=clients.work._replace(num_epochs=head_epochs, num_steps=None))
    gradient = fc.value_and_grad(loss_fn)

    def cut(params: fc.Params):
        return fc.partition(params, personal)

    def of_head(h, batch, x, own):  # the compiler leaves out the other part's gradient
        loss, g = gradient(fc.combine(h, x), batch)
        return loss, cut(g)[0]

    def of_body(y, batch, x, h):
        loss, g = gradient(fc.combine(h, y), batch)
        return loss, cut(g)[1]

    def fit_heads(state: PersonalState, cohort: fc.Cohort, key: fc.Key) -> fc.ClientResults:
        optimizer = fc.optimizer_at(head_optimizer or client_optimizer, state.round)
        program = fc.local_descent(optimizer, of_head, start=lambda x, h: h, upload=lambda done, x: ((), done.params))
        return on_head.run(program, cut(state.params)[1], cohort, key, client_inputs=fc.gather(state.personal, cohort))

    def update(state: PersonalState, cohort: fc.Cohort, key: fc.Key):
        phases, h, body_key = [], fc.gather(state.personal, cohort), key
        x: Any = cut(state.params)[1]
        if head_epochs:
            head_key, body_key = fc.keys.split(key)
            phases.append(fit_heads(state, cohort, head_key))
            h, x = phases[0].outputs, fc.Message(x, 0)  # clients have x from the first phase
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), of_body)
        phases.append(clients.run(program, x, cohort, body_key, client_inputs=h))
        params = parts.moved(state, cut, phases[-1].aggregate, server_lr)
        return PersonalState(params, fc.scatter(state.personal, cohort, h)), fc.merge_phases(*phases)

    def last(state: PersonalState, cohort: fc.Cohort, key: fc.Key) -> PersonalState:
        heads = fit_heads(state, cohort, key).outputs
        return state._replace(personal=fc.scatter(state.personal, cohort, heads))

    return fc.federated(
        lambda params: parts.begun(params, cut, num_clients),
        update,
        views={"personal": parts.own_part(cut)},
        events={"heads": fc.Event(last, "after")} if head_epochs else None,
    )
