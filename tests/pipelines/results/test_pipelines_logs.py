"""What is logged is a function of the history: no step twice, whatever was interrupted."""

import json
import os
import signal
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines import Config
from pipelines.cli import commands
from pipelines.common.progress import silent
from pipelines.results import logs
from pipelines.results.history import after
from pipelines.run import train

CONFIG = Config(rounds=6, eval_every=2, checkpoint_every=2, seeds=2, validation_share=0.1, patience=1)


def measured(evaluations: int):
    """Seed 0 stops at the second evaluation; in the first two rounds no client takes part with seed 1."""
    rng = np.random.default_rng(0)
    history = {name: rng.uniform(size=(2, 3)) for name in ("test/loss", "test/accuracy", "validated/loss")}
    history["validated/accuracy"] = np.asarray([[0.5, 0.4, 0.9], [0.1, 0.2, 0.3]])
    history = {name: value[:, :evaluations] for name, value in history.items()}
    loss = np.arange(12.0).reshape(2, 6)
    participants = np.ones((2, 6), int)
    participants[1, :2] = 0
    return history | {
        "round/loss": loss[:, : 2 * evaluations],
        "round/participants": participants[:, : 2 * evaluations],
    }


ENDS = np.asarray([4, 1000])


def since(evaluations: int):
    """What is measured after so many evaluations, up to the next, as `log` takes it."""
    begin = 2 * evaluations
    return begin, after(measured(evaluations + 1), begin, evaluations), ENDS


def events(folder):
    """(tag, step) to value, of all event files of a folder; a pair that is there twice fails."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_every_evaluation_once(tmp_path):
    # Killed after the second evaluation, of which the first was saved.
    first = logs.logger(["tensorboard"], CONFIG, tmp_path)
    first.log("fedavg", [0, 1], 0, {}, ENDS)
    for evaluations in (0, 1):
        first.log("fedavg", [0, 1], *since(evaluations))
    second = logs.logger(["tensorboard", "tensorboard"], CONFIG, tmp_path)
    for _ in range(2):  # begun again with a smaller plan
        second.log("fedavg", [0, 1], 0, measured(1), ENDS)
        for evaluations in (1, 2):
            second.log("fedavg", [0, 1], *since(evaluations))
    second.finish()
    whole = measured(3)
    zero, one = (events(tmp_path / "tensorboard" / "fedavg" / f"seed-{s}") for s in (0, 1))
    assert sorted({step for _, step in zero}) == [2, 4]  # it stopped there
    assert sorted({step for _, step in one}) == [2, 4, 6]
    assert one["test/accuracy", 6] == pytest.approx(whole["test/accuracy"][1, 2])
    assert one["validation/accuracy", 4] == pytest.approx(0.2)
    assert ("train/loss", 2) not in one  # no client took part
    assert zero["train/loss", 4] == pytest.approx(2.5)


def test_wandb_is_given_every_evaluation_once(tmp_path, monkeypatch):
    runs = []

    def init(**options):
        steps = []
        runs.append(SimpleNamespace(options=options, steps=steps, finished=[]))
        return SimpleNamespace(
            log=lambda metrics, step: steps.append((step, metrics)), finish=lambda: runs[-1].finished.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **options: options))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for _ in range(2):
        logger = logs.logger(["wandb"], CONFIG, tmp_path)
        logger.log("fedavg", [0, 1], 0, measured(2), ENDS)
        logger.log("fedavg", [0, 1], *since(2))
        logger.finish()
    assert [[step for step, _ in run.steps] for run in runs] == [[2, 4], [2, 4, 6]] * 2
    assert runs[0].options["mode"] == "offline"
    assert runs[0].options["id"] == runs[2].options["id"] != runs[1].options["id"]


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_not_there_is_named(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"--log {kind} needs the package {package}.*fedjax-core\[{kind}\]"):
        logs.logger([kind], CONFIG, tmp_path)


def test_the_nearest_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match="tensorboard"):
        logs.logger(["tensorbord"], CONFIG, tmp_path)


def test_a_run_that_was_interrupted_is_logged_as_one_that_was_not(small, tmp_path):
    config = small.replace(methods=("fedavg",), rounds=6, eval_every=2, checkpoint_every=6)
    told = []

    def stop(progression):
        if progression.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    for update in (stop, lambda progression: None, lambda progression: None):
        logger = logs.logger(["tensorboard"], config, tmp_path)
        reporter = silent()._replace(
            update=update, finish=logger.finish, log=logger.log, event=lambda name, fields: told.append((name, fields))
        )
        try:
            history = train.train(config, tmp_path, reporter=reporter)["fedavg"].history
        except train.Interrupted:
            assert update is stop
        seen = events(tmp_path / "tensorboard" / "fedavg" / "seed-1")
    for e, round in enumerate((2, 4, 6)):
        assert seen["test/accuracy", round] == pytest.approx(float(history["test/accuracy"][1, e]))
    assert [name for name, _ in told] == [
        *("compiling", "evaluated", "saved"),
        *("compiling", "evaluated", "evaluated", "saved", "finished"),
        "finished",
    ]
    shown = [fields for name, fields in told if name == "evaluated"]
    assert [fields["round"] for fields in shown] == [2, 4, 6]
    assert shown[0]["test_accuracy"] == history["test/accuracy"][:, 0].tolist()
    assert shown[0]["stopped"] == [False, False]


def test_what_was_asked_for_wrongly_is_told_as_json(tmp_path):
    said = CliRunner().invoke(commands.main, ["train", "--json", "--patience", "3", "--out", str(tmp_path / "run")])
    told = [json.loads(line) for line in said.stdout.splitlines()]
    assert [(line["event"], line["exit_code"]) for line in told] == [("error", 2)]
    assert "patience=3 with validation_share=0" in told[0]["message"]
