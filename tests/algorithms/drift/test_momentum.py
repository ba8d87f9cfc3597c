"""FedAvg-M, SCAFFOLD-M and their variance-reduced forms: traces of an independent program, limits and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import ClientTable, Population, reference, samplers, simulate
from tests.problems import FULL, PART, Q3_A, Q3_B, Q3_OPTIMUM, Q3_START, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
ONE = {"batch_size": 1, "num_steps": 1}
N = {"num_clients": 3}
KEY = jax.random.key(0)


def make(name, lr=0.1, loss=quadratic_loss, **settings):
    return getattr(algorithms, name)(loss, optax.sgd(lr) if isinstance(lr, float) else lr, **settings)


def run(algorithm, cohorts, population=None, state=None):
    """States after every round and the last metrics, through the plain loop, which compiles nothing."""
    population = population or q3_population()
    state = algorithm.init(jnp.asarray(Q3_START)) if state is None else state
    states = []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, population.cohort(ids), KEY)
            states.append(state)
    return states, metrics


def limit(algorithm, cohorts):
    simulation = jax.jit(simulate(algorithm, samplers.schedule(np.asarray(cohorts)), len(cohorts)))
    return simulation(jnp.asarray(Q3_START), q3_population(), KEY)[0]


def gradients(x):
    """The clients' gradients at x, [3, 2]."""
    return np.einsum("nij,nj->ni", Q3_A, np.asarray(x) - Q3_B)


def warm(algorithm):
    """The first state with G and the c_i taken from gradients at the first model, as in the paper."""
    g = gradients(Q3_START)
    state = algorithm.init(jnp.asarray(Q3_START))._replace(direction=jnp.asarray(g.mean(0)))
    if hasattr(state, "control"):
        state = state._replace(control=jnp.asarray(g.mean(0)), client_controls=ClientTable(jnp.asarray(g)))
    return state


def slopes(copies=(1, 1, 1)):
    """Linear losses, whose gradients are constant: a population with repeated examples, the loss and the gradients."""
    c = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    population = Population.from_clients([{"c": np.repeat(c[i : i + 1], n, 0)} for i, n in enumerate(copies)])
    return population, lambda params, batch, key: batch["c"] @ params, c


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "settings", "cohorts", "expected"),
    [
        ("fedavg_m", {}, FULL, [(0.87480000, 0.93195000), (0.67984694, 0.82316459), (0.46120267, 0.69578275)]),
        ("fedavg_m_vr", {}, FULL, [(0.61436111, 0.78522222), (0.40068456, 0.63950109), (0.27497505, 0.53570833)]),
        ("scaffold_m", N, PART, [(0.89815000, 0.94258750), (0.69096211, 0.82411770), (0.46092490, 0.68864926)]),
        ("scaffold_m_vr", N, PART, [(0.60208333, 0.78958333), (0.42845208, 0.63374375), (0.31226304, 0.52249225)]),
    ],
)
def test_golden_trace(name, settings, cohorts, expected):
    algorithm = make(name, beta=0.3, **settings, **STEPS)
    states, _ = run(algorithm, cohorts, state=warm(algorithm) if name.endswith("_vr") else None)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parent", "settings"),
    [
        ("fedavg_m", "fedavg", {}),
        ("fedavg_m_vr", "fedavg", {}),
        ("scaffold_m", "scaffold", N),
        ("scaffold_m_vr", "scaffold", N),
    ],
)
def test_with_only_fresh_gradients_it_is_the_method_without_momentum(name, parent, settings):
    """With clients of 1, 2 and 4 steps."""
    common = {"server_lr": 0.5, "batch_size": 1, **settings}
    population = q3_population((1, 2, 4))
    states, _ = run(make(name, beta=1.0, **common), PART, population)
    expected, _ = run(make(parent, **common), PART, population)
    np.testing.assert_allclose(states[-1].params, expected[-1].params, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavg_m", "fedavg_m_vr", "fedcm"])
def test_normalized_and_with_only_fresh_gradients_it_is_fednova(name):
    common = {"server_lr": 0.5, "batch_size": 1}
    population = q3_population((1, 2, 4))
    fresh = {"alpha" if name == "fedcm" else "beta": 1.0}
    states, _ = run(make(name, aggregation="normalized", **fresh, **common), PART, population)
    expected, _ = run(make("fednova", **common), PART, population)
    np.testing.assert_allclose(states[-1].params, expected[-1].params, rtol=1e-12)


def test_mofedsam_with_only_fresh_gradients_is_fedsam():
    population = q3_population((1, 2, 4))
    states, _ = run(make("mofedsam", alpha=1.0, batch_size=1), PART, population)
    expected, _ = run(make("fedsam", batch_size=1), PART, population)
    np.testing.assert_allclose(states[-1].params, expected[-1].params, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedcm", "fedavg_m"])
@pytest.mark.parametrize("aggregation", ["mean", "normalized"])
def test_direction_is_the_mean_of_what_is_left_of_the_gradients_after_clipping(name, aggregation):
    """And so no longer than the clipping norm; with weight decay in it. Clients of 1, 2 and 4 steps."""
    clip, decay, lr, population = 0.7, 0.3, 0.1, q3_population((1, 2, 4))
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.add_decayed_weights(decay), optax.sgd(lr))
    fresh = {"alpha" if name == "fedcm" else "beta": 1.0}
    algorithm = make(name, lr=optimizer, batch_size=1, aggregation=aggregation, **fresh)
    (state,), _ = run(algorithm, FULL[:1], population)
    means, steps = [], np.array([1, 2, 4])
    for i, k in enumerate(steps):
        y, total = Q3_START, 0
        for _ in range(k):
            g = Q3_A[i] @ (y - Q3_B[i])
            g = g * min(1, clip / np.linalg.norm(g)) + decay * y
            y, total = y - lr * g, total + g
        means.append(total / k)
    p = steps if aggregation == "mean" else np.ones(3)
    np.testing.assert_allclose(state.direction, np.average(means, axis=0, weights=p), rtol=1e-12)
    expected = Q3_START - lr * steps.mean() * np.average(means, axis=0, weights=p)
    np.testing.assert_allclose(state.params, expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "settings"), [("fedavg_m", {}), ("scaffold_m", N)])
