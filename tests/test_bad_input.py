"""Bad input: each row a mistake, the error it must raise, and words the message must hold (argument, value, fix)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.parts.options import grouped
from algorithms.robustness.fal import pgd
from fedjax_core import (
    ClientProgram,
    HostPopulation,
    Plan,
    Population,
    checks,
    continue_staged,
    evaluate,
    for_each_client,
    init_on_host,
    local_work,
    samplers,
    simulate,
    simulate_staged,
)
from pipelines.configuration import config, methods
from pipelines.data import datasets
from pipelines.experiment import setup
from pipelines.federation import partition
from pipelines.run import train
from tests.problems import softmax_features, softmax_loss, softmax_params, softmax_population

SGD = optax.sgd(0.1)


def population():
    return softmax_population((3, 2, 4))


def fedavg(loss=softmax_loss, optimizer=SGD, **settings):
    return algorithms.fedavg(loss, optimizer, **settings)


def moon(features=softmax_features, **settings):
    return algorithms.moon(softmax_loss, SGD, features=features, num_clients=3, **settings)


def fedld(logits=lambda params, batch, key: batch["x"], **settings):
    return algorithms.fedld(softmax_loss, SGD, logits=logits, **settings)


def fot(inputs=lambda params, batch: {"w": batch["x"]}, **settings):
    return algorithms.fot(softmax_loss, SGD, inputs=inputs, **({"layers": {"w": 5}} | settings))


def end_of_task(algorithm):
    state = algorithm.init(softmax_params())
    return jax.eval_shape(
        algorithm.events["end_task"].run, state, population().cohort(np.array([0, 1])), jax.random.key(0)
    )


def fzoos(**settings):
    return algorithms.fzoos(softmax_loss, SGD, num_clients=3, **grouped(algorithms.fzoos, settings))


def fedstale(**settings):
    return algorithms.fedstale(softmax_loss, SGD, num_clients=3, **settings)


def one_round(algorithm, params=None, ids=(0, 1)):
    state = algorithm.init(softmax_params() if params is None else params)
    return jax.eval_shape(algorithm.round, state, population().cohort(np.asarray(ids)), jax.random.key(0))


def examples(**changes):
    return {"x": np.zeros((4, 2)), "y": np.zeros(4, np.int32)} | changes


def run_program(**parts):
    program = ClientProgram(
        lambda s, i, k: jnp.zeros(2), lambda s, c, b: (c, jnp.zeros(())), lambda s, c: (c, ())
    )._replace(**parts)
    cohort = population().cohort([0])
    return for_each_client(program, (), cohort, jax.random.key(0), work=local_work())


def host():
    on_device = population()
    return HostPopulation.from_flat(jax.tree.map(np.asarray, on_device.examples), np.asarray(on_device.offsets))


def staged(population, num_clients=3, axis=0):
    algorithm = algorithms.scaffold(softmax_loss, SGD, num_clients=num_clients)
    if not isinstance(population, HostPopulation):
        return simulate_staged(algorithm, samplers.full(3), 1)(softmax_params(), population, jax.random.key(0))
    state = init_on_host(algorithm.init, softmax_params(), num_clients=num_clients, axis=axis)
    return continue_staged(algorithm, samplers.full(3), 1)(state, population, jax.random.key(0))


def mesh(size):
    return jax.make_mesh((size,), ("clients",), devices=jax.devices()[:size])


TABLE = [
    # names
    ("unknown method", lambda: methods.describe("fedavgg"), ["fedavgg", "fedavg"]),
    ("unknown model", lambda: setup.prepare(config.Config(model="mpl", x64=True)), ["mpl", "mlp"]),
    ("unknown data set", lambda: datasets.load("digitz"), ["digitz", "digits"]),
    # staged populations
    ("rows out of range", lambda: HostPopulation.from_sizes(examples(), [2], [0, 4]), ["rows", "4", "0 to 3"]),
    ("rows of floats", lambda: HostPopulation.from_sizes(examples(), [2], [0.0, 1.0]), ["rows", "float64", "integers"]),
    ("offsets past the rows", lambda: HostPopulation.from_sizes(examples(), [3], [0, 1]), ["3", "rows 0 to 2"]),
    ("in-memory population staged", lambda: staged(population()), ["Population", "HostPopulation", "simulate"]),
    ("tables of other clients", lambda: staged(host(), num_clients=5), ["5 rows", "3 clients", "num_clients"]),
    ("rows along another axis", lambda: staged(host(), axis=1), ["num_clients=3", "axis 1"]),
    # cohorts
    ("cohort larger than population", lambda: samplers.uniform(5, 6), ["cohort_size=6", "5", "lower"]),
    ("duplicate ids", lambda: population().cohort([0, 1, 0]), ["ids", "client 0", "one slot"]),
    ("id out of range", lambda: population().cohort([0, 3]), ["ids", "3", "0 to 2"]),
    ("negative id that is not -1", lambda: population().cohort([-2]), ["ids", "-2", "-1 for an empty slot"]),
    ("ids not integers", lambda: population().cohort([0.5]), ["ids", "float", "integers"]),
    ("ids of two dimensions", lambda: population().cohort([[0, 1]]), ["ids", "[1, 2]", "1-d"]),
    ("schedule with a duplicate", lambda: samplers.schedule([[1, 1]]), ["client 1", "round 0", "once"]),
    ("schedule of floats", lambda: samplers.schedule([[0.0, 1.0]]), ["cohorts", "float64", "-1"]),
    ("empty cohort", lambda: samplers.uniform(5, 0), ["cohort_size", "0", "at least 1"]),
    # probabilities
    ("probability above 1", lambda: samplers.bernoulli([0.5, 1.5]), ["probabilities", "1.5", "[0, 1]"]),
    ("probability below 0", lambda: samplers.markov(-0.1, 0.5, 3), ["turn_on", "-0.1", "[0, 1]"]),
    ("probability NaN", lambda: samplers.periodic(np.nan, 10, 3), ["probabilities", "nan", "[0, 1]"]),
    ("one probability, unknown clients", lambda: samplers.bernoulli(0.5), ["probabilities", "num_clients"]),
    ("chain that never moves", lambda: samplers.markov(0.0, 0.0, 3), ["turn_on", "turn_off", "positive"]),
    ("half a tick", lambda: samplers.deliveries([0.5, 1.0], 3, buffer=1), ["times", "float64", "0.5", "ticks"]),
    ("buffer and interval", lambda: samplers.deliveries([1, 2], 3, buffer=1, interval=2), ["buffer=1", "interval=2"]),
    ("negative sampling weight", lambda: samplers.weighted([1.0, -1.0], 1), ["weights", "-1", "at least 0"]),
    ("too few positive weights", lambda: samplers.weighted([1.0, 0.0], 2), ["cohort_size=2", "1", "lower"]),
    # populations
    ("negative size", lambda: Population.from_sizes(examples(), [5, -1]), ["sizes", "-1", "at least 0"]),
    ("size not an integer", lambda: Population.from_sizes(examples(), [1.5, 2.5]), ["sizes", "1.5", "integers"]),
    ("decreasing offsets", lambda: Population.from_flat(examples(), [0, 3, 2, 4]), ["offsets", "client 1", "negative"]),
    ("offsets not covering", lambda: Population.from_flat(examples(), [0, 3]), ["offsets", "3", "4", "cover"]),
    ("offsets not from 0", lambda: Population.from_flat(examples(), [1, 4]), ["offsets", "1", "starting at 0"]),
    ("offsets of floats", lambda: Population.from_flat(examples(), [0.0, 4.0]), ["offsets", "float64", "integers"]),
    (
        "leading axes differ",
        lambda: Population.from_flat(examples(y=np.zeros(3)), [0, 4]),
        ["['x'] has 4", "['y'] has 3"],
    ),
    ("scalar leaf", lambda: Population.from_flat(examples(z=1.0), [0, 4]), ["['z']", "scalar", "leading axis"]),
    ("no examples at all", lambda: Population.from_flat({}, [0, 4]), ["examples", "without arrays", "pass"]),
    ("no clients", lambda: Population.from_clients([]), ["clients", "empty", "pass"]),
    (
        "clients of different shape",
        lambda: Population.from_clients([examples(), examples(x=np.zeros((4, 3)))]),
        ["clients[1]['x']", "[0, 3]", "[0, 2]"],
    ),
    (
        "clients of different structure",
        lambda: Population.from_clients([examples(), {"x": np.zeros((4, 2))}]),
        ["clients[0]", "clients[1]", "['y']"],
    ),
    (
        "NaN in data",
        lambda: Population.from_flat(examples(x=np.full((4, 2), np.nan)), [0, 4]),
        ["['x']", "8", "(0, 0)"],
    ),
    ("label out of range", lambda: checks.labels([0, 1, 7], 3), ["labels", "7", "position 2", "num_classes"]),
    ("labels of floats", lambda: checks.labels([0.0], 3), ["labels", "float64", "integers"]),
    # local work
    ("zero epochs", lambda: fedavg(num_epochs=0), ["num_epochs", "0", "at least 1"]),
    ("zero steps for one client", lambda: fedavg(num_steps=np.array([1, 0])), ["num_steps", "0", "cohort"]),
    ("batch size 0", lambda: fedavg(batch_size=0), ["batch_size", "0", "at least"]),
    ("batch size not an integer", lambda: fedavg(batch_size=2.5), ["batch_size", "2.5", "integer"]),
    ("epochs and steps", lambda: fedavg(num_epochs=1, num_steps=2), ["num_epochs=1", "num_steps=2", "leave one out"]),
    ("unknown order", lambda: fedavg(order="random"), ["order", "'random'", "'shuffled'"]),
    ("unknown weights", lambda: fedavg(weights="size"), ["weights", "'size'", "'examples'"]),
    ("negative weights", lambda: one_round(fedavg(weights=np.array([1.0, -1, 1]))), ["weights", "-1", "non-negative"]),
    ("weights of two dimensions", lambda: one_round(fedavg(weights=np.ones((3, 1)))), ["weights", "(3, 1)", "one"]),
    ("epochs for fedsgd", lambda: algorithms.fedsgd(softmax_loss, SGD, num_epochs=2), ["num_epochs=2", "leave it out"]),
    # losses and optimizers
    (
        "mean loss",
        lambda: one_round(fedavg(lambda p, b, k: jnp.mean(softmax_loss(p, b, k)))),
        ["loss_fn", "float[20]", "[]"],
    ),
    ("loss per class", lambda: one_round(fedavg(lambda p, b, k: b["x"] @ p["w"])), ["loss_fn", "[20, 3]", "one loss"]),
    ("loss of tuples", lambda: one_round(fedavg(lambda p, b, k: (softmax_loss(p, b, k), 0))), ["loss_fn", "tuple"]),
    ("optimizer that is none", lambda: one_round(fedavg(optimizer=lambda t: 0.1)), ["client_optimizer", "optax.sgd"]),
    # hyper-parameters
    ("negative server_lr", lambda: fedavg(server_lr=-1.0), ["server_lr", "-1", "[0, inf]"]),
    ("momentum of 1", lambda: algorithms.fedavgm(softmax_loss, SGD, momentum=1.0), ["momentum", "1", "[0, 1)"]),
    ("alpha of 0", lambda: algorithms.fedcm(softmax_loss, SGD, alpha=0.0), ["alpha", "0", "(0, 1]"]),
    ("momentum of 1 in Mime", lambda: algorithms.mime(softmax_loss, SGD, momentum=1.0), ["momentum", "1", "[0, 1)"]),
    ("lam of 0", lambda: algorithms.fedspeed(softmax_loss, SGD, num_clients=3, lam=0.0), ["lam", "0", "(0, inf]"]),
    ("negative rho", lambda: algorithms.fedgamma(softmax_loss, SGD, num_clients=3, rho=-0.1), ["rho", "-0.1"]),
    ("rho NaN", lambda: algorithms.fedsmoo(softmax_loss, SGD, num_clients=3, rho=np.nan), ["rho", "nan", "choose"]),
    (
        "unknown corrections",
        lambda: algorithms.fedspeed(softmax_loss, SGD, num_clients=3, corrections="some"),
        ["corrections", "'some'", "'cohort'"],
    ),
    ("beta of 0", lambda: algorithms.fedavg_m(softmax_loss, SGD, beta=0.0), ["beta", "0", "(0, 1]"]),
    ("unknown norm", lambda: algorithms.fal(softmax_loss, SGD, norm="l1"), ["norm", "'l1'", "'l2'"]),
    ("box upside down", lambda: algorithms.fal(softmax_loss, SGD, low=2.0), ["high", "[2, inf]", "1"]),
    (
        "attack on tokens",
        lambda: pgd(softmax_loss, rho=0.1, step_size=0.1, attack_steps=1)(0, examples(x=np.zeros((4, 2), int)), None),
        ["batch['x']", "int64", "uint8"],
    ),
    ("temperature of 0", lambda: moon(temperature=0.0), ["temperature", "0", "(0, inf]"]),
    (
        "features averaged over the batch",
        lambda: one_round(moon(features=lambda p, b, k: jnp.mean(b["x"], axis=0))),
        ["features", "float[20, ...]", "[5]", "do not average"],
    ),
    ("nothing kept", lambda: fedld(kept=0.0), ["kept", "0", "(0, 1]"]),
    ("penalty of nothing", lambda: fedld(penalty="none"), ["penalty", "'none'", "'batch'"]),
    (
        "logits averaged over the batch",
        lambda: one_round(fedld(logits=lambda p, b, k: jnp.mean(b["x"], axis=0))),
        ["logits", "float[20, C]", "[5]", "do not average"],
    ),
    ("unknown mode", lambda: algorithms.fedlex(softmax_loss, SGD, mode="all"), ["mode", "'all'", "'final_delta'"]),
    ("no patience", lambda: algorithms.fedlex(softmax_loss, SGD, patience=0), ["patience", "0", "one epoch"]),
    ("share of explorers", lambda: algorithms.fedlex(softmax_loss, SGD, explorers=2.0), ["explorers", "2", "[0, 1]"]),
    ("no direction", lambda: algorithms.fedzo(softmax_loss, SGD, num_directions=0), ["num_directions", "0", "one"]),
    ("difference of no length", lambda: algorithms.fedzo(softmax_loss, SGD, mu=0.0), ["mu", "0", "(0, inf]"]),
    ("negative pull", lambda: algorithms.fedprox_zo(softmax_loss, SGD, proximal=-1.0), ["proximal", "-1", "[0, inf]"]),
    (
        "unknown option of SCAFFOLD-ZO",
        lambda: algorithms.scaffold_zo(softmax_loss, SGD, num_clients=3, option="III"),
        ["option", "'III'", "'II'"],
    ),
    ("no option tuple", lambda: fzoos(queries=20), ["queries must be FZooSQueries(...)", "got 20", "capacity"]),
    ("options of the other", lambda: fzoos(surrogate=algorithms.FZooSQueries()), ["surrogate must be FZooSSurrogate"]),
    ("unknown kernel", lambda: fzoos(kernel="linear"), ["kernel", "'linear'", "'matern'"]),
    ("history without room", lambda: fzoos(capacity=50), ["capacity=50", "50 points", "raise"]),
    ("too few candidates", lambda: fzoos(active_candidates=4), ["active_candidates=4", "active=5", "at least as many"]),
    ("range of no lengthscale", lambda: fzoos(shortest=2.0, longest=1.0), ["longest", "1", "(2, inf]"]),
    ("everything pruned", lambda: algorithms.autoflip(softmax_loss, SGD, threshold=1.0), ["threshold", "1", "[0, 1)"]),
    (
        "no output layer",
        lambda: algorithms.autoflip(softmax_loss, SGD, output="last").init({"head": {"kernel": np.zeros((2, 3))}}),
        ["output='last'", "['head']", "structured=False"],
    ),
    ("negative number of maps", lambda: algorithms.fedlex(softmax_loss, SGD, num_maps=-1), ["num_maps", "-1", "or 0"]),
    (
        "exploration of a staged population",
        lambda: setup.prepare(config.Config(methods=("fedlex",), staged=True, x64=True)),
        ["fedlex", "staged=True", "leave out --staged"],
    ),
    ("energy of 0", lambda: fot(energy=0.0), ["energy", "0", "(0, 1]"]),
    ("unknown rule", lambda: fot(rule="square"), ["rule", "'square'", "'squared'"]),
    ("no columns", lambda: fot(oversampling=0), ["oversampling", "0", "at least 1"]),
    ("layer that is none", lambda: fot(layers={"v": 5}).init(softmax_params()), ["layers", "'v'", "'b', 'w'"]),
    ("width of no axes", lambda: fot(layers={"w": 4}).init(softmax_params()), ["'w'", "width 4", "[5, 3]", "5 or 15"]),
    ("layer without inputs", lambda: end_of_task(fot(lambda p, b: {})), ["inputs", "'w'", "leave the layer out"]),
    (
        "inputs averaged over the batch",
        lambda: end_of_task(fot(lambda p, b: {"w": jnp.mean(b["x"], axis=0)[None]})),
        ["inputs", "float[samples, 5]", "[1, 5]", "20 examples"],
    ),
    ("negative lam", lambda: algorithms.ewc(softmax_loss, SGD, lam=-1.0), ["lam", "-1", "[0, inf]"]),
    ("probability of 0", lambda: fedstale(probabilities=[0.5, 0.0, 1.0]), ["probabilities", "0.0", "(0, 1]", "leave"]),
    ("probabilities of other clients", lambda: fedstale(probabilities=[0.5]), ["probabilities", "[1]", "float[3]"]),
    ("negative noise", lambda: fzoos(noise=-1e-6), ["noise", "-1e-06", "[0, inf]"]),
    ("growing corrections", lambda: fzoos(correction_decay=-1.0), ["correction_decay", "-1", "[0, inf]"]),
    ("box of no width", lambda: fzoos(radius=0.0), ["radius", "0", "(0, inf]"]),
    ("unknown probabilities", lambda: fedstale(probabilities="known"), ["probabilities", "'known'", "'estimated'"]),
    ("period of -1", lambda: algorithms.fedamd(softmax_loss, SGD, num_clients=3, period=-1), ["period", "-1", "or 0"]),
    ("cutoff of 0", lambda: algorithms.fedau(softmax_loss, SGD, num_clients=3, cutoff=0), ["cutoff", "0", "one round"]),
    ("hyper-parameter NaN", lambda: algorithms.fedprox(softmax_loss, SGD, mu=np.nan), ["mu", "nan", "choose"]),
    ("hyper-parameter a list", lambda: algorithms.fedsam(softmax_loss, SGD, rho=[0.1]), ["rho", "[0.1]", "number"]),
    (
        "unknown option",
        lambda: algorithms.scaffold(softmax_loss, SGD, num_clients=3, option="III"),
        ["option", "'III'", "'II'"],
    ),
    ("no clients for scaffold", lambda: algorithms.scaffold(softmax_loss, SGD, num_clients=0), ["num_clients", "0"]),
    # structure
    (
        "params and state of different structure",
        lambda: checks.same_structure("state", {"w": np.zeros(3)}, {"w": np.zeros(4)}, "params"),
        ["state['w']", "[3]", "params['w']", "[4]"],
    ),
    (
        "step that changes the carry",
        lambda: run_program(step=lambda s, c, b: (c[:1], jnp.zeros(()))),
        ["carry", "[2]", "[1]"],
    ),
    ("step without a loss", lambda: run_program(step=lambda s, c, b: c), ["step", "(carry, loss)"]),
    ("step with a loss per example", lambda: run_program(step=lambda s, c, b: (c, c)), ["loss", "(2,)", "mean"]),
    # plans
    ("zero lanes", lambda: Plan(lanes=0), ["lanes", "0", "at least 1"]),
    (
        "mesh that does not divide the lanes",
        lambda: Plan(lanes=3, mesh=mesh(2)),
        ["2 devices", "lanes=3", "multiple of 2"],
    ),
    ("mesh without the axis", lambda: Plan(mesh=mesh(2), axis="hosts"), ["'hosts'", "clients", "make_mesh"]),
    ("plan that is none", lambda: fedavg(plan="fast"), ["plan", "str", "Plan(lanes=4)"]),
    # simulation and evaluation
    ("no rounds", lambda: simulate(fedavg(), samplers.full(3), 0), ["num_rounds", "0", "at least one"]),
    (
        "evaluation batch of 0",
        lambda: evaluate(lambda p, b: b["x"], 0, examples(), batch_size=0),
        ["batch_size", "0", "at least one"],
    ),
    # federations
    (
        "more clients than examples",
        lambda: partition.dirichlet(np.array([0, 1, 0]), 5, alpha=0.5),
        ["5", "3"],
    ),
]


@pytest.mark.quick
@pytest.mark.parametrize(("mistake", "words"), [(row[1], row[2]) for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_input_is_named_with_its_value_and_its_fix(mistake, words):
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        mistake()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_a_run_directory_of_another_configuration(tmp_path):
    train.claim(tmp_path, config.Config(rounds=5))
    train.claim(tmp_path, config.Config(rounds=5))
    with pytest.raises(ValueError, match="batch_size") as caught:
        train.claim(tmp_path, config.Config(rounds=5, batch_size=7))
    assert "7" in str(caught.value)
    assert "10" in str(caught.value)


def test_a_traced_hyper_parameter_is_not_looked_at():
    make = lambda rate: fedavg(server_lr=rate).init(softmax_params()).round  # noqa: E731
    assert jax.jit(make)(-1.0) == 0
