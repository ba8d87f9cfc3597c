"""A device of the processor that waits for another is no deadlock."""

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import pytest

from fedjax_core import Plan, client_mesh, collectives

ROOT = Path(__file__).resolve().parents[2]


FLAGS = (*collectives.WITHIN, *collectives.BETWEEN)


def python(program, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# One client of the round takes some seconds, the other next to nothing.
ROUND = """
import jax, jax.numpy as jnp, numpy as np, optax
import algorithms
from fedjax_core import Plan, Population, client_mesh

def loss_fn(params, batch, key):
    slow = jax.lax.fori_loop(0, 40, lambda _, x: jnp.sin(x + params), jnp.ones(100_000))
    return batch["x"] * jnp.sum(slow) * 0 + params

population = Population.from_sizes({"x": np.ones(101, np.float32)}, [100, 1])
method = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=1, plan=Plan(mesh=client_mesh(2)))
state, metrics = jax.jit(method.round)(method.init(jnp.float32(1)), population.cohort(np.arange(2)), jax.random.key(0))
jax.block_until_ready(state)
print("done")
"""


def test_these_flags_are_why_a_round_of_unequal_clients_ends_the_process():
    """The user's own value is kept, and with a second in place of a minute the process is gone."""
    ended = python(ROUND, XLA_FLAGS=" ".join(f"--{name}=1" for name in collectives.WITHIN))
    assert ended.returncode == -signal.SIGABRT, ended.stdout + ended.stderr
    assert "Termination timeout" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "kept", "added"),
    [
        ({}, "", FLAGS),
        ({"XLA_FLAGS": "--xla_dump_to="}, "--xla_dump_to= ", FLAGS),
        ({"XLA_FLAGS": f"--{FLAGS[1]}=90"}, f"--{FLAGS[1]}=90 ", collectives.BETWEEN),
        ({"JAX_PLATFORMS": "cuda"}, "", ()),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "", FLAGS),
        ({"XLA_FLAGS": "/a/file/of/flags"}, "/a/file/of/flags", ()),
    ],
)
def test_flags_are_added_to_those_of_the_user(environment, kept, added, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    platforms = environment.get("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(collectives, "_is_running", lambda: False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert collectives.raise_timeouts()
    finally:
        jax.config.update("jax_platforms", before)
    assert os.environ.get("XLA_FLAGS", "") == kept + " ".join(f"--{name}={collectives.SECONDS}" for name in added)


def test_all_flags_are_known_to_this_jaxlib_and_others_are_not():
    """An unknown one would end every process that imports the library."""
    assert collectives.known([*FLAGS, "xla_cpu_flag_of_the_future"]) == list(FLAGS)
    assert all(name in os.environ["XLA_FLAGS"] for name in FLAGS)


def test_too_late_is_told_once_and_only_for_several_devices_of_the_processor(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    jax.devices()  # from here on it is too late
    assert not collectives.raise_timeouts()
    monkeypatch.setattr(collectives, "_in_time", False)
    Plan(mesh=client_mesh(1))
    with pytest.warns(RuntimeWarning, match="import fedjax_core first, or set XLA_FLAGS=--xla_cpu_collective"):
        Plan(mesh=client_mesh(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan(mesh=client_mesh(2))
