"""Two processes on one machine are the several hosts of a run: the same numbers, one checkpoint, a clear end."""

import csv
import os
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from pipelines.common import processes
from pipelines.run import train

ROUNDS = 40

# What the runtime prints by itself when processes meet, once for each device: a line in seven pieces, between which
# those of another device's thread may come.
OF_THE_RUNTIME = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+"
)


@pytest.fixture(scope="module")
def config(small):
    # Seven clients' rows are split inside, and a cohort of three over four devices leaves one idle.
    return small.replace(methods=("scaffold",), clients=7, min_size=1, rounds=ROUNDS, checkpoint_every=2, seeds=1)


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The run on one device, without interruption."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train.train(config, out)
    return table(out)


def table(out):
    with (out / "metrics.csv").open() as file:
        rows = [[float(value or "nan") for value in row[1:]] for row in csv.reader(file) if row[0] != "method"]
    return np.asarray(rows)


@pytest.fixture(scope="module")
def pair(config, command):
    """Starts the two processes of the run in a folder, the first of which has id 0."""

    def start(folder):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        words = [*config.command("run").split()[1:], "--processes", "--coordinator", f"localhost:{port}"]
        ids = [["--num-processes", "2", "--process-id", str(i)] for i in range(2)]
        return [command(*words, *own, cwd=folder, devices=2) for own in ids]

    return start


def wait_for_a_checkpoint(folder, processes):
    saved, deadline = folder / "run" / "checkpoints" / "scaffold", time.monotonic() + 240
    while not list(saved.glob("round-*/manifest.json")):
        assert [process.poll() for process in processes] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(pair, tmp_path_factory):
    """(run directory, exit code and words of the survivor) of a run on two processes, one of which was killed."""
    folder = tmp_path_factory.mktemp("killed")
    both = pair(folder)
    try:
        wait_for_a_checkpoint(folder, both)
        os.kill(both[1].pid, signal.SIGKILL)
        output = both[0].communicate(timeout=240)
    finally:
        for process in both:
            process.kill()
    return folder / "run", both[0].returncode, output


def test_a_process_that_is_killed_ends_the_run_with_a_clear_message(killed):
    out, status, (_, errors) = killed
    assert status == 3, errors
    assert "another process of this run has stopped" in errors
    assert "start all processes again with the same command" in errors
    assert len(table(out)) < ROUNDS


@pytest.mark.parametrize("devices", [1, 4])
def test_what_two_processes_saved_goes_on_on_one(killed, config, reference, devices, tmp_path):
    """And gives the numbers of a run on one device, those of the rounds on two processes included."""
    out = tmp_path / "run"
    shutil.copytree(killed[0], out)
    train.train(config.replace(mesh=devices), out)
    np.testing.assert_allclose(table(out), reference, rtol=1e-4, atol=1e-6)


def test_two_processes_end_together_when_one_is_asked_to_stop_and_go_on(pair, reference, tmp_path):
    both = pair(tmp_path)
    try:
        wait_for_a_checkpoint(tmp_path, both)
        os.kill(both[1].pid, signal.SIGTERM)  # the one that neither writes nor speaks
        outputs = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
        assert len(table(tmp_path / "run")) < ROUNDS
        both = pair(tmp_path)
        outputs = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
    finally:
        for process in both:
            process.kill()
    np.testing.assert_allclose(table(tmp_path / "run"), reference, rtol=1e-4, atol=1e-6)
    assert "going on after round" in outputs[0][0]
    assert not OF_THE_RUNTIME.sub("", outputs[1][0]).split()  # the first one speaks for all


def test_alone_everything_is_its_own(tmp_path):
    assert jax.process_count() == 1
    assert processes.is_first()
    assert processes.from_first({"a": [1]}) == {"a": [1]}
    assert processes.first_does(lambda: 3) == 3
    assert processes.highest(2) == 2
    processes.wait_for_all("nothing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, None), "num_processes, process_id not given: give all of coordinator"),
        (("localhost:1", 0, 0), "num_processes must be an integer of at least 1"),
        (("localhost:1", 2, 2), "process_id=2 with num_processes=2: count them from 0"),
        (("localhost", 2, 0), "coordinator='localhost' has no port: give it as host:port"),
        ((None, None, None), "the processes of this run could not meet"),
        (("localhost:1", 2, 0), "the processes of this run could not meet .* before anything else uses JAX"),
    ],
)
def test_mistakes_in_starting_are_named(given, message):
    jax.devices()  # as in this process, where JAX is in use
    with pytest.raises(ValueError, match=message):
        processes.connect(*given)
