"""FOT."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc


class Basis(NamedTuple):
    """Orthonormal basis U of what a layer of width d has had as inputs: float[d, d], zeros from column `rank` on."""

    columns: fc.Array
    rank: fc.Array


class FOTState(NamedTuple):
    """Global model x, the basis U_l of every protected layer, the energy eps to keep, tasks ended, rounds done."""

    params: fc.Params
    bases: dict[str, Basis]
    energy: fc.Array
    task: fc.Array
    round: fc.Counter = 0


class Sketch(NamedTuple):
    """What is sent of the residuals R of a layer's inputs A: Y = R Omega, float[d, s], and r as part / total.

    While it is being collected, and under the rule "squared", part and total are ||R||^2 and ||A||^2.
    """

    Y: fc.Array
    part: fc.Array
    total: fc.Array


def fot(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    inputs: fc.LayerInputsFn,
    layers: fc.LayerWidths,
    energy: fc.Scalar = 0.95,
    energy_step: fc.Scalar = 0.0,
    rule: str = "norm",
    oversampling: int = 1,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FOT: updates of the global model stay orthogonal to what earlier tasks have put into its layers.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              D = mean_S (y_i - x);  D_l <- D_l - U_l U_l' D_l for every protected weight;
                         x <- x + server_lr D.
    End of a task:       A_i = what goes into layer l on client i's examples, at x;  R_i = A_i - U_l U_l' A_i;
                         Y = sum_i R_i Omega_i, Omega_i of independent N(0, 1);  r = ||R|| / ||A||;
                         Y = Q S V';  k = least number with sum_{j<=k} S_j^2 / sum_j S_j^2 > (r - (1 - eps)) / r;
                         U_l <- orth [U_l, Q_1..k];  eps <- eps + energy_step.

    Weights have the inputs on their first axes here: with d the width of a layer, D_l is float[d, out] and A_i is
    float[d, samples]. Biases, normalization parameters, heads of single tasks and all that `layers` does not name are
    not projected.

    Down: x (1P). Up: y_i - x (1P). At the end of a task x and the U_l go down, R_i Omega_i and two scalars a layer up;
    of these only sums over clients are used.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      inputs: `inputs(params, batch) -> {path: float[samples, d]}`, what goes into the layers on a batch in evaluation
        mode, as many samples for every example, those of the first example first. A path leads to the layer's weight in
        the parameters, like "dense_0/kernel". `models.capture.layer_inputs` makes it for any flax model.
      layers: path of every protected weight to its width d, the product of the weight's first axes;
        `models.capture.layer_widths` finds them.
      energy: eps, the share of the energy ||A||^2 to be kept, in (0, 1].
      energy_step: what is added to eps at the end of every task.
      rule: "norm" takes r = sum_i n_i (||R_i|| / ||A_i||) / sum_i n_i, with n_i examples, and at least one direction a
        task, as released code does; "squared" takes r = sum_i ||R_i||^2 / sum_i ||A_i||^2, for which the share that is
        kept in the end is eps, and no direction if that share is there already.
      oversampling: columns of Omega over d. With more, the S_j^2 are better estimates of the residual's own.
      server_lr: 1 replaces the model by the average, but for the projection.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. At the end of a task a
        client goes over its examples once, whatever the epochs and weights, and batch_size only bounds memory.

    Differences: clients look at the layers' inputs at the new global model in evaluation mode, in released code at
    their own models of the task's last round and with dropout. Omega is normal, in released code for MNIST uniform.
    What is no more than rounding is never taken for a direction, so that repeating a task adds none under either rule.
    The U_l go down once a task, in released code in every round.

    Paper: Bakman, Yaldiz, Ezzeldin, Avestimehr, "Federated Orthogonal Training: Mitigating Global Catastrophic
    Forgetting in Continual Federated Learning", 2024, algorithms 1 and 2.
    """
    fc.checks.scalar("energy", energy, low=0, high=1, low_open=True)
    fc.checks.scalar("energy_step", energy_step, low=0)
    fc.checks.one_of("rule", rule, ("norm", "squared"))
    fc.checks.positive_int("oversampling", oversampling, "1 sketches a layer of width d in d columns")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    all_alike = clients.full_pass()._replace(weights="uniform")
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FOTState:
        check_layers(params, layers)
        # No decomposition is made in fewer bits than float32 has, and sketches are sums.
        dtype = fc.sums.accumulator(jnp.result_type(*jax.tree.leaves(params)))
        bases = {path: Basis(jnp.zeros((d, d), dtype), jnp.int32(0)) for path, d in layers.items()}
        return FOTState(params, bases, jnp.asarray(energy, float), jnp.int32(0))

    def update(state: FOTState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key)
        D = project(results.aggregate, state.bases)
        return state._replace(params=fc.add_scaled(state.params, server_lr, D)), results

    def end_task(state: FOTState, cohort: fc.Cohort, key: fc.Key) -> FOTState:
        program = sketch_program(inputs, layers, oversampling, squared=rule == "squared")
        shared = state.params, {path: basis.columns for path, basis in state.bases.items()}
        results = all_alike.run(program, shared, cohort, key, aggregator=fc.weighted_sum())
        bases = {
            path: expand(basis, results.aggregate[path], state.energy, squared=rule == "squared")
            for path, basis in state.bases.items()
        }
        return state._replace(bases=bases, energy=state.energy + energy_step, task=state.task + 1)

    return fc.federated(init, update, events={"end_task": fc.Event(end_task, "task")})


