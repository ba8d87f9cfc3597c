"""AutoFLIP: pruning guided by loss exploration, and the smaller model that is left."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_core as fc
from algorithms.parts.exploration import Maps, loss_exploration, momentum_step


class AutoFLIPState(NamedTuple):
    """Global model x, velocity v, mask B (bool leaves), the explorers' maps, and the number of rounds done."""

    params: fc.Params
    velocity: fc.Params
    mask: fc.Params
    maps: Maps
    round: fc.Counter = 0


class AutoFLIPMetrics(NamedTuple):
    """What is pruned in a round.

    Attributes:
      density: float[], share of the parameters that is kept.
      dense_bytes: float[], bytes of a model that is not pruned: what goes down and up if zeros are sent too.
      mask_bytes: float[], bytes of B, a bit a parameter, which a participant is sent besides, if it has not got this B
        before.
      explorers: int32[], number of clients that have explored.
    """

    density: fc.Array
    dense_bytes: fc.Array
    mask_bytes: fc.Array
    explorers: fc.Array


def autoflip(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    threshold: fc.Scalar = 0.3,
    structured: bool = True,
    output: str = "head",
    explore_epochs: int = 150,
    patience: int = 40,
    explorers: fc.Scalar = 1.0,
    scaled: str = "mean",
    num_maps: int = 0,
    regrow: bool = False,
    momentum: fc.Scalar = 0.9,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """AutoFLIP: prunes the parameters that hardly move on any client in an exploration of the clients' losses.

    Exploration, once, from the first model x0 (see `fedlex`), with G in [0, 1] from the squared moves of the clients:
      thr = the `threshold` quantile of all entries of G;  B = 1 where G > thr, else 0;
      a unit, with all its weights and its bias, is 0 in B if the mean of G over its weights is at most thr, or if
      all its weights are 0 in B;  x <- B (*) x0.
    Rounds:
      client, from y = x:  y <- B (*) (y + step of the optimizer along B (*) g_i(y)), K times.
      server:              v <- momentum v + (1 - momentum) sum_S w_i (y_i - x);  x <- x + server_lr v.

    Before an exploration B is 1, and this is FedAvg with momentum on the server.

    Down: x where B is 1, and B in P bits to those who have not got it. Up: y_i - x where B is 1. The metrics count
    their bytes. The exploration: x0 down, its squared moves up (1P each) for every explorer. A round without
    participants changes neither x nor v.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one; the exploration has the first round's.
      threshold: T_p, the quantile of G up to which is pruned, in [0, 1). Ties with it are pruned, so 0 prunes the
        smallest entries.
      structured: prune whole units too. A layer is whatever holds an array "kernel" [..., inputs, units], and maybe a
        "bias" [units]: dense layers and convolutions as flax lays them out.
      output: path of the output layer, whose units are classes and stay; names joined by "/".
      explore_epochs: see `fedlex`.
      patience: see `fedlex`.
      explorers: see `fedlex`.
      scaled: "mean" scales the average of the squared moves to [0, 1] (released code); "clients" scales each client's
        before averaging (the paper's figure of FedLEx).
      num_maps: 0 keeps B as explored. N, the size of the population, keeps every client's squared moves and makes B
        anew after each round from those of its participants.
      regrow: whether what such a new B keeps comes back, from 0, after an older one has pruned it.
      momentum: weight of the past, in [0, 1).
      server_lr: step size of the server.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The exploration takes
        over all but the amount of work.

    Returns:
      An `Algorithm` with an event "explore", before the first round. See `export` for a model without the
      pruned units.

    Raises:
      ValueError: in `init`, if the model has layers but none at the path `output`, with structured pruning.

    Differences: released code has no structured pruning, so that its rule here follows the paper's words. It explores
    in place, one client after the other, on the model that training starts from (see `fedlex`), and with its
    published settings clients do not apply the mask, so that what was pruned grows back.

    Paper: Interno, Raponi, van Stein, Back, Olhofer, Jin, Hammer, "Federated Hybrid Model Pruning through Loss
    Landscape Exploration", 2024.
    """
    fc.checks.scalar("threshold", threshold, low=0, high=1, high_open=True)
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

    def init(params: fc.Params) -> AutoFLIPState:
        if structured:
            check_output(params, output)
        everything = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)
        return AutoFLIPState(params, fc.sums.wide_zeros(params), everything, exploration.init(params))

    def prune(state: AutoFLIPState, maps: Maps) -> AutoFLIPState:
        """The state with the mask that the maps ask for."""
        mask = keep(exploration.guidance(maps), threshold, output if structured else None)
        if not regrow:
            mask = jax.tree.map(jnp.logical_and, state.mask, mask)
        mask = optax.tree.where(maps.explorers > 0, mask, state.mask)
        return state._replace(
            params=masked(mask, state.params), velocity=masked(mask, state.velocity), mask=mask, maps=maps
        )

    def explore(state: AutoFLIPState, cohort: fc.Cohort, key: fc.Key) -> AutoFLIPState:
        return prune(state, exploration.explore(state.maps, state.params, cohort, key))

    def update(state: AutoFLIPState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)

        def client_step(shared, now, batch):
            (_, B), (y, opt_state) = shared, now
            loss, g = gradient(y, batch)
            # The gradient too, so that an optimizer that looks at its length sees that of the smaller model.
            u, opt_state = optimizer.update(masked(B, g), opt_state, y)
            return (masked(B, optax.apply_updates(y, u)), opt_state), loss

        program = fc.ClientProgram(
            init=lambda shared, own, key: (shared[0], optimizer.init(shared[0])),
            step=client_step,
            final=lambda shared, done: (fc.Message(optax.tree.sub(done[0], shared[0]), kept_bytes), ()),
        )
        counts = [jnp.sum(b, dtype=jnp.int32).astype(jnp.result_type(float)) for b in jax.tree.leaves(state.mask)]
        leaves = jax.tree.leaves(state.params)
        kept_bytes = sum(n * leaf.dtype.itemsize for n, leaf in zip(counts, leaves, strict=True))
        results = clients.run(program, fc.Message((state.params, state.mask), kept_bytes), cohort, key)
        params, velocity = momentum_step(state.params, state.velocity, results.aggregate, momentum, server_lr)
        dense = fc.num_scalars(params)
        density, of_params, of_mask = (
            jnp.asarray(n, jnp.result_type(float)) for n in (sum(counts) / dense, fc.num_bytes(params), dense / 8)
        )
        extra = AutoFLIPMetrics(density, of_params, of_mask, state.maps.explorers)
        state = state._replace(params=params, velocity=velocity)
        if num_maps:
            state = prune(state, exploration.of_participants(state.maps, cohort))
        return state, results, extra

    return fc.federated(init, update, events={"explore": fc.Event(explore, "before")})


