"""From a configuration to everything a run needs, with every mistake found before anything is compiled."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import models
from fedjax_core import (
    Algorithm,
    Array,
    ClientTable,
    Examples,
    Key,
    LossFn,
    Plan,
    Population,
    Sampler,
    checks,
    samplers,
)
from pipelines import data, methods, partition
from pipelines.config import Config
from pipelines.data import Dataset
from pipelines.names import pick

EVAL_BATCH = 256


class Experiment(NamedTuple):
    """A configuration, built.

    Attributes:
      config: the configuration.
      dataset: the data set.
      population: its training part, split over the clients.
      test: its test part, leaves [m, ...].
      model: the model.
      metric_fn: `metric_fn(params, batch) -> {"loss": [B], "accuracy": [B]}`.
      loss_fn: `loss_fn(params, batch, key) -> [B]`.
      sampler: who takes part.
      algorithms: name to method, in the order they run.
      mesh: the devices, or None.
      keys: keys[S], one per seed, the same for every method: the same initial models, cohorts and batches.
    """

    config: Config
    dataset: Dataset
    population: Population
    test: Examples
    model: models.Model
    metric_fn: Callable[[Any, Any], dict[str, Array]]
    loss_fn: LossFn
    sampler: Sampler
    algorithms: dict[str, Algorithm]
    mesh: Mesh | None
    keys: Key

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of `keys`."""
        return list(range(self.config.first_seed, self.config.first_seed + self.config.seeds))


def _token_model(name: str, build: Callable[[int, int], models.Model], dataset: Dataset) -> models.Model:
    if not np.issubdtype(dataset.train["x"].dtype, np.integer):
        raise ValueError(
            f"model {name!r} reads tokens, but the inputs of {dataset.name} are {dataset.train['x'].dtype}"
            f"{list(dataset.input_shape)}: take mlp or logistic_regression, or a data set of text"
        )
    return build(dataset.num_classes, dataset.input_shape[0])


MODELS: dict[str, Callable[[Dataset, Config], models.Model]] = {
    "logistic_regression": lambda d, c: models.logistic_regression(d.input_shape, d.num_classes),
    "mlp": lambda d, c: models.mlp(d.input_shape, d.num_classes, hidden=c.hidden),
    "cnn": lambda d, c: models.cnn(d.input_shape, d.num_classes),
    "resnet18_gn": lambda d, c: models.resnet18_gn(d.input_shape, d.num_classes),
    "char_lstm": lambda d, c: _token_model("char_lstm", lambda vocab, length: models.char_lstm(vocab), d),
    "transformer": lambda d, c: _token_model(
        "transformer", lambda vocab, length: models.transformer(vocab, length, num_layers=2, dim=128, num_heads=4), d
    ),
}
"""Name to `build(dataset, config) -> Model`; the first paragraph of `models.<name>` describes it."""

SAMPLERS: dict[str, Callable[[Config, Population], Sampler]] = {
    "uniform": lambda c, p: samplers.uniform(p.num_clients, c.cohort_size),
    "weighted": lambda c, p: samplers.weighted(np.asarray(p.sizes), c.cohort_size),
    "full": lambda c, p: samplers.full(p.num_clients),
    "bernoulli": lambda c, p: samplers.bernoulli(c.participation, p.num_clients),
    "cyclic": lambda c, p: samplers.cyclic(p.num_clients, c.cohort_size),
    "periodic": lambda c, p: samplers.periodic(c.participation, c.period, p.num_clients),
    "markov": lambda c, p: samplers.markov(c.turn_on, c.turn_off, p.num_clients),
}
"""Name to `build(config, population) -> Sampler`; `fedjax_core.samplers.<name>` describes it."""

OPTIMIZERS: dict[str, Callable[[Any, float], optax.GradientTransformation]] = {
    "sgd": lambda lr, momentum: optax.sgd(lr, momentum or None),
    "adam": lambda lr, momentum: optax.adam(lr),
    "adamw": lambda lr, momentum: optax.adamw(lr),
}
"""Name to `build(learning_rate, momentum)`."""


