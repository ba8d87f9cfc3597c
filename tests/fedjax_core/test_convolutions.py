"""Rewritten convolutions and pooling are JAX's own, in every program they stand in, and fast where it matters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import algorithms
from fedjax_core import Plan, Population, client_mesh, convolutions, evaluate_examples

NHWC = ("NHWC", "HWIO", "NHWC")


def close(want, got, tolerance=1e-12):
    def check(w, g):
        assert w.dtype == g.dtype
        scale = max(1.0, float(jnp.max(jnp.abs(w), initial=0.0)))
        np.testing.assert_allclose(w, g, rtol=tolerance, atol=tolerance * scale)

    jax.tree.map(check, want, got)


def compare(function, *args, tolerance=1e-12):
    """One compilation of both."""
    want, got = jax.jit(lambda *args: (function(*args), convolutions.rewritten(function)(*args)))(*args)
    close(want, got, tolerance)


def conv(x, kernel, strides=(1, 1), padding="SAME"):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def lowered(function, *args, platform="cpu"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def arrays(*shapes, dtype=float):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def random_case(seed):
    """(function, images, kernel) of one to three axes with everything that a convolution can have, in any order."""
    rng = np.random.default_rng(seed)
    axes = 1 + seed % 3
    groups, batch_groups = [(1, 1), (1, 1), (2, 1), (6, 1), (1, 2)][seed % 5]
    batch, channels, features = batch_groups * int(rng.integers(1, 4)), *(int(n) for n in rng.integers(1, 4, 2))
    channels, features = groups * channels, groups * batch_groups * features
    if groups == 6:
        channels = features = 6  # depthwise
    while True:
        size, kernel = rng.integers(3, 9, axes), rng.integers(1, 4, axes)
        kernel = kernel * 0 + 1 if seed % 7 == 0 else kernel
        stride, lhs_dilation, rhs_dilation = (tuple(map(int, rng.choice([1, 1, 2, 3], axes))) for _ in range(3))
        padding = tuple((int(low), int(high)) for low, high in rng.integers(-1, 4, (axes, 2)))
        span = (size - 1) * lhs_dilation + np.sum(padding, axis=1) - (kernel - 1) * rhs_dilation
        if (span >= 0).all():
            break
    orders = [tuple(map(int, rng.permutation(axes + 2))) for _ in range(3)]
    lhs, rhs = np.zeros(axes + 2, int), np.zeros(axes + 2, int)
    lhs[list(orders[0])] = [batch, channels, *size]
    rhs[list(orders[1])] = [features, channels // groups, *kernel]
    numbers = lax.ConvDimensionNumbers(*orders)

    def function(x, k):
        return lax.conv_general_dilated(
            x, k, stride, padding, lhs_dilation, rhs_dilation, numbers, groups, batch_groups
        )

    return function, jnp.asarray(rng.normal(size=lhs)), jnp.asarray(rng.normal(size=rhs))


@pytest.mark.parametrize("seed", range(15))
def test_any_convolution_and_its_gradients(seed, monkeypatch):
    monkeypatch.setattr(convolutions, "SHORT_SUM", 8)  # so that small kernels, too, are taken by rows
    convolutions._by_platform.clear_cache()
    with jax.enable_x64(True):
        function, x, k = random_case(seed)

        def all_of_it(x, k):
            out, vjp = jax.vjp(function, x, k)
            return out, vjp(jnp.sin(out))

        compare(all_of_it, x, k)
        if seed % 3 == 0:
            compare(jax.vmap(all_of_it), jnp.stack([x, 2 * x]), jnp.stack([k, k + 1]))
    convolutions._by_platform.clear_cache()


@pytest.mark.quick
def test_inside_of_every_other_program():
    with jax.enable_x64(True):
        x, k = arrays((2, 6, 6, 3), (3, 3, 3, 3))

        @jax.custom_vjp
        def own(x, k):
            return conv(x, k)

        own.defvjp(lambda x, k: (conv(x, k), (x, k)), lambda kept, g: jax.vjp(conv, *kept)[1](2 * g))
        squared = jax.custom_jvp(lambda x, k: conv(x, k) ** 2)
        squared.defjvp(lambda p, t: (conv(*p) ** 2, 2 * conv(*p) * jax.jvp(conv, p, t)[1]))

        def loss(k, x):
            def body(h, _):
                h = jnp.tanh(jax.checkpoint(conv)(h, k))
                h = lax.cond(h.sum() > 0, lambda h: own(h, k), lambda h: jax.jit(squared)(h, k), h)
                return h, None

            h = lax.scan(body, x, None, length=2)[0]
            return jnp.sum(jnp.sin(h))

        def all_of_it(k, x):
            again = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, conv(s[1], k)), (0, x))
            tangent = jax.jvp(lambda k: conv(x, k).sum(axis=0), (k,), (x[0, :3, :3, :, None] * k,))
            return jax.value_and_grad(loss)(k, x), again, tangent

        compare(all_of_it, k, x)
        text = lowered(convolutions.rewritten(all_of_it), k, x)
        assert set(re.findall(r"dim_numbers = (.*?), window", text)) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
        second = jax.hessian(lambda k: jnp.sum(conv(x[:1], k) ** 3))
        compare(second, k[..., :1, :1][..., :1].repeat(3, 2))
        # Differentiated after it was rewritten, and mapped.
        fast = convolutions.rewritten(lambda k: jnp.sum(conv(x, k) ** 2))
        close(jax.grad(lambda k: jnp.sum(conv(x, k) ** 2))(k), jax.jit(jax.grad(fast))(k))
        close(jax.vmap(fast)(jnp.stack([k, -k])), jnp.stack([fast(k), fast(-k)]))


@pytest.mark.quick
def test_pooling_gives_equal_bits_and_the_gradient_to_the_first_of_equal_entries():
    rng = np.random.default_rng(0)
    for shape, window in [((2, 5, 6, 3), (1, 2, 2, 1)), ((2, 3, 7, 6), (1, 1, 3, 2)), ((4, 9), (1, 3))]:
        x = rng.integers(0, 3, shape).astype(np.float32)
        x.flat[3] = np.nan

        def pool(x, window=window):
            return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")

        def both(x, pool=pool):
            out, vjp = jax.vjp(pool, x)
            return out, vjp(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))

        for want, got in zip(both(x), jax.jit(convolutions.rewritten(both))(x), strict=True):
            np.testing.assert_array_equal(want, got)
        assert not re.search("reduce_window|select_and_scatter", lowered(convolutions.rewritten(both), x))


def test_other_pooling_stays():
    def pool(x):
        overlapping = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        return overlapping, lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")

    closed = jax.make_jaxpr(pool)(jnp.ones((1, 5, 5, 1)))
    assert convolutions.rewrite(closed) is closed


@pytest.mark.quick
def test_a_program_without_convolutions_is_the_same_object():
    def function(x):
        return lax.scan(lambda c, _: (jnp.sin(c) @ x, None), x, None, length=3)[0]

    closed = jax.make_jaxpr(jax.jit(jax.grad(lambda x: function(x).sum())))(jnp.ones((3, 3)))
    assert convolutions.rewrite(closed) is closed
    assert not convolutions.has_any(closed.jaxpr)
    integers = jax.make_jaxpr(conv)(jnp.ones((1, 4, 4, 1), int), jnp.ones((3, 3, 1, 1), int))
    assert convolutions.rewrite(integers) is integers


@pytest.mark.quick
def test_other_platforms_get_the_program_as_it_was():
    x, k = arrays((2, 6, 6, 3), (3, 3, 3, 4), dtype=jnp.float32)

    def both(x, k):
        return jax.vjp(conv, x, k)[1](jnp.ones((2, 6, 6, 4), jnp.float32))

    def convolutions_in(function, platform):
        return re.findall(r"stablehlo.convolution\(.*\) (dim_numbers.*?\})", lowered(function, x, k, platform=platform))

    for platform in ("tpu", "cuda"):
        found = convolutions_in(convolutions.rewritten(both), platform)
        assert len(found) == 2
        assert found == convolutions_in(both, platform)
    assert convolutions_in(convolutions.rewritten(both), "cpu") != convolutions_in(both, "cpu")


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_half_precision(preferred, monkeypatch):
    monkeypatch.setattr(convolutions, "SHORT_SUM", 8)
    convolutions._by_platform.clear_cache()
    for shapes, groups in [(((2, 6, 6, 4), (3, 3, 4, 4)), 1), (((2, 6, 6, 4), (3, 3, 1, 4)), 4)]:
        x, k = arrays(*shapes, dtype=jnp.bfloat16)

        def function(x, k, groups=groups):
            return lax.conv_general_dilated(
                x, k, (1, 1), "SAME", None, None, NHWC, groups, preferred_element_type=preferred
            )

        compare(function, x, k, tolerance=1e-2)
        if preferred is None:
            compare(lambda x, k, f=function: jax.vjp(f, x, k)[1](f(x, k)), x, k, tolerance=2e-2)
    convolutions._by_platform.clear_cache()


def network(params, x):
    x = jax.nn.relu(conv(x, params["a"]))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return conv(x, params["b"], strides=(2, 2)).mean(axis=(1, 2))


@pytest.mark.parametrize("plan", [{"lanes": 1}, {"lanes": 2}, {"lanes": 2, "mesh": 2}])
def test_a_round(plan):
    """Fast and as written, of clients of unequal sizes, and in a batch of two seeds."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        examples = {"x": rng.normal(size=(14, 6, 6, 2)), "y": rng.integers(0, 3, 14)}
        population = Population.from_sizes(examples, [5, 2, 7])
        params = dict(zip("ab", arrays((3, 3, 2, 4), (3, 3, 4, 3)), strict=True))

        def loss(params, batch, key):
            return optax.softmax_cross_entropy_with_integer_labels(network(params, batch["x"]), batch["y"])

        def rounds(fast):
            mesh = client_mesh(plan["mesh"]) if "mesh" in plan else None
            method = algorithms.fedavg(
                loss, optax.sgd(0.1), batch_size=2, plan=Plan(plan["lanes"], mesh, fast_convolutions=fast)
            )
            state, cohort = method.init(params), population.cohort(jnp.arange(3))
            return lambda keys: jax.vmap(lambda key: method.params(method.round(state, cohort, key)[0]))(keys)

        keys = jax.random.split(jax.random.key(0), 2)
        close(jax.jit(rounds(False))(keys), jax.jit(rounds(True))(keys))
        text = lowered(rounds(True), keys)
        assert set(re.findall(r"dim_numbers = (.*?), window", text)) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
        assert "feature_group_count = 2" not in text


