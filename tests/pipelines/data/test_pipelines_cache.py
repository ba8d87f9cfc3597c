import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import cache
from pipelines.data.cache import CacheWarning

ROOT = Path(__file__).resolve().parents[3]
X = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
Y = np.arange(6, dtype=np.int32)


def build(allocate):
    allocate("x", X.shape, X.dtype)[...] = X
    allocate("y", Y.shape, Y.dtype)[...] = Y
    return {"num_classes": 6, "mean": [0.1 + 0.2]}


def never(allocate):
    raise AssertionError("built again")


def fetch(folder, build=build, source="s", verify=None, **key):
    key = {"name": "glue/toy", "version": "1.0.0", "options": {"a": 1}} | key
    return cache.fetch(**key, source=source, build=build, cache_dir=folder, verify=verify)


def quietly(folder, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fetch(folder, **arguments)


def assert_whole(entry):
    np.testing.assert_array_equal(entry.arrays["x"], X)
    np.testing.assert_array_equal(entry.arrays["y"], Y)
    assert entry.arrays["x"].dtype == X.dtype
    assert entry.info == {"num_classes": 6, "mean": [0.1 + 0.2]}


def only_folder(folder):
    (path,) = folder.iterdir()
    return path


def test_built_once_and_mapped_afterwards(tmp_path):
    assert_whole(quietly(tmp_path))
    kept = quietly(tmp_path, build=never, verify=True)
    assert_whole(kept)
    assert isinstance(kept.arrays["x"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        kept.arrays["x"][0] = 1
    path = only_folder(tmp_path)
    assert path.name.startswith("glue-toy-1.0.0-")
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "x.npy", "y.npy"]


@pytest.mark.parametrize("change", [{"name": "other"}, {"version": "1.0.1"}, {"options": {"a": 2}}])
def test_another_name_version_or_option_is_another_folder(tmp_path, change):
    fetch(tmp_path)
    with pytest.raises(AssertionError, match="built again"):
        fetch(tmp_path, build=never, **change)
    quietly(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_source_replaces_what_was_kept(tmp_path):
    fetch(tmp_path)

    def build_other(allocate):
        allocate("x", (1,), np.int64)[...] = 7
        return {}

    assert quietly(tmp_path, build=build_other, source="t").arrays["x"].tolist() == [7]
    assert quietly(tmp_path, build=never, source="t").arrays["x"].tolist() == [7]
    only_folder(tmp_path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_array(path):
    flip(path / "x.npy")
    return "x.npy is not what was written, its sha256 differs"


def truncate(path):
    size = (path / "x.npy").stat().st_size
    os.truncate(path / "x.npy", size - 1)
    return f"x.npy has {size - 1} bytes and not {size}"


def lose_array(path):
    (path / "y.npy").unlink()
    return "y.npy is missing"


def lose_manifest(path):
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def half_a_manifest(path):
    file = path / "manifest.json"
    os.truncate(file, file.stat().st_size // 2)
    return "manifest.json cannot be read"


def change_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"num_classes": 6', '"num_classes": 7'))
    return "manifest.json is not what was written"


def swap_arrays(path):
    """A file of the right size and sum, under another name: only its header tells."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["x"]["shape"] = [24]
    del manifest["sha256"]
    file.write_text(json.dumps({"sha256": cache._text_digest(manifest), **manifest}))
    return "x.npy has another dtype or shape"


DAMAGES = [flip_array, truncate, lose_array, lose_manifest, half_a_manifest, change_manifest, swap_arrays]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_built_again(tmp_path, damage):
    fetch(tmp_path)
    said = damage(only_folder(tmp_path))
    with pytest.warns(CacheWarning) as caught:
        assert_whole(fetch(tmp_path))
    assert len(caught) == 1
    assert said in str(caught[0].message)
    assert str(only_folder(tmp_path)) in str(caught[0].message)
    assert_whole(quietly(tmp_path, build=never, verify=True))


def test_large_sets_are_summed_up_on_request_and_when_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "VERIFY_BELOW", 0)
    fetch(tmp_path)
    file = only_folder(tmp_path) / "x.npy"
    written = file.stat()
    flip(file)
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    # As damage below the file system would be: nothing tells but the sum, which is not made unless asked for.
    assert quietly(tmp_path, build=never).arrays["x"][-1, -1, -1, 0] == 22
    with pytest.warns(CacheWarning, match="sha256 differs"):
        assert_whole(fetch(tmp_path, verify=True))
    file = only_folder(tmp_path) / "x.npy"
    os.utime(file, ns=(0, 0))
    assert_whole(quietly(tmp_path, build=never))
    flip(file)
    with pytest.warns(CacheWarning, match="sha256 differs"):
        assert_whole(fetch(tmp_path))


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(allocate):
        allocate("x", X.shape, X.dtype)[...] = X
        raise ValueError("no labels")

    with pytest.raises(ValueError, match="no labels"):
        fetch(tmp_path, build=fail)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_is_built_in_memory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CacheWarning, match="cannot keep decoded data in .*cache_dir or XDG_CACHE_HOME"):
        assert_whole(fetch(tmp_path / "file" / "cache"))


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.warns(CacheWarning, match="No space left on device"):
        assert_whole(fetch(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.user_folder("data") == tmp_path / "fedjax-core" / "data"
    fetch(None)
    assert_whole(quietly(tmp_path / "fedjax-core" / "data", build=never))


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from pipelines.data import cache

folder, me, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def build(allocate):
    x = allocate("x", (6, 2, 2, 1), np.uint8)
    (folder.parent / f"{me}-builds").touch()
    while not all((folder.parent / f"{other}-builds").exists() for other in others):
        time.sleep(0.01)
    x[...] = np.arange(24).reshape(6, 2, 2, 1)
    allocate("y", (6,), np.int32)[...] = np.arange(6)
    return {"num_classes": 6, "mean": [0.1 + 0.2]}

entry = cache.fetch("glue/toy", "1.0.0", {"a": 1}, "s", build, cache_dir=folder)
print(int(entry.arrays["x"].sum()), int(entry.arrays["y"].sum()), type(entry.arrays["x"]).__name__)
"""


def builder(folder, me, *others):
    """A process that builds, and does not go on before `others` build too."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BUILDER, str(folder), me, *others],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_build_at_once_all_get_the_arrays(tmp_path):
    folder, names = tmp_path / "cache", ["a", "b", "c"]
    processes = [builder(folder, name, *names) for name in names]
    for process in processes:
        assert process.communicate(timeout=120)[0].split() == ["276", "15", "memmap"]
        assert process.returncode == 0
    assert_whole(quietly(folder, build=never, verify=True))
    only_folder(folder)


def test_a_killed_build_is_not_trusted_and_is_cleared_away(tmp_path):
    folder = tmp_path / "cache"
    process = builder(folder, "killed", "never")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed-builds").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    half_built = only_folder(folder)
    assert (half_built / "x.npy").exists()

    # While it lives its folder is left alone, and so is that of another machine, of which this machine cannot tell.
    foreign = folder / ".building-another.machine-1-abcd"
    foreign.mkdir()
    fetch(folder, name="other")
    assert half_built.exists()

    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert_whole(quietly(folder))
    assert not half_built.exists()
    assert foreign.exists()
    assert_whole(quietly(folder, build=never, verify=True))
