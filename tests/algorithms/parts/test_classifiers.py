"""Frames, balanced risks and counts of classes, with the values that they have in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from algorithms.parts import classifiers
from tests.algorithms.personalization.heads import MODEL, TASK
from tests.problems import softmax_population

KEY = jax.random.key(0)


def test_a_frame_of_three_classes():
    etf = classifiers.etf_of(jnp.eye(3))
    np.testing.assert_allclose(etf, np.where(np.eye(3), 0.81649658, -0.40824829), atol=1e-8)


def test_a_frame_has_unit_columns_as_far_from_each_other_as_can_be():
    etf = np.asarray(classifiers.simplex_etf(KEY, 7, 4))
    np.testing.assert_allclose(etf.T @ etf, 4 / 3 * (np.eye(4) - 1 / 4), atol=1e-14)
    np.testing.assert_allclose(etf.sum(1), 0, atol=1e-15)
    assert np.linalg.matrix_rank(etf) == 3
    assert np.abs(etf - classifiers.simplex_etf(jax.random.key(1), 7, 4)).max() > 0.1
    assert classifiers.simplex_etf(KEY, 7, 4, jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="a frame of 4 classes needs as many features, got 3: widen the layer"):
        classifiers.simplex_etf(KEY, 3, 4)


@pytest.mark.parametrize(("classes", "angle"), [(3, -2.09439510), (10, -1.68213734), (100, -1.58089751)])
def test_the_spread_of_a_frame_of_the_right_norm_is_its_angle(classes, angle):
    etf = classifiers.etf_of(jnp.eye(classes))
    assert classifiers.spread(0.1 * etf, 0.1) == pytest.approx(angle, abs=1e-8)
    assert angle == pytest.approx(-np.arccos(-1 / (classes - 1)), abs=1e-8)
    assert classifiers.spread(etf, 0.1) == pytest.approx(angle + 0.81 * classes, abs=1e-8)


def test_the_spread_of_other_columns():
    assert classifiers.spread(classifiers.etf_of(jnp.eye(3)), 0.1) == pytest.approx(0.33560490, abs=1e-8)
    opposite = 0.1 * classifiers.etf_of(jnp.eye(2))
    assert classifiers.spread(opposite, 0.1) == pytest.approx(-3.13712051, abs=1e-8), "angles stop before pi"
    columns = jnp.array([(0.1, 0, 0), (0, 0.1, -0.05), (0.02, 0, 0.08)]).T
    assert classifiers.spread(columns, 0.1) == pytest.approx(-1.40703032, abs=1e-8)
    nothing = jnp.zeros((3, 2)).at[0, 0].set(1.0)
    assert np.isfinite(jax.grad(classifiers.spread)(nothing, 0.1)).all(), "a column may have no entry left"


def by_hand(frame, kept, steps, norm=0.1, lr=1e-4):
    """The steps of Adam in NumPy, the gradient of the nearest angle written out."""
    first, second = np.zeros_like(frame), np.zeros_like(frame)
    for t in range(1, steps + 1):
        norms = np.linalg.norm(frame, axis=0)
        unit = frame / norms
        cosines = unit.T @ unit - 2 * np.eye(frame.shape[1])
        of_unit = np.zeros_like(frame)
        for c, nearest in enumerate(cosines.argmax(0)):
            slope = 1 / np.sqrt(1 - cosines[nearest, c] ** 2) / frame.shape[1]
            of_unit[:, c] += slope * unit[:, nearest]
            of_unit[:, nearest] += slope * unit[:, c]
        g = (of_unit - unit * (unit * of_unit).sum(0)) / norms + 2 * (norms - norm) * unit
        g = np.where(kept, g, 0)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        frame = frame - lr * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return frame


def test_a_sparse_frame_takes_the_steps_of_a_plain_program():
    begun, done = (
        np.asarray(classifiers.sparse_etf(KEY, 20, 4, sparsity=0.6, norm=0.1, steps=steps)) for steps in (0, 50)
    )
    assert (begun == 0).sum() == (done == 0).sum() == int(0.6 * 20 * 4)
    np.testing.assert_array_equal(begun == 0, done == 0)
    np.testing.assert_allclose(done, by_hand(begun, begun != 0, 50), rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_a_sparse_frame_keeps_its_zeros_and_spreads():
    """Where the norms end depends on the draw; a program by hand ends between 0.1004 and 0.1008 as well."""
    make = jax.jit(lambda: classifiers.sparse_etf(KEY, 512, 10, sparsity=0.6, norm=0.1, steps=10_000))
    etf = np.asarray(make())
    assert (etf == 0).sum() == int(0.6 * 512 * 10)
    norms = np.linalg.norm(etf, axis=0)
    assert norms.min() >= 0.1004
    assert norms.max() <= 0.1008
    cosines = (etf / norms).T @ (etf / norms)
    angles = np.degrees(np.arccos(cosines[np.triu_indices(10, 1)]))
    assert angles.mean() == pytest.approx(96.379, abs=1e-3)


def test_the_share_of_zeros_may_be_traced():
    def make(sparsity):
        return classifiers.sparse_etf(KEY, 5, 3, sparsity=sparsity, norm=0.1, steps=2)

    np.testing.assert_array_equal(jax.jit(make)(0.5), make(0.5))
    assert (np.asarray(make(0.5)) == 0).sum() == 7
    assert (np.asarray(make(0.0)) == 0).sum() == 0


def test_a_balanced_risk_leaves_absent_classes_out():
    outputs, y = jnp.array([[1.0, 0, 0]]), jnp.array([0])

    def risk(counts):
        return float(classifiers.cross_entropy(classifiers.balanced(outputs, jnp.asarray(counts)), y)[0])

    assert risk([1, 3, 0]) == pytest.approx(0.74366838, abs=1e-8)
    assert float(classifiers.cross_entropy(outputs, y)[0]) == pytest.approx(0.55144471, abs=1e-8)
    assert risk([4, 4, 4]) == pytest.approx(0.55144471, abs=1e-8)
    assert risk([0, 0, 0]) == pytest.approx(0.55144471, abs=1e-8)
    assert risk([7, 21, 0]) == pytest.approx(risk([1, 3, 0]), rel=1e-14), "a constant on all log n changes nothing"
    slope = jax.grad(lambda o: classifiers.cross_entropy(classifiers.balanced(o, jnp.array([1, 3, 0])), y)[0])(outputs)
    assert np.isfinite(slope).all()
    assert slope[0, 2] == 0


def test_shares_have_the_mean_one():
    np.testing.assert_allclose(classifiers.shares(jnp.array([3, 1, 0]), float), [2.25, 0.75, 0])
    np.testing.assert_array_equal(classifiers.shares(jnp.array([0, 0]), float), 1)


@pytest.mark.parametrize("plan", [None, fc.Plan(lanes=3)])
def test_clients_count_their_classes(plan):
    population = softmax_population((3, 0, 8, 1))
    clients = fc.local_training(batch_size=3, num_steps=1, plan=plan)
    cohort = population.cohort([2, -1, 0, 1, 3])
    done = classifiers.count(clients, lambda examples: examples["y"], 3, cohort, KEY)
    expected = [np.bincount(population.client(i)["y"], minlength=3) if i >= 0 else [0] * 3 for i in (2, -1, 0, 1, 3)]
    np.testing.assert_array_equal(done.outputs.counts, expected)
    assert not np.any(done.bytes_up)
    assert not np.any(done.bytes_down)


def test_a_head_is_read_and_replaced():
    kernel, bias = classifiers.dense(TASK, MODEL)
    np.testing.assert_array_equal(kernel, MODEL["head"]["kernel"])
    changed = classifiers.with_dense(TASK, MODEL, 2 * kernel)
    np.testing.assert_array_equal(changed["head"]["kernel"], 2 * kernel)
    np.testing.assert_array_equal(changed["head"]["bias"], jnp.zeros_like(bias))
    assert changed["body"] is MODEL["body"]
    for wrong in ({"kernel": kernel.T, "bias": bias}, {"kernel": kernel, "bias": kernel}, {"bias": bias}):
        with pytest.raises(ValueError, match=r"the task's head must be one dense layer, .* got leaves of shapes \["):
            classifiers.dense(TASK, {**MODEL, "head": wrong})
    with pytest.raises(ValueError, match="has one output"):
        classifiers.dense(TASK, {"head": {"kernel": kernel[:, :1], "bias": bias[:1]}})
    with pytest.raises(TypeError, match="task must be a Task with features and a head, got function"):
        classifiers.check(lambda params, batch, key: 0.0, lambda examples: examples["y"])
    with pytest.raises(TypeError, match="labels"):
        classifiers.check(TASK, "y")


def test_labels_are_one_for_each_example():
    with pytest.raises(ValueError, match=r"one class for each example, int\[B\], got int32\[2, 3\]: pass labels="):
        classifiers.classes_of(lambda batch: batch, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"labels asks examples for 'y', and they have \['label', 'x'\]: pass labels="):
        classifiers.classes_of(lambda batch: batch["y"], {"x": jnp.zeros(2), "label": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"got float"):
        classifiers.classes_of(lambda batch: batch, jnp.zeros(2))
