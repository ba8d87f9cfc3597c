"""Statistics of a model through rounds: against flax's own layer on exact batches in a plain Python loop."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms.messages import client_level_dp
from fedjax_core import Plan, Population, Task, Variables, reference, testing, with_statistics
from fedjax_core.messages import Part, with_part

SIZES = (3, 9, 4, 0, 13, 6, 2)
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LR = 0.3


class Net(nn.Module):
    """A dense layer, batch normalization, a head."""

    @nn.compact
    def __call__(self, x, running, mask=None):
        x = nn.Dense(4, param_dtype=float)(x)
        x = nn.BatchNorm(momentum=0.7, epsilon=1e-3, param_dtype=float)(x, running, mask=mask)
        return nn.Dense(3, param_dtype=float)(nn.relu(x))


NET = Net()


def net_task():
    """The task of `Net` on {"x": [B, 5], "y": int[B]}."""

    def init(key):
        variables = NET.init(key, jnp.zeros((1, 5)), True)
        return Variables(variables["params"], jax.tree.map(lambda s: s.astype(float), variables["batch_stats"]))

    def forward(model, examples, *, key, mask, frozen=False):
        given = {"params": model.params, "batch_stats": model.statistics}
        if key is None or frozen:
            return NET.apply(given, examples["x"], True), model.statistics
        rows = (mask | ~jnp.any(mask))[:, None]
        outputs, new = NET.apply(given, examples["x"], False, rows, mutable=["batch_stats"])
        return outputs, new["batch_stats"]

    def loss(outputs, examples, mask):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, examples["y"])

    def metrics(outputs, examples, mask):
        return {"loss": loss(outputs, examples, mask), "right": jnp.argmax(outputs, 1) == examples["y"]}

    return Task(init, forward, loss, metrics, has_statistics=True)


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


TASK = net_task()
BASE = testing.classification(SIZES)


@pytest.fixture(scope="module")
def population():
    examples = jax.tree.map(np.asarray, BASE.population.examples)
    examples["x"] = 2 + 3 * examples["x"].astype(np.float64)
    return Population.from_flat(examples, np.asarray(BASE.population.offsets))


@pytest.fixture(scope="module")
def begun():
    return TASK.init(jax.random.key(4))


@jax.jit
def step(params, statistics, x, y):
    """A step of SGD on one batch, by flax alone: (params, statistics)."""

    def mean_loss(params):
        outputs, new = NET.apply({"params": params, "batch_stats": statistics}, x, False, mutable=["batch_stats"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y)), new["batch_stats"]

    grads, new = jax.grad(mean_loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - LR * g, params, grads), new


def by_hand(population, begun, cohorts, rule, batch_size=4):
    """FedAvg, weighted by examples, in a plain loop: (params, statistics, every client's statistics)."""
    x, y = np.asarray(population.examples["x"]), np.asarray(population.examples["y"])
    offsets = np.asarray(population.offsets)
    params, statistics = begun
    own = [statistics] * population.num_clients
    for ids in cohorts:
        results, weights = [], []
        for i in ids:
            rows = slice(offsets[i], offsets[i + 1])
            if i < 0 or rows.start == rows.stop:
                continue
            begins = own[i] if rule == "personal" else statistics
            now = params, begins
            for start in range(rows.start, rows.stop, batch_size):
                batch = slice(start, min(start + batch_size, rows.stop))
                now = step(*now, x[batch], y[batch])
            results.append(now)
            weights.append(rows.stop - rows.start)
            own[i] = results[-1][1]
        share = np.asarray(weights) / np.sum(weights)
        params, statistics = jax.tree.map(
            lambda *leaves, share=share: sum(w * leaf for w, leaf in zip(share, leaves, strict=True)), *results
        )
    return params, statistics, own


COHORTS = ([1, 4, 0, -1], [4, 3, 5, 6])


@cache
def fedavg(rule, plan=Plan(lanes=1), batch_size=4):  # noqa: B008 - a NamedTuple of numbers
    """FedAvg with statistics; its round is compiled once for all tests."""
    options = {"num_clients": len(SIZES)} if rule == "personal" else {}
    method = algorithms.fedavg(
        TASK, optax.sgd(LR), batch_size=batch_size, order="sequential", weights="examples", plan=plan
    )
    method = with_statistics(method, rule, **options)
    return method._replace(round=jax.jit(method.round))


def run(method, population, begun, cohorts=COHORTS):
    state = method.init(begun)
    for t, ids in enumerate(cohorts):
        state, metrics = method.round(state, population.cohort(ids), jax.random.key(t))
    return state, metrics


def same(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), actual, expected)


