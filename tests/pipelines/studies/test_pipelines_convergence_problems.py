"""Every constant that `pipelines.studies.convergence.problems` states is measured on the examples themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines.studies.convergence import problems

MADE = {
    "different": lambda seed=0, **own: problems.quadratic(seed, dim=4, clients=5, **own),
    "equal": lambda seed=0, **own: problems.quadratic(seed, dim=4, clients=5, hessians="equal", **own),
    "flat": lambda seed=0, **own: problems.quadratic(seed, dim=5, clients=4, rank=3, **own),
    "sine": lambda seed=0, **own: problems.sine(seed, dim=3, clients=4, **own),
    "saturating": lambda seed=0, **own: problems.saturating(seed, dim=3, clients=4, **own),
    "logistic": lambda seed=0, **own: problems.logistic(seed, dim=3, clients=4, **own),
}
GIVEN = {"smoothness": 3.0, "zeta": 0.7, "sigma": 1.3, "radius": 2.0}


@functools.cache
def made(name):
    return MADE[name](1, **GIVEN)


@functools.partial(jax.jit, static_argnums=0)
def _each(loss_fn, x, examples):
    """Value, gradient and Hessian of every example by itself."""

    def one(example):
        alone = lambda x: loss_fn(x, jax.tree.map(lambda a: a[None], example), jax.random.key(0))[0]  # noqa: E731
        return alone(x), jax.grad(alone)(x), jax.hessian(alone)(x)

    return jax.vmap(one)(examples)


def each(problem, x):
    """Of every client and example: value [N, M], gradient [N, M, d], Hessian [N, M, d, d]."""
    clients = problem.data.population.num_clients
    found = _each(problem.loss_fn, jnp.asarray(x), problem.data.population.examples)
    return [np.asarray(a).reshape(clients, -1, *a.shape[1:]) for a in found]


def points(problem, how_many=8, far=3.0):
    rng = np.random.default_rng(0)
    return np.asarray(problem.data.optimum) + far * rng.normal(size=(how_many, len(problem.data.optimum)))


@pytest.mark.parametrize("name", MADE)
def test_zeta_and_sigma_are_exact_at_the_minimizer(name):
    problem = made(name)
    _, gradients, _ = each(problem, problem.data.optimum)
    of_clients = gradients.mean(1)
    assert np.linalg.norm(of_clients.mean(0)) < 1e-12
    np.testing.assert_allclose(np.mean(np.sum(of_clients**2, 1)), 0.7**2, rtol=1e-12)
    noise = gradients - of_clients[:, None]
    np.testing.assert_allclose(np.mean(np.sum(noise**2, 2), 1), np.full(len(noise), 1.3**2), rtol=1e-11)
    basis = np.asarray(problem.data.basis)
    covariance = np.einsum("nmi,nmj->nij", noise, noise) / noise.shape[1]
    isotropic = 1.3**2 / basis.shape[1] * basis @ basis.T
    np.testing.assert_allclose(covariance, np.broadcast_to(isotropic, covariance.shape), atol=1e-12)
    assert (problem.constants.zeta, problem.constants.sigma) == (0.7, 1.3)


@pytest.mark.parametrize("name", ["different", "equal", "flat", "sine", "saturating"])
def test_the_noise_is_the_same_everywhere(name):
    problem = made(name)
    for x in points(problem, 3):
        _, gradients, _ = each(problem, x)
        noise = gradients - gradients.mean(1, keepdims=True)
        np.testing.assert_allclose(np.mean(np.sum(noise**2, 2)), 1.3**2, rtol=1e-10)


@pytest.mark.parametrize("name", ["equal", "sine", "saturating"])
def test_dissimilarity_is_the_same_everywhere_where_hessians_are_equal(name):
    problem = made(name)
    assert problem.constants.dissimilarity == 0
    for x in points(problem, 3):
        of_clients = each(problem, x)[1].mean(1)
        spread = np.mean(np.sum((of_clients - of_clients.mean(0)) ** 2, 1))
        np.testing.assert_allclose(spread, 0.7**2, rtol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_the_whole_is_the_mean_of_the_clients(name):
    problem = made(name)
    for x in [*points(problem, 3), np.asarray(problem.data.optimum)]:
        values, gradients, _ = each(problem, x)
        np.testing.assert_allclose(
            problems.suboptimality(problem, x), values.mean() - problem.least, rtol=1e-10, atol=1e-13
        )
        norm = problems.gradient_norm(problem, jnp.asarray(x))
        np.testing.assert_allclose(norm, np.linalg.norm(gradients.mean((0, 1))), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", MADE)
def test_the_minimizer_is_one_and_the_start_as_far_as_was_said(name):
    problem = made(name)
    assert problems.gradient_norm(problem, problem.data.optimum) < 2 * problems.NEWTON
    assert abs(problems.suboptimality(problem, problem.data.optimum)) < 1e-15
    assert all(problems.suboptimality(problem, jnp.asarray(x)) > 0 for x in points(problem))
    np.testing.assert_allclose(problems.distance(problem, problem.data.start), 2.0, rtol=1e-12)


@pytest.mark.parametrize("name", MADE)
def test_hessians_lie_between_the_constants(name):
    """mu <= eigenvalues <= L for every client at random points, and L and mu are those of some client somewhere."""
    problem, known = made(name), made(name).constants
    convex = name not in ("sine", "saturating")
    lowest = {"sine": -known.smoothness / 2, "saturating": -known.smoothness / 4}.get(name, known.convexity)
    at = [*points(problem), np.asarray(problem.data.optimum), np.zeros(len(problem.data.optimum))]
    found = np.stack([np.linalg.eigvalsh(each(problem, x)[2].mean(1)) for x in at])
    assert found.max() <= known.smoothness * (1 + 1e-12)
    assert found.min() >= lowest - 1e-12
    np.testing.assert_allclose(found.max(), 3.0, rtol=1e-10)
    if name in ("different", "equal"):
        np.testing.assert_allclose(found.min(), 0.1, rtol=1e-10)
    if name == "flat":
        np.testing.assert_allclose(found[..., :2], 0, atol=1e-12)
        np.testing.assert_allclose(found[..., 2].min(), 0.1, rtol=1e-10)
    assert (known.convexity > 0) == (convex and name != "flat")


@pytest.mark.parametrize("name", ["different", "equal", "flat"])
def test_the_dissimilarity_of_hessians(name):
    problem = made(name)
    hessians = each(problem, problem.data.start)[2].mean(1)
    expected = max(np.linalg.norm(each - hessians.mean(0), 2) for each in hessians)
    np.testing.assert_allclose(problem.constants.dissimilarity, expected, atol=1e-12)
    assert (expected < 1e-12) == (name == "equal")


@pytest.mark.parametrize("name", [name for name in MADE if name != "saturating"])
def test_the_inequality_of_polyak_and_lojasiewicz(name):
    problem, pl = made(name), made(name).constants.pl
    assert pl > 0
    for x in [*points(problem, 30, 1.0), *points(problem, 30, 4.0)]:
        norm, excess = problems.gradient_norm(problem, jnp.asarray(x)), problems.suboptimality(problem, jnp.asarray(x))
        assert norm**2 >= 2 * pl * excess


def test_the_constant_of_the_sine_is_the_greatest():
    z = np.linspace(1e-3, 20, 400_001)
    least = np.min((2 * z + 3 * np.sin(2 * z)) ** 2 / (2 * (z**2 + 3 * np.sin(z) ** 2)))
    assert problems.SINE_PL < least < problems.SINE_PL + 1e-5
    assert made("sine").constants.pl == problems.SINE_PL * 3 / 8
    assert made("saturating").constants.pl == 0


def test_quadratics_are_those_around_their_own_minimizers():
    """f_i is 1/2 (x - b_i)' A_i (x - b_i) but for a constant."""
    problem = made("different")
    _, gradients, hessians = each(problem, problem.data.optimum)
    A, x = hessians.mean(1), points(problem, 1)[0]
    b = np.asarray(problem.data.optimum) - np.linalg.solve(A, gradients.mean(1)[..., None])[..., 0]
    np.testing.assert_allclose(each(problem, x)[1].mean(1), np.einsum("nij,nj->ni", A, x - b), rtol=1e-9)


