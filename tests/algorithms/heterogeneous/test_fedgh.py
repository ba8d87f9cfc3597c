"""FedGH against a slow, obvious program in NumPy, the golden values of its server, and what it is at special values."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms.messages import top_k
from algorithms.parts.prototypes import Pairs, in_order
from tests.problems import assert_trees_close, assert_trees_equal, softmax_population

SIZES = (3, 5, 0, 8, 2, 6, 1)
POPULATION = softmax_population(SIZES)
GROUPS = fc.Groups([0, 1, 0, 1, 0, 0, 1])
KEY = jax.random.key(5)
SGD = optax.sgd(0.1)
WIDTH, CLASSES = 4, 3
# Both groups; an empty slot and an empty client; group 1 is absent; and nobody.
COHORTS = [[3, 0, 4, 1], [5, -1, 2, 6], [4, 0, -1, -1], [-1, 2, -1, -1]]


def task_of(layers):
    """A network of tanh layers under a linear head; its head is its leaf "H"."""

    def init(key):
        keys = jax.random.split(key, layers + 1)
        sizes = [5, *[6] * (layers - 1), WIDTH]
        body = {f"l{k}": jax.random.normal(keys[k], sizes[k : k + 2]) * 0.5 for k in range(layers)}
        return {"H": {"W": jax.random.normal(keys[layers], (WIDTH, CLASSES)) * 0.3, "b": jnp.zeros(CLASSES)}, **body}

    def features(params, examples, key=None, mask=None):
        z = examples["x"]
        for k in range(layers):
            z = jnp.tanh(z @ params[f"l{k}"])
        return z

    def head(params, z):
        return z @ params["H"]["W"] + params["H"]["b"]

    def loss(outputs, examples, mask):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, examples["y"])

    def metrics(outputs, examples, mask):
        return {"loss": loss(outputs, examples, mask), "accuracy": jnp.argmax(outputs, -1) == examples["y"]}

    def forward(params, examples, *, key, mask):
        return head(params, features(params, examples)), ()

    return fc.Task(init, forward, loss, metrics, features, head, paths=lambda kind: ("H",))


TASKS = (task_of(1), task_of(2))
MODELS = tuple(task.init(jax.random.key(g)) for g, task in enumerate(TASKS))


def make(**settings):
    settings = {"batch_size": 2, "order": "sequential", "server_lr": 0.3} | settings
    return algorithms.fedgh(TASKS, SGD, groups=GROUPS, num_classes=CLASSES, **settings)


@functools.cache
def compiled(**settings):
    return jax.jit(make(**settings).round)


@functools.cache
def run(**settings):
    """The state after the rounds and the metrics of each."""
    state, metrics = make(**settings).init(MODELS), []
    for t, ids in enumerate(COHORTS):
        state, info = compiled(**settings)(state, POPULATION.cohort(np.asarray(ids)), jax.random.fold_in(KEY, t))
        metrics.append(info)
    return state, metrics


# The slow program.


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def represent(params, x):
    z = x
    for k in range(len(params) - 1):
        z = np.tanh(z @ params[f"l{k}"])
    return z


def sgd_step(params, x, y, lr):
    """A step on the mean cross-entropy of a batch, by hand; returns the loss before it."""
    hidden = [x]
    for k in range(len(params) - 1):
        hidden.append(np.tanh(hidden[-1] @ params[f"l{k}"]))
    p = softmax(hidden[-1] @ params["H"]["W"] + params["H"]["b"])
    loss = -np.mean(np.log(p[np.arange(len(y)), y]))
    g = (p - np.eye(CLASSES)[y]) / len(y)
    new = {"H": {"W": params["H"]["W"] - lr * hidden[-1].T @ g, "b": params["H"]["b"] - lr * g.sum(0)}}
    down = g @ params["H"]["W"].T
    for k in reversed(range(len(params) - 1)):
        down = down * (1 - hidden[k + 1] ** 2)
        new[f"l{k}"] = params[f"l{k}"] - lr * hidden[k].T @ down
        down = down @ params[f"l{k}"].T
    return new, loss


def slow(cohorts, *, full_batch=False, server_epochs=1, server_lr=0.3):
    """The header, the clients' models, and of each round (loss, bytes up, bytes down)."""
    to_numpy = functools.partial(jax.tree.map, np.asarray)
    clients = {i: to_numpy(MODELS[g]) for i, g in enumerate(GROUPS.of)}
    header, told = to_numpy(MODELS[0]["H"]), []
    for t, ids in enumerate(cohorts):
        pairs, losses, held = [], [], []
        for i in sorted(i for i in ids if i >= 0 and SIZES[i]):
            if t > 0:
                clients[i] = {**clients[i], "H": header}
            x, y = (np.asarray(POPULATION.client(i)[name]) for name in ("x", "y"))
            of_steps = []
            for at in range(0, len(y), 2):
                clients[i], loss = sgd_step(clients[i], x[at : at + 2], y[at : at + 2], 0.1)
                of_steps.append(loss)
            losses.append(np.average(of_steps, weights=[len(y[at : at + 2]) for at in range(0, len(y), 2)]))
            z = represent(clients[i], x)
            pairs += [(z[y == c].mean(0), c) for c in np.unique(y)]
            held.append(len(np.unique(y)))
        for _ in range(server_epochs if pairs else 0):
            for batch in [pairs] if full_batch else [[pair] for pair in pairs]:
                r, c = (np.stack(part) for part in zip(*batch, strict=True))
                g = (softmax(r @ header["W"] + header["b"]) - np.eye(CLASSES)[c]) / len(c)
                header = {"W": header["W"] - server_lr * r.T @ g, "b": header["b"] - server_lr * g.sum(0)}
        down = 8 * (WIDTH * CLASSES + CLASSES) if t > 0 and pairs else 0
        told.append((np.mean(losses) if losses else np.nan, np.mean(held) * (8 * WIDTH + 4) if held else 0, down))
    return header, clients, told


