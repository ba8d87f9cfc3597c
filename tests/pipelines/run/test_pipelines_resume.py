"""Processes that are killed and interrupted, and what is left to go on from."""

import random
import signal
import time

import jax
import numpy as np

from pipelines.run.train import final_params

WORDS = [
    *("train", "--dataset", "iris", "--clients", "6", "--cohort-size", "3", "--min-size", "2", "--seeds", "2"),
    *("--model", "logistic_regression", "--method", "fedavg", "--method", "fedadam", "--epochs", "1"),
    *("--rounds", "242", "--eval-every", "4", "--checkpoint-every", "8"),
]
KILLS = 3


def newest(out, method):
    """The latest saved round of a method, 0 if there is none."""
    folders = (out / "checkpoints" / method).glob("round-*")
    return max((int(path.name.removeprefix("round-")) for path in folders), default=0)


def wait_for_progress(process, out, method, beyond):
    deadline = time.monotonic() + 120
    while newest(out, method) <= beyond and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)


def test_killed_again_and_again_ends_as_if_never_killed(command, tmp_path):
    untouched = command(*WORDS, "--out", "untouched", cwd=tmp_path)
    said, errors = untouched.communicate(timeout=300)
    assert untouched.returncode == 0, errors
    assert "\x1b" not in said
    assert "compiling ..." in said

    rng = random.Random(time.time_ns())
    out = tmp_path / "killed"
    killed_at = []
    for kill in range(KILLS):
        process = command(*WORDS, "--out", "killed", cwd=tmp_path)
        method = "fedavg" if kill < KILLS - 1 else "fedadam"
        wait_for_progress(process, out, method, newest(out, method))
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {said}{errors}"
        assert "damaged" not in errors, "a checkpoint is complete or absent"
        if killed_at:
            assert f"going on after round {killed_at[-1]}" in said or "complete" in said
        killed_at.append(newest(out, "fedavg"))
    assert killed_at == sorted(killed_at)
    assert 0 < killed_at[0] < 242
    assert len(set(killed_at)) > 1

    process = command(*WORDS, "--out", "killed", cwd=tmp_path)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for name in ("metrics.csv", "clients.csv", "curves.png"):
        assert (out / name).read_bytes() == (tmp_path / "untouched" / name).read_bytes()
    for method in ("fedavg", "fedadam"):
        ours, theirs = (jax.tree.leaves(final_params(tmp_path / d, method)) for d in ("killed", "untouched"))
        assert [np.asarray(leaf).tobytes() for leaf in ours] == [np.asarray(leaf).tobytes() for leaf in theirs]


def test_ctrl_c_saves_and_says_how_to_go_on(command, tmp_path):
    words = [*WORDS, "--rounds", "100000", "--checkpoint-every", "100000"]
    process = command(*words, "--out", "run", cwd=tmp_path)
    deadline = time.monotonic() + 120
    lines = []
    while "compiled" not in "".join(lines):
        assert time.monotonic() < deadline
        lines.append(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping: finishing this chunk" in said
    assert "fedjax-core train --dataset iris" in errors
    assert "--out run" in errors
    assert "Traceback" not in errors
    round = newest(tmp_path / "run", "fedavg")
    assert round > 0
    assert f"after round {round} of fedavg, which is saved" in errors
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 2 * round
