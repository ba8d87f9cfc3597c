"""Runs every snippet of docs/frameworks.md as it stands there, and compares what comes out with what goes in."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from pipelines.data import sources
from pipelines.experiment import own_model

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "frameworks.md").read_text()
SECTIONS = {part.splitlines()[0].strip(): part for part in re.split(r"^##? (?=[A-Z])", PAGE, flags=re.MULTILINE)[1:]}
PACKAGES = {"Flax linen": "flax", "Flax nnx": "flax", "Equinox": "equinox", "Haiku": "haiku", "A plain function": "jax"}


def snippet(section: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.DOTALL)
    return code


def test_every_framework_of_the_page_is_run():
    with_code = {title for title, part in SECTIONS.items() if "```python" in part}
    assert with_code - set(PACKAGES) == {next(iter(SECTIONS)), "On the command line"}


@pytest.mark.parametrize("section", PACKAGES)
def test_a_model_of_every_framework_is_trained(section):
    pytest.importorskip(PACKAGES[section])
    names: dict = {"__name__": "snippet"}
    exec(compile(snippet(next(iter(SECTIONS))), "frameworks.md", "exec"), names)
    exec(compile(snippet(section), "frameworks.md", "exec"), names)
    before, after, x, y = (names[name] for name in ("params", "trained", "x", "y"))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    batch = {"x": x, "y": y}
    first, last = (names["loss_fn"](params, batch, jax.random.key(7)).mean() for params in (before, after))
    assert last < 0.9 * first
    assert np.shape(names["logits"]) == (len(y), 3)


@pytest.mark.parametrize("name", ["equinox_net", "nnx_net"])
def test_it_is_taken_on_the_command_line(name, tmp_path):
    pytest.importorskip("equinox")
    (tmp_path / "my_models.py").write_text(snippet("On the command line"))
    rng = np.random.default_rng(0)
    dataset = sources.from_arrays(rng.integers(0, 256, (30, 4, 4, 1)), np.arange(30) % 3)
    model = own_model.build(f"{tmp_path / 'my_models.py'}:{name}", dataset)
    params = model.init(jax.random.key(0))
    assert model.apply(params, np.zeros((2, 4, 4, 1), np.float32)).shape == (2, 3)


def test_a_haiku_transform_is_a_model(tmp_path):
    pytest.importorskip("haiku")
    (tmp_path / "net.py").write_text(
        "import haiku as hk\nimport jax\n\n\n"
        "def net(num_classes):\n    return hk.transform(lambda x: hk.Linear(num_classes)(hk.Flatten()(x)))\n\n\n"
        "def without(num_classes):\n    return hk.without_apply_rng(net(num_classes))\n\n\n"
        "def normed(num_classes):\n"
        "    return hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(num_classes)(x), True))\n"
    )
    dataset = sources.from_arrays(np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3)
    for name in ("net", "without"):
        model = own_model.build(f"{tmp_path / 'net.py'}:{name}", dataset)
        params = model.init(jax.random.key(0))
        assert model.apply(params, dataset.test["x"], jax.random.key(1)).shape == (6, 3)
    with pytest.raises(ValueError, match=r"keeps the state of hk.transform_with_state.* group or layer normalization"):
        own_model.build(f"{tmp_path / 'net.py'}:normed", dataset)


def test_a_flax_module_of_a_user_knows_its_groups_of_parameters(tmp_path):
    (tmp_path / "flaxnet.py").write_text(
        "import flax.linen as nn\n\n\n"
        "class Net(nn.Module):\n    num_classes: int = 3\n\n    @nn.compact\n    def __call__(self, x, train=False):\n"
        "        x = nn.LayerNorm()(nn.Dense(4)(x))\n"
        "        return nn.Dense(self.num_classes, name='head')(nn.Dropout(0.5, deterministic=not train)(x))\n"
    )
    dataset = sources.from_arrays(np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3)
    model = own_model.build(f"{tmp_path / 'flaxnet.py'}:Net", dataset)
    assert model.paths("norm") == ("LayerNorm_0/bias", "LayerNorm_0/scale")
    assert model.paths("head") == ("head/bias", "head/kernel")