def test_one_step_with_everyone_is_the_heavy_ball(name, settings):
    states, _ = run(make(name, beta=0.3, **settings, **ONE), FULL)
    x, direction = Q3_START, np.zeros(2)
    for state in states:
        direction = 0.3 * gradients(x).mean(0) + 0.7 * direction
        x = x - 0.1 * direction
        np.testing.assert_allclose(state.params, x, rtol=1e-13)


@pytest.mark.parametrize(("name", "settings"), [("fedavg_m_vr", {}), ("scaffold_m_vr", N)])
def test_error_of_the_variance_reduced_direction_shrinks_by_one_minus_beta(name, settings):
    algorithm = make(name, beta=0.3, **settings, **ONE)
    states, _ = run(algorithm, FULL)
    x, error = Q3_START, -gradients(Q3_START).mean(0)  # G starts from 0
    for state in states:
        error = 0.7 * error
        np.testing.assert_allclose(state.direction - gradients(x).mean(0), error, rtol=1e-12)
        x = state.params
    # A right start stays right: gradient descent, whatever beta.
    states, _ = run(algorithm, FULL, state=warm(algorithm))
    x = Q3_START
    for state in states:
        x = x - 0.1 * gradients(x).mean(0)
        np.testing.assert_allclose(state.params, x, rtol=1e-13)


@pytest.mark.parametrize("aggregation", ["mean", "normalized"])
def test_the_last_server_step_leads_back_to_the_model_before(aggregation):
    decaying = lambda t: optax.sgd(0.1 * 0.5**t)  # noqa: E731
    for name, settings in (("fedavg_m_vr", {}), ("scaffold_m_vr", N)):
        algorithm = make(name, lr=decaying, beta=0.3, server_lr=0.7, aggregation=aggregation, batch_size=1, **settings)
        states, _ = run(algorithm, PART, q3_population((1, 2, 4)))
        for before, after in zip([Q3_START, *(s.params for s in states[:2])], states, strict=True):
            np.testing.assert_allclose(after.params + after.step * after.direction, before, rtol=1e-13)


def test_fedavg_m_stalls_where_fedavg_with_a_smaller_step_does():
    a = limit(make("fedavg_m", beta=0.4, **STEPS), [[0, 1, 2]] * 800)
    b = limit(make("fedavg", lr=0.04, **STEPS), [[0, 1, 2]] * 800)
    np.testing.assert_allclose(a.params, b.params, atol=1e-12)
    assert np.linalg.norm(a.params - Q3_OPTIMUM) > 1e-3


@pytest.mark.parametrize("name", ["scaffold_m", "scaffold_m_vr"])
def test_scaffold_m_reaches_the_optimum_with_partial_participation(name):
    cohorts = [[t % 3, (t + 1) % 3] for t in range(900)]
    state = limit(make(name, beta=0.3, **N, **STEPS), cohorts)
    np.testing.assert_allclose(state.params, Q3_OPTIMUM, atol=1e-10)
    np.testing.assert_allclose(state.client_controls.rows, gradients(Q3_OPTIMUM), atol=1e-9)
    np.testing.assert_allclose(state.control, 0, atol=1e-9)


@pytest.mark.parametrize("name", ["scaffold_m", "scaffold_m_vr"])
@pytest.mark.parametrize("weights", ["uniform", "examples", np.array([1.0, 5.0, 2.0])])
def test_server_control_is_the_mean_of_the_clients(name, weights):
    states, _ = run(make(name, weights=weights, batch_size=1, **N), PART, q3_population((1, 2, 4)))
    p = {"uniform": np.ones(3), "examples": np.array([1, 2, 4])}[weights] if isinstance(weights, str) else weights
    state = states[-1]
    np.testing.assert_allclose(state.control, np.average(state.client_controls.rows, axis=0, weights=p), rtol=1e-12)


def test_on_linear_losses_known_controls_make_all_clients_alike():
    """Once all clients have been seen, it no longer matters which take part, nor how many steps they do."""
    population, loss, c = slopes(copies=(1, 2, 4))
    for aggregation, p in (("mean", [1, 2, 4]), ("normalized", [1, 1, 1])):
        algorithm = make("scaffold_m", loss=loss, beta=0.3, batch_size=1, aggregation=aggregation, **N)
        (seen,), _ = run(algorithm, FULL[:1], population)
        first = 0.3 * np.average(c, axis=0, weights=p)
        np.testing.assert_allclose(seen.direction, first, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(seen.client_controls.rows, c, rtol=1e-12)
        for ids in ([0], [1], [0, 2]):
            (after,), _ = run(algorithm, [ids], population, seen)
            np.testing.assert_allclose(after.direction, 0.3 * c.mean(0) + 0.7 * first, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "down", "up", "settings"),  # P = 2
    [("fedavg_m", 4, 3, {}), ("fedavg_m_vr", 5, 3, {}), ("scaffold_m", 6, 5, N), ("scaffold_m_vr", 7, 5, N)],
)
def test_bytes_down_and_up(name, down, up, settings):
    _, metrics = run(make(name, **settings, **STEPS), FULL[:1])
    assert (metrics.bytes_down, metrics.bytes_up) == (8 * down, 8 * up)
