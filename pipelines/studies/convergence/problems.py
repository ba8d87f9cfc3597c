"""Federated problems whose constants are known exactly, in double precision.

    F(x) = (1 / N) sum_i f_i(x),    f_i(x) = (1 / M) sum_j f_ij(x),    f_ij(x) = h_ij(x) + <t_ij, x - x*>

h_ij is what the problem is about; F, its minimizer x* and its least value F* are those of h alone. The tilts t_ij sum
to zero over all clients and examples, so that they change none of these; they are chosen such that at the minimizer

    grad f_ij(x*) = zeta u_i + sigma v_ij,    sum_i u_i = 0,  mean_i ||u_i||^2 = 1,
                                              sum_j v_ij = 0,  mean_j ||v_ij||^2 = 1 for each client,

and therefore, exactly and whatever the draw,

    zeta^2  = (1 / N) sum_i ||grad f_i(x*)||^2                        heterogeneity, at the minimizer
    sigma^2 = (1 / M) sum_j ||grad f_ij(x*) - grad f_i(x*)||^2        noise of one example, of each client

The v_ij of a client are plus and minus the vectors of an orthonormal basis, so that the covariance of the noise is
sigma^2 / r times the identity (of the r dimensions in which F is not flat) and its third moments are zero. Where the
h_ij of a client do not differ, as in all problems but logistic regression, the noise is the same at every x; where the
h_i do not differ either, so is the dissimilarity of the gradients.

Noise lies in the examples, not in the batch's key: f_i is then the mean of finitely many functions, so that methods
that pass over all of a client's examples get its gradient exactly, and those that take two gradients of one batch see
the same noise twice, as the papers have it. With batches of B examples drawn with replacement (`order="replacement"`)
the noise of every step is unbiased, independent of all others and of variance sigma^2 / B.

Problems of one kind and size differ in `data` alone, so that a `jax.vmap` over stacked `data` goes over L, mu, zeta,
sigma and draws at once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Array, LossFn, Population, checks
from fedjax_core.types import Examples, Key, PyTree

NEWTON = 1e-12
"""The norm of the gradient at which the minimizer of a logistic regression is taken to be found."""

SINE_PL = 0.17553
"""The Polyak-Lojasiewicz constant of z^2 + 3 sin^2 z, min_z h'(z)^2 / (2 h(z)), rounded down."""


class Constants(NamedTuple):
    """What is known of a problem.

    Attributes:
      smoothness: L, the least number such that the gradients of all f_i are L-Lipschitz.
      convexity: mu, the greatest number such that all f_i are mu-strongly convex; 0 if there is none above.
      pl: a Polyak-Lojasiewicz constant of F, ||grad F(x)||^2 >= 2 pl (F(x) - F*); 0 if there is none. It is the
        greatest, but for logistic regression and for quadratics with different Hessians, whose mu is given here.
      zeta: see above; sqrt of the mean over the clients of ||grad f_i(x*)||^2.
      sigma: see above; sqrt of the mean over the clients of the variance of the gradient of one example at x*.
      dissimilarity: delta, the greatest spectral norm of the difference of the Hessians of an f_i and F; None where it
        is not known.
      curvature: the least eigenvalue of the Hessian of F at x*, but for flat directions.
    """

    smoothness: float
    convexity: float
    pl: float
    zeta: float
    sigma: float
    dissimilarity: float | None
    curvature: float


class Data(NamedTuple):
    """What differs between problems of one kind and size; d dimensions, r of them not flat.

    Attributes:
      population: the clients; each has as many examples, leaves [N M, ...], with the tilts among them.
      start: x_0, float64[d].
      optimum: x*, float64[d].
      basis: orthonormal columns that span the directions in which F is not flat, float64[d, r].
      whole: what `Problem.excess` reads.
    """

    population: Population
    start: Array
    optimum: Array
    basis: Array
    whole: PyTree


class Problem(NamedTuple):
    """A federated problem.

    Attributes:
      loss_fn: `loss_fn(x, batch, key) -> float[B]`, f_ij of the examples of a batch.
      excess: `excess(x, whole) -> float[]`, F(x) - F*, without the clients and, but for logistic regression, without
        cancellation.
      data: arrays.
      constants: what is known of it.
      least: F*.
    """

    loss_fn: LossFn
    excess: Callable[[Array, PyTree], Array]
    data: Data
    constants: Constants
    least: float


