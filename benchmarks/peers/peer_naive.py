"""Our own round as one writes it first in JAX: `vmap` over the clients of a `scan` over batches.

Every client is padded to the longest of the federation, so that it compiles once; padding is masked and computed all
the same. Convolutions are XLA's own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import jax_models
from benchmarks.peers.worker import Recorder, Task


def run(task: Task, recorder: Recorder) -> None:
    workload, federation = task.workload, task.federation
    batch_size = workload.batch_size
    model = jax_models.make_model(workload, task.dropout, convolution="native")
    loss_fn = jax_models.make_loss(workload, model)
    sizes = np.diff(federation.offsets)
    num_batches = -(-sizes.max() // batch_size)

    def padded(i):
        x, y = federation.client(i)
        fill = [(0, num_batches * batch_size - len(y))]
        x, y = (np.pad(leaf, fill + [(0, 0)] * (leaf.ndim - 1)) for leaf in (x, y))
        return {"x": x, "y": y}

    def local_training(params, client, size, key):
        def epoch(params, key):
            return local_epoch(params, client, size, key), None

        return jax.lax.scan(epoch, params, jax.random.split(key, workload.num_epochs))[0]

    def local_epoch(params, client, size, key):
        shuffle_key, loss_key = jax.random.split(key)
        place = jnp.arange(num_batches * batch_size)
        if task.shuffled:
            # Real examples in random order, then the padding.
            noise = jax.random.uniform(shuffle_key, place.shape)
            order = jnp.argsort(jnp.where(place < size, noise, 2))
            client = jax.tree.map(lambda leaf: leaf[order], client)

        def split(leaf):
            return leaf.reshape(num_batches, batch_size, *leaf.shape[1:])

        def step(params, inputs):
            batch, mask, key = inputs

            def mean(params):
                return jnp.sum(loss_fn(params, batch, key) * mask) / jnp.maximum(jnp.sum(mask), 1)

            gradient = jax.grad(mean)(params)
            return jax.tree.map(lambda p, g: p - workload.learning_rate * g, params, gradient), None

        inputs = jax.tree.map(split, (client, (place < size).astype(jnp.float32)))
        return jax.lax.scan(step, params, (*inputs, jax.random.split(loss_key, num_batches)))[0]

    @jax.jit
    def round_fn(params, clients, sizes, key):
        keys = jax.random.split(key, len(sizes))
        results = jax.vmap(local_training, (None, 0, 0, 0))(params, clients, sizes, keys)
        return jax.tree.map(lambda leaf: jnp.tensordot(sizes / jnp.sum(sizes), leaf, 1), results)

    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[padded(i) for i in range(len(sizes))])
    take = jax.jit(lambda data, ids: jax.tree.map(lambda leaf: leaf[ids], data))
    params = jax_models.load(model, task.parameters)
    recorder.ready(jax.default_backend(), jax_models.versions())

    for t, ids in enumerate(task.cohorts):
        params = round_fn(params, take(data, ids), sizes[ids].astype(np.float32), jax.random.key(t))
        jax.block_until_ready(params)
        executed = int(num_batches) * workload.num_epochs * len(ids)
        if not recorder.round_done(partial(jax_models.unload, params), lambda: executed):  # noqa: B023 (called at once)
            break
