"""Privacy of clients: what one client can change, wherever codecs and attacks stand, and noise in every round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms import messages as parts
from fedjax_core import Population, clients, messages, with_part, with_statistics
from fedjax_core.messages import Part
from tests.problems import softmax_loss, softmax_params, softmax_population

N, CLIP = 6, 0.5
UPLOADS = np.random.default_rng(7).normal(size=(N, 4)) * 3
FLIPPED, COLLUDING = np.arange(N) == 0, np.arange(N) == 1
AROUND = {
    "top_k": parts.top_k(0.5),
    "rounding": parts.stochastic_rounding(8, chunk=3),
    "sign_flip": parts.sign_flip(FLIPPED, factor=1e3),
    "alie": parts.alie(COLLUDING, z=1e3),
    "dp": parts.client_level_dp(CLIP, 0.0, expected=1.0),
}


def at_once(program, shared, cohort, key, client_inputs=(), *, aggregator, **options):
    """`for_each_client` without steps: all uploads of the clients' inputs, one after the other on the server."""

    def one(inputs, key):
        upload, output = program.final(shared, program.init(shared, inputs, key))
        return fc.sizes.opened(upload), output

    uploads, outputs = jax.vmap(one)(client_inputs, jax.random.split(key, N))
    weights = cohort.mask.astype(float)
    if isinstance(aggregator, fc.Stacked):
        aggregate = aggregator.finish(uploads, weights)
    else:
        summands = jax.vmap(aggregator.lift)(uploads, weights)
        aggregate = aggregator.finish(
            jax.tree.map(lambda leaf: jnp.sum(jnp.where(fc.sums.across(cohort.mask, leaf), leaf, 0), 0), summands)
        )
    nothing = jnp.zeros(N)
    return clients.ClientResults(aggregate, outputs, weights, nothing, nothing, nothing[0], nothing, nothing)


def influences(order):
    """float[N], how far the sum moves when a client is not there, with parts around a mean in this order."""
    program = fc.ClientProgram(
        lambda shared, own, key: own, lambda shared, own, batch: (own, 0.0), lambda s, own: (own, ())
    )
    population = Population.from_sizes({"x": UPLOADS}, [1] * N)
    key, states = jax.random.key(0), {}
    upload = jax.ShapeDtypeStruct((4,), float)
    for name in order:
        states[name] = AROUND[name].init(upload, N)

    def total(ids):
        cohort = population.cohort(ids)
        for name in reversed(order):  # the first is nearest to the clients
            cohort = messages.through(cohort, lambda asked, name=name: AROUND[name].around(states[name], asked, key)[0])
        with clients.replaced(at_once):
            return fc.for_each_client(program, (), cohort, key, UPLOADS, work=fc.local_work(1)).aggregate

    ids = np.tile(np.arange(N), (N + 1, 1))
    ids[np.arange(N), np.arange(N)] = -1
    sums = jax.vmap(total)(jnp.asarray(ids))
    return np.linalg.norm(sums[:N] - sums[N], axis=1)


def orders(*others):
    """The part at every place among the others, which stand in both orders, but rounding around top-k in both."""
    exchanged = {"top_k": "rounding", "rounding": "top_k"}
    backward = tuple(exchanged.get(name, name) for name in others[::-1])
    return [(*names[:at], "dp", *names[at:]) for names in (others, backward) for at in range(len(names) + 1)]


@pytest.mark.parametrize("order", orders("top_k", "rounding", "sign_flip"), ids=" ".join)
def test_a_client_changes_the_sum_by_the_clip_and_no_more(order):
    found = influences(order)
    assert (found <= CLIP * (1 + 1e-12)).all()
    assert found[0] == pytest.approx(CLIP), "of the one that sends a thousand times what it has"


@pytest.mark.parametrize("order", orders("top_k", "sign_flip", "alie", "rounding"), ids=" ".join)
def test_so_does_one_that_colludes(order):
    """What it sends follows the honest clients' uploads, so that each moves it too, from one end to the other."""
    found = influences(order)
    assert found[1] <= CLIP * (1 + 1e-12)
    assert (found <= 3 * CLIP).all()


def test_without_a_clip_they_change_it_by_more():
    assert influences(("sign_flip",))[0] > 100 * CLIP
    assert influences(("top_k", "alie"))[1] > 100 * CLIP


def noised(method, population, noise=1.0, **options):
    return with_part(method, parts.client_level_dp(CLIP, noise, expected=2.0, **options), like=population)


def made(name="fedavg", **options):
    return getattr(algorithms, name)(softmax_loss, optax.sgd(0.1), batch_size=4, **options)


