"""FedDF: ensemble distillation on the server."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts.server_training import Student, Teachers, in_batches, reading, size_of, until_no_better
from fedjax_core.batching import draw_batch


class FedDFData(NamedTuple):
    """Public data of `feddf` with a part by which the server decides when to stop.

    Attributes:
      unlabelled: examples as `logits` takes them, leaves [M, ...].
      validation: labelled examples as `loss_fn` takes them, leaves [V, ...].
    """

    unlabelled: fc.Examples
    validation: fc.Examples


class FedDFMetrics(NamedTuple):
    """What the server has done.

    Attributes:
      server_loss: float[], mean divergence of the student from its teachers over the steps of the server.
      server_steps: int32[], how many there were.
    """

    server_loss: fc.Array
    server_steps: fc.Array


def feddf(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    logits: fc.LogitsFn,
    server_optimizer: optax.GradientTransformation | None = None,
    server_lr: fc.Scalar = 1e-3,
    server_steps: int = 10_000,
    server_batch_size: int = 128,
    temperature: fc.Scalar = 1.0,
    ensemble: str = "logits",
    patience: int = 1_000,
    check_every: int = 100,
    unlabelled: fc.PublicFn = lambda public: public,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedDF: the server trains the average of the clients' models to predict as all of them together.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- sum_S w_i y_i;  then, for batches of public examples u:
                         t = softmax(mean_S z(y_i, u) / T);  x <- Adam(x, grad_x KL(t || softmax(z(x, u) / T))).

    z are the logits and T the temperature. The clients' models y_i count alike as teachers, whatever the weights of the
    average. Public data is unlabelled: `population.with_public(examples)` with examples as `logits` takes them, leaves
    [M, ...]. With `FedDFData(unlabelled, validation)` the server keeps the model of the smallest validation loss,
    looked at before the first step and after every `check_every`, and stops when `patience` steps have found no
    smaller one.

    Down: x (1P). Up: y_i - x (1P). The server holds the uploads of all participants, and a teacher at a time.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; in validation the key is None, so that nothing is dropped.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      logits: `logits(params, batch, key) -> float[B, C]`, the scores of the C classes for each example. The key is None
        for teachers. With a model of `models` it is `lambda params, batch, key: model.apply(params, batch["x"], key)`.
      server_optimizer: optax optimizer, started anew in every round; Adam unless given.
      server_lr: of Adam, whose rate falls from there to 0 along a cosine.
      server_steps: most steps of the server in a round; 0 is FedAvg.
      server_batch_size: public examples of a step; each pass over them is shuffled.
      temperature: T.
      ensemble: "logits" for t as above; "probabilities" for t = mean_S softmax(z(y_i, u) / T), which has the gradient
        of the mean of the divergences from each teacher.
      patience: steps without a smaller validation loss after which the server stops.
      check_every: steps between looks at the validation loss.
      unlabelled: `unlabelled(public)`, these examples, or `FedDFData`, where the population's public data has more.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: released code decides by validation accuracy; a loss is what the method is given here. All clients have
    one architecture, the paper's homogeneous case.

    Paper: Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", 2020,
    algorithm 1.
    """
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.scalar("temperature", temperature, low=0, low_open=True)
    fc.checks.one_of("ensemble", ensemble, ("logits", "probabilities"))
    fc.checks.positive_int("server_batch_size", server_batch_size, "128 is the paper's")
    fc.checks.positive_int("patience", patience, "1000 is the paper's")
    fc.checks.positive_int("check_every", check_every, "100 is usual")
    server_steps = fc.checks.count("server_steps", server_steps, "0 is FedAvg")
    server = server_optimizer
    if server is None:
        server = optax.adam(optax.cosine_decay_schedule(server_lr, max(server_steps, 1)))
    fc.checks.optimizer("server_optimizer", server)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def softened(params: fc.Params, batch: fc.Examples, key: Any, mask: fc.Array) -> fc.Array:
        with reading("logits", batch):
            z = fc.masks.call(logits, params, batch, key, mask=mask, name="logits")
        if jnp.ndim(z) != 2 or z.shape[0] != mask.shape[0]:
            raise ValueError(
                f"logits must return one row of class scores per example, float[{mask.shape[0]}, C], but returned "
                f"shape {list(jnp.shape(z))}: do not average over the batch, and take one position of a sequence"
            )
        return z / jnp.asarray(temperature, z.dtype)

    def taught(student: fc.Params, teachers: Teachers, public: Any, key: fc.Key) -> tuple[fc.Params, FedDFMetrics]:
        found = unlabelled(public) if jax.tree.leaves(public) else public
        inputs, validation = found if isinstance(found, FedDFData) else (found, None)
        size = size_of(inputs)
        if validation is not None:
            size_of(validation, "validation")
        work = fc.local_work(min(server_batch_size, size), num_steps=max(server_steps, 1))

        def target(batch: fc.Examples, mask: fc.Array) -> fc.Array:
            def one(number: fc.Array) -> fc.Array:
                z = softened(teachers.model(number), batch, None, mask)
                return z if ensemble == "logits" else jax.nn.softmax(z)

            mean = teachers.mean(jax.lax.map(one, jnp.arange(teachers.taking.shape[0])))
            return jax.nn.softmax(mean) if ensemble == "logits" else mean

        # Where every example is seen more than once, teachers are asked once.
        known = server_steps * work.batch_size > size
        examples = inputs, in_batches(target, inputs, size, work.batch_size) if known else ()

        def step(number: fc.Array, now: Student) -> Student:
            number = jnp.asarray(number, jnp.int32)
            batch = draw_batch(work, examples, jnp.int32(0), jnp.int32(size), seed, step_key, number)
            seen, targets = batch.examples
            targets = targets if known else target(seen, batch.mask)

            def divergence(params: fc.Params, examples: Any, key: fc.Key) -> fc.Array:
                return optax.losses.kl_divergence(
                    jax.nn.log_softmax(softened(params, seen, key, batch.mask)), jax.lax.stop_gradient(targets)
                )

            loss, g = jax.value_and_grad(lambda params: fc.batch_loss(divergence, params, batch))(now.params)
            params, opt_state = fc.optimizer_step(server, now.params, now.opt_state, g)
            return Student(params, opt_state, fc.sums.add(now.total, loss))

        seed_key, step_key = fc.keys.split(key)
        seed = fc.shuffle.seed(seed_key)
        begun = Student(student, server.init(student), fc.sums.start((), fc.sums.accumulator(jnp.result_type(float))))
        if validation is None:
            steps = jnp.int32(server_steps)
            done = jax.lax.fori_loop(jnp.int32(0), steps, step, begun)
            student = done.params
        else:

            def value(params: fc.Params, batch: fc.Examples) -> fc.Array:
                with reading("loss_fn", batch):
                    return fc.masks.call(loss_fn, params, batch, None, name="loss_fn")

            def score(params: fc.Params) -> fc.Array:
                return fc.evaluate(value, params, validation, public=public)

            student, done, steps = until_no_better(step, begun, score, server_steps, patience, check_every)
        loss = fc.sums.value(done.total) / jnp.maximum(steps, 1)
        return student, FedDFMetrics(loss.astype(jnp.result_type(float)), steps)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key, aggregator=fc.stacked())
        mean = fc.sums.weighted(fc.sums.shares(results.weights), results.aggregate)
        average = fc.add_scaled(state.params, 1.0, mean)
        teachers = Teachers(state.params, results.aggregate, cohort.mask)
        x, metrics = taught(average, teachers, cohort.public, jax.random.fold_in(key, _SERVER))
        return state._replace(params=x), results, metrics

    return fc.federated(fc.ModelState, update)


_SERVER = 2**31 - 2
"""Folded into the key of a round for the server's batches, apart from what clients fold in."""
