"""From a configuration to everything a run needs, with every mistake found before anything is compiled."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import models
from algorithms.robustness.fal import pgd, robust
from fedjax_core import (
    Algorithm,
    Array,
    ClientTable,
    Examples,
    Groups,
    HostPopulation,
    Key,
    Metrics,
    Plan,
    Population,
    Sampler,
    Task,
    client_mesh,
    masks,
    num_bytes,
    num_scalars,
    run_events,
    samplers,
    split_tables,
    tasks,
)
from fedjax_core.algorithm import Phase
from fedjax_core.statistics import has_statistics, with_statistics
from fedjax_core.types import Params, PyTree
from pipelines.common import own
from pipelines.common.names import pick
from pipelines.configuration import methods
from pipelines.configuration.config import (
    CLIENT_SETTINGS,
    FEDERATION_FIELDS,
    MOST_DEVICES,
    Config,
    ParticipationConfig,
)
from pipelines.configuration.options import LIMIT
from pipelines.data import datasets
from pipelines.data.dataset import fits_single
from pipelines.data.datasets import Dataset
from pipelines.experiment import memory, own_model, views
from pipelines.federation import federations, skew
from pipelines.federation.federations import Federation

EVAL_BATCH = 256
_CSV_ROW = 100  # bytes of text for a round of a seed
_EVALUATION = 100  # bytes of scores, and of the numbers of rounds, for an evaluation of a seed
_MANY_STEPS = 10**9  # a thousand seconds of the very smallest
_DRAWN = 16  # bytes of numbers from which an example of a batch is drawn
ATTACK_STEPS = 10


class Experiment(NamedTuple):
    """A configuration, built.

    Attributes:
      config: the configuration.
      federation: who holds which examples of the data set.
      population: the clients' training examples, on the device or, staged, on the host.
      test: the data set's test part, leaves [m, ...].
      model: the model, of inputs as the data set has them; its parameters are `Variables` if it has statistics. Where
        clients differ in architecture, all models together: its parameters are a tuple, and it cannot be applied.
      metric_fn: `metric_fn(params, batch) -> {"loss": [B], "accuracy": [B]}`; here and in the next two a tuple of
        one for each architecture where clients differ in it.
      score_fn: the same for the test examples, with "robust_accuracy" too if the configuration asks for an attack.
      loss_fn: the task, which is called as `loss_fn(params, batch, key) -> [B]`.
      sampler: who takes part.
      algorithms: name to method, in the order they run.
      plan: how the hardware is used.
      make: `make(method, plan, rates={}) -> Algorithm`; the rates replace the configuration's options of the clients'
        optimizer and settings of the method. `client_lr` and numbers of the method may be traced, so that a `jax.vmap`
        sweeps them.
      keys: keys[S], one per seed, the same for every method: the same initial models, cohorts and batches.
    """

    config: Config
    federation: Federation
    population: Population | HostPopulation
    test: Examples
    model: models.Model | models.StatisticsModel
    metric_fn: Any
    score_fn: Any
    loss_fn: Any
    sampler: Sampler
    algorithms: dict[str, Algorithm]
    plan: Plan
    make: Callable[..., Algorithm]
    keys: Key

    @property
    def dataset(self) -> Dataset:
        """The data set, inputs as the clients see them."""
        return self.federation.dataset

    @property
    def mesh(self) -> Mesh | None:
        """The devices, or None."""
        return self.plan.mesh

    def of_each_model(self, params: Params) -> list[tuple[Task, Any, Params]]:
        """(task, score_fn, parameters) of the model, or of each where clients differ in architecture."""
        if not self.config.models:
            return [(self.loss_fn, self.score_fn, params)]
        return list(zip(self.loss_fn, self.score_fn, params, strict=True))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of `keys`."""
        return list(range(self.config.first_seed, self.config.first_seed + self.config.seeds))


def _token_model(name: str, build: Callable[[int, int], models.Model], dataset: Dataset) -> models.Model:
    if not dataset.is_sequence:
        rather = "transformer" if dataset.vocabulary_size else "mlp or logistic_regression, or a data set of text"
        raise ValueError(
            f"model {name!r} predicts the next token, but the inputs of {dataset.name} are "
            f"{dataset.train['x'].dtype}{list(dataset.input_shape)} with one label each: take {rather}"
        )
    return build(dataset.num_classes, dataset.input_shape[0])


def _transformer(dataset: Dataset) -> models.Model:
    """Two blocks 128 wide: of the next token, or of the class of a text."""
    build = partial(models.transformer, num_layers=2, dim=128, num_heads=4)
    if dataset.is_sequence or dataset.vocabulary_size is None:
        return _token_model("transformer", build, dataset)
    return build(
        dataset.vocabulary_size,
        dataset.input_shape[0],
        num_classes=dataset.num_classes,
        pad_token=dataset.pad_token,
    )