PLANS = {"one": Plan(lanes=1), "lanes": Plan(lanes=3), "mesh": Plan(lanes=4, mesh=fc.client_mesh(2))}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", ["average", "personal"])
def test_rounds_equal_flax_on_exact_batches(rule, plan, population, begun):
    method = fedavg(rule, PLANS[plan])
    state, metrics = run(method, population, begun)
    params, statistics, own = by_hand(population, begun, COHORTS, rule)
    same(state.method.params, params)
    if rule == "average":
        same(state.statistics, statistics)
        size = fc.num_bytes(begun.params) + fc.num_bytes(begun.statistics)
        assert (metrics.bytes_up, metrics.bytes_down) == (size, size)
        same(method.params(state), Variables(params, statistics))
    else:
        same(state.statistics.rows.values, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))
        assert list(state.statistics.rows.rounds) == [1, 1, 0, 0, 2, 1, 1]
        assert metrics.bytes_up == fc.num_bytes(begun.params)
        expected = jax.tree.map(lambda leaf: leaf[None], Variables(params, own[4]))
        same(method.client_params(state, jnp.array([4])), expected)
    assert np.any(jax.tree.leaves(state.statistics)[0] != 0)


@pytest.mark.parametrize("rule", ["average", "personal"])
def test_padding_changes_nothing(rule, population, begun):
    """Batches with room for more than the largest client give full batches."""
    one, other = (run(fedavg(rule, batch_size=size), population, begun)[0] for size in (13, 32))
    same(one, other)


def test_personal_global_model_predicts_with_the_mean_of_those_who_trained(population, begun):
    method = fedavg("personal")
    begin = method.init(begun)
    same(method.params(begin), begun)
    state, _ = method.round(begin, population.cohort([1, 4]), jax.random.key(0))
    _, _, own = by_hand(population, begun, [[1, 4]], "personal")
    same(method.params(state).statistics, jax.tree.map(lambda a, b: (a + b) / 2, own[1], own[4]))


def test_personal_statistics_depend_on_own_history_only(population, begun):
    """An absent client's stay to the bit, and what others have makes no difference to a client's."""
    method = fedavg("personal")
    state, _ = run(method, population, begun)
    after, _ = method.round(state, population.cohort([1, 5]), jax.random.key(9))
    for old, new in zip(*(jax.tree.leaves(s.statistics.rows) for s in (state, after)), strict=True):
        for i in (0, 2, 3, 4, 6):
            np.testing.assert_array_equal(old[i], new[i])
    rows = jax.tree.map(lambda leaf: leaf.at[5].add(1), state.statistics.rows.values)
    changed = state._replace(statistics=fc.ClientTable(state.statistics.rows._replace(values=rows)))
    other, _ = method.round(changed, population.cohort([1, 5]), jax.random.key(9))
    for a, b in zip(*(jax.tree.leaves(s.statistics.rows.values) for s in (after, other)), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        assert np.any(a[5] != b[5])


def frozen_loss(statistics):
    def loss_fn(params, batch, key):
        outputs = NET.apply({"params": params, "batch_stats": statistics}, batch["x"], True)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])

    return loss_fn


METHODS = {
    "fedavg": lambda loss: algorithms.fedavg(loss, optax.sgd(0.1), batch_size=4),
    "scaffold": lambda loss: algorithms.scaffold(loss, optax.sgd(0.1), num_clients=len(SIZES), option="I"),
    "fedzo": lambda loss: algorithms.fedzo(loss, optax.sgd(0.1), num_directions=2),
    "ewc": lambda loss: algorithms.ewc(loss, optax.sgd(0.1), batch_size=4),
    "mime": lambda loss: algorithms.mime(loss, optax.sgd(0.1), batch_size=4),
}


@pytest.mark.parametrize("name", ["fedzo", "ewc", *slow("fedavg", "scaffold", "mime")])
def test_frozen_statistics_are_constants_for_every_method(name, population, begun):
    """Bit for bit a plain loss that closes over them."""
    statistics = jax.tree.map(lambda leaf: leaf + 0.25, begun.statistics)
    wrapped = with_statistics(METHODS[name](TASK), "frozen")
    plain = METHODS[name](frozen_loss(statistics))
    cohort, key = population.cohort([1, 4, -1]), jax.random.key(3)
    state, metrics = jax.jit(wrapped.round)(wrapped.init(begun._replace(statistics=statistics)), cohort, key)
    expected, expected_metrics = jax.jit(plain.round)(plain.init(begun.params), cohort, key)
    same((state.method, metrics.loss), (expected, expected_metrics.loss))
    jax.tree.map(np.testing.assert_array_equal, state.statistics, statistics)


