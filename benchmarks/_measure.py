"""Timing shared by the benchmarks: compile time apart, then median and quartiles, contenders taking turns."""

import json
import os
import pathlib
import platform
import time

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def log_normal_sizes(rng: np.random.Generator, num_clients: int, mean: float = 600, sigma: float = 0.8) -> np.ndarray:
    """int[num_clients], sizes of at least 1 whose distribution has that mean before rounding."""
    return np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, num_clients)).astype(int) + 1


def first_call(function, *args) -> tuple[float, object]:
    """Seconds of the first call (tracing and compilation included) and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def take_turns(contenders: dict, repeats: int) -> dict:
    """Runs each contender once per turn, so that a noisy machine troubles all alike. Seconds of every call."""
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict:
    """Median, quartiles and count of a list of seconds."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median_s": median, "q25_s": low, "q75_s": high, "repeats": len(times)}


def saved(name: str) -> dict:
    """What results/<name>.json holds, nothing if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, result: dict) -> pathlib.Path:
    """Writes results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
