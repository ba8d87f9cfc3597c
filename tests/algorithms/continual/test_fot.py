"""FOT: traces of an independent program, the invariants of projection and bookkeeping, and what the sketches see."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.continual.fot import Basis, Sketch, expand, project
from fedjax_core import Plan, Population, reference
from tests.problems import assert_trees_close, assert_trees_equal

# A network without biases: x [B, 6] -> tanh -> [B, 10] -> [B, 3].
WIDTHS = {"a": 6, "b": 10}
KEY = jax.random.key(3)


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def network_loss(params, batch, key):
    return jnp.sum((network(params, batch["x"]) - batch["y"]) ** 2, axis=1)


def network_inputs(params, batch):
    return {"a": batch["x"], "b": jnp.tanh(batch["x"] @ params["a"])}


def linear_loss(params, batch, key):
    return jnp.sum((batch["x"] @ params["a"] @ params["b"] - batch["y"]) ** 2, axis=1)


def linear_inputs(params, batch):
    return {"a": batch["x"], "b": batch["x"] @ params["a"]}


def network_params(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(6, 10)) / 2, dtype),
        "b": jnp.asarray(rng.normal(size=(10, 3)) / 2, dtype),
    }


SIZES = (5, 1, 0, 7, 4)


def task(seed, rank=2, points=17, dtype=np.float64):
    """Clients whose inputs together span `rank` of six dimensions, and are `points` different ones."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(points, rank)) @ rng.normal(size=(rank, 6))
    examples = {"x": x[np.arange(17) % points].astype(dtype), "y": rng.normal(size=(17, 3)).astype(dtype)}
    return Population.from_sizes(examples, SIZES)


def make(loss=network_loss, inputs=network_inputs, *, lr=0.05, **settings):
    settings = {"layers": WIDTHS, "batch_size": 3, "energy": 1.0} | settings
    return algorithms.fot(loss, optax.sgd(lr), inputs=inputs, **settings)


@cache
def jitted(linear=False, rule="norm"):
    """(method, its jitted round, its jitted end of a task); how much energy is kept is for the state to say."""
    method = make(linear_loss, linear_inputs, rule=rule) if linear else make(rule=rule)
    return method, jax.jit(method.round), jax.jit(method.events["end_task"].run)


def start(method, energy=1.0, dtype=np.float64):
    return method.init(network_params(dtype))._replace(energy=jnp.asarray(energy))


def rounds(round_fn, state, population, count=3):
    for _ in range(count):
        state, _ = round_fn(state, everyone(population), jax.random.fold_in(KEY, state.round))
    return state


def everyone(population):
    return population.cohort(np.arange(population.num_clients))


def activations(inputs, params, examples):
    """What goes into each layer, [d, samples] in numpy."""
    return {path: np.asarray(rows).T for path, rows in inputs(params, examples).items()}


def captured(basis, A):
    """Share of the energy of A in the span of a basis."""
    return float(np.linalg.norm(np.asarray(basis.columns).T @ A) ** 2 / np.linalg.norm(A) ** 2)


# The reference: numpy, with the paper's W of shape (out, in), and matrices for Omega that are not random.


def omega(shape):
    i, j = np.indices(shape)
    return np.cos((0.7 + i) * (1 + j)) * (1 + i % 3)


