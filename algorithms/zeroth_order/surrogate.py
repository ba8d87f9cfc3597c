"""Surrogates of a function from its values: Gaussian processes near a point, and random Fourier features to share.

Letters in shapes: d parameters, H capacity of a history, n neighbors, Q candidates, M features. Everything has fixed
shapes: what is not there yet is masked. All matrix products are in full precision, whatever the backend's default.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import fedjax_core as fc

GRID = 8
"""Lengthscales at which the likelihood is compared before the best is refined."""
REFINEMENTS = 12
"""Most steps of the refinement by values, and of that by slopes."""
TOLERANCE = 2**-8.5
"""Where the refinement by values ends, in log l: 0.3 %. Nearer to a maximum single precision sees no difference."""


class History(NamedTuple):
    """What a client has asked so far: a ring of the last H queries.

    Attributes:
      points: float[H, d].
      values: float[H].
      asked: int32[], number of queries ever stored; the next goes to row asked mod H, over the oldest if it is full.
    """

    points: fc.Array
    values: fc.Array
    asked: fc.Array


class Neighbors(NamedTuple):
    """The n stored points nearest to a center x, values scaled to [0, 1].

    Attributes:
      offsets: float[n, d], x_j - x. Differences of near points are small, and exact where the points are not.
      targets: float[n], u_j = (y_j - low) / scale; 0 in rows that are not there.
      present: bool[n].
      low: float[], least value of the neighbors.
      scale: float[], their largest value less their least; 1 where all are equal.
    """

    offsets: fc.Array
    targets: fc.Array
    present: fc.Array
    low: fc.Array
    scale: fc.Array


class GaussianProcess(NamedTuple):
    """The posterior of a Gaussian process of mean 0 and variance 1 given neighbors' targets.

    Attributes:
      neighbors: what it is conditioned on.
      factor: float[n, n], lower Cholesky factor of K + noise I.
      coefficients: float[n], (K + noise I)^-1 u.
      lengthscale: float[], l.
    """

    neighbors: Neighbors
    factor: fc.Array
    coefficients: fc.Array
    lengthscale: fc.Array


class Kernel(NamedTuple):
    """A stationary kernel k(r / l) by two functions of s = r / l.

    Attributes:
      value: k(s), with k(0) = 1.
      slope: h(s) with d k(x, x_j) / dx = -h(s) (x - x_j) / l^2. Then h(0) / l^2 is the prior variance of a
        coordinate of the gradient, and d k / d log l = h(s) s^2.
    """

    value: Callable[[fc.Array], fc.Array]
    slope: Callable[[fc.Array], fc.Array]


def _matern(s: fc.Array) -> fc.Array:
    t = jnp.sqrt(5).astype(s.dtype) * s
    return (1 + t + t**2 / 3) * jnp.exp(-t)


def _matern_slope(s: fc.Array) -> fc.Array:
    t = jnp.sqrt(5).astype(s.dtype) * s
    return 5 / 3 * (1 + t) * jnp.exp(-t)


def _rbf(s: fc.Array) -> fc.Array:
    return jnp.exp(-(s**2) / 2)


KERNELS = {"matern": Kernel(_matern, _matern_slope), "rbf": Kernel(_rbf, _rbf)}
"""Matern-5/2, and the squared exponential."""


def empty_history(capacity: int, x: fc.Array) -> History:
    """Room for `capacity` queries at points like x, float[d]."""
    return History(jnp.zeros((capacity, x.size), x.dtype), jnp.zeros(capacity, x.dtype), jnp.int32(0))


def push(history: History, points: fc.Array, values: fc.Array) -> History:
    """The history with Q <= H more queries: points float[Q, d] and their values float[Q]."""
    rows = (history.asked + jnp.arange(points.shape[0])) % history.values.shape[0]
    return History(
        history.points.at[rows].set(points), history.values.at[rows].set(values), history.asked + points.shape[0]
    )


@partial(jax.jit, static_argnames="count")
def nearest(history: History, x: fc.Array, *, count: int) -> Neighbors:
    """The `count` stored queries nearest to x, float[d] (all of them if there are fewer), nearest first.

    A query whose value was no number is passed over.
    """
    offsets = history.points - x
    stored = (jnp.arange(history.values.shape[0]) < history.asked) & jnp.isfinite(history.values)
    negative, rows = jax.lax.top_k(-jnp.where(stored, jnp.sum(offsets**2, axis=1), jnp.inf), count)
    present, values = negative > -jnp.inf, history.values[rows]
    low = jnp.min(jnp.where(present, values, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(present, values, -jnp.inf), initial=-jnp.inf)
    low, scale = jnp.where(high >= low, low, 0), jnp.where(high > low, high - low, 1)
    targets = jnp.where(present, (values - low) / scale, 0)
    return Neighbors(jnp.where(present[:, None], offsets[rows], 0), targets, present, low, scale)


class _Search(NamedTuple):
    """A search for a maximum between left and right: the three best points so far, the best first, float[3] both.

    `next` is where to look now, `by_parabola` whether it is the vertex through the three, `moved` and `before` are how
    far the last two points lay from the best.
    """

    left: fc.Array
    right: fc.Array
    points: fc.Array
    values: fc.Array
    next: fc.Array
    by_parabola: fc.Array
    moved: fc.Array
    before: fc.Array
    steps: fc.Array


@partial(jax.jit, static_argnames="kernel")
def fit_lengthscale(
    neighbors: Neighbors, *, kernel: str, noise: fc.Scalar, shortest: fc.Scalar = 0.1, longest: fc.Scalar = 100.0
) -> fc.Array:
    """The lengthscale of greatest marginal likelihood, float[].

    `GRID` candidates, evenly spaced in log l from `shortest` to `longest` times the root mean square distance of the
    neighbors. Then Brent's search between the neighbors of the best: the vertex of the parabola through the three best
    points, or a golden section where that leaves the interval or does not get closer. It ends when log l would move by
    no more than `TOLERANCE`. In double precision the zero of the slope follows, by the secant method, to 2^15 times the
    precision.

    Search: Brent, "Algorithms for Minimization without Derivatives", 1973, chapter 5.
    """
    k, h = KERNELS[kernel]
    u, r = neighbors.targets, _distances(neighbors)
    pairs = neighbors.present[:, None] & neighbors.present
    off_diagonal = jnp.maximum(jnp.sum(pairs) - jnp.sum(neighbors.present), 1)
    typical = jnp.sqrt(jnp.sum(jnp.where(pairs, r**2, 0)) / off_diagonal.astype(r.dtype))
    typical = jnp.where(typical > 0, typical, 1)
    span = [jnp.log(jnp.asarray(bound, r.dtype) * typical) for bound in (shortest, longest)]
    grid = span[0] + (span[1] - span[0]) * jnp.linspace(0, 1, GRID, dtype=r.dtype)

    def likelihood(log_l: fc.Array) -> fc.Array:
        factor = _factor(neighbors, k(r * jnp.exp(-log_l)), noise)
        value = -jnp.sum(fc.linalg.solve_lower(factor, u) ** 2) / 2 - jnp.sum(jnp.log(jnp.diag(factor)))
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def propose(state: _Search) -> _Search:
        """Sets where to look next."""
        x, (p, q) = state.points[0], state.points[1:] - state.points[0]
        a, b = p * (state.values[2] - state.values[0]), q * (state.values[1] - state.values[0])
        vertex = x + (p * a - q * b) / (2 * (a - b))
        good = (vertex > state.left) & (vertex < state.right) & (jnp.abs(vertex - x) < state.before / 2)
        larger = jnp.where(state.right - x > x - state.left, state.right, state.left)
        section = x + (3 - 5**0.5) / 2 * (larger - x)
        return state._replace(next=jnp.where(good, vertex, section), by_parabola=good)

    def moving(state: _Search) -> fc.Array:
        return (state.steps < REFINEMENTS) & (jnp.abs(state.next - state.points[0]) > TOLERANCE)

    def step(state: _Search) -> _Search:
        x, new = state.points[0], state.next
        value = likelihood(new)
        # The maximum lies on the better one's side of the other.
        better = value >= state.values[0]
        inner, outer = jnp.where(better, new, x), jnp.where(better, x, new)
        left, right = jnp.where(outer < inner, outer, state.left), jnp.where(outer > inner, outer, state.right)
        # A tie goes to the newer point.
        points, values = jnp.append(new, state.points), jnp.append(value, state.values)
        best = jnp.argsort(-values)[:3]
        return propose(
            state._replace(
                left=left,
                right=right,
                points=points[best],
                values=values[best],
                moved=jnp.abs(new - x),
                before=state.moved,
                steps=state.steps + 1,
            )
        )

    values = jax.vmap(likelihood)(grid)
    best = jnp.argmax(values)
    # The best and two beside it, at an end of the range those that are there.
    rows = jnp.clip(best, 1, GRID - 2) + jnp.arange(-1, 2)
    rows = rows[jnp.argsort(-values[rows])]
    left, right = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, GRID - 1)]
    width = right - left
    start = _Search(left, right, grid[rows], values[rows], grid[best], jnp.bool_(False), width, width, jnp.int32(0))
    found = jax.lax.while_loop(moving, step, propose(start))
    # The last vertex is nearer than the tolerance. A section that small says that nothing is better beside the best.
    before, x = found.points[0], jnp.where(found.by_parabola, found.next, found.points[0])
    precision = 2**15 * float(jnp.finfo(r.dtype).eps)
    if precision > TOLERANCE:
        return jnp.exp(x)

    def slope(log_l: fc.Array) -> fc.Array:
        s = r * jnp.exp(-log_l)
        factor = _factor(neighbors, k(s), noise)
        inverse = fc.linalg.cho_solve(factor, jnp.eye(u.size, dtype=u.dtype))
        coefficients = inverse @ u
        change = jnp.where(pairs, h(s) * s**2, 0)
        return (coefficients @ change @ coefficients - jnp.sum(inverse * change)) / 2

    def apart(state: tuple[fc.Array, fc.Array, fc.Array, fc.Array]) -> fc.Array:
        before, _, x, steps = state
        return (steps < REFINEMENTS) & (jnp.abs(x - before) > precision)

    def secant(state: tuple[fc.Array, fc.Array, fc.Array, fc.Array]) -> tuple[fc.Array, fc.Array, fc.Array, fc.Array]:
        before, at_before, x, steps = state
        at_x = slope(x)
        new = x - at_x * (x - before) / (at_x - at_before)
        return x, at_x, jnp.where((new > found.left) & (new < found.right), new, x), steps + 1

    return jnp.exp(jax.lax.while_loop(apart, secant, (before, slope(before), x, jnp.int32(0)))[2])


@partial(jax.jit, static_argnames="kernel")
def condition(neighbors: Neighbors, lengthscale: fc.Array, *, kernel: str, noise: fc.Scalar) -> GaussianProcess:
    """The posterior given the neighbors' targets, each observed with variance `noise`."""
    factor = _factor(neighbors, KERNELS[kernel].value(_distances(neighbors) / lengthscale), noise)
    return GaussianProcess(neighbors, factor, fc.linalg.cho_solve(factor, neighbors.targets), lengthscale)


