"""FedJAX's FedAvg, one jitted client step after another, as is its default on one device.

FedJAX 0.0.17 is of 2023 and calls `jax.tree_map`, which JAX has removed since. One alias, and nothing else, makes it
run on current JAX. Its batches are always full: the last one of an epoch is filled up from the next.
"""

from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp

vars(jax)["tree_map"] = jax.tree.map

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

from benchmarks.peers import jax_models  # noqa: E402
from benchmarks.peers.worker import Recorder, Task  # noqa: E402


def run(task: Task, recorder: Recorder) -> None:
    workload, federation = task.workload, task.federation
    model = jax_models.make_model(workload, task.dropout, convolution="native")
    loss_fn = jax_models.make_loss(workload, model)
    gradient = jax.grad(lambda params, batch, key: jnp.mean(loss_fn(params, batch, key)))
    algorithm = fed_avg.federated_averaging(
        gradient,
        client_optimizer=fedjax.optimizers.sgd(workload.learning_rate),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=workload.batch_size, num_epochs=workload.num_epochs, skip_shuffle=not task.shuffled
        ),
    )
    data = fedjax.InMemoryFederatedData(
        {i: dict(zip("xy", federation.client(i), strict=True)) for i in range(workload.num_clients)}
    )
    state = algorithm.init(jax_models.load(model, task.parameters))
    recorder.ready(jax.default_backend(), {"fedjax": version("fedjax")} | jax_models.versions())

    for t, ids in enumerate(task.cohorts):
        keys = jax.random.split(jax.random.key(t), len(ids))
        clients = [(i, data.get_client(i), key) for i, key in zip(ids.tolist(), keys, strict=True)]
        state, diagnostics = algorithm.apply(state, clients)
        jax.block_until_ready((state.params, diagnostics))
        if not recorder.round_done(partial(jax_models.unload, state.params)):
            break