MODELS: dict[str, Callable[[Dataset, Config], models.Model | models.StatisticsModel]] = {
    "logistic_regression": lambda d, c: models.logistic_regression(d.input_shape, d.num_classes),
    "mlp": lambda d, c: models.mlp(d.input_shape, d.num_classes, hidden=c.hidden),
    "cnn": lambda d, c: models.cnn(d.input_shape, d.num_classes, convolution=c.machine.convolution),
    "cnn_bn": lambda d, c: models.cnn_bn(d.input_shape, d.num_classes, convolution=c.machine.convolution),
    "resnet18_gn": lambda d, c: models.resnet18_gn(d.input_shape, d.num_classes, convolution=c.machine.convolution),
    "char_lstm": lambda d, c: _token_model("char_lstm", lambda vocab, length: models.char_lstm(vocab), d),
    "transformer": lambda d, c: _transformer(d),
}
"""Name to `build(dataset, config) -> Model`; the first paragraph of `models.<name>` describes it."""

_OF_GROUPS: dict[str, Callable[[Dataset, Config], models.Model | models.StatisticsModel]] = {
    "cnn": lambda d, c: models.cnn(
        d.input_shape, d.num_classes, hidden=c.hidden[-1], convolution=c.machine.convolution
    ),
}
"""Those of `MODELS` that can have features of another width than their own, for one header of all groups of clients."""

SAMPLERS: dict[str, Callable[[ParticipationConfig, Population | HostPopulation], Sampler]] = {
    "uniform": lambda c, p: samplers.uniform(p.num_clients, c.cohort_size),
    "weighted": lambda c, p: samplers.weighted(np.asarray(p.sizes), c.cohort_size),
    "full": lambda c, p: samplers.full(p.num_clients),
    "bernoulli": lambda c, p: samplers.bernoulli(c.probability, p.num_clients),
    "cyclic": lambda c, p: samplers.cyclic(p.num_clients, c.cohort_size),
    "periodic": lambda c, p: samplers.periodic(c.probability, c.period, p.num_clients),
    "markov": lambda c, p: samplers.markov(c.turn_on, c.turn_off, p.num_clients),
}
"""Name to `build(participation, population) -> Sampler`; `fedjax_core.samplers.<name>` describes it."""

OPTIMIZERS: dict[str, Callable[[Any, float, float], optax.GradientTransformation]] = {
    "sgd": lambda lr, momentum, decay: _decaying(optax.sgd(lr, momentum or None), decay),
    "adam": lambda lr, momentum, decay: _decaying(optax.adam(lr), decay),
    "adamw": lambda lr, momentum, decay: optax.adamw(lr, weight_decay=decay) if decay else optax.adamw(lr),
}
"""Name to `build(learning_rate, momentum, weight_decay)`; weight decay is of the loss but for adamw, whose is its own
unless given."""