@pytest.mark.parametrize(
    "name", ["mime", "fedld", *slow("scaffold", "fedsgd", "fal", "fedopt", "fedsam", "moon", "mifa")]
)
def test_any_method_that_takes_gradients_carries_statistics(name, population, begun):
    """The compiled round equals the plain loop over clients, and statistics move."""
    features = {"features": lambda p, b, key: fc.tasks.model_of(p).params["Dense_0"]["bias"] + 0 * b["x"][:, :4]}
    own = {
        "scaffold": {"num_clients": len(SIZES)},
        "moon": {"num_clients": len(SIZES), **features},
        "mifa": {"num_clients": len(SIZES)},
        "fedld": {"logits": lambda p, b, key, mask: TASK.outputs(p, b, key, mask)},
        "fal": {"rho": 0.1, "step_size": 0.1, "attack_steps": 2},
    }
    order = {} if name == "fedsgd" else {"order": "sequential"}
    made = getattr(algorithms, name)(TASK, optax.sgd(0.1), batch_size=4, **own.get(name, {}), **order)
    method = with_statistics(made, "average")
    begin = method.init(begun)
    cohort, key = population.cohort([1, 4, -1, 6]), jax.random.key(0)
    done = jax.jit(method.round)(begin, cohort, key)
    with reference.plain_loop():
        expected = method.round(begin, cohort, key)
    same(done, expected, rtol=1e-10, atol=1e-12)
    for old, new in zip(*map(jax.tree.leaves, (begin.statistics, done[0].statistics)), strict=True):
        assert np.all(np.isfinite(new))
        assert np.any(old != new)


def test_seeds_of_a_simulation_under_vmap_and_staged(population, begun):
    method, sampler = fedavg("average"), fc.samplers.uniform(len(SIZES), 3)
    run = fc.simulate(method, sampler, 2)
    keys = jax.random.split(jax.random.key(1), 2)
    together, _ = jax.jit(jax.vmap(run, (None, None, 0)))(begun, population, keys)
    begins = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), begun)
    host = fc.HostPopulation.from_flat(jax.tree.map(np.asarray, population.examples), np.asarray(population.offsets))
    staged, _ = fc.simulate_staged(method, sampler, 2)(begins, host, keys)
    same(staged, together)
    for seed in range(2):
        alone, _ = jax.jit(run)(begun, population, keys[seed])
        same(jax.tree.map(lambda leaf, s=seed: leaf[s], together), alone)


def test_empty_round_and_parts(population, begun):
    """An empty round changes nothing; a part inside sees no statistics and one outside sees their uploads."""
    method = fedavg("average")
    state, _ = run(method, population, begun)
    after, _ = method.round(state, population.cohort([-1, 3]), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after.statistics, state.statistics)
    seen = []

    def around(state, asked, key):
        seen.append(fc.num_scalars(asked.upload()))
        return asked.run(), state, ()

    plain = algorithms.fedavg(
        TASK, optax.sgd(LR), batch_size=4, order="sequential", weights="examples", plan=Plan(lanes=1)
    )
    inside = with_statistics(with_part(plain, Part(around), like=population), "average")
    outside = with_part(with_statistics(plain, "average"), Part(around), like=population)
    for wrapped in (inside, outside):
        other, _ = run(wrapped._replace(round=jax.jit(wrapped.round)), population, begun)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.leaves(wrapped.params(other)),
            jax.tree.leaves(method.params(state)),
        )
    size = fc.num_scalars(begun.params)
    assert seen == [size, size + fc.num_scalars(begun.statistics)]


def test_a_rule_sees_statistics_too(population, begun):
    """Uploads that are held all at once, and a rule that is the mean, give the weighted mean of the statistics."""
    plain = with_statistics(
        algorithms.fedavg(TASK, optax.sgd(LR), batch_size=4, order="sequential", weights="examples"), "average"
    )

    def around(state, asked, key):
        def weighted_mean(uploads, weights):
            return fc.sums.weighted(weights / weights.sum(), uploads)

        asked = asked.changed(lambda uploads, weights: uploads)
        return asked.with_rule(weighted_mean, "mean").run(), state, ()

    ruled = with_part(plain, Part(around), like=population)
    state, _ = jax.jit(ruled.round)(ruled.init(begun), population.cohort(COHORTS[0]), jax.random.key(0))
    same(state.method, run(fedavg("average"), population, begun, COHORTS[:1])[0])


