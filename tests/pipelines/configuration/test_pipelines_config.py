import json

import pytest

from pipelines import Config
from pipelines.configuration.config import DataConfig, FederationConfig, LocalConfig
from pipelines.configuration.options import fields_of, named

FULL = Config(
    dataset="wine",
    methods=("fedprox", "fedavg"),
    settings={"fedprox": {"mu": "0.5", "client_lr": 1}},
    hidden=(8, 4),
    epochs=None,
    steps=3,
    lanes=2,
    x64=True,
)


@pytest.mark.parametrize("config", [Config(), FULL])
def test_json_round_trip(config):
    again = Config.from_json(config.to_json())
    assert again == config
    assert again.slug() == config.slug()


def test_the_flat_json_of_before_there_were_sections_is_read_and_has_its_name():
    flat = {**FULL.flat(), "federation": "somewhere", "participation": 0.5}
    again = Config.from_json(json.dumps(flat))
    assert again == FULL.replace(federation="somewhere", participation=0.5)
    assert (again.federation.directory, again.participation.probability) == ("somewhere", 0.5)
    assert Config().slug() == "digits-50-dirichlet0.3-mlp-324f1f14", "its directory is found again"


def test_sections_and_names_make_the_same_configuration():
    sections = Config(data=DataConfig(dataset="iris"), federation=FederationConfig(clients=6), rounds=3)
    assert sections == Config(dataset="iris", clients=6, rounds=3) == Config().replace(**sections.flat())
    with pytest.raises(ValueError, match="unknown choice of a configuration 'cliens': did you mean 'clients'"):
        Config(cliens=3)


def test_choices_may_be_called_by_sections_fields_and_options():
    config = Config(local=LocalConfig(batch_size=3), probability=0.5, lr=0.3, directory="saved")
    assert config == Config(batch_size=3, participation=0.5, client_lr=0.3, federation="saved")
    assert Config.from_values({"local": {"lr": 0.3}, "participation": {"probability": 0.5}}).local.client_lr == 0.3
    assert hash(config) == hash(Config.from_json(config.to_json()))
    assert len({Config(), Config(), config}) == 2


def test_what_goes_with_a_choice_that_is_replaced():
    assert Config().replace(steps=3) == Config(steps=3, epochs=None)
    assert Config(steps=3, epochs=None).replace(epochs=2) == Config(epochs=2)
    assert Config().replace(eval_every=7).report.checkpoint_every == 28
    assert Config(checkpoint_every=50).replace(eval_every=10).report.checkpoint_every == 50


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(data={"dataset": "iris"}), "data must be a DataConfig, got .*or its choices by"),
        (lambda: Config(local=DataConfig()), "local must be a LocalConfig, got DataConfig"),
        (lambda: Config(local=3), "local must be a LocalConfig, got 3"),
        (lambda: Config.from_values({"local": 3}), "local must be a LocalConfig, got 3"),
        (lambda: Config(methods="fedavg"), "methods must be a tuple, got 'fedavg'"),
        (lambda: Config.from_values({"local": {"rounds": 3}}), r"unknown choice of \[local\] 'rounds'"),
        (lambda: Config.from_values({"local": {"epochs": 3}, "epochs": 3}), "epochs is given twice"),
    ],
)
def test_sections_that_are_none(make, said):
    with pytest.raises((TypeError, ValueError), match=said):
        make()


def test_every_choice_is_declared_with_words_and_a_name_of_its_own():
    fields = fields_of(Config)
    assert len({flag for field in fields.values() for flag in field.flags}) == sum(
        len(field.flags) for field in fields.values()
    )
    for name, field in fields.items():
        assert field.heading, name
        assert field.option.help.endswith((".", ";")), name


