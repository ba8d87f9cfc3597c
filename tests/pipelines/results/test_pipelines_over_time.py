"""Every client at every evaluation, the same wherever a run was interrupted."""

import os
import signal

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.common.progress import silent
from pipelines.results import early
from pipelines.run import train

EARLY = {"validation_share": 0.3, "patience": 1}


def stop(progression):
    if progression.round == 4:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("part", "options"), [("train", {}), ("test", {"test_share": 0.3, **EARLY, "rounds": 9, "eval_every": 1})]
)
def test_clients_over_time(small, tmp_path, part, options):
    config = small.replace(
        **{"methods": ("fedavg",), "rounds": 7, "checkpoint_every": 4, "clients_over_time": True, **options}
    )
    once, twice = tmp_path / "once", tmp_path / "twice"
    with jax.enable_x64(False):
        history = train.train(config, once)["fedavg"].history
        for reporter in (silent()._replace(update=stop), silent()):
            try:
                train.train(config, twice, reporter=reporter)
            except train.Interrupted:
                continue
    assert (once / "clients.parquet").read_bytes() == (twice / "clients.parquet").read_bytes()
    table = pq.read_table(once / "clients.parquet")
    names = ["method", "seed", "round", "client", "examples", "part", "loss", "accuracy"]
    assert table.column_names == names
    rows = table.to_pydict()
    assert set(rows["part"]) == {part}
    rounds = train.history.evaluated_rounds(config.rounds, config.evaluation.eval_every)
    found = early.course(config, history)
    ends = found.ends if found is not None else np.full(2, len(rounds))
    expected = [(seed, round, client) for seed in (0, 1) for round in rounds[: ends[seed]] for client in range(6)]
    assert list(zip(rows["seed"], rows["round"], rows["client"], strict=True)) == expected
    # At the end it is what clients.csv says.
    name = "client/train_" if part == "train" else "client/"
    accuracy = np.asarray(rows["accuracy"])
    for seed in (0, 1):
        last = [i for i, row in enumerate(expected) if row[:2] == (seed, rounds[ends[seed] - 1])]
        np.testing.assert_allclose(accuracy[last], history[f"{name}accuracy"][seed], rtol=1e-6)
        examples = np.asarray(rows["examples"])[last]
        np.testing.assert_array_equal(np.isnan(accuracy[last]), examples == 0)


def test_a_run_that_grows_has_its_clients_too(small, tmp_path):
    config = small.replace(methods=("fedavg",), rounds=3, checkpoint_every=4, clients_over_time=True)
    grown = config.replace(rounds=6, seeds=3)
    with jax.enable_x64(False):
        train.train(config, tmp_path)
        history = train.train(grown, tmp_path)["fedavg"].history
    rows = pq.read_table(tmp_path / "clients.parquet").to_pydict()
    expected = [(seed, round, client) for seed in range(3) for round in (2, 4, 6) for client in range(6)]
    assert list(zip(rows["seed"], rows["round"], rows["client"], strict=True)) == expected
    last = np.asarray(rows["round"]) == 6
    np.testing.assert_allclose(np.asarray(rows["loss"])[last].reshape(3, 6), history["client/train_loss"], rtol=1e-6)
