"""Other ways to write the costly parts of three models, timed against the library's on one core.

    python benchmarks/designs.py [--only convolution lstm attention] [--repeats 9]

What is timed is a training step inside a compiled loop, as a client's local work is: the second convolution of the
FedAvg CNN (5x5, 32 to 64 channels, 14x14 pixels, batch 20), a layer of LEAF's LSTM (256 wide, 80 tokens), and the
attention of a small transformer's block (width 128, 4 heads, 80 tokens); forwards and backwards, inputs and weights.
All designs of a part give the same numbers, which is checked before they are timed. GFLOP/s count the products that the
textbook form needs, so that a design with fewer of them may exceed the peak, which is that of a large matrix product.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX makes its threads

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from benchmarks import _measure
from models import lstm
from models.convolution import dot_conv_general_dilated

BATCH, STEPS = 20, 8

# The convolution: images x [N, H, H, C] and a kernel k [K, K, C, F], zeros around, stride 1.
N, H, C, F, K = BATCH, 14, 32, 64, 5
HALF = K // 2
NHWC = ("NHWC", "HWIO", "NHWC")


def by_patches(x, k, patches):
    return dot_conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC, patches=patches)


def rows_first(x):
    """[H + 4, N, W + 4, C]: shifts along the first axis cost nothing."""
    return jnp.pad(x.transpose(1, 0, 2, 3), ((HALF, HALF), (0, 0), (HALF, HALF), (0, 0)))


def rows_leading(x, k):
    """Row patches with the image rows as the leading axis, so that the five windows are slices of one array."""
    x = rows_first(x)
    patches = jnp.concatenate([x[:, :, j : j + H] for j in range(K)], 3).reshape(-1, K * C)
    count = H * N * H
    out = sum(patches[i * N * H : i * N * H + count] @ k[i].reshape(K * C, F) for i in range(K))
    return out.reshape(H, N, H, F).transpose(1, 0, 2, 3)


def columns(x, k):
    """Patches over the height, one product for each column of the kernel."""
    x = rows_first(x)
    patches = jnp.concatenate([x[i : i + H] for i in range(K)], 3)
    out = sum(patches[:, :, j : j + H].reshape(-1, K * C) @ k[:, j].reshape(K * C, F) for j in range(K))
    return out.reshape(H, N, H, F).transpose(1, 0, 2, 3)


def shifted_products(x, k):
    """One product gives all rows of the kernel their part, which are then shifted and added."""
    x = rows_first(x)
    patches = jnp.concatenate([x[:, :, j : j + H] for j in range(K)], 3).reshape(-1, K * C)
    wide = k.reshape(K, K * C, F).transpose(1, 0, 2).reshape(K * C, K * F)
    parts = (patches @ wide).reshape(H + K - 1, N * H, K, F)
    return sum(parts[i : i + H, :, i] for i in range(K)).reshape(H, N, H, F).transpose(1, 0, 2, 3)


def winograd(x, k):
    """F(2x2, 5x5): 36 products where the textbook has 100, between transforms of the images, kernels and results.

    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, with matrices by Toom and Cook at the
    points 0, 1, -1, 2, -1/2 and infinity.
    """
    m, tiles = 2, H // 2
    n = m + K - 1
    points = np.array([0, 1, -1, 2, -0.5])

    def powers(count):
        table = np.zeros((n, count))
        table[:-1] = points[:, None] ** np.arange(count)
        table[-1, -1] = 1
        return table

    image = np.linalg.inv(powers(n)).T
    scale = np.abs(image).max(1)
    image, kernel, result = image / scale[:, None], powers(K) * scale[:, None], powers(m)

    def combine(weights, arrays):
        terms = [np.float32(w) * a for w, a in zip(weights, arrays, strict=True) if abs(w) > 1e-12]
        return sum(terms[1:], terms[0])

    x = jnp.pad(x, ((0, 0), (HALF, HALF), (HALF, HALF), (0, 0)))
    span = m * (tiles - 1) + 1
    by_row = [x[:, i : i + span : m] for i in range(n)]
    half = [combine(image[a], by_row) for a in range(n)]
    by_column = [[rows[:, :, j : j + span : m] for j in range(n)] for rows in half]
    tiles_of = jnp.stack([combine(image[b], one).reshape(-1, C) for one in by_column for b in range(n)])
    kernels = jnp.einsum("ai,bj,ijcf->abcf", np.float32(kernel), np.float32(kernel), k).reshape(n * n, C, F)
    products = jnp.einsum("tnc,tcf->tnf", tiles_of, kernels).reshape(n, n, N, tiles, tiles, F)
    rows = [combine(result[:, i], list(products)) for i in range(m)]
    out = jnp.stack([jnp.stack([combine(result[:, j], list(r)) for j in range(m)], 3) for r in rows], 2)
    return out.reshape(N, H, H, F)


CONVOLUTIONS = {
    "row patches (the library's)": partial(by_patches, patches="rows"),
    "full patches": partial(by_patches, patches="full"),
    "row patches, rows leading": rows_leading,
    "column patches": columns,
    "shifted products": shifted_products,
    "Winograd F(2x2, 5x5)": winograd,
    "XLA's convolution": lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC),
}

# The LSTM: inputs x [T, B, 4 W] after their own product, recurrent weights k [W, 4 W].
TOKENS, WIDTH = 80, 256


def by_autodiff(x, k, unroll=1):
    def step(carry, z):
        c, y = carry
        i, f, g, o = jnp.split(z + y @ k, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        y = nn.sigmoid(o) * jnp.tanh(c)
        return (c, y), y

    zeros = jnp.zeros((x.shape[1], k.shape[0]))
    return lax.scan(step, (zeros, zeros), x, unroll=unroll)[1]


@jax.custom_vjp
def one_product(x, k):
    """Autodiff for the inputs; the weights' gradient is one product of what came out and what comes back."""
    return by_autodiff(x, k)


