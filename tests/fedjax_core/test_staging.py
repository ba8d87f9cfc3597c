"""Staged populations: the numbers of the in-memory path, bit for bit, from host memory or files."""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import (
    HostPopulation,
    Interrupted,
    Plan,
    continue_rounds,
    continue_staged,
    init_on_host,
    samplers,
    simulate,
    simulate_staged,
    staging,
)
from tests.problems import assert_trees_equal, softmax_loss, softmax_params, softmax_population

SIZES = (5, 3, 0, 8, 1, 2, 9, 4)
N = len(SIZES)
ROUNDS = 5
KEY = jax.random.key(3)
DEVICE = softmax_population(SIZES)
HOST = HostPopulation.from_flat(jax.tree.map(np.asarray, DEVICE.examples), np.asarray(DEVICE.offsets))
SAMPLER = samplers.uniform(N, 3)


def scaffold(**local):
    return algorithms.scaffold(softmax_loss, optax.sgd(0.1), num_clients=N, batch_size=4, **local)


def in_memory(algorithm, sampler, params=None, rounds=ROUNDS):
    return jax.jit(simulate(algorithm, sampler, rounds))(params or softmax_params(), DEVICE, KEY)


@pytest.fixture(scope="module")
def expected():
    return in_memory(scaffold(), SAMPLER)


def with_host_tables(algorithm, directory=None, **options):
    state = init_on_host(algorithm.init, softmax_params(), num_clients=N, directory=directory)
    return continue_staged(algorithm, SAMPLER, ROUNDS, **options)(state, HOST, KEY)


@pytest.mark.quick
def test_a_staged_run_gives_the_bits_of_the_run_in_memory(expected):
    assert_trees_equal(simulate_staged(scaffold(), SAMPLER, ROUNDS)(softmax_params(), HOST, KEY), expected)


@pytest.mark.quick
@pytest.mark.parametrize("in_files", [False, True])
def test_tables_in_host_memory_or_files_give_the_same_bits(expected, tmp_path, in_files):
    state, metrics = with_host_tables(scaffold(), tmp_path / "tables" if in_files else None)
    tables = jax.tree.leaves(state.client_controls)
    assert all(isinstance(leaf, np.memmap if in_files else np.ndarray) for leaf in tables)
    assert_trees_equal((state, metrics), expected)
    assert np.abs(tables[0]).max() > 0


def test_a_client_that_takes_part_in_every_round_carries_its_row_from_one_round_to_the_next():
    """Its row in host memory is always one round old when it is read; the newer one comes from the device."""
    rows = np.array([[1, 3, -1], [3, 1, 0], [3, 6, 1], [0, 3, -1], [1, 3, 6]])
    sampler = samplers.schedule(rows)
    state = init_on_host(scaffold().init, softmax_params(), num_clients=N)
    staged = continue_staged(scaffold(), sampler, ROUNDS)(state, HOST, KEY)
    assert_trees_equal(staged, in_memory(scaffold(), sampler))


@pytest.mark.parametrize("in_files", [False, True])
def test_seeds_run_at_once_like_a_vmap(tmp_path, in_files):
    algorithm, keys = scaffold(), jax.random.split(KEY, 3)
    params = jax.vmap(lambda s: jax.tree.map(lambda leaf: leaf * s, softmax_params()))(jnp.arange(1.0, 4.0))
    want = jax.jit(jax.vmap(simulate(algorithm, SAMPLER, ROUNDS), (0, None, 0)))(params, DEVICE, keys)
    assert_trees_equal(simulate_staged(algorithm, SAMPLER, ROUNDS)(params, HOST, keys), want)
    state = init_on_host(
        jax.vmap(algorithm.init), params, num_clients=N, axis=1, directory=tmp_path / "t" if in_files else None
    )
    assert_trees_equal(continue_staged(algorithm, SAMPLER, ROUNDS)(state, HOST, keys), want)


def test_clients_that_are_scattered_over_the_examples():
    """With `rows`, a data set is divided among clients without being copied."""
    order = np.random.default_rng(0).permutation(DEVICE.num_examples)
    shuffled = jax.tree.map(lambda leaf: np.asarray(leaf)[order], DEVICE.examples)
    rows = np.argsort(order)
    host = HostPopulation.from_sizes(shuffled, SIZES, rows)
    np.testing.assert_array_equal(host.client(3)["x"], DEVICE.client(3)["x"])
    assert_trees_equal(host.to_device(), DEVICE)
    staged = simulate_staged(scaffold(), SAMPLER, ROUNDS)(softmax_params(), host, KEY)
    assert_trees_equal(staged, in_memory(scaffold(), SAMPLER))


