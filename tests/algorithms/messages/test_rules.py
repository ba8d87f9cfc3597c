"""Robust rules against plain NumPy, and what malicious clients can do with each."""

from functools import cache, partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms import messages as parts
from algorithms.messages import rules
from algorithms.parts import columns, selection
from fedjax_core import ModelState, Population, mapped, messages
from fedjax_core.messages import Part, with_part
from tests.problems import reporting, softmax_loss, softmax_params

N = 9
UPLOADS = np.random.default_rng(3).normal(size=(N, 4))


def result(part, uploads=UPLOADS, ids=None):
    uploads = np.asarray(uploads, np.float64)
    population = Population.from_sizes({"x": uploads}, [1] * len(uploads))
    algorithm = with_part(reporting(), part, like=population)
    state = algorithm.init({"a": jnp.zeros(3), "b": jnp.zeros(1)})
    ids = range(len(uploads)) if ids is None else ids
    state, _ = jax.jit(algorithm.round)(state, population.cohort(list(ids)), jax.random.key(0))
    params = algorithm.params(state)
    return np.concatenate([params["a"], params["b"]])


def krum_scores(x, f):
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    return np.array([np.sort(np.delete(row, i))[: len(x) - f - 2].sum() for i, row in enumerate(distances)])


def test_the_median():
    np.testing.assert_allclose(result(parts.coordinate_median()), np.median(UPLOADS, axis=0), rtol=1e-12)
    even = UPLOADS[:6]
    np.testing.assert_allclose(result(parts.coordinate_median(), even), np.median(even, axis=0), rtol=1e-12)
    some = [4, -1, 2, 7, -1]
    expected = np.median(UPLOADS[[4, 2, 7]], axis=0)
    np.testing.assert_allclose(result(parts.coordinate_median(), ids=some), expected, rtol=1e-12)


@pytest.mark.parametrize("b", [0, 1, 4])
def test_the_trimmed_mean(b):
    expected = np.sort(UPLOADS, axis=0)[b : N - b].mean(axis=0)
    np.testing.assert_allclose(result(parts.trimmed_mean(b)), expected, rtol=1e-12)


@pytest.mark.parametrize("f", [0, 2])
def test_krum_returns_an_upload_and_multi_krum_the_mean_of_some(f):
    scores = krum_scores(UPLOADS, f)
    np.testing.assert_array_equal(result(parts.krum(f)), UPLOADS[np.argmin(scores)])
    several = UPLOADS[np.argsort(scores, kind="stable")[:4]].mean(axis=0)
    np.testing.assert_allclose(result(parts.krum(f, selected=4)), several, rtol=1e-12)
    np.testing.assert_allclose(result(parts.krum(0, selected=N)), UPLOADS.mean(axis=0), rtol=1e-12)


def test_distances_do_not_suffer_from_a_common_offset():
    shifted = jnp.asarray(UPLOADS + 1e6)
    expected = ((UPLOADS[:, None] - UPLOADS[None]) ** 2).sum(-1)
    found = rules.squared_distances({"a": shifted}, jnp.ones(N, bool))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


RULES = {"median": parts.coordinate_median(), "trimmed": parts.trimmed_mean(2), "krum": parts.krum(2)}


@pytest.mark.parametrize("name", RULES)
def test_permutation_translation_scaling_and_equal_uploads(name):
    rule, whole = RULES[name], result(RULES[name])
    order = np.random.default_rng(1).permutation(N)
    np.testing.assert_allclose(result(rule, UPLOADS[order]), whole, rtol=1e-12)
    np.testing.assert_allclose(result(rule, UPLOADS + 5), whole + 5, rtol=1e-9)
    np.testing.assert_allclose(result(rule, 3 * UPLOADS), 3 * whole, rtol=1e-9)
    np.testing.assert_allclose(result(rule, np.tile(UPLOADS[:1], (N, 1))), UPLOADS[0], rtol=1e-12)


@pytest.mark.parametrize("name", ["median", "trimmed"])
def test_malicious_clients_cannot_leave_the_range_of_the_honest(name):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        uploads = rng.normal(size=(N, 4))
        uploads[:2] = rng.normal(size=(2, 4)) * 10.0 ** rng.integers(-3, 6)
        found = result(RULES[name], uploads)
        assert (found >= uploads[2:].min(axis=0) - 1e-12).all()
        assert (found <= uploads[2:].max(axis=0) + 1e-12).all()


