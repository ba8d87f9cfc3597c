"""Parts between clients and server: any method with any of them is a method, and a part that does nothing is none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms import messages as parts
from fedjax_core import Plan, Stacked, checks, messages, testing
from fedjax_core.messages import Message, Part, with_part
from tests.problems import (
    assert_trees_close,
    assert_trees_equal,
    every_part,
    softmax_loss,
    softmax_params,
    softmax_population,
)

SIZES = (3, 5, 0, 8, 2, 6)
IDS = (0, 1, 3, -1, 5)
POPULATION = softmax_population(SIZES)
NOBODY = np.zeros(len(SIZES), bool)
IDENTITY = Part(lambda state, asked, key: (asked.run(), state, ()), name="identity")

METHODS = {
    "fedavg": {},
    "fedprox": {},
    "fednova": {},
    "feddyn": {"num_clients": len(SIZES)},
    "scaffold": {"num_clients": len(SIZES)},
    "scaffold I": {"num_clients": len(SIZES), "option": "I"},
    "mime": {},
    "fedstale": {"num_clients": len(SIZES)},
}
NOTHING = {
    "identity": IDENTITY,
    "top_k": parts.top_k(1.0),
    "sign_flip": parts.sign_flip(NOBODY),
    "alie": parts.alie(NOBODY),
}
WITHOUT_NOISE = parts.client_level_dp(np.inf, 0.0, expected=4.0)  # of the four participants


def made(name, **options):
    factory = getattr(algorithms, name.split()[0])
    return factory(softmax_loss, optax.sgd(0.1), batch_size=2, num_epochs=2, **METHODS[name], **options)


def trained(algorithm, rounds=3):
    state, run = algorithm.init(softmax_params()), jax.jit(algorithm.round)
    for t in range(rounds):
        state, metrics = run(state, POPULATION.cohort(list(IDS)), jax.random.key(t))
    return state, metrics


@pytest.mark.parametrize("name", METHODS)
def test_parts_that_do_nothing_are_none_to_the_bit(name):
    method = made(name)
    plain, told = trained(method)
    wrapped = method
    for part in NOTHING.values():
        wrapped = with_part(wrapped, part, like=POPULATION)
    state, metrics = trained(wrapped)
    assert state.round == 3
    assert len(state.passes) == (2 if name == "mime" else 1)
    for _ in NOTHING:
        state, metrics = state.method, metrics._replace(extra=metrics.extra.method)
    assert_trees_equal(state, plain)
    assert_trees_equal(metrics.extra, told.extra)
    assert metrics.bytes_down == told.bytes_down


@pytest.mark.parametrize("name", ["scaffold", "mime"])
def test_attacks_by_nobody_are_none_to_the_bit(name):
    """Who is malicious is an argument of the compiled round: attacks are computed, and nobody sends what they give.

    In one lane, as the server adds up the uploads that it has changed one after the other.
    """
    method = made(name, plan=Plan(lanes=1))
    plain, _ = trained(method)

    def attacked(malicious):
        wrapped = method
        for attack in (parts.sign_flip, parts.alie, parts.inner_product_manipulation):
            wrapped = with_part(wrapped, attack(malicious), like=POPULATION)
        return wrapped

    run = jax.jit(lambda malicious, *arguments: attacked(malicious).round(*arguments))
    state = attacked(NOBODY).init(softmax_params())
    for t in range(3):
        state, metrics = run(jnp.asarray(NOBODY), state, POPULATION.cohort(list(IDS)), jax.random.key(t))
    assert metrics.extra.passes[0] == 0
    assert_trees_equal(state.method.method.method, plain)
    _, metrics = run(jnp.asarray(NOBODY).at[1].set(True), state, POPULATION.cohort(list(IDS)), jax.random.key(3))
    assert metrics.extra.passes[0] == 1, "the same program attacks where somebody is"


@pytest.mark.parametrize("name", ["fedavg", "mime"])
def test_a_part_that_does_nothing_changes_no_bytes(name):
    method = made(name)
    cohort = POPULATION.cohort(list(IDS))
    plain = method.round(method.init(softmax_params()), cohort, jax.random.key(0))[1]
    wrapped = with_part(method, IDENTITY, like=POPULATION)
    told = wrapped.round(wrapped.init(softmax_params()), cohort, jax.random.key(0))[1]
    assert plain.bytes_up > 0
    assert (told.bytes_up, told.bytes_down) == (plain.bytes_up, plain.bytes_down)


def test_a_change_of_the_same_shapes_keeps_the_size_that_was_stated():
    """After a codec: of the same arrays its size holds, other arrays count, and what is stated is believed."""

    def changing(change):
        def around(state, asked, key):
            changed, taken = messages.before_sending(asked, change)
            return taken(changed.run())[0], state, ()

        return Part(around)

    def halved(upload):
        return jax.tree.map(lambda leaf: leaf / 2, upload)

    codec = changing(lambda upload, row, key: (Message(upload, 5), row))
    method = made("fedavg")
    for change, up in (
        (lambda upload, row, key: (halved(upload), row), 5),
        (lambda upload, row, key: (jax.tree.map(jnp.float32, upload), row), 4 * 18),
        (lambda upload, row, key: ({**upload, "b": Message(upload["b"], 1)}, row), 8 * 15 + 1),
    ):
        both = with_part(with_part(method, codec, like=POPULATION), changing(change), like=POPULATION)
        _, metrics = both.round(both.init(softmax_params()), POPULATION.cohort([0, -1, 3]), jax.random.key(0))
        assert metrics.bytes_up == up


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_privacy_without_noise_is_none_to_the_bit(name):
    method = made(name)
    private = with_part(method, WITHOUT_NOISE, like=POPULATION)
    assert_trees_equal(trained(private)[0].method, trained(method)[0])


def test_an_attack_by_those_who_are_not_there_changes_next_to_nothing():
    absent = np.isin(np.arange(len(SIZES)), [2, 4])
    method = made("fedavg")
    attacked = with_part(method, parts.sign_flip(absent), like=POPULATION)
    assert_trees_close(trained(attacked)[0].method.params, trained(method)[0].params, rtol=1e-13, atol=1e-15)


def test_parts_nest_in_the_order_in_which_they_were_put_around():
    """The first changes uploads first: a look between a shortening and a lengthening sees what the shortening left."""

    def looking():
        def around(state, asked, key):
            def change(upload, row, key):
                return upload, optax.tree.norm(upload)

            changed, taken = messages.before_sending(asked, change)
            results, norms = taken(changed.run())
            return results, state, jnp.max(norms)

        return Part(around, name="looking")

    def scaling(factor):
        def around(state, asked, key):
            def change(upload, row, key):
                return jax.tree.map(lambda leaf: factor * leaf, upload), row

            changed, taken = messages.before_sending(asked, change)
            return taken(changed.run())[0], state, ()

        return Part(around)

    nested = made("fedavg")
    for part in (looking(), scaling(0.25), looking(), scaling(8.0), looking()):
        nested = with_part(nested, part, like=POPULATION)
    told, norms = trained(nested, 1)[1].extra, []
    while hasattr(told, "passes"):
        norms, told = [told.passes[0], *norms], told.method
    first, _, second, _, third = norms
    np.testing.assert_allclose([second, third], [0.25 * first, 2 * first], rtol=1e-12)


def drawing(name):
    """A part that tells its key."""
    return Part(lambda state, asked, key: (asked.run(), state, jax.random.key_data(key)), name=name)


def test_parts_draw_apart_and_none_draws_otherwise_for_another_around_it():
    def told(*names):
        algorithm, drawn = made("mime"), []
        for name in names:
            algorithm = with_part(algorithm, drawing(name), like=POPULATION)
        metrics = trained(algorithm, rounds=1)[1].extra
        for _ in names:
            drawn.append(np.stack(metrics.passes))  # of Mime's two passes
            metrics = metrics.method
        return drawn[::-1]

    alone = told("a")[0]
    nested = told("a", "a", "b", "a")
    assert len(np.unique(np.concatenate(nested), axis=0)) == 2 * 4
    np.testing.assert_array_equal(nested[0], alone)
    np.testing.assert_array_equal(told("b", "a")[1], alone)  # nor for one of another name inside
    np.testing.assert_array_equal(told("b")[0], nested[2])


def test_a_clip_is_the_last_thing_before_the_sum_wherever_it_stands():
    """It holds for what the server makes of a message, and not for what goes over the wire."""

    def lengthened():
        def around(state, asked, key):
            return asked.decoded(lambda sent: jax.tree.map(lambda leaf: 100 * leaf, sent)).run(), state, ()

        return Part(around)

    clip = parts.client_level_dp(0.05, 0.0, expected=1.0)
    for inner, outer in ((clip, lengthened()), (lengthened(), clip)):
        both = with_part(with_part(made("fedavg"), inner, like=POPULATION), outer, like=POPULATION)
        metrics = jax.jit(both.round)(both.init(softmax_params()), POPULATION.cohort([0]), jax.random.key(0))[1]
        np.testing.assert_allclose(metrics.update_norm, 0.05, rtol=1e-12)


def test_a_codec_before_or_after_a_rule_decodes_before_the_rule():
    method = made("fedavg")
    codec, rule = parts.top_k(0.4, feedback=False), parts.coordinate_median()
    one = with_part(with_part(method, codec, like=POPULATION), rule, like=POPULATION)
    other = with_part(with_part(method, rule, like=POPULATION), codec, like=POPULATION)
    assert_trees_equal(one.params(trained(one)[0]), other.params(trained(other)[0]))


def test_two_codecs_are_decoded_in_the_other_order():
    def times(factor):
        def around(state, asked, key):
            def change(upload, row, key):
                return Message((jax.tree.map(lambda leaf: factor + leaf, upload),), 1.0), ()

            def decode(message):
                return jax.tree.map(lambda leaf: leaf - factor, message[0])

            changed, taken = messages.before_sending(asked.decoded(decode), change)
            return taken(changed.run())[0], state, ()

        return Part(around)

    method = made("fedavg")
    both = with_part(with_part(method, times(2.0), like=POPULATION), times(8.0), like=POPULATION)
    assert_trees_close(both.params(trained(both)[0]), method.params(trained(method)[0]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("traced", [False, True])
def test_a_round_that_was_compiled_before_it_was_wrapped_is_refused(traced):
    method = made("fedavg")
    compiled = method._replace(round=jax.jit(method.round))
    if traced:
        compiled.round(compiled.init(softmax_params()), POPULATION.cohort(list(IDS)), jax.random.key(0))
    with pytest.raises(TypeError, match=r"identity is put around was compiled .*jax\.jit\(with_part"):
        with_part(compiled, IDENTITY, like=POPULATION).init(softmax_params())


def test_a_cohort_that_is_kept_sends_nothing_after_its_round():
    kept = []
    method = made("fedavg")

    def round(state, cohort, key):
        kept.append(cohort)
        return method.round(state, cohort, key)

    wrapped = with_part(method._replace(round=round), IDENTITY, like=POPULATION)
    state = wrapped.init(softmax_params())
    wrapped.round(state, POPULATION.cohort(list(IDS)), jax.random.key(0))
    with pytest.raises(TypeError, match="compile then"):
        method.round(state.method, kept[-1], jax.random.key(0))


def test_a_state_of_another_method_is_named():
    mime = with_part(made("mime"), IDENTITY, like=POPULATION)
    state = mime.init(softmax_params())
    short = state._replace(passes=state.passes[:1])
    with pytest.raises(ValueError, match="more passes than the 1 that identity has a state for"):
        mime.round(short, POPULATION.cohort(list(IDS)), jax.random.key(0))
    with pytest.raises(ValueError, match="2 passes of the round went through identity, which has a state for 3"):
        mime.round(state._replace(passes=((), (), ())), POPULATION.cohort(list(IDS)), jax.random.key(0))


def test_a_rule_needs_a_mean_to_take_the_place_of():
    def around(state, asked, key):
        every = asked._replace(aggregator=Stacked(lambda uploads, weights: uploads))
        return every.with_rule(lambda uploads, weights: uploads, "mine").run(), state, ()

    wrapped = with_part(made("fedavg"), Part(around), like=POPULATION)
    with pytest.raises(TypeError, match="mine takes the place of a weighted mean"):
        wrapped.round(wrapped.init(softmax_params()), POPULATION.cohort(list(IDS)), jax.random.key(0))


PROBLEM = testing.classification()
MALICIOUS = np.arange(PROBLEM.population.num_clients) == 1
PARTS = every_part(MALICIOUS, top_k=0.2)
RANKED = {"rank_reversal"}
"""Parts of methods whose clients upload rankings; FedAvg with them is refused."""


def test_every_part_is_checked():
    assert set(PARTS) == set(parts.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_method_with_a_part_is_a_method(name):
    """Plans, meshes, staging, seeds under vmap, resuming: all that methods promise (`fedjax_core.testing`)."""

    factory, rate = (algorithms.frl, 5.0) if name in RANKED else (algorithms.fedavg, 0.1)

    def make(*, lr=rate, **settings):
        method = factory(PROBLEM.loss_fn, optax.sgd(lr), batch_size=4, **settings)
        return with_part(method, PARTS[name], like=PROBLEM.population)

    testing.check_algorithm(make, PROBLEM, floats={"lr": rate})


def test_a_part_is_a_part():
    with pytest.raises(TypeError, match=r"part\.around"):
        with_part(made("fedavg"), Part("nothing"), like=POPULATION)
    assert checks.is_concrete(1.0)