def test_examples_in_files(tmp_path, expected):
    for name, leaf in HOST.examples.items():
        np.save(tmp_path / f"{name}.npy", leaf)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in HOST.examples}
    host = HostPopulation.from_flat(mapped, HOST.offsets)
    assert all(isinstance(leaf, np.memmap) for leaf in host.examples.values())
    assert_trees_equal(simulate_staged(scaffold(), SAMPLER, ROUNDS)(softmax_params(), host, KEY), expected)


@pytest.mark.parametrize("host_tables", [False, True])
def test_a_run_in_parts_is_the_run_in_one(expected, host_tables):
    algorithm = scaffold()
    state = init_on_host(algorithm.init, softmax_params(), num_clients=N) if host_tables else None
    state = algorithm.init(softmax_params()) if state is None else state
    run = continue_staged(algorithm, SAMPLER, 1, horizon=ROUNDS)
    metrics = []
    for _ in range(ROUNDS):
        state, info = run(state, HOST, KEY)
        metrics.append(info)
    assert_trees_equal((state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *metrics)), expected)


def test_the_state_handed_in_can_be_used_again():
    algorithm = scaffold()
    state = algorithm.init(softmax_params())
    run = continue_staged(algorithm, SAMPLER, 2)
    assert_trees_equal(run(state, HOST, KEY), run(state, HOST, KEY))


def test_the_round_is_traced_once_whatever_the_cohorts():
    traces = 0

    def counted(params, batch, key):
        nonlocal traces
        traces += 1
        return softmax_loss(params, batch, key)

    algorithm = algorithms.scaffold(counted, optax.sgd(0.1), num_clients=N, batch_size=4)
    run = continue_staged(algorithm, samplers.uniform(N, 2), 3, horizon=12)
    state, _ = run(init_on_host(algorithm.init, softmax_params(), num_clients=N), HOST, KEY)
    once = traces
    for _ in range(3):
        state, _ = run(state, HOST, KEY)
    assert traces == once


@pytest.mark.parametrize("host_tables", [False, True])
def test_a_mesh(host_tables):
    mesh = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
    algorithm = scaffold(plan=Plan(lanes=4, mesh=mesh))
    want = in_memory(algorithm, SAMPLER)
    if host_tables:
        got = with_host_tables(algorithm, mesh=mesh)
    else:
        got = simulate_staged(algorithm, SAMPLER, ROUNDS, mesh=mesh)(softmax_params(), HOST, KEY)
    assert_trees_equal(got, want)


def test_samplers_with_a_slot_for_every_client():
    algorithm = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=4)
    for sampler in (samplers.bernoulli(0.5, N), samplers.markov(0.5, 0.3, N)):
        staged = simulate_staged(algorithm, sampler, ROUNDS)(softmax_params(), HOST, KEY)
        assert_trees_equal(staged, in_memory(algorithm, sampler))


def test_rounds_without_anyone():
    sampler = samplers.schedule(np.array([[-1, -1], [2, -1], [0, 1]]))  # no client, then an empty one
    got = simulate_staged(scaffold(), sampler, 3)(softmax_params(), HOST, KEY)
    assert_trees_equal(got, in_memory(scaffold(), sampler, rounds=3))
    np.testing.assert_array_equal(got[1].participants, [0, 0, 2])


@pytest.mark.quick
def test_a_million_clients():
    """Most slots of a Bernoulli cohort are empty: the round runs on as many as take part, not on a million."""
    count = 1_000_000
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, count)
    total = int(sizes.sum())
    examples = {"x": rng.normal(size=(total, 5)).astype(np.float32), "y": rng.integers(0, 3, total, np.int32)}
    host = HostPopulation.from_sizes(examples, sizes)
    params = softmax_params(dtype=np.float32)
    algorithm = algorithms.scaffold(softmax_loss, optax.sgd(0.1), num_clients=count, batch_size=2)
    state = init_on_host(algorithm.init, params, num_clients=count)
    rates = np.full(count, 2e-5)
    rates[-1] = 1.0
    state, metrics = continue_staged(algorithm, samplers.bernoulli(rates), 4)(state, host, KEY)
    present = [samplers.bernoulli(rates)(jax.random.split(KEY)[0], t) for t in range(4)]
    expected = [int((sizes[np.asarray(ids)[np.asarray(ids) >= 0]] > 0).sum()) for ids in present]
    np.testing.assert_array_equal(metrics.participants, expected)
    assert min(expected) > 3
    changed = np.flatnonzero(np.abs(state.client_controls.rows["w"]).max(axis=(1, 2)))
    took_part = np.unique(np.concatenate([np.asarray(ids)[np.asarray(ids) >= 0] for ids in present]))
    np.testing.assert_array_equal(changed, took_part[sizes[took_part] > 0])


