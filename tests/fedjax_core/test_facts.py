"""What factories ask for, read from their signatures."""

from typing import Unpack

import jax
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.problems import softmax_features, softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 5, 2))


def by_name(loss_fn, client_optimizer, *, num_clients, features=None, mu=0.1):
    """A factory that declares nothing."""


def declared(*, how_many: fc.NumClients, represent: fc.FeatureFn | None = None, num_clients: int = 3):
    """One whose arguments have names of their own."""


def unresolved(loss_fn: "NoSuchType", teacher: fc.Need = None):  # noqa: F821
    """One whose annotations cannot be read."""


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (
            by_name,
            {
                "loss_fn": "loss",
                "client_optimizer": "client optimizer",
                "num_clients": "num_clients",
                "features": "features",
            },
        ),
        (declared, {"how_many": "num_clients", "represent": "features"}),
        (unresolved, {"loss_fn": "loss"}),
        (algorithms.fedavg, {"loss_fn": "loss", "client_optimizer": "client optimizer"}),
    ],
)
def test_needs(factory, expected):
    assert fc.needs(factory) == expected


def test_every_method_asks_for_a_loss_and_declares_its_clients():
    for name in algorithms.__all__:
        factory = getattr(algorithms, name)
        asked = fc.needs(factory)
        assert {"loss", "adapter loss", "split", "task", "tasks"} & set(asked.values())
        if "num_clients" in asked.values():
            hint = factory.__annotations__[next(a for a, what in asked.items() if what == "num_clients")]
            assert hint in (fc.NumClients, "fc.NumClients")


def half_pass(loss_fn: fc.LossValuesFn, client_optimizer, *, batch_size=20, **local: Unpack[fc.FullPassOptions]):
    """One that takes no gradients, and neither epochs nor steps."""


def alone(loss_fn, client_optimizer, *, num_steps=1):
    """One that takes nothing but steps."""


ALL = ("batch_size", "num_epochs", "num_steps", "order", "weights", "plan")


@pytest.mark.parametrize(
    ("factory", "values", "local"),
    [
        (by_name, False, ()),
        (alone, False, ("num_steps",)),
        (half_pass, True, ("batch_size", "weights", "plan")),
        (lambda loss_fn, client_optimizer, **local: None, False, ALL),
        (algorithms.fedavg, False, ALL),
        (algorithms.fedsgd, False, ("batch_size", "weights", "plan")),
        (algorithms.fedzo, True, ALL),
        (algorithms.fzoos, True, ALL),
    ],
)
def test_gradients_and_local_work(factory, values, local):
    assert fc.values_suffice(factory) is values
    assert fc.local_options(factory) == local


def test_what_clients_send():
    make = {"batch_size": 2}
    fedavg = algorithms.fedavg(softmax_loss, optax.sgd(0.1), **make)
    mime = algorithms.mime(softmax_loss, optax.sgd(0.1), **make)
    moon = algorithms.moon(softmax_loss, optax.sgd(0.1), features=softmax_features, num_clients=3, **make)
    shapes = [sorted(np.shape(leaf) for leaf in jax.tree.leaves(softmax_params()))]
    for method, passes in ((fedavg, 1), (mime, 2), (moon, 1)):
        sent = fc.uploads(method, softmax_params(), like=POPULATION)
        assert len(sent) == passes
        assert [sorted(leaf.shape for leaf in jax.tree.leaves(one)) for one in sent[:1]] == shapes
