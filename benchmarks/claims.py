"""What each method's paper claims, at small scale, with the spread over seeds.

    python benchmarks/claims.py [--only fedexp scaffold]

Every claim compares a method with its natural baseline on the same problems, seeds and number of rounds. On digits both
sides choose their client and server learning rates from one grid on twenty seeds and are compared on twenty others;
all rates and seeds run in one compile. The table goes to benchmarks/results/claims.json;
`pytest -m slow tests/algorithms/test_claims.py` checks it.
"""

import argparse
import dataclasses
import inspect
import json
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from algorithms import messages
from algorithms.exploration.autoflip import masked
from algorithms.robustness.fal import pgd, robust
from benchmarks import _measure
from fedjax_core import (
    Groups,
    ModelState,
    Plan,
    Population,
    Split,
    Variables,
    continue_rounds,
    evaluate,
    evaluate_view,
    needs,
    run_events,
    samplers,
    with_part,
    with_statistics,
)
from models import detection, losses, metrics
from pipelines.data import datasets
from pipelines.federation import partition
from pipelines.studies import continual
from pipelines.studies.continual_config import Continual

SEEDS = 20
RATES = (0.03, 0.1, 0.3, 1.0)  # client learning rates tried on digits
FACTORS = (0.3, 1.0, 3.0)  # times the server learning rate, tried with each of them


class Claim(NamedTuple):
    """One comparison; values are float[SEEDS]."""

    text: str
    measure: str
    lower_is_better: bool
    method: np.ndarray
    baseline: np.ndarray

    @property
    def holds(self) -> bool:
        """The mean difference over seeds is at least two of its standard errors in the method's favor."""
        gain = np.asarray(self.baseline - self.method, float) * (1 if self.lower_is_better else -1)
        return bool(gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)))


# Heterogeneous quadratics: 20 clients, 10 dimensions, a problem per seed.


