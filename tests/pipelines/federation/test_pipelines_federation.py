"""Federations: built from a configuration, saved, shared, drawn; and runs on them, staged or not."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fedjax_core import HostPopulation
from pipelines import Config
from pipelines.data import datasets, sources
from pipelines.data.datasets import Dataset
from pipelines.experiment import setup
from pipelines.federation import federations, portrait, skew
from pipelines.run import train

IRIS = Config(dataset="iris", clients=6, min_size=2)
REAL = Path(os.environ.get("FEDJAX_CORE_DATA") or Path(__file__).resolve().parents[3].parent / "shared" / "data")


def built(**changes):
    config = IRIS.replace(**changes)
    return federations.build(config, datasets.load(config.data.dataset))


def by_group(test_groups):
    """Eight groups of three training examples; the test part has one example for each entry of `test_groups`."""
    rng = np.random.default_rng(0)
    train = {"x": rng.random((24, 2), np.float32), "y": rng.integers(0, 3, 24).astype(np.int32)}
    count = len(test_groups)
    test = {"x": rng.random((count, 2), np.float32), "y": rng.integers(0, 3, count).astype(np.int32)}
    groups = np.tile(np.arange(8, dtype=np.int32), 3)
    return Dataset("groups", train, test, 3, groups=groups, test_groups=np.asarray(test_groups, np.int32))


def rows_of(built, source="train"):
    return np.concatenate([p.assignment.rows for p in built.parts.values() if p.source == source])


@pytest.mark.parametrize("changes", [{}, {"validation_share": 0.2, "test_share": 0.2, "new_clients": 2}])
def test_every_example_is_in_one_part_of_one_client(changes):
    found = built(**changes)
    np.testing.assert_array_equal(np.sort(rows_of(found)), np.arange(120))
    assert found.num_clients == 6 - changes.get("new_clients", 0)
    assert set(found.parts) == {"train", *([] if not changes else ["validation", "test", "new"])}
    for name, part in found.parts.items():
        assert part.assignment.num_clients == (2 if name == "new" else found.num_clients)


def test_the_parts_are_shares_of_what_the_partition_gave():
    whole, parts = built(), built(validation_share=0.25, test_share=0.25)
    sizes = [parts.parts[name].assignment.sizes for name in ("train", "validation", "test")]
    np.testing.assert_array_equal(sum(sizes), whole.sizes)
    big = whole.sizes >= 8
    np.testing.assert_allclose(sizes[2][big] / whole.sizes[big], 0.25, atol=0.06)
    for i in range(6):
        held = np.concatenate([parts.parts[name].assignment[i] for name in ("train", "validation", "test")])
        np.testing.assert_array_equal(np.sort(held), whole.parts["train"].assignment[i])


def test_a_long_tail_leaves_examples_out():
    found = built(imbalance=4.0, partition="iid")
    labels = found.dataset.train["y"][rows_of(found)]
    np.testing.assert_array_equal(np.bincount(labels), [40, 20, 10])


def test_both_kinds_of_population_hold_the_same_examples():
    found = built(new_clients=1, test_share=0.2)
    for part in found.parts:
        on_device, on_host = found.population(part), found.host_population(part)
        np.testing.assert_array_equal(on_device.offsets, on_host.offsets)
        for i in range(on_host.num_clients):
            np.testing.assert_array_equal(on_device.client(i)["x"], on_host.client(i)["x"])
    assert np.shares_memory(found.host_population("train").examples["x"], found.dataset.train["x"])


def test_natural_clients_are_tested_on_their_own_groups_and_unseen_groups_are_new_clients():
    config = Config(dataset="groups", partition="natural", clients=None, min_size=1)
    found = federations.build(config, by_group([0, 0, 5, 8, 9, 9]))
    np.testing.assert_array_equal(found.parts["test"].assignment.sizes, [2, 0, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(found.parts["new"].assignment.sizes, [1, 2])
    assert found.parts["test"].source == found.parts["new"].source == "test"
    fewer = federations.build(config.replace(clients=4), by_group([0, 0, 5, 1, 2, 3]))
    train, test = fewer.parts["train"].assignment, fewer.parts["test"].assignment
    for i in range(4):
        group = set(fewer.dataset.groups[train[i]])
        assert len(group) == 1
        assert set(fewer.dataset.test_groups[test[i]]) <= group
    assert "new" not in fewer.parts, "a group that was not chosen is no client, and no new client either"


def test_a_pool_gives_clients_the_test_examples_too_and_the_test_part_is_theirs():
    found = built(pool=True, test_share=0.2, partition="iid")
    assert len(found.dataset.train["y"]) == 150
    np.testing.assert_array_equal(np.sort(rows_of(found)), np.arange(150))
    plain = datasets.load("iris")
    np.testing.assert_array_equal(found.dataset.train["x"][120:], plain.test["x"])
    tests = found.population("test")
    np.testing.assert_array_equal(found.dataset.test["x"], np.asarray(tests.examples["x"]))
    assert len(found.dataset.test["y"]) == 30  # a fifth of each of six clients with 25
    with pytest.raises(ValueError, match="pool=True leaves nothing to test on: give test_share"):
        built(pool=True)
    with pytest.raises(ValueError, match=r"test_share=0.01 leaves no client an example"):
        built(pool=True, test_share=0.01, partition="iid")


def test_a_pool_of_groups_has_all_of_them():
    config = Config(dataset="groups", partition="natural", clients=None, min_size=1, pool=True, test_share=0.3)
    found = federations.build(config, by_group([8, 8, 9, 9, 9]))
    assert found.num_clients == 10
    assert "new" not in found.parts
    np.testing.assert_array_equal(found.dataset.test_groups, found.dataset.groups[found.parts["test"].assignment.rows])
    without = by_group([8, 9])._replace(test_groups=None)
    with pytest.raises(ValueError, match="the test examples of groups are of no group"):
        federations.build(config, without)


def two_domains():
    """Two domains of three classes: 60 and 30 training examples, 20 and 10 test examples."""
    rng = np.random.default_rng(0)
    parts = []
    for number, (many, few) in enumerate(((60, 20), (30, 10))):
        train, test = (
            (rng.integers(0, 256, (n, 6, 6, 1), np.uint8), np.arange(n, dtype=np.int32) % 3) for n in (many, few)
        )
        parts.append(sources.from_arrays(*train, test=test, name=f"set{number}"))
    return sources.join(parts)


def test_test_examples_of_a_domain_are_dealt_out_to_its_clients():
    dataset = two_domains()
    config = Config(dataset="two", partition="domains", clients=5)
    found = federations.build(config, dataset)
    part = found.parts["test"]
    assert part.source == "test"
    np.testing.assert_array_equal(np.sort(part.assignment.rows), np.arange(30))
    of_clients = [int(dataset.groups[rows[0]]) for rows in found.parts["train"].assignment]
    assert list(found.domains) == [f"set{i}" for i in of_clients]
    parts = [
        SimpleNamespace(y=each["y"], group=group)
        for each, group in ((dataset.train, dataset.groups), (dataset.test, dataset.test_groups))
    ]
    for domain, rows, mine in zip(of_clients, part.assignment, found.parts["train"].assignment, strict=True):
        assert set(dataset.test_groups[rows].tolist()) == {domain}
        of_domain = [np.bincount(each.y[each.group == domain], minlength=3) for each in parts]
        held, dealt = (np.bincount(each.y[own], minlength=3) for each, own in zip(parts, (mine, rows), strict=True))
        assert np.abs(dealt - held * of_domain[1] / of_domain[0]).max() < 1
    assert federations.build(config, dataset).digest() == found.digest()
    own = federations.build(config.replace(test_share=0.2), dataset)
    assert own.parts["test"].source == "train"


def test_test_sequences_of_a_domain_are_dealt_out_without_classes():
    """Each of their tokens has a target, and none has a class."""
    dataset = two_domains()
    parts = [
        {name: np.repeat(np.asarray(each["y"])[:, None], 4, axis=1) for name in "xy"}
        for each in (dataset.train, dataset.test)
    ]
    dataset = dataset._replace(train=parts[0], test=parts[1])
    assert dataset.is_sequence
    found = federations.build(Config(dataset="two", partition="domains", clients=5), dataset)
    np.testing.assert_array_equal(np.sort(found.parts["test"].assignment.rows), np.arange(30))
    for own, rows in zip(found.parts["train"].assignment, found.parts["test"].assignment, strict=True):
        assert set(dataset.test_groups[rows]) == set(dataset.groups[own])


def test_clients_are_of_a_domain_and_of_what_was_made_of_it(tmp_path):
    dataset = two_domains()
    config = Config(dataset="two", partition="domains", clients=10, feature_skew="mixed", new_clients=2)
    found = federations.build(config, dataset)
    kinds = skew.parameters("mixed", dataset.input_shape, 10, seed=0)["domain"]
    names = [dataset.group_names[dataset.groups[rows[0]]] for rows in found.parts["train"].assignment]
    assert list(found.domains) == [f"{name}, {kind}" for name, kind in zip(names, kinds[:8], strict=True)]
    federations.save(found, config, tmp_path / "f")
    assert federations.load(tmp_path / "f", dataset).domains == found.domains
    plain = federations.build(config.replace(feature_skew="none"), dataset)
    client = int(np.flatnonzero(kinds[:8] == "colored")[0])
    for part in ("train", "test"):
        source, assignment = found.parts[part]
        rows = assignment[client]
        seen, was = (getattr(each.dataset, source)["x"][rows] for each in (found, plain))
        np.testing.assert_array_equal(seen, 255 - was)
    text = "\n".join(portrait.described(config, found))
    assert f"{found.domains[0]} (" in text
    assert built().domains == ()


@pytest.mark.skipif(not (REAL / "har").is_dir(), reason=f"no prepared data in {REAL}")
def test_every_subject_of_har_is_a_client(tmp_path):
    dataset = datasets.load("har", REAL, cache_dir=tmp_path)
    natural = {"dataset": "har", "partition": "natural", "clients": None, "split_by": "position", "gap": 1}
    found = federations.build(Config(**natural, pool=True, test_share=0.2), dataset)
    assert found.num_clients == 30
    assert "new" not in found.parts
    whole = np.bincount(np.concatenate([dataset.groups, dataset.test_groups]))
    tests = found.parts["test"].assignment.sizes
    np.testing.assert_array_equal(found.sizes + tests + 1, whole)  # one window between the two
    np.testing.assert_allclose(tests / whole, 0.2, atol=0.002)
    published = federations.build(Config(**{**natural, "gap": 0}), dataset)
    assert (published.num_clients, published.parts["new"].assignment.num_clients) == (21, 9)


def test_a_digest_pins_what_the_choices_make():
    digest = built().digest()
    with jax.enable_x64(False):
        assert setup.federate(IRIS.replace(federation_digest=digest)).num_clients == 6
        with pytest.raises(ValueError, match=rf"0123 is wanted, and these choices make the federation {digest}"):
            setup.federate(IRIS.replace(federation_digest="0123"))


def test_feature_skew_changes_inputs_and_the_same_client_sees_alike_in_every_part():
    changes = {"feature_skew": "scale", "test_share": 0.3, "new_clients": 1, "partition": "iid"}
    plain, skewed = built(**{**changes, "feature_skew": "none"}), built(**changes)
    assert {n: p.assignment.digest() for n, p in plain.parts.items()} == {
        n: p.assignment.digest() for n, p in skewed.parts.items()
    }
    gains = []
    for i in range(skewed.num_clients):
        maps = []
        for part in ("train", "test"):
            rows = skewed.parts[part].assignment[i]
            x, seen = plain.dataset.train["x"][rows], skewed.dataset.train["x"][rows]
            maps.append([np.polyfit(x[:, k], seen[:, k], 1) for k in range(4)])
        np.testing.assert_allclose(maps[0], maps[1], atol=1e-3)
        gains.append(maps[0])
    assert np.ptp(np.asarray(gains), axis=0).max() > 0.1, "clients differ"
    assert not np.allclose(plain.dataset.test["x"], skewed.dataset.test["x"])
    same = built(**changes, severity=0.0)
    np.testing.assert_array_equal(same.dataset.train["x"], plain.dataset.train["x"])


@pytest.mark.parametrize(
    "changes", [{}, {"new_clients": 2, "test_share": 0.2, "validation_share": 0.1}, {"feature_skew": "scale"}]
)
def test_saved_and_loaded_it_is_the_same(tmp_path, changes):
    config = IRIS.replace(**changes)
    found = built(**changes)
    federations.save(found, config, tmp_path / "f")
    again = federations.load(tmp_path / "f", datasets.load("iris"))
    assert again.digest() == found.digest()
    np.testing.assert_array_equal(again.dataset.train["x"], found.dataset.train["x"])
    fields, digest = federations.read(tmp_path / "f")
    assert fields == config.federation_fields()
    assert digest == found.digest()


def test_the_digest_tells_federations_apart():
    digests = [
        built(**changes).digest()
        for changes in ({}, {"partition_seed": 1}, {"alpha": 0.4}, {"test_share": 0.2}, {"feature_skew": "scale"})
    ]
    assert len(set(digests)) == 5
    assert built().digest() == digests[0]


def test_what_is_wrong_with_a_saved_federation_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no federation"):
        federations.read(tmp_path)
    folder = tmp_path / "f"
    federations.save(built(), IRIS, folder)
    other = datasets.load("iris")
    with pytest.raises(ValueError, match="was made of other examples"):
        federations.load(folder, other._replace(train={**other.train, "x": other.train["x"] + 1}))
    with pytest.raises(ValueError, match=r"holds row .* has 30 examples"):
        federations.load(folder, other._replace(train=other.test))
    content = (folder / "train.npz").read_bytes()
    (folder / "train.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"train\.npz cannot be read"):
        federations.load(folder, datasets.load("iris"))
    (folder / "federation.json").write_text("{")
    with pytest.raises(ValueError, match="build the federation again"):
        federations.read(folder)
    (folder / "federation.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        federations.read(folder)


def test_a_run_refuses_another_federation_than_its_own(tmp_path):
    folder = str(tmp_path / "f")
    federations.save(built(), IRIS, folder)
    own = IRIS.replace(federation=folder)
    assert setup.federate(own).sizes.tolist() == built().sizes.tolist()
    with pytest.raises(ValueError, match=r"alpha=0\.9, but the federation"):
        setup.federate(own.replace(alpha=0.9))
    with pytest.raises(ValueError, match="0123 is wanted"):
        setup.federate(own.replace(federation_digest="0123"))


def test_warnings_know_the_clients_own_test_part():
    leaking = datasets.load("iris")
    x = leaking.train["x"].copy()
    config = IRIS.replace(partition="iid", clients=2, test_share=0.5)
    parts = federations.build(config, leaking).parts
    x[parts["test"].assignment[0][0]] = x[parts["train"].assignment[0][0]]
    found = federations.Federation(leaking._replace(train={**leaking.train, "x": x}), parts)
    assert any("test examples are trained on" in line for line in found.warnings(1))


def test_a_federation_is_drawn(tmp_path):
    for changes in ({}, {"clients": 70, "min_size": 1, "partition": "lognormal", "sigma": 2.0}):
        config, found = IRIS.replace(**changes), built(**changes)
        figure = portrait.figure(config, found)
        bubbles, sizes, divergence = figure.axes
        shown = bubbles.collections[0].get_offsets()
        assert len(np.unique(np.asarray(shown)[:, 0])) == min(found.num_clients, 60)
        assert sum(bar.get_height() for bar in sizes.patches) == found.num_clients
        assert sum(bar.get_height() for bar in divergence.patches) == found.num_clients
    counts = np.bincount(found.dataset.train["y"][found.parts["train"].assignment[0]], minlength=3)
    assert counts.sum() == found.sizes[0]


shares_runs = pytest.mark.xdist_group("runs on a federation")  # in one process, to run them once


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with everything on the device and staged; with new clients and test parts."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        dataset="iris", clients=8, new_clients=2, test_share=0.25, validation_share=0.2, min_size=2, partition="iid",
        cohort_size=3, model="logistic_regression", methods=("scaffold",), rounds=6, eval_every=2, checkpoint_every=2,
        seeds=2, epochs=1,
    )  # fmt: skip
    for staged in (False, True):
        train.train(config.replace(staged=staged), folder / str(staged))
    return config, folder


@shares_runs
def test_a_staged_run_writes_the_same_numbers(runs):
    _, folder = runs
    for name in ("metrics.csv", "clients.csv", "curves.png", "clients.png"):
        assert (folder / "True" / name).read_bytes() == (folder / "False" / name).read_bytes()


@shares_runs
def test_a_staged_run_resumes_bit_for_bit(runs, tmp_path):
    config, folder = runs
    config = config.replace(staged=True)
    train.train(config, tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints" / "scaffold").glob("round-*"))
    for path in last[1:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (folder / "True" / "metrics.csv").read_bytes()


@shares_runs
def test_clients_are_scored_on_their_own_examples(runs):
    config, folder = runs
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        params = jax.tree.map(lambda leaf: leaf[1], train.final_params(folder / "False", "scaffold"))
        with (folder / "False" / "clients.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["seed"] == "1"]
        for part, column in (("train", "train_accuracy"), ("test", "accuracy")):
            population = experiment.federation.population(part)
            for i, row in enumerate(rows):
                own = population.client(i)
                hits = np.asarray(experiment.metric_fn(params, own)["accuracy"])
                assert float(row[column]) == pytest.approx(hits.mean(), abs=1e-6)
    text = (folder / "False" / "summary.md").read_text()
    assert "| validation part | new clients |" in text
    assert "its own test examples" in text


def test_a_loss_that_is_no_number_stays_with_its_client():
    values = np.array([[1.0, 3.0, np.nan, 5.0, 7.0], [2.0, 2.0, np.inf, 4.0, 4.0]])
    means = train._means(values, np.array([0, 2, 3, 3, 5]))
    np.testing.assert_array_equal(means, [[2, np.nan, np.nan, 6], [2, np.inf, np.nan, 4]])


def test_staged_experiments_keep_the_examples_on_the_host():
    with jax.enable_x64(False):
        experiment = setup.prepare(IRIS.replace(cohort_size=2, staged=True, methods=("scaffold",)))
    assert isinstance(experiment.population, HostPopulation)
    parts = setup.predicted_memory(experiment, "scaffold")
    largest = np.sort(experiment.population.sizes)[-2 * 5 :].sum()
    assert parts["data"] == 2 * largest * (4 * 4 + 4) + 30 * (4 * 4 + 4)


def test_bytes_reach_the_model_normalized():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
    examples = {"x": images, "y": np.arange(40, dtype=np.int32) % 2}
    statistics = datasets.normalization(images)
    dataset = Dataset("bytes", examples, examples, 2, normalization=statistics)
    model = setup.MODELS["logistic_regression"](dataset, Config())
    params = model.init(jax.random.key(0))
    x = (images / 255 - statistics.mean[0]) / statistics.std[0]
    np.testing.assert_allclose(
        datasets.normalized(model, statistics).apply(params, images), model.apply(params, x), rtol=1e-6
    )
    assert datasets.normalized(model, None) is model