@partial(jax.jit, static_argnames="kernel")
def gradient_mean(process: GaussianProcess, *, kernel: str) -> fc.Array:
    """Mean of the gradient at the center, float[d], in the units of the function's values."""
    offsets, scale = process.neighbors.offsets, process.lengthscale
    r = jnp.sqrt(jnp.sum(offsets**2, axis=1))
    weights = KERNELS[kernel].slope(r / scale) / scale**2 * process.coefficients
    return process.neighbors.scale * _dot(weights, offsets)


@partial(jax.jit, static_argnames="kernel")
def gradient_variance(process: GaussianProcess, z: fc.Array, *, kernel: str) -> fc.Array:
    """Variance of the gradient at center + z for each row of z, float[Q, d]: its trace over coordinates, float[Q].

    In the units of the scaled targets: d h(0) / l^2 - tr(dk(z, X) (K + noise I)^-1 dk(X, z)). The products
    (z - x_i)'(z - x_j) are put together from those of z and X, so that no array of Q n d numbers is made.
    """
    offsets, present, scale = process.neighbors.offsets, process.neighbors.present, process.lengthscale
    inverse = fc.linalg.cho_solve(process.factor, jnp.eye(present.size, dtype=z.dtype))
    gram, cross = _dot(offsets, offsets.T), _dot(z, offsets.T)
    square = jnp.sum(z**2, axis=1)
    r = jnp.sqrt(jnp.maximum(square[:, None] + jnp.diag(gram) - 2 * cross, 0))
    slope = KERNELS[kernel].slope
    c = jnp.where(present, slope(r / scale) / scale**2, 0)
    c_inverse = _dot(c, inverse)
    explained = jnp.sum(c * (_dot(c, inverse * gram) - 2 * cross * c_inverse), axis=1)
    explained += square * jnp.sum(c * c_inverse, axis=1)
    return z.shape[1] * slope(jnp.zeros((), z.dtype)) / scale**2 - explained