@cache
def quadratics(heterogeneity: float = 3.0, rank: int = 10, noise: float = 0.0):
    """Populations and optima stacked over seeds; below full rank all clients share a minimizer (interpolation).

    With noise a client has eight examples, whose minimizers scatter around its own.
    """
    populations, optima = [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        rotations = np.linalg.qr(rng.normal(size=(20, 10, 10)))[0]
        a = rotations @ (rng.uniform(0.2, 2.0, (20, 10, 1)) * rotations.transpose(0, 2, 1))
        b = rng.normal(size=(20, 10)) * heterogeneity
        if rank < 10:
            a = rotations[:, :, :rank] @ (rng.uniform(0.2, 2.0, (20, rank, 1)) * rotations[:, :, :rank].swapaxes(1, 2))
            b[:] = b[0]
        scatter = noise * rng.normal(size=(20, 8 if noise else 1, 10))
        points = b[:, None] + scatter - scatter.mean(1, keepdims=True)
        clients = [{"a": np.repeat(a[i : i + 1], len(points[i]), 0), "b": points[i]} for i in range(20)]
        populations.append(Population.from_clients(clients))
        optima.append(np.linalg.solve(a.sum(0), np.einsum("nij,nj->i", a, b)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *populations), jnp.asarray(np.stack(optima))


def quadratic_loss(params, batch, key):
    d = params - batch["b"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", d, batch["a"], d)


def distance(name, rounds=200, cohort=10, lr=0.1, heterogeneity=3.0, rank=10, noise=0.0, sampler=None, **settings):
    """Distance to the optimum after the rounds, for every seed; cohorts are uniform without a sampler."""
    populations, optima = quadratics(heterogeneity, rank, noise)
    settings = {"batch_size": 1} | settings
    factory = getattr(algorithms, name)
    settings |= {argument: 20 for argument, what in needs(factory).items() if what == "num_clients"}
    algorithm = factory(quadratic_loss, optax.sgd(lr), **settings)
    run = continue_rounds(algorithm, sampler or samplers.uniform(20, cohort), rounds)

    def final(population, optimum, key):
        state, _ = run(algorithm.init(jnp.zeros(10)), population, key)
        return jnp.linalg.norm(algorithm.params(state) - optimum)

    return np.asarray(jax.jit(jax.vmap(final))(populations, optima, jax.random.split(jax.random.key(0), SEEDS)))


# Handwritten digits: 50 clients by Dirichlet(0.1), 5 a round.


@cache
def digits():
    dataset = datasets.load("digits")
    assignment = partition.dirichlet(dataset.train["y"], 50, alpha=0.1, min_size=2)
    model = models.mlp((8, 8, 1), 10, hidden=(50,))
    return partition.federate(dataset, assignment), dataset, model


def accuracy_curve(make, rounds=60, cohort=5, factors=FACTORS):
    """Test accuracy after every round and the final global models, for every choice of rates and 2 SEEDS seeds.

    Returns:
      accuracy float[choices, 2 SEEDS, rounds], and params with leaves [choices, 2 SEEDS, ...].
    """
    population, dataset, model = digits()
    test = jax.tree.map(jnp.asarray, dict(dataset.test))
    metric_fn = metrics.classification(model)
    sampler = samplers.uniform(50, cohort)

    def curve(population, rate, factor, key):
        algorithm = make(losses.cross_entropy(model), rate, factor)
        one = continue_rounds(algorithm, sampler, 1)

        def body(state, _):
            state, _ = one(state, population, key)
            return state, evaluate(metric_fn, algorithm.params(state), test)["accuracy"]

        init_key, _ = jax.random.split(key)
        state, accuracy = jax.lax.scan(body, algorithm.init(model.init(init_key)), length=rounds)
        return accuracy, algorithm.params(state)

    rates, factors = (jnp.asarray(np.ravel(grid)) for grid in np.meshgrid(RATES, factors))
    keys = jax.random.split(jax.random.key(1), 2 * SEEDS)
    over_seeds = jax.vmap(curve, (None, None, None, 0))
    accuracy, params = jax.jit(jax.vmap(over_seeds, (None, 0, 0, None)))(population, rates, factors, keys)
    return np.asarray(accuracy), params


def choose(score):
    """The choice with the best mean score [choices, 2 SEEDS] on the first half of the seeds."""
    return int(np.argmax(np.nan_to_num(score[:, :SEEDS], nan=-np.inf).mean(1)))


def late_accuracy(name, **settings):
    """Mean test accuracy over the last ten rounds on the second half of the seeds."""
    return _late(name, tuple(settings.items()))[0]


@cache
def _late(name, settings=()):
    settings = dict(settings)
    server_lr = settings.pop("server_lr", 1.0)

    def make(loss_fn, rate, factor):
        if name == "fedopt":
            extra = {"server_optimizer": optax.adam(server_lr * factor, 0.9, 0.99, 1e-3)}
        else:
            extra = {"server_lr": server_lr * factor}
        factory = getattr(algorithms, name)
        if "num_clients" in inspect.signature(factory).parameters:
            extra["num_clients"] = 50
        return factory(loss_fn, optax.sgd(rate), batch_size=10, num_epochs=2, **extra, **settings)

    accuracy, params = accuracy_curve(make)
    late = accuracy[:, :, -10:].mean(-1)
    best = choose(late)
    return late[best, SEEDS:], jax.tree.map(lambda leaf: leaf[best, SEEDS:], params)


def rounds_to(target, curve):
    """First round whose accuracy reaches the target (one past the end if none), [...] from [..., rounds]."""
    reached = curve >= target
    return np.where(reached.any(-1), reached.argmax(-1) + 1, curve.shape[-1] + 1)


def sharpness(name, settings=()):
    """Rise of the training loss in the worst direction at distance 0.5 (first order), for every seed."""
    population, _, model = digits()
    _, params = _late(name, settings)
    loss_fn = losses.cross_entropy(model)

    @jax.jit
    @jax.vmap
    def rise(params):
        def loss(params):
            return jnp.mean(loss_fn(params, population.examples, jax.random.key(0)))

        gradient = jax.grad(loss)(params)
        norm = optax.tree.norm(gradient)
        return loss(jax.tree.map(lambda p, g: p + 0.5 * g / norm, params, gradient)) - loss(params)

    return np.asarray(rise(params))


def features(params, batch, key):
    return digits()[2].features(params, batch["x"], key)


def agreement(mu, rounds=30):
    """Mean cosine of the representations of test inputs under a global model and five local models trained from it."""
    population, dataset, model = digits()
    settings = {"features": features, "num_clients": 50, "mu": mu, "batch_size": 10, "num_epochs": 2}
    algorithm = algorithms.moon(losses.cross_entropy(model), optax.sgd(0.1), **settings)
    sampler = samplers.uniform(50, 5)
    run = continue_rounds(algorithm, sampler, rounds)
    test = {"x": jnp.asarray(dataset.test["x"])}

    def cosine(population, key):
        before, _ = run(algorithm.init(model.init(key)), population, key)
        ids = sampler(key, rounds)
        after, _ = algorithm.round(before, population.cohort(ids), key)
        local = jax.tree.map(lambda rows: rows[ids], after.client_models.rows)
        z = jax.vmap(features, (0, None, None))(local, test, None)
        return jnp.mean(optax.losses.cosine_similarity(z, features(algorithm.params(before), test, None), epsilon=1e-6))

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(cosine, (None, 0)))(population, keys))


@cache
def own_digits(turned=False):
    """(training, test) examples of 20 clients that hold two digits each; or all digits, every other's upside down."""
    dataset = datasets.load("digits")
    x, y = np.asarray(dataset.train["x"]), np.asarray(dataset.train["y"])
    order = np.random.default_rng(0).permutation(len(y))
    shards = np.array_split(order if turned else order[np.argsort(y[order], kind="stable")], 40)
    mixed = np.random.default_rng(1).permutation(40).reshape(20, 2)
    parts = []
    for client, own in enumerate(mixed):
        rows = np.random.default_rng(client).permutation(np.concatenate([shards[shard] for shard in own]))
        images = x[rows, ::-1, ::-1] if turned and client % 2 else x[rows]
        held = len(rows) // 4
        parts.append([{"x": images[at], "y": y[rows][at]} for at in (slice(held, None), slice(held))])
    training, test = zip(*parts, strict=True)
    return Population.from_clients(list(training)), Population.from_clients(list(test))


OWN = "accuracy on the clients' own test examples, mean over clients"


def own_accuracy(name, rounds=40, turned=False, cohort=5, **settings):
    """Mean over clients of the accuracy on their own test examples, each with its model, for every seed.

    Args:
      name: the method.
      rounds: how many.
      turned: see `own_digits`.
      cohort: clients of a round, out of 20.
      **settings: of the method.
    """
    training, test = own_digits(turned)
    model = models.mlp((8, 8, 1), 10, hidden=(50,))
    factory = getattr(algorithms, name)
    settings |= {argument: 20 for argument, what in needs(factory).items() if what == "num_clients"}
    settings = {"batch_size": 10, "num_epochs": 2} | settings
    method = factory(risk_of(model, factory), optax.sgd(0.1), **settings)
    run, view = continue_rounds(method, samplers.uniform(20, cohort), rounds), method.personal
    adapts = view.adapt is not None

    def final(training, test, key):
        state, _ = run(method.init(model.init(key), key), training, key)
        adapting = {"adapt_on": training, "key": key} if adapts else {}
        return jnp.mean(evaluate_view(metrics.classification(model), view, state, test, **adapting)["accuracy"])

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(final, (None, None, 0)))(training, test, keys))


def risk_of(model, factory):
    """What a method is given to learn: a task if it asks for one, else a loss."""
    return models.task(model) if "task" in needs(factory).values() else losses.cross_entropy(model)


NETS = (50,), (30, 50)
"""Hidden layers of the two architectures of clients that differ in it: every other client has the second."""


