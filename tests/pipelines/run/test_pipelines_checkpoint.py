import hashlib
import json
import shutil
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines.run import checkpoint
from pipelines.run.checkpoint import CheckpointWarning


class State(NamedTuple):
    params: Any
    key: Any
    round: Any


def state(round=0, width=3, impl="threefry2x32"):
    key = jax.random.split(jax.random.key(round, impl=impl), 2)
    params = {
        "a/b.c": jnp.arange(2.0 * width, dtype=jnp.float32).reshape(2, width) / 3 + round,
        "half": jnp.ones((2,), jnp.bfloat16) / 3,
        "none": jnp.zeros((2, 0), jnp.float32),
        "on": jnp.asarray([True, False]),
        "nested": [jnp.float32(np.pi), (jnp.int32(7),)],
    }
    return State(params, key, jnp.int32(round))


def data(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(data(one), data(other), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, of rounds 10, 20 and 30."""
    for round in (10, 20, 30):
        checkpoint.save(tmp_path, round, state(round), {"round/loss": np.arange(round) / 7}, {"seconds": round / 2})
    return tmp_path


def quiet_restore(folder, expected=None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.restore_latest(folder, state() if expected is None else expected)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_to_the_bit(tmp_path, impl):
    checkpoint.save(tmp_path, 4, state(4, impl=impl), {"x/y": np.eye(2)}, {"seconds": 1.5})
    for expected in (state(0, impl=impl), jax.eval_shape(lambda: state(0, impl=impl))):
        found = quiet_restore(tmp_path, expected)
        assert found.round == 4
        assert_same(found.state, state(4, impl=impl))
        assert found.info == {"seconds": 1.5}
        np.testing.assert_array_equal(found.arrays["x/y"], np.eye(2))
    assert jax.random.key_impl(found.state.key) == jax.random.key_impl(state(4, impl=impl).key)


def test_nothing_saved_gives_nothing(tmp_path):
    assert quiet_restore(tmp_path / "missing") is None
    assert quiet_restore(tmp_path) is None


def test_the_last_few_are_kept(saved):
    checkpoint.save(saved, 40, state(40), {}, keep=2)
    assert sorted(path.name for path in saved.iterdir()) == ["round-00000030", "round-00000040"]


def largest_state_file(path):
    return max((f for f in (path / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(path):
    file = largest_state_file(path)
    file.write_bytes(file.read_bytes()[:-1])
    return file.name


def flip(path):
    file = largest_state_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "sha256 differs"


def flip_metrics(path):
    file = path / "arrays.npz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "arrays.npz"


def lose(path):
    file = largest_state_file(path)
    file.unlink()
    return f"{file.name} is missing"


def no_manifest(path):
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def half_a_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[: file.stat().st_size // 2])
    return "manifest.json cannot be read"


def empty_manifest(path):
    (path / "manifest.json").write_text("{}")
    return "manifest.json cannot be read"


@pytest.mark.parametrize("damage", [truncate, flip, flip_metrics, lose, no_manifest, half_a_manifest, empty_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(saved, damage):
    said = damage(saved / "round-00000030")
    with pytest.warns(CheckpointWarning) as caught:
        found = checkpoint.restore_latest(saved, state())
    assert len(caught) == 1
    assert "round-00000030" in str(caught[0].message)
    assert said in str(caught[0].message)
    assert found.round == 20
    assert_same(found.state, state(20))
    assert len(found.arrays["round/loss"]) == 20
    # Going on from there replaces it.
    checkpoint.save(saved, 30, state(30), {"round/loss": np.arange(30) / 7})
    assert quiet_restore(saved).round == 30


def test_the_one_before_is_damaged_too(saved):
    flip(saved / "round-00000030")
    no_manifest(saved / "round-00000020")
    with pytest.warns(CheckpointWarning) as caught:
        assert checkpoint.restore_latest(saved, state()).round == 10
    assert ["00000030" in str(caught[0].message), "00000020" in str(caught[1].message)] == [True, True]
    flip(saved / "round-00000010")
    with pytest.warns(CheckpointWarning):
        assert checkpoint.restore_latest(saved, state()) is None


def test_going_on_from_before_damaged_ones_does_not_remove_the_good_one(saved):
    flip(saved / "round-00000030")
    flip(saved / "round-00000020")
    checkpoint.save(saved, 15, state(15), {}, keep=2)
    with pytest.warns(CheckpointWarning):
        assert checkpoint.restore_latest(saved, state()).round == 15
    assert (saved / "round-00000010").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("where", "function"),
    [
        ("pipelines.run.checkpoint.np", "savez"),
        ("pipelines.run.checkpoint", "_digest"),
        ("pipelines.run.checkpoint.json", "dumps"),
        ("pathlib.Path", "rename"),
        ("pipelines.run.checkpoint.ocp.Checkpointer", "save"),
    ],
)
def test_killed_at_any_step_of_saving_leaves_the_one_before(saved, monkeypatch, where, function):
    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"{where}.{function}", die)
        with pytest.raises(Killed):
            checkpoint.save(saved, 40, state(40), {"round/loss": np.arange(40) / 7})
    assert quiet_restore(saved).round == 30
    checkpoint.save(saved, 40, state(40), {"round/loss": np.arange(40) / 7})
    assert quiet_restore(saved).round == 40
    assert not list(saved.glob("unfinished*"))


def test_killed_while_removing_old_ones(saved, monkeypatch):
    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            checkpoint.save(saved, 40, state(40), {}, keep=2)
    assert quiet_restore(saved).round == 40


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (lambda: state(width=4), r"checkpoint round-00000030.*a/b.c.*float32\[2, 3\].*the state of fedavg.*\[2, 4\]"),
        (lambda: state()._replace(round=jnp.float32(0)), r"\.round.*int32\[\].*the state of fedavg.*float32\[\]"),
        (lambda: state().params, "different structures"),
        (lambda: state(impl="rbg"), r"uint32\[2, 2\].*uint32\[2, 4\]"),
        (lambda: state()._replace(key=jnp.zeros((2, 2), jnp.uint32)), "is key:threefry2x32 but .* has array there"),
    ],
)
def test_another_structure_is_an_error_and_not_a_fallback(saved, expected, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_latest(saved, expected(), "the state of fedavg")


def test_another_format_is_an_error(saved):
    path = saved / "round-00000030" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    path.with_name("manifest.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="has format 99"):
        checkpoint.restore_latest(saved, state())
