"""FRL against a slow, obvious program in NumPy, and what its votes promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms import messages
from algorithms.parts import rankings
from algorithms.parts.selection import largest
from fedjax_core import samplers
from tests.problems import softmax_loss, softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
POPULATION = softmax_population(SIZES)
KEY = jax.random.key(7)
N = 15  # edges of the model


def make(*, lr=2.0, **settings):
    settings = {"batch_size": 2, "order": "sequential", **settings}
    return algorithms.frl(softmax_loss, optax.sgd(lr), **settings)


def sorted_by(values):
    return np.array(sorted(range(len(values)), key=lambda e: (values[e], e)))


class Slow:
    """FRL with lists, sorting and loops, for softmax regression with one kernel."""

    def __init__(self, state, *, lr, kept, sent, importance):
        self.theta, self.first = np.asarray(state.weights["w"]), np.asarray(state.scores["w"])
        self.ranking, self.lr, self.importance = np.asarray(state.ranking["w"]), lr, importance
        self.dropped, self.unlisted = int((1 - kept) * N + 1e-9), int((1 - sent) * N + 1e-9)

    def scores(self):
        s = np.zeros(N)
        for place, edge in enumerate(self.ranking):
            s[edge] = self.first[place]
        return s

    def model(self, s):
        mask = np.ones(N)
        mask[sorted_by(s if self.importance == "signed" else np.abs(s))[: self.dropped]] = 0
        return self.theta * mask.reshape(self.theta.shape)

    def vote(self, client, bias):
        s = self.scores()
        for at in range(0, len(client["y"]), 2):
            x, y = np.asarray(client["x"][at : at + 2]), np.asarray(client["y"][at : at + 2])
            z = x @ self.model(s) + bias
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            g = (x.T @ (p - np.eye(3)[y]) / len(y) * self.theta).reshape(-1)  # of every edge
            s = s - self.lr * (g if self.importance == "signed" else g * np.sign(s))
        return sorted_by(np.abs(s) if self.importance == "abs" else s)

    def round(self, ids):
        votes = np.zeros(N, int)
        for i in ids:
            for place, edge in enumerate(self.vote(POPULATION.client(i), np.zeros(3))):
                votes[edge] += place if place >= self.unlisted else 0
        self.ranking = sorted_by(votes)


@pytest.mark.parametrize(
    "settings",
    [
        {"kept": 0.5, "sent": 1.0, "importance": "signed"},
        {"kept": 0.3, "sent": 0.6, "importance": "signed"},
        {"kept": 0.5, "sent": 1.0, "importance": "abs"},
        {"kept": 0.8, "sent": 1.0, "importance": "released"},
    ],
)
def test_rounds_are_those_of_a_slow_program(settings):
    method = make(**settings)
    state = method.init(softmax_params(), KEY)
    slow, round = Slow(state, lr=2.0, **settings), jax.jit(method.round)
    rankings_seen = {tuple(slow.ranking)}
    for t, ids in enumerate(([0, 1, 3, -1], [5, 2, 4, 3], [1, -1, 0, 5])):
        state, metrics = round(state, POPULATION.cohort(ids), jax.random.key(t))
        slow.round([i for i in ids if i >= 0 and SIZES[i]])
        np.testing.assert_array_equal(state.ranking["w"], slow.ranking)
        np.testing.assert_array_equal(method.params(state)["w"], slow.model(slow.scores()))
        assert metrics.extra.refused == 0
        assert metrics.bytes_down == N * 4 / 8
        assert metrics.bytes_up == (N - slow.unlisted) * 4 / 8
        rankings_seen.add(tuple(slow.ranking))
    assert len(rankings_seen) == 4


def test_gradients_go_straight_through_the_mask():
    """dL/ds = (x' dL/dy) theta for y = x (theta m), also where m is 0."""
    seen = []

    def spy(gradient, opt_state, params=None):
        jax.debug.callback(seen.append, gradient["w"])
        return gradient, opt_state

    optimizer = optax.GradientTransformation(lambda params: (), spy)
    method = algorithms.frl(softmax_loss, optimizer, batch_size=8, order="sequential", kept=0.3, plan=fc.Plan(lanes=1))
    state = jax.jit(method.init)(softmax_params(), KEY)
    jax.block_until_ready(jax.jit(method.round)(state, POPULATION.cohort([3]), KEY))
    client, model = jax.tree.map(np.asarray, (POPULATION.client(3), method.params(state)))
    z = np.exp(client["x"] @ model["w"])
    p = z / z.sum(1, keepdims=True)
    expected = client["x"].T @ (p - np.eye(3)[client["y"]]) / 8 * np.asarray(state.weights["w"])
    np.testing.assert_allclose(seen[0], expected, rtol=1e-12)
    assert np.all(np.asarray(seen[0])[model["w"] == 0] != 0)


def test_what_is_drawn_and_what_is_kept():
    params = {
        "conv": jnp.ones((3, 3, 4, 8)),
        "norm": jnp.full(8, 1.5),
        "dense": jnp.ones((50, 40)),
        "bias": jnp.ones(40),
    }
    method = make(kept=0.3)
    init = jax.jit(method.init)
    state = init(params, KEY)
    model = method.params(state)
    for name, fan_in in (("conv", 36), ("dense", 50)):
        weights = np.asarray(state.weights[name])
        np.testing.assert_allclose(np.abs(weights), np.sqrt(2 / fan_in), rtol=1e-6)
        assert abs(np.mean(weights > 0) - 0.5) < 0.1
        first = np.asarray(state.scores[name])
        assert np.all(np.diff(first) >= 0)
        assert 0.9 / np.sqrt(fan_in) < first[-1] <= 1 / np.sqrt(fan_in)
        kept = np.count_nonzero(model[name])
        assert kept == weights.size - int(0.7 * weights.size)
    np.testing.assert_array_equal(model["norm"], params["norm"])
    np.testing.assert_array_equal(model["bias"], params["bias"])
    other = init(params, jax.random.key(8))
    assert not np.array_equal(other.weights["dense"], state.weights["dense"])


def test_messages_are_smaller_than_those_of_floats():
    """The paper's network of eight convolutional layers has 5,275,840 edges, of which floats take 20.13 MiB."""
    edges = [1728, 36864, 73728, 147456, 294912, 589824, 1179648, 2359296, 524288, 65536, 2560]
    params = {f"layer {i}": jax.ShapeDtypeStruct((n // 2, 2), jnp.float32) for i, n in enumerate(edges)}
    population = fc.Population.from_sizes({"x": np.ones((1, 1))}, [1])

    def loss(params, batch, key):
        return batch["x"][:, 0] * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    method = algorithms.frl(loss, optax.sgd(0.1), batch_size=1)
    stated = []

    def around(state, asked, key):
        stated.append(asked.shared.bytes)
        return asked.run(), (), ()

    method = fc.with_part(method, fc.Part(around), like=population)
    jax.eval_shape(lambda params: method.round(method.init(params, KEY), population.cohort([0]), KEY), params)
    floats = fc.num_bytes(params)
    assert floats == pytest.approx(20.13 * 2**20, rel=1e-3)
    assert stated[-1] == sum(n * int(np.ceil(np.log2(n))) for n in edges) / 8
    assert 0.62 < stated[-1] / floats < 0.67


# What the votes promise.


SLOTS = 6


@functools.cache
def election(n, sent):
    """`(votes [SLOTS, n], start [n], ids [SLOTS]) -> (ranking, refused)`, a round in which clients send these votes."""
    population = fc.Population.from_sizes({"x": np.ones((SLOTS, 1))}, [1] * SLOTS)

    def loss(params, batch, key):
        return batch["x"] @ params["w"] @ jnp.ones(n)

    method = algorithms.frl(loss, optax.sgd(0.1), batch_size=1, sent=sent)

    @jax.jit
    def run(votes, start, ids):
        def instead(state, asked, key):
            return asked.changed(lambda uploads, weights: {"w": votes}).run(), (), ()

        stuffed = fc.with_part(method, fc.Part(instead), like=population)
        state = stuffed.init({"w": jnp.ones((1, n))}, KEY)
        state = state._replace(method=state.method._replace(ranking={"w": start}))
        state, metrics = stuffed.round(state, population.cohort(ids), KEY)
        return state.method.ranking["w"], metrics.extra.method.refused

    return run


def elected(votes, start=(0, 1, 2, 3, 4, 5), sent=1.0):
    padded, ids = np.zeros((SLOTS, 6), np.int32), np.full(SLOTS, -1)
    padded[: len(votes)], ids[: len(votes)] = votes, np.arange(len(votes))
    ranking, refused = election(6, sent)(padded, np.asarray(start, np.int32), ids)
    return list(np.asarray(ranking)), int(refused)


def test_everyone_of_one_opinion_is_the_result():
    opinion = [3, 1, 5, 0, 2, 4]
    np.testing.assert_array_equal(elected([opinion] * 3)[0], opinion)


def test_two_opposite_opinions_give_the_order_of_the_edges():
    opinion = [3, 1, 5, 0, 2, 4]
    np.testing.assert_array_equal(elected([opinion, opinion[::-1]])[0], range(6))


def test_the_order_of_clients_and_the_names_of_edges_do_not_matter():
    rng = np.random.default_rng(0)
    while True:  # votes without ties
        votes = np.stack([rng.permutation(6) for _ in range(3)])
        if len(set(np.argsort(votes, axis=1).sum(0))) == 6:
            break
    result = elected(votes)[0]
    np.testing.assert_array_equal(elected(votes[::-1])[0], result)
    names = rng.permutation(6)
    np.testing.assert_array_equal(elected(names[votes])[0], names[result])
    assert np.argsort(votes, axis=1).sum() == 3 * 6 * 5 / 2


def test_what_is_no_ranking_does_not_count():
    good, bad = [3, 1, 5, 0, 2, 4], [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6], [0, -1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 99]]
    ranking, refused = elected([good, *bad])
    np.testing.assert_array_equal(ranking, good)
    assert refused == 4
    ranking, refused = elected(bad, start=[5, 4, 3, 2, 1, 0])
    np.testing.assert_array_equal(ranking, [5, 4, 3, 2, 1, 0], "without a vote everything stays")
    ranking, refused = elected([[-1, -1, -1, 0, 2, 4], [-1, -1, 5, 0, 2, 4], good], sent=0.5)
    np.testing.assert_array_equal(ranking, [1, 3, 5, 0, 2, 4])
    assert refused == 2


def test_no_more_than_the_bound_can_be_moved_by_malicious_clients():
    benign, n = [[0, 1, 2, 3, 4, 5]] * 3, 6
    places = np.argsort(benign, axis=1).sum(0)
    worst = [5, 4, 3, 2, 1, 0]
    for low in range(n):
        for high in range(low + 1, n):
            if places[high] - places[low] > n - 1:
                # The ranking that does the most for the lower of the two, with one malicious client.
                others = [e for e in worst if e not in (low, high)]
                ranking, _ = elected([*benign, [high, *others, low]])
                assert ranking.index(high) > ranking.index(low)
    # It is tight: edges 0 and 5, n - 1 apart in the vote of one client, are equal after one malicious one.
    ranking, _ = elected([benign[0], [5, 1, 2, 3, 4, 0]])
    assert ranking.index(5) == ranking.index(0) + 1


def test_votes_are_exact_beyond_what_floats_hold():
    """300 clients that differ in two edges of 2^17: sums of 4e7, of which float32 holds every fourth."""
    n, clients, add = 2**17, 300, fc.integer_sum()

    def vote(i):
        return jnp.arange(n).at[:2].set(jnp.where(i % 3 == 0, jnp.array([1, 0]), jnp.array([0, 1]))).at[-1].set(n - 1)

    def one(total, i):
        return total + add.lift(rankings.reputation(vote(i)), jnp.ones(())), ()

    total, _ = jax.jit(lambda ids: jax.lax.scan(one, jnp.zeros(n, jnp.uint32), ids))(jnp.arange(clients))
    expected = clients * np.arange(n)
    expected[:2] = [clients // 3, clients - clients // 3]
    np.testing.assert_array_equal(add.finish(total), expected)


def test_a_vote_depends_on_the_order_of_scores_alone():
    s = jax.random.normal(KEY, (50,))
    np.testing.assert_array_equal(rankings.ranking(s), rankings.ranking(3 * s + 7))
    np.testing.assert_array_equal(rankings.reputation(rankings.ranking(s)), np.argsort(np.argsort(s)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("ties", ["first", "last"])
def test_the_largest_are_those_of_a_stable_sort(dtype, ties):
    x = jnp.round(2 * jax.random.normal(KEY, (3, 20), jnp.float32)).astype(dtype)  # many are equal, some -0
    flat = np.asarray(x, np.float64).reshape(-1)
    order = np.argsort(flat, kind="stable") if ties == "last" else np.argsort(-flat, kind="stable")[::-1]
    for k in (0, 1, 7, 30, 60):
        expected = np.zeros(60, bool)
        expected[order[60 - k :]] = True
        np.testing.assert_array_equal(jax.jit(lambda x, k: largest(x, k, ties=ties))(x, k), expected.reshape(3, 20))


@pytest.mark.parametrize(("share", "n", "count"), [(0.5, 15, 8), (0.8, 10, 8), (0.3, 10, 3), (1.0, 7, 7), (0.1, 5, 1)])
def test_shares_are_counted_alike_in_both_precisions(share, n, count):
    assert rankings.listed(share, n) == count
    for x64 in (False, True):
        with jax.enable_x64(x64):
            assert jax.jit(lambda share: rankings.listed(share, n))(share) == count


# A minority does not break it.


def mlp_loss(params, batch, key):
    logits = jnp.maximum(batch["x"] @ params["in"], 0) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def learned(method, rounds=20):
    population, held_out = separable(0), separable(1)
    run = jax.jit(fc.simulate(method, samplers.full(10), rounds))
    start = np.random.default_rng(0)
    params = {"in": start.normal(size=(20, 32)) / 4, "out": start.normal(size=(32, 4)) / 4}
    state, _ = run(params, population, KEY)
    loss = mlp_loss(method.params(state), held_out.examples, KEY)
    return float(np.mean(loss < np.log(2)))


def separable(seed):
    centers = np.random.default_rng(5).normal(size=(4, 20))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, 200).astype(np.int32)
    x = centers[y] + 1.2 * rng.normal(size=(200, 20))
    return fc.Population.from_sizes({"x": x, "y": y}, [20] * 10)


def test_a_minority_that_reverses_rankings_does_not_break_it():
    malicious, population = np.arange(10) < 2, separable(0)
    local = {"batch_size": 10, "num_epochs": 2}
    honest = algorithms.frl(mlp_loss, optax.sgd(0.4, 0.9), **local)
    attacked = fc.with_part(honest, messages.rank_reversal(malicious), like=population)
    fedavg = algorithms.fedavg(mlp_loss, optax.sgd(0.2), **local)
    flipped = fc.with_part(fedavg, messages.sign_flip(malicious, factor=10.0), like=population)
    good, under_attack = learned(honest), learned(attacked)
    print(good, under_attack, learned(flipped), learned(fedavg))
    assert good > 0.85
    assert under_attack > good - 0.1
    assert learned(flipped) < 0.5


def test_malicious_clients_send_the_reverse_of_what_they_would_elect():
    malicious = np.array([1, 0, 0, 1, 1, 0], bool)

    def observed(state, asked, key):
        seen = []
        results = asked.changed(lambda uploads, weights: seen.append(uploads) or uploads).run()
        return results, (), seen[0]["w"]

    look, method = fc.Part(observed), make()
    for part in (look, messages.rank_reversal(malicious), look):
        method = fc.with_part(method, part, like=POPULATION)
    state = jax.jit(method.init)(softmax_params(), KEY)
    _, metrics = jax.jit(method.round)(state, POPULATION.cohort([0, 1, 3, -1, 5]), KEY)
    after, attack = metrics.extra.passes[0], metrics.extra.method
    before = attack.method.passes[0]
    assert attack.passes[0] == 2
    votes = sum(np.argsort(before[slot]) for slot in (0, 2))
    for slot in (0, 2):
        np.testing.assert_array_equal(after[slot], np.argsort(-votes, kind="stable"))
    np.testing.assert_array_equal(after[jnp.array([1, 4])], before[jnp.array([1, 4])])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kept": 0.0}, r"kept must lie in \(0, 1\]"),
        ({"sent": 1.5}, r"sent must lie in \(0, 1\]"),
        ({"importance": "size"}, "importance must be"),
        ({"weights": "examples"}, "weights='examples' means nothing to frl, where every client has one vote"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_models_and_uploads_that_cannot_be_ranked_are_refused():
    with pytest.raises(ValueError, match="frl ranks the edges of leaves with two axes or more, and the model has none"):
        make().init({"b": jnp.ones(3)}, KEY)
    with pytest.raises(ValueError, match="needs a key"):
        make().init(softmax_params())
    fedavg = algorithms.fedavg(softmax_loss, optax.sgd(0.1))
    reversed_ = fc.with_part(fedavg, messages.rank_reversal(np.ones(6, bool)), like=POPULATION)
    with pytest.raises(
        TypeError, match=r"rank_reversal reverses rankings, integers \[n\], and what this method's clients upload"
    ):
        jax.eval_shape(reversed_.round, reversed_.init(softmax_params()), POPULATION.cohort([0, 1]), KEY)
    robust = fc.with_part(make(), messages.krum(1), like=POPULATION)
    state = jax.eval_shape(robust.init, softmax_params(), KEY)
    with pytest.raises(TypeError, match="krum takes the place of a weighted mean"):
        jax.eval_shape(robust.round, state, POPULATION.cohort([0, 1]), KEY)
    with pytest.raises(TypeError, match="integer_sum adds up integers, but the upload has a leaf of float"):
        fc.integer_sum().lift({"w": jnp.ones(2)}, jnp.ones(()))


def test_large_cohorts_of_large_leaves_cannot_be_counted():
    method = make()
    state = jax.eval_shape(lambda: method.init({"w": jnp.ones((2**12, 2**12)), "b": jnp.ones(3)}, KEY))
    cohort = softmax_population([1] * 300).cohort(np.arange(300))
    with pytest.raises(ValueError, match="the cohort has 300 slots, and of a leaf of 16777216 edges the votes"):
        jax.eval_shape(method.round, state, cohort, KEY)
