import shlex

import pytest
from click.testing import CliRunner

from pipelines import Config
from pipelines.cli import commands
from pipelines.common import processes
from pipelines.configuration import methods
from pipelines.configuration.config import FEDERATION_FIELDS
from pipelines.configuration.options import fields_of
from pipelines.data import datasets
from pipelines.experiment import setup
from pipelines.federation import federations, skew
from pipelines.run import train


def call(*words):
    return CliRunner().invoke(commands.main, [str(word) for word in words], terminal_width=110)


@pytest.fixture
def parsed(monkeypatch):
    """Calls `train` without running anything; gives the configuration and the directory it would run."""
    seen = []
    monkeypatch.setattr(
        commands, "_train", lambda ctx, config, out, explicit, reporter: seen.append((config, out)) or 0
    )

    def parse(*words):
        result = call("train", "--no-cache", *words)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return parse


def test_the_defaults_are_those_of_config(parsed):
    config, out = parsed()
    assert config == Config()
    assert str(out) == f"runs/{Config().slug()}"
    assert parsed()[1] == out
    assert parsed("--rounds", 100)[1] != out


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(methods=("scaffold", "fedprox"), settings={"fedprox": {"mu": 0.01}, "scaffold": {"client_lr": 0.3}}),
        Config(dataset="wine", hidden=(8, 4), epochs=None, steps=7, x64=True, lanes=2, mesh=1, target=0.8),
        Config(
            sampler="markov", turn_on=0.2, turn_off=0.7, client_lr_decay=0.99, partition="shards", shards_per_client=3
        ),
        Config(eval_every=10, checkpoint_every=50, first_seed=3, partition_seed=2, min_size=1, weights="examples"),
        Config(settings={"fedadam": {"tau": 1e-9}, "scaffold": {"option": "I"}}),
    ],
)
def test_the_printed_command_runs_the_same_configuration(config, parsed):
    words = shlex.split(config.command("some dir/run"))
    assert words[:2] == ["fedjax-core", "train"]
    again, out = parsed(*words[2:])
    assert again == config
    assert str(out) == "some dir/run"


def test_set_for_one_method_and_for_all(parsed):
    words = ["--set", "fedadam.server_lr=0.5", "--set", "server_lr=0.25", "--set", "client_lr=1", "--set", "tau=0.1"]
    config, _ = parsed(*words)
    assert config.settings == {
        "fedavg": {"server_lr": 0.25, "client_lr": 1.0},
        "scaffold": {"server_lr": 0.25, "client_lr": 1.0},
        "fedadam": {"server_lr": 0.5, "client_lr": 1.0, "tau": 0.1},
    }


def test_no_method_is_a_mistake_and_not_the_default():
    for words in (["--method", ""], ["--method", ","]):
        result = call("train", *words)
        assert result.exit_code == 2
        assert "methods is empty" in result.output


def test_help_reads_well():
    assert "train" in call("--help").output
    text = call("train", "--help").output
    headings = [
        "Examples:",
        "Data:",
        "Clients:",
        "Methods and model:",
        "Participation:",
        "Local training:",
        "Run:",
        "Machine:",
    ]
    positions = [text.index(heading) for heading in headings]
    assert positions == sorted(positions)
    options = {parameter.opts[0] for parameter in commands.train.params}
    for option in options:
        assert option in text
    assert "[default: 50]" in text
    assert "fedavg, scaffold, fedadam" in text
    assert max(map(len, text.splitlines())) <= 110
    names = set(fields_of(Config))
    options = {parameter.name for parameter in commands.train.params}
    assert names <= options, "every choice is an option"
    assert set(FEDERATION_FIELDS) <= {parameter.name for parameter in commands.federate.params}
    assert max(map(len, call("federate", "--help").output.splitlines())) <= 110


def test_list_shows_everything():
    text = " ".join(call("list").output.split())
    for name in [
        *methods.all_names(),
        *setup.MODELS,
        *datasets.DATASETS,
        *federations.PARTITIONS,
        *skew.SKEWS,
        *setup.SAMPLERS,
    ]:
        assert name in text
    assert "McMahan" in text
    assert "[num_clients]" in text, "square brackets are text, not markup"