@pytest.mark.parametrize("name", RULES)
def test_a_round_without_participants_gives_zeros(name):
    np.testing.assert_array_equal(result(RULES[name], ids=[-1, -1]), np.zeros(4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.krum(-1), "malicious must be an integer of at least 0, got -1"),
        (lambda: parts.trimmed_mean(1.5), "malicious must be an integer"),
        (lambda: parts.krum(1, selected=0), "selected must be an integer of at least 1"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_attacks_are_what_their_cards_say():
    bad = np.isin(np.arange(N), [0, 3])
    honest, own = UPLOADS[~bad], UPLOADS[bad]
    mean = lambda sent: np.concatenate([honest, sent]).mean(axis=0)  # noqa: E731
    np.testing.assert_allclose(result(parts.sign_flip(bad, factor=2.0)), mean(-2 * own), rtol=1e-12)
    mu, sd = honest.mean(axis=0), honest.std(axis=0, ddof=1)
    np.testing.assert_allclose(result(parts.alie(bad, z=0.7)), mean(np.tile(mu - 0.7 * sd, (2, 1))), rtol=1e-10)
    np.testing.assert_allclose(
        result(parts.inner_product_manipulation(bad, epsilon=3.0)), mean(np.tile(-3 * mu, (2, 1))), rtol=1e-12
    )
    flips = (N - 2) / 2  # the sign of the mean turns exactly beyond it
    for epsilon, sign in ((flips - 0.01, 1), (flips + 0.01, -1)):
        found = result(parts.inner_product_manipulation(bad, epsilon=epsilon))
        np.testing.assert_array_equal(np.sign(found), sign * np.sign(mu))


@pytest.mark.parametrize(("n", "f", "z"), [(50, 10, 0.2533), (50, 12, 0.336)])
def test_the_z_of_alie(n, f, z):
    uploads = np.random.default_rng(0).normal(size=(n, 4))
    bad = np.arange(n) < f
    honest = uploads[~bad]
    sent = honest.mean(axis=0) - z * honest.std(axis=0, ddof=1)
    expected = (honest.sum(axis=0) + f * sent) / n
    np.testing.assert_allclose(result(parts.alie(bad), uploads), expected, atol=1e-4)


def test_client_level_privacy():
    clip, expected = 1.5, 6.0
    norms = np.linalg.norm(UPLOADS, axis=1, keepdims=True)
    clipped = UPLOADS * np.minimum(1, clip / norms)
    np.testing.assert_allclose(
        result(parts.client_level_dp(clip, 0.0, expected=expected)), clipped.sum(axis=0) / expected, rtol=1e-12
    )
    without = result(parts.client_level_dp(clip, 0.0, expected=expected), ids=range(1, N))
    whole = clipped.sum(axis=0) / expected
    assert np.linalg.norm(whole - without) * expected <= clip * (1 + 1e-12), "the sensitivity of the sum"
    np.testing.assert_allclose(
        result(parts.client_level_dp(1e9, 0.0, expected=float(N))), UPLOADS.mean(axis=0), rtol=1e-12
    )


@pytest.mark.parametrize(("change", "said"), [(jnp.square, "something that the server makes"), (None, "upload int32")])
def test_privacy_of_what_no_clip_bounds_is_refused(change, said):
    """What is added up must be what was clipped; an integer times a factor below 1 would be 0."""

    def around(state, asked, key):
        if change is not None:
            squared = mapped(lambda upload: jax.tree.map(change, upload), asked.aggregator)
            return private.around(state, asked._replace(aggregator=squared), key)
        counted = messages.before_sending(asked, lambda upload, row, key: (jax.tree.map(jnp.int32, upload), row))[0]
        return private.around(state, counted, key)

    private = parts.client_level_dp(1.0, 0.0, expected=4.0)
    with pytest.raises(TypeError, match=f"client_level_dp .*{said}.*: take a method"):
        result(Part(around))


def test_the_noise_has_the_deviation_that_was_asked_for():
    population = Population.from_sizes({"x": np.zeros((4, 4))}, [1] * 4)
    algorithm = with_part(reporting(), parts.client_level_dp(2.0, 0.5, expected=4.0), like=population)
    state = algorithm.init({"a": jnp.zeros(3), "b": jnp.zeros(1)})
    cohort = population.cohort([0, 1, 2, 3])
    many = jax.vmap(lambda key: algorithm.params(algorithm.round(state, cohort, key)[0]))
    found = many(jax.random.split(jax.random.key(1), 5000))
    values = np.concatenate([np.ravel(found["a"]), np.ravel(found["b"])])
    assert abs(values.std() - 0.5 * 2.0 / 4.0) < 0.005
    assert abs(values.mean()) < 0.01
    assert optax.tree.norm(found) > 0


def test_distances_are_the_same_in_blocks_of_columns(monkeypatch):
    monkeypatch.setattr(columns, "SMALLEST", 3)
    taking = jnp.arange(N) != 2
    uploads = {"a": UPLOADS.reshape(N, 2, 2), "b": UPLOADS[:, :3], "c": UPLOADS[:, 0]}
    flat = np.concatenate([leaf.reshape(N, -1) for leaf in uploads.values()], axis=1)[np.asarray(taking)]
    expected = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    found = rules.squared_distances(jax.tree.map(jnp.asarray, uploads), taking)
    np.testing.assert_allclose(found[taking][:, taking], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_order_statistic_is_that_of_a_sort(dtype):
    rng = np.random.default_rng(0)
    rows = (rng.integers(-3, 4, size=(9, 50)) * rng.choice([1, 1, 1e20, -0.0], size=(9, 50))).astype(dtype)
    rows[0, 0], rows[1, 1], taking = np.inf, -np.inf, rng.random(9) < 0.8
    find = jax.jit(selection.order_statistic)
    for k in range(taking.sum()):
        np.testing.assert_array_equal(find(rows, k, taking), np.sort(rows[taking], axis=0)[k])


def compiled(rule):
    """What a rule makes of uploads, [n, d], of clients that all take part, as a function of them."""
    asked = []
    rule.around((), _Asked(asked.append), jax.random.key(0))
    made = jax.jit(asked[0])
    return lambda rows: np.asarray(made({"x": jnp.asarray(rows, jnp.float32)}, jnp.ones(len(rows)))["x"])


class _Asked:
    """Stands for a pass, and takes the rule that is put in the place of its mean."""

    def __init__(self, take):
        self.take = take

    def with_rule(self, rule, name):
        self.take(rule)
        return self

    def run(self):
        return None


@pytest.mark.parametrize("selected", [1, 3])
def test_krum_in_single_precision_chooses_as_if_it_had_all_digits(selected):
    """However far the malicious uploads are: honest ones differ in the third digit, and their distances are kept."""
    krum = compiled(parts.krum(2, selected=selected))
    for size in (1e2, 1e5, 1e10, 1e18, 1e30, np.inf, np.nan):
        rows = (1 + 0.01 * np.random.default_rng(0).normal(size=(8, 1000))).astype(np.float32)
        rows[:2] *= -size
        honest = rows.astype(np.float64)[2:]
        distances = np.sort(((honest[:, None] - honest[None]) ** 2).sum(-1), axis=1)[:, 1:]
        best = 2 + np.argsort(distances[:, :4].sum(1), kind="stable")[:selected]
        expected = rows[best].astype(np.float64).mean(0)
        np.testing.assert_allclose(krum(rows), expected, rtol=1e-6, err_msg=f"{size:g}")


def test_krum_of_nothing_that_is_finite_is_nothing():
    krum = compiled(parts.krum(0))
    assert (krum(np.full((3, 4), np.nan)) == 0).all()
    one = np.array([[1.0, 2.0]])
    np.testing.assert_array_equal(krum(one), one[0])


def models_held(parts_around):
    """Models that FedAvg's compiled round of 20 clients holds with these parts around it."""
    clients, params = 20, [jnp.zeros((64, 64), jnp.float32)] * 6
    population = Population.from_sizes({"x": np.ones((clients, 64), np.float32)}, [1] * clients)
    cohort, size = population.cohort(np.arange(clients)), sum(leaf.nbytes for leaf in params)

    def loss_fn(params, batch, key):
        y = batch["x"]
        for w in params:
            y = jnp.tanh(y @ w)
        return jnp.sum(jnp.square(y), axis=1)

    def held(algorithm):
        lowered = jax.jit(algorithm.round).lower(algorithm.init(params), cohort, jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes / size

    with jax.enable_x64(False):
        algorithm = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=1)
        for part in parts_around:
            algorithm = with_part(algorithm, part, like=population)
        return held(algorithm)


plainly_held = cache(partial(models_held, ()))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_the_uploads_and_little_more(name):
    """The uploads of C clients, and what FedAvg itself holds: one model after another in training."""
    robust, plain = models_held([RULES[name]]), plainly_held()
    assert plain < 8
    assert robust < plain + 20 + 1


@pytest.mark.parametrize(
    "rule", [RULES["median"], parts.client_level_dp(1.0, 1.0, expected=20.0)], ids=["median", "dp"]
)
def test_attacks_change_the_uploads_that_are_held(rule):
    """What malicious clients send stands in the place of what they trained; an attack holds two moments beside that."""
    malicious = np.arange(20) < 3
    attacked = models_held([parts.sign_flip(malicious), parts.alie(malicious), rule])
    assert attacked < plainly_held() + 20 + 1 + 2


# Training under two attacks at once: the first multiplies what it has, the second hides in the spread of the others.
CLIENTS = 12
FLIPPING, COLLUDING = np.arange(CLIENTS) == 2, np.isin(np.arange(CLIENTS), [5, 6, 11])


def alike(seed=0):
    """A federation of clients whose examples are drawn alike."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(CLIENTS * 20, 5))
    y = np.argmax(x @ rng.normal(size=(5, 3)), axis=1).astype(np.int32)
    return Population.from_sizes({"x": x, "y": y}, [20] * CLIENTS)


def attacked_by_hand(uploads):
    """What the clients send, [CLIENTS, d], out of what they trained."""
    sent = uploads.copy()
    sent[FLIPPING] *= -20
    seen, n, f = sent[~COLLUDING], CLIENTS, COLLUDING.sum()
    z = NormalDist().inv_cdf((n - f - (np.floor(n / 2 + 1) - f)) / (n - f))
    assert z > 0
    sent[COLLUDING] = seen.mean(axis=0) - z * seen.std(axis=0, ddof=1)
    return sent


BY_HAND = {
    "mean": (None, lambda sent: sent.mean(axis=0)),
    "median": (parts.coordinate_median(), lambda sent: np.median(sent, axis=0)),
    "krum": (parts.krum(4), lambda sent: sent[np.argmin(krum_scores(sent, 4))]),
    "multi-krum": (
        parts.krum(4, selected=3),
        lambda sent: sent[np.argsort(krum_scores(sent, 4), kind="stable")[:3]].mean(axis=0),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_training_under_sign_flip_and_alie_together(name):
    """Every aggregate is the rule's by hand; robust rules learn, and the mean goes away from where it began."""
    population, (rule, by_hand) = alike(), BY_HAND[name]
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.5), batch_size=20, num_epochs=2)
    algorithm = with_part(method, parts.sign_flip(FLIPPING, factor=20.0), like=population)
    algorithm = with_part(algorithm, parts.alie(COLLUDING), like=population)
    algorithm = algorithm if rule is None else with_part(algorithm, rule, like=population)
    everyone = np.arange(CLIENTS)

    def flat(params):
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])

    @jax.jit
    def step(state, key):
        """The state after a round, how far it moved the model, and how far each client would, alone and honest."""
        x = algorithm.params(state)
        plain = ModelState(x, jnp.int32(0))
        moved = lambda new: flat(new) - flat(x)  # noqa: E731
        own = jax.vmap(lambda i: moved(method.round(plain, population.cohort(i[None]), key)[0].params))(everyone)
        new, _ = algorithm.round(state, population.cohort(everyone), key)
        return new, moved(algorithm.params(new)), own

    def loss(state):
        return float(jnp.mean(softmax_loss(algorithm.params(state), population.examples, jax.random.key(0))))

    state = algorithm.init(softmax_params())
    losses = [loss(state)]
    for t in range(6):
        state, moved, own = step(state, jax.random.key(t))
        np.testing.assert_allclose(moved, by_hand(attacked_by_hand(np.asarray(own))), rtol=1e-9, atol=1e-13)
        losses.append(loss(state))
    if name == "mean":
        assert losses[-1] > 1.5 * losses[0]
    else:
        assert losses[-1] < 0.6 * losses[0]