def project(direction: fc.Params, bases: Mapping[str, Basis]) -> fc.Params:
    """The direction without the part D_l of each protected weight that lies in the span of U_l."""

    def one(path: jax.tree_util.KeyPath, leaf: fc.Array) -> fc.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in bases:
            return leaf
        U = bases[name].columns
        return residual(U, leaf.reshape(U.shape[0], -1)).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, direction)


def residual(U: fc.Array, A: fc.Array) -> fc.Array:
    """A - U U' A, in full precision: what accelerators make of float32 products by default leaves a thousandth in."""
    return A - jnp.matmul(U, jnp.matmul(U.T, A, precision="highest"), precision="highest")


def sketch_program(
    inputs: Callable[[fc.Params, fc.Examples], Mapping[str, fc.Array]],
    layers: Mapping[str, int],
    oversampling: int,
    *,
    squared: bool,
) -> fc.ClientProgram:
    """One pass over a client's examples, batch by batch; uploads a `Sketch` of each layer. `shared` is (x, the U_l)."""

    def client_init(shared: fc.PyTree, client_input: fc.PyTree, key: fc.Key):
        _, bases = shared

        def zeros(d: int, dtype: jax.typing.DTypeLike) -> Sketch:
            return Sketch(jnp.zeros((d, oversampling * d), dtype), jnp.zeros((), dtype), jnp.zeros((), dtype))

        return {path: zeros(d, bases[path].dtype) for path, d in layers.items()}, jnp.int32(0)

    def client_step(shared: fc.PyTree, carry: fc.PyTree, batch: fc.Batch):
        x, bases = shared
        sketches, n = carry
        found = check_inputs(fc.masks.call(inputs, x, batch.examples, mask=batch.mask), layers, batch.mask.shape[0])

        def add(sketch: Sketch, U: fc.Array, samples: fc.Array, key: fc.Key) -> Sketch:
            mask = jnp.repeat(batch.mask, samples.shape[0] // batch.mask.shape[0])
            A = jnp.where(mask, samples.T.astype(U.dtype), 0)
            R = residual(U, A)
            omega = jax.random.normal(key, (A.shape[1], sketch.Y.shape[1]), U.dtype)
            Y = sketch.Y + jnp.matmul(R, omega, precision="highest")
            return Sketch(Y, sketch.part + jnp.sum(R**2), sketch.total + jnp.sum(A**2))

        keys = jax.random.split(batch.key, len(layers))
        sketches = {
            path: add(sketches[path], bases[path], found[path], key)
            for path, key in zip(sorted(layers), keys, strict=True)
        }
        return (sketches, n + jnp.sum(batch.mask, dtype=jnp.int32)), jnp.zeros(())

    def client_final(shared: fc.PyTree, carry: fc.PyTree):
        sketches, n = carry

        def weighted(sketch: Sketch) -> Sketch:
            Y, part, total = sketch
            n_i = n.astype(Y.dtype)
            rho_i = jnp.sqrt(part / jnp.where(total > 0, total, 1))
            return Sketch(Y, n_i * rho_i, n_i)

        return sketches if squared else {path: weighted(sketch) for path, sketch in sketches.items()}, ()

    return fc.ClientProgram(client_init, client_step, client_final)


def expand(basis: Basis, sketch: Sketch, energy: fc.Array, *, squared: bool) -> Basis:
    """The basis with the directions added that bring the share of energy in its span to `energy`.

    Args:
      basis: of a layer of width d.
      sketch: summed over the clients.
      energy: float[], eps.
      squared: whether r is of squared norms, as the rule "squared" has it; with the rule "norm" at least one direction
        is added, if there is one.
    """
    U, rank = basis
    d = U.shape[0]
    r = jnp.where(sketch.total > 0, sketch.part / jnp.where(sketch.total > 0, sketch.total, 1), 0)
    Q, S, _ = fc.linalg.svd(sketch.Y)
    total = jnp.sum(S**2)
    # 1 - eps of the whole may be lost, which is this share of the residual: 1 - (r - (1 - eps)) / r.
    lost = (1 - energy.astype(U.dtype)) / jnp.where(r > 0, r, 1)
    # What is left of the total after j directions, summed from the small end, or rounding would hide it.
    left = jnp.cumsum(S[::-1] ** 2)[::-1]
    k = jnp.where(lost < 1, jnp.sum(left >= lost * total, dtype=jnp.int32), 0)
    # R is known to within the rounding of A, whose norm is that of R over ||R|| / ||A||.
    ratio = jnp.sqrt(r) if squared else r
    noise = d * jnp.finfo(U.dtype).eps * jnp.sqrt(total) / jnp.where(ratio > 0, ratio, 1)
    k = jnp.minimum(jnp.maximum(k, 0 if squared else 1), jnp.sum(noise < S, dtype=jnp.int32))
    k = jnp.minimum(k, d - rank)

    column = jnp.arange(d)
    added = jnp.take(Q, jnp.clip(column - rank, 0, Q.shape[1] - 1), axis=1)
    joined = jnp.where(column < rank, U, jnp.where(column < rank + k, added, 0))
    # Householder's QR gives d orthonormal columns of which the first span those of `joined`; the rest is not kept.
    orthonormal = jnp.where(column < rank + k, fc.linalg.qr(joined)[0], 0)
    return Basis(jnp.where(k > 0, orthonormal, U), rank + k)


def check_layers(params: fc.Params, layers: Mapping[str, int]) -> None:
    """Raises ValueError unless every layer is a weight of the parameters with first axes that make up its width."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
    for path, width in layers.items():
        if path not in shapes:
            raise ValueError(
                f"layers names {path!r}, which is no parameter: choose among {', '.join(map(repr, shapes))}"
            )
        widths = np.cumprod(shapes[path], dtype=np.int64).tolist()
        if width not in widths:
            raise ValueError(
                f"layers gives {path!r} the width {width}, but its shape {list(shapes[path])} allows "
                f"{' or '.join(map(str, widths)) or 'none'}: take the product of the first axes, those of the inputs"
            )


def check_inputs(found: Mapping[str, fc.Array], layers: Mapping[str, int], size: int) -> Mapping[str, fc.Array]:
    """Returns what `inputs` gave for `size` examples, or raises ValueError unless it fits the layers."""
    for path, width in layers.items():
        if path not in found:
            raise ValueError(
                f"inputs must return what goes into {path!r}, one of the layers, but returned {sorted(found)}: add it, "
                "or leave the layer out"
            )
        shape = jnp.shape(found[path])
        if len(shape) != 2 or shape[1] != width or shape[0] % size or shape[0] == 0:
            raise ValueError(
                f"inputs must return float[samples, {width}] for {path!r}, as many samples for each of the {size} "
                f"examples, but returned shape {list(shape)}: flatten all axes but the last"
            )
    return found
