"""The benchmark for accelerators, on models small enough for a processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from benchmarks import accelerator
from tests.flops import count_flops


@pytest.fixture(autouse=True)
def _single_precision():
    with jax.enable_x64(False):
        yield


def test_a_combination_is_measured():
    row = accelerator.measure("transformer", "-", 2, "bfloat16", 1, True)
    assert np.isfinite(row["loss"])
    assert row["round"]["repeats"] == 1
    assert row["parameters"] < 1e5


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_operations_are_those_of_the_model(name):
    model, loss_fn, examples, work = accelerator.make(name, "dots", True)
    params = jax.eval_shape(model.init, jax.random.key(0))
    one = {k: v[:1] for k, v in examples.items()}
    closed = jax.make_jaxpr(jax.grad(lambda params: loss_fn(params, one, None).mean()))(params)
    assert count_flops(closed.jaxpr) == work


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
    model = models.transformer(**accelerator.TRANSFORMER)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert 105e6 < models.num_parameters(shapes) < 115e6
