"""The most floating-point operations a second that a library reaches here: `python -m benchmarks.peers.peak LIBRARY`.

Products of two square float32 matrices, with all threads; prints one JSON object {"gflops": ...}.
"""

import json
import sys
import time

import numpy as np


def fastest(product, size: int) -> float:
    """GFLOP/s of the fastest of repeated calls of `product`, over half a second at least."""
    times = []
    while sum(times) < 0.5 or len(times) < 5:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def main() -> None:
    library = sys.argv[1]
    best = 0.0
    for size in (1024, 2048):
        a = np.random.default_rng(0).random((size, size), np.float32)
        if library == "numpy":
            best = max(best, fastest(lambda a=a: a @ a, size))
        elif library == "torch":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
            b = torch.from_numpy(a).to(device)

            def product(b=b, device=device):
                b @ b
                if device == "cuda":
                    torch.cuda.synchronize()

            best = max(best, fastest(product, size))
        else:
            import jax

            b, multiply = jax.numpy.asarray(a), jax.jit(lambda b: b @ b)
            best = max(best, fastest(lambda b=b, multiply=multiply: jax.block_until_ready(multiply(b)), size))
    print(json.dumps({"gflops": best}))


if __name__ == "__main__":
    main()
