"""What cannot work is refused in a sentence before anything is compiled: numbers, names, directories, memory."""

import json
import shlex

import click
import jax
import numpy as np
import pytest
from click.testing import CliRunner

from pipelines import Config
from pipelines.cli import commands, options
from pipelines.common import files, names
from pipelines.experiment import memory, setup
from pipelines.run import train
from pipelines.studies import continual_config, zeroth_order
from pipelines.studies.zeroth_order_config import Synthetic

TINY = shlex.split(
    "--no-cache --dataset iris --model logistic_regression --clients 6 --cohort-size 3 --min-size 2 --rounds 1 "
    "--eval-every 1 --checkpoint-every 1 --seeds 1 --epochs 1 --method fedavg --mesh 1"
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rounds": 10**20}, "rounds must be at most 2147483647, .*got 100000000000000000000"),
        ({"eval_every": 2**31, "checkpoint_every": 2**31}, "eval_every must be at most 2147483647"),
        ({"batch_size": 2**31}, "batch_size must be at most"),
        ({"steps": 2**31, "epochs": None}, "steps must be at most"),
        ({"epochs": 2**63}, "epochs must be at most"),
        ({"period": 2**31}, "period must be at most"),
        ({"clients": 2**31}, "clients must be at most"),
        ({"hidden": (2**31,)}, r"hidden\[0\] must be at most"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be an integer of at least 1, got 0"),
        ({"gap": 2**63, "split_by": "position"}, "gap must be at most"),
        ({"partition_seed": -1}, "partition_seed must be an integer of at least 0, got -1"),
        ({"first_seed": 2**40}, "first_seed must be an integer from -2147483647 to 2147483647.*1099511627776"),
        ({"first_seed": 2**31 - 3, "seeds": 4}, "and so the last one, got seeds=4"),
        ({"first_seed": 1.5}, "first_seed must be an integer"),
        ({"sigma": float("nan")}, "sigma must be finite in single precision, got nan"),
        ({"severity": float("inf")}, "severity must be finite"),
        ({"exponent": 1e39}, "exponent must be finite"),
        ({"client_lr": float("inf")}, "client_lr must be finite"),
        ({"attack_radius": 1e300}, "attack_radius must be finite"),
        ({"alpha": "0.3"}, "alpha must be a number, got '0.3'"),
        ({"settings": {"fedavg": {"server_lr": float("nan")}}}, r"fedavg\.server_lr must be finite"),
        ({"settings": {"fedavg": {"client_lr": "inf"}}}, r"fedavg\.client_lr must be finite"),
        ({"methods": ("fedau",), "settings": {"fedau": {"cutoff": 2**31}}}, r"fedau\.cutoff must be within"),
        ({"dataset": 3}, "dataset must be a text, got 3"),
        ({"x64": "yes"}, "x64 must be True or False, got 'yes'"),
        ({"data_dir": "a\0b"}, "data_dir must not hold the character NUL"),
    ],
)
def test_a_configuration_holds_only_what_devices_can_count(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


def test_the_largest_numbers_are_taken():
    most = 2**31 - 1
    config = Config(
        rounds=most, eval_every=most, checkpoint_every=most, first_seed=most - 4, clients=most, steps=most, epochs=None
    )
    assert Config.from_json(config.to_json()) == config
    assert Config(first_seed=-most).first_seed == -most
    assert Config(hidden=[8], methods=["fedavg"]) == Config(hidden=(8,), methods=("fedavg",))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rounds": 2**31}, "rounds must be at most"),
        ({"rounds": 2**30, "tasks": 2}, "more than 2147483647 rounds in all"),
        ({"hidden": (0,)}, r"hidden\[0\] must be an integer of at least 1"),
        ({"client_lr": float("nan")}, "client_lr must be finite"),
        ({"weight_decay": -1.0}, "weight_decay must lie in"),
        ({"first_seed": -1}, "first_seed must be an integer of at least 0"),
        ({"methods": ("fedavg", "fedavg")}, "names one twice"),
    ],
)
def test_so_does_a_run_over_tasks(fields, said):
    with pytest.raises(ValueError, match=said):
        continual_config.Continual(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seeds": 2**31}, "seeds must be at most"),
        ({"capacity": 2**31}, "capacity must be at most"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"clients": 0}, "clients must be an integer of at least 1, got 0"),
        ({"heterogeneity": float("nan")}, "heterogeneity must be finite"),
        ({"mu": 0.0}, "mu must lie in"),
    ],
)
def test_and_a_study_without_gradients(fields, said):
    with pytest.raises(ValueError, match=said):
        Synthetic(**fields)