@pytest.mark.parametrize("settings", [{}, {"full_batch": True, "server_epochs": 3}, {"plan": fc.Plan(lanes=2)}])
def test_rounds_are_those_of_a_slow_program(settings):
    server = {name: value for name, value in settings.items() if name != "plan"}
    header, clients, told = slow(COHORTS, **server)
    state, metrics = run(**settings)
    assert_trees_close(state.params, (header["W"], header["b"]), rtol=1e-11)
    for i, (g, row) in enumerate(zip(GROUPS.of, GROUPS.rows, strict=True)):
        own = jax.tree.map(lambda leaf, row=row: leaf[row], state.clients[g].rows)
        assert_trees_close(own, clients[i], rtol=1e-11, atol=1e-14)
    for info, (loss, up, down) in zip(metrics, told, strict=True):
        np.testing.assert_allclose([info.loss, info.bytes_up, info.bytes_down], [loss, up, down], rtol=1e-12)
    assert [int(info.participants) for info in metrics] == [4, 2, 2, 0]
    assert metrics[0].update_norm > 0
    assert metrics[3].update_norm == 0


def server(header, pairs, **settings):
    """What the server makes of a header (W [d, C], b) and pairs ([n, d], [n]), through a round of one client each."""
    means, classes = (np.asarray(part) for part in pairs)
    ones = np.ones(len(classes), int)
    population = fc.Population.from_sizes({"x": np.asarray(means, float), "y": classes.astype(np.int32)}, ones)
    return of_server(len(classes), *settings.items())(header, population)


@functools.cache
def of_server(count, *settings):
    task = fc.Task(
        lambda key: {"H": ZERO},
        lambda params, examples, *, key, mask: (examples["x"] @ params["H"]["W"] + params["H"]["b"], ()),
        lambda outputs, examples, mask: jnp.zeros(len(outputs)),  # clients stay where they are
        lambda outputs, examples, mask: {},
        features=lambda params, examples, key=None, mask=None: examples["x"],
        head=lambda params, z: z @ params["H"]["W"] + params["H"]["b"],
        paths=lambda kind: ("H",),
    )
    groups = fc.Groups(np.arange(count) % 2) if count > 1 else fc.Groups([0])
    both = (task,) * len(groups)
    method = algorithms.fedgh(both, SGD, groups=groups, num_classes=2, batch_size=1, **dict(settings))

    def one_round(header, population):
        state, _ = method.round(method.init(({"H": header},) * len(groups)), population.cohort(np.arange(count)), KEY)
        return dict(zip(("W", "b"), state.params, strict=True))

    return jax.jit(one_round)


ZERO = {"W": jnp.zeros((2, 2)), "b": jnp.zeros(2)}


def test_golden_values():
    """From H = 0 with server_lr = 0.1 (its W [C, d] is here [d, C])."""
    first = server(ZERO, ([[1, 2]], [0]), server_lr=0.1)
    assert_trees_close(first, {"W": np.array([[0.05, 0.1], [-0.05, -0.1]]).T, "b": np.array([0.05, -0.05])}, rtol=1e-7)
    both = server(ZERO, ([[1, 2], [0, 1]], [0, 1]), server_lr=0.1)
    expected = np.array([[0.05, 0.04255575], [-0.05, -0.04255575]]).T
    assert_trees_close(both, {"W": expected, "b": np.array([-0.00744425, 0.00744425])}, rtol=1e-6)


