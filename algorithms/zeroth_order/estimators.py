"""Function values instead of gradients: queries, finite differences, and functions that are not written in JAX.

Letters in shapes: d parameters (all leaves end to end), q directions, Q points of one call, B examples of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fedjax_core as fc

Estimate = Callable[[fc.Params, fc.Batch], tuple[fc.Array, fc.Params]]
"""`(y, batch) -> (f_i(y), estimate of its gradient)`, from values of f_i alone."""


def query(loss_fn: fc.LossFn, points: fc.Array, unravel: Callable[[fc.Array], fc.Params], batch: fc.Batch) -> fc.Array:
    """Values float[Q] of a client's function at points float[Q, d]: Q queries, made in one call.

    The function is the mean loss over the batch. All points see the same examples and the same key.
    """
    values = jax.vmap(lambda x: fc.batch_loss(loss_fn, unravel(x), batch))(points)
    return values.astype(points.dtype)


def flatten(params: fc.Params) -> tuple[fc.Array, Callable[[fc.Array], fc.Params]]:
    """Parameters end to end, float[d], and the way back to parameters of their own dtypes.

    The vector is float32 at least, which decompositions and differences of values need.
    """
    x, unravel = ravel_pytree(fc.sums.widen(params))
    return x, lambda x: fc.sums.cast_like(unravel(x), params)


def settle(points: fc.Array, params: fc.Params) -> fc.Array:
    """Points float[Q, d] as parameters like `params` hold them: their values are those of rounded points."""
    if all(jnp.result_type(leaf) == points.dtype for leaf in jax.tree.leaves(params)):
        return points
    unravel = flatten(params)[1]
    return jax.vmap(lambda x: flatten(unravel(x))[0])(points)


def uniform_box(key: fc.Key, center: fc.Array, radius: fc.Scalar, count: int) -> fc.Array:
    """`count` points float[count, d], uniform in the box of half-width `radius` around `center`, float[d]."""
    # Drawn in single precision, so that a run in double precision queries the same points.
    draw = jax.random.uniform(key, (count, center.size), jnp.float32, -1.0, 1.0)
    return center + jnp.asarray(radius, center.dtype) * draw.astype(center.dtype)


def orthonormal_directions(key: fc.Key, count: int, like: fc.Array) -> fc.Array:
    """`count` <= d random directions float[count, d] of length 1 at right angles, for `like`, float[d].

    Gaussian vectors put through Gram-Schmidt. Without the signs, a QR decomposition leaves them to the backend.
    """
    draw = jax.random.normal(key, (count, like.size), jnp.float32).astype(like.dtype)
    columns, triangle = fc.linalg.qr(draw.T)
    return (columns * jnp.where(jnp.diag(triangle) < 0, -1, 1).astype(like.dtype)).T


def finite_differences(loss_fn: fc.LossFn, *, num_directions: int, mu: fc.Scalar) -> Estimate:
    """Forward differences: g = (1 / q) sum_s (f_i(y + mu s) - f_i(y)) / mu s, over q orthonormal random s.

    Its mean is grad f_i / d up to terms of order mu, not grad f_i. With q = d it is grad f_i / d. It costs q + 1
    queries, `num_queries` of them. There are at most d directions at right angles, so q is the lesser of the two.
    """

    def estimate(y: fc.Params, batch: fc.Batch) -> tuple[fc.Array, fc.Params]:
        x, unravel = flatten(y)
        direction_key, loss_key = jax.random.split(batch.key)
        s = orthonormal_directions(direction_key, min(num_directions, x.size), x)
        step = jnp.asarray(mu, x.dtype)
        points = settle(jnp.concatenate([x[None], x + step * s]), y)
        if any(jnp.result_type(leaf) != x.dtype for leaf in jax.tree.leaves(y)):
            s = (points[1:] - x) / step  # where the rounding of a short type has put the points
        f = query(loss_fn, points, unravel, batch._replace(key=loss_key))
        return f[0], unravel((f[1:] - f[0]) / step @ s / s.shape[0])

    return estimate


def num_queries(num_directions: int, params: fc.Params) -> int:
    """Queries that one estimate of `finite_differences` costs: q + 1."""
    return min(num_directions, sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params))) + 1


def host_loss(function: Callable[[list[tuple[fc.Params, fc.Examples]]], Sequence[Any]]) -> fc.LossFn:
    """A loss function from one that is not JAX: a simulator, a subprocess, a C library.

    It runs on the host while the compiled round waits, through `jax.pure_callback`. All queries that a step makes, of
    all clients that run at the same time (the plan's lanes), come in one call, so that they can be worked off together,
    for example by `multiprocessing.Pool.map`. Lanes without a client make queries too, whose values are dropped.

    Args:
      function: `function(queries) -> K times float[B]`. `queries` is a list of K pairs (params, examples) of NumPy
        arrays: parameters as the model has them, and the B examples of one client's batch (padding included, so give
        clients equally many examples; for a function that is no mean over examples give each client one example that
        holds all the function needs). It must give the same values for the same query.

    Returns:
      A loss function, which has no gradient. It ignores its key.
    """

    def loss_fn(params: fc.Params, batch: fc.Examples, key: fc.Key | None = None) -> fc.Array:
        size = fc.checks.leading_axis(batch, "batch")
        dtype = jnp.result_type(float, *jax.tree.leaves(params))
        ranks = [jnp.ndim(leaf) for leaf in jax.tree.leaves((params, batch))]

        def call(*args: fc.PyTree) -> np.ndarray:
            leaves, treedef = jax.tree.flatten(args)
            leaves = [np.asarray(leaf) for leaf in leaves]
            # Each vmap around the call adds a leading axis, of size 1 where it does not change the argument.
            lead = np.broadcast_shapes(*[leaf.shape[: leaf.ndim - n] for leaf, n in zip(leaves, ranks, strict=True)])

            def one(index: tuple[int, ...]):
                own = [leaf[tuple(np.minimum(index, np.subtract(leaf.shape[: len(lead)], 1)))] for leaf in leaves]
                return jax.tree.unflatten(treedef, own)

            queries = [one(index) for index in np.ndindex(*lead)]
            values = np.asarray([np.asarray(value, dtype) for value in function(queries)])
            if values.shape != (len(queries), size):
                raise ValueError(
                    f"function must return float[{size}] for each of {len(queries)} queries, but returned shape "
                    f"{list(values.shape)}: one value per example of the query's batch"
                )
            return values.reshape(*lead, size)

        shape = jax.ShapeDtypeStruct((size,), dtype)
        return jax.pure_callback(call, shape, params, batch, vmap_method="expand_dims")

    return loss_fn
