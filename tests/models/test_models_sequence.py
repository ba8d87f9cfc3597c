"""Token models: sizes, causality, dropout, input checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import lstm

TOKENS = jnp.array([[1, 4, 2, 0, 3], [2, 2, 1, 4, 0]])
SMALL = {
    "char_lstm": models.char_lstm(5, embed_dim=3, hidden=4),
    "transformer": models.transformer(5, max_len=6, num_layers=2, dim=8, num_heads=2, dropout=0.5),
}
both = pytest.mark.parametrize("name", SMALL)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "count", "outputs", "features"),
    [
        (models.char_lstm(80), 817_872, 80, 256),
        (models.char_lstm(90), 820_522, 90, 256),
        # Embeddings 50*32 + 16*32; a block 4 (32*32+32) + 2*64 + (32*128+128) + (128*32+32); norm, head.
        (models.transformer(50, 16, 2, 32, 4), 2112 + 2 * 12_704 + 64 + 1650, 50, 32),
    ],
    ids=["leaf", "reddi", "transformer"],
)
def test_parameter_counts_and_shapes(model, count, outputs, features):
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((3, 7), jnp.int32)
    assert models.num_parameters(params) == count
    assert jax.eval_shape(model.apply, params, x).shape == (3, 7, outputs)
    assert jax.eval_shape(model.features, params, x).shape == (3, 7, features)


@both
def test_a_later_token_never_changes_earlier_logits(name):
    model = SMALL[name]
    params = model.init(jax.random.key(0))
    apply = jax.jit(model.apply)
    before = apply(params, TOKENS)
    for t in range(TOKENS.shape[1]):
        after = apply(params, TOKENS.at[:, t].set((TOKENS[:, t] + 1) % 5))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any()


def test_lstm_is_the_textbook_recurrence():
    model = models.char_lstm(5, embed_dim=3, hidden=4, num_layers=1)
    params = model.init(jax.random.key(0))
    layer = jax.tree.map(np.asarray, params["lstm_0"])
    np.testing.assert_array_equal(layer["bias"], [0] * 4 + [1] * 4 + [0] * 8)  # the forget gate remembers

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    features = jax.jit(model.features)(params, TOKENS)
    h = c = np.zeros((2, 4))
    for t in range(TOKENS.shape[1]):
        x = np.asarray(params["embed"]["embedding"])[TOKENS[:, t]]
        i, f, g, o = np.split(x @ layer["kernel"] + h @ layer["recurrent"] + layer["bias"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(features[:, t], h, rtol=1e-4, atol=1e-6)


def test_lstm_has_the_derivative_of_the_textbook_recurrence():
    # The recurrence differentiates itself by hand: its rule against autodiff of the same loop, in float64.
    def recur(inputs, recurrent):
        def step(carry, z):
            c, h = carry
            i, f, g, o = jnp.split(z + h @ recurrent, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        zeros = jnp.zeros((inputs.shape[1], recurrent.shape[0]))
        return jax.lax.scan(step, (zeros, zeros), inputs)[1]

    with jax.enable_x64(True):
        inputs, recurrent, ways = (
            jax.random.normal(jax.random.key(seed), shape)
            for seed, shape in enumerate([(6, 2, 12), (3, 12), (6, 2, 3)])
        )

        def gradient(f):
            return jax.grad(lambda *args: (ways * f(*args)).sum(), argnums=(0, 1))

        def curvature(f):  # forwards over the hand-written rule
            return lambda *args: jax.jvp(gradient(f), args, (jnp.sin(inputs), jnp.cos(recurrent)))[1]

        for derivative in (gradient, curvature):
            got, want = (jax.jit(derivative(f))(inputs, recurrent) for f in (lstm._recur, recur))
            for a, b in zip(got, want, strict=True):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_needs_a_key_and_follows_it():
    model = SMALL["transformer"]
    params = model.init(jax.random.key(0))
    apply = jax.jit(model.apply)
    evaluation = apply(params, TOKENS)
    np.testing.assert_array_equal(evaluation, apply(params, TOKENS))
    a, b, c = (apply(params, TOKENS, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a != evaluation).any()


def test_without_dropout_a_key_changes_nothing():
    model = models.transformer(5, 6, 1, 8, 2)
    params = model.init(jax.random.key(0))
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(params, TOKENS, jax.random.key(1)), apply(params, TOKENS))


@both
@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_gives_nan(name, token):
    model = SMALL[name]
    params = model.init(jax.random.key(0))
    out = jax.jit(model.apply)(params, TOKENS.at[0, 2].set(token))
    assert jnp.isnan(out[0, 2:]).all()
    assert not jnp.isnan(out[1]).any()


@both
def test_narrow_integer_tokens_are_fine(name):
    model = SMALL[name]
    params = model.init(jax.random.key(0))
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(params, TOKENS.astype(jnp.uint8)), apply(params, TOKENS))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.char_lstm(0), "vocab_size must be an integer of at least 1, got 0"),
        (lambda: models.char_lstm(5, num_layers=0), "num_layers must be"),
        (lambda: models.transformer(5, 6, 1, 10, 3), "num_heads must divide dim=10, got 3"),
        (lambda: models.transformer(5, 0, 1, 8, 2), "max_len must be"),
        (lambda: models.transformer(5, 6, 1, 8, 2, mlp_ratio=0), "mlp_ratio must be"),
        (lambda: models.transformer(5, 6, 1, 8, 2, dropout=1.0), r"dropout must lie in \[0, 1\), got 1: "),
    ],
)
def test_factory_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@both
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 3)), "x must hold integer tokens, got dtype float"),
        (jnp.ones(3, int), r"x must have shape \[B, T\]"),
        (jnp.ones((2, 0), int), "T >= 1"),
    ],
)
def test_inputs_are_checked_when_traced(name, x, message):
    params = jax.eval_shape(SMALL[name].init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL[name].apply, params, x)


def test_a_sequence_longer_than_max_len_raises():
    params = jax.eval_shape(SMALL["transformer"].init, jax.random.key(0))
    with pytest.raises(ValueError, match="at most max_len=6 tokens a sequence, got 7"):
        jax.eval_shape(SMALL["transformer"].apply, params, jnp.zeros((1, 7), int))


def test_a_classifier_of_texts_does_not_see_the_padding():
    model = models.transformer(6, 5, 1, 8, 2, num_classes=3, pad_token=5)
    params = jax.jit(model.init)(jax.random.key(0))
    short = jnp.array([[1, 2, 3], [4, 0, 5], [5, 5, 5]])
    long = jnp.pad(short, ((0, 0), (0, 2)), constant_values=5)
    apply = jax.jit(model.apply)
    assert apply(params, short).shape == (3, 3)
    assert jax.eval_shape(model.features, params, short).shape == (3, 8)
    np.testing.assert_allclose(apply(params, long), apply(params, short), rtol=1e-10, atol=1e-12)
    # Where the padding does count, it shows; and every other position does count.
    counted = jax.jit(models.transformer(6, 5, 1, 8, 2, num_classes=3).apply)
    assert not np.allclose(counted(params, long), apply(params, long), atol=1e-6)
    assert not np.allclose(apply(params, short), apply(params, short.at[:2, 1].set(4)), atol=1e-6)
    with pytest.raises(ValueError, match="pad_token=5 is for texts to be classified"):
        models.transformer(6, 5, 1, 8, 2, pad_token=5)
