"""FedLEx, and the loss exploration that it shares with AutoFLIP."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedstale import cohort_sum
from fedjax_core import (
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
    ClientTable,
    Cohort,
    Key,
    LocalOptions,
    LocalTraining,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checked_round,
    checks,
    client_table,
    gather,
    global_algorithm,
    local_training,
    local_work,
    mapped,
    move,
    optimizer_at,
    round_metrics,
    scatter,
    shuffle,
    stacked,
    sums,
    value_and_grad,
    weighted_sum,
)


class Maps(NamedTuple):
    """What the explorers have found.

    Attributes:
      mean: mean over the explorers of their maps D_i, scaled or not; ones before an exploration.
      explorers: int32[], how many there were.
      clients: every client's `Map`; without rows unless they are kept.
    """

    mean: Params
    explorers: Array
    clients: ClientTable


class Map(NamedTuple):
    """A client's squared deviations D_i, and whether it has explored, bool[]."""

    deviation: Params
    known: Array


class FedLExState(NamedTuple):
    """Global model x, the server's velocity v, the explorers' maps, and the number of rounds done."""

    params: Params
    velocity: Params
    maps: Maps
    round: Array


class FedLExMetrics(NamedTuple):
    """Mean of the guidance G over all parameters, float[], and number of clients that have explored, int32[]."""

    guidance: Array
    explorers: Array


class FedLEx(NamedTuple):
    """An `Algorithm`, and `explore(state, cohort, key) -> state`, to be called once, before the first round."""

    init: Callable[[Params], Any]
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]]
    params: Callable[[Any], Params]
    client_params: Callable[[Any, Array], Params]
    explore: Callable[[Any, Any, Key], Any]