def test_flat_directions_have_no_distance_and_no_slope():
    problem = made("flat")
    basis = np.asarray(problem.data.basis)
    aside = np.linalg.svd(basis.T)[2][-1]
    moved = problem.data.start + 5 * aside
    assert np.linalg.norm(basis.T @ aside) < 1e-12
    np.testing.assert_allclose(problems.distance(problem, moved), 2.0, rtol=1e-12)
    np.testing.assert_allclose(
        problems.suboptimality(problem, moved), problems.suboptimality(problem, problem.data.start), rtol=1e-10
    )
    # Tilts stay in the span, so that no client has a reason to leave.
    tilts = problem.data.population.examples["tilt"]
    np.testing.assert_allclose(tilts @ aside, 0, atol=1e-12)


def test_logistic_regression_keeps_what_is_not_prescribed():
    own = problems.logistic(1, dim=3, clients=4)
    np.testing.assert_allclose(own.data.population.examples["tilt"], 0, atol=1e-12)
    _, gradients, _ = each(own, own.data.optimum)
    np.testing.assert_allclose(own.constants.zeta**2, np.mean(np.sum(gradients.mean(1) ** 2, 1)), rtol=1e-10)
    assert own.constants.zeta > 0.05
    half = problems.logistic(1, dim=3, clients=4, zeta=0.0)
    _, gradients, _ = each(half, half.data.optimum)
    np.testing.assert_allclose(gradients.mean(1), 0, atol=1e-12)
    assert half.constants.sigma == own.constants.sigma
    np.testing.assert_array_equal(half.data.optimum, own.data.optimum)
    spread = np.mean(np.sum((gradients - gradients.mean(1, keepdims=True)) ** 2, 2))
    np.testing.assert_allclose(spread, half.constants.sigma**2, rtol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_constants_change_neither_the_draw_nor_the_whole(name):
    """Other zeta and sigma: the same F, x* and start, so that what differs between curves is what they do."""
    one, other = MADE[name](3, zeta=0.0, sigma=0.0), MADE[name](3, zeta=2.0, sigma=1.0)
    for a, b in zip(
        jax.tree.leaves((one.data.start, one.data.optimum, one.data.whole)),
        jax.tree.leaves((other.data.start, other.data.optimum, other.data.whole)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(MADE[name](4).data.optimum, one.data.optimum)


@pytest.mark.parametrize(
    ("make", "own", "said"),
    [
        ("quadratic", {"rank": 11}, "rank=11 is above dim=10"),
        ("quadratic", {"rank": 0}, "rank must be an integer of at least 1"),
        ("quadratic", {"convexity": 2.0}, "convexity=2.0 must lie above 0 and be at most smoothness=1.0"),
        ("quadratic", {"convexity": 0.0}, "convexity=0.0 must lie above 0"),
        ("quadratic", {"rank": 1}, "one eigenvalue cannot be both"),
        ("quadratic", {"hessians": "alike"}, "hessians must be one of 'different', 'equal'"),
        ("quadratic", {"clients": 1}, "zeta=1.0 with clients=1"),
        ("quadratic", {"zeta": -1.0}, "zeta must lie in"),
        ("sine", {"sigma": float("nan")}, "sigma must"),
        ("sine", {"smoothness": 0.0}, "smoothness must lie in"),
        ("saturating", {"dim": 0}, "dim must be an integer"),
        ("logistic", {"convexity": 1.0}, "convexity=1.0 must lie above 0 and below smoothness=1.0"),
        ("logistic", {"copies": 0}, "copies must be an integer"),
    ],
)
def test_bad_input(make, own, said):
    with pytest.raises(ValueError, match=said):
        problems.KINDS[make](**own)


def test_single_precision_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64 is off: call this within"):
        problems.quadratic()


@pytest.mark.parametrize("name", MADE)
def test_the_curvature_at_the_minimizer(name):
    problem = made(name)
    hessian = each(problem, problem.data.optimum)[2].mean((0, 1))
    basis = np.asarray(problem.data.basis)
    found = np.linalg.eigvalsh(basis.T @ hessian @ basis)[0]
    np.testing.assert_allclose(problem.constants.curvature, found, rtol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_the_loss_of_a_batch_is_that_of_its_examples(name):
    problem = made(name)
    x = problem.data.start
    rows = jax.tree.map(lambda a: a[: len(x)], problem.data.population.examples)  # as many as dimensions, or fewer
    alone = each(problem, x)[0].ravel()[: len(x)]
    np.testing.assert_allclose(problem.loss_fn(x, rows, jax.random.key(0)), alone, rtol=1e-12, atol=1e-14)