def plain_fot(tasks, num_rounds, energy, energy_step, rule, lr=0.05):
    """Global models after every round, and the U of each layer after every task; one local step on full batches."""
    W = {path: np.asarray(leaf).T for path, leaf in network_params().items()}
    U = {path: np.zeros((width, 0)) for path, width in WIDTHS.items()}
    models, bases = [], []
    for population in tasks:
        data = [population.client(i) for i in range(population.num_clients)]
        data = [(np.asarray(d["x"]).T, np.asarray(d["y"]).T) for d in data if len(d["x"])]
        for _ in range(num_rounds):
            D = {path: np.zeros_like(leaf) for path, leaf in W.items()}
            for x, y in data:
                h = np.tanh(W["a"] @ x)
                error = 2 * (W["b"] @ h - y) / x.shape[1]
                D["b"] += lr * error @ h.T / len(data)
                D["a"] += lr * (W["b"].T @ error * (1 - h**2)) @ x.T / len(data)
            W = {path: W[path] - (D[path] - D[path] @ U[path] @ U[path].T) for path in W}
            models.append({path: jnp.asarray(leaf.T) for path, leaf in W.items()})
        for path, width in WIDTHS.items():
            A = [x if path == "a" else np.tanh(W["a"] @ x) for x, _ in data]
            R = [a - U[path] @ U[path].T @ a for a in A]
            n = np.array([a.shape[1] for a in A])
            if rule == "norm":
                rho = [np.linalg.norm(r) / np.linalg.norm(a) for r, a in zip(R, A, strict=True)]
                ratio = n @ rho / n.sum()
            else:
                ratio = np.linalg.norm(np.hstack(R)) ** 2 / np.linalg.norm(np.hstack(A)) ** 2
            wanted = (ratio - (1 - energy)) / ratio
            Q, S, _ = np.linalg.svd(sum(r @ omega((r.shape[1], width)) for r in R))
            share = np.cumsum(S**2) / np.sum(S**2)
            k = 0 if rule == "squared" and wanted <= 0 else int(np.argmax(share > wanted)) + 1
            U[path] = np.linalg.qr(np.hstack([U[path], Q[:, :k]]))[0]
        energy += energy_step
        bases.append(dict(U))
    return models, bases


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rule", "energy", "ranks"),
    [
        ("norm", 0.85, [[2, 4, 5], [2, 4, 6]]),
        ("squared", 0.6, [[1, 2, 3], [1, 2, 2]]),  # the last task has nothing new for the second layer
    ],
)
def test_models_and_subspaces_are_those_of_an_independent_program(rule, energy, ranks, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(omega(shape), dtype))
    tasks = [task(seed, rank=6) for seed in range(3)]
    method = make(energy=energy, energy_step=0.05, rule=rule, batch_size=20)
    round_fn, end_task = jax.jit(method.round), jax.jit(method.events["end_task"].run)
    state, models, bases = method.init(network_params()), [], []
    for population in tasks:
        for _ in range(3):
            state, _ = round_fn(state, everyone(population), KEY)
            models.append(state.params)
        state = end_task(state, everyone(population), KEY)
        bases.append(state.bases)
    expected_models, expected_bases = plain_fot(tasks, 3, energy, 0.05, rule)
    assert_trees_close(models, expected_models, 0, 1e-10)
    for basis, U in zip(bases, expected_bases, strict=True):
        for path in WIDTHS:
            assert basis[path].rank == U[path].shape[1]
            columns = np.asarray(basis[path].columns)
            np.testing.assert_allclose(columns @ columns.T, U[path] @ U[path].T, atol=1e-9)
    assert [[int(basis[path].rank) for basis in bases] for path in WIDTHS] == ranks
    np.testing.assert_allclose(state.energy, energy + 0.15, rtol=1e-12)
    assert (state.task, state.round) == (3, 9)


def test_without_an_ended_task_it_is_fedavg():
    method, round_fn, _ = jitted()
    fedavg = algorithms.fedavg(network_loss, optax.sgd(0.05), batch_size=3)
    state = rounds(round_fn, start(method), task(0))
    expected = rounds(jax.jit(fedavg.round), fedavg.init(network_params()), task(0))
    assert_trees_equal(state.params, expected.params)


def test_updates_are_orthogonal_to_what_old_tasks_have_put_in():
    """W_new a = W_old a for every a in the span of U."""
    method, round_fn, end_task = jitted()
    learned = end_task(rounds(round_fn, start(method, energy=0.9), task(0)), everyone(task(0)), KEY)
    later = rounds(round_fn, learned, task(1))
    for path, width in WIDTHS.items():
        U, change = learned.bases[path].columns, later.params[path] - learned.params[path]
        assert 0 < learned.bases[path].rank < width
        np.testing.assert_allclose(U.T @ change, 0, atol=1e-14)
        assert np.linalg.norm(change) > 1e-3


@pytest.mark.parametrize("linear", [False, True])
def test_old_outputs_of_a_network_without_biases_are_unchanged_by_new_tasks(linear):
    """Everything is kept (eps = 1) of every layer: the first keeps its outputs on old inputs, so the second its inputs,
    and so on, whatever lies between the layers."""
    method, round_fn, end_task = jitted(linear)
    inputs = linear_inputs if linear else network_inputs
    tasks = [task(seed, rank=1, points=3) for seed in range(3)]

    def outputs(params, population):
        return inputs(params, population.examples)["b"] @ params["b"]

    state, old, moved = start(method), [], []
    for population in tasks:
        before = outputs(state.params, population)
        state = rounds(round_fn, state, population)
        moved.append(np.abs(outputs(state.params, population) - before).max())
        state = end_task(state, everyone(population), KEY)
        old.append(outputs(state.params, population))
    assert min(moved) > 1e-2
    assert all(int(state.bases[path].rank) < width for path, width in WIDTHS.items())
    for population, then in zip(tasks, old, strict=True):
        np.testing.assert_allclose(outputs(state.params, population), then, atol=1e-13)