class Features(NamedTuple):
    """Random Fourier features phi(x) = sqrt(2 / M) cos(W'x + b), with phi(x)'phi(z) near exp(-||x - z||^2 / (2 l^2)).

    Attributes:
      frequencies: W, float[d, M], normal with variance 1 / l^2.
      phases: b, float[M], uniform in [0, 2 pi).
    """

    frequencies: fc.Array
    phases: fc.Array


def random_features(seed: int, num_features: int, lengthscale: fc.Scalar, x: fc.Array) -> Features:
    """The features for points like x, float[d]: all clients draw them from the same seed, and none sends them."""
    frequency_key, phase_key = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(frequency_key, (x.size, num_features), jnp.float32).astype(x.dtype)
    b = jax.random.uniform(phase_key, (num_features,), jnp.float32, 0, 2 * jnp.pi).astype(x.dtype)
    return Features(w / jnp.asarray(lengthscale, x.dtype), b)


@jax.jit
def fit_weights(features: Features, neighbors: Neighbors, x: fc.Array, *, ridge: fc.Scalar) -> fc.Array:
    """Weights nu = scale phi(X)' (phi(X) phi(X)' + ridge I)^-1 u, float[M], of neighbors of the center x.

    In the units of the function's values (the constant `low` is left out, which no gradient sees).
    """
    phi = jnp.cos(_dot(neighbors.offsets + x, features.frequencies) + features.phases)
    phi = jnp.where(neighbors.present[:, None], phi * jnp.sqrt(2 / phi.shape[1]).astype(phi.dtype), 0)
    factor = _factor(neighbors, _dot(phi, phi.T), ridge)
    return neighbors.scale * _dot(fc.linalg.cho_solve(factor, neighbors.targets), phi)