def suboptimality(problem: Problem, x: Array) -> Array:
    """F(x) - F*, float[]."""
    return problem.excess(x, problem.data.whole)


def gradient_norm(problem: Problem, x: Array) -> Array:
    """||grad F(x)||, float[]."""
    return jnp.linalg.norm(jax.grad(problem.excess)(x, problem.data.whole))


def distance(problem: Problem, x: Array) -> Array:
    """Distance of x to the minimizers of F, float[]; what lies in flat directions does not count."""
    return jnp.linalg.norm(problem.data.basis.T @ (x - problem.data.optimum))


def quadratic(
    seed: int = 0,
    *,
    dim: int = 10,
    clients: int = 8,
    smoothness: float = 1.0,
    convexity: float = 0.1,
    zeta: float = 1.0,
    sigma: float = 0.0,
    radius: float = 1.0,
    hessians: str = "different",
    rank: int | None = None,
) -> Problem:
    """Quadratics: h_i(x) = 1/2 (x - x*)' A_i (x - x*), the eigenvalues of every A_i spaced evenly in log from mu to L.

    But for a constant, f_i is 1/2 (x - b_i)' A_i (x - b_i) with A_i (x* - b_i) = zeta u_i. With fewer dimensions than
    `dim` in `rank` all A_i, u_i and v_ij lie in one subspace: F is convex, satisfies the Polyak-Lojasiewicz inequality
    with the least eigenvalue that is not 0, and is not strongly convex.

    Args:
      seed: of the rotations, of u_i, v_ij, x* and the direction in which the start lies.
      dim: d.
      clients: N.
      smoothness: L, the largest eigenvalue of each A_i.
      convexity: mu, the smallest one that is not 0.
      zeta: heterogeneity.
      sigma: noise of one example.
      radius: ||x_0 - x*||.
      hessians: "different", each A_i with a rotation of its own, or "equal".
      rank: r, the number of eigenvalues that are not 0; `dim` unless given.

    Raises:
      ValueError: if an argument is out of its range; double precision is off.
    """
    rng = _begin(seed, dim, clients, smoothness, zeta, sigma, radius)
    rank = dim if rank is None else checks.positive_int("rank", rank, f"at most dim={dim}")
    checks.one_of("hessians", hessians, ("different", "equal"))
    if rank > dim:
        raise ValueError(f"rank={rank} is above dim={dim}: lower it")
    if not 0 < convexity <= smoothness:
        raise ValueError(f"convexity={convexity} must lie above 0 and be at most smoothness={smoothness}: change it")
    if rank == 1 and convexity != smoothness:
        raise ValueError(
            f"one eigenvalue cannot be both convexity={convexity} and smoothness={smoothness}: give one value to both, "
            "or two dimensions"
        )
    basis = _rotation(rng, dim)[:, :rank]
    values = np.geomspace(convexity, smoothness, rank)
    values[-1] = smoothness
    rotations = [_rotation(rng, rank) for _ in range(clients)]
    if hessians == "equal":
        rotations = rotations[:1] * clients
    inner = np.stack([q * values @ q.T for q in rotations])
    A = basis @ inner @ basis.T
    A, inner = (0.5 * (a + a.transpose(0, 2, 1)) for a in (A, inner))
    mean = A[0] if hessians == "equal" else A.mean(0)
    tilts, start, optimum = _draw(rng, basis, clients, 1, zeta, sigma, radius)
    examples = {"A": np.repeat(A, 2 * rank, 0), "optimum": _rows(optimum, tilts), "tilt": tilts}
    delta = max(float(np.linalg.norm(each - mean, 2)) for each in A)
    flattest = float(np.linalg.eigvalsh(inner.mean(0))[0])
    known = Constants(smoothness, convexity if rank == dim else 0.0, convexity, zeta, sigma, delta, flattest)
    whole = {"A": jnp.asarray(mean), "optimum": jnp.asarray(optimum)}
    return _problem(_quadratic_loss, _quadratic_excess, examples, clients, start, optimum, basis, whole, known)


