"""Numbers that are finite and do not fit, and what a run says of sizes that were not intended."""

import jax
import numpy as np
import polars
import pytest

from pipelines import Config
from pipelines.data import dataset, sources
from pipelines.data.dataset import Dataset
from pipelines.experiment import setup


@pytest.fixture(scope="module")
def prepared(small):
    with jax.enable_x64(False):
        return setup.prepare(small.replace(model="mlp", hidden=(100,), methods=("fedavg",)))


@pytest.mark.parametrize(("every", "made"), [(2, 26), (5, 25), (1, 25), (7, 28), (40, 40), (2**31 - 1, 2**31 - 1)])
def test_checkpoints_go_by_evaluations_unless_both_are_given(every, made):
    assert Config(eval_every=every).report.checkpoint_every == made
    assert Config.from_json(Config(eval_every=every).to_json()).report.checkpoint_every == made


@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_a_number_beyond_single_precision_is_named_with_its_place(dtype):
    values = np.ones((7, 3), dtype)
    dataset.fits_single(values, "x")
    dataset.fits_single(np.full((2,), np.inf), "what is not finite is another matter")
    values[5, 1] = 1e39
    with pytest.raises(ValueError, match=r"x holds 1e\+39 at index \(5, 1\), which is finite but beyond single"):
        dataset.fits_single(values, "x")


def test_such_a_number_in_a_data_set_of_ones_own_needs_double_precision():
    part = {"x": np.full((4, 2), 1e300), "y": np.arange(4, dtype=np.int32)}
    made = Dataset("mine", part, part, 4)
    with jax.enable_x64(True):
        assert setup.in_precision(made).train["x"].max() == 1e300
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"mine\['x'\] holds 1e\+300 at index \(0, 0\)"):
        setup.in_precision(made)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1.0])
def test_columns_of_any_size_are_standardized(scale):
    numbers = np.arange(40.0)
    frame = polars.DataFrame({"a": numbers * scale, "label": np.arange(40) % 2})
    plain = polars.DataFrame({"a": numbers, "label": np.arange(40) % 2})
    made, same = (sources.from_frame(each, label="label") for each in (frame, plain))
    np.testing.assert_allclose(made.train["x"], same.train["x"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.train["x"].std(), 1, rtol=1e-5)


def test_more_classes_than_examples_are_told(small):
    x, y = np.ones((40, 2), np.float32), np.arange(40) % 4
    fine, odd = (sources.from_arrays(x, np.where(y == 3, most, y), name="mine") for most in (3, 10**6))
    assert setup.unlikely_classes(fine) == ""
    said = setup.unlikely_classes(odd)
    assert said.startswith("mine has 1,000,001 classes for 40 examples (the largest label is 1,000,000)")
    config = small.replace(model="mlp", hidden=(8,))
    assert setup._smaller_model(config, odd) == said
    assert setup._smaller_model(config, fine) == "take a smaller model (--hidden is 8)"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"epochs": 3 * 10**7}, "lower --epochs, --steps or --eval-every"),
        ({"epochs": None, "steps": 10**8}, "(100,000,000 of a client in a round)"),
        ({"epochs": None, "steps": 10**8, "methods": ("fedsgd",)}, ""),
    ],
)
def test_rounds_that_take_too_long_are_reported(fields, said, prepared):
    with jax.enable_x64(False):
        told = setup.much_local_work(prepared._replace(config=prepared.config.replace(**fields)))
    assert said in told
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("fields", "parts", "said"),
    [
        ({}, {"local training": 8}, "take a smaller model (--hidden is 100), or lower --batch-size"),
        ({}, {"data": 10**9}, "keep the examples in host memory with --staged"),
        ({"staged": True}, {"data": 10**9, "state": 5}, "or lower --seeds, or lower --cohort-size"),
        ({}, {"evaluation": 8}, "take a smaller model (--hidden is 100), or lower --seeds"),
    ],
)
def test_what_needs_most_memory_says_what_helps(fields, parts, said, prepared, monkeypatch):
    with jax.enable_x64(False):
        experiment = prepared._replace(config=prepared.config.replace(**fields))
        predicted = {"data": 1, "state": 1, "local training": 1, "evaluation": 1} | parts
        monkeypatch.setattr(setup, "predicted_memory", lambda experiment, method: predicted)
        assert said in setup.memory_fix(experiment, "fedavg")


def test_state_of_clients_can_be_staged(small, monkeypatch):
    config = small.replace(methods=("scaffold",), clients=40, min_size=1)
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        predicted = {"data": 1, "state": 10**3, "local training": 1, "evaluation": 1}
        monkeypatch.setattr(setup, "predicted_memory", lambda experiment, method: predicted)
        assert "--staged" in setup.memory_fix(experiment, "scaffold")


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({}, ("cohort_size", "clients", "alpha"), []),
        ({}, ("participation",), ["--participation means nothing to sampler uniform: it is for bernoulli, periodic"]),
        ({"sampler": "bernoulli"}, ("participation",), []),
        ({}, ("sigma",), ["--sigma means nothing to partition dirichlet: it is for lognormal"]),
        (
            {"partition": "iid"},
            ("min_size", "severity"),
            ["--min-size", "--severity means nothing to feature skew none"],
        ),
        ({"federation": "some/dir"}, ("sigma",), []),
        ({"model": "cnn"}, ("hidden",), ["--hidden means nothing to model cnn: it is for mlp"]),
        ({"model": "mine.py:net"}, ("hidden",), []),
    ],
)
def test_options_that_mean_nothing_are_told(fields, given, said):
    told = setup.unused(Config(**fields), given)
    assert len(told) == len(said)
    for line, beginning in zip(told, said, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split_by": ""}, "unknown split_by '': there are random, position"),
        ({"order": "Shuffled"}, "unknown order 'Shuffled': did you mean 'shuffled'"),
        ({"weights": "size"}, "unknown weights 'size'"),
        ({"clients": None}, "give a number, or partition natural"),
    ],
)
def test_words_are_checked_whether_they_are_used_or_not(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_size": 10**6}, "there are 120: ask for fewer examples each"),
        ({"imbalance": 1e30}, "imbalance: factor=1e"),
        ({"new_clients": 7}, "new_clients: number=7 of 6 clients"),
        ({"feature_skew": "scale", "severity": 3e38}, r"severity=3e\+38 of the skew 'scale' makes inputs that are not"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_federation_says_which_option_is_the_matter(fields, said, small):
    with jax.enable_x64(False), pytest.raises(ValueError, match=said):
        setup.federate(small.replace(**fields))
