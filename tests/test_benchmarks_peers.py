"""What the peers of `benchmarks/peers` share: the workloads, and how their figures are compared."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.peers import jax_models, report, workloads
from benchmarks.peers.workloads import WORKLOADS
from fedjax_core import local_work
from tests.flops import count_flops

every_workload = pytest.mark.parametrize("name", WORKLOADS)

NUM_PARAMETERS = {
    "logistic": 7_850,
    "mlp": 199_210,  # with the next: the FedAvg paper
    "cnn": 1_663_370,
    "lstm": 817_872,  # LEAF
    "resnet": 11_173_962,
    "transformer": 430_170,
    "pfl-cifar10": 1_626_442,
}


def small(name: str) -> workloads.Workload:
    return WORKLOADS[name]._replace(mean_size=7, num_clients=12, cohort_size=5)


@every_workload
def test_models_and_operations_are_the_workloads(name):
    workload = WORKLOADS[name]
    assert workloads.num_parameters(workload) == NUM_PARAMETERS[name]
    model = jax_models.make_model(workload, dropout=False, convolution="dots")
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    assert shapes == workloads.parameter_shapes(workload)

    loss_fn, B = jax_models.make_loss(workload, model), 3
    x = jax.ShapeDtypeStruct((B, *workload.shape), jnp.int32 if workload.is_text else float)
    y = jax.ShapeDtypeStruct((B, *workload.shape) if workload.is_text else (B,), jnp.int32)
    gradient = jax.grad(lambda params, x, y: loss_fn(params, {"x": x, "y": y}, None).mean())
    closed = jax.make_jaxpr(gradient)(params, x, y)
    assert count_flops(closed.jaxpr) == B * workloads.flops_per_example(workload)


@every_workload
def test_steps_are_those_of_the_library(name):
    workload = WORKLOADS[name]
    sizes, ids = workloads.client_sizes(workload), workloads.cohorts(workload, 3)[2]
    work = local_work(workload.batch_size)
    assert work.steps(jnp.asarray(ids), jnp.asarray(sizes[ids])).sum() == workloads.local_steps(workload, ids)
    assert workloads.flops(workload, ids) == sizes[ids].sum() * workloads.flops_per_example(workload)


@every_workload
def test_sizes_and_cohorts(name):
    workload = WORKLOADS[name]
    sizes = workloads.client_sizes(workload)
    assert sizes.shape == (workload.num_clients,)
    assert sizes.min() >= 1
    # Within three standard errors of a log-normal mean.
    error = workload.mean_size * math.sqrt((math.exp(workload.sigma**2) - 1) / workload.num_clients)
    assert abs(sizes.mean() - workload.mean_size) <= 3 * error

    rounds = workloads.cohorts(workload, 6)
    assert rounds.shape == (6, workload.cohort_size)
    assert all(len(set(ids)) == len(ids) for ids in rounds.tolist())
    np.testing.assert_array_equal(rounds[:2], workloads.cohorts(workload, 2))  # however many rounds there is time for

    checked = workloads.client_sizes(workloads.check_version(workload))
    assert not (checked % workload.batch_size).any()
    assert len(set(checked.tolist())) > 1


@every_workload
def test_the_federation_is_the_same_every_time(name):
    workload = small(name)
    one, two = workloads.make_federation(workload), workloads.make_federation(workload)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    np.testing.assert_array_equal(np.diff(one.offsets), workloads.client_sizes(workload))
    x, y = one.client(3)
    assert x.shape == (one.offsets[4] - one.offsets[3], *workload.shape)
    assert y.min() >= 0
    assert y.max() < workload.num_classes
    if workload.is_text:
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    else:
        assert x.dtype == np.float32


def test_comparison_takes_rounds_that_both_have_done():
    cells = {
        "torch": {"seconds": [4.0, 8.0]},
        "fedjax": {"seconds": [2.0, 2.0, 90.0]},
        "pfl": {"error": "it failed"},
        "ours": {"seconds": [1.0, 2.0, 9.0, 100.0]},
    }
    assert report.times_as_fast(cells, "torch") == 4
    assert report.times_as_fast(cells, "fedjax") == 2
    assert report.times_as_fast(cells, "pfl") is None
    verdict = report.verdict(cells, 3.0, ("torch", "fedjax", "pfl"), "ours")
    assert verdict == "2.00x of FedJAX, **falls short, 0.67 of the goal**; no figure: pfl"
    assert report.verdict(cells, 2.0, ("torch", "fedjax"), "ours") == "2.00x of FedJAX, reached"
    assert report.verdict(cells, 2.0, ("torch",), "ours_one") == "no figure"


def test_disagreement_is_of_the_worst_array():
    cells = {"ours": {"check_moved": {"a": 1.0, "b": 2.0}}, "torch": {"check_moved": {"a": 1.0, "b": 2.2}}, "pfl": {}}
    assert report.disagreement(cells, "torch") == pytest.approx(0.1)
    assert report.disagreement(cells, "pfl") is None
    rounding = {"ours": {"check_moved": {"a": 1.0, "b": 1e-10}}, "torch": {"check_moved": {"a": 1.0, "b": 2e-10}}}
    assert report.disagreement(rounding, "torch") < 1e-3


def test_the_plot_has_a_title_and_a_mark_for_everything():
    assert set(report.TITLES) == set(workloads.ALL)
    assert len(set(report.MARKERS)) == len(report.LABELS) - 1