def test_every_field_changes_the_slug_and_is_seen_as_a_difference():
    other = {
        **{"dataset": "wine", "partition": "iid", "methods": ("fedavg",), "settings": {"fedavg": {"client_lr": 1.0}}},
        **{"model": "cnn", "hidden": (7,), "sampler": "full", "order": "replacement", "weights": "examples"},
        **{"client_optimizer": "adam", "statistics": "frozen", "x64": True, "eval_every": 25, "checkpoint_every": 50},
        **{"client_momentum": 0.5, "client_lr_decay": 0.5, "vocabulary": "bytes", "imbalance": 10.0, "staged": True},
        **{"feature_skew": "blur", "validation_share": 0.1, "test_share": 0.1, "split_by": "position"},
        **{"federation_digest": "0123", "best_by": "loss", "clients_over_time": True},
        **{"evaluate": ("global",), "evaluate_clients": 3, "public_share": 0.1, "models": ("cnn", "mlp"), "pool": True},
    }
    held = {"patience": 3, "stop_at": 0.5, "keep_best": True}  # need examples that are kept back
    other |= held
    places = ("data_dir", "federation")
    slugs = {Config().slug()}
    fields, usual = fields_of(Config), Config().flat()
    for name in fields:
        value = other.get(name)
        if name in ("epochs", "steps", *places, *named(Config, "machine")):
            continue
        if value is None:
            value = usual[name] * 2
            value = value / 4 if isinstance(value, float) and value > 1 else value
            value = value + 1 if value == 0 else value
        base = Config(validation_share=0.2) if name in held else Config()
        base = Config(methods=("fedgh",), models=("mlp", "cnn")) if name == "models" else base
        changed = base.replace(**{name: value})
        assert list(changed.differences(base)) == [name]
        slugs.add(changed.slug())
    assert len(slugs) == len(fields) - 4 - len(named(Config, "machine")) + 1
    machine = {"lanes": 3, "mesh": 4, "model_parallel": 2, "convolution": "dots", "memory": 2.5}
    assert set(machine) == set(named(Config, "machine"))
    for name, value in machine.items():  # the same run on another machine
        moved = Config(mesh=2).replace(**{name: value})
        assert not moved.differences(Config())
        assert moved.slug() == Config().slug()
        assert f"--{name.replace('_', '-')} {value}" in moved.command("out")
    for place in places:  # the same data in another folder is the same run
        moved = Config().replace(**{place: "elsewhere"})
        assert not moved.differences(Config())
        assert moved.slug() == Config().slug()
        assert f"--{place.replace('_', '-')} elsewhere" in moved.command("out")
    assert Config().replace(epochs=None, steps=2).differences(Config()) == {
        "epochs": (None, 5),
        "steps": (2, None),
    }


def test_settings_are_typed_and_split():
    assert FULL.settings == {"fedprox": {"client_lr": 1.0, "mu": 0.5}}
    assert FULL.method_settings("fedprox") == {"mu": 0.5}
    assert FULL.client_settings("fedprox")["client_lr"] == 1.0
    assert FULL.client_settings("fedavg")["client_lr"] == Config().local.client_lr


def test_equal_settings_written_differently_are_equal():
    assert Config(settings={"fedavg": {"server_lr": "1"}}) == Config(settings={"fedavg": {"server_lr": 1.0}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"clients": 2.5}, "clients must be an integer of at least 1, got 2.5"),
        ({"seeds": -1}, "seeds must be an integer of at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"steps": 2}, "epochs=5 and steps=2"),
        ({"epochs": None}, "epochs=None and steps=None"),
        ({"alpha": 0.0}, r"alpha must lie in \(0, inf\], got 0"),
        ({"participation": 1.5}, r"participation must lie in \[0, 1\], got 1.5"),
        ({"turn_on": -0.1}, "turn_on must lie in"),
        ({"target": 95}, r"target must lie in \[0, 1\], got 95"),
        ({"client_lr": -1.0}, "client_lr must lie in"),
        ({"client_momentum": 1.0}, r"client_momentum must lie in \[0, 1\), got 1"),
        ({"client_lr_decay": 0.0}, r"client_lr_decay must lie in \(0, 1\], got 0"),
        ({"eval_every": 10, "checkpoint_every": 25}, "checkpoint_every=25 is no multiple of eval_every=10: .* take 30"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("fedavg", "fedavg")}, "names one twice"),
        ({"methods": ("fedavgg",)}, "did you mean 'fedavg'"),
        ({"settings": {"fedprox": {"mu": 1}}}, "'fedprox'.*there are fedavg, scaffold, fedadam"),
        ({"settings": {"fedavg": {"server_rl": 1}}}, "did you mean 'server_lr'"),
        ({"settings": {"fedavg": {"client_lr": "fast"}}}, "fedavg.client_lr must be a number"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_an_unknown_field_of_a_file_is_named():
    with pytest.raises(ValueError, match=r"'round': did you mean 'rounds'\?"):
        Config.from_json(json.dumps({"round": 3}))
    with pytest.raises(ValueError, match="a configuration is a JSON object, got list"):
        Config.from_json("[]")