def prepare(config: Config) -> Experiment:
    """Builds everything a run needs.

    Raises:
      ValueError: naming the argument, the value and the fix, for anything that cannot work: an unknown name, a
        partition that cannot be made, a cohort larger than the population, more devices than there are, a value a
        method refuses, a model that does not fit the data.
    """
    if (jnp.result_type(float) == jnp.float64) != config.x64:
        raise ValueError(
            f"x64={config.x64} but JAX runs in {jnp.result_type(float)}: call this within jax.enable_x64({config.x64})"
        )
    pick("model", config.model, MODELS)
    pick("sampler", config.sampler, SAMPLERS)
    pick("partition", config.partition, partition.PARTITIONS)
    pick("client optimizer", config.client_optimizer, OPTIMIZERS)
    dataset = in_precision(data.load(config.dataset))
    population = partition.federate(dataset, split(config, dataset))
    model = MODELS[config.model](dataset, config)
    mesh = _mesh(config.mesh)
    sequence = dataset.is_sequence
    loss_fn = models.losses.sequence_cross_entropy(model) if sequence else models.losses.cross_entropy(model)
    metric_fn = models.metrics.sequence(model) if sequence else models.metrics.classification(model)
    local = {
        "batch_size": config.batch_size,
        "num_epochs": config.epochs,
        "num_steps": config.steps,
        "order": config.order,
        "weights": config.weights,
        "plan": Plan(config.lanes, mesh),
    }
    experiment = Experiment(
        config=config,
        dataset=dataset,
        population=population,
        test=jax.tree.map(jnp.asarray, dataset.test),
        model=model,
        metric_fn=metric_fn,
        loss_fn=loss_fn,
        sampler=SAMPLERS[config.sampler](config, population),
        algorithms={
            name: methods.build(
                name,
                loss_fn,
                client_optimizer(config, name),
                num_clients=population.num_clients,
                settings=config.method_settings(name),
                local=local,
            )
            for name in config.methods
        },
        mesh=mesh,
        keys=jax.vmap(jax.random.key)(jnp.arange(config.first_seed, config.first_seed + config.seeds)),
    )
    for algorithm in experiment.algorithms.values():
        # Tracing one round finds what does not fit together, without compiling.
        jax.eval_shape(partial(_one_round, experiment, algorithm), population, experiment.keys)
    return experiment


def initial_states(experiment: Experiment, algorithm: Algorithm, keys: Key) -> Any:
    """The state of a method before the first round, for every seed: leaves [S, ...]."""

    def one(key: Key) -> Any:
        state = algorithm.init(experiment.model.init(run_keys(key)[0]))
        # A weakly typed leaf would come back strongly typed from the first round, which is another program.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), state)

    return jax.vmap(one)(keys)


def run_keys(key: Key) -> tuple[Key, Key]:
    """(key of the initial model, key of the rounds) of a seed's key."""
    init_key, rounds_key = jax.random.split(key)
    return init_key, rounds_key


def split(config: Config, dataset: Dataset) -> partition.Assignment:
    """The clients' examples, by the partition the configuration names."""
    function = partition.PARTITIONS[pick("partition", config.partition, partition.PARTITIONS)]
    options = {name: getattr(config, name) for name in partition_options(config.partition)}
    return function(dataset.train["y"], config.clients, seed=config.partition_seed, **options)


