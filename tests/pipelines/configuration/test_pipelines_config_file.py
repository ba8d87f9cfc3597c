"""Configurations in files, in and out, on the command line too; and what a shell completes."""

import json

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from pipelines import Config
from pipelines.cli import catalog, commands
from pipelines.configuration import config_file

ODD = Config(
    dataset="wine",
    data_dir='/data/😀 "é"',
    clients=None,
    partition="natural",
    methods=("fedprox", "scaffold"),
    settings={"fedprox": {"mu": 0.01, "client_lr": 0.3}},
    hidden=(8, 4),
    epochs=None,
    steps=7,
    x64=True,
    alpha=1e-3,
    lanes=2,
)


def call(*words):
    return CliRunner().invoke(commands.main, [str(word) for word in words], terminal_width=110)


@pytest.fixture
def parsed(monkeypatch):
    """The configuration that `train` would run."""
    seen = []
    monkeypatch.setattr(commands, "_train", lambda ctx, config, out, explicit, reporter: seen.append(config) or 0)

    def parse(*words):
        result = call("train", "--no-cache", *words)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return parse


@pytest.mark.parametrize("config", [Config(), ODD], ids=["defaults", "odd"])
@pytest.mark.parametrize("ending", ["toml", "yaml", "yml", "json"])
def test_what_is_written_is_read(config, ending, tmp_path, parsed):
    path = tmp_path / "folder" / f"mine.{ending}"
    config_file.write(path, config)
    assert parsed("--config", path) == config


def test_written_and_printed_by_the_command_line(tmp_path, parsed):
    words = ["--method", "fedprox", "--set", "fedprox.mu=0.5", "--steps", 3, "--alpha", 0.7]
    result = call("train", *words, "--write-config", tmp_path / "mine.yaml")
    assert (result.exit_code, result.output) == (0, "")
    printed = call("train", *words, "--print-config").output
    (tmp_path / "mine.toml").write_text(printed)
    assert not (tmp_path / "runs").exists()
    expected = parsed(*words)
    assert parsed("--config", tmp_path / "mine.yaml") == parsed("--config", tmp_path / "mine.toml") == expected


def test_the_command_line_goes_before_the_file(tmp_path, parsed):
    path = tmp_path / "mine.toml"
    path.write_text(
        'method = ["fedprox", "fedadam"]\nclient-lr = 1\nsteps = 4\nhidden = "9,9"\nalpha = "1e-2"\n'
        '[settings]\nserver_lr = 0.7\n[settings.fedprox]\nmu = 0.5\nclient_lr = 0.2\n[settings."fedadam"]\ntau = 1\n'
    )
    config = parsed("--config", path, "--set", "mu=0.1", "--client-lr", 0.4)
    assert config.methods == ("fedprox", "fedadam")
    assert (
        config.local.client_lr,
        config.local.steps,
        config.local.epochs,
        config.hidden,
        config.federation.alpha,
    ) == (0.4, 4, None, (9, 9), 0.01)
    assert config.settings["fedprox"] == {"client_lr": 0.2, "mu": 0.1, "server_lr": 0.7}
    assert config.settings["fedadam"] == {"server_lr": 0.7, "tau": 1.0}
    other = parsed("--config", path, "--method", "fedprox", "--epochs", 2)
    assert (other.methods, other.local.epochs, other.local.steps) == (("fedprox",), 2, None)
    assert set(other.settings) == {"fedprox"}


def test_a_runs_own_configuration_is_a_file_too(tmp_path, parsed):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": json.loads(ODD.to_json()), "versions": {"jax": "0"}}))
    assert parsed("--config", run / "config.json") == ODD
    assert parsed("--config", run, "--rounds", 9) == ODD.replace(rounds=9)


def test_a_federation_takes_its_part_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: iris\nclients: 4\nmin_size: 2\nrounds: 7\n")
    result = call("federate", "--config", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "federation.json").read_text())["config"]["clients"] == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", "cleints = 3", "unknown option in {path} 'cleints': did you mean 'clients'?"),
        ("a.toml", "clients = 'many'", "clients in {path} is 'many': write a whole number"),
        ("a.toml", "clients = 2.5", "write a whole number"),
        ("a.toml", "alpha = true", "alpha in {path} is True: write a number"),
        ("a.toml", "x64 = 1", "write true or false"),
        ("a.toml", "dataset = 3", "write a text in quotes"),
        ("a.toml", "methods = []", "write a list of names"),
        ("a.toml", "client_lr = 1\nclient-lr = 2", "gives client_lr twice"),
        ("a.toml", "clients = ", "{path} is no TOML"),
        ("a.yaml", "a: [", "{path} is no YAML"),
        ("a.yaml", "- 3", "holds list, not names and values"),
        ("a.json", "{", "{path} is no JSON"),
        ("a.json", '{"settings": {"fedprox": {"mu": []}}}', "fedprox.mu=[]: write a number"),
        ("a.json", '{"settings": {"fedprx": {"mu": 1}}}', "unknown method in settings 'fedprx'"),
        ("a.json", '{"settings": 3}', "write a table for each method"),
        ("a.json", '{"epochs": 2, "steps": 2}', "epochs=2 and steps=2"),
        ("a.ini", "", "let its name end in .toml, .yaml or .json"),
    ],
)
def test_mistakes_in_a_file_are_a_sentence(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    result = call("train", "--no-cache", "--config", path)
    assert result.exit_code == 2, result.output
    assert said.format(path=path) in result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for words in (("--config", tmp_path / "no.toml"), ("--write-config", tmp_path / "file" / "a.toml")):
        result = call("train", "--no-cache", *words)
        assert result.exit_code == 2, result.output
        assert str(words[1]) in result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--method", "scaf"], {"scaffold", "scaffold_m"}),
        (["train", "--model", "resn"], {"resnet18_gn"}),
        (["train", "--dataset", "digits+wi"], {"digits+wine"}),
        (["train", "--partition", "diri"], {"dirichlet"}),
        (["train", "--sampler", "mark"], {"markov"}),
        (["train", "--print-c"], {"--print-config"}),
        (["list", "sequ"], {"sequential"}),
    ],
)
def test_a_shell_completes_names(words, expected):
    complete = BashComplete(commands.main, {}, "fedjax-core", "_FEDJAX_CORE_COMPLETE")
    assert expected <= {item.value for item in complete.get_completions(words[:-1], words[-1])}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell):
    result = call("completion", shell)
    assert result.exit_code == 0
    assert "_FEDJAX_CORE_COMPLETE" in result.output


def test_everything_there_is_to_choose_from_is_listed():
    kinds = catalog.kinds()
    shown = " ".join(call("list").output.split())
    for kind, entries in kinds.items():
        assert f"{kind}s what it is" in shown
        for name, card in entries.items():
            assert name in shown
            assert card().strip()
    assert {"method", "model", "data set", "partition", "sampler", "plan"} <= set(kinds)
    assert "The cohort spread over devices" in call("list", "mesh").output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fashion", "did you mean 'fashion_mnist'? That is a data set"),
        ("uniforn", "did you mean 'uniform'? That is a sampler"),
        ("mnist_no_such", "did you mean 'mnist'? That is a data set"),
        ("qqqqqqqqq", "unknown name 'qqqqqqqqq': `fedjax-core list`"),
    ],
)
def test_the_nearest_name_is_of_the_right_kind(name, said):
    result = call("list", name)
    assert result.exit_code == 2
    assert said in result.output


def test_a_data_set_that_is_known_and_not_prepared(tmp_path):
    result = call("list", "mnist", "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert "data set 'mnist' is not prepared in" in result.output
    assert "fashion_mnist" in result.output
