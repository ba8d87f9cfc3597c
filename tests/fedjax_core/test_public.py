"""What rounds are given beside a client's batch: public data, further streams, the number of the epoch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from fedjax_core import reference, samplers
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
N = len(SIZES)
TOTAL = sum(SIZES)
EXAMPLES = {"x": np.arange(TOTAL, dtype=float)}
OTHERS = fc.Population.from_sizes({"x": 100 + np.arange(9.0)}, [2, 0, 1, 3, 1, 2])
PUBLIC = {"x": np.linspace(0, 1, 7), "others": OTHERS}
POPULATION = fc.Population.from_sizes(EXAMPLES, SIZES).with_public(PUBLIC)
KEY = jax.random.key(0)


class State(NamedTuple):
    params: fc.Params
    round: fc.Counter = 0


class Seen(NamedTuple):
    own: jax.Array
    other: jax.Array
    epochs: jax.Array
    sizes: jax.Array


def method(order="shuffled", plan=None):
    """Clients add up what they see in a step of both streams; the server adds the mean of its public numbers."""
    work = fc.local_work(2, num_epochs=2, order=order)

    def init(shared, own, key):
        zero = jnp.zeros(())
        return own, Seen(zero, zero, zero, zero)

    def update(state, cohort, key):
        stream = fc.stream(cohort.public["others"], cohort, jax.random.fold_in(key, 1), fc.local_work(2, order=order))

        def step(shared, carry, batch):
            own, seen = carry
            other = stream.draw(own, batch.step)
            return (
                own,
                Seen(
                    seen.own + jnp.sum(jnp.where(batch.mask, batch.examples["x"], 0)),
                    seen.other + jnp.sum(jnp.where(other.mask, other.examples["x"], 0)),
                    seen.epochs + batch.epoch,
                    seen.sizes + batch.size,
                ),
            ), jnp.zeros(())

        program = fc.ClientProgram(init, step, lambda shared, carry: (carry[1], carry[1]))
        results = fc.for_each_client(program, (), cohort, key, stream.inputs, work=work, plan=plan)
        params = state.params + results.aggregate.own + results.aggregate.other + jnp.mean(cohort.public["x"])
        return State(params), results, results.outputs

    return fc.federated(lambda params: State(params), update)


def one_round(population=POPULATION, ids=(0, 1, 3, -1, 4, 5), **options):
    run = method(**options)
    return jax.jit(run.round)(run.init(jnp.zeros(())), population.cohort(list(ids)), KEY)


@pytest.mark.parametrize("order", ["shuffled", "sequential", "replacement"])
def test_a_step_sees_both_streams(order):
    _, metrics = one_round(order=order)
    seen, sizes = metrics.extra, np.array(SIZES)[[0, 1, 3, 4, 5]]
    slots = [0, 1, 2, 4, 5]
    steps = -(-sizes // 2)
    np.testing.assert_array_equal(seen.sizes[np.array(slots)], 2 * steps * sizes)
    np.testing.assert_array_equal(seen.epochs[np.array(slots)], steps)
    assert seen.other[1] == 0  # client 1 has no others
    if order != "replacement":
        sums = [2 * EXAMPLES["x"][sum(SIZES[:i]) : sum(SIZES[: i + 1])].sum() for i in (0, 1, 3, 4, 5)]
        np.testing.assert_array_equal(seen.own[np.array(slots)], sums)
        # Client 0 takes four steps, each of which sees both of its others; client 3 eight, in epochs of two steps.
        assert seen.other[0] == 4 * (100 + 101)
        assert seen.other[2] == 4 * (103 + 104 + 105)
    assert seen.sizes[3] == 0


@pytest.mark.parametrize("plan", [fc.Plan(lanes=1), fc.Plan(lanes=3), "mesh"])
def test_plans_and_the_plain_loop_agree(plan):
    plan = fc.Plan(lanes=4, mesh=fc.client_mesh(2)) if plan == "mesh" else plan
    population = POPULATION if plan.mesh is None else fc.place(POPULATION, fc.replicated(plan.mesh))
    state, metrics = one_round(population, plan=plan)
    with reference.plain_loop():
        run = method()
        expected = run.round(run.init(jnp.zeros(())), POPULATION.cohort([0, 1, 3, -1, 4, 5]), KEY)
    assert_trees_close((state, metrics.extra), (expected[0], expected[1].extra), rtol=1e-13, atol=0)


def test_staged_and_in_one_call_it_is_the_same():
    run, sampler = method(), samplers.uniform(N, 3)
    expected = jax.jit(fc.simulate(run, sampler, 3))(jnp.zeros(()), POPULATION, KEY)
    on_host = fc.HostPopulation.from_sizes(EXAMPLES, SIZES).with_public(PUBLIC)
    staged = fc.simulate_staged(run, sampler, 3)(jnp.zeros(()), on_host, KEY)
    assert_trees_equal(staged, expected)
    assert_trees_equal(on_host.to_device().public, POPULATION.public)


def test_of_public_data_there_is_one_for_all_seeds():
    large = POPULATION.with_public({"x": np.zeros(100_000), "others": OTHERS})
    run, seeds = method(), 8

    def one(key, population):
        state = run.init(jnp.zeros(()))
        return run.round(state, population.cohort(jnp.arange(3)), key)

    keys = jax.random.split(KEY, seeds)
    program = jax.jit(jax.vmap(one, (0, None))).lower(keys, large).compile()
    held = program.memory_analysis()
    assert held.argument_size_in_bytes < 1.1 * large.public["x"].nbytes
    assert held.temp_size_in_bytes < 0.5 * large.public["x"].nbytes
    traced = jax.make_jaxpr(one)(KEY, large)
    assert all(np.size(const) < 1000 for const in traced.consts)


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match=r"public\['names'\] has dtype <U1"):
        POPULATION.with_public({"names": np.array(["a"])})
    other = POPULATION.with_public({**PUBLIC, "others": fc.Population.from_sizes({"x": np.ones(2)}, [1, 1])})
    with pytest.raises(ValueError, match="the stream's population has 2 clients, and that of the cohort 6"):
        one_round(other)


BASE = {"w": np.random.default_rng(0).normal(size=(5, 3)), "b": np.zeros(3)}
FOUR = (3, 5, 0, 8)


class TestLossesWithPublicData:
    """Any method trains an adapter on a frozen base that its loss finds in the public data."""

    def population(self):
        return softmax_population(FOUR).with_public(BASE)

    @staticmethod
    def loss_fn(adapter, batch, key, public):
        merged = {"w": public["w"] + adapter["down"] @ adapter["up"], "b": public["b"] + adapter["b"]}
        return softmax_loss(merged, batch, key)

    def adapter(self):
        rng = np.random.default_rng(1)
        return {"down": rng.normal(size=(5, 1)), "up": np.zeros((1, 3)), "b": np.zeros(3)}

    def closed_over(self, adapter, batch, key):
        return self.loss_fn(adapter, batch, key, jax.tree.map(jnp.asarray, BASE))

    def rounds(self, loss_fn, name="fedavg", population=None, **settings):
        factory = getattr(algorithms, name)
        method = factory(loss_fn, optax.sgd(0.1), batch_size=2, num_epochs=2, **settings)
        state, population = method.init(self.adapter()), population or self.population()
        for t in range(2):
            state, metrics = jax.jit(method.round)(state, population.cohort([3, 0, -1]), jax.random.key(t))
        return state, metrics

    @pytest.mark.parametrize("name", ["fedavg", "scaffold", "mime", "moon", "fedsam"])
    def test_it_is_as_if_the_base_were_closed_over(self, name):
        more = {"num_clients": 4} if name in ("scaffold", "moon") else {}
        if name == "moon":
            more["features"] = lambda params, batch, key: batch["x"] @ params["down"]
        with_public = self.rounds(self.loss_fn, name, **more)
        assert_trees_close(with_public, self.rounds(self.closed_over, name, **more), rtol=1e-12, atol=1e-14)

    def test_the_plain_loop_and_evaluation_find_it_too(self):
        method = algorithms.fedavg(self.loss_fn, optax.sgd(0.1), batch_size=2)
        population = self.population()
        state, cohort = method.init(self.adapter()), population.cohort([3, 0, -1])
        compiled = jax.jit(method.round)(state, cohort, KEY)[0].params
        with reference.plain_loop():
            assert_trees_close(compiled, method.round(state, cohort, KEY)[0].params, rtol=1e-12, atol=1e-14)

        def metric(params, batch, public):
            return self.loss_fn(params, batch, KEY, public)

        everywhere = fc.evaluate(metric, compiled, population.examples, public=population.public)
        by_client = fc.evaluate_clients(metric, compiled, population)
        by_view = fc.evaluate_view(metric, method.personal, method.init(compiled), population)
        np.testing.assert_allclose(by_view, by_client, rtol=1e-12)
        sizes = np.array(FOUR)
        np.testing.assert_allclose(np.nansum(by_client * sizes) / sizes.sum(), everywhere, rtol=1e-12)

    def test_without_any_it_is_missed(self):
        with pytest.raises(TypeError, match=r"loss_fn takes public data, and there is none.*with_public"):
            self.rounds(self.loss_fn, population=softmax_population(FOUR))
        with pytest.raises(TypeError, match="metric_fn takes public data"):
            fc.evaluate(lambda params, batch, public: batch["x"][:, 0], {}, softmax_population((2,)).examples)

    def test_of_the_base_there_is_one_for_all_lanes_and_seeds(self):
        dim, seeds = 200, 6
        base = {"w": np.ones((dim, dim), np.float32)}
        population = fc.Population.from_sizes({"x": np.ones((8, dim), np.float32)}, [2] * 4).with_public(base)

        def loss_fn(adapter, batch, key, public):
            return jnp.sum(jnp.square(batch["x"] @ public["w"] + (batch["x"] @ adapter["a"]) @ adapter["b"]), axis=1)

        with jax.enable_x64(False):
            method = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=1, plan=fc.Plan(lanes=4))
            adapter = {"a": jnp.ones((dim, 1)), "b": jnp.ones((1, dim))}

            def one(key, population):
                return method.round(method.init(adapter), population.cohort(jnp.arange(4)), key)[0]

            keys = jax.random.split(KEY, seeds)
            program = jax.jit(jax.vmap(one, (0, None))).lower(keys, population).compile()
        held = program.memory_analysis()
        assert held.argument_size_in_bytes < 1.2 * base["w"].nbytes
        assert held.temp_size_in_bytes < 1.5 * base["w"].nbytes
        assert held.output_size_in_bytes < 0.2 * base["w"].nbytes
