"""What scripts import: a few names that do not say in which package a module is."""

import importlib

import pytest

import pipelines
from pipelines import federation
from pipelines.federation import federations
from pipelines.run import train


def test_modules_are_found_by_their_short_names():
    for name, whole in pipelines._FOR_SCRIPTS.items():
        assert getattr(pipelines, name) is importlib.import_module(whole)
    for name in federation._FOR_SCRIPTS:
        assert getattr(federation, name) is getattr(federations, name)
    scripts = importlib.import_module("pipelines.train")
    assert (scripts.train, scripts.final_params) == (train.train, train.final_params)


@pytest.mark.parametrize("module", [pipelines, federation])
def test_other_names_are_not_there(module):
    with pytest.raises(AttributeError, match="has no attribute 'sorces'"):
        module.sorces  # noqa: B018
