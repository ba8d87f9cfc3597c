"""What goes wrong with disks and files: nothing that was saved is lost, and one sentence says what to do."""

import errno
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest

from pipelines.common import files, processes
from pipelines.data.cache import fetch
from pipelines.experiment import setup
from pipelines.run import checkpoint, identity, journal, train
from pipelines.run.checkpoint import CheckpointWarning, OtherRun

ARRAYS = {"round/loss": np.arange(6.0).reshape(2, 3), "test/accuracy": np.ones((2, 1), np.float32)}


def grown(folder, times=3):
    """A journal that was appended to, and its marks."""
    marks = [journal.START]
    for number in range(times):
        marks.append(journal.append(folder, marks[-1], {k: v + number for k, v in ARRAYS.items()}))
    return marks


@pytest.mark.quick
def test_a_journal_gives_back_what_was_appended_up_to_each_mark(tmp_path):
    for number, mark in enumerate(grown(tmp_path)):
        found = journal.read(tmp_path, mark)
        want = {k: np.concatenate([v + i for i in range(number)], axis=1) for k, v in ARRAYS.items()} if number else {}
        assert found.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_going_on_from_an_earlier_mark_replaces_what_came_after(tmp_path):
    marks = grown(tmp_path)
    other = journal.append(tmp_path, marks[1], {k: -v for k, v in ARRAYS.items()})
    np.testing.assert_array_equal(journal.read(tmp_path, other)["round/loss"][:, 3:], -ARRAYS["round/loss"])
    with pytest.raises(journal.Damaged):
        journal.read(tmp_path, marks[3])
    assert journal.read(tmp_path, marks[1])


def test_each_flipped_bit_of_a_journal_is_read_from_the_other_and_in_both_it_is_noticed(tmp_path):
    mark = grown(tmp_path, 2)[-1]
    first, second = (tmp_path / name for name in journal.NAMES)
    content = first.read_bytes()
    want = journal.read(tmp_path, mark)
    for bit in range(0, 8 * len(content), 61):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        first.write_bytes(flipped)
        for name, array in journal.read(tmp_path, mark).items():
            np.testing.assert_array_equal(array, want[name])
        second.write_bytes(flipped)
        with pytest.raises(journal.Damaged):
            journal.read(tmp_path, mark)
        second.write_bytes(content)


def test_a_journal_that_is_cut_anywhere_is_gone_on_from_and_one_that_is_lost_is_made_again(tmp_path):
    marks = grown(tmp_path, 2)
    first, second = (tmp_path / name for name in journal.NAMES)
    content = first.read_bytes()
    for length in range(0, len(content), 13):  # killed while it was written
        first.write_bytes(content[:length])
        if length >= marks[1].length:
            second.write_bytes(content[:length])
        again = journal.append(tmp_path, marks[1], {k: v + 1 for k, v in ARRAYS.items()})
        assert again == marks[2]
        assert first.read_bytes() == second.read_bytes() == content
    first.unlink()
    journal.append(tmp_path, marks[2], ARRAYS)
    assert first.read_bytes() == second.read_bytes()


STATE = {"w": np.arange(4, dtype=np.float32), "round": np.int32(0)}