@cache
def mixed(name, rounds=10):
    """`own_accuracy` where every other client has another architecture: of FedGH, or of each kind by another method."""
    training, test = own_digits()
    groups, sampler = Groups.by_modulo(20, len(NETS)), samplers.uniform(20, 5)
    tasks = tuple(models.task(models.mlp((8, 8, 1), 10, hidden=hidden)) for hidden in NETS)
    local = {"batch_size": 10, "num_epochs": 2}

    def accuracies(method, of_tasks, start, training, test, key):
        state, _ = continue_rounds(method, sampler, rounds)(method.init(start), training, key)
        return evaluate_view(of_tasks, method.personal, state, test)["accuracy"]

    def final(training, test, key):
        starts = tuple(task.init(key) for task in tasks)
        if name == "fedgh":
            server = {"groups": groups, "num_classes": 10, "server_lr": 0.3, "server_epochs": 5}
            method = algorithms.fedgh(tasks, optax.sgd(0.1), **server, **local)
            return jnp.mean(accuracies(method, tasks, starts, training, test, key))
        by_kind = []
        for task, start in zip(tasks, starts, strict=True):
            method = getattr(algorithms, name)(task, optax.sgd(0.1), num_clients=20, **local)
            by_kind.append(accuracies(method, task, start, training, test, key))
        return jnp.mean(jnp.stack(by_kind)[groups.of, np.arange(20)])

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(final, (None, None, 0)))(training, test, keys))


def own_model_beats_fedavg(name, **settings):
    text = "on clients that differ strongly its own models are better than FedAvg's"
    return lambda: Claim(text, OWN, False, own_accuracy(name, **settings), own_accuracy("fedavg"))


@cache
def calibrated(rounds=60):
    """Test accuracy of CCVR's model before and after its head is calibrated, for every seed."""
    population, dataset, model = digits()
    test = jax.tree.map(jnp.asarray, dict(dataset.test))
    metric_fn = metrics.classification(model)
    method = algorithms.ccvr(models.task(model), optax.sgd(0.1), batch_size=10, num_epochs=2)
    run = continue_rounds(method, samplers.uniform(50, 5), rounds)

    def scores(key):
        init_key, run_key, event_key = jax.random.split(key, 3)
        state, _ = run(method.init(model.init(init_key)), population, run_key)
        after = run_events(method, "after", state, population.cohort(jnp.arange(50)), event_key)
        return [evaluate(metric_fn, method.params(each), test)["accuracy"] for each in (state, after)]

    return [np.asarray(each) for each in jax.jit(jax.vmap(scores))(jax.random.split(jax.random.key(1), SEEDS))]


def calibration_helps():
    text = "its head, trained anew on features of all classes, is better than the average of the clients' heads"
    before, after = calibrated()
    return Claim(text, "test accuracy of the global model", False, after, before)


def two_kinds(name, **settings):
    """Of a method that wants all clients in every round."""
    text = "finds two kinds of clients, and models for them that are better than FedAvg's one"
    everybody = {"turned": True, "cohort": 20, "rounds": 30}
    return lambda: Claim(
        text, OWN, False, own_accuracy(name, **everybody, **settings), own_accuracy("fedavg", **everybody)
    )


def accuracy_with_normalization(make, rounds=40):
    """As `own_accuracy`, of a network with batch normalization; clients hold all digits and see each its own way.

    Args:
      make: `make(task, optimizer, **local) -> Algorithm`.
      rounds: of 5 of the 20 clients.
    """
    training, test = (_seen_differently(part) for part in own_digits(turned=True))

    def init(key):
        keys = jax.random.split(key)
        weights = {"w": jax.random.normal(keys[0], (64, 50)) / 8, "head": jax.random.normal(keys[1], (50, 10)) / 7}
        params = {**weights, "norm": {"scale": jnp.ones(50), "bias": jnp.zeros(50)}, "bias": jnp.zeros(10)}
        return Variables(params, {"mean": jnp.zeros(50), "var": jnp.ones(50)})

    def forward(model, examples, *, key, mask, frozen=False):
        y, after = model
        z = examples["x"].reshape(-1, 64) @ y["w"]
        now = after
        if key is not None and not frozen:
            rows = (mask | ~jnp.any(mask))[:, None].astype(z.dtype)
            mean = jnp.sum(rows * z, axis=0) / jnp.sum(rows)
            now = {"mean": mean, "var": jnp.sum(rows * jnp.square(z - mean), axis=0) / jnp.sum(rows)}
            after = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, after, now)
        z = (z - now["mean"]) / jnp.sqrt(now["var"] + 1e-5)
        return jax.nn.relu(y["norm"]["scale"] * z + y["norm"]["bias"]) @ y["head"] + y["bias"], after

    plain = models.task(models.mlp((8, 8, 1), 10))  # for its loss and metrics
    task = dataclasses.replace(
        plain, init=init, forward=forward, features=None, head=None, paths=lambda kind: ("norm",), has_statistics=True
    )
    method = make(task, optax.sgd(0.1), batch_size=10, num_epochs=2)
    run = continue_rounds(method, samplers.uniform(20, 5), rounds)

    def final(training, test, key):
        state, _ = run(method.init(init(key)), training, key)
        return jnp.mean(evaluate_view(task, method.personal, state, test)["accuracy"])

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(final, (None, None, 0)))(training, test, keys))


def _seen_differently(population):
    """The clients of `own_digits(turned=True)`, upright again, each with a contrast and a brightness of its own."""
    changed = []
    for client in range(population.num_clients):
        examples = population.client(client)
        upright = examples["x"][:, ::-1, ::-1] if client % 2 else examples["x"]
        rng = np.random.default_rng(client)
        contrast, brightness = rng.choice([-1, 1]) * rng.uniform(0.2, 2), rng.uniform(-2, 2)
        changed.append({"x": contrast * upright + brightness, "y": examples["y"]})
    return Population.from_clients(changed)


def logits(params, batch, key):
    return digits()[2].apply(params, batch["x"], key)


