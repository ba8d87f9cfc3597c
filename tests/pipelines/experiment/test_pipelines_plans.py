"""Which plan a run takes, and what it does when memory does not suffice."""

import json
import shutil

import jax
import numpy as np
import pytest
from filelock import FileLock

from fedjax_core import Plan
from pipelines.common.progress import Reporter
from pipelines.experiment import plans, setup
from pipelines.run import engines, train


def recorder():
    said = []
    return said, Reporter(said.append, lambda progression: None, lambda: None)


@pytest.fixture(scope="module")
def wide(small):
    return small.replace(methods=("fedavg",), mesh=2, lanes=4, rounds=4)


def test_on_a_processor_every_core_stands_in_for_a_device(small, monkeypatch):
    said, reporter = recorder()
    monkeypatch.setattr(plans, "cores", lambda: 4)
    assert plans.tuned(small, reporter) == small.replace(mesh=4)
    assert plans.tuned(small.replace(seeds=1), reporter).machine.mesh == 3  # a cohort of three
    for chosen in ({"lanes": 3}, {"mesh": 1}, {"mesh": 2}):
        asked = small.replace(**chosen)
        assert plans.tuned(asked, reporter) == asked
    monkeypatch.setattr(plans, "cores", lambda: 1)
    assert plans.tuned(small, reporter) == small
    assert not said