def masked(mask: fc.Params, tree: fc.Params) -> fc.Params:
    """`tree` where the mask, a tree of bool, is true, and 0 elsewhere."""
    return jax.tree.map(lambda b, leaf: jnp.where(b, leaf, jnp.zeros_like(leaf)), mask, tree)


def keep(guidance: fc.Params, threshold: fc.Scalar, output: str | None) -> fc.Params:
    """The mask B for a guidance G, a tree of bool; arguments as for `autoflip`, units stay whole with output=None."""
    everything = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(guidance)])
    least = jnp.quantile(everything, jnp.asarray(threshold, everything.dtype))
    mask = jax.tree.map(lambda g: g > least, guidance)
    if output is None:
        return mask
    alive = {}
    for (layer, G), (_, B) in zip(_layers(guidance).items(), _layers(mask).items(), strict=True):
        if layer != output:
            inputs = tuple(range(G.ndim - 1))
            alive[layer] = (jnp.mean(G, inputs) > least) & jnp.any(B, inputs)

    def of_unit(path: jax.tree_util.KeyPath, B: fc.Array) -> fc.Array:
        layer, name = _split(path)
        return B & alive[layer] if layer in alive and name in ("kernel", "bias") else B

    return jax.tree_util.tree_map_with_path(of_unit, mask)


def check_output(params: fc.Params, output: str) -> None:
    """Raises ValueError if a model has layers, but none at the path `output`."""
    layers = list(_layers(params))
    if layers and output not in layers:
        raise ValueError(
            f"output={output!r} is none of the model's layers {layers}: name the one whose units are the outputs, "
            "which must stay, or pass structured=False"
        )


def export(params: fc.Params, layers: Sequence[str]) -> fc.Params:
    """The smaller model that a pruned one has become: units whose weights and bias are all 0 are cut out.

    For chains of dense layers and convolutions with activations that are 0 at 0 (relu, tanh, gelu), and maybe pooling
    or flattening, between them; not with normalization or skip connections, which make something of a 0. The outputs
    are those of the large model. Build the smaller model with the widths of the new kernels, `kernel.shape[-1]`. At
    least one unit of a layer stays. Not for use inside `jit`, as shapes depend on values.

    Args:
      params: a dict with layers {"kernel": [..., inputs, units], "bias": [units]} (the bias may be missing), as models
        of `models` have it. A dense layer that follows a convolution takes its pixels row by row with the channels
        running fastest, as flax flattens them.
      layers: names of the layers, from the input to the output, whose units all stay.

    Raises:
      ValueError: if a layer's inputs do not fit the units of the one before.
    """
    small = {name: dict(layer) for name, layer in params.items()}
    for name, following in pairwise(layers):
        layer = {part: np.asarray(small[name][part]) for part in small[name]}
        alive = np.any(layer["kernel"] != 0, axis=tuple(range(layer["kernel"].ndim - 1)))
        if "bias" in layer:
            alive |= layer["bias"] != 0
        alive[0] |= not alive.any()
        small[name] = {part: jnp.asarray(leaf[..., alive]) for part, leaf in layer.items()}
        kernel = np.asarray(small[following]["kernel"])
        *window, inputs, units = kernel.shape
        if inputs % len(alive):
            raise ValueError(
                f"layers: {following} has {inputs} inputs, which is no multiple of the {len(alive)} units of {name}: "
                "list the layers in the order in which they feed each other"
            )
        by_unit = kernel.reshape(*window, -1, len(alive), units)[..., alive, :]
        small[following]["kernel"] = jnp.asarray(by_unit.reshape(*window, -1, units))
    return small


def _layers(tree: fc.Params) -> dict[str, fc.Array]:
    """Path of a layer to its kernel [..., inputs, units]."""
    found = {_split(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return {layer: leaf for (layer, name), leaf in found.items() if name == "kernel" and jnp.ndim(leaf) >= 2}


def _split(path: jax.tree_util.KeyPath) -> tuple[str, str]:
    """(path of the layer, name in it) of an array."""
    layer, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
    return layer, name