def test_with_biases_old_outputs_move():
    """What is said of networks without biases is not true of others, even with every weight frozen."""

    def inputs(params, batch):
        return {"a": batch["x"], "b": jnp.tanh(batch["x"] @ params["a"] + params["c"])}

    def outputs(params, batch):
        return inputs(params, batch)["b"] @ params["b"]

    method = make(lambda params, batch, key: jnp.sum((outputs(params, batch) - batch["y"]) ** 2, axis=1), inputs)
    state = method.init({**network_params(), "c": jnp.zeros(10)})
    state = state._replace(bases={path: Basis(jnp.eye(width), jnp.int32(width)) for path, width in WIDTHS.items()})
    after = rounds(jax.jit(method.round), state, task(1)).params
    assert_trees_close({path: after[path] for path in WIDTHS}, network_params(), 0, 1e-14)
    old = task(0).examples
    assert np.abs(outputs(after, old) - outputs(state.params, old)).max() > 1e-3


@pytest.mark.parametrize("rule", ["norm", "squared"])
def test_all_energy_asked_for_all_directions_are_found_and_no_other(rule):
    """Sketches summed over clients, batches and padding span what the pooled inputs span."""
    method, round_fn, end_task = jitted(rule=rule)
    state, population = start(method), task(0, rank=3, points=5)
    state = rounds(round_fn, state, population)
    pooled = activations(network_inputs, state.params, population.examples)
    bases = end_task(state, everyone(population), KEY).bases
    for path, A in pooled.items():
        U = np.asarray(bases[path].columns)
        assert bases[path].rank == np.linalg.matrix_rank(A) == {"a": 3, "b": 5}[path]
        assert np.linalg.norm(A - U @ U.T @ A) < 1e-12 * np.linalg.norm(A)
        left, S, _ = np.linalg.svd(A, full_matrices=False)
        span = left[:, S / S[0] > 1e-10]
        np.testing.assert_allclose(U @ U.T, span @ span.T, atol=1e-10)


def test_only_the_cohort_puts_anything_in():
    method, _, end_task = jitted()
    population = task(0, rank=6)
    bases = end_task(start(method), population.cohort(np.array([1, -1, 2, -1, -1])), KEY).bases
    A = activations(network_inputs, network_params(), population.client(1))
    assert all(bases[path].rank == 1 for path in WIDTHS)  # client 2 has no example, client 1 has one
    assert all(abs(captured(bases[path], A[path]) - 1) < 1e-12 for path in WIDTHS)


@pytest.mark.parametrize("rule", ["norm", "squared"])
def test_bases_stay_orthonormal_and_grow_until_a_layer_is_frozen(rule):
    method, round_fn, end_task = jitted(rule=rule)
    state, ranks = start(method), [0, 0]
    for seed in range(6):
        population = task(seed, points=2)
        state = end_task(rounds(round_fn, state, population, 1), everyone(population), KEY)
        for basis in state.bases.values():
            U = np.asarray(basis.columns)
            kept = np.arange(len(U)) < int(basis.rank)
            np.testing.assert_allclose(U.T @ U, np.diag(kept.astype(float)), atol=1e-14)
        grown = [int(basis.rank) for basis in state.bases.values()]
        assert all(new >= old for new, old in zip(grown, ranks, strict=True))
        ranks = grown
    assert ranks == [6, 10]
    frozen = rounds(round_fn, state, task(9))
    assert_trees_close(frozen.params, state.params, 0, 1e-14)