def save(folder, round, mark=journal.START, **options):
    state = {"w": STATE["w"] + round, "round": np.int32(round)}
    return checkpoint.save(folder, round, state, {}, {"seconds": 1e-7}, mark=mark, new=ARRAYS, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints; copy them before changing anything."""
    folder = tmp_path_factory.mktemp("two") / "run"
    save(folder, 20, save(folder, 10, run="ours"), run="ours")
    return folder


def copied(two, tmp_path):
    shutil.copytree(two.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_every_flipped_bit_of_a_manifest_and_of_its_digest_is_noticed(two, tmp_path):
    """The manifest says the round and what the state is; nothing else would tell."""
    folder = copied(two, tmp_path)
    path = folder / "round-00000020"
    assert checkpoint.verify(path, "ours") == ""
    for name, step in (("manifest.json", 29), ("manifest.sha256", 31)):
        content = (path / name).read_bytes()
        for bit in range(0, 8 * len(content), step):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(flipped)
            assert checkpoint.verify(path, "ours"), (name, bit)
        (path / name).write_bytes(content)
    (path / "manifest.sha256").unlink()
    with pytest.warns(CheckpointWarning, match=r"manifest.sha256 cannot be read"):
        assert checkpoint.restore_latest(folder, STATE, run="ours").round == 10


def test_checkpoints_of_another_run_are_refused_whatever_else_is_wrong_with_them(two, tmp_path):
    folder = tmp_path / "run"
    save(folder, 10, run="theirs")
    shutil.copytree(two / "round-00000020", folder / "round-00000020")
    with pytest.raises(OtherRun, match=r"round-00000020 was written by another run \(ours, and this one is theirs\)"):
        checkpoint.restore_latest(folder, STATE, run="theirs")
    shutil.rmtree(folder / "round-00000020")
    assert checkpoint.restore_latest(folder, STATE, run="theirs").round == 10


def replaced(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


@pytest.mark.parametrize("name", ["", "manifest.json", "manifest.sha256", "arrays.npz", "state"])
def test_a_directory_for_a_file_and_a_file_for_a_directory(two, tmp_path, name):
    folder = copied(two, tmp_path)
    path = folder / "round-00000020" / name
    replaced(path, (lambda p: p.write_text("")) if path.is_dir() else (lambda p: p.mkdir()))
    with pytest.warns(CheckpointWarning, match="round-00000020 is damaged"):
        saved = checkpoint.restore_latest(folder, STATE, run="ours")
    assert saved.round == 10
    save(folder, 20, saved.mark, run="ours")
    assert checkpoint.restore_latest(folder, STATE, run="ours").round == 20


def test_a_leftover_of_either_kind_is_removed(two, tmp_path):
    folder = copied(two, tmp_path)
    (folder / "unfinished-00000030").write_text("")
    (folder / "unfinished-00000040").mkdir()
    save(folder, 30, checkpoint.restore_latest(folder, STATE).mark)
    assert not list(folder.glob("unfinished*"))


def without_digests(path):
    """A checkpoint as the first version of the format wrote it."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("run", "journal"):
        del manifest[name]
    arrays = {k: v for k, v in ARRAYS.items()}
    np.savez(path / "arrays.npz", **arrays)
    manifest["sha256"]["arrays.npz"] = checkpoint._digest(path / "arrays.npz")
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}, indent=1))
    (path / "manifest.sha256").unlink()


def test_a_checkpoint_of_the_first_format_is_read(two, tmp_path):
    folder = copied(two, tmp_path)
    without_digests(folder / "round-00000020")
    saved = checkpoint.restore_latest(folder, STATE, run="ours")
    assert (saved.round, saved.mark) == (20, journal.START)
    np.testing.assert_array_equal(saved.arrays["round/loss"], ARRAYS["round/loss"])


FAULTS = [
    (errno.ENOSPC, "No space left on device", "make room on that disk"),
    (errno.EDQUOT, "quota", "make room within your quota"),
    (errno.EROFS, "Read-only file system", "mount it writable"),
    (errno.EACCES, "Permission denied", "get permission to write there"),
    (errno.EIO, "Input/output error", "see what is wrong with the disk"),
]
"""(what the system says, its words, what the user is told)."""


