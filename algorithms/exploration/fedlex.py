"""FedLEx."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts.exploration import Maps, loss_exploration, momentum_step


class FedLExState(NamedTuple):
    """Global model x, the server's velocity v, the explorers' maps, and the number of rounds done."""

    params: fc.Params
    velocity: fc.Params
    maps: Maps
    round: fc.Counter = 0


class FedLExMetrics(NamedTuple):
    """Mean of the guidance G over all parameters, float[], and number of clients that have explored, int32[]."""

    guidance: fc.Array
    explorers: fc.Array


def fedlex(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    mode: str = "step",
    explore_epochs: int = 150,
    patience: int = 40,
    explorers: fc.Scalar = 1.0,
    scaled: str = "clients",
    num_maps: int = 0,
    momentum: fc.Scalar = 0.9,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedLEx: parameters move in training as far as they have moved in an exploration of the clients' losses.

    Exploration, once, from the first model x0:
      client:  xi_i = x0 after local training until its loss stops falling;  D_i = (x0 - xi_i)^2.
      server:  G = mean_i (D_i - min D_i) / (max D_i - min D_i), min and max over each leaf.
    Rounds:
      client, from y = x:  u = step of the optimizer along g_i(y);  y <- y + G (*) u, K times.
      server:              v <- momentum v + (1 - momentum) sum_S w_i (y_i - x);  x <- x + server_lr v.

    A leaf of D_i whose entries are all equal has 1 for G. Before an exploration G is 1, and this is FedAvg with
    momentum on the server.

    Down: x, G (2P; x alone with mode="final_delta", and for a client that has kept a fixed G). Up: y_i - x (1P). The
    exploration: x0 down, D_i up (1P each) for every explorer. A round without participants changes neither x nor v.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one; the exploration has the first round's.
      mode: "step" scales the optimizer's steps; "gradient" scales the gradients that it gets, which is the same for
        SGD, while Adam undoes any scale but 0; "final_delta" scales y_i - x, on the server.
      explore_epochs: most epochs of the exploration.
      patience: a client stops after this many epochs in which its mean training loss has set no new minimum.
      explorers: share of the population that explores, drawn at random, at least one client; clients outside of the
        cohort that the event gets do not.
      scaled: "clients" scales every D_i to [0, 1] before averaging (the paper); "mean" scales their average (released
        code).
      num_maps: 0 keeps G as explored. N, the size of the population, keeps every client's D_i and makes G anew after
        each round from those of its participants, for the next round; G is then 1 in the first.
      momentum: weight of the past, in [0, 1).
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The exploration takes
        over all but the amount of work.

    Returns:
      An `Algorithm` with an event "explore", before the first round.

    Differences: released code explores in place, one client after the other, so that later ones start where earlier
    ones ended, all maps are of the last one, and training starts from a model that has seen all data; here all
    explorers start from x0, and so does training. Whether its patience watches a validation loss is not known. Its
    server ignores its learning rate. The paper weighs clients by their number of examples (`weights="examples"`).

    Paper: Interno, Olhofer, Jin, Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID Data", 2024.
    """
    fc.checks.one_of("mode", mode, ("step", "gradient", "final_delta"))
    fc.checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    exploration = loss_exploration(
        loss_fn,
        client_optimizer,
        clients,
        explore_epochs=explore_epochs,
        patience=patience,
        explorers=explorers,
        scaled=scaled,
        num_maps=num_maps,
    )
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedLExState:
        return FedLExState(params, fc.sums.wide_zeros(params), exploration.init(params))

    def explore(state: FedLExState, cohort: fc.Cohort, key: fc.Key) -> FedLExState:
        maps = exploration.explore(state.maps, state.params, cohort, key)
        return state._replace(maps=maps._replace(mean=state.maps.mean) if num_maps else maps)

    def update(state: FedLExState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        G = fc.sums.cast_like(exploration.guidance(state.maps), state.params)

        def client_step(shared, now, batch):
            (_, G), (y, opt_state) = shared, now
            loss, g = gradient(y, batch)
            if mode == "gradient":
                g = optax.tree.mul(G, g)
            u, opt_state = optimizer.update(g, opt_state, y)
            if mode == "step":
                u = optax.tree.mul(G, u)
            return (optax.apply_updates(y, u), opt_state), loss

        program = fc.ClientProgram(
            init=lambda shared, own, key: (shared[0], optimizer.init(shared[0])),
            step=client_step,
            final=lambda shared, done: (optax.tree.sub(done[0], shared[0]), ()),
        )
        results = clients.run(program, (state.params, () if mode == "final_delta" else G), cohort, key)
        delta = optax.tree.mul(G, results.aggregate) if mode == "final_delta" else results.aggregate
        params, velocity = momentum_step(state.params, state.velocity, delta, momentum, server_lr)
        maps = exploration.of_participants(state.maps, cohort)
        extra = FedLExMetrics(_mean(G), state.maps.explorers)
        return FedLExState(params, velocity, maps), results, extra

    return fc.federated(init, update, events={"explore": fc.Event(explore, "before")})


def _mean(tree: fc.Params) -> fc.Array:
    leaves: list[fc.Array] = jax.tree.leaves(fc.sums.widen(tree))
    return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(())) / sum(leaf.size for leaf in leaves)
