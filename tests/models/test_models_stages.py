"""Models as stages: a model cut anywhere is the model, bit for bit; groups of parameters by the type of the module."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
import models
from models import capture, groups
from models.batch_norm import with_frozen_statistics

IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
TOKENS = jnp.array([[1, 4, 2, 0, 0], [2, 2, 1, 4, 3]])
TRANSFORMER = {"vocab_size": 5, "max_len": 6, "num_layers": 2, "dim": 8, "num_heads": 2, "dropout": 0.5}
MODELS = {
    "logistic_regression": (models.logistic_regression((8, 8, 1), 3), IMAGES),
    "mlp": (models.mlp((8, 8, 1), 3, hidden=(6, 5), dropout=(0.5, 0.5)), IMAGES),
    "cnn": (models.cnn((8, 8, 1), 3, channels=(2, 3), hidden=4), IMAGES),
    "autoencoder": (models.autoencoder((8, 8, 1), channels=(2, 3), latent=4), IMAGES),
    "cnn_bn": (with_frozen_statistics(models.cnn_bn((8, 8, 1), 3, channels=(2, 3), hidden=4)), IMAGES),
    "resnet18_gn": (models.resnet18_gn((8, 8, 1), 3, width=2), IMAGES),
    "char_lstm": (models.char_lstm(5, embed_dim=3, hidden=4), TOKENS),
    "decoder": (models.transformer(**TRANSFORMER), TOKENS),
    "encoder": (models.transformer(**TRANSFORMER, num_classes=3), TOKENS),
    "padded encoder": (models.transformer(**TRANSFORMER, num_classes=3, pad_token=0), TOKENS),
    "bert": (
        models.pretrained.bert(
            {
                "vocab_size": 5,
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 6,
                "max_position_embeddings": 6,
                "type_vocab_size": 2,
                "layer_norm_eps": 1e-12,
                "hidden_act": "gelu",
            },
            3,
            pooling="pooler",
            dropout=0.5,
        ),
        TOKENS,
    ),
    "vit": (
        models.pretrained.vit(
            {
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 6,
                "image_size": 4,
                "patch_size": 2,
                "num_channels": 1,
                "layer_norm_eps": 1e-12,
                "hidden_act": "gelu",
            },
            3,
            input_shape=(8, 8, 1),
            dropout=0.5,
        ),
        IMAGES,
    ),
    "multi_head": (
        models.heads.multi_head(models.mlp((8, 8, 1), 6, hidden=(5,)), 2),
        {"inputs": IMAGES, "task": jnp.array([0, 1])},
    ),
    "normalized": (models.map_inputs(models.mlp((8, 8, 1), 3, hidden=(5,)), lambda x: x / 255 - 1), IMAGES),
}
every_model = pytest.mark.parametrize("name", MODELS)


def program(function, *args):
    """The traced program as text: where two are equal, so are results and derivatives, bit for bit."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


@every_model
def test_a_model_cut_anywhere_is_the_model(name):
    model, x = MODELS[name]
    params, key = jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(1)
    whole = program(model.apply, params, x, key)

    def cut_at(k):
        return lambda params, x, key: model.run(params, model.run(params, x, 0, k, key=key), k, key=key)

    def cut_everywhere(params, x, key):
        for stage in range(len(model.stages)):
            x = model.run(params, x, stage, stage + 1, key)
        return x

    assert program(cut_everywhere, params, x, key) == whole
    if name == "resnet18_gn":  # each trace takes half a second
        return
    for k, stage in enumerate((*model.stages, len(model.stages))):
        assert program(cut_at(stage if k % 2 else k), params, x, key) == whole
    assert program(lambda p, x, key: cut_at(1)(p, x, None), params, x, key) == program(
        lambda p, x, key: model.apply(p, x), params, x, key
    )


@pytest.mark.parametrize("name", ["mlp", "padded encoder"])
def test_pieces_that_are_compiled_apart_give_the_same_bits(name):
    model, x = MODELS[name]
    params, key = model.init(jax.random.key(0)), jax.random.key(1)
    run = jax.jit(model.run, static_argnums=(2, 3))
    y = x
    for k in range(len(model.stages)):
        y = run(params, y, k, k + 1, key)
    np.testing.assert_array_equal(y, run(params, x, None, None, key))


def test_the_gradient_goes_through_a_split_as_through_the_whole():
    """What a split round computes: forward and backward on either side, with values and their gradients sent."""
    model, x = MODELS["padded encoder"]
    params = model.init(jax.random.key(0))

    def whole(params):
        return jnp.sum(model.apply(params, x) ** 2)

    def split(params):
        sent, back = jax.vjp(lambda params: model.run(params, x, stop="block_1"), params)
        value, above = jax.vjp(lambda params, sent: jnp.sum(model.run(params, sent, "block_1") ** 2), params, sent)
        server, cotangent = above(jnp.ones_like(value))
        (client,) = back(cotangent)
        return jax.tree.map(jnp.add, server, client)

    jax.tree.map(np.testing.assert_array_equal, jax.jit(split)(params), jax.jit(jax.grad(whole))(params))


@every_model
def test_features_and_captured_layers_are_runs(name):
    model, x = MODELS[name]
    params = jax.eval_shape(model.init, jax.random.key(0))
    features = model.run if name != "multi_head" else lambda *args: model.run(*args)["inputs"]
    assert program(model.features, params, x) == program(lambda p, x: features(p, x, 0, "head"), params, x)
    assert model.stages[-1] == "head"
    outputs = jax.eval_shape(lambda p, x: capture.stage_outputs(model, p, x), params, x)
    assert set(outputs) == set(model.stages)
    assert outputs["head"] == jax.eval_shape(model.apply, params, x)
    first = model.stages[0]
    some = jax.eval_shape(lambda p, x: capture.stage_outputs(model, p, x, ["head", first]), params, x)
    assert some == {first: outputs[first], "head": outputs["head"]}


