"""A federated method of your own: FedAvg in which no client's upload is longer than a bound.

What is its own is what a client uploads and what the server makes of it. Local steps, batches, masks, keys, unequal
clients, lanes and devices, the counter of rounds and the metrics are the library's business. The end of the file checks
the method.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import algorithms
import fedjax_core as fc
from fedjax_core import testing

NUM_ROUNDS = int(os.environ.get("FEDJAX_CORE_EXAMPLE_ROUNDS", "30"))


class ClippedMetrics(NamedTuple):
    """Share of the participants whose upload was shortened."""

    clipped: fc.Array


def clipped_fedavg(loss_fn, client_optimizer, *, max_norm, **local):
    """Clipped FedAvg: the average of displacements shortened to a bound.

    Client, from y = x:  y <- y - lr g_i(y), K times;  d_i = y - x;  uploads d_i min(1, max_norm / |d_i|).
    Server:              x <- x + mean_S of the uploads.
    """
    clients = fc.local_training(**local)

    def upload(done, x):
        d = optax.tree.sub(done.params, x)
        scale = jnp.minimum(1, max_norm / jnp.maximum(optax.tree.norm(d), 1e-12))
        # First what goes to the server, then what is kept per client, here for the metrics.
        return optax.tree.scale(scale, d), scale < 1

    program = fc.local_descent(client_optimizer, fc.value_and_grad(loss_fn), upload=upload)

    def update(state, cohort, key):
        results = clients.run(program, state.params, cohort, key)
        clipped = jnp.sum(results.outputs) / jnp.maximum(cohort.num_participants, 1)
        params = optax.tree.add(state.params, results.aggregate)
        return state._replace(params=params), results, ClippedMetrics(clipped)

    return fc.federated(fc.ModelState, update)  # the state is the model alone; all clients use it


# From here on: use it like any method of the library.
def loss_fn(params, batch, key):
    """Logistic regression, one loss per example, float[B]."""
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params["w"] + params["b"], batch["y"])


pixels, labels = load_digits(return_X_y=True)
examples = {"x": (pixels / 16).astype(np.float32), "y": labels.astype(np.int32)}
shards = np.array_split(np.argsort(labels, kind="stable"), 50)  # one or two digits per client
population = fc.Population.from_clients([{k: v[s] for k, v in examples.items()} for s in shards])
params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
sampler = fc.samplers.uniform(50, 10)


def run(method):
    """Final model and metrics of every round, from the same seed for every method."""
    state, metrics = jax.jit(fc.simulate(method, sampler, NUM_ROUNDS))(params, population, jax.random.key(0))
    return method.params(state), metrics


# A bound that no client reaches must leave plain FedAvg, and any bound must bound the server's step: an average of
# vectors is no longer than the longest of them.
same, _ = run(clipped_fedavg(loss_fn, optax.sgd(0.1), max_norm=1e6, batch_size=20))
plain, metrics = run(algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=20))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), same, plain)
print("with a huge bound it is FedAvg")

for bound in (0.5, 0.1):
    _, clipped = run(clipped_fedavg(loss_fn, optax.sgd(0.1), max_norm=bound, batch_size=20))
    assert np.all(np.asarray(clipped.update_norm) <= bound * (1 + 1e-5))
    print(
        f"bound {bound}: {clipped.extra.clipped.mean():.0%} of the uploads shortened, last training loss "
        f"{clipped.loss[-1]:.3f} (without a bound {metrics.loss[-1]:.3f})"
    )

# What every method of the library has to pass: plans, empty clients, vmap, dtypes, keys, uploads, metrics and more.
problem = testing.classification()


def make(*, lr=0.1, **settings):
    """The method on that problem, at the settings that the checks ask for."""
    return clipped_fedavg(problem.loss_fn, optax.sgd(lr), batch_size=4, **settings)


testing.check_algorithm(make, problem, floats={"lr": 0.1, "max_norm": 0.5})
print("it passes the checks of every method")