def _decaying(optimizer: optax.GradientTransformation, weight_decay: float) -> optax.GradientTransformation:
    """The optimizer of gradients to which weight_decay times the parameters are added."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optimizer) if weight_decay else optimizer


def prepare(config: Config, federation: Federation | None = None, *, plan: Plan | None = None) -> Experiment:
    """Builds everything a run needs.

    Args:
      config: the configuration.
      federation: what `federate(config)` gives, if that is there already; other methods and settings do not change it.
      plan: a plan for devices of another machine, for which the rounds are compiled and not run; then nothing is asked
        of the devices and the memory of this one.

    Raises:
      ValueError: naming the argument, the value and the fix, for anything that cannot work: an unknown name, a
        partition that cannot be made, a cohort larger than the population, more devices than there are, a value a
        method refuses, a model that does not fit the data.
    """
    if (jnp.result_type(float) == jnp.float64) != config.machine.x64:
        raise ValueError(
            f"x64={config.machine.x64} but JAX runs in {jnp.result_type(float)}: call this within "
            f"jax.enable_x64({config.machine.x64})"
        )
    for name in config.all_models:
        if not own.is_own(name):
            pick("model", name, MODELS)
    pick("sampler", config.participation.sampler, SAMPLERS)
    pick("client optimizer", config.local.client_optimizer, OPTIMIZERS)
    federation = federation or federate(config)
    held = federation.parts["validation"].assignment.rows if "validation" in federation.parts else ()
    if config.evaluation.validates and not len(held):
        raise ValueError(
            f"validation_share={config.federation.validation_share:g} leaves no client an example for validation, by "
            "which patience, stop_at and keep_best decide: raise it, or leave them out"
        )
    dataset = federation.dataset
    population = federation.host_population("train") if config.machine.staged else federation.population("train")
    if (held_by_server := federation.public_inputs) is not None:
        population = population.with_public({methods.UNLABELLED: held_by_server})
    built = tuple(
        datasets.normalized(_model(config, name, dataset), dataset.normalization) for name in config.all_models
    )
    model = _together(built) if config.models else built[0]
    own_name = next(filter(own.is_own, config.all_models), config.model)  # to explain errors by
    here = plan is None
    plan = plan or Plan(config.machine.lanes, _mesh(config.machine.mesh, config.machine.model_parallel))
    kind = {"kind": "sequence", "pad_id": dataset.pad_id} if dataset.is_sequence else {"kind": "classification"}
    of_models = tuple(models.task(each, **kind) for each in built)
    loss_fn, metric_fns = of_models[0], tuple(map(tasks.as_metric, of_models))
    score_fns = metric_fns
    if config.evaluation.attack_radius:
        score_fns = tuple(_under_attack(config, dataset, *each) for each in zip(of_models, metric_fns, strict=True))
    if config.models:
        _check_architectures(config, dataset, of_models, population.num_clients)
        groups = Groups.by_modulo(population.num_clients, len(of_models))

    def evaluated(params: Params, x: Array) -> Any:
        return loss_fn.outputs(params, {"x": x})

    def layer_inputs(params: Params, batch: Examples) -> dict[str, Array]:
        return models.capture.layer_inputs(evaluated)(params, batch["x"])

    @cache
    def layer_widths() -> dict[str, int]:
        one = jax.tree.map(lambda leaf: leaf[:1], dataset.test["x"])
        return models.capture.layer_widths(evaluated, jax.eval_shape(model.init, jax.random.key(0)), one)

    local = {
        "batch_size": config.local.batch_size,
        "num_epochs": config.local.epochs,
        "num_steps": config.local.steps,
        "order": config.local.order,
        "weights": config.local.weights,
    }

    def make(name: str, plan: Plan, rates: Mapping[str, Any] = MappingProxyType({})) -> Algorithm:
        functions: dict[str, Any] = {"num_classes": dataset.num_classes}
        if config.models:
            functions |= {"tasks": of_models, "groups": groups}
        else:
            functions |= {"task": loss_fn, "features": loss_fn.features, "logits": loss_fn.outputs}
            functions["inputs"] = layer_inputs
        if methods.asks_for(name, "layers"):  # traces the model, which takes half a second for a deep one
            functions["layers"] = layer_widths()
        method = methods.build(
            name,
            loss_fn,
            client_optimizer(config, name, rates),
            num_clients=population.num_clients,
            settings={key: value for key, value in config.method_settings(name).items() if key not in rates},
            local=local | {"plan": plan} | {key: value for key, value in rates.items() if key not in CLIENT_SETTINGS},
            model_functions=functions,
        )
        return method if config.models else _carrying(method, config, loss_fn, population.num_clients)

    seeds = range(config.first_seed, config.first_seed + config.seeds)
    experiment = Experiment(
        config=config,
        federation=federation,
        population=population,
        test=jax.tree.map(jnp.asarray, dataset.test),
        model=model,
        metric_fn=metric_fns if config.models else metric_fns[0],
        score_fn=score_fns if config.models else score_fns[0],
        loss_fn=of_models if config.models else loss_fn,
        sampler=SAMPLERS[config.participation.sampler](config.participation, population),
        algorithms={name: make(name, plan) for name in config.methods},
        plan=plan,
        make=make,
        # Their shapes only, until it is known that there is room for what has them.
        keys=jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(len(seeds), jnp.int32))),
    )
    views.check_names(config, experiment.algorithms)
    with own.explain_errors("model", own_name):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    largest = -(-int(np.max(population.sizes)) // config.local.batch_size)
    if (config.local.epochs or 0) * largest > LIMIT or int(np.max(population.sizes)) + config.local.batch_size > LIMIT:
        raise ValueError(
            f"epochs={config.local.epochs} of up to {largest} batches of batch_size={config.local.batch_size} are more "
            "than "
            f"{LIMIT} steps or examples of one client in a round, which devices cannot count: lower one of them"
        )
    for name, algorithm in experiment.algorithms.items():
        if config.machine.staged and (when := asks_everybody(algorithm)):
            raise ValueError(
                f"{name} asks all clients {when}, but staged=True brings only the clients of "
                "one round to the device: leave out --staged"
            )
        # Tracing one round finds what does not fit together, without compiling.
        with own.explain_errors("method", name), own.explain_errors("model", own_name):
            try:
                traced = jax.eval_shape(
                    partial(_one_round, experiment, algorithm), population_shapes(population), experiment.keys
                )
            except OverflowError as error:
                raise ValueError(
                    f"{name} on a model of {num_scalars(shapes)} parameters counts what does not fit into 32 bits "
                    f"({error}): take a smaller model, or smaller settings"
                ) from None
            _check_round(name, traced)
            if config.machine.staged and isinstance(getattr(traced[0], "statistics", None), ClientTable):
                raise ValueError(
                    f"{name} keeps statistics of every client, of which the global model has the mean, but staged=True "
                    "brings only the clients of one round to the device: leave out --staged, or average statistics"
                )
            _check_views(experiment, name)
        if not here:
            continue
        host, device = held_memory(experiment, name, traced[1][1])
        smaller = _smaller_model(config, dataset)
        if jax.default_backend() == "cpu":
            memory.refuse(name, host | device, memory.available(), smaller)
        else:
            memory.refuse(name, host, memory.available(), smaller)
            limits = jax.local_devices()[0].memory_stats() or {}
            memory.refuse(f"each device with {name}", device, limits.get("bytes_limit", math.inf), smaller)
    return experiment._replace(keys=jax.vmap(jax.random.key)(jnp.arange(seeds.start, seeds.stop)))


def _model(config: Config, name: str, dataset: Dataset) -> models.Model | models.StatisticsModel:
    """The model of that name, of inputs as the model sees them."""
    if own.is_own(name):
        return own_model.build(name, dataset)
    return ((_OF_GROUPS if config.models else {}).get(name) or MODELS[name])(dataset, config)


def _together(each: tuple[models.Model | models.StatisticsModel, ...]) -> models.Model:
    """Models of different architecture as one whose parameters are a tuple; which of them is applied a client knows."""

    def init(key: Key) -> tuple[Params, ...]:
        return tuple(model.init(jax.random.fold_in(key, number)) for number, model in enumerate(each))

    def apply(params: Params, x: Array, key: Key | None = None) -> Array:
        raise ValueError("the clients of this run differ in architecture: apply the model of one group")

    return models.Model(init, apply, apply)


def _check_architectures(config: Config, dataset: Dataset, of_models: tuple[Task, ...], num_clients: int) -> None:
    """Raises ValueError unless there are clients for all models, and these have features of one width."""
    said = f"models={list(config.models)}"
    if len(of_models) > num_clients:
        raise ValueError(f"{said} are {len(of_models)}, and there are {num_clients} clients: each model needs one")
    if dataset.is_sequence:
        raise ValueError(f"{said} meet in a header of classes, and {dataset.name} has no label for each example")
    one = jax.tree.map(lambda leaf: leaf[:1], dataset.test)
    widths = {}
    for name, task in zip(config.models, of_models, strict=True):
        assert task.features is not None
        with own.explain_errors("model", name):
            params = jax.eval_shape(task.init, jax.random.key(0))
            widths[name] = jax.eval_shape(task.features, params, one).shape[-1]
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        fixed = [width for name, width in widths.items() if name not in ("mlp", *_OF_GROUPS)]
        fix = f"give --hidden {fixed[0]}" if len(set(fixed)) == 1 else "take models of one width, such as mlp and cnn"
        raise ValueError(f"{said} have features of different widths ({listed}), and one header cannot fit all: {fix}")


def unlikely_classes(dataset: Dataset) -> str:
    """What to know of a data set with more classes than examples; an empty string if it has not."""
    examples = len(dataset.train["y"]) + len(dataset.test["y"])
    if dataset.is_sequence or dataset.num_classes <= examples:
        return ""
    largest = max(int(part["y"].max()) for part in (dataset.train, dataset.test))
    return (
        f"{dataset.name} has {dataset.num_classes:,} classes for {examples:,} examples (the largest label is "
        f"{largest:,}), and the model an output for each: number the classes from 0"
    )


def unused(config: Config, given: Collection[str]) -> list[str]:
    """Of the options that a user has given, those that mean nothing beside the others, in words."""
    samplers_of = {
        "cohort_size": ("uniform", "weighted", "cyclic"),
        "participation": ("bernoulli", "periodic"),
        "period": ("periodic",),
        "turn_on": ("markov",),
        "turn_off": ("markov",),
    }
    partitions_of = {
        field: tuple(name for name in federations.PARTITIONS if field in federations.options(name))
        for field in FEDERATION_FIELDS
    }
    reading = [("sampler", field, names) for field, names in samplers_of.items()]
    if config.federation.directory is None:
        reading += [("partition", field, names) for field, names in partitions_of.items() if names]
        reading += [("feature_skew", "severity", tuple(skew.SKEWS))]
    chosen = config.flat()
    if not (config.models or own.is_own(config.model)):
        reading += [("model", "hidden", ("mlp",)), ("model", "statistics", ("cnn_bn",))]
    public = []
    if config.models and "model" in given:
        public.append(f"--model means nothing beside --models {','.join(config.models)}")
    if "public_share" in given and config.federation.public_share:
        takers = [name for name in methods.names() if methods.asks_for(name, "public")]
        if not any(methods.asks_for(name, "public") for name in config.methods):
            public.append(
                f"--public-share keeps examples from the clients, and none of {', '.join(config.methods)} takes public "
                f"data: it is for {', '.join(takers)}"
            )
    return public + [
        f"--{field.replace('_', '-')} means nothing to {by.replace('_', ' ')} {chosen[by]}: it is for "
        f"{', '.join(names)}"
        for by, field, names in reading
        if field in given and chosen[by] not in names
    ]


def much_local_work(experiment: Experiment) -> str:
    """What to know of a run that can hardly be waited for or stopped; an empty string if it is none."""
    config = experiment.config
    largest = int(np.max(experiment.population.sizes))
    each = config.local.steps or (config.local.epochs or 0) * -(-largest // config.local.batch_size)
    slots = jax.eval_shape(experiment.sampler, jax.random.key(0), jnp.int32(0)).shape[0]
    steps = each * slots * config.seeds * min(config.evaluation.eval_every, config.rounds)
    if steps < _MANY_STEPS or not any(map(methods.takes_local_work, config.methods)):
        return ""
    return (
        f"up to {steps:,} local steps lie between two evaluations ({each:,} of a client in a round), and a run stops "
        "and saves at evaluations only: lower --epochs, --steps or --eval-every if that was not meant"
    )


def _smaller_model(config: Config, dataset: Dataset) -> str:
    """What makes the model smaller, in words."""
    if said := unlikely_classes(dataset):
        return said
    wide = f" (--hidden is {','.join(map(str, config.hidden))})" if config.model == "mlp" else ""
    return f"take a smaller model{wide}"


def held_memory(experiment: Experiment, method: str, metrics: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a run holds whatever a compiler makes of it, ({in host memory}, {on each device}).

    On a processor both lie in the same memory, and what each of its devices holds is counted for all of them. What is
    there already, the data set and its copy on the first device, is not counted.

    curves: metrics of all rounds and evaluations of all methods, their copy while they grow, and metrics.csv. cohorts:
    staged, examples of two cohorts, and who takes part in some rounds. client state: rows of all clients. state:
    global models of all seeds. local training: model, gradient and update of one client, the optimizer's state, and a
    batch. chunk: metrics of the rounds of one call. data: examples on the other devices of a mesh.

    Args:
      experiment: the experiment; shapes of keys suffice.
      method: name of the method.
      metrics: shapes of the metrics of one round of one seed.
    """
    config, algorithm, plan = experiment.config, experiment.algorithms[method], experiment.plan
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
    rows = num_bytes(jax.tree.leaves(split_tables(states)[1]))
    opt = client_optimizer(config, method)
    opt_state = jax.eval_shape((opt(jnp.int32(0)) if callable(opt) else opt).init, params)
    example = num_bytes(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), experiment.test))
    each, evaluations = num_bytes(metrics), -(-config.rounds // config.evaluation.eval_every)
    together = plan.num_devices if jax.default_backend() == "cpu" else 1
    staged = isinstance(experiment.population, HostPopulation)
    slots = jax.eval_shape(experiment.sampler, jax.random.key(0), jnp.int32(0)).shape[0]
    curves = config.seeds * (config.rounds * (each + _CSV_ROW) + evaluations * _EVALUATION)
    host = {
        "curves": (len(config.methods) + 1) * curves,
        "cohorts": _training_bytes(experiment, slots) + 8 * slots * config.seeds if staged else 0,
    }
    device = {
        "client state": rows if staged or together > 1 else rows // plan.num_devices,
        "state": together * (num_bytes(states) - rows),
        "local training": together * (3 * num_bytes(params) + num_bytes(opt_state))
        + config.local.batch_size * (example + _DRAWN),
        "chunk": together * config.seeds * min(config.evaluation.eval_every, config.rounds) * each,
        "data": 0 if staged or plan.mesh is None else together * num_bytes(experiment.population),
    }
    if staged and jax.default_backend() != "cpu":
        host["client state"] = device.pop("client state")
    return host, device


def _under_attack(
    config: Config, dataset: Dataset, loss_fn: Task, metric_fn: Callable[[Any, Any], dict[str, Array]]
) -> Callable[[Any, Any], dict[str, Array]]:
    """The metrics, and the accuracy on inputs that an attack has moved to raise the loss."""
    x = dataset.train["x"]
    if dataset.is_sequence or np.issubdtype(x.dtype, np.signedinteger):
        raise ValueError(
            f"attack_radius={config.evaluation.attack_radius:g}, but the inputs of {dataset.name} are "
            f"{x.dtype}{list(x.shape[1:])}, which cannot be moved a little: leave it out, or take images or "
            "measurements"
        )
    in_unit = x.dtype == np.uint8 or (x.min() >= 0 and x.max() <= 1)
    attack = pgd(
        loss_fn,
        rho=config.evaluation.attack_radius,
        step_size=config.evaluation.attack_radius / 4,
        attack_steps=ATTACK_STEPS,
        low=0.0 if in_unit else -math.inf,
        high=1.0 if in_unit else math.inf,
    )
    attacked = robust(metric_fn, attack)

    def score(params: Params, batch: Examples, mask: Any = None) -> dict[str, Any]:
        clean = masks.call(metric_fn, params, batch, mask=mask)
        return {**clean, "robust_accuracy": attacked(params, batch, mask)["accuracy"]}

    return score


def _carrying(algorithm: Algorithm, config: Config, task: Task, num_clients: int) -> Algorithm:
    """The method, with what the configuration says of a model's statistics; one that carries them itself as it is."""
    if not task.has_statistics or has_statistics(algorithm):
        return algorithm
    rule = config.local.statistics
    return with_statistics(algorithm, rule, num_clients=num_clients if rule == "personal" else None)


def initial_states(experiment: Experiment, algorithm: Algorithm, keys: Key) -> PyTree:
    """The state of a method before the first round, for every seed: leaves [S, ...]."""

    def one(key: Key) -> Any:
        init_key = run_keys(key)[0]
        state = algorithm.init(experiment.model.init(init_key), jax.random.fold_in(init_key, 1))
        # A weakly typed leaf would come back strongly typed from the first round, which is another program.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), state)

    return jax.vmap(one)(keys)


def begun(algorithm: Algorithm, states: PyTree, population: Population, keys: Key) -> PyTree:
    """States [S, ...] after what a method does before its first round, an exploration say; all clients are asked."""
    return _after_events(algorithm, "before", states, population, keys)


def ended(algorithm: Algorithm, states: PyTree, population: Population, keys: Key) -> PyTree:
    """States [S, ...] after what a method does after its last round, a calibration say; all clients are asked."""
    return _after_events(algorithm, "after", states, population, keys)


def _after_events(algorithm: Algorithm, when: Phase, states: PyTree, population: Population, keys: Key) -> PyTree:
    if not algorithm.events_at(when):
        return states
    rounds_keys = jax.vmap(lambda key: run_keys(key)[1])(keys)
    return jax.vmap(partial(beside_rounds, algorithm, when), (0, None, 0))(states, population, rounds_keys)


_BESIDE: Mapping[Phase, int] = {"before": 0xE8, "after": 0xAF}


def beside_rounds(algorithm: Algorithm, when: Phase, state: PyTree, population: Population, rounds_key: Key) -> PyTree:
    """The state after a method's events before the first or after the last round; all clients are asked.

    Args:
      algorithm: the method.
      when: "before" or "after".
      state: of one seed.
      population: the clients.
      rounds_key: the key of the rounds, from which that of the events is made.
    """
    cohort = population.cohort(jnp.arange(population.num_clients))
    # A key of its own: the rounds split theirs.
    return run_events(algorithm, when, state, cohort, jax.random.fold_in(rounds_key, _BESIDE[when]))


def asks_everybody(algorithm: Algorithm) -> str:
    """When the method asks all clients for something beside its rounds, in words; an empty string if it does not."""
    times: dict[Phase, str] = {"before": "before the first round", "after": "after the last round"}
    return " and ".join(words for when, words in times.items() if algorithm.events_at(when))


def run_keys(key: Key) -> tuple[Key, Key]:
    """(key of the initial model, key of the rounds) of a seed's key."""
    init_key, rounds_key = jax.random.split(key)
    return init_key, rounds_key


def federate(config: Config) -> Federation:
    """The federation that the configuration names or describes, inputs in JAX's current default precision.

    Raises:
      ValueError: as `pipelines.data.datasets.load`, and `build` and `load` of `pipelines.federation.federations`; and
        if a saved federation is not the one of the configuration.
    """
    text = {"sequence_length": config.data.sequence_length, "vocabulary": config.data.vocabulary}
    known = datasets.options(config.data.dataset, config.data.data_dir)
    asked: dict[str, Any] = {name: value for name, value in text.items() if name in known}
    # Single or double precision must not make another federation: cast what has been built.
    built = _build_or_load(config, datasets.load(config.data.dataset, config.data.data_dir, **asked))
    return built._replace(dataset=in_precision(built.dataset))


def _build_or_load(config: Config, dataset: Dataset) -> Federation:
    if config.federation.directory is None:
        built = federations.build(config, dataset)
        if config.federation.digest is not None and built.digest() != config.federation.digest:
            raise ValueError(
                f"federation_digest={config.federation.digest} is wanted, and these choices make the federation "
                f"{built.digest()}: the data set or one of the choices is another than when it was pinned; leave the "
                "digest out to take this one"
            )
        return built
    fields, digest = federations.read(config.federation.directory)
    own = config.federation_fields()
    for name, value in fields.items():
        if own[name] != value:
            raise ValueError(
                f"{name}={own[name]!r}, but the federation in {config.federation.directory} was made with {value!r}: "
                "take its values, or another federation"
            )
    if config.federation.digest not in (None, digest):
        raise ValueError(
            f"the federation in {config.federation.directory} has digest {digest}, and {config.federation.digest} is "
            "wanted: it has been made anew since, restore the other one"
        )
    return federations.load(config.federation.directory, dataset)


def client_optimizer(config: Config, method: str, rates: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The clients' optimizer for a method: an optax optimizer, or a function of the round giving one.

    Args:
      config: the configuration.
      method: name of the method.
      rates: `client_lr`, which may be traced, `client_momentum`, `client_lr_decay` and `client_weight_decay` instead of
        the configuration's.
    """
    lr, momentum, decay, weight_decay = ({**config.client_settings(method), **rates}[name] for name in CLIENT_SETTINGS)
    if momentum and config.local.client_optimizer != "sgd":
        raise ValueError(
            f"client_momentum={momentum:g} means nothing to client_optimizer={config.local.client_optimizer!r}: "
            "use sgd, or "
            "leave the momentum out"
        )
    build = OPTIMIZERS[pick("client optimizer", config.local.client_optimizer, OPTIMIZERS)]
    if decay == 1:
        return build(lr, momentum, weight_decay)
    return lambda round: build(lr * decay**round, momentum, weight_decay)


def in_precision(dataset: Dataset) -> Dataset:
    """The data set with float inputs in JAX's current default precision.

    Raises:
      ValueError: if that makes a finite number infinite.
    """

    def cast(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, values in part.items() if jnp.result_type(float) == jnp.float32 else ():
            fits_single(np.asarray(values), f"{dataset.name}[{name!r}]")
        return {
            k: v.astype(jnp.result_type(float)) if np.issubdtype(v.dtype, np.floating) else v for k, v in part.items()
        }

    return dataset._replace(train=cast(dataset.train), test=cast(dataset.test))


def predicted_memory(experiment: Experiment, method: str) -> dict[str, int]:
    """Bytes a run of a method will need on each device, by what needs them.

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
    rows = jax.tree.leaves(split_tables(states)[1])
    slots = jax.eval_shape(experiment.sampler, jax.random.key(0), jnp.int32(0)).shape[0]
    staged = isinstance(experiment.population, HostPopulation)
    opt = client_optimizer(config, method)
    opt_state = jax.eval_shape((opt(jnp.int32(0)) if callable(opt) else opt).init, params)
    # One step's program holds the whole mesh's lanes; a device has its share of them, and of the tables' rows.
    lanes = experiment.plan.lanes_per_device(slots * config.seeds)
    table = num_bytes(rows) - num_bytes(rows) // experiment.plan.num_devices
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.local.batch_size, *leaf.shape[1:]), leaf.dtype), experiment.test
    )
    test_batch = jax.eval_shape(lambda e: jax.tree.map(lambda leaf: leaf[:EVAL_BATCH], e), experiment.test)

    def mean_loss(task: Task, params: Params, batch: Examples, key: Key) -> Array:
        return jnp.mean(masks.call(task, params, batch, key))

    each = experiment.of_each_model(params)
    backward = max(_traced_bytes(jax.grad(partial(mean_loss, t)), p, batch, jax.random.key(0)) for t, _, p in each)
    model = num_bytes(params)
    training = lanes * (3 * model + num_bytes(opt_state) + backward) + config.seeds * model
    training += 2 * sum(num_bytes(leaf) // num_clients for leaf in rows) * slots
    return {
        "data": _training_bytes(experiment, slots) + num_bytes(experiment.test),
        "state": num_bytes(states) - (num_bytes(rows) if staged else table),
        "local training": training,
        "evaluation": config.seeds * max(_traced_bytes(score, own, test_batch) for _, score, own in each),
    }


def memory_fix(experiment: Experiment, method: str) -> str:
    """How a run of a method needs less memory, by what it needs most of."""
    config, parts = experiment.config, dict(predicted_memory(experiment, method))
    smaller = _smaller_model(config, experiment.dataset)
    if not config.machine.staged and not asks_everybody(experiment.algorithms[method]):
        states = jax.eval_shape(partial(initial_states, experiment, experiment.algorithms[method]), experiment.keys)
        rows = num_bytes(jax.tree.leaves(split_tables(states)[1]))
        if rows > parts["state"] / 2 and rows > parts["local training"] + parts["evaluation"]:
            return f"keep the state of clients in host memory with --staged, or {smaller}"
        if parts["data"] > sum(parts.values()) / 2:
            return "keep the examples in host memory with --staged"
    fix = memory.fix({name: parts[name] for name in ("state", "local training", "evaluation")}, smaller)
    return f"{fix}, or lower --cohort-size" if config.machine.staged else fix


def _one_round(experiment: Experiment, algorithm: Algorithm, population: Population, keys: Key) -> Any:
    states = initial_states(experiment, algorithm, keys)
    state = jax.tree.map(lambda leaf: leaf[0], states)
    return state, algorithm.round(state, population.cohort(experiment.sampler(keys[0], jnp.int32(0))), keys[0])


def _check_round(name: str, traced: Any) -> None:
    """Says what is wrong with the round of a user's own method: the next one starts from what it returns.

    Args:
      name: of the method.
      traced: what `_one_round` gives.
    """
    before, after = traced
    if not (isinstance(after, tuple) and len(after) == 2 and isinstance(after[1], Metrics)):
        raise ValueError(
            f"the round of {name!r} returns {type(after).__name__}: return (state, metrics), the metrics from "
            "fedjax_core.round_metrics"
        )
    state = after[0]
    if not hasattr(state, "round"):
        raise ValueError(f"the state of {name!r} has no field 'round': add one, int32[], and count the rounds in it")
    old: Any = jax.tree_util.tree_flatten_with_path(before)
    new: Any = jax.tree_util.tree_flatten_with_path(state)
    if old[1] != new[1]:
        raise ValueError(
            f"the round of {name!r} returns a state of another structure than its init: {new[1]} and not {old[1]}"
        )
    for (path, leaf), (_, then) in zip(old[0], new[0], strict=True):
        if (leaf.shape, leaf.dtype) != (then.shape, then.dtype):
            raise ValueError(
                f"the round of {name!r} makes state{jax.tree_util.keystr(path)} {then.dtype}{list(then.shape)} from "
                f"{leaf.dtype}{list(leaf.shape)}: keep shapes and dtypes as init gives them"
            )


def _check_views(experiment: Experiment, name: str) -> None:
    """Raises ValueError if a view of a method cannot be evaluated in this run."""
    config, algorithm = experiment.config, experiment.algorithms[name]
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
    if views.evaluated(config, algorithm).of_clients(algorithm, states):
        try:
            views.own_tests(config, experiment.federation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    rows = split_tables(states)[1]
    if config.machine.staged and config.evaluation.validates and views.keeps_states(config, algorithm) and rows:
        raise ValueError(
            f"{name} keeps rows of all clients, and staged=True with patience, stop_at or keep_best would keep them "
            "three times: evaluate the global model alone (evaluate global), or leave one of these out"
        )


def population_shapes(population: Population | HostPopulation) -> Any:
    """What tracing a round needs to know of a population."""
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    offsets: Any = jax.ShapeDtypeStruct((population.num_clients + 1,), jnp.int32)
    return Population(jax.tree.map(of, population.examples), offsets, jax.tree.map(of, population.public))


def _training_bytes(experiment: Experiment, slots: int) -> int:
    """Bytes of training examples on the device: all of them, or two of the largest cohorts that there can be."""
    population = experiment.population
    if not isinstance(population, HostPopulation):
        return num_bytes(population)
    largest = np.sort(population.sizes)[::-1][: slots * experiment.config.seeds].sum()
    each = sum(leaf.dtype.itemsize * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(population.examples))
    return 2 * int(largest) * each


def _mesh(num_devices: int | None, model_parallel: int) -> Mesh | None:
    if num_devices is None and jax.process_count() == 1:
        return None
    devices = jax.devices()
    if num_devices is not None and num_devices > len(devices):
        stand_in = f" (the processor can stand in for several with JAX_NUM_CPU_DEVICES={num_devices})"
        raise ValueError(
            f"mesh={num_devices} but there are {len(devices)} {devices[0].platform} devices: lower it"
            f"{stand_in if num_devices <= MOST_DEVICES else ''}"
        )
    return client_mesh(num_devices, model=model_parallel)


def _traced_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of all intermediate values of a function, loops counted once."""
    equations = jax.make_jaxpr(function)(*args).eqns
    return num_bytes([out.aval for equation in equations for out in equation.outvars if hasattr(out.aval, "shape")])