def partition_options(name: str) -> list[str]:
    """The fields of `Config` that a partition reads: its keyword arguments besides the seed."""
    parameters = inspect.signature(partition.PARTITIONS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seed"]


def client_optimizer(config: Config, method: str) -> Any:
    """The clients' optimizer for a method: an optax optimizer, or a function of the round giving one."""
    chosen = config.client_settings(method)
    lr, momentum, decay = chosen["client_lr"], chosen["client_momentum"], chosen["client_lr_decay"]
    if momentum and config.client_optimizer != "sgd":
        raise ValueError(
            f"client_momentum={momentum:g} means nothing to client_optimizer={config.client_optimizer!r}: use sgd, or "
            "leave the momentum out"
        )
    build = OPTIMIZERS[pick("client optimizer", config.client_optimizer, OPTIMIZERS)]
    return build(lr, momentum) if decay == 1 else lambda round: build(lr * decay**round, momentum)


def in_precision(dataset: Dataset) -> Dataset:
    """The data set with float inputs in JAX's current default precision."""

    def cast(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            k: v.astype(jnp.result_type(float)) if np.issubdtype(v.dtype, np.floating) else v for k, v in part.items()
        }

    return dataset._replace(train=cast(dataset.train), test=cast(dataset.test))


def predicted_memory(experiment: Experiment, method: str) -> dict[str, int]:
    """Bytes a run of a method will need, by what needs them.

    data: training and test examples. state: global models and rows of all clients, of all seeds. local training: per
    lane the model, its gradient, an update and the optimizer's state, and the values kept for the backward pass; per
    seed the sum of the uploads; per participant its rows of client state, old and new. evaluation: the values of the
    forward pass on one test batch, of all seeds. The values of a pass are those of the traced program, of which the
    compiler fuses many away, so this leans to the high side.
    """
    config, algorithm = experiment.config, experiment.algorithms[method]
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
    num_clients = experiment.population.num_clients
    nodes = jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, ClientTable))
    rows = jax.tree.leaves([node for node in nodes if isinstance(node, ClientTable)])
    slots = jax.eval_shape(experiment.sampler, jax.random.key(0), jnp.int32(0)).shape[0]
    opt = client_optimizer(config, method)
    opt_state = jax.eval_shape((opt(jnp.int32(0)) if callable(opt) else opt).init, params)
    # One step's program holds the whole mesh's lanes; a device has its share of them.
    lanes = Plan(config.lanes, experiment.mesh).lanes_per_device(slots * config.seeds)
    batch = jax.eval_shape(lambda e: jax.tree.map(lambda leaf: leaf[: config.batch_size], e), experiment.test)
    test_batch = jax.eval_shape(lambda e: jax.tree.map(lambda leaf: leaf[:EVAL_BATCH], e), experiment.test)

    def mean_loss(params: Any, batch: Any, key: Key) -> Array:
        return jnp.mean(experiment.loss_fn(params, batch, key))

    backward = _traced_bytes(jax.grad(mean_loss), params, batch, jax.random.key(0))
    model = _bytes(params)
    training = lanes * (3 * model + _bytes(opt_state) + backward) + config.seeds * model
    training += 2 * sum(_bytes(leaf) // num_clients for leaf in rows) * slots
    return {
        "data": _bytes(experiment.population) + _bytes(experiment.test),
        "state": _bytes(states),
        "local training": training,
        "evaluation": config.seeds * _traced_bytes(experiment.metric_fn, params, test_batch),
    }


def _one_round(experiment: Experiment, algorithm: Algorithm, population: Population, keys: Key) -> Any:
    states = initial_states(experiment, algorithm, keys)
    state = jax.tree.map(lambda leaf: leaf[0], states)
    return algorithm.round(state, population.cohort(experiment.sampler(keys[0], jnp.int32(0))), keys[0])


def _mesh(num_devices: int | None) -> Mesh | None:
    if num_devices is None:
        return None
    checks.positive_int("mesh", num_devices, "a mesh has at least one device")
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(
            f"mesh={num_devices} but there are {len(devices)} {devices[0].platform} devices: lower it (the processor "
            f"can stand in for several with JAX_NUM_CPU_DEVICES={num_devices})"
        )
    return Mesh(np.asarray(devices[:num_devices]), ("clients",))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def _traced_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of all intermediate values of a function, loops counted once."""
    return sum(
        math.prod(out.aval.shape) * _itemsize(out.aval.dtype)
        for equation in jax.make_jaxpr(function)(*args).eqns
        for out in equation.outvars
        if hasattr(out.aval, "shape")
    )
