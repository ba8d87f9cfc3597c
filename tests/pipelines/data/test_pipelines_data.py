import numpy as np
import pytest

from pipelines.common.names import pick
from pipelines.data import datasets


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("digits", 1438, 359, (8, 8, 1), 10),
        ("breast_cancer", 455, 114, (30,), 2),
        ("wine", 142, 36, (13,), 3),
        ("iris", 120, 30, (4,), 3),
    ],
)
def test_embedded_sets_have_the_sizes_they_claim(name, train, test, shape, classes):
    dataset = datasets.load(name)
    assert (len(dataset.train["x"]), len(dataset.test["x"])) == (train, test)
    assert dataset.input_shape == shape
    assert dataset.num_classes == classes
    assert dataset.train["x"].dtype == np.float32
    assert dataset.train["y"].dtype == np.int32
    assert f"{train:,}" in datasets.DATASETS[name].__doc__
    # Stratified: every class has its share of the test part, to within one example.
    whole = np.bincount(np.concatenate([dataset.train["y"], dataset.test["y"]]), minlength=classes)
    held_out = np.bincount(dataset.test["y"], minlength=classes)
    assert np.abs(held_out - 0.2 * whole).max() <= 1


def test_the_split_is_fixed_and_loses_nothing():
    first, again = datasets.load("digits"), datasets.load("digits")
    np.testing.assert_array_equal(first.test["x"], again.test["x"])
    assert first.test["y"][:12].tolist() == again.test["y"][:12].tolist()
    import sklearn.datasets

    x = sklearn.datasets.load_digits().images.reshape(-1, 64) / 16
    ours = np.concatenate([first.train["x"], first.test["x"]]).reshape(-1, 64)
    np.testing.assert_array_equal(np.sort(ours @ np.arange(64.0)), np.sort(x.astype(np.float32) @ np.arange(64.0)))
    assert ours.min() == 0
    assert ours.max() == 1


def test_standardization_uses_the_training_part_only():
    dataset = datasets.load("wine")
    np.testing.assert_allclose(dataset.train["x"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train["x"].std(axis=0), 1, atol=1e-5)
    assert np.abs(dataset.test["x"].mean(axis=0)).max() > 1e-3


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data set 'digit': did you mean 'digits'\?"):
        datasets.load("digit")
    with pytest.raises(ValueError, match=r"unknown thing 'zzz': there are a, b"):
        pick("thing", "zzz", ["a", "b"])


def broken(**changes):
    dataset = datasets.load("iris")
    train = {name: leaf.copy() for name, leaf in dataset.train.items()}
    for (name, index), value in changes.pop("train", {}).items():
        train[name][index] = value
    return dataset._replace(train=train, **changes)


def images(normalization):
    part = {"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.zeros(2, np.int32)}
    return datasets.Dataset("pictures", part, part, 2, normalization=normalization)


def tokens(**changes):
    part = {"x": np.zeros((2, 3), np.int32), "y": np.array([[1, 2, -1], [4, -1, -1]], np.int32)}
    broken = {name: leaf.copy() for name, leaf in part.items()}
    for name, value in changes.items():
        broken[name][1, 1] = value
    return datasets.Dataset("words", broken, part, 5, pad_id=-1, vocabulary_size=5)


def test_padded_positions_are_no_bad_labels():
    assert datasets.check(tokens()).pad_id == -1
    with pytest.raises(ValueError, match=r"\['y'\] must lie in \[0, 5\), got -1"):
        datasets.check(tokens()._replace(pad_id=None))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: broken(train={("y", 7): 3}), r"iris.train\['y'\] must lie in \[0, 3\), got 3 at position 7"),
        (lambda: broken(train={("x", (5, 1)): np.nan}), r"iris.train\['x'\] holds 1 values that are NaN"),
        (
            lambda: broken(test={"x": np.zeros((0, 4), np.float32), "y": np.zeros(0, np.int32)}),
            "iris.test has no examples",
        ),
        (lambda: broken(test={"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.int32)}), r"iris.test\['x'\] is"),
        (lambda: broken(test={"x": np.zeros((2, 4), np.float32), "y": np.zeros(3, np.int32)}), "leading axes"),
        (lambda: broken(test={"x": np.zeros((2, 4), np.float32), "y": np.zeros(2)}), "must be integers"),
        (lambda: broken(test={"x": np.zeros((2, 4), np.float32)}), "iris.test has no 'y'"),
        (lambda: broken(groups=np.zeros(119, np.int32)), r"groups of iris.train must be int\[120\].*got int32\[119\]"),
        (lambda: broken(groups=np.zeros(120)), r"groups of iris.train must be int\[120\].*got float64"),
        (lambda: broken(test_groups=np.full(30, -1)), r"groups of iris.test must lie in \[0, .*got -1 at position 0"),
        (
            lambda: broken(groups=np.full(120, 2), group_names=("a", "b")),
            r"groups of iris.train must lie in \[0, 2\), got 2 at position 0",
        ),
        (
            lambda: broken(normalization=datasets.Normalization((0.5,), (0.5,))),
            "iris has a normalization, but its inputs",
        ),
        (lambda: images(datasets.Normalization((0.5,), (0.5,))), r"each of its 3 channels, got .*mean=\(0.5,\)"),
        (lambda: images(datasets.Normalization((0.5,) * 3, (0.5, 0, 1))), "a std above 0"),
        (lambda: tokens(x=-1), r"words.train\['x'\] must lie in \[0, 5\), got -1 at position 4"),
        (lambda: tokens(x=5), r"words.train\['x'\] must lie in \[0, 5\), got 5 at position 4"),
        (lambda: tokens(y=-2), r"words.train\['y'\] must lie in \[0, 5\), got -2"),
    ],
)
def test_bad_data_is_named(dataset, message):
    with pytest.raises(ValueError, match=message):
        datasets.check(dataset())


def test_a_set_that_is_not_prepared_says_what_to_do_in_its_description():
    for name in ("shakespeare", "har", "usps"):
        assert f"holds `{name}/" in datasets.DATASETS[name].__doc__


def test_options_are_those_of_the_function(monkeypatch):
    def noisy(*, noise=0.0):
        """Iris with an offset."""
        dataset = datasets.load("iris")
        return dataset._replace(name="noisy", train={**dataset.train, "x": dataset.train["x"] + np.float32(noise)})

    monkeypatch.setitem(datasets.DATASETS, "noisy", noisy)
    assert datasets.options("noisy") == ["noise"]
    assert datasets.options("iris") == []
    assert datasets.options("noisy+iris") == []
    np.testing.assert_allclose(datasets.load("noisy", noise=2).train["x"], datasets.load("iris").train["x"] + 2)
    with pytest.raises(ValueError, match="unknown option of data set noisy 'noize': did you mean 'noise'"):
        datasets.load("noisy", noize=2)
    with pytest.raises(ValueError, match="NaN"):
        datasets.load("noisy", noise=np.nan)