@pytest.mark.parametrize(("fields", "said"), [({"seeds": 10**9}, "rounds"), ({"rounds": 2**31 - 1}, "rounds")])
def test_a_study_that_cannot_fit(fields, said, tmp_path):
    study = Synthetic(dim=3, clients=2, **fields)
    with pytest.raises(ValueError, match=f"the study would hold at least .*{said}.*lower --{said}"):
        zeroth_order.compare(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "is a file: choose a directory"),
        ("file/below/it", "lies below .*file, which is a file"),
        ("n" * 300, "is too long: a name has at most 255 bytes"),
        ("\u00e9" * 200, "is too long"),
        ("deep/" * 900, "is too long"),
        ("a\0b", "is no name of a directory, NUL is in it"),
        ("\ud800", "is no name of a directory"),
        ("/proc/self/made", "cannot be made"),
    ],
)
def test_a_directory_that_cannot_be_made(name, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=said) as error:
        files.make_directory(tmp_path / name)
    assert len(str(error.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_are_shown_in_part():
    with pytest.raises(ValueError, match=r"unknown method 'x{60}\.\.\.x{17}'"):
        names.pick("method", "x" * 5000, ["fedavg"])


def test_no_more_cores_than_can_be_are_advised(small):
    with jax.enable_x64(False):
        for mesh, advised in ((100, True), (999, False), (2**31 - 1, False)):
            with pytest.raises(ValueError, match=f"mesh={mesh} but there are") as error:
                setup.prepare(small.replace(mesh=mesh))
            assert ("JAX_NUM_CPU_DEVICES" in str(error.value)) == advised


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", ""], "is no run directory"),
        (["evaluate", "/dev/null"], "is no run directory"),
        (["evaluate", "x" * 5000], "Error: "),
        (["evaluate", "RUN", "--seed", "1" + "0" * 20], "is none of this run: it has 0, 1"),
        (["evaluate", "RUN", "--method", ""], "unknown method of this run ''"),
        (["evaluate", "RUN", "--split", "\u4e2d"], "unknown split"),
        (["export", "RUN", "--format", ""], "unknown format ''"),
        (["export", "RUN", "--format", "npz", "--client", "-1"], "client -1 is none of this run"),
        (["export", "RUN", "--format", "npz", "--client", "1" + "0" * 20], "is no list of client numbers"),
        (["export", "RUN", "--format", "npz", "--client", ","], "is no list of client numbers"),
        (["export", "RUN", "--out", "/dev/null/x.npz"], "is a file: choose a directory"),
        (["completion", ""], "is not one of"),
        (["zeroth-order", "synthetic", "--clients", "2147483647"], "the functions of the clients would hold at least"),
        (["zeroth-order", "metric", "--clients", "2147483647"], "the functions of the clients would hold at least"),
        (["train", "--config", "/dev/null"], "is of no kind that a configuration can be"),
        (["train", "--federation", ""], "holds no federation"),
        (["train", "--log", ""], "unknown log ''"),
        (["train", "--set", "fedavg.server_lr=1e400"], "must be finite"),
        (["train", "--set", ".=1"], "unknown method among those of this run ''"),
        (["federate", "--compare", "\u4e2d"], "unknown partition to compare with"),
    ],
)
def test_so_do_the_other_commands(words, said, request, tmp_path, monkeypatch):
    run = str(request.getfixturevalue("finished")) if "RUN" in words else ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    result = CliRunner().invoke(commands.main, [run if word == "RUN" else word for word in words])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mesh", "made"), [("2", 2), ("999", None)])