def test_a_server_that_learns_nothing_keeps_its_header():
    """As the released code does; all clients after the first round share it."""
    state, _ = run(server_lr=0.0)
    assert_trees_equal(state.params, (MODELS[0]["H"]["W"], MODELS[0]["H"]["b"]))
    assert not np.array_equal(run()[0].params[0], state.params[0])


def test_one_pair_becomes_more_probable():
    header, r = {"W": jnp.asarray([[0.3, -0.1], [0.2, 0.4]]), "b": jnp.zeros(2)}, np.array([1.0, -0.5])
    found = []
    for epochs in (1, 3):
        now = server(header, ([r], [1]), server_epochs=epochs, server_lr=0.1)
        found.append(softmax(np.asarray(r @ now["W"] + now["b"]))[1])
    assert softmax(np.asarray(r @ header["W"] + header["b"]))[1] < found[0] < found[1]


@pytest.mark.parametrize("full_batch", [False, True])
def test_the_sum_over_classes_is_conserved(full_batch):
    state, _ = run(**({"full_batch": True, "server_epochs": 3} if full_batch else {}))
    assert_trees_close(jnp.sum(state.params[0], 1), jnp.sum(MODELS[0]["H"]["W"], 1), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(jnp.sum(state.params[1]), 0, atol=1e-13)


def test_one_mean_for_each_class_is_separated():
    """Where all clients of a class send the same, the header tells as many points apart as there are classes."""
    points, classes = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]]), [0, 1, 0, 1]
    header = server(ZERO, (points, classes), server_lr=1.0, server_epochs=200, full_batch=True)
    probable = softmax(points @ header["W"] + header["b"])[np.arange(4), classes]
    assert (probable > 0.98).all()
    np.testing.assert_allclose(header["W"][:, 0], -header["W"][:, 1], rtol=1e-9)


def test_the_order_of_pairs_matters_one_by_one_and_not_all_at_once():
    pairs = np.array([[1.0, 2], [0, 1], [2, -1]]), np.array([0, 1, 0])
    other = pairs[0][::-1], pairs[1][::-1]
    one_by_one, again = (server(ZERO, p, server_lr=0.5) for p in (pairs, other))
    assert not np.allclose(one_by_one["W"], again["W"], rtol=1e-3)
    at_once, again = (server(ZERO, p, server_lr=0.5, full_batch=True) for p in (pairs, other))
    assert_trees_close(at_once, again, rtol=1e-12)


def test_pairs_are_in_the_order_of_clients_and_classes():
    cohort = POPULATION.cohort([4, -1, 0])
    means = jnp.arange(3 * 2 * 1.0).reshape(3, 2, 1)
    pairs = in_order(cohort, (means, jnp.asarray([[True, False], [False, False], [True, True]])))
    assert isinstance(pairs, Pairs)
    np.testing.assert_array_equal(pairs.means[pairs.held][:, 0], [4, 5, 0])
    np.testing.assert_array_equal(pairs.classes[pairs.held], [0, 1, 0])


def test_the_server_never_touches_extractors_and_they_are_not_sent():
    state, metrics = run()
    _, told = run(server_lr=0.0)
    body = {name: leaf for name, leaf in state.first[1].items() if name != "H"}
    assert_trees_equal(body, {name: leaf for name, leaf in MODELS[1].items() if name != "H"})
    # In the first round clients do not know the server's header yet: what they train and send is the same.
    assert metrics[0].loss == told[0].loss
    assert metrics[0].bytes_up == told[0].bytes_up < fc.num_bytes(MODELS[0]) + fc.num_bytes(MODELS[1])


def test_views_and_params():
    method, (state, _) = make(), run()
    names, ids = ("personal", "global"), [1, -1, 0, 2, 5]

    @jax.jit
    def evaluated(state):
        return [fc.evaluate_view(TASKS, method.views[name], state, POPULATION, ids)["loss"] for name in names]

    personal, new = evaluated(state)
    losses = [jax.jit(task) for task in TASKS]
    for at, i in enumerate(ids):
        if i < 0 or not SIZES[i]:
            assert np.isnan(personal[at])
            assert np.isnan(new[at])
            continue
        g, row = GROUPS.of[i], GROUPS.rows[i]
        own = jax.tree.map(lambda leaf, row=row: leaf[row], state.clients[g].rows)
        with_new = {**own, "H": {"W": state.params[0], "b": state.params[1]}}
        for found, model in ((personal, own), (new, with_new)):
            np.testing.assert_allclose(found[at], losses[g](model, POPULATION.client(i)).mean(), rtol=1e-12)
    for g, model in enumerate(method.params(state)):
        expected = {**MODELS[g], "H": {"W": state.params[0], "b": state.params[1]}}
        assert_trees_equal(model, expected)


