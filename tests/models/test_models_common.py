"""What every model must satisfy: one row in CASES and all of it is checked."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from models import losses

VOCAB, LENGTH = 11, 6

# Small instances: (model, what its inputs are, learning rate of the tiny problem).
CASES = {
    "logistic_regression": (models.logistic_regression((4, 4, 1), 3), (4, 4, 1), 0.1),
    "mlp": (models.mlp((4, 4, 1), 3, hidden=(16, 8)), (4, 4, 1), 0.01),
    "cnn": (models.cnn((4, 4, 1), 3, channels=(4, 4), hidden=8), (4, 4, 1), 0.01),
    "autoencoder": (models.autoencoder((4, 4, 1), channels=(4,), latent=8), (4, 4, 1), 0.01),
    "char_lstm": (models.char_lstm(VOCAB, embed_dim=4, hidden=16), None, 0.02),
    "transformer": (
        models.transformer(VOCAB, LENGTH, num_layers=1, dim=16, num_heads=2, dropout=0.1),
        None,
        0.01,
    ),
}
# The deep one compiles slowly: it has its own, single compilation in test_models_image.py. The one with running
# statistics is no `Model` and tested in test_models_tasks.py.
FACTORIES = {*CASES, "resnet18_gn", "cnn_bn"}


def batch(shape, size=8, dtype=jnp.float32):
    """Images with labels that are a function of them, or token sequences with the next token as target."""
    rng = np.random.default_rng(0)
    if shape is None:
        tokens = rng.integers(VOCAB, size=(size, 1)) + np.arange(LENGTH + 1)
        tokens = jnp.asarray(tokens % VOCAB, jnp.int32)
        return {"x": tokens[:, :-1], "y": tokens[:, 1:]}
    y = rng.integers(3, size=size)
    x = rng.normal(size=(size, *shape))
    x[..., 0, 0, 0] += 3 * y
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, jnp.int32)}


def loss_of(model, shape):
    if model is CASES["autoencoder"][0]:
        return losses.reconstruction(model)
    return losses.sequence_cross_entropy(model) if shape is None else losses.cross_entropy(model)


def learn(model, shape, learning_rate, steps=30):
    """Losses of Adam on one batch, in one compiled scan."""
    data, loss_fn = batch(shape), loss_of(model, shape)
    optimizer = optax.adam(learning_rate)

    def step(carry, key):
        params, state = carry
        loss, gradient = jax.value_and_grad(lambda p: loss_fn(p, data, key).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    params = model.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda p, s: jax.lax.scan(step, (p, s), keys)[1])(params, optimizer.init(params))


def stacked(model, clients=2):
    params = model.init(jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.stack([leaf + 0.1 * c for c in range(clients)]), params)


every_model = pytest.mark.parametrize("name", CASES)


def test_every_factory_has_a_case():
    exported = {name for name in models.__all__ if callable(getattr(models, name))}
    others = {"Model", "StatisticsModel", "Tokens", "adapted", "map_inputs", "num_parameters", "split", "task"}
    assert exported - others == FACTORIES


@every_model
def test_parameters_are_a_plain_dict_with_a_dense_head(name):
    model, _, _ = CASES[name]
    params = model.init(jax.random.key(0))
    assert type(params) is dict
    assert set(params["head"]) == {"kernel", "bias"}


@every_model
def test_head_applied_to_features_is_apply(name):
    model, shape, _ = CASES[name]
    params, x = model.init(jax.random.key(0)), batch(shape)["x"]
    params["head"] = jax.tree.map(lambda leaf: leaf + 0.1, params["head"])  # also where it starts at zero
    out, features = jax.jit(lambda p, x: (model.apply(p, x), model.features(p, x)))(params, x)
    rows = x.shape if shape is None else x.shape[:1]
    assert features.shape[:-1] == (x.shape[:-1] if name == "autoencoder" else rows)
    head = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(head, out, rtol=1e-5, atol=1e-6)


@every_model
def test_vmap_over_parameters_equals_a_loop(name):
    model, shape, _ = CASES[name]
    params, x = stacked(model), batch(shape, size=2)["x"]
    together = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(params, x)
    apply = jax.jit(model.apply)
    for c in range(2):
        alone = apply(jax.tree.map(lambda leaf, c=c: leaf[c], params), x)
        np.testing.assert_allclose(together[c], alone, rtol=1e-4, atol=1e-5)


@every_model
def test_learns_a_tiny_problem(name):
    curve = learn(*CASES[name])
    assert curve[-1] < 0.6 * curve[0]


@every_model
def test_float64_agrees_with_float32(name):
    model, shape, _ = CASES[name]
    data = batch(shape, size=2)
    with jax.enable_x64(False):
        params = model.init(jax.random.key(0))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        single = jax.jit(loss_of(model, shape))(params, data, None)
        assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        data64 = data if shape is None else {**data, "x": data["x"].astype(jnp.float64)}
        fresh = jax.eval_shape(model.init, jax.random.key(0))
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(fresh))
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        loss = jax.jit(loss_of(model, shape))(double, data64, None)
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, single, rtol=1e-4)


@every_model
def test_initialization_depends_on_the_key_alone(name):
    model, _, _ = CASES[name]
    a, b = (model.init(jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_num_parameters_counts_arrays_and_shapes():
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.ones(()), jax.ShapeDtypeStruct((4,), jnp.float32)], "c": {}}
    assert models.num_parameters(tree) == 11


def test_imports_no_methods_and_no_pipelines():
    allowed = {"jax", "flax", "optax", "numpy", "models", "fedjax_core", "safetensors", "tokenizers"}
    standard = {"collections", "contextlib", "functools", "importlib", "json", "math", "operator", "pathlib", "re"}
    standard |= {"typing", "zlib"}
    for path in Path(models.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed | standard, path.name