def sine(
    seed: int = 0,
    *,
    dim: int = 10,
    clients: int = 8,
    smoothness: float = 1.0,
    zeta: float = 1.0,
    sigma: float = 0.0,
    radius: float = 3.0,
) -> Problem:
    """Not convex, and yet of Polyak and Lojasiewicz: h(x) = (L / 8) sum_k (z_k^2 + 3 sin^2 z_k).

    z is a rotation of x - x*. Second derivatives lie between -L / 2 and L; the Polyak-Lojasiewicz constant is `SINE_PL`
    L / 8. All clients have this h; the tilts alone tell them apart. Arguments and errors are those of `quadratic`.

    Paper: Karimi, Nutini, Schmidt, "Linear Convergence of Gradient and Proximal-Gradient Methods Under the
    Polyak-Lojasiewicz Condition", 2016, which has the function of one variable with a constant of 1/32.
    """
    known = Constants(smoothness, 0.0, SINE_PL * smoothness / 8, zeta, sigma, 0.0, smoothness)
    return _separable(seed, dim, clients, radius, smoothness / 8, _sine_loss, _sine_excess, known)


def saturating(
    seed: int = 0,
    *,
    dim: int = 10,
    clients: int = 8,
    smoothness: float = 1.0,
    zeta: float = 1.0,
    sigma: float = 0.0,
    radius: float = 1.0,
) -> Problem:
    """Smooth and not convex: h(x) = (L / 2) sum_k z_k^2 / (1 + z_k^2), z a rotation of x - x*, flat far away.

    Second derivatives lie between -L / 4 and L. The only stationary point is x*, and as the gradient vanishes at
    infinity no Polyak-Lojasiewicz inequality holds. All clients have this h; the tilts alone tell them apart, and a
    single f_i is not bounded below. Arguments and errors are those of `quadratic`.
    """
    known = Constants(smoothness, 0.0, 0.0, zeta, sigma, 0.0, smoothness)
    return _separable(seed, dim, clients, radius, smoothness / 2, _saturating_loss, _saturating_excess, known)


def logistic(
    seed: int = 0,
    *,
    dim: int = 10,
    clients: int = 8,
    smoothness: float = 1.0,
    convexity: float = 0.1,
    zeta: float | None = None,
    sigma: float | None = None,
    radius: float = 1.0,
    copies: int = 2,
) -> Problem:
    """Logistic regression with an L2 penalty: h_ij(x) = log(1 + exp(-y_ij <a_ij, x>)) + (mu / 2) ||x||^2.

    Features of a client are normal around a center of its own; labels +1 and -1 come from one logistic model. Features
    are scaled such that L = mu + max_i ||sum_j a_ij a_ij' / M|| / 4, which the Hessian of a client is at x = 0. The
    minimizer is found by Newton's method to a gradient of norm `NEWTON`.

    Args:
      seed: of the features, the labels, the model behind them, u_i, v_ij and the direction in which the start lies.
      dim: d.
      clients: N.
      smoothness: L.
      convexity: mu, the weight of the penalty.
      zeta: heterogeneity at the minimizer; None leaves what the features make, without tilts between clients.
      sigma: noise of one example at the minimizer, elsewhere it is another; None leaves what the features make.
      radius: ||x_0 - x*||.
      copies: M = 2 d copies, the number of examples of a client.

    Raises:
      ValueError: as `quadratic`.
    """
    rng = _begin(seed, dim, clients, smoothness, zeta or 0.0, sigma or 0.0, radius)
    checks.positive_int("copies", copies, "2 gives each client 4 examples for each dimension")
    if not 0 < convexity < smoothness:
        raise ValueError(f"convexity={convexity} must lie above 0 and below smoothness={smoothness}: change it")
    count = 2 * dim * copies
    a = rng.normal(size=(clients, count, dim)) + rng.normal(size=(clients, 1, dim))
    behind = rng.normal(size=dim)
    y = np.where(rng.uniform(size=(clients, count)) < 1 / (1 + np.exp(-a @ behind)), 1.0, -1.0)
    largest = max(np.linalg.norm(each.T @ each / count, 2) for each in a)
    a *= np.sqrt(4 * (smoothness - convexity) / largest)
    rows, signs = a.reshape(-1, dim), y.reshape(-1)
    optimum = _newton(rows, signs, convexity)
    basis = np.eye(dim)
    drawn, start, _ = _draw(rng, basis, clients, copies, zeta or 0.0, sigma or 0.0, radius, optimum)
    slope = -signs / (1 + np.exp(signs * (rows @ optimum)))
    at = (slope[:, None] * rows + convexity * optimum).reshape(clients, count, dim)
    mean = at.mean(1, keepdims=True)
    # What the features make of each of the two is taken away only where something else is prescribed for it.
    tilts = drawn.reshape(at.shape) - (mean if zeta is not None else 0) - (at - mean if sigma is not None else 0)
    tilts = tilts.reshape(-1, dim)
    examples = {
        "a": rows,
        "y": signs,
        "optimum": _rows(optimum, tilts),
        "tilt": tilts,
        "mu": np.full(len(signs), convexity),
    }
    natural = np.sqrt(np.mean(np.sum(mean**2, -1))), np.sqrt(np.mean(np.sum((at - mean) ** 2, -1)))
    zeta, sigma = (float(own) if given is None else given for given, own in zip((zeta, sigma), natural, strict=True))
    share = np.abs(slope)
    hessian = (rows.T * (share * (1 - share))) @ rows / len(signs) + convexity * np.eye(dim)
    flattest = float(np.linalg.eigvalsh(hessian)[0])
    known = Constants(smoothness, convexity, convexity, zeta, sigma, None, flattest)
    whole = {"a": rows, "y": signs, "mu": np.float64(convexity), "least": np.float64(0)}
    whole = jax.tree.map(jnp.asarray, whole)
    least = float(_logistic_excess(jnp.asarray(optimum), whole))
    whole["least"] = jnp.float64(least)
    made = _problem(_logistic_loss, _logistic_excess, examples, clients, start, optimum, basis, whole, known)
    return made._replace(least=least)


