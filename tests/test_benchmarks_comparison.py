"""What the comparison of all methods makes of the curves it has."""

import numpy as np
import pytest

import algorithms
from benchmarks import comparison
from pipelines.configuration import methods
from pipelines.configuration.config import Config


def curve(*values, chosen=0):
    choices = comparison.choices("fedavg")
    return {
        "accuracy": [values] * 2 + [tuple(v - 0.03 for v in values)],
        "choices": choices,
        "chosen": choices[chosen],
        "down": 7850,
        "up": 7850,
    }


def test_every_method_is_compared_or_said_to_be_left_out():
    assert sorted([*comparison.METHODS, *comparison.LEFT_OUT]) == methods.names()
    assert set(comparison.SETTINGS) < set(comparison.METHODS)
    assert {name for several in comparison.PAGES.values() for name in several} < set(comparison.METHODS)


@pytest.mark.parametrize("name", comparison.METHODS)
def test_the_grid_lies_around_the_methods_own_server_rate(name):
    grid = comparison.choices(name)
    assert {choice["client_lr"] for choice in grid} == set(comparison.RATES)
    server = {choice["server_lr"] for choice in grid if "server_lr" in choice}
    assert len(server) == (3 if "server_lr" in methods.describe(name).hyperparameters else 0)
    config = comparison.configuration("mlp", 0.1, 10, {name: comparison.SETTINGS.get(name, {}) | grid[-1]})
    assert Config.from_json(config.to_json()) == config
    assert hasattr(algorithms, name)
    asked = comparison.search("mlp", 0.1, name)
    assert [setting.values for setting in asked.settings_of_grid(name)] == grid
    searched = config.replace(rounds=asked.rounds).federation_fields()
    assert asked.federation_fields() == searched, "rates are chosen on the federation that they are used on"


def test_rounds_to_a_target_are_those_of_evaluations():
    curves = np.array([[0.5, 0.7, 0.6], [0.5, 0.6, 0.69], [0.8, 0.1, 0.1]])
    assert comparison.rounds_to(0.7, curves, 15) == [10, None, 5]


def test_a_table_has_the_best_first_and_says_what_failed():
    result = {
        "rounds": 15,
        "settings": {
            "mlp, alpha 0.1": {
                "model": "mlp",
                "alpha": 0.1,
                "methods": {
                    "fedavg": curve(0.7, 0.7, 0.76),
                    "scaffold": curve(0.7, 0.8, 0.9, chosen=4),
                    "fedamd": {"error": "no longer finite\nand more"},
                },
            }
        },
    }
    lines = comparison.tables(result).splitlines()
    assert lines[0] == "### mlp, alpha 0.1"
    # The mean over three evaluations: 0.8, 0.8, 0.77; the third seed is 0.77 when the first two are 0.8.
    assert lines[4] == "| scaffold | 79.0 ± 1.7 | 10, 10, 15 | 0.03 | 1 | 7,850, 7,850 |"
    assert lines[5] == "| fedavg | 71.0 ± 1.7 | -, -, - | 0.01* | 0.3* | 7,850, 7,850 |"
    assert lines[6] == "| fedamd | no longer finite | | | | |"