def test_fast_convolutions_is_a_bool():
    with pytest.raises(TypeError, match="fast_convolutions must be True or False, got 'no'"):
        Plan(fast_convolutions="no")


def test_evaluation():
    """A model whose images are NCHW, as Equinox has them, is evaluated in the processor's order."""
    with jax.enable_x64(True):
        x, k = arrays((5, 2, 4, 4), (3, 2, 3, 3))

        def metric(params, batch):
            return lax.conv_general_dilated(batch["x"], params, (1, 1), "SAME").mean(axis=(1, 2, 3))

        def run(k, x):
            return evaluate_examples(metric, k, {"x": x}, batch_size=2)

        close(metric(k, {"x": x}), jax.jit(run)(k, x))
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in lowered(run, k, x)
        close(jax.grad(lambda k: metric(k, {"x": x}).sum())(k), jax.jit(jax.grad(lambda k: run(k, x).sum()))(k))


@pytest.mark.parametrize("check", [False, True])
def test_inside_shard_map(check):
    """Where JAX checks what differs between devices, convolutions stay as they are."""
    x, k = arrays((2, 4, 4, 2), (3, 3, 2, 2))
    mesh, spec = client_mesh(2), jax.sharding.PartitionSpec

    def loss(k, x):
        def local(k, x):
            return lax.psum(jnp.sum(conv(x, k) ** 2), "clients")

        own = spec("clients")
        return jax.shard_map(local, mesh=mesh, in_specs=(spec(), own), out_specs=spec(), check_vma=check)(k, x)

    compare(jax.value_and_grad(loss), k, x, tolerance=1e-5)
    assert convolutions.has_any(jax.make_jaxpr(loss)(k, x).jaxpr) is not check