def test_list_of_one():
    text = call("list", "scaffold").output
    assert "Karimireddy" in text
    assert "option" in text
    assert "II" in text
    assert "c_i" in text
    assert "Dirichlet" in call("list", "dirichlet").output
    assert "Handwritten" in call("list", "digits").output
    assert "no hyper-parameters" in call("list", "local_sgd").output
    assert "Asks for: a loss and an optimizer alone." in call("list", "fedavg").output
    text = call("list", "sfprompt").output
    assert "Asks for: a model in three pieces." in text
    assert "which runs of the command line do not have: run it in Python" in text
    assert "--set sfprompt.keep=..." in text


SMALL = ["--dataset", "iris", "--model", "logistic_regression", "--clients", 6, "--cohort-size", 3, "--min-size", 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "scafold"], "did you mean 'scaffold'?"),
        (["train", "--method", "fedavgg"], "unknown method 'fedavgg': did you mean 'fedavg'?"),
        (["train", "--dataset", "digitz"], "unknown data set 'digitz': did you mean 'digits'?"),
        (["train", "--model", "mpl"], "unknown model 'mpl': did you mean 'mlp'?"),
        (["train", "--partition", "iiid"], "unknown partition 'iiid': did you mean 'iid'?"),
        (["train", "--sampler", "uniforn"], "unknown sampler 'uniforn': did you mean 'uniform'?"),
        (["train", "--set", "fedadam.taw=1"], "did you mean 'tau'?"),
        (["train", "--set", "taw=1"], "did you mean 'tau'?"),
        (["train", "--set", "fedprox.mu=1"], "unknown method among those of this run 'fedprox'"),
        (["train", "--set", "server_lr"], "is not of the form NAME=VALUE"),
        (["train", "--set", "server_lr=fast"], "server_lr must be a number like its default 1.0, got 'fast'"),
        (["train", "--cohort-size", 60], "cohort_size=60 is larger than the population of 50 clients"),
        (["train", "--epochs", 0], "epochs must be an integer of at least 1, got 0"),
        (["train", "--epochs", 2, "--steps", 3], "epochs=2 and steps=3"),
        (["train", "--batch-size", 0], "batch_size must be an integer of at least 1, got 0"),
        (["train", "--participation", 1.5], "participation must lie in [0, 1], got 1.5"),
        (["train", "--clients", 2000], "num_clients=2000"),
        (["train", "--hidden", "8,wide"], "'8,wide' is no list of sizes"),
        (["train", "--hidden", "0"], "hidden[0] must be an integer of at least 1"),
        (["train", "--rounds", "many"], "'many' is not a valid integer"),
        (["train", "--alpah", 1], "No such option"),
        (["train", "--mesh", 2, "--lanes", 3], "does not divide lanes=3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[0] == "train":
        words = [*words, "--no-cache"]
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def run_with(monkeypatch, tmp_path, outcome, *words):
    def run(experiment, out, *, reporter):
        reporter.say("running")
        raise outcome

    monkeypatch.setattr(train, "run", run)
    return call("train", "--no-cache", *SMALL, "--method", "fedavg", "--out", tmp_path / "run", *words)


def test_what_will_run_is_said_first(monkeypatch, tmp_path):
    result = run_with(monkeypatch, tmp_path, train.Interrupted(2, "saved; go on with X"))
    assert result.exit_code == 130
    assert "go on with X" in result.output
    before, _, _ = result.output.partition("running")
    for words in [
        "iris, 120 training and 30 test examples, 3 classes",
        "6 by dirichlet (alpha 0.3, min_size 2), with ",
        "median",
        "15 parameters",
        "3 of 6 clients a round (uniform)",
        "5 seeds (0, 1, 2, 3, 4)",
        "client_lr=0.2, server_lr=1",
        "of memory predicted (data ",
    ]:
        assert words in before


def test_divergence_has_exit_code_1(monkeypatch, tmp_path):
    result = run_with(monkeypatch, tmp_path, train.Diverged("fedavg stopped in round 3"), "--quiet")
    assert result.exit_code == 1
    assert result.output == "Error: fedavg stopped in round 3\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [(train.Refused("memory suffices for no plan"), 2), (processes.Lost("another process has stopped"), 3)],
)
def test_what_the_user_can_mend_is_said_without_a_traceback(monkeypatch, tmp_path, error, status):
    monkeypatch.setattr(processes, "leave", lambda status: None)
    result = run_with(monkeypatch, tmp_path, error, "--quiet")
    assert result.exit_code == status
    assert result.output == f"Error: {error}\n"