def test_cores_do_not_stand_in_for_a_thousand_devices(mesh, made, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("pipelines.common.processes.cores_as_devices", asked.append)
    result = CliRunner().invoke(
        commands.main, ["train", *TINY, "--model", "none", "--mesh", mesh, "--out", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert asked == [made]


def test_long_names_make_short_directories():
    long = [Config(dataset=f"/{'folder/' * 40}{name}.npz", model=f"{'m' * 300}:{name}") for name in ("a", "\u00e9")]
    slugs = {config.slug() for config in long} | {config.federation_slug() for config in long}
    assert len(slugs) == 4
    assert all(len(slug.encode()) < 255 for slug in slugs)
    assert Config(dataset="mnist+usps").federation_slug().startswith("mnist+usps-50")


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    texts = {"max": "1000", "current": "900", "stat": "anon 1\ninactive_file 300\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", (tuple(str(tmp_path / name) for name in texts),))
    assert memory.available() == 400
    (tmp_path / "max").write_text("max\n")
    assert memory.available() > 1000


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rounds": 10**9}, r"scaffold.*curves.*lower --rounds or --seeds"),
        ({"rounds": 10**9, "staged": True}, "curves"),
        ({"rounds": 2**31 - 1, "eval_every": 2**31 - 1, "checkpoint_every": 2**31 - 1}, "chunk"),
        ({"seeds": 10**8}, "state"),
        ({"batch_size": 2 * 10**9}, "batch_size=2000000000, but all clients together have"),
        ({"model": "mlp", "hidden": (10**7,)}, "client state .*take a smaller model"),
        ({"model": "mlp", "hidden": (2 * 10**8,)}, "take a smaller model"),
        ({"model": "mlp", "hidden": (2**31 - 1,)}, "take a smaller model"),
        ({"epochs": 2**31 - 1}, "are more than 2147483647 steps"),
        ({"batch_size": 2**31 - 1}, "which devices cannot count"),
        ({"model": "mlp", "hidden": (2 * 10**7,), "methods": ("fedavg",)}, r"smaller model \(--hidden is 20000000\)"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_compiled(fields, said, small, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    with jax.enable_x64(False), pytest.raises(ValueError, match=said):
        setup.prepare(small.replace(**{"methods": ("scaffold",), **fields}))


def test_what_is_held_counts_what_is_there(small):
    with jax.enable_x64(False):
        held = {}
        for staged in (False, True):
            config = small.replace(methods=("scaffold",), staged=staged, mesh=2)
            experiment = setup.prepare(config)
            metrics = {"loss": np.zeros((), np.float32), "norm": np.zeros(2, np.float32)}
            held[staged] = setup.held_memory(experiment, "scaffold", metrics)
    host, device = held[False]
    # 12 rounds, 6 evaluations, two seeds, one method and the copy of it as it grows.
    assert host["curves"] == 2 * 2 * (12 * (12 + 100) + 6 * 100)
    assert host["cohorts"] == 0
    assert device["client state"] == 2 * 6 * 15 * 4
    assert device["state"] == 2 * 2 * (2 * 15 * 4 + 4)  # on both devices: two seeds, the model, c and the round
    assert device["chunk"] == 2 * 2 * 2 * 12
    assert device["data"] == 2 * (120 * 20 + 7 * 4)
    host, device = held[True]
    assert device["data"] == 0
    largest = np.sort(experiment.population.sizes)[-6:].sum()
    assert host["cohorts"] == 2 * largest * 20 + 8 * 3 * 2


HOSTILE = {
    int: ["", "0", "-1", "1e3", "1.5", "nan", "2147483647", "2147483648", "9223372036854775808", "1" + "0" * 20],
    float: ["-1", "1e308", "1e-320", "nan", "inf", "-inf", "1e39", "1e400", "", "0,5"],
    str: ["", "\u4e2d\U0001f600", "x" * 5000, "/dev/null", "../", "a+b"],
}


def hostile_calls():
    """A few hundred command lines, each with one option that is given something that it was not made for."""
    kinds = {
        click.types.IntParamType: int,
        click.types.FloatParamType: float,
        options._Parsed: int,
    }
    base = {
        "train": TINY,
        "federate": ["--dataset", "iris", "--clients", "6", "--min-size", "2"],
        "continual": ["--dataset", "iris"],
        "zeroth-order synthetic": ["--dim", "3", "--clients", "2", "--seeds", "1"],
    }
    tried = {
        "train": commands.train,
        "federate": commands.federate,
        "continual": commands.continual,
        "zeroth-order synthetic": commands.zeroth_order.commands["synthetic"],
    }
    for name, command in tried.items():
        for option in command.params:
            # Methods, models and data sets of any name are for other tests; processes would meet.
            if option.is_flag or option.name in ("coordinator", "num_processes", "process_id", "method"):
                continue
            for value in HOSTILE[kinds.get(type(option.type), str)]:
                yield [*name.split(), *base[name], option.opts[0], value]


@pytest.mark.slow
def test_no_command_line_that_is_built_ends_in_a_traceback(tmp_path, monkeypatch):
    """As below, but federations, models and rounds are built and traced: everything but the training."""

    def stop(*args, **kwargs):
        raise train.Refused("work would begin here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(train, "run", stop)
    monkeypatch.setattr("pipelines.federation.federations.save", stop)
    monkeypatch.setattr("pipelines.studies.continual.run", stop)
    monkeypatch.setattr("pipelines.studies.zeroth_order._trials", stop)
    mattering = [[], *([word, value] for word, values in MATTERING.items() for value in values)]
    bad, begun = [], 0
    with jax.enable_x64(False):
        for number, words in enumerate(hostile_calls()):
            for more in mattering if words[0] == "federate" else [[]]:
                result = CliRunner().invoke(commands.main, [*words, *more, "--out", f"out{number}"])
                begun += "work would begin here" in result.output
                if result.exit_code != 2 or "Error: " not in result.output or "Traceback" in result.output:
                    bad.append((shlex.join([*words, *more])[-100:], result.exit_code, result.output[-300:]))
    assert not bad, json.dumps(bad, indent=1)
    assert begun > 100
    assert not list(tmp_path.glob("fedjax-core-*")), "no error was unexpected"


# With these other options have a meaning.
MATTERING = {
    "--partition": ["shards", "classes", "partial_classes", "lognormal", "lognormal_classes", "power_law", "clusters"],
    "--feature-skew": ["noise", "scale"],
    "--test-share": ["0.2"],
}


def test_no_command_line_ends_in_a_traceback(tmp_path, monkeypatch):
    """Every call is a usage error or comes as far as the place where work would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    begun = []

    def stop(*args, **kwargs):
        begun.append(args)
        raise ValueError("work would begin here")

    # Building takes most of the time; a mistake that only building shows has tests of its own.
    monkeypatch.setattr(setup, "federate", stop)
    monkeypatch.setattr("pipelines.studies.continual.scenario", stop)
    monkeypatch.setitem(zeroth_order.TASKS, "synthetic", stop)
    calls = list(hostile_calls())
    assert len(calls) > 400
    bad = []
    for words in calls:
        result = CliRunner().invoke(commands.main, words)
        if result.exit_code != 2 or "Error: " not in result.output or "Traceback" in result.output:
            bad.append((shlex.join(words)[-100:], result.exit_code, result.output[-300:]))
    assert not bad, json.dumps(bad, indent=1)
    assert 50 < len(begun) < len(calls) / 2, "most are refused before"
    assert not list(tmp_path.glob("fedjax-core-*")), "no error was unexpected"
    assert train.saved_config(tmp_path) is None
    assert np.all([path.name not in ("config.json", "study.json") for path in tmp_path.rglob("*")])
