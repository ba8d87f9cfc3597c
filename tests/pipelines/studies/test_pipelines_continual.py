import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock

import models
from benchmarks.permuted_mnist import configuration, configurations
from fedjax_core import Event, Plan
from pipelines.cli import commands
from pipelines.studies import continual, continual_config
from pipelines.studies.continual import measures, scenario
from pipelines.studies.continual_config import Continual

REAL = Path(os.environ.get("FEDJAX_CORE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
TINY = Continual(
    tasks=2,
    rounds=4,
    clients=6,
    cohort_size=3,
    hidden=(8,),
    batch_size=64,
    methods=("fot",),
    energy=0.9,
    checkpoint_every=2,
)


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and its results."""
    out = tmp_path_factory.mktemp("continual") / "run"
    with jax.enable_x64(False):
        return out, continual.run(TINY, out)


def test_the_measures_of_a_matrix_done_by_hand():
    accuracy = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.7, 0.9]])
    found = measures(accuracy, np.array([0.1, 0.1, 0.2]))
    assert found == pytest.approx(
        {
            "average accuracy": (0.5 + 0.7 + 0.9) / 3,
            "forgetting": ((0.9 - 0.5) + (0.8 - 0.7)) / 2,
            "backward transfer": -((0.9 - 0.5) + (0.8 - 0.7)) / 2,
            "forward transfer": ((0.2 - 0.1) + (0.3 - 0.2)) / 2,
        }
    )
    single = measures(np.array([[0.9]]), np.array([0.1]))
    assert single["average accuracy"] == 0.9
    assert np.isnan([single["forgetting"], single["backward transfer"], single["forward transfer"]]).all()


def rows(examples):
    """The inputs of examples as sorted rows with their labels, to be compared whoever holds them."""
    x = np.asarray(examples["x"]).reshape(len(examples["y"]), -1)
    table = np.column_stack([x, examples["y"]])
    return table[np.lexsort(table.T)]


@pytest.mark.parametrize("partition", ["iid", "shards"])
def test_permuted_tasks_are_the_same_examples_with_other_orders_of_pixels(partition):
    config = Continual(clients=20, partition=partition)
    tasks = scenario(config)
    first, second, third = (tasks.population(t) for t in range(3))
    # The pixels of a task are the columns of the first one's, for training and testing alike.
    order = np.random.default_rng([0, 1]).permutation(64)
    assert not np.array_equal(order, np.random.default_rng([0, 2]).permutation(64))
    test = [np.asarray(tasks.test(t)["x"]).reshape(-1, 64) for t in range(2)]
    np.testing.assert_array_equal(test[1], test[0][:, order])
    x = np.asarray(first.examples["x"]).reshape(-1, 64)[:, order]
    np.testing.assert_array_equal(rows({"x": x, "y": first.examples["y"]}), rows(second.examples))
    assert not np.array_equal(rows(second.examples), rows(third.examples))
    kinds = [len(np.unique(first.client(i)["y"])) for i in range(20)]
    assert (max(kinds) <= 4) == (partition == "shards")
    # Who holds what is drawn anew for each task.
    assert not np.array_equal(first.client(0)["y"], second.client(0)["y"])
    assert tasks.layers == {"dense_0/kernel": 64, "dense_1/kernel": 100, "head/kernel": 100}
    again = scenario(config).population(1)
    np.testing.assert_array_equal(again.examples["x"], second.examples["x"])


def test_split_tasks_have_their_own_classes_and_heads_that_are_not_protected():
    tasks = scenario(Continual(scenario="split", tasks=4))
    populations = [tasks.population(t) for t in range(4)]
    shapes = {p.examples["x"]["inputs"].shape for p in populations} | {len(p.examples["y"]) for p in populations}
    assert len(shapes) == 2
    whole = []
    for t, population in enumerate(populations):
        assert set(np.unique(population.examples["y"])) == {0, 1}  # ten classes: two are left over
        assert set(np.unique(population.examples["x"]["task"])) == {t}
        assert set(np.unique(tasks.test(t)["y"])) == {0, 1}
        whole.append(np.asarray(population.examples["x"]["inputs"]).reshape(-1, 64))
    assert len(np.unique(np.concatenate(whole), axis=0)) == sum(map(len, whole))  # no image is in two tasks
    assert set(tasks.layers) == {"dense_0/kernel", "dense_1/kernel"}
    params = tasks.model.init(jax.random.key(0))
    assert params["head"]["kernel"].shape == (100, 8)
    assert tasks.model.apply(params, tasks.test(2)["x"]).shape == (len(tasks.test(2)["y"]), 2)


@pytest.mark.parametrize("kind", ["permuted", "split"])
def test_a_model_may_start_uniformly(kind):
    kernels, biases = {}, {}
    for start in ("normal", "uniform"):
        model = scenario(Continual(scenario=kind, start=start)).model
        layer = model.init(jax.random.key(0))["dense_1"]
        kernels[start], biases[start] = (np.abs(np.asarray(layer[name])) * 10 for name in ("kernel", "bias"))
    assert kernels["normal"].max() > 1.5
    assert 0.99 < kernels["uniform"].max() <= 1
    assert biases["normal"].max() == 0
    assert 0.9 < biases["uniform"].max() <= 1


def test_the_clients_of_the_joint_run_hold_all_they_hold_in_any_task():
    tasks = scenario(Continual(clients=20))
    joint, parts = tasks.joint(), [tasks.population(t) for t in range(3)]
    for i in (0, 7):
        own = np.concatenate([np.asarray(part.client(i)["x"]) for part in parts])
        np.testing.assert_array_equal(joint.client(i)["x"], own)


def test_a_run_and_what_it_leaves(whole):
    out, results = whole
    (scores,) = results["fot"]
    assert scores.accuracy.shape == (2, 2)
    summary = json.loads((out / "summary.json").read_text())["fot"]
    assert summary["average accuracy"] == pytest.approx(scores.accuracy[-1].mean())
    summary = summary["seeds"]["0"]
    assert summary["accuracy"] == scores.accuracy.tolist()
    assert summary["average accuracy"] == pytest.approx(scores.accuracy[-1].mean())
    assert summary["directions"] == {path: list(used) for path, used in scores.directions.items()}
    assert {path: width for path, (_, width) in scores.directions.items()} == scenario(TINY).layers
    assert all(0 < rank < width for rank, width in scores.directions.values())
    lines = (out / "accuracy.csv").read_text().splitlines()
    assert lines[0] == "method,seed,after_task,task,accuracy"
    assert lines[1] == f"fot,0,-1,0,{scores.untrained[0]}"
    assert lines[-1] == f"fot,0,1,1,{scores.accuracy[1, 1]}"
    assert len(lines) == 1 + 3 * 2
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_drawn_again_from_the_checkpoints(whole, tmp_path):
    out, _ = whole
    again = CliRunner().invoke(commands.main, ["report", str(out), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {
        *("summary.md", "summary.html", "summary.json", "results.tex"),
        *("accuracy.csv", "accuracy.png", "accuracy.pdf"),
    }
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    spoiled = tmp_path / "spoiled"
    shutil.copytree(out, spoiled)
    (spoiled / "accuracy.csv").write_text((out / "accuracy.csv").read_text()[:-3])
    refused = CliRunner().invoke(commands.main, ["report", str(spoiled), "--out", str(tmp_path / "none")])
    assert refused.exit_code == 2
    assert f"{spoiled / 'accuracy.csv'} is not what was measured" in refused.output
    assert not (tmp_path / "none").exists()


def test_events_beside_the_rounds_run_once_each_as_in_other_runs(tmp_path, monkeypatch):
    plain, seen = continual.build, []

    def build(*args, **options):
        def beside(when):
            def run(state, cohort, key):
                jax.debug.callback(lambda round: seen.append((when, int(round), cohort.ids.shape[0])), state.round)
                return state

            return Event(run, when)

        return plain(*args, **options)._replace(events={when: beside(when) for when in ("before", "task", "after")})

    monkeypatch.setattr(continual, "build", build)
    config = TINY.replace(methods=("fedavg",), rounds=1)
    continual.run(config, tmp_path / "run")
    jax.effects_barrier()
    assert seen == [("before", 0, 6), ("task", 1, 3), ("task", 2, 3), ("after", 2, 6)]
    continual.run(config, tmp_path / "run")
    jax.effects_barrier()
    assert len(seen) == 4, "a finished run is not gone on with"


def test_a_mistake_in_a_method_leaves_no_directory(tmp_path):
    with pytest.raises(ValueError, match="energy must lie in"):
        continual.run(TINY.replace(energy=1.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_seed_is_a_run_of_its_own_and_more_may_join(whole, tmp_path):
    out, results = whole
    shutil.copytree(out, tmp_path / "run")
    both = continual.run(TINY.replace(seeds=2), tmp_path / "run")["fot"]
    alone = continual.run(TINY.replace(first_seed=1), tmp_path / "alone")["fot"][0]
    np.testing.assert_array_equal(both[0].accuracy, results["fot"][0].accuracy)
    np.testing.assert_allclose(both[1].accuracy, alone.accuracy, atol=0.01)
    np.testing.assert_array_equal(both[1].untrained, alone.untrained)
    assert (both[0].accuracy != both[1].accuracy).any()
    rows = (tmp_path / "run" / "accuracy.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["0"] * 6 + ["1"] * 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["fot"]
    means = [each.accuracy[-1].mean() for each in both]
    assert summary["average accuracy"] == pytest.approx(np.mean(means))
    with pytest.raises(ValueError, match="seeds: 1 here, 2 there"):
        continual.run(TINY, tmp_path / "run")


def test_a_run_of_before_there_were_several_seeds_is_read():
    old = {**TINY.flat(), "seed": 3}
    for name in ("seeds", "first_seed", "checkpoint_every"):
        del old[name]
    assert continual_config.of_values(old) == TINY.replace(first_seed=3, checkpoint_every=50)


def test_a_run_that_was_stopped_twice_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch):
    """In the middle of the first task and in the middle of the second, with the end of the first in between."""
    save = continual.checkpoint.save

    def run(stop):
        def stopping(folder, round, *args, **options):
            save(folder, round, *args, **options)
            if round == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(continual.checkpoint, "save", stopping)
        return continual.run(TINY, tmp_path / "run")["fot"][0]

    for stop in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    again = run(None)
    np.testing.assert_array_equal(again.accuracy, whole[1]["fot"][0].accuracy)
    np.testing.assert_array_equal(again.untrained, whole[1]["fot"][0].untrained)


def test_one_device_gives_the_numbers_of_all(whole, tmp_path):
    """The shared run is one over a mesh of all devices."""
    out, _ = whole
    assert len(jax.devices()) > 1
    continual.run(TINY.replace(checkpoint_every=50), tmp_path / "one", plan=Plan())
    tasks = scenario(TINY)
    expected = jax.eval_shape(continual.build(TINY, "fot", tasks).init, tasks.model.init(jax.random.key(0)))
    one, all_ = (
        continual.checkpoint.restore_latest(folder / "checkpoints" / "fot", expected, "the state")
        for folder in (tmp_path / "one", out)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one.state.params, all_.state.params
    )


def test_one_run_at_a_time_in_a_directory(whole):
    out, _ = whole
    with (
        FileLock(out / "checkpoints" / ".lock"),
        pytest.raises(ValueError, match=r"another process is at work in .*: wait until"),
    ):
        continual.run(TINY, out)


def test_another_configuration_is_refused_and_other_methods_may_join(whole, monkeypatch):
    out, _ = whole
    with pytest.raises(ValueError, match=r"energy: 0\.5 here, 0\.9 there"):
        continual.run(TINY.replace(energy=0.5), out)
    ran = []
    nothing = continual.Scores(np.ones((2, 2)), np.zeros(2), 0.0)
    monkeypatch.setattr(continual, "_run_method", lambda trainer, *rest: ran.append(trainer.name) or nothing)
    monkeypatch.setattr(continual, "write", lambda *args: None)
    continual.run(TINY.replace(methods=("fot", "ewc")), out)
    assert ran == [*TINY.methods, "ewc"], "what is there stays, and stays in the report"
    assert json.loads((out / "config.json").read_text())["config"]["methods"] == ran
    with pytest.raises(ValueError, match=r"no config\.json"):
        continual.run(TINY, out / "checkpoints")


def test_every_method_is_built_and_ends_its_tasks_or_has_none():
    tasks = scenario(TINY)
    ends = {name: "end_task" in continual.build(TINY, name, tasks).events for name in continual_config.METHODS}
    assert ends == {"fot": True, "fedavg": False, "ewc": True, "fedprox": False, "joint": False}
    state = continual.build(TINY, "fot", tasks).init(tasks.model.init(jax.random.key(0)))
    assert {path: basis.columns.shape[0] for path, basis in state.bases.items()} == tasks.layers
    assert state.energy == jnp.float32(0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Continual(scenario="splitt"), "did you mean 'split'"),
        (lambda: Continual(methods=("fott",)), "did you mean 'fot'"),
        (lambda: Continual(start="unifrom"), "did you mean 'uniform'"),
        (lambda: Continual(methods=()), "methods is empty"),
        (lambda: Continual(rule="cubed"), "unknown rule 'cubed'"),
        (lambda: Continual(tasks=0), "tasks must be an integer of at least 1"),
        (lambda: scenario(Continual(scenario="split", tasks=11)), "tasks=11, but digits has 10 classes"),
        (lambda: scenario(Continual(cohort_size=30)), "cohort_size=30"),
        (lambda: scenario(Continual(dataset="digitz")), "digitz"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_line_has_every_choice(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(continual, "run", lambda config, out, **rest: seen.append((config, out)))

    def call(*words):
        return CliRunner().invoke(commands.main, ["continual", *words])

    assert call().exit_code == 0
    assert seen.pop()[0] == Continual()
    words = [
        "--scenario",
        "split",
        "--method",
        "fot",
        "--method",
        "ewc",
        "--hidden",
        "30",
        "--dropout",
        "0.5",
        "--lam",
        "2",
    ]
    result = call(*words, "--out", str(tmp_path), "--checkpoint-every", "7", "--lr", "0.5", "--quiet")
    assert result.exit_code == 0, result.output
    expected = Continual(scenario="split", methods=("fot", "ewc"), hidden=(30,), dropout=(0.5,), lam=2.0, client_lr=0.5)
    expected = expected.replace(checkpoint_every=7)
    assert seen.pop() == (expected, tmp_path)
    for wrong, words in (
        (["--hidden", "1,,2"], "'1,,2' is no list of sizes"),
        (["--hidden", "a,b"], "'a,b' is no list of sizes"),
        (["--method", "fott"], "did you mean 'fot'"),
    ):
        result = call(*wrong)
        assert result.exit_code == 2
        assert words in result.output


def test_the_benchmark_gives_fot_every_energy_and_the_others_one_run():
    found = [(c.methods, c.energy) for c in configurations("iid", ("fot", "fedavg"), None)]
    assert found == [(("fot", "fedavg"), 0.96), (("fot",), 0.94)]
    assert [c.methods for c in configurations("iid", ("fedavg",), None)] == [("fedavg",)]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no prepared data in {REAL}; name its folder in FEDJAX_CORE_DATA")
def test_the_real_digits_of_the_benchmark():
    """125 clients of 480 examples each, and a perceptron with two hidden layers of 400 more than the first."""
    tasks = scenario(configuration("shards", ("fot",), str(REAL), 0.94, tasks=2, rounds=1))
    population = tasks.population(1)
    assert set(np.asarray(population.sizes).tolist()) == {480}
    assert population.examples["x"].shape == (60000, 28, 28, 1)
    assert tasks.layers == {"dense_0/kernel": 784, "dense_1/kernel": 400, "dense_2/kernel": 400, "head/kernel": 400}
    parameters = jax.eval_shape(tasks.model.init, jax.random.key(0))
    assert models.num_parameters(parameters) == 784 * 400 + 2 * 400 * 400 + 400 * 10 + 3 * 400 + 10