POPULATION = softmax_population((3, 5, 0, 4))
KEY = jax.random.key(0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e100])
def test_an_upload_that_is_not_finite_adds_nothing(value):
    """And one that is far too long is clipped as any other."""
    clip = jax.jit(lambda upload: AROUND["dp"].around((), *asked(upload)))

    def asked(upload):
        program = fc.ClientProgram(lambda s, own, key: own, lambda s, own, b: (own, 0.0), lambda s, own: (own, ()))
        cohort = Population.from_sizes({"x": UPLOADS}, [1] * N).cohort(range(N))
        options = {"work": fc.local_work(1), "weights": "uniform", "plan": None}
        return fc.Pass(program, (), upload, cohort, KEY, options, fc.weighted_mean()), KEY

    uploads = UPLOADS / np.linalg.norm(UPLOADS, axis=1, keepdims=True)
    uploads[2, 1] = value
    with clients.replaced(at_once):
        results, _, info = clip(jnp.asarray(uploads))
    kept = CLIP * np.delete(uploads, 2, axis=0).sum(axis=0)
    kept[1] += CLIP if value == 1e100 else 0
    np.testing.assert_allclose(results.aggregate, kept, rtol=1e-12)
    assert info.clipped == 1


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedavgm"])
def test_an_empty_round_has_the_noise_of_any_other(name):
    """Who sees the model cannot tell from it that nobody was there; rows of clients stay."""
    method = made(name, **({"num_clients": 4} if name == "scaffold" else {}))
    algorithm = noised(method, POPULATION)
    state = algorithm.init(softmax_params())
    step = jax.jit(jax.vmap(lambda ids, key: algorithm.round(state, POPULATION.cohort(ids), key), (None, 0)))
    after, metrics = step(jnp.asarray([-1, 2, -1]), jax.random.split(KEY, 200))
    moved = jax.tree.map(jnp.subtract, algorithm.params(after), algorithm.params(state))
    noise = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])
    assert noise.std() == pytest.approx(CLIP / 2, rel=0.05)
    assert (np.asarray(metrics.participants) == 0).all()
    assert (np.asarray(metrics.extra.passes[0].clipped) == 0).all()
    assert fc.is_private(algorithm)
    assert not fc.is_private(method)
    for rows, before in zip(*(jax.tree.leaves(fc.split_tables(s)[1]) for s in (after, state)), strict=True):
        np.testing.assert_array_equal(rows, jnp.broadcast_to(before, rows.shape))


def test_a_part_around_it_leaves_the_noise_of_empty_rounds():
    algorithm = with_part(noised(made(), POPULATION), parts.top_k(0.5), like=POPULATION)
    state = algorithm.init(softmax_params())
    _, metrics = jax.jit(algorithm.round)(state, POPULATION.cohort([-1]), KEY)
    assert metrics.update_norm > 0
    inner = noised(with_part(made(), parts.top_k(0.5), like=POPULATION), POPULATION)
    _, metrics = jax.jit(inner.round)(inner.init(softmax_params()), POPULATION.cohort([-1]), KEY)
    assert metrics.update_norm > 0
    assert fc.is_private(algorithm)


def test_codecs_of_integers_may_stand_inside():
    """Looked at is what the server decodes, not the integers that go over the wire."""
    algorithm = noised(with_part(made(), parts.stochastic_rounding(8), like=POPULATION), POPULATION, noise=0.0)
    state = algorithm.init(softmax_params())
    _, metrics = jax.jit(algorithm.round)(state, POPULATION.cohort([0, 1]), KEY)
    assert 0 < metrics.update_norm <= CLIP * (1 + 1e-12)
    assert metrics.bytes_up == 18 + 8


def test_short_floats_are_clipped_in_the_sum_and_not_rounded_beyond_it():
    method = made()
    params = softmax_params(dtype=jnp.bfloat16)

    def around(state, asked, key):
        results, state, info = AROUND["dp"].around(state, asked, key)
        return results, state, (results.aggregate, info)

    algorithm = with_part(method, Part(around), like=POPULATION)
    _, metrics = jax.jit(algorithm.round)(algorithm.init(params), POPULATION.cohort([0]), KEY)
    total, _ = metrics.extra.passes[0]
    assert jax.tree.leaves(total)[0].dtype == jnp.bfloat16
    assert fc.sums.norm(total) <= CLIP * (1 + 2**-8), "the result alone is rounded, once"


def explored(cohort_sends):
    """A method with an event in which clients upload something, or keep it."""
    method, work = made(), fc.local_training(batch_size=4)
    program = fc.full_gradient_program(softmax_loss)
    program = program if cohort_sends else fc.kept_by_client(program)

    def run(state, cohort, key):
        work.run(program, state.params, cohort, key)
        return state

    return method._replace(events={"explore": fc.Event(run, "before")})


def test_what_an_event_uploads_would_go_past_it():
    with pytest.raises(TypeError, match=r"event 'explore' .* without client_level_dp: .*_replace\(events=\{\}\)"):
        noised(explored(True), POPULATION).init(softmax_params())
    noised(explored(True)._replace(events={}), POPULATION).init(softmax_params())
    kept = noised(explored(False), POPULATION)
    jax.eval_shape(
        lambda state: fc.run_events(kept, "before", state, POPULATION.cohort([0, 1]), KEY), kept.init(softmax_params())
    )


@pytest.mark.parametrize(("name", "event"), [("ewc", "end_task"), ("fedlex", "explore"), ("autoflip", "explore")])
def test_methods_whose_events_read_clients_are_refused(name, event):
    with pytest.raises(TypeError, match=f"in the event '{event}' of the method clients upload something"):
        noised(made(name), POPULATION).init(softmax_params())


def test_statistics_that_are_averaged_around_it_are_refused():
    private = noised(made(), POPULATION)
    with pytest.raises(TypeError, match=r"put the part outside, with_part\(with_statistics\(method, 'average'\), part"):
        with_statistics(private, "average")
    assert fc.is_private(with_statistics(private, "frozen"))
