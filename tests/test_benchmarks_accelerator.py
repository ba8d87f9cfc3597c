"""The benchmark for accelerators, on models small enough for a processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import models
from benchmarks import accelerator
from benchmarks.peers import jax_models, workloads
from tests.flops import count_flops


@pytest.fixture(autouse=True)
def _single_precision():
    with jax.enable_x64(False):
        yield


def test_a_combination_is_compiled_and_measured():
    case = accelerator.Case("mlp", 2, "-", "bfloat16")
    clients = accelerator.federation("mlp", small=True)
    program, said = accelerator.compiled(case, clients)
    row = accelerator.measure(case, clients, program, seconds=0)
    assert said["compile_s"] > 0
    assert np.isfinite(row["loss"])
    assert row["round"]["repeats"] >= 3
    assert row["tflops"] > 0


def test_every_name_has_its_combinations():
    for name in accelerator.NAMES:
        every = accelerator.cases([name])
        assert len(set(every)) == len(every) > 1
        assert {case.convolution for case in every} == (
            {"native", "dots"} if accelerator.setting(name, False).kind in accelerator.IMAGES else {"-"}
        )
    assert accelerator.setting("cnn/64", small=False).cohort_size == 64


@pytest.mark.parametrize("name", workloads.FOR_ACCELERATORS)
def test_operations_are_those_of_the_model(name):
    workload = workloads.ALL[name]
    model = jax_models.make_model(workload, dropout=False, convolution="dots")
    loss_fn = jax_models.make_loss(workload, model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    assert shapes == workloads.parameter_shapes(workload)
    x = jax.ShapeDtypeStruct((1, *workload.shape), jnp.int32 if workload.is_text else jnp.float32)
    y = jax.ShapeDtypeStruct((1, *workload.shape) if workload.is_text else (1,), jnp.int32)
    closed = jax.make_jaxpr(jax.grad(lambda p, x, y: loss_fn(p, {"x": x, "y": y}, None).mean()))(params, x, y)
    assert count_flops(closed.jaxpr) == workloads.flops_per_example(workload)


def test_the_step_computes_in_the_precision_asked_for_and_parameters_keep_theirs():
    model = models.mlp((4,), 3, hidden=(5,))
    loss_fn = accelerator.in_precision(models.losses.cross_entropy(model), jnp.bfloat16)
    batch = {"x": jnp.ones((2, 4)), "y": jnp.zeros(2, jnp.int32)}
    params = model.init(jax.random.key(0))
    closed = jax.make_jaxpr(lambda p: jax.grad(lambda p: loss_fn(p, batch, None).mean())(p))(params)
    products = [equation for equation in closed.jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert products
    assert {v.aval.dtype for equation in products for v in equation.outvars} == {jnp.dtype(jnp.bfloat16)}
    assert {aval.dtype for aval in closed.out_avals} == {jnp.dtype(jnp.float32)}


def test_the_transformer_has_the_size_that_is_told():
    assert 105e6 < workloads.num_parameters(workloads.ALL["gpt"]) < 115e6


def test_fl_simulators_round_has_500_local_steps():
    workload = workloads.ALL["fl-simulator"]
    assert workloads.local_steps(workload, workloads.cohorts(workload, 1)[0]) == 500