def test_rows_of_zeros_are_not_written_before_they_are_needed(tmp_path):
    algorithm = algorithms.scaffold(softmax_loss, optax.sgd(0.1), num_clients=10**9, batch_size=2)
    state = init_on_host(algorithm.init, softmax_params(), num_clients=10**9, directory=tmp_path / "tables")
    assert state.client_controls.rows["w"].shape == (10**9, 5, 3)
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "tables").iterdir())
    assert used < 1 << 20


def test_shapes_are_rounded_up_to_few_different_ones():
    counts = np.array([staging._rounded_up(n) for n in range(1, 5000)])
    assert (counts >= np.arange(1, 5000)).all()
    assert (counts < 1.125 * np.arange(1, 5000) + 1).all()
    assert len(np.unique(counts)) < 100


def test_state_from_the_device_goes_on_in_host_memory(expected):
    """A state whose tables are turned into numpy arrays, as from a checkpoint, runs on from there."""
    algorithm = scaffold()
    state, _ = jax.jit(continue_rounds(algorithm, SAMPLER, 2))(algorithm.init(softmax_params()), DEVICE, KEY)
    table = jax.tree.map(np.array, state.client_controls)
    state, _ = continue_staged(algorithm, SAMPLER, ROUNDS - 2)(state._replace(client_controls=table), HOST, KEY)
    assert_trees_equal(state, expected[0])


class At:
    """Raises KeyboardInterrupt before the `count`-th line that the staging module executes, as a signal may."""

    def __init__(self, count):
        self.left = count

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename != staging.__file__:
            return None
        if event == "line" and frame.f_code.co_name not in ("_later", "handle", "_kept_in_step"):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def interrupted_run(count, run, state):
    """What a call raised that was interrupted before a line; None if it ended before."""
    try:
        with At(count):
            run(state, HOST, KEY)
    except KeyboardInterrupt as error:
        return error
    return None


@pytest.mark.parametrize("in_files", [False, True])
def test_interrupted_anywhere_it_goes_on_right_or_not_at_all(expected, tmp_path, in_files):
    algorithm = scaffold()
    run, one = (continue_staged(algorithm, SAMPLER, rounds, horizon=ROUNDS) for rounds in (ROUNDS, 1))

    def start(count):
        folder = tmp_path / str(count) if in_files else None
        return init_on_host(algorithm.init, softmax_params(), num_clients=N, directory=folder)

    def finish(state):
        while int(state.round) < ROUNDS:
            state, _ = one(state, HOST, KEY)
        return state

    run(start("first"), HOST, KEY)
    finish(start("second"))
    ends = {"went on": 0, "as before": 0, "refused": 0, "another error": 0}
    for count in range(1, 100_000, 151 if in_files else 53):
        state = start(count)
        stop = interrupted_run(count, run, state)
        if stop is None:
            break  # there were fewer lines
        if isinstance(stop, Interrupted):
            assert stop.round == int(stop.state.round)
            assert_trees_equal(stop.metrics, jax.tree.map(lambda leaf, end=stop.round: leaf[:end], expected[1]))
            assert_trees_equal(finish(stop.state), expected[0])
            ends["went on"] += 1
        try:
            again = finish(state)
        except ValueError as refusal:
            told = "Go on from the state that the last call returned" in str(refusal)
            ends["refused" if told else "another error"] += 1
        else:
            assert_trees_equal(again, expected[0])
            ends["as before"] += 1
    assert not ends.pop("another error")
    assert min(ends.values()) > 0


def test_ctrl_c_waits_for_the_round_and_brings_the_state():
    algorithm, asked = scaffold(), []
    state = init_on_host(algorithm.init, softmax_params(), num_clients=N)

    def press(round):
        asked.append(round)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)

    staged = staging._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_finish", lambda *args: (press(0), staged(*args))[1])
        with pytest.raises(Interrupted) as stopped:
            continue_staged(algorithm, SAMPLER, ROUNDS)(state, HOST, KEY)
    assert 0 < stopped.value.round < ROUNDS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    rest = continue_staged(algorithm, SAMPLER, ROUNDS - stopped.value.round)
    assert_trees_equal(rest(stopped.value.state, HOST, KEY)[0], in_memory(algorithm, SAMPLER)[0])


def test_tables_that_have_gone_on_are_refused_with_an_older_state_and_copies_are_not():
    algorithm = scaffold()
    run = continue_staged(algorithm, SAMPLER, 2)
    state = init_on_host(algorithm.init, softmax_params(), num_clients=N)
    copy = jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, state)
    first, _ = run(state, HOST, KEY)
    with pytest.raises(ValueError, match=r"the state is at round 0, but its tables .* are at round 2"):
        run(state, HOST, KEY)
    assert_trees_equal(run(copy, HOST, KEY)[0], first)
    run(first, HOST, KEY)