KINDS: Mapping[str, Callable[..., Problem]] = {
    "quadratic": quadratic,
    "logistic": logistic,
    "sine": sine,
    "saturating": saturating,
}
"""Name of a kind of problem to what makes it."""


def _tilted(x: Array, batch: Examples) -> tuple[Array, Array]:
    """x - x* [B, d], and <t, x - x*> [B]."""
    z = x - batch["optimum"]
    return z, jnp.einsum("bd,bd->b", batch["tilt"], z)


def _quadratic_loss(x: Array, batch: Examples, key: Key) -> Array:
    z, tilt = _tilted(x, batch)
    return 0.5 * jnp.einsum("bi,bij,bj->b", z, batch["A"], z) + tilt


def _quadratic_excess(x: Array, whole: PyTree) -> Array:
    z = x - whole["optimum"]
    return 0.5 * z @ whole["A"] @ z


def _sine(z: Array) -> Array:
    return jnp.sum(z**2 + 3 * jnp.sin(z) ** 2, axis=-1)


def _sine_loss(x: Array, batch: Examples, key: Key) -> Array:
    z, tilt = _tilted(x, batch)
    return batch["scale"] * _sine(jnp.einsum("bd,bde->be", z, batch["rotation"])) + tilt


def _sine_excess(x: Array, whole: PyTree) -> Array:
    return whole["scale"] * _sine((x - whole["optimum"]) @ whole["rotation"])


def _saturating(z: Array) -> Array:
    return jnp.sum(z**2 / (1 + z**2), axis=-1)


def _saturating_loss(x: Array, batch: Examples, key: Key) -> Array:
    z, tilt = _tilted(x, batch)
    return batch["scale"] * _saturating(jnp.einsum("bd,bde->be", z, batch["rotation"])) + tilt


def _saturating_excess(x: Array, whole: PyTree) -> Array:
    return whole["scale"] * _saturating((x - whole["optimum"]) @ whole["rotation"])


def _logistic_loss(x: Array, batch: Examples, key: Key) -> Array:
    _, tilt = _tilted(x, batch)
    return jnp.logaddexp(0.0, -batch["y"] * (batch["a"] @ x)) + 0.5 * batch["mu"] * (x @ x) + tilt


def _logistic_excess(x: Array, whole: PyTree) -> Array:
    fit = jnp.mean(jnp.logaddexp(0.0, -whole["y"] * (whole["a"] @ x)))
    return fit + 0.5 * whole["mu"] * x @ x - whole["least"]


def _separable(
    seed: int,
    dim: int,
    clients: int,
    radius: float,
    scale: float,
    loss: Any,
    excess: Callable[[Array, PyTree], Array],
    known: Constants,
) -> Problem:
    """A sum over the coordinates of a rotation of x - x*, the same for all clients but for the tilts."""
    rng = _begin(seed, dim, clients, known.smoothness, known.zeta, known.sigma, radius)
    rotation = _rotation(rng, dim)
    tilts, start, optimum = _draw(rng, np.eye(dim), clients, 1, known.zeta, known.sigma, radius)
    examples = {
        "rotation": np.repeat(rotation[None], len(tilts), 0),
        "optimum": _rows(optimum, tilts),
        "tilt": tilts,
        "scale": np.full(len(tilts), scale),
    }
    whole = jax.tree.map(jnp.asarray, {"rotation": rotation, "optimum": optimum, "scale": np.float64(scale)})
    return _problem(loss, excess, examples, clients, start, optimum, np.eye(dim), whole, known)