def test_processes_are_asked_for(monkeypatch):
    result = call("train", "--coordinator", "localhost:1")
    assert result.exit_code == 2
    assert "are for --processes: add it" in result.output


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ValueError("a bug")])
def test_other_errors_are_told_in_a_sentence_and_kept_whole(error, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run_with(monkeypatch, tmp_path, error)
    assert result.exit_code == 4, "a mistake in the arguments (2) is found before the run"
    said = result.output.splitlines()
    assert f"Error: unexpected {type(error).__name__}: a bug" in said
    assert "Traceback" not in result.output
    (kept,) = tmp_path.glob("fedjax-core-*.txt")
    assert str(kept) in said[-1]
    assert "in run\n    raise outcome" in kept.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "raise outcome" in run_with(monkeypatch, tmp_path, error).output, "nothing is hidden where nothing is kept"
    monkeypatch.setattr(train, "run", lambda experiment, out, *, reporter: 1 / 0)
    words = ["--debug", "train", "--no-cache", *SMALL, "--method", "fedavg", "--out", tmp_path / "run"]
    assert isinstance(call(*words).exception, ZeroDivisionError)


def test_a_whole_run(tmp_path):
    words = ["--method", "fedavg", "--rounds", 4, "--eval-every", 2, "--checkpoint-every", 2, "--seeds", 1]
    result = call("train", "--no-cache", *SMALL, *words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "fedavg: compiling ..." in result.output
    assert "round 4/4" in result.output
    assert "fedavg: test accuracy" in result.output
    assert (tmp_path / "run" / "summary.md").exists()
    quiet = call("train", "--no-cache", *SMALL, *words, "--out", tmp_path / "run", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


SKEWED = ["--dataset", "iris", "--clients", 6, "--min-size", 2, "--new-clients", 2, "--test-share", 0.25]


def test_federate_writes_and_says_what_it_built(tmp_path):
    result = call("federate", *SKEWED, "--compare", "iid", "--out", tmp_path / "f")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {
        "federation.md",
        "federation.png",
        "federation.pdf",
        "federation.json",
        "train.npz",
        "test.npz",
        "new.npz",
    }
    text = (tmp_path / "f" / "federation.md").read_text()
    for said in (result.output, text):
        for word in ("iris", "dirichlet", "iid", "new clients: 2", "size gini", "label entropy", "JS of pairs"):
            assert word in said
    for warning in [line for line in result.output.splitlines() if line.startswith("warning: ")]:
        assert warning.removeprefix("warning: ") in text
    digest = federations.read(tmp_path / "f")[1]
    assert digest in result.output


def test_a_saved_federation_is_trained_on(tmp_path, parsed):
    saved = tmp_path / "f"
    assert call("federate", *SKEWED, "--out", saved).exit_code == 0
    config, _ = parsed("--federation", saved)
    digest = federations.read(saved)[1]
    assert config == Config(
        dataset="iris", clients=6, min_size=2, new_clients=2, test_share=0.25, federation=str(saved),
        federation_digest=digest,
    )  # fmt: skip
    again, _ = parsed(*shlex.split(config.command("out"))[2:])
    assert again == config
    other = call("train", "--federation", saved, "--alpha", 7)
    assert other.exit_code == 2
    assert "--alpha 7" in other.output
    assert "leave --alpha out" in other.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "dirichlett"], "did you mean 'dirichlet'"),
        (["--compare", "dirichlet"], "unknown partition to compare with 'dirichlet'"),
        (["--partition", "natural"], "digits has no groups"),
        (["--clients", "all"], "only natural clients can be counted"),
        (["--clients", "few"], "write one, or all"),
        (["--feature-skew", "blurr"], "did you mean 'blur'"),
        (["--dataset", "wine", "--feature-skew", "blur"], "blur"),
        (["--clients", 2000], "num_clients=2000"),
        (["--gap", 2], "gap=2 without"),
        (["--new-clients", 50], "at most 49"),
        (["--test-share", 1.0], "test_share"),
    ],
)
def test_mistakes_in_a_federation_are_told_in_one_line(words, message, tmp_path):
    result = call("federate", *words, "--out", tmp_path / "f")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "f").exists()
