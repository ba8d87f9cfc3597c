import csv
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import Metrics
from pipelines.results import history


class Extra(NamedTuple):
    step: object
    loss: object
    per_layer: object


def metrics(rounds, extra=(), start=0.0):
    values = start + np.arange(2 * rounds, dtype=np.float32).reshape(2, rounds)
    return Metrics(
        loss=jnp.asarray(values / 3),
        update_norm=jnp.asarray(values),
        bytes_up=jnp.full((2, rounds), 2_000_000_000, jnp.float32),
        bytes_down=jnp.full((2, rounds), 5, jnp.float32),
        participants=jnp.full((2, rounds), 3, jnp.int32),
        extra=extra,
    )


def scores(value):
    return {"accuracy": jnp.full(2, value, jnp.float32), "loss": jnp.full(2, 1 - value, jnp.float32)}


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def example():
    extra = Extra(jnp.ones((2, 2), jnp.bfloat16), jnp.zeros((2, 2)), jnp.zeros((2, 2, 4)))
    first = history.from_rounds(metrics(2, extra), scores(0.25))
    second = history.from_rounds(metrics(2, extra, start=100), scores(0.5))
    return history.append(history.append({}, first), second)


def test_rounds_and_evaluations_are_joined():
    found = example()
    assert found["round/loss"].shape == (2, 4)
    assert found["round/update_norm"].tolist() == [[0, 1, 100, 101], [2, 3, 102, 103]]
    assert found["test/accuracy"].tolist() == [[0.25, 0.5]] * 2
    assert found["round/per_layer"].shape == (2, 4, 4)
    assert found["round/step"].dtype == np.float32  # numpy itself cannot store bfloat16
    assert "round/extra.loss" in found


def test_csv():
    other = history.from_rounds(metrics(1), scores(0.125))
    rows = read(history.to_csv({"a": example(), "b": other, "c": {}}, [7, 8], np.asarray([2, 4])))
    assert len(rows) == 2 * 4 + 2 * 1
    row = rows[5]  # method a, seed 8, round 2
    assert (row["method"], row["seed"], row["round"]) == ("a", "8", "2")
    assert np.float32(row["loss"]) == np.float32(3) / np.float32(3)
    assert row["bytes_up"] == "2000000000"
    assert row["bytes_up_total"] == "6000000000"  # more than an int32 holds
    assert row["bytes_down_total"] == "15"
    assert row["test_accuracy"] == "0.25"
    assert row["step"] == "1.0"
    assert row["extra.loss"] == "0.0"
    assert "per_layer" not in row
    assert [r["test_accuracy"] for r in rows[:4]] == ["", "0.25", "", "0.5"]
    assert rows[-1]["step"] == ""
    assert rows[-1]["test_accuracy"] == ""


def test_csv_floats_read_back_to_the_bit():
    found = history.from_rounds(metrics(5), scores(1 / 3))
    rows = read(history.to_csv({"a": found}, [0, 1], np.asarray([5])))
    assert [np.float32(row["loss"]) for row in rows] == found["round/loss"].reshape(-1).tolist()
    assert np.float32(rows[4]["test_accuracy"]) == np.float32(1 / 3)


@pytest.mark.parametrize(
    ("rounds", "every", "expected"), [(6, 2, [2, 4, 6]), (7, 3, [3, 6, 7]), (2, 5, [2]), (1, 1, [1])]
)
def test_evaluated_rounds(rounds, every, expected):
    assert history.evaluated_rounds(rounds, every).tolist() == expected


def test_mean_losses_leave_out_rounds_without_participants():
    found = {
        "round/loss": np.asarray([[1.0, np.nan, 3.0, np.nan, np.nan]]),
        "round/participants": np.asarray([[2, 0, 2, 0, 0]]),
    }
    means = history.mean_losses(found, np.asarray([2, 4, 5]))
    np.testing.assert_array_equal(means, [[1.0, 3.0, np.nan]])
    assert history.mean_known(means) == 2
    assert np.isnan(history.mean_known(means[:, 2:]))


def test_scalars_of_older_runs_become_bytes_and_what_is_measured_since_follows():
    model = {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    older = {
        "round/loss": np.ones((2, 3)),
        "round/uploaded": np.asarray([[6, 6, 6], [6, 6, 0]], np.int32),
        "round/downloaded": np.asarray([[9, 9, 9], [9, 9, 9.5]], np.float32),
        "round/mask_bits": np.full((2, 3), 6, np.int32),
    }
    found = history.in_bytes(older, model)
    assert set(found) == {"round/loss", "round/bytes_up", "round/bytes_down", "round/mask_bytes"}
    np.testing.assert_array_equal(found["round/bytes_up"], [[12, 12, 12], [12, 12, 0]])
    np.testing.assert_array_equal(found["round/bytes_down"], [[18, 18, 18], [18, 18, 19]])
    np.testing.assert_array_equal(found["round/mask_bytes"], np.full((2, 3), 0.75))
    later = history.in_bytes(older | {"round/bytes_up": np.full((2, 1), 7, np.float32)}, model)
    np.testing.assert_array_equal(later["round/bytes_up"], [[12, 12, 12, 7], [12, 12, 0, 7]])
    assert history.in_bytes(found, model) == found


def test_counts_that_are_means_make_whole_totals():
    found = history.from_rounds(metrics(1), scores(0.5))
    sent = np.full_like(found["round/bytes_up"], 4 / 3, np.float32)
    (row, *_) = read(history.to_csv({"a": found | {"round/bytes_up": sent}}, [7, 8], np.asarray([1])))
    assert float(row["bytes_up"]) == pytest.approx(4 / 3)
    assert row["bytes_up_total"] == "4"


def test_first_bad_round():
    good = history.from_rounds(metrics(3), scores(0.5))
    assert history.first_bad_round(good) is None
    # The loss of a round without participants is not known, which is no divergence.
    unknown = {"round/loss": good["round/loss"].copy(), "round/participants": good["round/participants"].copy()}
    unknown["round/loss"][0, 1], unknown["round/participants"][0, 1] = np.nan, 0
    assert history.first_bad_round(good | unknown) is None
    unknown["round/participants"][0, 1] = 2
    assert history.first_bad_round(good | unknown) == (0, 1)
    loss = good["round/loss"].copy()
    loss[0, 2] = np.inf
    assert history.first_bad_round(good | {"round/loss": loss}) == (0, 2)
    norm = good["round/update_norm"].copy()
    norm[1, 1] = np.nan
    assert history.first_bad_round(good | {"round/loss": loss, "round/update_norm": norm}) == (1, 1)
