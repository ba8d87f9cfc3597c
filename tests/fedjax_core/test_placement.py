"""State and clients spread over a mesh give the numbers of one device, and no device holds more than its part."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import algorithms
from fedjax_core import (
    ClientProgram,
    Plan,
    Population,
    client_mesh,
    client_table,
    continue_rounds,
    federated,
    for_each_client,
    local_work,
    place,
    replicated,
    samplers,
    shardings,
    simulate,
)
from fedjax_core.execution import balanced_order
from fedjax_core.placement import unmeshed
from fedjax_core.types import Array, Counter
from tests.problems import assert_trees_close, softmax_loss, softmax_params, softmax_population

SIZES = (1, 9, 4, 0, 13, 6, 2, 5)
KEY = jax.random.key(2)
SAMPLER = samplers.uniform(len(SIZES), 5)  # a cohort that no number of devices divides
ROUNDS = 3


def params():
    return softmax_params(dim=6, classes=4)


@cache
def population():
    return softmax_population(SIZES, dim=6, classes=4)


def scaffold(plan=None):
    return algorithms.scaffold(
        softmax_loss, optax.sgd(0.1, 0.9), num_clients=len(SIZES), batch_size=4, num_epochs=2, plan=plan
    )


@cache
def on_one_device():
    return jax.jit(simulate(scaffold(), SAMPLER, ROUNDS))(params(), population(), KEY)


def on_mesh(mesh, lanes=None):
    """(compiled, arguments) of rounds with state and population placed."""
    algorithm = scaffold(Plan(lanes=lanes, mesh=mesh))
    state = algorithm.init(params())
    where = shardings(state, mesh)
    arguments = place(state, where), *place((population(), KEY), replicated(mesh))
    run = jax.jit(continue_rounds(algorithm, SAMPLER, ROUNDS), out_shardings=(where, replicated(mesh)))
    return run.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("num_devices", "model", "lanes"), [(8, 1, None), (2, 1, 4), (4, 2, None)])
def test_a_mesh_gives_the_numbers_of_one_device(num_devices, model, lanes):
    run, arguments = on_mesh(client_mesh(num_devices, model=model), lanes)
    got = run(*arguments)
    assert_trees_close(got, on_one_device(), rtol=1e-12, atol=1e-13)
    rows = jax.tree.leaves(got[0].client_controls)[0]
    clients = num_devices // model
    assert rows.addressable_shards[0].data.shape[0] == len(SIZES) // clients
    assert got[0].params["w"].addressable_shards[0].data.size == got[0].params["w"].size // model
    assert len(got[1].loss.sharding.device_set) == num_devices


def test_a_round_never_gathers_a_table():
    num_clients, width, cohort = 4096, 64, 4
    mesh = client_mesh(8)
    model = {"w": np.zeros((width,), np.float32)}

    def loss_fn(params, batch, key):
        return batch["x"] @ params["w"]

    algorithm = algorithms.scaffold(
        loss_fn, optax.sgd(0.1), num_clients=num_clients, batch_size=1, num_steps=1, plan=Plan(mesh=mesh)
    )
    clients = Population({"x": np.zeros((num_clients, width), np.float32)}, np.arange(num_clients + 1, dtype=np.int32))
    state = jax.eval_shape(algorithm.init, model)
    where = shardings(state, mesh)
    shape = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), state, where)
    run = continue_rounds(algorithm, samplers.uniform(num_clients, cohort), 2)
    compiled = jax.jit(run, donate_argnums=0, out_shardings=(where, replicated(mesh))).lower(shape, clients, KEY)
    table = num_clients * width * 4
    analysis = compiled.compile().memory_analysis()
    # The population is whole on each device; what is left of the arguments is an eighth of the table, in place.
    assert analysis.argument_size_in_bytes < table + table / 4
    assert analysis.temp_size_in_bytes < table / 4


def test_rows_are_split_by_client_or_else_inside():
    mesh = client_mesh(4)
    model = {"w": np.zeros((3, 8)), "b": np.zeros(5)}
    by_client = shardings(client_table(8, model), mesh).rows
    assert by_client["w"].spec == PartitionSpec("clients", None, None)
    assert by_client["b"].spec == PartitionSpec("clients", None)
    inside = shardings(client_table(7, model), mesh).rows
    assert inside["w"].spec == PartitionSpec(None, None, "clients")
    assert inside["b"].spec == PartitionSpec(None, None)  # nothing to split
    batched = jax.eval_shape(jax.vmap(lambda _: client_table(8, model)), jnp.arange(3))
    assert shardings(batched, mesh, batch_axes=1).rows["w"].spec == PartitionSpec(None, "clients", None, None)


def test_an_axis_for_the_model_splits_matrices():
    mesh = client_mesh(8, model=2)
    assert dict(mesh.shape) == {"clients": 4, "model": 2}
    model = {"w": np.zeros((3, 8)), "b": np.zeros(8), "key": jax.random.key(0), "odd": np.zeros((3, 5))}
    spec = {name: sharding.spec for name, sharding in shardings(model, mesh).items()}
    assert spec["w"] == PartitionSpec(None, "model")
    assert spec["b"] == PartitionSpec(None)
    assert spec["key"] == PartitionSpec()
    assert spec["odd"] == PartitionSpec(None, None)
    rows = shardings(client_table(8, {"w": model["w"]}), mesh).rows
    assert rows["w"].spec == PartitionSpec("clients", None, "model")


class _Closed(NamedTuple):
    params: Array
    round: Counter = 0


def closing_over_everything(plan=None):
    """Clients whose steps use the state, public data and the round's key by closure, in a branch and a nested loop."""
    work = local_work(2, num_epochs=1)

    def update(state, cohort, key):
        def step(shared, carry, batch):
            drawn = jax.random.normal(jax.random.fold_in(key, batch.step), state.params.shape)
            near = jnp.where(cohort.public > 0.3, cohort.public, state.params.sum())  # of the rank of public data
            loop = jax.lax.fori_loop(0, 2, lambda i, total: total + cohort.public[i] * state.params, state.params)
            branch = jax.lax.cond(batch.step > 0, lambda: state.params, lambda: drawn)
            return carry + near.sum() + loop + branch, jnp.zeros(())

        program = ClientProgram(lambda shared, own, key: shared, step, lambda shared, carry: (carry, ()))
        results = for_each_client(program, state.params, cohort, key, work=work, plan=plan)
        return _Closed(results.aggregate), results

    return federated(lambda params: _Closed(params), update)


