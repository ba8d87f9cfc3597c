"""Adapters on every kind of model: neutral starts, gradients, ranks of clients, merging, errors."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
import models
from models import adapters, losses
from models.batch_norm import with_frozen_statistics

IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
TOKENS = jnp.array([[1, 4, 2, 0, 0], [2, 2, 1, 4, 3]])
SIZES = {"vocab_size": 5, "max_len": 6, "dim": 8, "num_heads": 2}
ENCODER = models.transformer(**SIZES, num_layers=2, num_classes=3, pad_token=0)
DECODER = models.transformer(**SIZES, num_layers=2)
SMALL = models.transformer(**SIZES, num_layers=1, num_classes=3, pad_token=0)  # compiles in half the time
MLP = models.mlp((8, 8, 1), 3, hidden=(6, 5))
CNN = models.cnn((8, 8, 1), 3, channels=(2, 3), hidden=4)
CNN_BN = models.cnn_bn((8, 8, 1), 3, channels=(2, 3), hidden=4, momentum=0.5)
RESNET = models.resnet18_gn((8, 8, 1), 3, width=2)

GRAFTED = {
    "lora mlp": (MLP, adapters.lora(3), MLP.paths("dense"), IMAGES),
    "lora cnn": (CNN, adapters.lora(3), "dense", IMAGES),
    "lora encoder": (SMALL, adapters.lora(3, scaling="root"), re.compile(".*/(query|value)/kernel"), TOKENS),
    "scale_shift cnn": (CNN, adapters.scale_shift(), lambda path, leaf: True, IMAGES),
    "scale_shift encoder": (SMALL, adapters.scale_shift(), ["block_0", "norm", "head"], TOKENS),
    "scale_shift cnn_bn": (CNN_BN, adapters.scale_shift(), ["norm_0", "dense_norm", "head"], IMAGES),
    "lora cnn_bn": (CNN_BN, adapters.lora(3), CNN_BN.paths("dense"), IMAGES),
    "bottleneck encoder": (SMALL, adapters.bottleneck(2), re.compile("block_[0-9]+/down/kernel"), TOKENS),
    "no prompt": (SMALL, adapters.prompt(0), None, TOKENS),
}
every = pytest.mark.parametrize("name", GRAFTED)


@jax.jit
def noisy(tree, key=7):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return treedef.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def grafted(name):
    model, adapter, where, x = GRAFTED[name]
    return with_frozen_statistics(model), models.adapted(model, adapter, where), x


@every
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_merges(name):
    model, tuned, x = grafted(name)
    base, fresh = model.init(jax.random.key(0)), tuned.init(jax.random.key(1))
    adapter = noisy(fresh)

    def outputs(base, fresh, adapter):
        plain, trained = model.apply(base, x), tuned.apply(base, adapter, x)
        if name.startswith(("lora", "scale_shift")):
            merged = tuned.merge(base, adapter)
            again = tuned.unmerge(merged, adapter)
            return plain, tuned.apply(base, fresh, x), trained, model.apply(merged, x), again
        return plain, tuned.apply(base, fresh, x), trained

    plain, neutral, trained, *merged = jax.jit(outputs)(base, fresh, adapter)
    np.testing.assert_allclose(neutral, plain, rtol=1e-13)
    if jax.tree.leaves(adapter)[0].size:
        assert jnp.max(jnp.abs(trained - plain)) > 1e-3
    if merged:
        np.testing.assert_allclose(merged[0], trained, rtol=1e-9, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), merged[1], base)


@pytest.mark.parametrize("name", ["lora mlp", "scale_shift encoder", "lora cnn_bn", "no prompt"])
def test_an_adapted_model_cut_anywhere_is_the_same_program(name):
    model, tuned, x = grafted(name)
    base, adapter = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(tuned.init, jax.random.key(1))

    def cut(base, adapter, x):
        for stage in range(len(tuned.stages)):
            x = tuned.run(base, adapter, x, stage, stage + 1)
        return x

    assert str(jax.make_jaxpr(cut)(base, adapter, x)) == str(jax.make_jaxpr(tuned.apply)(base, adapter, x))


@pytest.mark.quick
def test_lora_is_its_formula():
    """y = x W + b + s (x A) B, written out for a perceptron of one hidden layer."""
    model = models.mlp((4,), 3, hidden=(5,))
    scales = {"rank": 16 / 2, "root": 16 / 2**0.5, "constant": 16}
    tuned = {name: models.adapted(model, adapters.lora(2, scaling=name), model.paths("dense")) for name in scales}
    base, fresh = model.init(jax.random.key(0)), tuned["rank"].init(jax.random.key(1))
    assert tuned["rank"].layers == ("dense_0", "head")
    for path, width in (("dense_0", 4), ("head", 5)):
        assert np.abs(fresh[path]["A"]).max() <= 1 / width**0.5
        assert np.asarray(fresh[path]["A"]).std() > 0.3 / width**0.5
        assert not fresh[path]["B"].any()
    adapter, x = jax.tree.map(np.asarray, noisy(fresh)), np.linspace(-1, 1, 8).reshape(2, 4)

    def layer(path, x, s):
        part = adapter[path]
        return x @ base[path]["kernel"] + base[path]["bias"] + s * (x @ part["A"]) @ part["B"]

    outputs = jax.jit(lambda adapter: {name: tuned[name].apply(base, adapter, x) for name in scales})(adapter)
    for name, s in scales.items():
        np.testing.assert_allclose(outputs[name], layer("head", np.maximum(layer("dense_0", x, s), 0), s), rtol=1e-12)
    # The start of a layer does not depend on what else is adapted.
    alone = models.adapted(model, adapters.lora(2), "head").init(jax.random.key(1))
    np.testing.assert_array_equal(alone["head"]["A"], fresh["head"]["A"])


def test_only_b_moves_at_first_and_the_gradient_is_that_of_the_merged_model():
    tuned = models.adapted(MLP, adapters.lora(2), MLP.paths("dense"))
    base, fresh = MLP.init(jax.random.key(0)), tuned.init(jax.random.key(1))
    batch = {"x": IMAGES, "y": jnp.array([0, 2])}

    def loss(adapter):
        return losses.cross_entropy(tuned.joint)({"base": base, "adapter": adapter}, batch).mean()

    def merged(adapter):
        return losses.cross_entropy(MLP)(tuned.merge(base, adapter), batch).mean()

    first, gradient, expected = jax.jit(lambda a, b: (jax.grad(loss)(a), jax.grad(loss)(b), jax.grad(merged)(b)))(
        fresh, noisy(fresh)
    )
    assert all(not part["A"].any() and part["B"].any() for part in first.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient, expected)


def test_statistics_of_the_base_are_frozen_with_it():
    """In training too: what an adapted model does depends on no other example of the batch, and moves no statistics."""
    start = CNN_BN.init(jax.random.key(0))
    statistics = jax.jit(CNN_BN.apply)(start, IMAGES, jax.random.key(1))[1]
    base = start._replace(statistics=statistics)
    tuned = models.adapted(CNN_BN, adapters.scale_shift(), CNN_BN.paths("norm"))
    adapter = noisy(tuned.init(jax.random.key(1)))

    def outputs(base, adapter):
        joint = {"base": base, "adapter": adapter}
        of_first = tuned.apply(base, adapter, IMAGES[:1], jax.random.key(2))
        in_training = tuned.joint.apply(joint, IMAGES, jax.random.key(2))
        return (
            of_first,
            in_training,
            CNN_BN.apply(tuned.merge(base, adapter), IMAGES)[0],
            CNN_BN.apply(start, IMAGES)[0],
        )

    of_first, in_training, merged, elsewhere = jax.jit(outputs)(base, adapter)
    np.testing.assert_allclose(of_first[0], in_training[0], rtol=1e-12)
    np.testing.assert_allclose(in_training, merged, rtol=1e-9, atol=1e-12)
    assert jnp.max(jnp.abs(merged - elsewhere)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, tuned.merge(base, adapter).statistics, statistics)
    trained, frozen = fc.partition({"base": base, "adapter": adapter}, ("adapter", *tuned.joint.paths("head")))
    assert "base/params/head/bias" in fc.leaf_paths(trained)
    assert {path.split("/")[1] for path in fc.leaf_paths(frozen)} == {"params", "statistics"}


def test_clients_of_different_ranks_in_one_step():
    """Ranks under vmap: each client is as if its adapter had its own rank, and an optimizer moves no more of it."""
    most, ranks = 4, jnp.array([1, 2, 4])
    tuned = models.adapted(MLP, adapters.lora(most, alpha=1.0), "dense_0")
    base, batch = MLP.init(jax.random.key(0)), {"x": IMAGES, "y": jnp.array([0, 2])}
    adapter = noisy(tuned.init(jax.random.key(1)))
    optimizer = optax.adamw(0.1, weight_decay=0.5)

    def outputs_and_step(rank):
        def loss(adapter):
            outputs = tuned.apply(base, adapter, IMAGES, rank=rank)
            return losses.label_loss(outputs, batch["y"]).mean(), outputs

        gradient, outputs = jax.grad(loss, has_aux=True)(adapter)
        updates, _ = optimizer.update(gradient, optimizer.init(adapter), adapter)
        merged = MLP.apply(tuned.merge(base, adapter, rank), IMAGES)
        return outputs, gradient, tuned.limit(updates, rank), tuned.limit(adapter, rank), merged

    outputs, gradients, updates, limited, merged = jax.jit(jax.vmap(outputs_and_step))(ranks)
    np.testing.assert_allclose(merged, outputs, rtol=1e-9)
    for i, r in enumerate([1, 2, 4]):
        small = models.adapted(MLP, adapters.lora(r, alpha=1.0), "dense_0")
        part = {"A": adapter["dense_0"]["A"][:, :r], "B": adapter["dense_0"]["B"][:r]}
        np.testing.assert_allclose(outputs[i], small.apply(base, {"dense_0": part}, IMAGES), rtol=1e-12)
        for tree in (gradients, updates, limited):
            assert not tree["dense_0"]["A"][i, :, r:].any()
            assert not tree["dense_0"]["B"][i, r:].any()
            assert tree["dense_0"]["A"][i, :, :r].any(0).all()
    # Where A is frozen, the part that is trained has a hole.
    trained, _ = fc.partition(adapter, re.compile(".*/B"))
    assert fc.leaf_paths(tuned.limit(trained, 2)) == ("dense_0/B",)


def test_the_base_is_not_copied_for_every_client():
    tuned = models.adapted(SMALL, adapters.lora(2), SMALL.paths("attention"))
    base = jax.eval_shape(SMALL.init, jax.random.key(0))
    many = jax.eval_shape(jax.vmap(tuned.init), jax.random.split(jax.random.key(1), 3))
    jaxpr = jax.make_jaxpr(jax.vmap(tuned.apply, (None, 0, None)))(base, many, TOKENS)
    shapes = {v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars}
    assert (3, 2, 5, 8) in shapes  # activations of every client
    assert (3, 8, 8) not in shapes  # no weights of every client


def test_dropout_acts_on_the_adapter_in_training_only():
    tuned = models.adapted(MLP, adapters.lora(2, dropout=0.5), "dense_0")
    base, adapter = MLP.init(jax.random.key(0)), noisy(tuned.init(jax.random.key(1)))
    plain, trained, again, other = jax.jit(
        lambda a: [tuned.apply(base, a, IMAGES, key) for key in (None, *map(jax.random.key, (0, 0, 1)))]
    )(adapter)
    np.testing.assert_array_equal(trained, again)
    assert (trained != plain).any()
    assert (trained != other).any()


def test_counts_of_the_adapters():
    """Those of the formulas: LoRA r (in + out), bottleneck 2 D m + m + D in a block, prompts P D."""
    D, L = 8, 2
    for adapter, where, count in [
        (adapters.lora(3), ENCODER.paths("attention"), L * 4 * 3 * 2 * D),
        (adapters.bottleneck(2), re.compile("block_[0-9]+/down/kernel"), L * (2 * D * 2 + 2 + D)),
        (adapters.prompt(4), None, 4 * D),
        (adapters.prompt(4, deep=True), None, L * 4 * D),
    ]:
        tuned = models.adapted(ENCODER, adapter, where)
        assert models.num_parameters(jax.eval_shape(tuned.init, jax.random.key(0))) == count


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_prompt_tokens(model):
    """The shallow form is the model run on the joined tokens; the deep form keeps the sequence as long as it is."""
    base = model.init(jax.random.key(0))
    tuned = models.adapted(model, adapters.prompt(3), None)
    adapter = noisy(tuned.init(jax.random.key(1)))

    def by_hand(adapter):
        tokens = model.run(base, TOKENS, stop="block_0")
        values = jnp.concatenate([jnp.broadcast_to(adapter["embed"], (2, 3, 8)), tokens.values], 1)
        mask = None if tokens.mask is None else jnp.pad(tokens.mask, ((0, 0), (3, 0)), constant_values=True)
        seen = model.run(base, models.Tokens(values, mask), "block_0", "norm")
        rest = models.Tokens(seen.values[:, 3:], tokens.mask)
        return model.run(base, rest, "norm"), tuned.apply(base, adapter, TOKENS), model.apply(base, TOKENS)

    expected, outputs, plain = jax.jit(by_hand)(adapter)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    assert jnp.max(jnp.abs(outputs - plain)) > 1e-4
    sent = jax.eval_shape(lambda a: tuned.run(base, a, TOKENS, stop="block_0"), adapter)
    assert sent.values.shape == (2, 3 + 5, 8)

    deep = models.adapted(model, adapters.prompt(3, deep=True))
    adapter = noisy(deep.init(jax.random.key(1)))
    assert set(adapter) == {"block_0", "block_1"}
    sent = jax.eval_shape(lambda a: deep.run(base, a, TOKENS, stop="block_1"), adapter)
    assert sent.values.shape == (2, 5, 8)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(deep.apply(base, a, TOKENS) ** 2)))(adapter)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_padding_stays_unseen_beside_a_prompt():
    tuned = models.adapted(ENCODER, adapters.prompt(2))
    base, adapter = ENCODER.init(jax.random.key(0)), tuned.init(jax.random.key(1))
    short, long = jnp.array([[1, 4, 2]]), jnp.array([[1, 4, 2, 0, 0]])
    apply = jax.jit(tuned.apply)
    np.testing.assert_allclose(apply(base, adapter, short), apply(base, adapter, long), rtol=1e-10)


def test_a_split_step_with_prompts_has_the_gradients_of_the_whole():
    """Head and tail on the client, body on the server: the gradients of prompt and tail are those of one model."""
    tuned = models.adapted(ENCODER, adapters.prompt(2))
    base, adapter = ENCODER.init(jax.random.key(0)), tuned.init(jax.random.key(1))
    tail, frozen = fc.partition(base, ["norm", "head"])

    def whole(adapter, tail):
        return jnp.sum(tuned.apply(fc.combine(tail, frozen), adapter, TOKENS) ** 2)

    def split(adapter, tail):
        sent, to_prompt = jax.vjp(lambda a: tuned.run(frozen, a, TOKENS, stop="block_0"), adapter)
        back, through = jax.vjp(lambda h: tuned.run(frozen, adapter, h, "block_0", "norm"), sent)
        end = lambda tail, h: jnp.sum(tuned.run(tail, adapter, h, "norm") ** 2)  # noqa: E731
        _, to_tail = jax.vjp(end, tail, back)
        of_tail, cotangent = to_tail(jnp.ones(()))
        return to_prompt(*through(cotangent))[0], of_tail

    expected = jax.jit(jax.grad(whole, (0, 1)))(adapter, tail)
    got = jax.jit(split)(adapter, tail)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), got, expected)


def test_a_model_of_a_user_is_grafted_by_shape():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(nn.relu(nn.Dense(4)(x.reshape(len(x), -1))))

    def apply(params, x, key=None):
        return Net().apply({"params": params}, x)

    model = models.Model(lambda key: Net().init(key, IMAGES)["params"], apply, apply)
    tuned = models.adapted(model, adapters.lora(2), "last")
    base, adapter = model.init(jax.random.key(0)), noisy(tuned.init(jax.random.key(1)))
    np.testing.assert_allclose(
        tuned.apply(base, adapter, IMAGES), model.apply(tuned.merge(base, adapter), IMAGES), rtol=1e-5
    )
    by_hand = model._replace(apply=lambda params, x, key=None: x[:, 0, :4, 0] @ params["last"]["kernel"])
    with pytest.raises(ValueError, match=r"last has a part .* no flax module of that path was run"):
        models.adapted(by_hand, adapters.lora(2), "last").apply(base, adapter, IMAGES)
    with pytest.raises(ValueError, match="adapter has the leaf 'lost/A'"):
        tuned.apply(base, {**adapter, "lost": adapter["last"]}, IMAGES)


LORA = models.adapted(MLP, adapters.lora(2), "dense_0")
BASE = jax.eval_shape(MLP.init, jax.random.key(0))
PARTS = jax.eval_shape(LORA.init, jax.random.key(0))
PROMPT = models.adapted(ENCODER, adapters.prompt(2))
KEY = jax.random.key(0)
BAD = [
    ("rank", lambda: adapters.lora(0), ["rank", "got 0"]),
    ("alpha", lambda: adapters.lora(2, alpha=float("nan")), ["alpha"]),
    ("scaling", lambda: adapters.lora(2, scaling="sqrt"), ["scaling", "'sqrt'", "root"]),
    ("dropout", lambda: adapters.lora(2, dropout=1.0), ["dropout", "[0, 1)"]),
    ("width", lambda: adapters.bottleneck(0), ["width", "got 0"]),
    ("tokens", lambda: adapters.prompt(-1), ["num_tokens", "got -1"]),
    ("bound", lambda: adapters.prompt(1, bound=-0.1), ["bound"]),
    ("no where", lambda: models.adapted(MLP, adapters.lora(2)), ["where", "model.paths"]),
    ("typing error", lambda: models.adapted(MLP, adapters.lora(2), "dense_9"), ["'dense_9'", "did you mean"]),
    ("convolution", lambda: models.adapted(CNN, adapters.lora(2), "conv_0"), ["kinds dense", "got conv_0", "head"]),
    ("norm", lambda: models.adapted(ENCODER, adapters.bottleneck(2), "norm"), ["kinds dense", "got norm"]),
    ("where of a prompt", lambda: models.adapted(ENCODER, adapters.prompt(2), "norm"), ["where", "left out"]),
    ("prompt", lambda: models.adapted(MLP, adapters.prompt(2)).init(jax.random.key(0)), ["transformer", "dense_0"]),
    ("too high a rank", lambda: LORA.limit(PARTS, 3), ["rank", "1..2", "got 3"]),
    ("half a rank", lambda: LORA.apply(BASE, PARTS, IMAGES, rank=1.5), ["rank must be one integer", "got 1.5"]),
    ("rank of a kind", lambda: LORA.merge(BASE, PARTS, rank="all"), ["rank must be one integer", "got 'all'"]),
    ("yes for a rank", lambda: LORA.limit(PARTS, True), ["rank must be one integer", "got True"]),
    ("several ranks", lambda: LORA.limit(PARTS, np.array([1, 2])), ["one integer", "got array([1, 2])", "vmap"]),
    (
        "a model merged with itself",
        lambda: LORA.merge(BASE, BASE),
        ["adapter has the leaf 'dense_0/bias'", "'dense_0/A'", "tuned.init"],
    ),
    ("taken out of itself", lambda: LORA.unmerge(BASE, BASE), ["adapter has the leaf 'dense_0/bias'"]),
    ("applied to itself", lambda: LORA.apply(BASE, BASE, IMAGES), ["adapter has the leaf 'dense_0/bias'"]),
    ("limited itself", lambda: LORA.limit(BASE, 1), ["tree has the leaf 'dense_0/bias'"]),
    ("swapped", lambda: LORA.apply(PARTS, BASE, IMAGES), ["base has no leaf 'dense_0/bias'", "model.init"]),
    ("adapters alone", lambda: LORA.merge(PARTS, PARTS), ["base has no leaf 'dense_0/bias'", "a dict with 'dense_0'"]),
    ("joint", lambda: LORA.merge({"base": BASE, "adapter": PARTS}, PARTS), ["base has no leaf", "'base', 'adapter'"]),
    ("not joint", lambda: LORA.joint.apply(PARTS, IMAGES), ["params of the joint model", "a dict with 'dense_0'"]),
    ("no adapter", lambda: LORA.apply(BASE, None, IMAGES), ["adapter must be a dict", "NoneType", "tuned.init"]),
    ("an empty one", lambda: LORA.apply(BASE, {}, IMAGES), ["adapter has no leaf 'dense_0/A'", "an empty dict"]),
    (
        "of a smaller rank",
        lambda: LORA.merge(BASE, jax.eval_shape(models.adapted(MLP, adapters.lora(1), "dense_0").init, KEY)),
        ["'dense_0/A' of adapter must have shape [64, 2], got [64, 1]"],
    ),
    (
        "half of it",
        lambda: LORA.apply(BASE, fc.partition(PARTS, "dense_0/A")[0], IMAGES),
        ["adapter has no leaf 'dense_0/B' but a hole", "combine"],
    ),
    (
        "prompts",
        lambda: PROMPT.apply(ENCODER.init(KEY), PARTS, TOKENS),
        ["adapter has the leaf 'dense_0/A'", "'embed'"],
    ),
    (
        "rank without",
        lambda: models.adapted(MLP, adapters.scale_shift(), "head").limit({}, 3),
        ["rank must be left out", "got 3"],
    ),
    ("merge", lambda: models.adapted(ENCODER, adapters.prompt(2)).merge(BASE, {}), ["cannot be merged"]),
    (
        "no bias",
        lambda: (t := models.adapted(RESNET, adapters.scale_shift(), "stem")).merge(
            jax.eval_shape(RESNET.init, jax.random.key(0)), jax.eval_shape(t.init, jax.random.key(0))
        ),
        ["no bias", "keep the adapter apart"],
    ),
]


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.adapted(adapters.lora(2), MLP, "dense_0"), "model must be a Model, got Adapter: the order is"),
        (lambda: models.adapted(MLP, adapters.lora, "dense_0"), "adapter must be an Adapter, got function: .* call"),
        (lambda: models.adapted(MLP, 2, "dense_0"), r"adapter must be an Adapter, got int: pass adapters\.lora"),
    ],
)
def test_what_is_grafted_and_what_on_are_told_apart(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_integers_of_numpy_will_do():
    one, two = np.int64(1), np.int32(2)
    assert models.adapted(MLP, adapters.lora(two), "dense_0").layers == LORA.layers
    assert jax.eval_shape(adapters.bottleneck(two).init, KEY, {"kernel": IMAGES[0, :, :, 0]})["down"]["bias"].shape == (
        2,
    )
    assert jax.eval_shape(models.adapted(ENCODER, adapters.prompt(two)).init, KEY)["embed"].shape == (2, 8)
    parts = noisy(LORA.init(KEY))
    fc.checks.same_structure("limited", LORA.limit(parts, one), parts, "adapter")
    for rank in (one, jnp.int32(1), np.array(1)):
        limited = LORA.limit(parts, rank)["dense_0"]
        assert not np.any(limited["A"][:, 1:])
        assert np.all(np.isfinite(limited["B"]))
