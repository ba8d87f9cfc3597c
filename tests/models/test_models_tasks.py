"""Tasks of models, and the model with batch normalization."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from fedjax_core import evaluate, leaf_paths
from models import losses, metrics

KEY = jax.random.key(0)
NET = models.cnn_bn((4, 4, 1), 3, channels=(3,), hidden=4, momentum=0.6)


def images(size=5):
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(2 + 3 * rng.normal(size=(size, 4, 4, 1))),
        "y": jnp.asarray(rng.integers(0, 3, size), jnp.int32),
    }


def tokens():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, (4, 6)).astype(np.int32)
    y[0, 2:], y[1, :] = -1, -1
    return {"x": jnp.asarray(np.maximum(y, 0)), "y": jnp.asarray(y)}


def regression():
    return {**images(), "y": jnp.ones((5, 3))}


LM = models.transformer(5, 6, num_layers=1, dim=4, num_heads=1)
MLP = models.mlp((4, 4, 1), 3, hidden=(4,))
CASES = {
    "classification": (MLP, {}, losses.cross_entropy(MLP), metrics.classification(MLP), images),
    "smoothed": (MLP, {"label_smoothing": 0.1}, losses.cross_entropy(MLP, 0.1), metrics.classification(MLP), images),
    "sequence": (LM, {"pad_id": -1}, losses.sequence_cross_entropy(LM, -1), metrics.sequence(LM, -1), tokens),
    "regression": (MLP, {}, losses.squared_error(MLP), None, regression),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_its_loss_and_its_metrics(name):
    model, options, loss_fn, metric_fn, data = CASES[name]
    task = models.task(model, "classification" if name == "smoothed" else name, **options)
    params, batch = task.init(KEY), data()
    np.testing.assert_array_equal(task(params, batch, KEY), loss_fn(params, batch, KEY))
    found = evaluate(task, params, batch)
    if metric_fn is not None:
        jax.tree.map(np.testing.assert_array_equal, found, evaluate(metric_fn, params, batch))
    z = task.features(params, batch)
    np.testing.assert_allclose(task.head(params, z), model.apply(params, batch["x"]), rtol=1e-12)
    assert set(task.paths("head")) == {"head/bias", "head/kernel"}


@pytest.mark.parametrize("options", [{}, {"key": KEY}, {"key": KEY, "frozen": True}, {"key": KEY, "mask": True}])
def test_batch_normalization_is_cut_at_any_stage_to_the_same_bits(options):
    """The second piece begins with the statistics that the first has moved."""
    variables, x = NET.init(KEY), images()["x"]
    options = {**options, **({"mask": jnp.arange(5) < 3} if "mask" in options else {})}
    whole = NET.apply(variables, x, **options)
    assert NET.stages == ("conv_0", "dense", "head")
    for k in range(len(NET.stages) + 1):
        z, moved = NET.run(variables, x, 0, k, **options)
        chex.assert_trees_all_equal(NET.run(variables._replace(statistics=moved), z, k, **options), whole)
        assert jax.tree.structure(moved) == jax.tree.structure(variables.statistics)
    chex.assert_trees_all_equal(NET.run(variables, x, stop="head", **options), NET.features(variables, x, **options))
    shifted = models.map_inputs(NET, lambda x: x + 1)
    chex.assert_trees_all_equal(shifted.run(variables, x, "conv_0", **options), NET.apply(variables, x + 1, **options))
    z, _ = NET.run(variables, x, stop="dense", **options)
    chex.assert_trees_all_equal(
        shifted.run(variables, z, "dense", **options), NET.run(variables, z, "dense", **options)
    )
    with pytest.raises(ValueError, match="start must be a stage, conv_0, dense, head"):
        NET.run(variables, x, "conv_1")


def test_statistics_are_those_of_the_real_rows():
    """Padding, whatever is in it, changes neither outputs nor statistics; without real rows nothing is NaN."""
    model, batch = NET.init(KEY), images()
    outputs, new = NET.apply(model, batch["x"], KEY)
    padded = jnp.concatenate([batch["x"], jnp.full((3, 4, 4, 1), 1e3)])
    mask = jnp.arange(8) < 5
    outputs_padded, new_padded = NET.apply(model, padded, KEY, mask)
    np.testing.assert_allclose(outputs_padded[:5], outputs, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), new_padded, new)
    _, nothing = NET.apply(model, padded, KEY, jnp.zeros(8, bool))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))


def test_statistics_move_by_the_momentum_and_only_in_training():
    model, x = NET.init(KEY), images()["x"]
    _, new = NET.apply(model, x, KEY)
    kernel = model.params["conv_0"]["kernel"]
    h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(new["norm_0"]["mean"], 0.4 * h.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(new["norm_0"]["var"], 0.6 + 0.4 * h.var((0, 1, 2)), rtol=1e-10)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(model))
    for options in ({}, {"key": KEY, "frozen": True}):
        outputs, same = NET.apply(model, x, **options)
        assert same is model.statistics
        z, _ = NET.features(model, x, **options)
        np.testing.assert_allclose(NET.head(model.params, z), outputs, rtol=1e-12)
    assert set(NET.paths("norm")) == {path for path in leaf_paths(model.params) if "norm" in path}


BAD = {
    "kind": (lambda: models.task(MLP, "text"), "kind must be one of"),
    "padding": (lambda: models.task(MLP, pad_id=-1), "choose 'sequence'"),
    "smoothing": (lambda: models.task(MLP, "regression", label_smoothing=0.1), "choose 'classification'"),
    "momentum": (lambda: models.cnn_bn(momentum=1.0), "momentum must lie in"),
    "shape": (lambda: NET.apply(NET.init(KEY), jnp.zeros((2, 4, 4))), "add the channel axis"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
