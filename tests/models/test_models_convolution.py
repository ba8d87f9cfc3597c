"""The dot convolution is lax's, forwards and backwards, and says so when it cannot be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models.convolution import convolution, dot_conv_general_dilated, max_pool_2x2

LAYOUT = ("NHWC", "HWIO", "NHWC")


def _native(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _dots(x, kernel, strides, padding):
    return dot_conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _arrays(image, kernel, clients=None, seed=0):
    rng = np.random.default_rng(seed)
    stack = () if clients is None else (clients,)
    return jnp.asarray(rng.normal(size=(*stack, *image))), jnp.asarray(rng.normal(size=(*stack, *kernel)))


def _outputs_and_gradients(conv, x, kernel):
    """Outputs, and both gradients of a loss whose cotangent differs at every output."""
    out, vjp = jax.vjp(conv, x, kernel)
    return out, vjp(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding"),
    [
        ((2, 7, 6, 1), (5, 5, 1, 3), (1, 1), "SAME"),
        ((2, 7, 6, 3), (3, 3, 3, 2), (2, 2), "SAME"),
        ((2, 7, 6, 3), (3, 3, 3, 2), (2, 2), "SAME_LOWER"),
        ((2, 8, 8, 12), (3, 3, 12, 4), (1, 1), "SAME"),
        ((1, 8, 9, 2), (3, 2, 2, 2), (2, 3), "VALID"),
        ((2, 8, 8, 2), (3, 3, 2, 2), (2, 2), ((1, 1), (1, 1))),
        ((2, 5, 6, 2), (4, 3, 2, 2), (1, 2), ((0, 3), (2, 1))),
        ((2, 5, 5, 4), (1, 1, 4, 3), (1, 1), "SAME"),
        ((2, 5, 6, 4), (1, 1, 4, 3), (2, 2), "VALID"),
        ((2, 3, 3, 2), (3, 3, 2, 5), (1, 1), "VALID"),
        ((0, 4, 4, 2), (3, 3, 2, 2), (1, 1), "SAME"),
    ],
)
def test_equals_lax_forwards_and_backwards(image, kernel, strides, padding):
    with jax.enable_x64(True):
        x, k = _arrays(image, kernel)

        # One compilation for all: eager gradients would compile every operation of every case by itself.
        @jax.jit
        def run(x, k):
            def dots(patches):
                return lambda x, k: dot_conv_general_dilated(
                    x, k, strides, padding, dimension_numbers=LAYOUT, patches=patches
                )

            native = _outputs_and_gradients(lambda x, k: _native(x, k, strides, padding), x, k)
            return native, [_outputs_and_gradients(dots(p), x, k) for p in ("rows", "full", "auto")]

        want, results = run(x, k)
        for got in results:
            assert got[0].dtype == jnp.float64
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, want)


@pytest.mark.parametrize("patches", ["rows", "full"])
def test_vmap_over_client_kernels_equals_a_loop(patches):
    with jax.enable_x64(True):
        xs, ks = _arrays((2, 6, 6, 3), (3, 3, 3, 2), clients=3)

        def both(x, k):
            return _outputs_and_gradients(
                lambda x, k: dot_conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT, patches=patches),
                x,
                k,
            )

        got = jax.jit(jax.vmap(both))(xs, ks)
        native = jax.jit(lambda x, k: _outputs_and_gradients(lambda x, k: _native(x, k, (1, 1), "SAME"), x, k))
        for c in range(3):
            want = native(xs[c], ks[c])
            jax.tree.map(lambda a, b, c=c: np.testing.assert_allclose(a[c], b, rtol=1e-10, atol=1e-10), got, want)


def test_forward_mode_and_second_derivatives_work():
    with jax.enable_x64(True):
        x, k = _arrays((1, 4, 4, 1), (3, 3, 1, 2))

        def loss(conv):
            return lambda k: jnp.sum(jnp.tanh(conv(x, k, (1, 1), "SAME")))

        def hessian_vector(f):
            return jax.jit(lambda k: jax.jvp(jax.grad(f), (k,), (jnp.cos(k),)))(k)

        got, want = hessian_vector(loss(_dots)), hessian_vector(loss(_native))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, want)


@pytest.mark.parametrize("backend", ["auto", "dots"])
def test_flax_layers_agree_between_backends(backend):
    x, _ = _arrays((2, 3, 6, 6, 2), (1,))  # two batch axes, which nn.Conv folds into one
    x = x.astype(jnp.float32)

    def layer(backend):
        return nn.Conv(4, (3, 3), strides=2, padding=1, conv_general_dilated=convolution(backend))

    params = layer("native").init(jax.random.key(0), x)
    np.testing.assert_allclose(layer(backend).apply(params, x), layer("native").apply(params, x), rtol=1e-5, atol=1e-5)


def test_auto_is_the_convolution_that_a_plan_makes_fast():
    assert convolution() is convolution("native") is lax.conv_general_dilated


def test_a_function_is_taken_as_it_is():
    assert convolution(_native) is _native


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_group_count": 2}, "feature_group_count 1, got 2.*native"),
        ({"batch_group_count": 2}, "batch_group_count 1, got 2"),
        ({"lhs_dilation": (2, 1)}, r"lhs_dilation 1, got \(2, 1\)"),
        ({"rhs_dilation": (1, 2)}, r"rhs_dilation 1, got \(1, 2\)"),
        ({"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, "dimension_numbers .*NHWC"),
        ({"dimension_numbers": None}, "dimension_numbers .* got None"),
        ({"padding": ((-1, 0), (0, 0))}, "padding must not be negative"),
        ({"padding": "VALID", "rhs": jnp.ones((5, 5, 2, 2))}, "5x5 kernel does not fit images of 4x4"),
        ({"rhs": jnp.ones((3, 3, 1, 2))}, "2 channels and the kernel expects 1"),
        ({"lhs": jnp.ones((4, 4, 2))}, r"got shapes \(4, 4, 2\)"),
        ({"patches": "columns"}, "patches must be .*'columns'"),
    ],
)
def test_what_dots_cannot_do_raises(arguments, message):
    call = {
        "lhs": jnp.ones((1, 4, 4, 2)),
        "rhs": jnp.ones((3, 3, 2, 2)),
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": LAYOUT,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        dot_conv_general_dilated(**call)


def test_unknown_backend_raises():
    with pytest.raises(ValueError, match="'auto', 'dots', 'native' or a function, got 'fast'"):
        convolution("fast")


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 1)])
def test_max_pool_is_flax_max_pool(shape):
    x, _ = _arrays(shape, (1,))
    got = _outputs_and_gradients(lambda x, _: max_pool_2x2(x), x, jnp.zeros(()))
    want = _outputs_and_gradients(lambda x, _: nn.max_pool(x, (2, 2), (2, 2)), x, jnp.zeros(()))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, want)


def test_max_pool_shares_the_gradient_of_equal_entries():
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, jnp.full((1, 2, 2, 1), 0.25))