@jax.jit
def features_gradient(features: Features, weights: fc.Array, x: fc.Array) -> fc.Array:
    """Gradient S(x; nu) = -sqrt(2 / M) W (sin(W'x + b) nu) of phi(x)'nu, float[d]; linear in the weights."""
    w, b = features
    scale = jnp.sqrt(2 / b.size).astype(x.dtype)
    return -scale * _dot(w, jnp.sin(_dot(x, w) + b) * weights)


def jitter(dtype: jnp.dtype) -> float:
    """What is added to the diagonal besides the noise: 4e-6 in single precision, 7e-15 in double.

    Rounding moves the eigenvalues of K by a few times this type's epsilon. Without it a matrix of near points that is
    singular but for a noise of 1e-6 may have no Cholesky factor in single precision.
    """
    return 32 * float(jnp.finfo(dtype).eps)


def _factor(neighbors: Neighbors, gram: fc.Array, noise: fc.Scalar) -> fc.Array:
    """Cholesky factor of gram + noise I; a neighbor that is not there is independent of all and has variance 1."""
    present = neighbors.present
    both = present[:, None] & present
    diagonal = jnp.where(present, jnp.asarray(noise, gram.dtype) + jitter(gram.dtype), 1)
    return fc.linalg.cholesky(jnp.where(both, gram, 0) + jnp.diag(diagonal))


def _distances(neighbors: Neighbors) -> fc.Array:
    """float[n, n], distances of the neighbors from each other."""
    gram = _dot(neighbors.offsets, neighbors.offsets.T)
    square = jnp.diag(gram)
    apart = ~jnp.eye(square.size, dtype=bool)
    return jnp.sqrt(jnp.where(apart, jnp.maximum(square[:, None] + square - 2 * gram, 0), 0))


def _dot(a: fc.Array, b: fc.Array) -> fc.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