@pytest.mark.parametrize(("number", "words", "advice"), FAULTS)
def test_what_is_said_of_a_disk(tmp_path, number, words, advice):
    error = files.unwritable(tmp_path, OSError(number, os.strerror(number)), "fedavg is saved after round 6")
    for part in (str(tmp_path), words, advice, "fedavg is saved after round 6", "give the same command again"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("pipelines.run.checkpoint.ocp.Checkpointer", "save"),
        ("pipelines.run.checkpoint.np", "savez"),
        ("pipelines.run.journal.os", "fsync"),
        ("pipelines.run.checkpoint", "_to_disk"),
        ("pathlib.Path", "rename"),
    ],
)
def test_a_disk_that_is_full_at_any_step_of_saving_loses_nothing_and_leaves_nothing(two, tmp_path, where, name):
    folder = copied(two, tmp_path)
    mark = checkpoint.restore_latest(folder, STATE).mark

    def full(*args, **kwargs):
        if name == "save":  # its writer tells of it in its own words
            raise ValueError(f"RESOURCE_EXHAUSTED: Error writing data ({os.strerror(errno.ENOSPC)})")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{where}.{name}", full)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 30, mark)
    assert not list(folder.glob("unfinished*"))
    assert checkpoint.restore_latest(folder, STATE).round == 20
    save(folder, 30, mark)
    assert checkpoint.restore_latest(folder, STATE).round == 30


