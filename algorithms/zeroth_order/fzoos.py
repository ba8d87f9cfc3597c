"""FZooS."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.zeroth_order.estimators import flatten, query, settle, uniform_box
from algorithms.zeroth_order.surrogate import (
    KERNELS,
    History,
    Neighbors,
    condition,
    empty_history,
    features_gradient,
    fit_lengthscale,
    fit_weights,
    gradient_mean,
    gradient_variance,
    nearest,
    push,
    random_features,
)


class FZooSQueries(NamedTuple):
    """Where FZooS evaluates its function, and how many evaluations it remembers.

    The default capacity fits a model with thousands of parameters; the paper's is 1,000, for some hundred
    variables.

    Attributes:
      capacity: queries that a client remembers, N capacity P numbers in all; the newest replaces the oldest.
      initial: random queries at a client's first time.
      active: queries around y before each local step.
      active_candidates: points that they are chosen from, uniform within `radius` of y in every coordinate.
      survey: queries around x.
      survey_candidates: points that they are chosen from.
      radius: half-width of the boxes, in the units of the parameters; of the survey's, the least half-width.
    """

    capacity: int = 100
    initial: int = 10
    active: int = 5
    active_candidates: int = 100
    survey: int = 50
    survey_candidates: int = 200
    radius: fc.Scalar = 0.01


class FZooSSurrogate(NamedTuple):
    """The surrogates of FZooS: a client's Gaussian process, and the random features that all clients share.

    The defaults fit a model with thousands of parameters and steps of a tenth. The paper's are larger, for some hundred
    variables and steps of a hundredth.

    Attributes:
      neighbors: nearest queries that the Gaussian process is conditioned on, at most; the paper has 150.
      kernel: "matern" (5/2) or "rbf".
      noise: variance of a query, in units of the squared range of the neighbors' values. Raise it when f_i is noisy,
        as it is with batches smaller than a client's examples.
      shortest: least lengthscale that is considered, in root mean square distances of the neighbors.
      longest: largest one. In between the marginal likelihood chooses, anew in every step.
      num_features: M; the paper has 10,000.
      feature_neighbors: nearest queries that nu_i is fitted to; the paper has 500.
      feature_lengthscale: of the kernel that the features stand for, in the units of the parameters. It must be longer
        than the distance that a client covers in a round, or the corrections are noise. The paper has 1.
      feature_seed: seed of the features.
      ridge: variance of a query in that fit.
    """

    neighbors: int = 50
    kernel: str = "matern"
    noise: fc.Scalar = 1e-6
    shortest: fc.Scalar = 0.1
    longest: fc.Scalar = 100.0
    num_features: int = 1000
    feature_neighbors: int = 50
    feature_lengthscale: fc.Scalar = 10.0
    feature_seed: int = 0
    ridge: fc.Scalar = 1e-5


class Memory(NamedTuple):
    """What a client remembers: its queries, and the local model float[d] of its last round."""

    history: History
    last: fc.Array


class FZooSState(NamedTuple):
    """Global model x, the clients' memories, and the number of rounds done."""

    params: fc.Params
    memories: fc.ClientTable
    round: fc.Counter = 0


class Accuracy(NamedTuple):
    """Surrogate gradients against true ones, float[] each, mean over local steps and participants.

    Attributes:
      cosine: of the client's surrogate gradient and grad f_i.
      error: norm of their difference, relative to that of grad f_i.
    """

    cosine: fc.Array
    error: fc.Array


class FZooSMetrics(NamedTuple):
    """Queries of all participants in this round, float[]; mean of f_i(x) at its start; accuracy, or () unless asked.

    The means are NaN in a round without participants.
    """

    queries: fc.Array
    value: fc.Array
    accuracy: Accuracy | tuple[()]


