"""Loss exploration: how far each parameter moves while clients train alone, before the first round."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class Maps(NamedTuple):
    """What the explorers have found.

    Attributes:
      mean: mean over the explorers of their maps D_i, scaled or not; ones before an exploration.
      explorers: int32[], how many there were.
      clients: every client's `Map`; without rows unless they are kept.
    """

    mean: fc.Params
    explorers: fc.Array
    clients: fc.ClientTable


class Map(NamedTuple):
    """A client's squared deviations D_i, and whether it has explored, bool[]."""

    deviation: fc.Params
    known: fc.Array


def momentum_step(
    params: fc.Params, velocity: fc.Params, update: fc.Params, momentum: fc.Scalar, server_lr: fc.Scalar
) -> tuple[fc.Params, fc.Params]:
    """v <- momentum v + (1 - momentum) update;  x <- x + server_lr v. Returns (x, v)."""
    v = jax.tree.map(lambda v, u: (momentum * v + (1 - momentum) * u).astype(v.dtype), velocity, update)
    return fc.add_scaled(params, server_lr, v), v


class Exploration(NamedTuple):
    """Loss exploration as pure functions.

    Attributes:
      init: `init(params) -> Maps`, before an exploration.
      explore: `explore(maps, params, cohort, key) -> Maps`; an empty cohort changes nothing.
      guidance: `guidance(maps) -> G`, a pytree like the model with values in [0, 1].
      of_participants: `of_participants(maps, cohort) -> Maps`, with the mean over the explorers in a cohort, if every
        client's map is kept and there are some; otherwise as they were.
    """

    init: Callable[[fc.Params], Maps]
    explore: Callable[[Maps, fc.Params, fc.Cohort, fc.Key], Maps]
    guidance: Callable[[Maps], fc.Params]
    of_participants: Callable[[Maps, fc.Cohort], Maps]


def loss_exploration(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    clients: fc.LocalTraining,
    *,
    explore_epochs: int,
    patience: int,
    explorers: fc.Scalar,
    scaled: str,
    num_maps: int,
) -> Exploration:
    """The exploration of `fedlex` and `autoflip`; arguments as there. Explorers count alike, whatever their weights."""
    fc.checks.positive_int("explore_epochs", explore_epochs, "an exploration takes at least one epoch")
    fc.checks.positive_int("patience", patience, "a client waits at least one epoch for its loss to fall")
    fc.checks.scalar("explorers", explorers, low=0, high=1)
    fc.checks.one_of("scaled", scaled, ("clients", "mean"))
    if num_maps != 0:
        fc.checks.positive_int("num_maps", num_maps, "the size of the population, or 0 to keep no maps")
    work = fc.local_work(clients.work.batch_size, num_epochs=explore_epochs, order=clients.work.order)
    exploring = clients._replace(work=work, weights="uniform")
    gradient = fc.value_and_grad(loss_fn)
    of_client, of_mean = (to_unit, _unchanged) if scaled == "clients" else (_unchanged, to_unit)

    def init(params: fc.Params) -> Maps:
        own = fc.client_table(num_maps, Map(fc.sums.wide_zeros(params), jnp.bool_(False)) if num_maps else ())
        return Maps(fc.sums.widen(optax.tree.ones_like(params)), jnp.int32(0), own)

    def explore(maps: Maps, params: fc.Params, cohort: fc.Cohort, key: fc.Key) -> Maps:
        optimizer = fc.optimizer_at(client_optimizer, jnp.int32(0))

        def client_init(x: fc.Params, steps_per_epoch: fc.Array, key: fc.Key):
            return x, optimizer.init(x), _Watch.start(steps_per_epoch)

        def client_step(x: fc.Params, carry: fc.PyTree, batch: fc.Batch):
            def local_step(carry: fc.PyTree):
                y, opt_state, watch = carry
                loss, g = gradient(y, batch)
                u, opt_state = optimizer.update(g, opt_state, y)
                return optax.apply_updates(y, u), opt_state, watch.take(loss, batch)

            # A client that has stopped costs nothing more where it trains by itself.
            carry = jax.lax.cond(carry[2].waited < patience, local_step, lambda carry: carry, carry)
            return carry, jnp.zeros(())

        def client_final(x: fc.Params, carry: fc.PyTree):
            # The square of a small move is 0 in float16.
            return jax.tree.map(jnp.square, fc.sums.widen(optax.tree.sub(x, carry[0]))), ()

        draw_key, key = jax.random.split(key)
        rank = fc.shuffle.permute(fc.shuffle.seed(draw_key), jnp.maximum(cohort.ids, 0), cohort.num_clients)
        chosen = cohort.only(cohort.mask & (rank < jnp.maximum(jnp.round(explorers * cohort.num_clients), 1)))
        steps_per_epoch = -(-chosen.sizes // work.batch_size)
        program = fc.ClientProgram(client_init, client_step, client_final)
        aggregator = fc.stacked() if num_maps else fc.mapped(of_client, fc.weighted_sum())
        results = exploring.run(program, params, chosen, key, client_inputs=steps_per_epoch, aggregator=aggregator)
        count = chosen.num_participants
        total = results.aggregate
        if num_maps:
            total = fc.sums.weighted(chosen.mask.astype(jnp.result_type(float)), jax.vmap(of_client)(results.aggregate))
        mean = jax.tree.map(lambda d: d / jnp.maximum(count, 1).astype(d.dtype), total)
        own = fc.scatter(maps.clients, chosen, Map(results.aggregate, chosen.mask)) if num_maps else maps.clients
        return optax.tree.where(count > 0, Maps(mean, count, own), maps)

    def guidance(maps: Maps) -> fc.Params:
        return of_mean(maps.mean)

    def of_participants(maps: Maps, cohort: fc.Cohort) -> Maps:
        if not num_maps:
            return maps
        own = fc.gather(maps.clients, cohort)
        known = cohort.mask & own.known
        count = jnp.sum(known)

        def mean(d: fc.Array) -> fc.Array:
            return jnp.tensordot(known.astype(d.dtype), d, 1) / jnp.maximum(count, 1).astype(d.dtype)

        found = jax.tree.map(mean, jax.vmap(of_client)(own.deviation))
        return maps._replace(mean=optax.tree.where(count > 0, found, maps.mean))

    return Exploration(init, explore, guidance, of_participants)


def to_unit(tree: fc.Params) -> fc.Params:
    """Every leaf scaled to [0, 1] by its smallest and largest entry; ones where these are the same."""

    def scale(leaf: fc.Array) -> fc.Array:
        low, high = jnp.min(leaf), jnp.max(leaf)
        return jnp.where(high > low, (leaf - low) / jnp.where(high > low, high - low, 1), 1)

    return jax.tree.map(scale, tree)


class _Watch(NamedTuple):
    """How a client's training loss falls: the epoch so far, the best epoch, and epochs since."""

    steps_per_epoch: fc.Array
    total: fc.Array
    seen: fc.Array
    best: fc.Array
    waited: fc.Array

    @classmethod
    def start(cls, steps_per_epoch: fc.Array) -> "_Watch":
        zero = jnp.zeros(())
        return cls(steps_per_epoch, zero, zero, jnp.full((), jnp.inf), jnp.int32(0))

    def take(self, loss: fc.Array, batch: fc.Batch) -> "_Watch":
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


def _unchanged(tree: fc.Params) -> fc.Params:
    return tree