def cut(finished, tmp_path, small, method="fedavg"):
    """A copy of the finished run that lacks the last checkpoint of a method."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / method / "round-00000012")
    return out


def test_a_run_on_a_full_disk_says_what_is_saved_and_goes_on_later(finished, small, tmp_path, monkeypatch):
    out = cut(finished, tmp_path, small)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_to_disk", full)
        with pytest.raises(files.Unwritable, match=r"No space left.*fedavg is saved after round 8: make room"):
            train.train(small, out)
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_text", full)
        patch.setattr(files, "write_text", full)
        with pytest.raises(files.Unwritable, match="fedavg is saved after round 12: make room"):
            train.train(small, out)
    with monkeypatch.context() as patch:
        patch.setattr(train.report, "write", full)
        with pytest.raises(files.Unwritable, match="All rounds are done and saved, and the report is not"):
            train.train(small, out)
    train.train(small, out)
    for name in ("metrics.csv", "clients.csv", "curves.png"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_run_in_a_read_only_place_can_be_looked_at_and_an_unfinished_one_says_so(
    finished, small, tmp_path, monkeypatch
):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    said = []
    reporter = train.silent()._replace(say=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(processes.FileLock, "acquire", read_only)
        results = train.train(small, finished, reporter=reporter)
        assert f"{finished} is read-only, so its report stays as it is" in said
        assert list(results) == list(small.methods)
        with pytest.raises(files.Unwritable, match=r"Read-only file system.*fedavg is saved after round 8"):
            train.train(small, cut(finished, tmp_path, small))


DAMAGES = {
    "a flipped bit": lambda p: p.write_bytes(
        bytes([*p.read_bytes()[:-9], p.read_bytes()[-9] ^ 1, *p.read_bytes()[-8:]])
    ),
    "half of it": lambda p: p.write_text(p.read_text()[: p.stat().st_size // 2]),
    "nothing in it": lambda p: p.write_text(""),
    "no text": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "lost": lambda p: p.unlink(),
    "a directory": lambda p: replaced(p, lambda d: d.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_taken_from_its_copy_and_without_one_refused(finished, small, tmp_path, damage):
    out = shutil.copytree(finished, tmp_path / "run")
    before = (out / "config.json").read_bytes()
    DAMAGES[damage](out / "config.json")
    with pytest.warns(files.RecordWarning, match=r"config.json is damaged .* taken from its copy"):
        assert train.read_config(out) == train.read_config(finished)
    if damage != "a directory":
        assert (out / "config.json").read_bytes() == before
    replaced(out / "config.json", lambda p: p.write_text("{"))
    (out / "checkpoints" / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config.json cannot be read .* nor its copy .* from a backup"):
        train.read_config(out)


def test_every_flipped_bit_of_a_config_is_noticed(tmp_path):
    path = tmp_path / "config.json"
    files.write_record(path, {"config": {"rounds": 4, "name": "a"}, "run": "01"})
    content = path.read_bytes()
    assert files.read_record(path) == {"config": {"rounds": 4, "name": "a"}, "run": "01"}
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.warns(files.RecordWarning, match="is damaged"):
            assert files.read_record(path) == {"config": {"rounds": 4, "name": "a"}, "run": "01"}
        assert path.read_bytes() == content


def edited(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.parametrize(
    ("pairs", "config", "said"),
    [
        ([('"rounds": 4', '"rounds": 7')], {"rounds": 7, "name": "a"}, "edited by hand.*rounds 7, which was 4"),
        ([('"rounds": 4', '"rounds": 70'), ("0.10.2", "0.9.1")], {"rounds": 70, "name": "a"}, "edited by hand"),
        ([("0.10.2", "0.9.1")], {"rounds": 4, "name": "a"}, "is damaged"),
        ([('"rounds": 4', '"rounds": -1')], {"rounds": 4, "name": "a"}, "is damaged"),
        ([('"rounds"', '"sdnuor"')], {"rounds": 4, "name": "a"}, "is damaged"),
        ([('"config"', '"gifnoc"')], {"rounds": 4, "name": "a"}, "is damaged"),
        ([('"sha256"', '"md5"')], {"rounds": 4, "name": "a"}, "is damaged"),
    ],
)
def test_of_a_record_that_is_another_only_a_configuration_that_could_be_one_is_taken(tmp_path, pairs, config, said):
    def check(config):
        if config["rounds"] < 1:
            raise ValueError("rounds")

    path = tmp_path / "config.json"
    content = {"config": {"rounds": 4, "name": "a"}, "versions": {"jax": "0.10.2"}}
    files.write_record(path, content)
    assert files.is_kept(path)
    edited(path, *pairs)
    assert not files.is_kept(path)
    with pytest.warns(files.RecordWarning, match=said):
        assert files.read_record(path, check) == {**content, "config": config}
    assert files.is_kept(path) == ("damaged" in said)  # what was edited stays so until a run goes on with it
    (tmp_path / "checkpoints" / "config.json").unlink()
    edited(path, ('"name": "a"', '"name": "bc"'))
    with pytest.raises(ValueError, match=r"sha256 differs.* nor its copy"):
        files.read_record(path, check)


def npz(path, order):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64)[::order])


def test_other_examples_and_other_keys_are_refused(small, tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    config = small.replace(dataset=str(path), partition="iid", clients=5)
    npz(path, 1)
    train.claim(tmp_path / "run", config, setup.federate(config))
    train.claim(tmp_path / "run", config, setup.federate(config))
    npz(path, -1)
    with pytest.raises(
        ValueError, match=rf"the examples of {path} have changed since .* \(digest \w+ here, \w+ there\)"
    ):
        train.claim(tmp_path / "run", config, setup.federate(config))
    npz(path, 1)
    other = setup.federate(config.replace(partition_seed=1))
    with pytest.raises(ValueError, match="are assigned to other clients"):
        train.claim(tmp_path / "run", config, other)
    now = identity.identity(setup.federate(config))
    for changed, remedy in (
        ({"keys": "rbg"}, "set JAX_DEFAULT_PRNG_IMPL=threefry2x32"),
        ({"partitionable": "False"}, "set JAX_THREEFRY_PARTITIONABLE=True"),
    ):
        monkeypatch.setattr(identity, "identity", lambda federation, changed=changed: now | changed)
        with pytest.raises(ValueError, match=remedy):
            train.claim(tmp_path / "run", config, other)


def test_the_digest_of_mapped_examples_is_the_kept_one_and_the_same_as_of_those_in_memory(tmp_path, monkeypatch):
    def build(allocate):
        allocate("x", (50, 3), np.float32)[...] = np.arange(150).reshape(50, 3)
        return {}

    mapped = fetch("set", "1", {}, "source", build, cache_dir=tmp_path).arrays["x"]
    in_memory = np.array(mapped)
    want = identity._digest(in_memory)
    assert identity._digest(np.asfortranarray(in_memory)) == want
    assert identity._digest(mapped[::-1]) != want
    monkeypatch.setattr(identity, "BytesIO", partial(pytest.fail, "it is read again"))
    assert identity._digest(mapped) == want
