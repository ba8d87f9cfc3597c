"""FedLoGe against a plain loop, who moves whom, and the realignment at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import algorithms
import fedjax_core as fc
from algorithms.parts.classifiers import Counted
from algorithms.personalization.fedloge import FedLoGeState
from tests.algorithms.personalization import heads
from tests.algorithms.personalization.heads import COUNTS, FREE, LOCAL, MODEL, SGD, TASK, run
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal

KEY = jax.random.key(7)
EVERYBODY = POPULATION.cohort(np.arange(len(SIZES)))


def make(**settings):
    return algorithms.fedloge(TASK, SGD, **({"etf_steps": 20, "num_clients": len(SIZES)} | LOCAL | settings))


METHOD = make()
START = METHOD.init(MODEL, KEY)
ETF = np.asarray(START.etf)


def step(y, own, batch, counts):
    z = heads.represent(y, batch["x"])
    on_body, error = heads.cross_entropy(z @ ETF, batch["y"])
    on_psi, of_psi = heads.cross_entropy(z @ y["kernel"] + y["bias"], batch["y"])
    on_phi, of_phi = heads.cross_entropy(z @ own["kernel"] + own["bias"], batch["y"])
    gradient = {"body": heads.of_body(z, batch["x"], error @ ETF.T), **heads.of_head(z, of_psi)}
    return on_body + on_psi + on_phi, gradient, heads.of_head(z, of_phi)


def rows_of(state):
    found = state.personal.rows["head"]
    return [{k: np.asarray(found[k][i]) for k in ("kernel", "bias")} for i in range(len(SIZES))]


def test_rounds_are_those_of_a_plain_loop():
    state, losses = run(METHOD, key=KEY)
    x, rows, expected = heads.plain_rounds(heads.flat(MODEL), rows_of(START), step)
    assert_trees_close(heads.flat(state.params), x, rtol=1e-11, atol=1e-13)
    for own, other in zip(rows_of(state), rows, strict=True):
        assert_trees_close(own, other, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    assert_trees_equal(state.etf, START.etf)


def perturbed(change):
    """The state after the rounds from another first one."""
    state = change(START)
    for t, ids in enumerate(heads.COHORTS):
        state, _ = heads.compiled(METHOD)(state, POPULATION.cohort(ids), jax.random.key(t))
    return state


def test_the_body_learns_from_no_trained_head():
    expected, _ = run(METHOD, key=KEY)
    shift = lambda leaf: 2 * leaf + 1  # noqa: E731
    of_psi = perturbed(lambda s: s._replace(params={**s.params, "head": jax.tree.map(shift, s.params["head"])}))
    assert_trees_equal(of_psi.params["body"], expected.params["body"])
    assert_trees_equal(of_psi.personal, expected.personal)
    assert np.abs(of_psi.params["head"]["bias"] - expected.params["head"]["bias"]).max() > 0.1
    rows = jax.tree.map(shift, START.personal.rows)
    of_phi = perturbed(lambda s: s._replace(personal=s.personal._replace(rows=rows)))
    assert_trees_equal(of_phi.params, expected.params)
    assert np.abs(of_phi.personal.rows["head"]["bias"] - expected.personal.rows["head"]["bias"]).max() > 0.1


@pytest.mark.parametrize("without", ["psi", "phi"])
def test_without_a_stop_it_would(without):
    """The check above would see it: the body's step is another one if a head's risk reaches it."""

    def leaky(y, own, batch, counts):
        loss, gradient, of_own = step(y, own, batch, counts)
        z, head = heads.represent(y, batch["x"]), y if without == "psi" else own
        _, error = heads.cross_entropy(z @ head["kernel"] + head["bias"], batch["y"])
        reaching = heads.of_body(z, batch["x"], error @ head["kernel"].T)
        return loss, gradient | {"body": gradient["body"] + reaching}, of_own

    expected, _, _ = heads.plain_rounds(heads.flat(MODEL), rows_of(START), leaky)
    state, _ = run(METHOD, key=KEY)
    assert np.abs(state.params["body"] - expected["body"]).max() > 1e-3


def test_the_frame_is_sparse_and_the_heads_are_the_clients_own():
    assert (ETF == 0).sum() == int(0.6 * ETF.size)
    kernels = np.asarray(START.personal.rows["head"]["kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == len(SIZES)
    together = make(own_start=False).init(MODEL, KEY)
    assert_trees_equal(together.personal, fc.client_table(len(SIZES), {"body": fc.Hole(), "head": MODEL["head"]}))
    assert_trees_equal(METHOD.init(MODEL), METHOD.init(MODEL, jax.random.key(0)))


def test_clients_that_are_alike_stay_alike():
    population = fc.Population.from_clients([POPULATION.client(3)] * 2)
    state, _ = run(make(num_clients=2, own_start=False), ([0, 1],) * 2, population, key=KEY)
    for leaf in jax.tree.leaves(state.personal.rows):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_before_the_end_all_predict_by_the_frame_and_clients_by_both_heads():
    state, _ = run(METHOD, key=KEY)
    z = TASK.features(state.params, POPULATION.examples)
    np.testing.assert_allclose(TASK.outputs(METHOD.params(state), POPULATION.examples), z @ ETF, rtol=1e-13)
    for i, own in enumerate(rows_of(state)):
        model = METHOD.personal.model(*parts_of(state, i, COUNTS[i]))
        expected = TASK.head(state.params, z) + z @ own["kernel"] + own["bias"]
        np.testing.assert_allclose(TASK.outputs(model, POPULATION.examples), expected, rtol=1e-12, atol=1e-13)


def parts_of(state, i, counts):
    view = METHOD.personal
    row = jax.tree.map(lambda leaf: leaf[i], view.rows(state).rows)
    return view.shared(state), Counted(row, jnp.asarray(counts))


def small(generic, own, bias=(0.0, 0.0)):
    """A realigned state of two features, two classes and one client, kernels given class by class."""
    of = lambda rows, b: {"kernel": jnp.asarray(rows, float).T, "bias": jnp.asarray(b)}  # noqa: E731
    model = {"h": jnp.ones(2), "head": of(generic, bias)}
    rows = fc.client_table(1, {"h": fc.Hole(), "head": of(own, (0.0, 0.0))})
    return FedLoGeState(model, jnp.eye(2), rows, jnp.bool_(False), jnp.int32(3))


REALIGNED = algorithms.fedloge(FREE, SGD, num_clients=1, batch_size=1)
PAIR = heads.labelled([0, 1])


def end(state):
    return fc.run_events(REALIGNED, "after", state, PAIR.cohort([0]), KEY)


def test_realignment():
    state = end(small([[3, 4], [0, 2]], [[1, 0], [0, 0.5]], bias=(0.3, 0.4)))
    head = REALIGNED.params(state)["head"]
    np.testing.assert_allclose(head["kernel"].T, [[1.02, 1.36], [0, 1.7]], atol=1e-14)
    np.testing.assert_array_equal(head["bias"], state.params["head"]["bias"])
    np.testing.assert_allclose(np.linalg.norm(head["kernel"], axis=0), 1.7, rtol=1e-14)
    again = end(state._replace(params={**state.params, "head": head}))
    np.testing.assert_allclose(REALIGNED.params(again)["head"]["kernel"], head["kernel"], rtol=1e-14)
    assert_trees_equal(end(state), state)


def own_scores(state, counts=(1, 1), z=(1.0, 1.0)):
    row = jax.tree.map(lambda leaf: leaf[0], REALIGNED.personal.rows(state).rows)
    shared = REALIGNED.personal.shared(state)
    head = REALIGNED.personal.model(shared, Counted(row, jnp.asarray(counts)))["head"]
    return np.asarray(jnp.asarray(z) @ head["kernel"] + head["bias"])


def test_norms_go_from_the_clients_head_to_the_generic_one():
    state = end(small([[3, 4], [0, 2]], [[1, 0], [0, 0.5]]))
    np.testing.assert_allclose(own_scores(state), (8, 1.5), rtol=1e-14)
    # A row of the client's head twice as long: so is what is transferred to that class, and to no other.
    longer = end(small([[3, 4], [0, 2]], [[2, 0], [0, 0.5]]))
    np.testing.assert_allclose(own_scores(longer), (2 + 2 * 7, 1.5), rtol=1e-14)


def test_a_client_does_not_predict_classes_that_it_has_not_seen():
    state = end(small([[3, 4], [0, 2]], [[1, 0], [0, 0.5]]))
    np.testing.assert_array_equal(own_scores(state, counts=(0, 3)), (-np.inf, own_scores(state)[1]))
    np.testing.assert_array_equal(own_scores(state, counts=(0, 0)), own_scores(state))
    turned = small([[3, 4], [0, 2]], [[1, 0], [0, 0.5]])
    assert np.isfinite(own_scores(turned, counts=(0, 3))).all(), "before the end all classes count"
    assert own_scores(state, counts=(0, 3), z=(-1.0, -1.0))[0] == -np.inf


def test_classes_are_counted_where_a_client_is_evaluated():
    state, _ = run(METHOD, key=KEY)
    state = fc.run_events(METHOD, "after", state, EVERYBODY, KEY)
    found = fc.evaluate_view(TASK, METHOD.personal, state, POPULATION, adapt_on=POPULATION, key=KEY)["accuracy"]
    psi = heads.flat(state.params)
    for i, own in enumerate(rows_of(state)):
        if not SIZES[i]:
            continue
        examples = POPULATION.client(i)
        z = np.asarray(TASK.features(state.params, examples))
        scores = z @ own["kernel"] + own["bias"]
        scores = scores + z @ (psi["kernel"] * np.linalg.norm(own["kernel"], axis=0)) + psi["bias"]
        scores[:, COUNTS[i] == 0] = -np.inf
        assert found[i] == pytest.approx(float(np.mean(np.argmax(scores, 1) == examples["y"])), rel=1e-6)


def test_another_round_takes_realignment_back():
    state, _ = run(METHOD, key=KEY)
    ended = fc.run_events(METHOD, "after", state, EVERYBODY, KEY)
    assert ended.realigned
    cohort = POPULATION.cohort([0, 3, -1, 5])
    assert_trees_equal(*(heads.compiled(METHOD)(s, cohort, KEY)[0] for s in (state, ended)))


def test_bytes_are_those_of_body_and_generic_head():
    _, metrics = heads.compiled(METHOD)(START, POPULATION.cohort([0, 3, -1, 5]), KEY)
    assert metrics.bytes_up == metrics.bytes_down == fc.num_bytes(MODEL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"etf_norm": 0.0}, "etf_norm must lie in"),
        ({"generic_norm": 0.0}, "generic_norm must lie in"),
        ({"etf_steps": -1}, "etf_steps must be an integer of at least 1"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_a_head_without_a_bias_is_refused():
    task = fc.Task(
        TASK.init, TASK.forward, TASK.loss, TASK.metrics, TASK.features, lambda p, z: z @ p["head"], TASK.paths
    )
    with pytest.raises(ValueError, match="the task's head has no bias, by which classes are left out"):
        algorithms.fedloge(task, SGD, num_clients=2).init({**MODEL, "head": MODEL["head"]["kernel"]})
