import numpy as np
import pytest

from pipelines import data
from pipelines.names import pick


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
    dataset = data.load(name)
    assert (len(dataset.train["x"]), len(dataset.test["x"])) == (train, test)
    assert dataset.input_shape == shape
    assert dataset.num_classes == classes
    assert dataset.train["x"].dtype == np.float32
    assert dataset.train["y"].dtype == np.int32
    assert f"{train:,}" in data.DATASETS[name].__doc__
    # Stratified: every class has its share of the test part, to within one example.
    whole = np.bincount(np.concatenate([dataset.train["y"], dataset.test["y"]]), minlength=classes)
    held_out = np.bincount(dataset.test["y"], minlength=classes)
    assert np.abs(held_out - 0.2 * whole).max() <= 1


def test_the_split_is_fixed_and_loses_nothing():
    first, again = data.load("digits"), data.load("digits")
    np.testing.assert_array_equal(first.test["x"], again.test["x"])
    assert first.test["y"][:12].tolist() == again.test["y"][:12].tolist()
    import sklearn.datasets

    x = sklearn.datasets.load_digits().images.reshape(-1, 64) / 16
    ours = np.concatenate([first.train["x"], first.test["x"]]).reshape(-1, 64)
    np.testing.assert_array_equal(np.sort(ours @ np.arange(64.0)), np.sort(x.astype(np.float32) @ np.arange(64.0)))
    assert ours.min() == 0
    assert ours.max() == 1


def test_standardization_uses_the_training_part_only():
    dataset = data.load("wine")
    np.testing.assert_allclose(dataset.train["x"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train["x"].std(axis=0), 1, atol=1e-5)
    assert np.abs(dataset.test["x"].mean(axis=0)).max() > 1e-3


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data set 'digit': did you mean 'digits'\?"):
        data.load("digit")
    with pytest.raises(ValueError, match=r"unknown thing 'zzz': there are a, b"):
        pick("thing", "zzz", ["a", "b"])


def broken(**changes):
    dataset = data.load("iris")
    train = {name: leaf.copy() for name, leaf in dataset.train.items()}
    for (name, index), value in changes.pop("train", {}).items():
        train[name][index] = value
    return dataset._replace(train=train, **changes)


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
    ],
)
def test_bad_data_is_named(dataset, message):
    with pytest.raises(ValueError, match=message):
        data.check(dataset())