def explored_accuracy(name, where, lr, rounds=60, shuffle=False, **settings):
    """Mean test accuracy over the last ten rounds after an exploration by all clients, for every seed.

    Args:
      name: a method with an exploration.
      where: `where(state) -> tree`, what the exploration has found, and `where(state, tree) -> state`, with another.
      lr: of the clients.
      rounds: number of rounds.
      shuffle: shuffle what it has found, every leaf by itself.
      **settings: of the method.
    """
    population, dataset, model = digits()
    local = {"batch_size": 10, "num_epochs": 2, "explore_epochs": 5, "momentum": 0.0}
    algorithm = getattr(algorithms, name)(losses.cross_entropy(model), optax.sgd(lr), **local, **settings)
    one = continue_rounds(algorithm, samplers.uniform(50, 5), 1)
    test = jax.tree.map(jnp.asarray, dict(dataset.test))

    def late(population, key):
        start = algorithm.init(model.init(key))
        state = algorithm.events["explore"].run(start, population.cohort(jnp.arange(50)), key)
        if shuffle:
            found, treedef = jax.tree.flatten(where(state))
            shuffled = [jax.random.permutation(key, leaf.reshape(-1)).reshape(leaf.shape) for leaf in found]
            # From the first model, of which the exploration may have pruned other parameters.
            state = where(start, jax.tree.unflatten(treedef, shuffled))

        def body(state, _):
            state, _ = one(state, population, key)
            return state, evaluate(metrics.classification(model), algorithm.params(state), test)["accuracy"]

        return jnp.mean(jax.lax.scan(body, state, length=rounds)[1][-10:])

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(late, (None, 0)))(population, keys))


def guidance_of(state, new=None):
    """The mean map of FedLEx's explorers; with `new` the state that has that one instead."""
    return state.maps.mean if new is None else state._replace(maps=state.maps._replace(mean=new))


def mask_of(state, new=None):
    """The mask of AutoFLIP; with `new` the state that has that one instead."""
    return state.mask if new is None else state._replace(mask=new, params=masked(new, state.params))


def shift_loss(lam, rounds=30, clients=10):
    """Mean loss on the test examples of local models, each trained by one client from a model that FedAvg has made."""
    population, dataset, model = digits()
    loss_fn = losses.cross_entropy(model)
    local = {"batch_size": 10, "num_epochs": 2}
    run = continue_rounds(algorithms.fedavg(loss_fn, optax.sgd(0.1), **local), samplers.uniform(50, 5), rounds)
    algorithm = algorithms.fedld(loss_fn, optax.sgd(0.1), logits=logits, lam=lam, **local)
    test = jax.tree.map(jnp.asarray, dict(dataset.test))

    def loss(population, key):
        start, _ = run(ModelState(model.init(key), jnp.int32(0)), population, key)

        def of_client(i):
            after, _ = algorithm.round(algorithm.init(start.params), population.cohort(i[None]), key)
            return evaluate(metrics.classification(model), algorithm.params(after), test)["loss"]

        return jnp.mean(jax.lax.map(of_client, jnp.arange(clients)))

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(loss, (None, 0)))(population, keys))


def plain_accuracy(algorithm, population, test, rounds=40, cohort=10):
    """Mean test accuracy over the last ten rounds, for every seed."""
    _, _, model = digits()
    one = continue_rounds(algorithm, samplers.uniform(50, cohort), 1)

    def late(population, test, key):
        def body(state, _):
            state, _ = one(state, population, key)
            return state, evaluate(metrics.classification(model), algorithm.params(state), test)["accuracy"]

        return jnp.mean(jax.lax.scan(body, algorithm.init(model.init(key), key), length=rounds)[1][-10:])

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(late, (None, None, 0)))(population, test, keys))


def under_malicious_clients(name, attack, optimizer):
    """The same with 10 malicious clients of 50."""
    population, dataset, model = digits()
    local = {"batch_size": 10, "num_epochs": 2}
    algorithm = getattr(algorithms, name)(losses.cross_entropy(model), optimizer, **local)
    attacked = with_part(algorithm, attack(np.arange(50) % 5 == 0), like=population)
    return plain_accuracy(attacked, population, jax.tree.map(jnp.asarray, dict(dataset.test)))


def negatives_found(name, rounds=30, **settings):
    """F1 of an autoencoder that is to find negatives among digits, where four of ten clients train on negatives.

    The threshold is two standard deviations above the mean error of other digits.
    """
    dataset = datasets.load("digits")
    x = np.asarray(dataset.train["x"], np.float32)
    x = np.random.default_rng(0).permutation(x / x.max())
    parts = np.split(x[:1000], 10)
    population = Population.from_clients([{"x": 1 - part if i < 4 else part} for i, part in enumerate(parts)])
    population = population.with_public({"x": x[1000:1100]})
    held = x[1100:]
    validation, normal = held[::2], held[1::2]
    test, anomalous = np.concatenate([normal, 1 - normal]), np.arange(2 * len(normal)) >= len(normal)
    model = models.autoencoder((8, 8, 1), channels=(8,), latent=8)
    errors = losses.reconstruction(model)
    factory = getattr(algorithms, name)
    settings |= {argument: 10 for argument, what in needs(factory).items() if what == "num_clients"}
    method = factory(errors, optax.adam(3e-3), batch_size=20, num_epochs=2, **settings)
    run = continue_rounds(method, samplers.full(10), rounds)

    def final(population, key):
        state, _ = run(method.init(model.init(key)), population, key)
        of = lambda x: errors(method.params(state), {"x": jnp.asarray(x)}, None)  # noqa: E731
        return detection.detection(of(test), anomalous, detection.threshold(of(validation), z=2.0)).f1

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(jax.jit(jax.vmap(final, (None, 0)))(population, keys))


def distilled(server_steps):
    """The same of FedDF, which has half of the test inputs as public data and is tested on the others."""
    population, dataset, model = digits()
    public, test = ({name: jnp.asarray(leaf[part::2]) for name, leaf in dataset.test.items()} for part in (0, 1))
    algorithm = algorithms.feddf(
        losses.cross_entropy(model),
        optax.sgd(0.1),
        logits=logits,
        **{"batch_size": 10, "num_epochs": 20, "server_steps": server_steps, "server_batch_size": 60},
    )
    return plain_accuracy(algorithm, population.with_public({"x": public["x"]}), test, rounds=20, cohort=5)


