"""Mistakes with parts: each is named with its value and what to do, before anything is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms import messages as parts
from fedjax_core import Admission, Part, with_part
from tests.problems import softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 2, 4))
N = 3
FEDAVG = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
KEY = jax.random.key(0)


def put(part, like=POPULATION, method=FEDAVG):
    return with_part(method, part, like=like)


def as_it_is(state, asked, key):
    return asked.run(), state, ()


MADE = {
    "no part": (lambda: put("top_k"), r"part must be a Part, got the text 'top_k': pass for example messages.top_k"),
    "nothing": (lambda: put(None), "part must be a Part, got an object of type NoneType"),
    "a factory": (
        lambda: put(parts.krum),
        r"part must be a Part, got the function krum: call it first, krum\(\.\.\.\)",
    ),
    "a method": (lambda: put(FEDAVG), r"got Algorithm: .*the order of arguments is \(algorithm, part\)"),
    "a part wrapped": (
        lambda: put(parts.krum(1), method=parts.krum(1)),
        r"algorithm must be an Algorithm, got Part: the order of arguments is \(algorithm, part\)",
    ),
    "a factory of methods": (
        lambda: put(parts.krum(1), method=algorithms.fedavg),
        "algorithm must be an Algorithm, got the function fedavg: call it first",
    ),
    "like a cohort": (lambda: put(parts.krum(1), POPULATION.cohort([0])), "like must be a population, got Cohort"),
    "like examples": (lambda: put(parts.krum(1), {"x": np.zeros(3)}), "like must be a population, got dict"),
    "like nothing": (lambda: put(parts.krum(1), None), "got NoneType: pass like=population"),
    "around a text": (lambda: put(Part("mean")), r"part\.around must be a function, got the text 'mean'"),
    "around of two": (
        lambda: put(Part(lambda state, asked: None)),
        r"part\.around is called with \(state, asked, key\), but its parameters are \(state, asked\)",
    ),
    "init of one": (
        lambda: put(Part(as_it_is, lambda upload: ())),
        r"part\.init is called with \(upload, num_clients\)",
    ),
    "admission alone": (
        lambda: put(Part(admission=as_it_is)),
        r"part\.admission must be an Admission, got the function",
    ),
    "choose of three": (
        lambda: put(Part(admission=Admission(as_it_is))),
        r"part\.admission\.choose is called with \(state, cohort, traffic, key\)",
    ),
    "begin of a state": (
        lambda: put(Part(admission=Admission(lambda s, c, t, k: (c, s, ()), lambda state: state))),
        r"part\.admission\.begin is called with \(\)",
    ),
    "malicious True": (lambda: parts.sign_flip(True), r"malicious must be bool\[num_clients\], got bool\[\] True"),
    "malicious all": (lambda: parts.alie("all"), r"malicious must be bool\[num_clients\], got <U3\[\] 'all'"),
    "malicious of two axes": (lambda: parts.rank_reversal(np.zeros((N, 2), bool)), r"got bool\[3, 2\]"),
    "malicious ids": (
        lambda: parts.inner_product_manipulation([0, 2]),
        r"got int64\[2\] \[0, 2\]: pass numpy\.isin\(numpy\.arange\(num_clients\), ids\)",
    ),
    "malicious numbers": (lambda: parts.sign_flip(jnp.zeros(N)), r"got float64\[3\].*True for every client that is"),
    "malicious of none": (lambda: parts.sign_flip(np.zeros(0, bool)), r"got bool\[0\]"),
    "an infinite clip": (
        lambda: parts.client_level_dp(np.inf, 1.0, expected=2.0),
        r"clip is infinite and noise_multiplier=1\.0: .*choose a finite clip",
    ),
    "infinite noise": (lambda: parts.client_level_dp(1.0, np.inf, expected=2.0), "noise_multiplier must be at most"),
    "clip of nan": (lambda: parts.client_level_dp(np.nan, 1.0, expected=2.0), "clip must lie in"),
    "z of nan": (lambda: parts.alie(np.zeros(N, bool), z=np.nan), r"z must lie in .*got nan"),
    "a factor in words": (lambda: parts.sign_flip(np.zeros(N, bool), factor="x"), "factor must be a number, got 'x'"),
    "many epsilons": (
        lambda: parts.inner_product_manipulation(np.zeros(N, bool), epsilon=[1.0, 2.0]),
        r"epsilon must be a number, got \[1\.0, 2\.0\]",
    ),
    "krum of True": (lambda: parts.krum(True), "malicious must be an integer of at least 0, got True"),
    "krum of a float": (lambda: parts.krum(np.float64(1)), "malicious must be an integer of at least 0"),
    "bits of a float": (lambda: parts.stochastic_rounding(8.0), r"bits must be an integer from 1 to 16, got 8\.0"),
    "a rule that is none": (lambda: fc.stacked(3), "rule must be a function, got an object of type int"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_wrongly_says_so_at_once(name):
    make, said = MADE[name]
    with pytest.raises((TypeError, ValueError), match=said):
        make()


def returning(change):
    """A part that returns what is made of (results, state, info)."""
    return Part(lambda state, asked, key: change(asked.run(), state), lambda upload, n: {"a": jnp.zeros(2)}, "mine")


def choosing(change):
    return Part(
        admission=Admission(lambda state, cohort, traffic, key: change(cohort, state), lambda: jnp.zeros(2)),
        name="mine",
    )


def looking(state, asked, key):
    return asked.watched(fc.sums.norm).run(), state, ()


ROUNDS = {
    "results alone": (
        returning(lambda results, state: results),
        r"mine\.around must return \(results, state, info\), the first a ClientResults, got \(.*\): return \(\) where",
    ),
    "nothing": (returning(lambda results, state: None), "got an object of type NoneType"),
    "the aggregate": (
        returning(lambda results, state: (results.aggregate, state, ())),
        r"the first a ClientResults, got \(dict, dict, tuple\)",
    ),
    "a text to tell": (
        returning(lambda results, state: (results, state, {"how": "well"})),
        r"mine\.around returns info\['how'\] that is the text 'well': metrics are arrays",
    ),
    "a longer state": (
        returning(lambda results, state: (results, {"a": jnp.zeros(3)}, ())),
        r"mine\.around returns the state .*shape=\(3,\).*, and was given .*shape=\(2,\).*: keep structure",
    ),
    "a state of integers": (
        returning(lambda results, state: (results, {"a": jnp.zeros(2, int)}, ())),
        r"returns the state .*int.*: keep structure, shapes and dtypes",
    ),
    "a state of another structure": (
        returning(lambda results, state: (results, (state["a"],), ())),
        "returns the state .*: keep structure",
    ),
    "a look not taken": (Part(looking, name="mine"), r"mine\.around has looked at uploads and not taken out"),
    "no cohort": (
        choosing(lambda cohort, state: (cohort.ids, state, ())),
        r"mine\.admission\.choose must return \(cohort, state, info\), the first a Cohort",
    ),
    "a clock that grows": (
        choosing(lambda cohort, state: (cohort, jnp.zeros(3), ())),
        r"mine\.admission\.choose returns the state .*: keep structure",
    ),
    "few malicious": (
        parts.sign_flip(np.zeros(N - 1, bool)),
        "malicious has 2 entries, but the population has 3 clients",
    ),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_what_a_part_does_wrongly_is_said_while_the_round_is_traced(name):
    part, said = ROUNDS[name]
    algorithm = put(part)
    with pytest.raises((TypeError, ValueError), match=re.compile(said, re.S)):
        jax.eval_shape(algorithm.round, algorithm.init(softmax_params()), POPULATION.cohort([0, 1]), KEY)


def test_a_part_for_another_population_is_named():
    algorithm = put(parts.top_k(0.5), softmax_population((3, 2)))
    with pytest.raises(ValueError, match=r"rows for 2 clients, but the population has 3: .* parts with like=the"):
        algorithm.round(algorithm.init(softmax_params()), POPULATION.cohort([0]), KEY)


PROGRAM = fc.ClientProgram(
    lambda shared, own, key: 0.0, lambda shared, now, batch: (now, now), lambda shared, now: (now, ())
)
PASSES = {
    "an aggregator by name": (
        {"aggregator": "mean"},
        "aggregator must be an Aggregator or Stacked, got the text 'mean'",
    ),
    "one not called": (
        {"aggregator": fc.weighted_mean},
        "got the function weighted_mean: pass for example weighted_mean",
    ),
    "an upload alone": ({"final": lambda shared, now: now}, r"final must return the pair \(upload, output\), got"),
    "an upload of two": ({"final": lambda shared, now: {"w": now, "b": now}}, "got an object of type dict: return"),
    "a message": ({"final": lambda shared, now: fc.Message(now, 8)}, "got an object of type Message"),
    "three": ({"final": lambda shared, now: (now, (), ())}, "got an object of type tuple"),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("shapes_alone", [False, True])
def test_what_a_pass_is_given_wrongly_is_named(name, shapes_alone):
    options, said = PASSES[name]
    options = dict(options)
    program = PROGRAM._replace(final=options.pop("final", PROGRAM.final))
    cohort, work = POPULATION.cohort([0, 1]), fc.local_work(2)
    replaced = fc.clients.replaced(fc.clients.without_steps if shapes_alone else None)
    with replaced, pytest.raises(TypeError, match=said):
        fc.for_each_client(program, (), cohort, KEY, work=work, **options)


def test_numbers_of_numpy_are_numbers():
    for made, alike in (
        (parts.krum(np.int32(1), selected=np.int64(2)), parts.krum(1, selected=2)),
        (parts.trimmed_mean(np.uint8(1)), parts.trimmed_mean(1)),
        (parts.stochastic_rounding(np.int64(8), chunk=np.int32(5)), parts.stochastic_rounding(8, chunk=5)),
        (parts.top_k(np.float32(0.5)), parts.top_k(0.5)),
    ):
        texts = []
        for part in (made, alike):
            algorithm = put(part)
            arguments = algorithm.init(softmax_params()), POPULATION.cohort([0, 1, 2]), KEY
            texts.append(re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(algorithm.round)(*arguments))))
        assert texts[0] == texts[1]


def test_a_share_that_is_traced_is_named():
    with pytest.raises(TypeError, match="share is traced"):
        jax.eval_shape(lambda share: parts.top_k(share) and share, 0.5)


def test_an_infinite_clip_wants_noise_that_is_known_to_be_none():
    with pytest.raises(ValueError, match="clip is infinite"):
        jax.eval_shape(lambda noise: parts.client_level_dp(np.inf, noise, expected=2.0) and noise, 0.0)
    parts.client_level_dp(np.inf, 0, expected=2.0)


def test_an_error_in_a_part_names_it():
    """Whatever it is, and once, however many parts are around."""

    def shorter(state, asked, key):
        changed, taken = fc.messages.before_sending(
            asked, lambda upload, row, key: jax.tree.map(lambda x: x[1:], upload)
        )
        return taken(changed.run())[0], state, ()

    def undecodable(state, asked, key):
        return asked.decoded(lambda sent: jnp.zeros(3) + jnp.zeros(4)).run(), state, ()

    for around, said in ((shorter, r"change must return \(upload, row\), got"), (undecodable, "incompatible shapes")):
        algorithm = with_part(FEDAVG, Part(around, name="mine"), like=POPULATION)
        algorithm = with_part(algorithm, Part(name="outer"), like=POPULATION)
        with pytest.raises(TypeError, match=said) as caught:
            jax.eval_shape(algorithm.round, algorithm.init(softmax_params()), POPULATION.cohort([0]), jax.random.key(0))
        assert any("happened in the part mine between" in note for note in caught.value.__notes__)