def test_a_part_around_each_groups_upload_that_changes_nothing():
    """And has rows for the clients of the group alone."""
    wrapped = fc.with_part(make(), top_k(1.0), like=POPULATION)
    state, step = wrapped.init(MODELS), jax.jit(wrapped.round)
    assert [leaf.shape[0] for leaf in jax.tree.leaves(fc.split_tables(state.passes)[1])] == [4, 3]
    for t, ids in enumerate(COHORTS):
        state, _ = step(state, POPULATION.cohort(np.asarray(ids)), jax.random.fold_in(KEY, t))
    assert_trees_equal(state.method, run()[0])


def test_clients_may_begin_with_models_of_their_own():
    method = make(own_start=True)
    state = method.init(MODELS, KEY)
    for i in (1, 6):
        expected = jax.jit(TASKS[1].init)(jax.random.fold_in(KEY, i))
        assert_trees_close(
            jax.tree.map(lambda leaf, i=i: leaf[0], method.client_params(state, [i])), expected, rtol=1e-6
        )
    assert_trees_equal(state.params, make().init(MODELS).params)
    with pytest.raises(ValueError, match="own_start=True draws"):
        method.init(MODELS)
    with pytest.raises(ValueError, match="begin with different rows"):
        fc.init_on_host(method.init, MODELS, KEY, num_clients=7)


def make_with(tasks=TASKS, **settings):
    settings = {"groups": GROUPS, "num_classes": CLASSES, "batch_size": 2} | settings
    return algorithms.fedgh(tasks, SGD, **settings)


def one_round(**settings):
    method = make_with(**settings)
    return jax.eval_shape(method.round, method.init(MODELS), POPULATION.cohort([0, 1]), KEY)


def with_frozen(model, examples, *, key, mask, frozen=False):
    return TASKS[0].forward(model, examples, key=key, mask=mask)


NARROW = {**MODELS[1], "H": {"W": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}
BAD = [
    (lambda: make_with(tasks=TASKS[:1]), ValueError, "tasks must be one for each of 2 groups, got 1 tasks"),
    (lambda: make_with(tasks=TASKS[0]), ValueError, "got Task"),
    (
        lambda: make_with(tasks=(TASKS[0], TASKS[1].loss)),
        TypeError,
        r"tasks\[1\] must be a Task with features and a head",
    ),
    (lambda: make_with(tasks=(TASKS[0], replace(TASKS[1], features=None))), TypeError, r"tasks\[1\] must be a Task"),
    (
        lambda: make_with(tasks=(replace(TASKS[0], has_statistics=True, forward=with_frozen), TASKS[1])),
        TypeError,
        r"tasks\[0\] has statistics",
    ),
    (lambda: make_with(groups=[0, 1]), TypeError, "groups must be Groups, got list"),
    (lambda: make_with(num_classes=0), ValueError, "num_classes"),
    (lambda: make(server_epochs=0), ValueError, "server_epochs"),
    (lambda: make(server_lr=-1.0), ValueError, "server_lr"),
    (lambda: make().init(MODELS[0]), ValueError, "init needs a tuple of 2 models"),
    (lambda: make().init((*MODELS, MODELS[0])), ValueError, "init needs a tuple of 2 models"),
    (
        lambda: make_with(tasks=(TASKS[0], replace(TASKS[1], init=lambda key: NARROW))).init((MODELS[0], NARROW)),
        ValueError,
        r"header of group 1 has leaves float\d+\[2, 3\], .*group 0 float\d+\[4, 3\].*one width",
    ),
    (
        lambda: make().init(MODELS[::-1]),
        ValueError,
        r"models\[0\] has float\[5, 6\] at 'l0', where tasks\[0\] has float\[5, 4\]: it is one of tasks\[1\]",
    ),
    (
        lambda: make().init((MODELS[0], MODELS[0])),
        ValueError,
        r"models\[1\] has float\[5, 4\] at 'l0', .*: it is one of tasks\[0\], and .* order of the tasks",
    ),
    (
        lambda: make().init((MODELS[0], {"H": MODELS[1]["H"], "l0": MODELS[1]["l0"]})),
        ValueError,
        r"models\[1\] has nothing at 'l1', where tasks\[1\] has float\[6, 4\]: make it by tasks\[1\]\.init",
    ),
    (
        lambda: make().init((MODELS[0], {**MODELS[1], "more": jnp.zeros(3)})),
        ValueError,
        r"models\[1\] has float\[3\] at 'more', where tasks\[1\] has nothing",
    ),
    (lambda: one_round(num_classes=2), ValueError, "num_classes must be 3, the outputs of the tasks' head, got 2"),
    (lambda: one_round(num_classes=4), ValueError, "num_classes must be 3, .* got 4"),
    (
        lambda: one_round(tasks=(TASKS[0], replace(TASKS[1], features=lambda p, e, k=None, m=None: e["x"][:, None]))),
        ValueError,
        "features must be float.*flatten",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