def fedlex(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    mode: str = "step",
    explore_epochs: int = 150,
    patience: int = 40,
    explorers: Scalar = 1.0,
    scaled: str = "clients",
    num_maps: int = 0,
    momentum: Scalar = 0.9,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> FedLEx:
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
        cohort that `explore` gets do not.
      scaled: "clients" scales every D_i to [0, 1] before averaging (the paper); "mean" scales their average (released
        code).
      num_maps: 0 keeps G as explored. N, the size of the population, keeps every client's D_i and makes G anew after
        each round from those of its participants, for the next round; G is then 1 in the first.
      momentum: weight of the past, in [0, 1).
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The exploration takes
        over all but the amount of work.

    Returns:
      A `FedLEx`: an `Algorithm` with `explore(state, cohort, key) -> state`.

    Differences: released code explores in place, one client after the other, so that later ones start where earlier
    ones ended, all maps are of the last one, and training starts from a model that has seen all data; here all
    explorers start from x0, and so does training. Whether its patience watches a validation loss is not known. Its
    server ignores its learning rate. The paper weighs clients by their number of examples (`weights="examples"`).

    Paper: Interno, Olhofer, Jin, Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID Data", 2024.
    """
    checks.one_of("mode", mode, ("step", "gradient", "final_delta"))
    checks.scalar("momentum", momentum, low=0, high=1, high_open=True)
    checks.scalar("server_lr", server_lr, low=0)
    clients = local_training(**local)
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
    gradient = value_and_grad(loss_fn)

    def init(params: Params) -> FedLExState:
        return FedLExState(params, sums.wide_zeros(params), exploration.init(params), jnp.int32(0))

    def explore(state: FedLExState, cohort: Cohort, key: Key) -> FedLExState:
        maps = exploration.explore(state.maps, state.params, cohort, key)
        return state._replace(maps=maps._replace(mean=state.maps.mean) if num_maps else maps)

    def round(state: FedLExState, cohort: Cohort, key: Key) -> tuple[FedLExState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)
        guidance = sums.cast_like(exploration.guidance(state.maps), state.params)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, _ = shared
            return x, optimizer.init(x)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            _, G = shared
            y, opt_state = carry
            loss, g = gradient(y, batch)
            if mode == "gradient":
                g = optax.tree.mul(G, g)
            u, opt_state = optimizer.update(g, opt_state, y)
            if mode == "step":
                u = optax.tree.mul(G, u)
            return (optax.apply_updates(y, u), opt_state), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            y, _ = carry
            return optax.tree.sub(y, x), ()

        program = ClientProgram(client_init, client_step, client_final)
        shared = (state.params, () if mode == "final_delta" else guidance)
        results = clients.run(program, shared, (), cohort, key)
        update = optax.tree.mul(guidance, results.aggregate) if mode == "final_delta" else results.aggregate
        params, velocity = momentum_step(state.params, state.velocity, update, momentum, server_lr, cohort)
        extra = FedLExMetrics(_mean(guidance), state.maps.explorers)
        metrics = round_metrics(results, cohort, state.params, params, extra)
        maps = exploration.of_participants(state.maps, cohort)
        return FedLExState(params, velocity, maps, state.round + 1), metrics

    return FedLEx(*global_algorithm(init, round), checked_round(explore))


def momentum_step(
    params: Params, velocity: Params, update: Params, momentum: Scalar, server_lr: Scalar, cohort: Cohort
) -> tuple[Params, Params]:
    """v <- momentum v + (1 - momentum) update;  x <- x + server_lr v.

    Returns (x, v), as they were if nobody took part.
    """
    v = jax.tree.map(lambda v, u: (momentum * v + (1 - momentum) * u).astype(v.dtype), velocity, update)
    return optax.tree.where(cohort.num_participants > 0, (move(params, server_lr, v), v), (params, velocity))


class Exploration(NamedTuple):
    """Loss exploration as pure functions.

    Attributes:
      init: `init(params) -> Maps`, before an exploration.
      explore: `explore(maps, params, cohort, key) -> Maps`; an empty cohort changes nothing.
      guidance: `guidance(maps) -> G`, a pytree like the model with values in [0, 1].
      of_participants: `of_participants(maps, cohort) -> Maps`, with the mean over the explorers in a cohort, if every
        client's map is kept and there are some; otherwise as they were.
    """

    init: Callable[[Params], Maps]
    explore: Callable[[Maps, Params, Cohort, Key], Maps]
    guidance: Callable[[Maps], Params]
    of_participants: Callable[[Maps, Cohort], Maps]


def loss_exploration(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    clients: LocalTraining,
    *,
    explore_epochs: int,
    patience: int,
    explorers: Scalar,
    scaled: str,
    num_maps: int,
) -> Exploration:
    """The exploration of `fedlex` and `autoflip`; arguments as there. Explorers count alike, whatever their weights."""
    checks.positive_int("explore_epochs", explore_epochs, "an exploration takes at least one epoch")
    checks.positive_int("patience", patience, "a client waits at least one epoch for its loss to fall")
    checks.scalar("explorers", explorers, low=0, high=1)
    checks.one_of("scaled", scaled, ("clients", "mean"))
    if num_maps != 0:
        checks.positive_int("num_maps", num_maps, "the size of the population, or 0 to keep no maps")
    work = local_work(clients.work.batch_size, num_epochs=explore_epochs, order=clients.work.order)
    exploring = clients._replace(work=work, weights="uniform")
    gradient = value_and_grad(loss_fn)
    of_client, of_mean = (to_unit, _unchanged) if scaled == "clients" else (_unchanged, to_unit)

    def init(params: Params) -> Maps:
        own = client_table(num_maps, Map(sums.wide_zeros(params), jnp.bool_(False)) if num_maps else ())
        return Maps(sums.widen(optax.tree.ones_like(params)), jnp.int32(0), own)

    def explore(maps: Maps, params: Params, cohort: Cohort, key: Key) -> Maps:
        optimizer = optimizer_at(client_optimizer, jnp.int32(0))

        def client_init(x: Params, steps_per_epoch: Array, key: Key) -> Any:
            return x, optimizer.init(x), _Watch.start(steps_per_epoch)

        def client_step(x: Params, carry: Any, batch: Batch) -> Any:
            def descend(carry: Any) -> Any:
                y, opt_state, watch = carry
                loss, g = gradient(y, batch)
                u, opt_state = optimizer.update(g, opt_state, y)
                return optax.apply_updates(y, u), opt_state, watch.take(loss, batch)

            # A client that has stopped costs nothing more where it trains by itself.
            carry = jax.lax.cond(carry[2].waited < patience, descend, lambda carry: carry, carry)
            return carry, jnp.zeros(())

        def client_final(x: Params, carry: Any) -> Any:
            # The square of a small move is 0 in float16.
            return jax.tree.map(jnp.square, sums.widen(optax.tree.sub(x, carry[0]))), ()

        draw_key, key = jax.random.split(key)
        rank = shuffle.permute(shuffle.seed(draw_key), jnp.maximum(cohort.ids, 0), cohort.num_clients)
        chosen = cohort.only(cohort.mask & (rank < jnp.maximum(jnp.round(explorers * cohort.num_clients), 1)))
        steps_per_epoch = -(-chosen.sizes // work.batch_size)
        program = ClientProgram(client_init, client_step, client_final)
        aggregator = stacked() if num_maps else mapped(of_client, weighted_sum())
        results = exploring.run(program, params, steps_per_epoch, chosen, key, aggregator=aggregator)
        count = chosen.num_participants
        total = results.aggregate
        if num_maps:
            total = cohort_sum(chosen.mask.astype(jnp.result_type(float)), jax.vmap(of_client)(results.aggregate))
        mean = jax.tree.map(lambda d: d / jnp.maximum(count, 1).astype(d.dtype), total)
        own = scatter(maps.clients, chosen, Map(results.aggregate, chosen.mask)) if num_maps else maps.clients
        return optax.tree.where(count > 0, Maps(mean, count, own), maps)

    def guidance(maps: Maps) -> Params:
        return of_mean(maps.mean)

    def of_participants(maps: Maps, cohort: Cohort) -> Maps:
        if not num_maps:
            return maps
        own = gather(maps.clients, cohort)
        known = cohort.mask & own.known
        count = jnp.sum(known)

        def mean(d: Array) -> Array:
            return jnp.tensordot(known.astype(d.dtype), d, 1) / jnp.maximum(count, 1).astype(d.dtype)

        found = jax.tree.map(mean, jax.vmap(of_client)(own.deviation))
        return maps._replace(mean=optax.tree.where(count > 0, found, maps.mean))

    return Exploration(init, explore, guidance, of_participants)


def to_unit(tree: Params) -> Params:
    """Every leaf scaled to [0, 1] by its smallest and largest entry; ones where these are the same."""

    def scale(leaf: Array) -> Array:
        low, high = jnp.min(leaf), jnp.max(leaf)
        return jnp.where(high > low, (leaf - low) / jnp.where(high > low, high - low, 1), 1)

    return jax.tree.map(scale, tree)


class _Watch(NamedTuple):
    """How a client's training loss falls: the epoch so far, the best epoch, and epochs since."""

    steps_per_epoch: Array
    total: Array
    seen: Array
    best: Array
    waited: Array

    @classmethod
    def start(cls, steps_per_epoch: Array) -> "_Watch":
        zero = jnp.zeros(())
        return cls(steps_per_epoch, zero, zero, jnp.full((), jnp.inf), jnp.int32(0))

    def take(self, loss: Array, batch: Batch) -> "_Watch":
        """One more batch, in which the client had this mean loss."""
        size = jnp.sum(batch.mask).astype(self.seen.dtype)
        total, seen = self.total + size * loss.astype(self.total.dtype), self.seen + size
        mean, ended = total / seen, (batch.step + 1) % self.steps_per_epoch == 0
        better = ended & (mean < self.best)
        return self._replace(
            total=jnp.where(ended, 0, total),
            seen=jnp.where(ended, 0, seen),
            best=jnp.where(better, mean, self.best),
            waited=jnp.where(better, 0, self.waited + ended),
        )


def _mean(tree: Params) -> Array:
    leaves: list[Array] = jax.tree.leaves(tree)
    return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(())) / sum(leaf.size for leaf in leaves)


def _unchanged(tree: Params) -> Params:
    return tree