def _one_product_forward(x, k):
    out, back = jax.vjp(lambda x: by_autodiff(x, k), x)
    return out, (out, back)


def _one_product_backward(kept, d_out):
    out, back = kept
    (d_x,) = back(d_out)
    previous = jnp.concatenate([jnp.zeros_like(out[:1]), out[:-1]])
    return d_x, jnp.einsum("tbh,tbz->hz", previous, d_x)


one_product.defvjp(_one_product_forward, _one_product_backward)

LSTMS = {
    "autodiff of the scan": by_autodiff,
    "autodiff, four tokens unrolled": partial(by_autodiff, unroll=4),
    "weights' gradient as one product": one_product,
    "derivative by hand (the library's)": lstm._recur,
}

# Attention: x [B, T, D], weights k [4, D, D] for query, key, value and output; causal, without biases.
DIM, HEADS = 128, 4


def _weights(scores):
    past = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    return nn.softmax(jnp.where(past, scores / np.sqrt(DIM // HEADS), jnp.finfo(scores.dtype).min))


def heads_last(x, k):
    q, key, v = ((x @ w).reshape(BATCH, TOKENS, HEADS, -1) for w in k[:3])
    out = jnp.einsum("bhts,bshd->bthd", _weights(jnp.einsum("bthd,bshd->bhts", q, key)), v)
    return out.reshape(x.shape) @ k[3]


def heads_first(x, k):
    flat = x.reshape(-1, DIM)
    q, key, v = ((flat @ w).reshape(BATCH, TOKENS, HEADS, -1).transpose(0, 2, 1, 3) for w in k[:3])
    out = jnp.einsum("bhts,bhsd->bhtd", _weights(jnp.einsum("bhtd,bhsd->bhts", q, key)), v)
    return (out.transpose(0, 2, 1, 3).reshape(-1, DIM) @ k[3]).reshape(x.shape)


def joint_projection(x, k):
    joint = x.reshape(-1, DIM) @ jnp.concatenate(k[:3], axis=1)
    q, key, v = joint.reshape(BATCH, TOKENS, 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
    out = jnp.einsum("bhts,bhsd->bhtd", _weights(jnp.einsum("bhtd,bhsd->bhts", q, key)), v)
    return (out.transpose(0, 2, 1, 3).reshape(-1, DIM) @ k[3]).reshape(x.shape)


def one_head_at_a_time(x, k):
    split = k.reshape(4, DIM, HEADS, -1)
    out = 0
    for h in range(HEADS):
        q, key, v = (x @ split[i, :, h] for i in range(3))
        mixed = jnp.einsum("bts,bsd->btd", _weights(jnp.einsum("btd,bsd->bts", q, key)), v)
        out = out + mixed @ k[3].reshape(HEADS, -1, DIM)[h]
    return out


ATTENTIONS = {
    "heads behind tokens": heads_last,
    "heads before tokens (the library's)": heads_first,
    "one product for query, key and value": joint_projection,
    "one head at a time": one_head_at_a_time,
}

PARTS = {
    "convolution": (CONVOLUTIONS, (N, H, H, C), (K, K, C, F), 2 * N * H * H * K * K * C * F),
    "lstm": (LSTMS, (TOKENS, BATCH, 4 * WIDTH), (WIDTH, 4 * WIDTH), 2 * TOKENS * BATCH * 4 * WIDTH**2),
    "attention": (
        ATTENTIONS,
        (BATCH, TOKENS, DIM),
        (4, DIM, DIM),
        2 * BATCH * TOKENS * (4 * DIM**2 + 2 * TOKENS * DIM),
    ),
}


def training(design: Callable) -> Callable:
    """`STEPS` steps: gradients of the inputs and of the weights, both used so that neither is left out."""

    def run(inputs, k):
        def step(i, carry):
            k, total = carry
            x = lax.dynamic_index_in_dim(inputs, i % len(inputs), keepdims=False)
            d_x, d_k = jax.grad(lambda x, k: jnp.sum(jnp.square(design(x, k))), (0, 1))(x, k)
            return k - 1e-7 * d_k, total / 2 + d_x

        return lax.fori_loop(0, jnp.int32(STEPS), step, (k, jnp.zeros_like(inputs[0])))

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", default="designs")
    args = parser.parse_args()
    square = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(square, square))
    result: dict = {"machine": _measure.machine(), "parts": {}}
    for part in args.only:
        designs, x_shape, k_shape, products = PARTS[part]
        inputs = jax.random.normal(jax.random.key(0), (4, *x_shape))
        k = jax.random.normal(jax.random.key(1), k_shape) / np.sqrt(np.prod(k_shape[:-1]))
        contenders, rows, first = {"peak": partial(product, square, square)}, {}, None
        for name, design in designs.items():
            run = training(design)
            seconds, out = _measure.first_call(run, inputs, k)
            rows[name] = {"first_call_s": seconds}
            first = first or out
            for a, b in zip(out, first, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))
            contenders[name] = partial(run, inputs, k)
        times = _measure.take_turns(contenders, args.repeats)
        top = 2 * 1024**3 / np.median(times["peak"]) / 1e9
        library = next(name for name in designs if "library's" in name)
        for name in designs:
            rows[name] |= _measure.summary([t / STEPS for t in times[name]])
            rows[name]["gflops"] = 3 * products / rows[name]["median_s"] / 1e9
            rows[name]["over_library"] = float(np.median(np.divide(times[name], times[library])))
            print(
                f"{part:11s} {name:37s} {1e3 * rows[name]['median_s']:7.2f} ms a step, {rows[name]['gflops']:5.0f} "
                f"GFLOP/s of {top:.0f}, {rows[name]['over_library']:.2f} of the library's time, first call "
                f"{rows[name]['first_call_s']:.1f} s",
                flush=True,
            )
        result["parts"][part] = {"peak_gflops": float(top), "designs": rows}
    print(f"saved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