def fzoos(
    loss_fn: fc.LossValuesFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    queries: FZooSQueries = FZooSQueries(),  # noqa: B008 (immutable)
    surrogate: FZooSSurrogate = FZooSSurrogate(),  # noqa: B008 (immutable)
    correction_decay: fc.Scalar = 1.0,
    safeguard: bool = False,
    diagnose: bool = False,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FZooS: clients descend along gradients of surrogates of their own queries, corrected by a shared surrogate.

    Survey, at x:        query x; of `survey_candidates` points in the box of half-width mean |x - y_i| / 2 around it
                         query the `survey` with the largest variance of the gradient; fit nu_i to the queries near x;
                         nu = sum_S w_i nu_i. (A client's first time: query x and `initial` random points, no nu_i.)
    Client, from y = x:  query the `active` of `active_candidates` points around y with the largest variance;
                         g = mean of the gradient at y of a Gaussian process given the queries near y;
                         g <- g + (t + 1)^-a (S(y; nu) - S(y; nu_i));  y <- y - lr g;  query y;  T times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    S(y; nu) is the gradient of phi(y)'nu, with M random Fourier features phi that everyone draws from one seed.

    Down: x, nu (P + M). Up: y_i - x, nu_i, f_i(x) (P + M + 1). At a client's first time x down (P), y_i - x, f_i(x) up
    (P + 1). With the safeguard one more P down and one scalar up.
    Queries per participant: 1 + survey + T (active + 1), at its first time 1 + initial + T (active + 1); one more with
    the safeguard.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; f_i is its mean over the batch. It need not have a gradient,
        nor be JAX (`algorithms.zeroth_order.estimators.host_loss`). For a function that is no mean over examples give
        each client one example, which holds whatever the function needs.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      queries: where the function is evaluated, and how many evaluations a client remembers; see `FZooSQueries`.
      surrogate: how its gradient is estimated from them; see `FZooSSurrogate`.
      correction_decay: a. With 1 the correction fades within a round, and clients that differ very much drift apart as
        without one; with 0 it stays, which asks for features that hold on all of the way (a longer lengthscale).
      safeguard: keep the old x unless F = sum_S w_i f_i is smaller at the new one, which costs one query each.
      diagnose: compare with the true gradients, which loss_fn must then have; nothing else changes.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps (T), order, weights, plan; see `LocalOptions`. A batch size of at
        least the largest client's number of examples makes f_i exact.

    Differences: in the released code the survey ends the round, and the next round queries x again; here it begins the
    next round, at the same point, so that it is made by the clients that take part. A survey's box is never narrower
    than an active query's, or alike clients, whose y_i equal x, would query x alone. Active queries come before every
    step, in the code after every step but the last. The code takes gradients by differences of step 1e-20 (which SciPy
    replaces), scores candidates by the first coordinate's variance under another kernel, and adds x to stored points
    where it means to append it; here the formulas of the paper hold. The weight 1 / (t + 1) is the
    code's; the paper's theory has another, of unknown constants. The code always has the safeguard; the paper's
    algorithm has none. The features' fit has a ridge, as in the paper.

    Paper: Shu, Lin, Dai, Low, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
    2023, algorithm 2.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    for name, options, kind in (("queries", queries, FZooSQueries), ("surrogate", surrogate, FZooSSurrogate)):
        if not isinstance(options, kind):
            raise TypeError(
                f"{name} must be {kind.__name__}(...), got {options!r:.200}: its fields are {', '.join(kind._fields)}"
            )
    check_queries(queries)
    check_surrogate(surrogate)
    capacity, initial, active, active_candidates, survey, survey_candidates, radius = queries
    kernel, noise, ridge = surrogate.kernel, surrogate.noise, surrogate.ridge
    fc.checks.scalar("correction_decay", correction_decay, low=0)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    once = clients.one_step()
    gradient = fc.value_and_grad(loss_fn)

    def closest(history: History, x: fc.Array) -> Neighbors:
        return nearest(history, x, count=min(surrogate.neighbors, capacity))

    def most_uncertain(
        key: fc.Key, history: History, x: fc.Array, half_width: fc.Scalar, candidates: int, count: int
    ) -> tuple[fc.Array, fc.Array]:
        """Points float[count, d] around x at which the gradient is least known, and the lengthscale that says so."""
        near = closest(history, x)
        lengthscale = fit_lengthscale(
            near, kernel=kernel, noise=noise, shortest=surrogate.shortest, longest=surrogate.longest
        )
        z = uniform_box(key, jnp.zeros_like(x), half_width, candidates)
        variance = gradient_variance(condition(near, lengthscale, kernel=kernel, noise=noise), z, kernel=kernel)
        return x + z[jax.lax.top_k(variance, count)[1]], lengthscale

    def init(params: fc.Params) -> FZooSState:
        x, _ = flatten(params)
        memories = fc.client_table(num_clients, Memory(empty_history(capacity, x), x))
        return FZooSState(params, memories)

    def update(state: FZooSState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        x, unravel = flatten(state.params)
        features = random_features(surrogate.feature_seed, surrogate.num_features, surrogate.feature_lengthscale, x)
        survey_key, local_key, safeguard_key = jax.random.split(key, 3)

        def ask(history: History, points: fc.Array, batch: fc.Batch) -> tuple[History, fc.Array]:
            points = settle(points, state.params)
            values = query(loss_fn, points, unravel, batch)
            return push(history, points, values), values

        # At x: a program of one step, and its carry (history, nu_i, f_i(x)).
        def survey_init(x: fc.Array, memory: Memory, key: fc.Key):
            return memory, jnp.zeros(surrogate.num_features, x.dtype), jnp.zeros((), x.dtype)

        def survey_step(x: fc.Array, carry: fc.PyTree, batch: fc.Batch):
            (history, last), _, _ = carry
            box_key, loss_key = jax.random.split(batch.key)
            batch = batch._replace(key=loss_key)
            history, value = ask(history, x[None], batch)
            half_width = jnp.maximum(jnp.mean(jnp.abs(x - last)) / 2, jnp.asarray(radius, x.dtype))
            points, _ = most_uncertain(box_key, history, x, half_width, survey_candidates, survey)
            history, _ = ask(history, points, batch)
            near = nearest(history, x, count=min(surrogate.feature_neighbors, capacity))
            return (Memory(history, last), fit_weights(features, near, x, ridge=ridge), value[0]), value[0]

        def first_step(x: fc.Array, carry: fc.PyTree, batch: fc.Batch):
            (history, last), nu_i, _ = carry
            box_key, loss_key = jax.random.split(batch.key)
            points = jnp.concatenate([x[None], uniform_box(box_key, x, radius, initial)])
            history, values = ask(history, points, batch._replace(key=loss_key))
            return (Memory(history, last), nu_i, values[0]), values[0]

        def survey_final(x: fc.Array, carry: fc.PyTree):
            _, nu_i, value = carry
            return (nu_i, value), carry

        def first_final(x: fc.Array, carry: fc.PyTree):
            _, _, value = carry
            return value, carry

        # From x: T steps with the carry (y, optimizer, history, nu - nu_i, f_i(y), accuracy).
        def client_init(shared: fc.PyTree, client_input: fc.PyTree, key: fc.Key):
            x, nu = shared
            (history, _), nu_i, value, corrected = client_input
            y, zero = unravel(x), jnp.zeros((), x.dtype)
            difference = jnp.where(corrected, nu - nu_i, 0)
            return y, optimizer.init(y), history, difference, value, Accuracy(zero, zero)

        def client_step(shared: fc.PyTree, carry: fc.PyTree, batch: fc.Batch):
            params, opt_state, history, difference, value, accuracy = carry
            y, _ = flatten(params)
            box_key, loss_key = jax.random.split(batch.key)
            batch = batch._replace(key=loss_key)
            points, lengthscale = most_uncertain(box_key, history, y, radius, active_candidates, active)
            history, _ = ask(history, points, batch)
            process = condition(closest(history, y), lengthscale, kernel=kernel, noise=noise)
            of_queries = gradient_mean(process, kernel=kernel)
            # S is linear in nu, so one pass over the features gives S(y; nu) - S(y; nu_i).
            weight = (batch.step + 1).astype(y.dtype) ** -jnp.asarray(correction_decay, y.dtype)
            g = of_queries + weight * features_gradient(features, difference, y)
            if diagnose:
                true, _ = flatten(gradient(params, batch)[1])
                accuracy = jax.tree.map(jnp.add, accuracy, compare(of_queries, true))
            params, opt_state = fc.optimizer_step(optimizer, params, opt_state, unravel(g))
            history, values = ask(history, flatten(params)[0][None], batch)
            return (params, opt_state, history, difference, values[0], accuracy), value

        def client_final(shared: fc.PyTree, carry: fc.PyTree):
            params, _, history, _, _, accuracy = carry
            y, _ = flatten(params)
            return y - shared[0], (Memory(history, y), accuracy)

        def value_step(x: fc.Array, carry: fc.PyTree, batch: fc.Batch):
            value = query(loss_fn, x[None], unravel, batch)[0]
            return value, value

        memories = fc.gather(state.memories, cohort)
        new = cohort.mask & (memories.history.asked == 0)
        surveyed, looked = (
            once.run(
                fc.ClientProgram(survey_init, step, final), x, cohort.only(chosen), survey_key, client_inputs=memories
            )
            for step, final, chosen in (
                (survey_step, survey_final, cohort.mask & ~new),
                (first_step, first_final, new),
            )
        )
        memories, nu_i, values = jax.tree.map(
            lambda first, later: jnp.where(fc.sums.across(new, first), first, later),
            looked.outputs,
            surveyed.outputs,
        )
        nu, value_of_old = surveyed.aggregate
        program = fc.ClientProgram(client_init, client_step, client_final)
        # All have x from the pass before; a newcomer has no use for nu.
        shared = fc.Message(x, 0), fc.Message(nu, jnp.where(new, 0, fc.num_bytes(nu)))
        results = clients.run(program, shared, cohort, local_key, client_inputs=(memories, nu_i, values, ~new))
        memories, accuracy = results.outputs
        x_new = fc.add_scaled(x, server_lr, results.aggregate)

        weights = results.weights.astype(x.dtype)
        share = weights / jnp.where(jnp.sum(weights) > 0, jnp.sum(weights), 1)
        of_new = jnp.sum(share * new)
        at_x = of_new * looked.aggregate + (1 - of_new) * value_of_old
        passes = [surveyed, looked]
        # Counted in floats: many clients with many steps ask more than int32 can count.
        asked = fc.sums.total(new) * (1 + initial) + fc.sums.total(cohort.mask & ~new) * (1 + survey)
        asked += fc.sums.total(results.steps) * (active + 1)
        if safeguard:
            last = fc.ClientProgram(lambda x, i, key: jnp.zeros((), x.dtype), value_step, lambda x, f: (f, ()))
            check = once.run(last, x_new, cohort, safeguard_key)
            x_new = jnp.where(check.aggregate < at_x, x_new, x)
            passes.append(check)
            asked += fc.sums.total(check.steps)

        def measured(mean: fc.Array) -> fc.Array:
            return jnp.where(cohort.num_participants > 0, mean, jnp.nan)

        params = unravel(x_new)
        if diagnose:
            steps = jnp.maximum(results.steps, 1).astype(x.dtype)
            accuracy = jax.tree.map(lambda total: measured(jnp.sum(share * total / steps)), accuracy)
        state = FZooSState(params, fc.scatter(state.memories, cohort, memories))
        extra = FZooSMetrics(asked, measured(at_x), accuracy if diagnose else ())
        return state, fc.merge_phases(results, bytes_of=passes), extra

    return fc.federated(init, update)


def check_queries(queries: FZooSQueries) -> None:
    """Raises ValueError for counts that do not fit together."""
    capacity, initial, active, active_candidates, survey, survey_candidates, radius = queries
    for name, value in {"initial": initial, "active": active, "survey": survey}.items():
        fc.checks.positive_int(name, value, "surrogates are made of queries and features")
    for name, kept, candidates in (("active", active, active_candidates), ("survey", survey, survey_candidates)):
        fc.checks.positive_int(f"{name}_candidates", candidates, f"choose the {kept} queries from at least as many")
        if candidates < kept:
            raise ValueError(
                f"{name}_candidates={candidates} is less than {name}={kept}: choose from at least as many points"
            )
    fc.checks.positive_int("capacity", capacity, "room for the queries of a survey")
    if capacity <= max(initial, survey, active):
        raise ValueError(
            f"capacity={capacity} has no room for a survey of x and {max(initial, survey, active)} points: raise it to "
            "the queries of several rounds"
        )
    fc.checks.scalar("radius", radius, low=0, low_open=True)


def check_surrogate(surrogate: FZooSSurrogate) -> None:
    """Raises ValueError for an option outside of its range."""
    for name in ("neighbors", "num_features", "feature_neighbors"):
        fc.checks.positive_int(name, getattr(surrogate, name), "surrogates are made of queries and features")
    fc.checks.one_of("kernel", surrogate.kernel, tuple(KERNELS))
    for name in ("shortest", "feature_lengthscale"):
        fc.checks.scalar(name, getattr(surrogate, name), low=0, low_open=True)
    least_longest: Any = surrogate.shortest if fc.checks.is_concrete(surrogate.shortest) else 0
    fc.checks.scalar("longest", surrogate.longest, low=least_longest, low_open=True)
    for name in ("noise", "ridge"):
        fc.checks.scalar(name, getattr(surrogate, name), low=0)


def compare(surrogate: fc.Array, true: fc.Array) -> Accuracy:
    """Cosine and relative error of a surrogate gradient, float[d] both."""
    norm = jnp.linalg.norm(true)
    norm = jnp.where(norm > 0, norm, 1)
    other = jnp.linalg.norm(surrogate)
    cosine = surrogate @ true / (norm * jnp.where(other > 0, other, 1))
    return Accuracy(cosine, jnp.linalg.norm(surrogate - true) / norm)