def robust_accuracy(name, settings=()):
    """Test accuracy under 20 steps of projected gradient ascent within 0.1 of every pixel, for every seed."""
    _, dataset, model = digits()
    _, params = _late(name, settings)
    attack = pgd(losses.cross_entropy(model), rho=0.1, step_size=0.02, attack_steps=20)
    metric_fn = robust(metrics.classification(model), attack)
    test = jax.tree.map(jnp.asarray, dict(dataset.test))
    under_attack = jax.vmap(lambda params, test: evaluate(metric_fn, params, test)["accuracy"], (0, None))
    return np.asarray(jax.jit(under_attack)(params, test))


@cache
def forgetting(name):
    """Forgetting after three tasks of permuted digits, for every seed."""
    config = Continual(scenario="permuted", dataset="digits", tasks=3, rounds=30)
    tasks = continual.scenario(config)
    method = continual.build(config, name, tasks)
    sampler = samplers.uniform(config.clients, config.cohort_size)
    run = jax.jit(continue_rounds(method, sampler, config.rounds))  # compiled once for all tasks, not once for each
    end_task = jax.jit(partial(run_events, method, "task"))
    metric_fn = metrics.classification(tasks.model)

    def matrix(populations, tests, key):
        state, rows = method.init(tasks.model.init(key)), []
        for population in populations:
            state, _ = run(state, population, key)
            state = end_task(state, population.cohort(sampler(key, state.round)), key)
            rows.append([evaluate(metric_fn, method.params(state), test)["accuracy"] for test in tests])
        return jnp.asarray(rows)

    populations, tests = zip(*((tasks.population(t), tasks.test(t)) for t in range(config.tasks)), strict=True)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    matrices = np.asarray(jax.jit(jax.vmap(matrix, (None, None, 0)))(populations, tests, keys))
    return np.array([continual.measures(each, np.zeros(config.tasks))["forgetting"] for each in matrices])


def error_of_adapters(rule, rounds=40):
    """Error of the adapted weight for clients of ranks 1 to 8, each with inputs of its own kind, for SEEDS seeds.

    The weight to be learned differs from the frozen one by a matrix of rank 4; the client learning rate is chosen on as
    many other seeds.
    """
    ranks, width, outputs, each = (1, 1, 2, 2, 4, 4, 8, 8), 16, 12, 40
    problems = []
    for seed in range(2 * SEEDS):
        rng = np.random.default_rng(seed)
        change = rng.normal(size=(width, 4)) @ rng.normal(size=(4, outputs)) / 4
        x = rng.normal(size=(len(ranks), each, width)) * rng.uniform(0.1, 1.5, (len(ranks), 1, width))
        y = x @ change + 0.1 * rng.normal(size=(len(ranks), each, outputs))
        flat = {"x": x.reshape(-1, width), "y": y.reshape(-1, outputs)}
        start = {"A": rng.uniform(-0.25, 0.25, (width, 8)), "B": np.zeros((8, outputs))}
        problems.append((Population.from_sizes(flat, [each] * len(ranks)), start, change))
    populations, starts, changes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)

    def loss_fn(params, batch, key):
        return jnp.sum(jnp.square(batch["x"] @ (params["A"] @ params["B"]) - batch["y"]), axis=1)

    def error(rate, population, start, change, key):
        method = algorithms.fedlora(
            loss_fn, optax.sgd(rate), num_clients=len(ranks), ranks=ranks, rule=rule, alpha=8.0, batch_size=20
        )
        state, _ = continue_rounds(method, samplers.full(len(ranks)), rounds)(method.init(start), population, key)
        params = method.params(state)
        return jnp.linalg.norm(params["A"] @ params["B"] - change) / jnp.linalg.norm(change)

    over_seeds = jax.vmap(error, (None, 0, 0, 0, 0))
    keys = jax.random.split(jax.random.key(0), 2 * SEEDS)
    rates = jnp.array([0.001, 0.003, 0.01, 0.03])
    errors = np.asarray(jax.jit(jax.vmap(over_seeds, (0, *[None] * 4)))(rates, populations, starts, changes, keys))
    return errors[choose(-errors), SEEDS:]


def accuracy_by_bytes(keep, self_epochs, rounds):
    """Test accuracy of a split model on digits, after `rounds` rounds, for SEEDS seeds.

    The whole was trained beforehand on digits that are flipped; clients hold few labels each, and the learning rate is
    chosen on as many other seeds.
    """
    _, dataset, _ = digits()
    x, y = (jnp.asarray(dataset.train[name]) for name in "xy")
    x = x.reshape(len(y), 8, 8)
    test = {"x": jnp.asarray(dataset.test["x"]).reshape(-1, 64), "y": jnp.asarray(dataset.test["y"])}
    width, clients, each = 64, 10, 40

    def body(public, s, key):
        for B, C in public["body"]:
            s = s + jax.nn.relu(s @ B) @ C
        return s

    model = Split(
        lambda y, public, examples, key: examples["x"] @ public["head"] + y["prompt"],
        body,
        lambda y, public, r, key: jax.nn.standardize(r) @ y["w"] + y["b"],
        lambda logits, examples: optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"]),
    )

    def outputs(y, public, examples):
        return model.tail(y, public, body(public, model.head(y, public, examples, None), None), None)

    def pretrained(key):
        head, *own = jax.random.split(key, 7)
        normal = lambda key, scale: scale * jax.random.normal(key, (width, width))  # noqa: E731
        public = {
            "head": normal(head, 0.125),
            "body": [(normal(own[2 * i], 0.125), normal(own[2 * i + 1], 0.05)) for i in range(3)],
        }
        start = {"prompt": jnp.zeros(width), "w": jnp.zeros((width, 10)), "b": jnp.zeros(10)}
        flipped = {"x": x[:, :, ::-1].reshape(-1, 64), "y": y}
        optimizer = optax.adam(3e-3)

        def step(carry, key):
            params, opt_state = carry
            rows = jax.random.randint(key, (64,), 0, len(y))
            batch = jax.tree.map(lambda leaf: leaf[rows], flipped)
            loss = lambda params: jnp.mean(model.loss(outputs(*params, batch), batch))  # noqa: E731
            u, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, u), opt_state), None

        begun = (start, public)
        (params, _), _ = jax.lax.scan(step, (begun, optimizer.init(begun)), jax.random.split(key, 300))
        return params

    start, public = jax.jit(pretrained)(jax.random.key(1))

    def accuracy(rate, public, key):
        rows = jax.random.permutation(key, len(y))[: clients * each]
        rows = rows[jnp.argsort(y[rows] + 4 * jax.random.uniform(key, rows.shape))]  # a few labels a client
        population = Population({"x": x[rows].reshape(-1, 64), "y": y[rows]}, jnp.arange(clients + 1) * each, public)
        local = {"batch_size": 10, "plan": Plan(lanes=40)}
        method = algorithms.sfprompt(model, optax.sgd(rate), keep=keep, self_epochs=self_epochs, **local)
        run = continue_rounds(method, samplers.uniform(clients, 5), rounds)
        state, _ = run(method.init(start), population, key)
        right = jnp.argmax(outputs(state.params, public, test), axis=1) == test["y"]
        return jnp.mean(right)

    keys = jax.random.split(jax.random.key(0), 2 * SEEDS)
    over_seeds = jax.vmap(accuracy, (None, None, 0))
    found = np.asarray(jax.jit(jax.vmap(over_seeds, (0, None, None)))(jnp.array([0.03, 0.1, 0.3]), public, keys))
    return found[choose(found), SEEDS:]


