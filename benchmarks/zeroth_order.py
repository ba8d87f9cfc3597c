"""A round of FZooS against the same computation written in NumPy and SciPy, and with a hundred clients.

    python benchmarks/zeroth_order.py [--repeats 3] [--many 100]

Quadratic functions in 300 dimensions, 5 clients, 10 local steps, the paper's options but for fewer
features, and the second round of a run (the first one has no survey). The plain program does what a round does: its
lengthscales come from SciPy's bounded search over the same range, its solves from SciPy's Cholesky factors. Contenders
take turns, with one thread for BLAS and LAPACK (both use SciPy's), which serves both better at 150 unknowns, and with
one for each core, which these take by themselves. The last row is a round of many clients as one compiled step, with
one thread.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before the libraries are loaded: threads that were once started disturb even when they are no longer used.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize_scalar
from threadpoolctl import threadpool_limits

import algorithms
from algorithms.zeroth_order import surrogate
from benchmarks import _measure
from fedjax_core import Population

D, CLIENTS, STEPS, FEATURES = 300, 5, 10, 2000
NOISE, RIDGE, RADIUS, LR = 1e-6, 1e-5, 0.01, 0.01
NEIGHBORS, FEATURE_NEIGHBORS = 150, 500


def loss_fn(x, batch, key):
    u = 20 * jnp.clip(x, 0, 1) - 10
    return 0.1 / D * (batch["c"] @ u**2 + batch["e"] @ u + 1)


def coefficients(num_clients):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(num_clients, 1 / num_clients), (2, D)).transpose(0, 2, 1)
    return {name: np.float32(1 + 5 * (s - 1 / num_clients)) for name, s in zip("ce", share, strict=True)}


def compiled(num_clients):
    """(round, its state after the first round, the cohort)."""
    algorithm = algorithms.fzoos(
        loss_fn,
        optax.adam(LR),
        num_clients=num_clients,
        queries=algorithms.FZooSQueries(capacity=1000),
        surrogate=algorithms.FZooSSurrogate(
            neighbors=NEIGHBORS,
            num_features=FEATURES,
            feature_neighbors=FEATURE_NEIGHBORS,
            feature_lengthscale=1.0,
        ),
        batch_size=1,
        num_steps=STEPS,
    )
    cohort = Population.from_sizes(coefficients(num_clients), [1] * num_clients).cohort(np.arange(num_clients))
    start = jnp.asarray(np.random.default_rng(1).uniform(size=D), jnp.float32)
    round_fn = jax.jit(algorithm.round)
    seconds, (state, _) = _measure.first_call(round_fn, algorithm.init(start), cohort, jax.random.key(0))
    return round_fn, state, cohort, seconds


# The plain program, in single precision like the compiled one.


def kernel(r, scale):
    s = np.float32(np.sqrt(5)) * r / scale
    return (1 + s + s**2 / 3) * np.exp(-s)


def distances(a, b):
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


def nearest(history, x, count):
    points, values = (np.array(part, np.float32) for part in history)
    order = np.argsort(((points - x) ** 2).sum(1))[:count]
    y = values[order]
    value_range = np.ptp(y) or np.float32(1)
    return points[order], (y - y.min()) / value_range, value_range


def fitted(offsets, u):
    """(lengthscale, Cholesky factor) of greatest marginal likelihood."""
    r = distances(offsets, offsets)
    np.fill_diagonal(r, 0)
    noise = np.float32(NOISE + 32 * np.finfo(np.float32).eps) * np.eye(len(u), dtype=np.float32)
    typical = np.log(np.sqrt((r**2).sum() / (len(u) * (len(u) - 1))))

    def cost(log_l):
        factor = cho_factor(kernel(r, np.float32(np.exp(log_l))) + noise, lower=True)
        return u @ cho_solve(factor, u) / 2 + np.log(np.diag(factor[0])).sum()

    bounds = (typical + np.log(0.1), typical + np.log(100))
    found = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": surrogate.TOLERANCE})
    scale = np.float32(np.exp(found.x))
    return scale, cho_factor(kernel(r, scale) + noise, lower=True)


def slope(r, scale):
    s = np.float32(np.sqrt(5)) * r / scale
    return np.float32(5 / 3) * (1 + s) * np.exp(-s) / scale**2


def most_uncertain(rng, history, x, half_width, candidates, count):
    near, u, _ = nearest(history, x, NEIGHBORS)
    offsets = near - x
    scale, factor = fitted(offsets, u)
    z = rng.uniform(-half_width, half_width, (candidates, D)).astype(np.float32)
    inverse = cho_solve(factor, np.eye(len(u), dtype=np.float32))
    c = slope(distances(z, offsets), scale)
    cross, gram = z @ offsets.T, offsets @ offsets.T
    explained = (c * (c @ (inverse * gram) - 2 * cross * (c @ inverse))).sum(1) + (z**2).sum(1) * (
        c * (c @ inverse)
    ).sum(1)
    return x + z[np.argsort(explained)[:count]], scale


def plain_round(state, clients, w, b):
    """The next global model, from the state after the first round."""
    rng = np.random.default_rng(0)
    rows = jax.tree.map(np.asarray, state.memories.rows)
    x = np.asarray(state.params)
    histories, weights = [], []

    def ask(i, points):
        u = 20 * np.clip(points, 0, 1) - 10
        values = 0.1 / D * (u**2 @ clients["c"][i] + u @ clients["e"][i] + 1)
        histories[i][0].extend(points)
        histories[i][1].extend(values)

    for i in range(len(clients["c"])):
        count = rows.history.asked[i]
        histories.append(([*rows.history.points[i, :count]], [*rows.history.values[i, :count]]))
        ask(i, x[None])
        half_width = max(np.abs(x - rows.last[i]).mean() / 2, RADIUS)
        ask(i, most_uncertain(rng, histories[i], x, half_width, 200, 50)[0])
        near, u, value_range = nearest(histories[i], x, FEATURE_NEIGHBORS)
        phi = np.float32(np.sqrt(2 / FEATURES)) * np.cos(near @ w + b)
        gram = phi @ phi.T + np.float32(RIDGE + 32 * np.finfo(np.float32).eps) * np.eye(len(u), dtype=np.float32)
        weights.append(value_range * (cho_solve(cho_factor(gram), u) @ phi))
    mean = np.mean(weights, axis=0)
    after = []
    for i, nu in enumerate(weights):
        y, first, second = x, np.zeros(D, np.float32), np.zeros(D, np.float32)
        for t in range(STEPS):
            points, scale = most_uncertain(rng, histories[i], y, RADIUS, 100, 5)
            ask(i, points)
            near, u, value_range = nearest(histories[i], y, NEIGHBORS)
            offsets = near - y
            r = distances(offsets, offsets)
            np.fill_diagonal(r, 0)
            noise = np.float32(NOISE + 32 * np.finfo(np.float32).eps) * np.eye(len(u), dtype=np.float32)
            coefficients = cho_solve(cho_factor(kernel(r, scale) + noise), u)
            g = value_range * ((slope(np.linalg.norm(offsets, axis=1), scale) * coefficients) @ offsets)
            g = g - np.float32(np.sqrt(2 / FEATURES)) * (w @ (np.sin(y @ w + b) * (mean - nu))) / (t + 1)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            y = y - LR * (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
            ask(i, y[None])
        after.append(y)
    return np.mean(after, axis=0), sum(len(h[1]) for h in histories) - int(rows.history.asked.sum())


def alone(num_clients):
    """Times of a round of that many clients."""
    round_fn, state, cohort, seconds = compiled(num_clients)
    times = _measure.take_turns({"round": lambda: round_fn(state, cohort, jax.random.key(1))}, 3)
    return _measure.summary(times["round"]) | {"first_call_s": seconds}


def main() -> None:
    """Measures both and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=100)
    args = parser.parse_args()
    result = {"machine": _measure.machine(), "rows": {f"compiled, {args.many} clients": alone(args.many)}}

    clients = coefficients(CLIENTS)
    round_fn, state, cohort, seconds = compiled(CLIENTS)
    features = surrogate.random_features(0, FEATURES, 1.0, state.params)
    w, b = np.asarray(features.frequencies), np.asarray(features.phases)
    # Both do the same work, and it is worth as much.
    after, metrics = round_fn(state, cohort, jax.random.key(1))
    plain, queries = plain_round(state, clients, w, b)

    def value(x):
        return float(jnp.mean(loss_fn(jnp.asarray(x), cohort.examples, None)))

    assert int(metrics.extra.queries) == queries
    result["value"] = {"before": value(state.params), "compiled": value(after.params), "plain": value(plain)}
    result["queries"] = queries
    result["plain_over_compiled"] = {}
    for threads, limit in (("one BLAS thread", 1), ("a BLAS thread a core", os.cpu_count())):
        contenders = {
            f"compiled, {threads}": lambda: round_fn(state, cohort, jax.random.key(1)),
            f"plain, {threads}": lambda: plain_round(state, clients, w, b),
        }
        with threadpool_limits(limit, user_api="blas"):
            times = _measure.take_turns(contenders, args.repeats)
        result["rows"] |= {name: _measure.summary(t) for name, t in times.items()}
        own, plain_s = (float(np.median(t)) for t in times.values())
        result["plain_over_compiled"][threads] = plain_s / own
        print(f"{threads}: plain / compiled {plain_s / own:.2f}, F {result['value']}", flush=True)
    result["first_call_s"] = seconds

    for name, row in result["rows"].items():
        print(f"{name:36s} {row['median_s']:8.2f} s a round", flush=True)
    print(_measure.save("zeroth_order", result))


if __name__ == "__main__":
    main()
