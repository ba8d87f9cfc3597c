import json
import shutil
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from pipelines import load_run
from pipelines.cli import commands
from pipelines.run import export, scoring


def call(*words):
    result = CliRunner().invoke(commands.main, [str(word) for word in words], terminal_width=110)
    assert "Traceback" not in result.output
    return result


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


TREES = {
    "flax": {"params": {"Dense_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}}},
    "tuples": [Layer(np.arange(6.0).reshape(2, 3).T, np.float64(2)), (np.arange(3, dtype=np.int32),)],
    "haiku": {"mlp/~/linear_0": {"w": np.ones((1, 2), np.float32), "b": np.zeros((0,), np.float32)}},
    "half": {"w": jnp.asarray([0.5, -3.0], jnp.bfloat16), "v": np.asarray([0.25], np.float16)},
    "array": np.float32(3.5),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", export.FORMATS)
def test_models_are_read_back_as_they_were(kind, tree, tmp_path):
    params, path = TREES[tree], tmp_path / f"model.{kind}"
    with jax.enable_x64(True):
        export.write(path, params)
        again = export.read(path, like=params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_are_read_by_what_others_have_at_hand(tmp_path):
    params = TREES["flax"]
    for kind in export.FORMATS:
        export.write(tmp_path / f"model.{kind}", params)
    names = {"params.Dense_0.kernel", "params.Dense_0.bias"}
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(tensors) == names
    with np.load(tmp_path / "model.npz") as arrays:
        assert set(arrays.files) == names
        np.testing.assert_array_equal(arrays["params.Dense_0.kernel"], tensors["params.Dense_0.kernel"])
    tree = flax.serialization.msgpack_restore((tmp_path / "model.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, flax.serialization.from_state_dict(params, tree), params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, "two leaves of the model are called 'a.b'"),
        ({"a": np.ones(1), "a.b": np.ones(1)}, "two leaves of the model are called 'a.b'"),
        ({"key": jax.random.key(0)}, "key is a random key"),
    ],
)
def test_models_that_no_file_can_hold(params, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export.write(tmp_path / "model.npz", params)
    assert not list(tmp_path.iterdir())


def test_another_model_and_another_format_are_named(tmp_path, monkeypatch):
    export.write(tmp_path / "model.npz", TREES["flax"])
    with pytest.raises(ValueError, match=r"'params\.Dense_0\.kernel'"):
        export.read(tmp_path / "model.npz", like={"params": {"Dense_0": {"kernel": np.ones((9, 3), np.float32)}}})
    with pytest.raises(ValueError, match="unknown format 'safetensor': did you mean 'safetensors'"):
        export.checked_format("safetensor")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"safetensors is not installed: pip install 'fedjax-core\[export\]'"):
        export.checked_format("safetensors")


def test_the_models_of_a_run_from_the_command_line(finished, small, tmp_path):
    said = call("export", finished, "--format", "npz", "--out", tmp_path / "models")
    assert said.exit_code == 0, said.output
    run = load_run(finished, with_data=False)
    names = {f"{method}-seed{seed}" for method in small.methods for seed in (0, 1)}
    assert {path.stem for path in (tmp_path / "models").iterdir()} == names
    for method, trained in run.methods.items():
        for seed in (0, 1):
            path = tmp_path / "models" / f"{method}-seed{seed}.npz"
            params = trained.params(seed)
            jax.tree.map(np.testing.assert_array_equal, export.read(path, like=params), params)

    one = ("--method", "scaffold", "--seed", 1)
    assert call("export", finished, *one, "--out", tmp_path / "new" / "one.safetensors").exit_code == 0
    expected = export.named(run.methods["scaffold"].params(1))
    tensors = safetensors.numpy.load_file(tmp_path / "new" / "one.safetensors")
    assert {k: v.tobytes() for k, v in tensors.items()} == {k: v.tobytes() for k, v in expected.items()}

    for words, clients in ((("--client", "5,0"), [5, 0]), (("--personal",), range(6))):
        out = tmp_path / words[0].strip("-")
        assert call("export", finished, *one, "--format", "msgpack", *words, "--out", out).exit_code == 0
        assert {path.name for path in out.iterdir()} == {f"scaffold-seed1-client{i}.msgpack" for i in clients}
        arrays = export.read(out / "scaffold-seed1-client5.msgpack")
        assert {k: v.tobytes() for k, v in arrays.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_the_models_of_a_run_are_tested(finished, small, tmp_path):
    said = call("evaluate", finished, "--json")
    assert said.exit_code == 0, said.output
    rows = [json.loads(line) for line in said.output.splitlines()]
    assert [(row["method"], row["seed"], row["round"]) for row in rows] == [
        (method, seed, 12) for method in small.methods for seed in (0, 1)
    ]
    run = load_run(finished)
    for row in rows:
        history = run.methods[row["method"]].history
        assert row["accuracy"] == pytest.approx(history["test/accuracy"][row["seed"], -1], rel=1e-6)
        assert row["loss"] == pytest.approx(history["test/loss"][row["seed"], -1], rel=1e-5)

    table = call("evaluate", finished, "--method", "scaffold", "--seed", 1, "--split", "train").output
    assert "iris, train: 120 examples" in table
    assert "fedavg" not in table
    assert len(table.splitlines()) == 3

    # A file of the same kind, of which one class is missing, where the run's own data is gone.
    gone = tmp_path / "gone"
    shutil.copytree(finished, gone)
    content = json.loads((gone / "config.json").read_text())
    content["config"]["data"]["dataset"] = content["data"]["name"] = str(tmp_path / "nowhere.npz")
    (gone / "config.json").write_text(json.dumps(content))
    x, y = (run.federation.dataset.test[name] for name in ("x", "y"))
    np.savez(tmp_path / "mine.npz", x=x[y < 2], y=y[y < 2])
    other = call("evaluate", gone, "--dataset", tmp_path / "mine.npz", "--split", "train", "--json")
    assert other.exit_code == 0, other.output
    assert "has 2 classes and the models tell 3 apart" in other.output
    refused = call("evaluate", gone)
    assert refused.exit_code == 2
    assert "the data of the run is not here" in refused.output
    assert "--dataset" in refused.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "RUN", "--dataset", "wine"), "its inputs have shape [13] and those of the run [4]"),
        (("evaluate", "RUN", "--dataset", "wein"), "did you mean 'wine'"),
        (("evaluate", "RUN", "--split", "tset"), "did you mean 'test'"),
        (("evaluate", "RUN", "--dataset", "iris", "--split", "new"), "unknown split of another data set 'new'"),
        (("evaluate", "RUN", "--method", "fedprox"), "unknown method of this run 'fedprox'"),
        (("evaluate", "RUN", "--seed", 9), "seed 9 is none of this run: it has 0, 1"),
        (("evaluate", "TMP"), "is no run directory"),
        (("export", "RUN"), "say --format safetensors, msgpack, npz"),
        (("export", "RUN", "--format", "np"), "did you mean 'npz'"),
        (("export", "RUN", "--format", "npz", "--out", "one.msgpack"), "let the file end in .npz"),
        (("export", "RUN", "--out", "TMP/one.npz"), "is one file and there are 4 models"),
        (("export", "RUN", "--format", "npz", "--client", "a"), "--client 'a' is no list of client numbers"),
        (("export", "RUN", "--format", "npz", "--client", "6"), "client 6 is none of this run: its clients are 0 to 5"),
        (("export", "RUN", "--format", "npz", "--client", "6", "--personal"), "give one of them"),
        (("export", "RUN", "--format", "npz", "--seed", 4), "seed 4 is none of this run"),
        (("export", "RUN", "--format", "npz", "--out", "TMP/file"), "is a file: choose a directory"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said, finished, tmp_path):
    (tmp_path / "file").write_text("")
    at = {"RUN": finished}
    result = call(*(at.get(word, str(word).replace("TMP", str(tmp_path))) for word in words))
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_more_classes_than_the_models_know_are_refused(finished, tmp_path):
    run = load_run(finished, methods=["fedavg"], with_data=False)
    np.savez(tmp_path / "more.npz", x=np.zeros((40, 4), np.float32), y=np.arange(40) % 4)
    with pytest.raises(ValueError, match="it has 4 classes and the run 3"):
        scoring.examples_of(run, str(tmp_path / "more.npz"))