def test_elsewhere_lanes_are_tried_out_once(small, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plans.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(plans, "LANES", (1, 2, 64))
    monkeypatch.setattr(plans, "device_memory", lambda experiment: float("inf"))
    config = small.replace(mesh=1)
    with jax.enable_x64(False):
        said, reporter = recorder()
        chosen = plans.tuned(config, reporter)
        assert chosen.machine.lanes in (1, 2)  # there are not clients for 64
        assert chosen == config.replace(lanes=chosen.machine.lanes)
        assert said[0] == "trying execution plans ..."
        (path,) = (tmp_path / "fedjax-core" / "plans").iterdir()
        kept = json.loads(path.read_text())
        assert [trial["lanes"] for trial in kept["trials"]] == [chosen.machine.lanes, 3 - chosen.machine.lanes]
        said, reporter = recorder()
        assert plans.tuned(config, reporter) == chosen  # from the file, without a trial
        assert len(said) == 1
        other = config.replace(batch_size=3)
        assert plans._fingerprint(setup.prepare(other)) != path.stem


def test_a_trial_weighs_both_convolutions(small, monkeypatch):
    config = small.replace(dataset="digits", model="cnn", methods=("fedavg",), batch_size=2, cohort_size=1, seeds=1)
    monkeypatch.setattr(plans, "LANES", (1,))
    asked = []

    # The seconds are made up: which one wins must not depend on the machine.
    def trial(experiment, tried):
        asked.append(experiment.config.machine.convolution)
        return [plans.Trial(tried[0], {"auto": 2.0, "dots": 1.0}[asked[-1]], 0.0, 0, "")]

    monkeypatch.setattr(plans, "trial", trial)
    with jax.enable_x64(False):
        measured = plans._measure(config, setup.prepare(config))
    assert asked == ["auto", "dots"]
    assert measured["convolution"] == "dots"
    # For TPUs their compiler has said that dots are slower.
    monkeypatch.setattr(plans.jax, "default_backend", lambda: "tpu")
    with jax.enable_x64(False):
        assert plans._measure(config, setup.prepare(config, plan=Plan(1)))["convolution"] == "auto"
    assert asked == ["auto", "dots", "auto"]


def test_plans_get_smaller_until_one_client_is_trained_at_a_time(wide):
    with jax.enable_x64(False):
        experiment = setup.prepare(wide)
    ladder = []
    while (less := plans.smaller(experiment)) is not None:
        ladder.append((less.lanes, less.num_devices))
        experiment = plans.with_plan(experiment, "fedavg", less)
    assert ladder == [(2, 2), (1, 1)]
    assert [plans.described(plan) for plan in (wide_plan(wide), Plan(1), Plan())] == [
        "4 lanes on 2 devices",
        "1 lane",
        "lanes as usual",
    ]


def wide_plan(config):
    with jax.enable_x64(False):
        return setup.prepare(config).plan


def test_a_smaller_plan_instead_of_running_out_of_memory(wide, finished, tmp_path, monkeypatch):
    """Once by prediction, once by what the compiled rounds need, once because the device says so."""
    built = []
    true_engine = engines.engine

    def engine(experiment, algorithm):
        built.append(plans.described(experiment.plan))
        return true_engine(experiment, algorithm)

    monkeypatch.setattr(engines, "engine", engine)
    with jax.enable_x64(False):
        experiment = setup.prepare(wide)
        most = sum(setup.predicted_memory(experiment, "fedavg").values())
    said, reporter = recorder()
    predicted = train.train(wide.replace(memory=(most - 1) / 2**30), tmp_path / "a", reporter=reporter)
    assert "fedavg: 4 lanes on 2 devices would need about" in said[0]
    assert "4 lanes on 2 devices" not in built

    built.clear()
    monkeypatch.setattr(plans, "predicted_memory", lambda experiment, method: {"data": 0})
    limits = {"4 lanes on 2 devices": 1, "2 lanes on 2 devices": 1, "1 lane": float("inf")}
    monkeypatch.setattr(plans, "device_memory", lambda experiment: limits[plans.described(experiment.plan)])
    said, reporter = recorder()
    compiled = train.train(wide, tmp_path / "b", reporter=reporter)
    assert built == list(limits)
    assert any("4 lanes on 2 devices needs" in line and "going on with 2 lanes" in line for line in said)

    built.clear()
    monkeypatch.setattr(plans, "device_memory", lambda experiment: float("inf"))

    def short_of_memory(experiment, algorithm):
        made = engine(experiment, algorithm)
        if len(built) > 1:
            return made

        def compile(length, state):
            chunk = made.compile(length, state)
            calls = []

            def run(state):
                calls.append(1)
                if len(calls) == 2:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                return chunk.run(state)

            return chunk._replace(run=run)

        return made._replace(compile=compile)

    monkeypatch.setattr(engines, "engine", short_of_memory)
    ran = train.train(wide, tmp_path / "c")
    assert built == ["4 lanes on 2 devices", "2 lanes on 2 devices"]
    for result in (predicted, compiled, ran):
        np.testing.assert_allclose(
            result["fedavg"].history["round/loss"], predicted["fedavg"].history["round/loss"], rtol=1e-4
        )


def test_memory_that_suffices_for_no_plan(wide, tmp_path):
    said, reporter = recorder()
    with pytest.raises(ValueError, match=r"fedavg does not fit into memory .* (model|--staged)"):
        train.train(wide.replace(memory=1e-7), tmp_path / "run", reporter=reporter)
    assert any("warning: fedavg needs about" in line for line in said)


def test_one_run_at_a_time_in_a_directory(finished, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with (
        FileLock(out / "checkpoints" / ".lock"),
        pytest.raises(ValueError, match=r"another process is at work in .*: wait until"),
    ):
        train.train(small, out)
    assert train.train(small, out)


def test_a_run_that_goes_on_keeps_its_plan(small):
    saved = small.replace(mesh=2, lanes=4, convolution="dots")
    assert plans.kept(small, saved, set()) == saved
    assert plans.kept(small.replace(lanes=1), saved, {"lanes"}) == saved.replace(lanes=1)
    gone = saved.replace(mesh=4096)  # on a larger machine
    assert plans.kept(small, gone, set()) == small.replace(mesh=len(jax.devices()), convolution="dots")


def test_another_plan_than_began_the_run_is_told(finished, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("scaffold", "fedavg"):
        for folder in sorted((out / "checkpoints" / name).iterdir())[1:]:
            shutil.rmtree(folder)
    content = json.loads((out / "config.json").read_text())
    content["config"]["machine"]["mesh"] = 2
    (out / "config.json").write_text(json.dumps(content))
    said, reporter = recorder()
    train.train(small.replace(mesh=1), out, reporter=reporter)
    assert said[0] == "note: this run was begun with mesh 2 and goes on with 1: last bits may differ"