def test_captured_layers_of_a_model_with_running_statistics():
    model, (plain, x) = models.cnn_bn((8, 8, 1), 3, channels=(2, 3), hidden=4), MODELS["cnn_bn"]
    variables = model.init(jax.random.key(0))
    outputs = capture.stage_outputs(model, variables, x)
    assert list(outputs) == list(model.stages)
    np.testing.assert_array_equal(outputs["head"], model.apply(variables, x)[0])
    assert with_frozen_statistics(plain) is plain


def test_a_stage_reads_its_own_parameters_only():
    model, x = MODELS["cnn"]
    params = jax.eval_shape(model.init, jax.random.key(0))
    body, head = fc.partition(params, ["conv_0", "conv_1", "dense"])
    hidden = jax.eval_shape(lambda body, x: model.run(body, x, stop="head"), body, x)
    assert jax.eval_shape(lambda head, x: model.run(head, x, "head"), head, hidden).shape == (2, 3)


BAD = [
    ("name", lambda run: run("conv_2", None), ["start", "'conv_2'", "conv_1, dense, head"]),
    ("number", lambda run: run(0, 5), ["stop", "got 5", "up to 4"]),
    ("negative", lambda run: run(-5, None), ["start", "got -5"]),
    ("boolean", lambda run: run(True, None), ["start", "got True"]),
    ("order", lambda run: run("dense", "conv_1"), ["stop='conv_1' comes before start='dense'"]),
    ("shape", lambda run: run(0, 1, jnp.ones((8, 8, 1))), ["x must have shape", "x[None]"]),
]


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_stages(call, words):
    model, x = MODELS["cnn"]
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(lambda start, stop, x=x: jax.eval_shape(lambda p, x: model.run(p, x, start, stop), params, x))
    for word in words:
        assert word in str(caught.value)


def test_a_model_of_functions_alone_says_what_it_lacks():
    model = models.Model(lambda key: {}, lambda params, x, key=None: x, lambda params, x, key=None: x)
    with pytest.raises(ValueError, match="no stages"):
        model.run({}, IMAGES, 0, 1)
    with pytest.raises(ValueError, match=r"'norm'.*partition"):
        model.paths("norm")


PROJECTIONS = ["key", "out", "query", "value"]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("cnn", "convolution", ["conv_0/bias", "conv_0/kernel", "conv_1/bias", "conv_1/kernel"]),
        ("cnn", "dense", ["dense/bias", "dense/kernel", "head/bias", "head/kernel"]),
        ("cnn", "bias", ["conv_0/bias", "conv_1/bias", "dense/bias", "head/bias"]),
        ("char_lstm", "recurrent", [f"lstm_{i}/{leaf}" for i in range(2) for leaf in ("bias", "kernel", "recurrent")]),
        ("char_lstm", "embedding", ["embed/embedding"]),
        ("decoder", "embedding", ["embed/embedding", "position/embedding"]),
        (
            "decoder",
            "attention",
            [f"block_{i}/{n}/{p}" for i in "01" for n in PROJECTIONS for p in ("bias", "kernel")],
        ),
        (
            "encoder",
            "norm",
            [f"block_{i}/{n}/{p}" for i in "01" for n in ("attention_norm", "mlp_norm") for p in ("bias", "scale")]
            + ["norm/bias", "norm/scale"],
        ),
        ("multi_head", "head", ["head/bias", "head/kernel"]),
        ("normalized", "head", ["head/bias", "head/kernel"]),
    ],
)
def test_groups_of_parameters(name, kind, expected):
    model, _ = MODELS[name]
    assert list(model.paths(kind)) == expected
    params = jax.eval_shape(model.init, jax.random.key(0))
    chosen, rest = fc.partition(params, model.paths(kind))
    assert list(fc.leaf_paths(chosen)) == expected
    assert fc.combine(chosen, rest) == params


def test_counts_of_biases_are_those_of_the_formula():
    """11 D in a block (two norms, four projections, 4 D and D in the perceptron), D in the final norm, the head's."""
    D, L, classes = 8, 2, 3
    model, _ = MODELS["encoder"]
    biases, _ = fc.partition(jax.eval_shape(model.init, jax.random.key(0)), model.paths("bias"))
    assert models.num_parameters(biases) == L * 11 * D + D + classes


def test_what_a_model_has_not_is_said():
    model, _ = MODELS["mlp"]
    with pytest.raises(ValueError, match="no parameters of kind 'norm': it has bias, dense, head"):
        model.paths("norm")
    with pytest.raises(ValueError, match="got 'norms'"):
        model.paths("norms")


class Own(nn.Module):
    """A flax module of a user's own, of compact layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x).reshape(x.shape[0], -1, 4)
        x = nn.RNN(nn.GRUCell(4))(nn.MultiHeadDotProductAttention(2)(x))
        return nn.Dense(3)(nn.RMSNorm()(x[:, -1]))


def test_any_flax_module_is_asked():
    kinds = groups.module_paths(Own(), jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), True)
    assert kinds["norm"] == ("BatchNorm_0/bias", "BatchNorm_0/scale", "RMSNorm_0/scale")
    assert kinds["convolution"] == ("Conv_0/bias", "Conv_0/kernel")
    assert {path.split("/")[1] for path in kinds["attention"]} == {"query", "key", "value", "out"}
    assert {path.split("/")[0] for path in kinds["recurrent"]} == {"GRUCell_0"}
    assert "head" not in kinds
