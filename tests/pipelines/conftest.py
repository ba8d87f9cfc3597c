"""A finished run, shared by the tests that only look at one, and a cache that makes restarts quick."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.configuration.config import Config
from pipelines.run.train import train

ROOT = Path(__file__).resolve().parents[2]

SMALL = Config(
    dataset="iris",
    clients=6,
    cohort_size=3,
    min_size=2,
    model="logistic_regression",
    methods=("fedavg", "scaffold"),
    rounds=12,
    eval_every=2,
    checkpoint_every=4,
    seeds=2,
    epochs=1,
    target=0.8,
)


@pytest.fixture(scope="session")
def small() -> Config:
    return SMALL


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `SMALL`, complete. Copy it before changing anything."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(SMALL, out)
    return out


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m pipelines ...` in a process of its own; all of them share a compilation cache.

    A processor stands in for one device there, or for as many as `devices` says.
    """
    cache = tmp_path_factory.mktemp("compiled")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))},
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"],  # the same programs as here, to the last bit
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }

    def start(*words: str, cwd: Path, devices: int = 1) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *words],
            cwd=cwd,
            env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start
