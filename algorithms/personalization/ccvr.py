"""CCVR."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.averaging.fedavg import fedavg
from algorithms.parts import classifiers
from algorithms.parts.architectures import head_of, put
from fedjax_core.batching import draw_batch


class Moments(NamedTuple):
    """Of each of C classes the number of examples int32[C], the mean float[C, d] and the covariance float[C, d, d].

    Covariances are unbiased, and zero for a class of one example or none.
    """

    counts: fc.Array
    means: fc.Array
    covariances: fc.Array


def ccvr(
    task: fc.TaskWithHead,
    client_optimizer: fc.ClientOptimizer,
    *,
    labels: classifiers.Labels = lambda examples: examples["y"],
    virtual_features: int = 200,
    head_epochs: int = 10,
    head_batch_size: int = 64,
    head_lr: fc.Scalar = 0.1,
    jitter: fc.Scalar = 1e-6,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """CCVR: FedAvg, and then the server trains the head anew on features that it draws of all clients' classes.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).
    After the last round client i sends of each class c that it holds the number N_ic of its examples, and mean mu_ic
             and unbiased covariance S_ic of their features under x; and the server
             N = sum_i N_ic;  mu = sum_i N_ic mu_ic / N;
             S = (sum_i (N_ic - 1) S_ic + sum_i N_ic mu_ic mu_ic' - N mu mu') / (N - 1);
             draws virtual_features z of N(mu, S) for each class, and trains the head on their cross-entropy.

    Down: x (1P). Up: y_i - x (1P). After the last round, once: down x, up d + d (d + 1) / 2 + 1 numbers for each class
    that a client holds.

    Args:
      task: a `Task` with features [B, d] and a head that is one dense layer; its loss is that of the rounds.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      labels: `labels(examples) -> int[B]`, the class of each example.
      virtual_features: M, drawn of each class that anybody holds.
      head_epochs: epochs of the server on them.
      head_batch_size: of its steps of plain gradient descent.
      head_lr: of these.
      jitter: added to the diagonal of S, in units of its mean, so that it has a root.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    S is exactly the covariance of all clients' features of a class together, up to rounding, which in float32 hides
    deviations below some 1e-3 of the means. The event "calibrate" is what is done
    after the last round; the body stays as it is.

    Differences: a re-implementation by others takes biased covariances, of which S is none.

    Paper: Luo, Chen, Hu, Zhang, Liang, Feng, "No Fear of Heterogeneity: Classifier Calibration for Federated Learning
    with Non-IID Data", 2021, algorithm 1.
    """
    classifiers.check(task, labels)
    fc.checks.positive_int("virtual_features", virtual_features, "features of each class that the server draws")
    fc.checks.positive_int("head_batch_size", head_batch_size, "features of a step of the server")
    head_epochs = fc.checks.count("head_epochs", head_epochs, "0 is FedAvg")
    fc.checks.scalar("head_lr", head_lr, low=0)
    fc.checks.scalar("jitter", jitter, low=0)
    clients = fc.local_training(**local)
    method = fedavg(task, client_optimizer, server_lr=server_lr, **local)

    def init(params: fc.Params) -> fc.ModelState:
        classifiers.dense(task, params)
        return method.init(params)

    def calibrate(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key) -> fc.ModelState:
        of_pass, of_draws, of_batches = fc.keys.split(key, 3)
        head = classifiers.dense(task, state.params)
        program = moments_program(task, labels, *head.kernel.shape)
        every = clients._replace(weights="uniform").full_pass()
        sent = every.run(program, state.params, cohort, of_pass, aggregator=fc.mapped(summands, fc.weighted_sum()))
        found = union(sent.aggregate)
        z = drawn(of_draws, found, virtual_features, jitter).astype(head.kernel.dtype)
        params = put(trained(state.params, z, found.counts > 0, of_batches), state.params)
        return state._replace(params=optax.tree.where(jnp.any(found.counts > 0), params, state.params))

    def trained(params: fc.Params, z: fc.Array, there: fc.Array, key: fc.Key) -> fc.Params:
        """The head after its epochs on features z float[C, M, d] of the classes that are there."""
        size = z.shape[0] * z.shape[1]
        examples = z.reshape(size, -1), jnp.repeat(jnp.arange(z.shape[0]), z.shape[1])
        work = fc.local_work(min(head_batch_size, size), num_epochs=max(head_epochs, 1))
        seed_key, step_key = fc.keys.split(key)
        seed = fc.shuffle.seed(seed_key)

        def loss(head: fc.Params, examples: Any, key: fc.Key) -> fc.Array:
            z, c = examples
            return classifiers.cross_entropy(classifiers.of_head(task, put(head, params), z), c)

        def step(number: fc.Array, head: fc.Params) -> fc.Params:
            number = jnp.asarray(number, jnp.int32)
            batch = draw_batch(work, examples, jnp.int32(0), jnp.int32(size), seed, step_key, number)
            batch = batch._replace(mask=batch.mask & there[batch.examples[1]])
            return fc.add_scaled(head, -head_lr, jax.grad(lambda head: fc.batch_loss(loss, head, batch))(head))

        steps = jnp.int32(head_epochs * -(-size // work.batch_size))
        head: fc.Params = jax.lax.fori_loop(jnp.int32(0), steps, step, head_of(task, params, None))
        return head

    return method._replace(init=init, events={"calibrate": fc.Event(calibrate, "after")})


def moments_program(task: fc.Task, labels: classifiers.Labels, dim: int, num_classes: int) -> fc.ClientProgram:
    """A client that sends the `Moments` of its features by class, found in one pass without cancellation."""

    def init(model: fc.Params, own: Any, key: fc.Key) -> tuple[fc.Params, Moments]:
        dtype = fc.sums.accumulator(classifiers.dense(task, model).kernel.dtype)
        scatter = jnp.zeros((num_classes, dim, dim), dtype)
        return model, Moments(jnp.zeros(num_classes, jnp.int32), scatter[:, 0], scatter)

    def step(shared: Any, carry: tuple[fc.Params, Moments], batch: fc.Batch):
        model, so_far = carry
        z, _ = classifiers.features_and_outputs(task, model, batch.examples, None, batch.mask)
        z = jnp.where(batch.mask[:, None], z, 0).astype(so_far.means.dtype)
        c = classifiers.classes_of(labels, batch.examples)
        of_class = (c[:, None] == jnp.arange(num_classes)) & batch.mask[:, None]
        return (model, merged(so_far, z, of_class)), jnp.zeros((), jnp.result_type(float))

    def final(shared: Any, carry: tuple[fc.Params, Moments]):
        counts, means, scatter = carry[1]
        over = jnp.maximum(counts - 1, 1)[:, None, None].astype(scatter.dtype)
        numbers = dim + dim * (dim + 1) // 2 + 1
        size = jnp.sum(counts > 0) * (numbers * means.dtype.itemsize)
        return fc.Message(Moments(counts, means, scatter / over), size), ()

    return fc.ClientProgram(init, step, final)


def merged(so_far: Moments, z: fc.Array, of_class: fc.Array) -> Moments:
    """Counts, means and sums of squares around them (in the place of covariances) with features [B, d] more.

    Args:
      so_far: of the features before.
      z: float[B, d].
      of_class: bool[B, C].
    """
    counts, means, scatter = so_far
    member = of_class.T.astype(z.dtype)
    more = jnp.sum(of_class, axis=0, dtype=jnp.int32)
    before, added = counts.astype(z.dtype), more.astype(z.dtype)
    share = added / jnp.maximum(counts + more, 1).astype(z.dtype)
    own_means = jnp.matmul(member, z, precision="highest") / jnp.maximum(more, 1)[:, None].astype(z.dtype)
    away = jnp.where(of_class.T[:, :, None], z - own_means[:, None], 0)  # [C, B, d]
    within = jnp.einsum("cbi,cbj->cij", away, away, precision="highest")
    shift = own_means - means
    between = (before * share)[:, None, None] * (shift[:, :, None] * shift[:, None, :])
    return Moments(counts + more, means + share[:, None] * shift, scatter + within + between)


def summands(sent: Moments) -> tuple[fc.Array, fc.Array, fc.Array]:
    """What a client adds to the moments of all: N, N mu, and (N - 1) S + N mu mu'."""
    counts, means, covariances = sent
    n = counts.astype(means.dtype)[:, None]
    within = jnp.maximum(n - 1, 0)[:, :, None] * covariances
    return counts, n * means, within + n[:, :, None] * (means[:, :, None] * means[:, None, :])