def test_projection_is_idempotent_and_never_lengthens():
    rng = np.random.default_rng(0)
    for rank in range(7):
        U = np.zeros((6, 6))
        U[:, :rank] = np.linalg.qr(rng.normal(size=(6, 6)))[0][:, :rank]
        D = {"a": rng.normal(size=(2, 3, 5, 2)), "other": rng.normal(size=3)}  # a convolution's: the first axes make 6
        D["b"] = D["a"][0]
        once = project(D, {"a": Basis(jnp.asarray(U), jnp.int32(rank))})
        assert_trees_close(project(once, {"a": Basis(jnp.asarray(U), jnp.int32(rank))}), once, 0, 1e-14)
        assert np.linalg.norm(once["a"]) <= np.linalg.norm(D["a"])
        np.testing.assert_allclose(U.T @ np.asarray(once["a"]).reshape(6, -1), 0, atol=1e-14)
        np.testing.assert_array_equal(once["other"], D["other"])
        np.testing.assert_array_equal(once["b"], D["b"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rule", ["norm", "squared"])
def test_repeating_a_task_adds_nothing(rule, dtype):
    """The ratio is 0, or rounding, by which nothing is divided and of which nothing is taken for a direction."""
    method, _, end_task = jitted(rule=rule)
    population = task(0, points=3, dtype=dtype)
    once = end_task(start(method, dtype=dtype), everyone(population), KEY)
    twice = end_task(once, everyone(population), jax.random.key(8))
    assert_trees_equal(twice.bases, once.bases)
    assert (once.task, twice.task) == (1, 2)
    silent = Population(jax.tree.map(jnp.zeros_like, population.examples), population.offsets)
    nothing = end_task(start(method, dtype=dtype), everyone(silent), KEY)
    assert all(basis.rank == 0 for basis in nothing.bases.values())
    chex.assert_tree_all_finite(nothing)


def known_basis(share, d=6):
    """A basis of the first direction of d, and inputs with this share of their energy in it and the rest in the others'
    (which have energies 4, 3, 2, ... in turn)."""
    energies = np.arange(d - 1, 0, -1.0)
    energies *= (1 - share) / energies.sum()
    columns = np.zeros((d, d))
    columns[0, 0] = 1
    return Basis(jnp.asarray(columns), jnp.int32(1)), np.sqrt(np.diag([share, *energies]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.76, 0.89, 0.91])
def test_the_squared_rule_keeps_exactly_the_energy_asked_for(share):
    """With a sketch that shows the residual as it is: no less than eps, and less with one direction fewer."""
    basis, A = known_basis(share)
    R = A - np.diag([A[0, 0], *np.zeros(5)])
    sketch = Sketch(jnp.asarray(R), jnp.asarray(np.sum(R**2)), jnp.asarray(np.sum(A**2)))
    new = expand(basis, sketch, jnp.asarray(0.9), squared=True)
    assert captured(new, A) >= 0.9 - 1e-12
    assert (new.rank == 1) == (share >= 0.9)
    if new.rank > 1:
        fewer = Basis(new.columns.at[:, int(new.rank) - 1].set(0), new.rank - 1)
        assert captured(fewer, A) < 0.9


def test_the_released_rule_keeps_more_and_always_adds_one():
    """r^2 = .25 and eps = .94: a share of .88 of the residual instead of the .76 that it takes."""
    basis, A = known_basis(0.75)
    R = A - np.diag([A[0, 0], *np.zeros(5)])
    ranks = {}
    for rule, part, whole in (("squared", 0.25, 1.0), ("norm", 0.5, 1.0)):
        sketch = Sketch(jnp.asarray(R), jnp.asarray(part), jnp.asarray(whole))
        new = expand(basis, sketch, jnp.asarray(0.94), squared=rule == "squared")
        ranks[rule] = int(new.rank)
        kept = np.cumsum(np.arange(5, 0, -1)) / 15
        assert ranks[rule] == 2 + int(np.argmax(kept > {"squared": 0.76, "norm": 0.88}[rule]))
    assert ranks["norm"] > ranks["squared"]
    basis, A = known_basis(0.99)
    R = A - np.diag([A[0, 0], *np.zeros(5)])
    sketch = Sketch(jnp.asarray(R), jnp.asarray(0.01), jnp.asarray(1.0))
    assert [int(expand(basis, sketch, jnp.asarray(0.9), squared=s).rank) for s in (True, False)] == [1, 2]


def test_more_columns_make_better_estimates_of_the_energy():
    """With many, the directions taken are the fewest that hold a share eps of the inputs' energy."""
    population = task(0, rank=6)
    A = activations(network_inputs, network_params(), population.examples)
    method = make(energy=0.9, oversampling=300)
    bases = jax.jit(method.events["end_task"].run)(method.init(network_params()), everyone(population), KEY).bases
    for path in WIDTHS:
        spectrum = np.linalg.svd(A[path], compute_uv=False) ** 2
        assert bases[path].rank == 1 + int(np.argmax(np.cumsum(spectrum) / spectrum.sum() > 0.9))
        assert captured(bases[path], A[path]) > 0.89


def test_no_client_at_the_end_of_a_task_changes_no_basis():
    method, _, end_task = jitted()
    state = end_task(start(method), everyone(task(0)), KEY)
    after = end_task(state, task(1).cohort(np.array([-1, 2, -1, -1, -1])), KEY)
    assert_trees_equal(after._replace(task=state.task), state)
    chex.assert_tree_all_finite(after)
    assert after.task == 2


def ended(end_task, state, key=KEY):
    return end_task(state, task(0, points=4).cohort(np.array([4, 0, -1, 2, 1])), key)


def same_spans(state, expected, atol=1e-11):
    """Directions of equal energy may turn into each other, and signs are a matter of taste; spans are not."""
    for path, basis in expected.bases.items():
        assert state.bases[path].rank == basis.rank
        U, V = state.bases[path].columns, basis.columns
        np.testing.assert_allclose(U @ U.T, V @ V.T, atol=atol)


def test_every_plan_ends_a_task_like_a_plain_loop():
    mesh = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
    method, _, end_task = jitted()
    alone = ended(end_task, start(method, energy=0.9))
    on_mesh = ended(jax.jit(make(plan=Plan(lanes=4, mesh=mesh)).events["end_task"].run), start(method, energy=0.9))
    with reference.plain_loop():
        plain = ended(method.events["end_task"].run, start(method, energy=0.9))
    same_spans(alone, plain)
    same_spans(on_mesh, plain)


def test_ending_a_task_draws_from_the_key_alone():
    method, _, end_task = jitted()
    state = start(method, energy=0.9)
    assert_trees_equal(ended(end_task, state), ended(end_task, state))
    other = ended(end_task, state, jax.random.key(77)).bases["a"].columns
    assert not np.array_equal(other, ended(end_task, state).bases["a"].columns)


def test_ended_tasks_vmap_over_seeds_and_floats_like_a_loop():
    def run(energy, step, key):
        method = make(energy=energy, energy_step=step, rule="squared")
        return ended(method.events["end_task"].run, method.init(network_params()), key)

    energies, steps = jnp.array([0.5, 0.9, 1.0]), jnp.array([0.0, 0.05, 0.0])
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(run))(energies, steps, keys)
    one_by_one = jax.jit(run)
    ranks = []
    for m in range(3):
        state = jax.tree.map(lambda leaf, m=m: leaf[m], together)
        same_spans(state, one_by_one(energies[m], steps[m], keys[m]))
        np.testing.assert_allclose(state.energy, energies[m] + steps[m], rtol=1e-12)
        ranks.append(int(state.bases["a"].rank))
    assert ranks == [1, 1, 2]


def test_float32_stays_float32():
    method, round_fn, end_task = jitted()
    first = start(method, energy=0.9, dtype=np.float32)
    state = end_task(first, everyone(task(0, points=3, dtype=np.float32)), KEY)
    state = rounds(round_fn, state, task(1, points=3, dtype=np.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    for path, (U, rank) in state.bases.items():
        np.testing.assert_allclose(U.T @ U, np.diag(np.arange(len(U)) < int(rank)).astype(float), atol=1e-6)
        np.testing.assert_allclose(U.T @ (state.params[path] - first.params[path]), 0, atol=1e-6)


def test_bytes_down_and_up():
    method, round_fn, _ = jitted()
    _, metrics = round_fn(start(method), everyone(task(0)), KEY)
    assert (metrics.bytes_down, metrics.bytes_up) == (8 * (6 * 10 + 10 * 3),) * 2


def test_only_the_layers_named_are_protected():
    method = make(layers={"a": 6})
    state = method.init(network_params())
    state = state._replace(bases={"a": Basis(jnp.eye(6), jnp.int32(6))})
    after = rounds(jax.jit(method.round), state, task(0)).params
    np.testing.assert_allclose(after["a"], state.params["a"], atol=1e-14)
    assert np.abs(after["b"] - state.params["b"]).max() > 1e-3


@pytest.mark.parametrize("part", [1e-2, 1e-3, 1e-4])
def test_a_small_residual_is_no_rounding_under_either_rule(part):
    """In single precision; the residual's squared norm is `part` of the whole, and nine tenths of it are wanted."""
    d = 200
    U = jnp.zeros((d, d), jnp.float32).at[0, 0].set(1)
    R = jnp.diag(jnp.full(d, np.sqrt(part / (d - 1)), jnp.float32).at[0].set(0))
    for squared, r in ((True, part), (False, part**0.5)):
        lost = part / 10 if squared else part**0.5 / 10
        sketch = Sketch(R, jnp.float32(r), jnp.float32(1))
        new = expand(Basis(U, jnp.int32(1)), sketch, jnp.float32(1 - lost), squared=squared)
        assert abs(int(new.rank) - 1 - 0.9 * (d - 1)) <= 2