def fedavg_against_fedsgd():
    def needed(factory, **settings):
        def make(loss_fn, rate, factor):
            return factory(loss_fn, optax.sgd(rate), batch_size=10, server_lr=factor, **settings)

        rounds = rounds_to(0.85, accuracy_curve(make, cohort=10, factors=(1.0,))[0])
        return rounds[choose(-rounds), SEEDS:]

    return needed(algorithms.fedavg, num_epochs=5), needed(algorithms.fedsgd)


LATE = "test accuracy, last 10 of 60 rounds"
DISTANCE = "distance to the optimum"
UNEQUAL = np.tile([1, 2, 4, 8, 16], 4)
PRESENCE = np.tile([0.9, 0.5, 0.2, 0.1], 5)
RARE = np.tile([0.95, 0.95, 0.05, 0.05], 5)


def claims():
    """Method -> a function that measures its claim."""
    beats = "reaches a higher accuracy than FedAvg under strong label skew and low participation"

    def server(name, **settings):
        return lambda: Claim(beats, LATE, False, late_accuracy(name, **settings), late_accuracy("fedavg"))

    def exact(text, name, baseline="fedavg", common=(), **settings):
        common = dict(common)
        return lambda: Claim(text, DISTANCE, True, distance(name, **common, **settings), distance(baseline, **common))

    def forgets_less(name):
        text, measure = "forgets less of earlier tasks than FedAvg", "accuracy lost on two tasks after three"
        return lambda: Claim(text, measure, True, forgetting(name), forgetting("fedavg"))

    many = {"num_steps": 10}
    noisy = many | {"noise": 3.0, "order": "replacement"}
    absent = {"num_steps": 1, "lr": 0.02, "rounds": 1000, "sampler": samplers.bernoulli(PRESENCE)}
    rare = noisy | {"noise": 6.0, "num_steps": 5, "lr": 0.02, "rounds": 400}
    rare |= {"sampler": samplers.bernoulli(RARE), "probabilities": RARE}
    # The mean of an estimate from values is the gradient over its 10 dimensions, and the rate 10 times the usual one.
    values = many | {"cohort": 20, "lr": 1.0, "num_directions": 10}
    few = {"rounds": 10, "cohort": 20, "lr": 1.0, "heterogeneity": 0.1}
    asynchronous = samplers.deliveries(np.tile([1, 2, 4, 8, 16], 4), 4000, buffer=1)
    one_by_one = {"num_steps": 1, "lr": 0.02, "rounds": 4000, "sampler": samplers.schedule(asynchronous.cohorts)}
    short = {"rounds": 10, "cohort": 20, "heterogeneity": 1.0, "num_steps": 5}
    queries = algorithms.FZooSQueries(
        capacity=300, active=2, active_candidates=20, survey=10, survey_candidates=40, radius=0.1
    )
    surrogate = algorithms.FZooSSurrogate(
        neighbors=30, noise=1e-5, num_features=200, feature_neighbors=60, feature_lengthscale=3.0
    )
    flat = "finds flatter minima than FedAvg"
    rise = "rise of the loss at distance 0.5"
    return {
        "fedavg": lambda: Claim(
            "needs fewer rounds than FedSGD", "rounds to 85 % accuracy", True, *fedavg_against_fedsgd()
        ),
        "local_sgd": lambda: Claim(
            "with 10 local steps gets closer in 10 rounds than with 1, when clients are alike",
            DISTANCE,
            True,
            distance("local_sgd", rounds=10, cohort=20, heterogeneity=0.1, num_steps=10),
            distance("local_sgd", rounds=10, cohort=20, heterogeneity=0.1, num_steps=1),
        ),
        "fedsgd": lambda: Claim(
            "has no client drift: with everyone it reaches the optimum, where FedAvg with 10 steps stalls",
            DISTANCE,
            True,
            distance("fedsgd", cohort=20),
            distance("fedavg", cohort=20, **many),
        ),
        "fedopt": lambda: Claim(
            beats + " (with optax.adam)",
            LATE,
            False,
            late_accuracy("fedopt", server_lr=0.01),
            late_accuracy("fedavg"),
        ),
        "fedavgm": server("fedavgm", momentum=0.9, server_lr=0.3),
        "fedadagrad": server("fedadagrad", server_lr=0.1),
        "fedadam": server("fedadam", server_lr=0.01),
        "fedyogi": server("fedyogi", server_lr=0.01),
        "fedprox": exact("stalls closer to the optimum than FedAvg", "fedprox", common=many | {"cohort": 20}, mu=1.0),
        "scaffold": exact("converges with partial participation, where FedAvg stalls", "scaffold", common=many),
        "feddyn": exact("converges with partial participation, where FedAvg stalls", "feddyn", common=many, alpha=0.5),
        "fednova": exact(
            "removes most of the bias that unequal local work gives FedAvg",
            "fednova",
            common={"num_steps": UNEQUAL, "cohort": 20, "lr": 0.02, "rounds": 600},
        ),
        "fedexp": exact(
            "gets closer than FedAvg in the same 40 rounds when clients interpolate a common solution",
            "fedexp",
            common={"num_steps": 20, "cohort": 20, "rounds": 40, "rank": 1},
        ),
        "fedamd": exact(
            "converges with partial participation, where FedAvg stalls", "fedamd", common=many | {"lr": 0.03}
        ),
        "fedfix": lambda: Claim(
            "asynchronous, with weights from delivery rates goes to the optimum, with identical ones to a wrong point",
            DISTANCE,
            True,
            distance("fedfix", probabilities=asynchronous.shares, **one_by_one),
            distance("fedfix", probabilities=1 / 20, **one_by_one),
        ),
        "afa_cd": exact(
            "removes most of the bias that unequal local work gives FedAvg, from models of earlier rounds",
            "afa_cd",
            common={"num_steps": UNEQUAL, "lr": 0.02, "rounds": 600},
        ),
        "afa_cs": exact(
            "goes to the optimum when clients come unequally often, AFA-CD to a wrong point",
            "afa_cs",
            "afa_cd",
            common={"num_steps": UNEQUAL, "lr": 0.01, "rounds": 1000, "sampler": samplers.bernoulli(PRESENCE)},
        ),
        "fedau": exact(
            "goes to the optimum under unequal participation that it does not know, FedAvg to a wrong point",
            "fedau",
            common=absent,
        ),
        "fedavg_ipw": exact(
            "goes to the optimum under unequal participation, FedAvg to a wrong point",
            "fedavg_ipw",
            common=absent,
            probabilities=PRESENCE,
        ),
        "mifa": exact(
            "converges under unequal participation that it does not know, where FedAvg goes to a wrong point",
            "mifa",
            common=absent,
        ),
        "fedvarp": exact(
            "converges with partial participation and one local step, where the choice of cohorts keeps FedAvg moving",
            "fedvarp",
            common={"num_steps": 1},
        ),
        "fedstale": lambda: Claim(
            "with half the weight on stale updates gets closer than FedVARP under rare participation and small batches",
            DISTANCE,
            True,
            distance("fedstale", beta=0.5, **rare),
            distance("fedstale", beta=1.0, **rare),
        ),
        "fedcm": server("fedcm", alpha=0.2),
        "fedavg_m": exact(
            "with everyone taking part it stalls much closer to the optimum than FedAvg",
            "fedavg_m",
            common=many | {"cohort": 20},
            beta=0.1,
        ),
        "fedavg_m_vr": exact(
            "is held up less by the noise of small batches than FedAvg-M, when clients are alike",
            "fedavg_m_vr",
            "fedavg_m",
            common=noisy | {"cohort": 20, "lr": 0.02, "heterogeneity": 0.1},
        ),
        "scaffold_m": exact(
            "takes server steps, with 2 of 20 clients a round, that are too long for SCAFFOLD",
            "scaffold_m",
            "scaffold",
            common=many | {"cohort": 2, "rounds": 100, "server_lr": 2.0},
            beta=0.3,
        ),
        "scaffold_m_vr": exact(
            "is held up less by the noise of small batches than SCAFFOLD-M, with 2 of 20 clients a round",
            "scaffold_m_vr",
            "scaffold_m",
            common=noisy | {"cohort": 2},
        ),
        "fedspeed": exact(
            "converges with partial participation, where FedAvg stalls", "fedspeed", common=many, lam=2.0, rho=0.1
        ),
        "fedgamma": exact(
            "converges with partial participation, where FedSAM stalls",
            "fedgamma",
            "fedsam",
            common=many | {"rho": 0.1},
        ),
        "fedsmoo": exact(
            "converges with partial participation, where FedSAM stalls",
            "fedsmoo",
            "fedsam",
            common=many | {"rho": 0.1},
            lam=2.0,
        ),
        "mime": exact(
            "with everyone it goes on to the optimum, where FedAvg stalls", "mime", common=many | {"cohort": 20}
        ),
        "mimelite": exact(
            "with everyone it stalls closer to the optimum than FedAvg", "mimelite", common=many | {"cohort": 20}
        ),
        "moon": lambda: Claim(
            "keeps the representations of local models closer to the global model's than FedAvg (its mu = 0)",
            "cosine of the representations before and after local training",
            False,
            agreement(1.0),
            agreement(0.0),
        ),
        "fot": forgets_less("fot"),
        "ewc": forgets_less("ewc"),
        "fal": lambda: Claim(
            "is right more often than FedAvg when its inputs are attacked",
            "test accuracy under attack, rho = 0.1",
            False,
            robust_accuracy("fal", (("attack_steps", 3), ("step_size", 0.05))),
            robust_accuracy("fedavg"),
        ),
        "fedld": lambda: Claim(
            "its penalty makes local models lose less on all clients' examples than FedAvg's (lam = 0)",
            "loss of local models on the test examples",
            True,
            shift_loss(0.1),
            shift_loss(0.0),
        ),
        "feddf": lambda: Claim(
            "reaches a higher accuracy than without steps of the server (FedAvg) when models have drifted apart",
            "test accuracy, last 10 of 20 rounds, 20 local epochs",
            False,
            distilled(200),
            distilled(0),
        ),
        "frl": lambda: Claim(
            "learns while a fifth of the clients reverses rankings, FedAvg does not while they flip signs, ten times",
            "test accuracy, last 10 of 40 rounds, 20 % malicious",
            False,
            under_malicious_clients("frl", messages.rank_reversal, optax.sgd(0.4, 0.9)),
            under_malicious_clients("fedavg", partial(messages.sign_flip, factor=10.0), optax.sgd(0.1)),
        ),
        "fedagain": lambda: Claim(
            "of an autoencoder, finds more of what is not normal than FedAvg where four of ten clients train on that",
            "F1 of finding negatives among digits",
            False,
            negatives_found("fedagain", a=5.0, benchmark=lambda public: public),
            negatives_found("fedavg"),
        ),
        "fedgh": lambda: Claim(
            "clients of two architectures learn more in 10 rounds than each by itself",
            OWN,
            False,
            mixed("fedgh"),
            mixed("local_only"),
        ),
        "fedlex": lambda: Claim(
            "its guidance is worth more than the same values on other parameters",
            LATE,
            False,
            explored_accuracy("fedlex", guidance_of, 0.3),
            explored_accuracy("fedlex", guidance_of, 0.3, shuffle=True),
        ),
        "autoflip": lambda: Claim(
            "loses less by pruning than a random mask that prunes as much of every leaf",
            LATE,
            False,
            explored_accuracy("autoflip", mask_of, 0.3, threshold=0.7),
            explored_accuracy("autoflip", mask_of, 0.3, threshold=0.7, shuffle=True),
        ),
        "fedlora": lambda: Claim(
            "averages products and learns more from clients of ranks 1 to 8 than by averaging factors with zeros",
            "relative error of the change of the weight",
            True,
            error_of_adapters("products"),
            error_of_adapters("factors"),
        ),
        "apfl": own_model_beats_fedavg("apfl"),
        "ditto": own_model_beats_fedavg("ditto"),
        "fedper": own_model_beats_fedavg("fedper"),
        "fedbn": lambda: Claim(
            "where clients see the same digits each its own way, clients' models are better than FedAvg's",
            OWN,
            False,
            accuracy_with_normalization(partial(algorithms.fedbn, num_clients=20)),
            accuracy_with_normalization(
                lambda task, optimizer, **local: with_statistics(algorithms.fedavg(task, optimizer, **local), "average")
            ),
        ),
        "pfedme": own_model_beats_fedavg("pfedme"),
        "fedrep": own_model_beats_fedavg("fedrep"),
        "fedrod": own_model_beats_fedavg("fedrod"),
        "ccvr": calibration_helps,
        "fedetf": own_model_beats_fedavg("fedetf", alternations=2),
        "fedgela": own_model_beats_fedavg("fedgela", temperature=5.0),
        "fedloge": own_model_beats_fedavg("fedloge", etf_norm=1.0, etf_steps=1_000),
        "lg_fedavg": own_model_beats_fedavg("lg_fedavg"),
        "local_only": own_model_beats_fedavg("local_only"),
        "fedavg_ft": own_model_beats_fedavg("fedavg_ft"),
        "per_fedavg": own_model_beats_fedavg("per_fedavg", inner_lr=0.1, adapt_steps=3),
        "ifca": lambda: Claim(
            "two models are better than FedAvg's one for two kinds of clients",
            OWN,
            False,
            own_accuracy("ifca", turned=True),
            own_accuracy("fedavg", turned=True),
        ),
        "cfl": two_kinds("cfl", num_models=4, eps1=0.3, eps2=0.5, wait=5),
        "ocfl": two_kinds("ocfl", num_models=2),
        "sfprompt": lambda: Claim(
            "learns more from as many bytes at the cuts than split learning of all examples without phases alone",
            "test accuracy on digits, pretrained on flipped ones",
            False,
            accuracy_by_bytes(0.5, 2, rounds=16),
            accuracy_by_bytes(1.0, 0, rounds=8),
        ),
        "fedzo": lambda: Claim(
            "with 10 local steps gets closer in 10 rounds than with 1, when clients are alike",
            DISTANCE,
            True,
            distance("fedzo", num_steps=10, num_directions=5, **few),
            distance("fedzo", num_steps=1, num_directions=5, **few),
        ),
        "fedprox_zo": exact("stalls closer to the optimum than FedZO", "fedprox_zo", "fedzo", values, proximal=0.1),
        "scaffold_zo": exact("converges with everyone, where FedZO stalls", "scaffold_zo", "fedzo", values),
        "fzoos": lambda: Claim(
            "gets closer than FedZO in 10 rounds of 5 steps, from 260 queries a client instead of 550",
            DISTANCE,
            True,
            distance("fzoos", lr=0.1, queries=queries, surrogate=surrogate, **short),
            distance("fedzo", lr=1.0, num_directions=10, **short),
        ),
        "fedsam": lambda: Claim(flat, rise, True, sharpness("fedsam", (("rho", 0.2),)), sharpness("fedavg")),
        "fedasam": lambda: Claim(flat, rise, True, sharpness("fedasam", (("rho", 1.0),)), sharpness("fedavg")),
        "mofedsam": lambda: Claim(
            "adds the global direction to FedSAM and beats it under low participation",
            LATE,
            False,
            late_accuracy("mofedsam", rho=0.05, alpha=0.1),
            late_accuracy("fedsam", rho=0.05),
        ),
    }


def main() -> None:
    """Measures the claims and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None)
    args = parser.parse_args()
    rows = {}
    for name, measure in claims().items():
        if args.only and name not in args.only:
            continue
        claim = measure()
        rows[name] = {
            "claim": claim.text,
            "measure": claim.measure,
            "method": [float(v) for v in claim.method],
            "baseline": [float(v) for v in claim.baseline],
            "holds": claim.holds,
        }
        print(
            f"{name:11s} {claim.method.mean():9.4g} ± {claim.method.std(ddof=1):8.2g}  against "
            f"{claim.baseline.mean():9.4g} ± {claim.baseline.std(ddof=1):8.2g}  {claim.measure}"
            f"{'' if claim.holds else '   DOES NOT HOLD'}",
            flush=True,
        )
    saved = _measure.RESULTS / "claims.json"
    if args.only and saved.exists():  # the others stay as they were measured
        rows = json.loads(saved.read_text())["claims"] | rows
    print(_measure.save("claims", {"machine": _measure.machine(), "seeds": SEEDS, "claims": rows}))


if __name__ == "__main__":
    main()