def union(total: tuple[fc.Array, fc.Array, fc.Array]) -> Moments:
    """The moments of all clients' features together, from the sum of their `summands`."""
    counts, sums, squares = total
    n = counts.astype(sums.dtype)[:, None]
    means = sums / jnp.maximum(n, 1)
    around = squares - n[:, :, None] * (means[:, :, None] * means[:, None, :])
    return Moments(counts, means, jnp.where(n[:, :, None] > 1, around / jnp.maximum(n - 1, 1)[:, :, None], 0))


def drawn(key: fc.Key, of: Moments, count: int, jitter: fc.Scalar) -> fc.Array:
    """Features float[C, count, d] of a normal distribution with these moments for each class."""
    dim = of.means.shape[1]
    spread = jnp.trace(of.covariances, axis1=1, axis2=2)[:, None, None] / dim
    spread = jnp.where(spread > 0, spread, 1)
    roots = jax.vmap(fc.linalg.cholesky)(of.covariances / spread + jitter * jnp.eye(dim, dtype=of.means.dtype))
    # Rounding may have left it no root; then the features are drawn of its diagonal.
    diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(of.covariances / spread, axis1=1, axis2=2), 0))
    fine = jnp.all(jnp.isfinite(roots), axis=(1, 2), keepdims=True)
    roots = jnp.where(fine, roots, diagonal[:, :, None] * jnp.eye(dim, dtype=of.means.dtype))
    noise = jax.random.normal(key, (len(of.means), count, dim), of.means.dtype)
    return of.means[:, None] + jnp.sqrt(spread) * jnp.einsum("cij,cnj->cni", roots, noise, precision="highest")