def _begin(
    seed: int, dim: int, clients: int, smoothness: float, zeta: float, sigma: float, radius: float
) -> np.random.Generator:
    """The generator of a seed, once what all problems have in common is checked."""
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            "problems with known constants need double precision, and jax_enable_x64 is off: call this within "
            "`with jax.enable_x64(True):`"
        )
    checks.positive_int("dim", dim, "take at least one dimension")
    checks.positive_int("clients", clients, "take at least one")
    checks.scalar("smoothness", smoothness, low=0, low_open=True)
    for name, value in (("zeta", zeta), ("sigma", sigma), ("radius", radius)):
        checks.scalar(name, value, low=0)
    if clients == 1 and zeta:
        raise ValueError(f"zeta={zeta} with clients=1, whose gradient vanishes at the minimizer: take zeta=0, or two")
    return np.random.default_rng([seed, 12])


def _rotation(rng: np.random.Generator, dim: int) -> np.ndarray:
    """An orthogonal matrix, uniformly drawn."""
    q, r = np.linalg.qr(rng.normal(size=(dim, dim)))
    return q * np.sign(np.diag(r))


def _draw(
    rng: np.random.Generator,
    basis: np.ndarray,
    clients: int,
    copies: int,
    zeta: float,
    sigma: float,
    radius: float,
    optimum: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """zeta u_i + sigma v_ij [N M, d] with M = 2 r copies, x_0 and x* [d]; all but x* in the span of a basis [d, r]."""
    rank = basis.shape[1]
    u = rng.normal(size=(clients, rank))
    if clients > 1:
        u -= u.mean(0)
        u /= np.sqrt(np.mean(np.sum(u**2, 1)))
    turned = np.stack([_rotation(rng, rank) for _ in range(clients)])
    v = np.tile(np.concatenate([turned, -turned], 1), (1, copies, 1))
    optimum = rng.normal(size=len(basis)) if optimum is None else optimum
    way = rng.normal(size=rank)
    start = optimum + radius * basis @ (way / np.linalg.norm(way))
    tilts = (zeta * u[:, None] + sigma * v) @ basis.T
    return tilts.reshape(-1, len(basis)), start, optimum


def _rows(optimum: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(optimum, like.shape).copy()


def _problem(
    loss: Any,
    excess: Callable[[Array, PyTree], Array],
    examples: dict[str, np.ndarray],
    clients: int,
    start: np.ndarray,
    optimum: np.ndarray,
    basis: np.ndarray,
    whole: PyTree,
    known: Constants,
) -> Problem:
    count = len(examples["tilt"]) // clients
    population = Population.from_sizes(examples, [count] * clients)
    data = Data(population, jnp.asarray(start), jnp.asarray(optimum), jnp.asarray(basis), whole)
    return Problem(loss, excess, data, known, 0.0)


def _newton(a: np.ndarray, y: np.ndarray, mu: float, most: int = 100) -> np.ndarray:
    """The minimizer of mean log(1 + exp(-y a x)) + mu / 2 |x|^2, by Newton's method with halved steps."""

    def value(x: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, -y * (a @ x))) + 0.5 * mu * x @ x)

    x = np.zeros(a.shape[1])
    for _ in range(most):
        share = 1 / (1 + np.exp(y * (a @ x)))
        gradient = -(share * y) @ a / len(y) + mu * x
        if np.linalg.norm(gradient) <= NEWTON:
            return x
        hessian = (a.T * (share * (1 - share))) @ a / len(y) + mu * np.eye(len(x))
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        # Near the minimizer values differ by rounding alone, and the whole step is right.
        while value(x - length * step) > value(x) - 0.25 * length * gradient @ step + 1e-14 and length > 1e-6:
            length /= 2
        x = x - length * step
    raise ValueError(
        f"Newton's method left a gradient of norm {np.linalg.norm(gradient):.1e} after {most} steps, above {NEWTON:g}: "
        "raise convexity or lower smoothness"
    )