@pytest.mark.parametrize("held", [False, True])
def test_who_looks_at_uploads_inside_sees_no_statistics(population, begun, held):
    """Whether uploads are held all at once or not."""

    def around(state, asked, key):
        asked = asked.changed(lambda uploads, weights: uploads) if held else asked
        results = asked.watched(fc.sums.norm).run()
        return results._replace(seen=()), state, results.seen[0]

    plain = algorithms.fedavg(TASK, optax.sgd(LR), batch_size=4, plan=Plan(lanes=1))
    method = with_statistics(with_part(plain, Part(around), like=population), "average")
    _, metrics = jax.jit(method.round)(method.init(begun), population.cohort([-1, 0]), jax.random.key(0))
    np.testing.assert_allclose(metrics.extra.passes[0], [0, metrics.update_norm], rtol=1e-6)


def test_a_clip_around_them_is_that_of_model_and_statistics_together(population, begun):
    plain = with_statistics(algorithms.fedavg(TASK, optax.sgd(LR), batch_size=4, plan=Plan(lanes=1)), "average")
    method = with_part(plain, client_level_dp(0.01, 0.0, expected=1.0), like=population)
    state = method.init(begun)
    after, _ = jax.jit(method.round)(state, population.cohort([-1, 0]), jax.random.key(0))
    moved = jax.tree.map(jnp.subtract, method.params(after), method.params(state))
    np.testing.assert_allclose(optax.tree.norm(moved), 0.01, rtol=1e-5)
    assert optax.tree.norm(moved.statistics) > 0
    assert optax.tree.norm(moved.params) > 0


def checked(rule, begun):
    """What `testing.properties` and `testing.check_algorithm` take."""
    options = {"num_clients": len(SIZES)} if rule == "personal" else {}

    def make(*, lr=0.1, **settings):
        return with_statistics(algorithms.fedavg(TASK, optax.sgd(lr), batch_size=4, **settings), rule, **options)

    return make, testing.Problem(None, begun, BASE.population)


@pytest.mark.parametrize("rule", ["personal", *slow("average", "frozen")])
def test_checks_of_every_method(rule, begun):
    """Everything that methods of the library are checked for holds with statistics."""
    testing.check_algorithm(*checked(rule, begun), floats={"lr": 0.1})


@pytest.mark.parametrize("rule", ["average", "frozen"])
def test_shuffled_examples_on_a_mesh(rule, begun):
    """The check that compiles most."""
    testing.properties(*checked(rule, begun), floats={"lr": 0.1})["lanes_on_a_mesh_equal_a_plain_loop"]()


def in_vmap(loss_fn):
    return algorithms.fedzo(loss_fn, optax.sgd(0.1), num_directions=2)


def compiled(loss_fn):
    method = algorithms.fedavg(loss_fn, optax.sgd(0.1))
    return method._replace(round=jax.jit(method.round))


def of_parameters(params, batch, key):
    return batch["x"][:, 0] * params["Dense_0"]["bias"][0]


REFUSED = {
    "a method alone": (lambda: algorithms.fedavg(TASK, optax.sgd(0.1)), "wrap it, fedjax_core.with_statistics"),
    "in a transformation": (lambda: with_statistics(in_vmap(TASK), "average"), "freeze them"),
    "another loss": (
        lambda: with_statistics(algorithms.fedavg(of_parameters, optax.sgd(0.1)), "average"),
        "with the task as its loss_fn",
    ),
    "compiled before": (lambda: with_statistics(compiled(TASK), "average"), "wrap the method first"),
    "twice": (lambda: with_statistics(fedavg("average"), "frozen"), "wrap it once"),
    "no rule": (lambda: with_statistics(algorithms.fedavg(TASK, optax.sgd(0.1)), "mean"), "rule must be one of"),
    "no size": (lambda: with_statistics(algorithms.fedavg(TASK, optax.sgd(0.1)), "personal"), "num_clients"),
    "a size": (lambda: with_statistics(algorithms.fedavg(TASK, optax.sgd(0.1)), "average", num_clients=3), "leave"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_compiled(case, population, begun):
    make, message = REFUSED[case]

    def trace():
        method = make()
        return jax.eval_shape(method.round, method.init(begun), population.cohort([0, 1]), jax.random.key(0))

    with pytest.raises((TypeError, ValueError), match=message):
        trace()


def test_models_without_statistics_and_integers_are_refused(begun):
    method = fedavg("average")
    with pytest.raises(TypeError, match=r"pass task\.init\(key\)"):
        method.init(begun.params)
    counted = begun._replace(statistics={"count": jnp.int32(0)})
    with pytest.raises(TypeError, match="'personal' or 'frozen'"):
        method.init(counted)
    with pytest.raises(TypeError, match="with_statistics"):
        jax.eval_shape(TASK, begun.params, {"x": jnp.zeros((2, 5)), "y": jnp.zeros(2, int)}, jax.random.key(0))