@pytest.mark.parametrize("how", ["jitted", "nested", "seeds"])
def test_client_programs_close_over_what_lies_on_a_mesh(how):
    mesh = client_mesh(2)
    method, plan = closing_over_everything, Plan(lanes=4, mesh=mesh)
    given = jnp.arange(3.0), population().with_public(np.linspace(0, 1, 4)), jax.random.split(KEY, 2)

    def one_round(algorithm):
        return lambda params, population, keys: algorithm.round(
            algorithm.init(params), population.cohort(np.arange(8)), keys[0]
        )

    def of_seeds(algorithm):
        run = simulate(algorithm, SAMPLER, 2)
        return jax.jit(lambda params, population, keys: jax.vmap(run, (None, None, 0))(params, population, keys))

    made = {
        "jitted": lambda algorithm: jax.jit(one_round(algorithm)),
        "nested": lambda algorithm: jax.jit(one_round(algorithm._replace(round=jax.jit(algorithm.round)))),
        "seeds": of_seeds,
    }[how]
    got = made(method(plan))(*place(given, replicated(mesh)))
    assert_trees_close(got, made(method())(*given), rtol=1e-12)


def test_of_a_round_that_is_not_compiled_it_is_said_what_to_do():
    mesh = client_mesh(2)
    method = closing_over_everything(Plan(lanes=4, mesh=mesh))
    params, data, key = place((jnp.arange(3.0), population().with_public(np.ones(4)), KEY), replicated(mesh))
    with pytest.raises(ValueError, match=r"closes over an array that lies on a mesh: compile the round, jax\.jit"):
        method.round(method.init(params), data.cohort(np.arange(8)), key)


def test_arrays_without_the_name_of_a_mesh_are_the_same_arrays():
    mesh = client_mesh(2)
    x = place(jnp.arange(8.0).reshape(4, 2), NamedSharding(mesh, PartitionSpec("clients")))
    key = place(KEY, replicated(mesh))
    seen = []

    def cube(x):
        inside = unmeshed(x)
        seen.append(jax.typeof(inside).sharding.mesh.empty)
        return (inside**3).sum()

    functions = [cube, jax.grad(cube), jax.jacfwd(cube), jax.hessian(cube), jax.vmap(jax.grad(cube), 1)]
    for function in functions:
        assert_trees_close(jax.jit(function)(x), function(np.asarray(x)), rtol=1e-15)
    assert all(seen)
    drawn = jax.jit(lambda key: jax.random.normal(unmeshed(key)))(key)
    assert drawn == jax.random.normal(KEY)

    compiled = jax.jit(unmeshed, donate_argnums=0).lower(x).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == x.nbytes // 2  # given back where it lies, a half a device
    got = compiled(x)
    assert got.sharding.spec == PartitionSpec("clients")


def test_an_explicit_mesh_keeps_its_name():
    """There types say how arrays lie, and that is the user's business."""
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.device_put(jnp.zeros(4), NamedSharding(mesh, PartitionSpec("clients")))
    assert jax.jit(unmeshed)(x).sharding.spec == PartitionSpec("clients")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_devices": 4096}, r"num_devices=4096 but there are \d+ cpu devices: lower it"),
        ({"num_devices": 0}, "num_devices"),
        ({"num_devices": 4, "model": 3}, "model=3 does not divide num_devices=4"),
        ({"model": 0}, "model"),
    ],
)
def test_a_mesh_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        client_mesh(**arguments)


@pytest.mark.parametrize(
    ("steps", "devices", "most"),
    [
        ([10, 7, 6, 5, 4, 2], 2, 17),  # 10 + 5 + 2 and 7 + 6 + 4; one for each in turn would give 19 and 15
        ([9, 0, 0, 1, 1, 1], 2, 9),
        ([5, 5, 5, 5], 4, 5),
        ([3], 1, 3),
        ([0] * 68, 2, 0),
        (list(range(1, 41)), 2, 410),
    ],
)
def test_devices_have_about_the_same_number_of_steps(steps, devices, most):
    steps = jnp.array(steps, jnp.int32)
    order = np.asarray(jax.jit(balanced_order, static_argnums=1)(steps, devices))
    assert sorted(order) == list(range(len(steps)))
    assert np.asarray(steps)[order].reshape(devices, -1).sum(axis=1).max() == most
