"""How often the loops of a round run, against rounds that were run and a plain simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Plan, client_mesh, for_each_client, local_work
from fedjax_core.clients import ClientProgram
from pipelines.compiled import schedule
from pipelines.compiled.program import Instruction
from tests.problems import softmax_loss, softmax_params, softmax_population

SIZES = (1, 9, 4, 0, 13, 6, 2, 25, 3)
COUNTING = ClientProgram(
    init=lambda shared, own, key: jnp.float32(0),
    step=lambda shared, carry, batch: (carry + 1, jnp.float32(0)),
    final=lambda shared, carry: (carry, ()),
)


@pytest.mark.parametrize(("devices", "lanes"), [(1, 1), (1, 3), (1, 9), (2, 2), (4, 8)])
@pytest.mark.parametrize("options", [{"num_epochs": 2}, {"num_steps": 5}])
def test_executed_steps_are_those_of_a_round_that_was_run(devices, lanes, options):
    work = local_work(batch_size=4, **options)
    plan = Plan(lanes, client_mesh(devices) if devices > 1 else None)
    cohort = softmax_population(SIZES).cohort(np.asarray([*range(len(SIZES)), -1]))
    run = jax.jit(lambda key: for_each_client(COUNTING, (), cohort, key, work=work, plan=plan).executed_steps)
    sizes = np.asarray([*SIZES, -1])
    steps = schedule.steps_of(work, sizes)
    np.testing.assert_array_equal(steps, work.steps(jnp.asarray(cohort.ids), jnp.asarray(cohort.sizes)))
    found = schedule.loops(steps, devices, lanes // devices)
    assert found.executed == int(run(jax.random.key(0)))
    assert found.useful == steps.sum()


def slowly(steps, lanes):
    """The loops of one chip, turn by turn: (outer turns, steps, ends, starts)."""
    lanes = min(lanes, len(steps))
    queue = [n for n in (sorted(steps, reverse=True) if lanes > 1 else steps) if n > 0]
    busy = [] if lanes == 1 else [queue.pop(0) for _ in range(min(lanes, len(queue)))]
    turns = total = ends = starts = 0
    while busy or queue:
        turns += 1
        segment = min(busy, default=0)
        total += segment
        left = [n - segment for n in busy]
        ends += left.count(0)
        busy = [n for n in left if n]
        while queue and len(busy) < lanes:
            busy.append(queue.pop(0))
            starts += 1
    return turns, total, ends, starts


@pytest.mark.parametrize("lanes", [1, 2, 5, 20])
def test_loops_are_those_of_a_simulation_turn_by_turn(lanes):
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps = rng.integers(0, 7, rng.integers(1, 12))
        assert tuple(schedule.loops(steps, 1, lanes)[:4]) == slowly(steps.tolist(), lanes)


def test_the_mean_over_cohorts():
    first, second = schedule.loops(np.asarray([2, 2]), 1, 1), schedule.loops(np.asarray([4, 0]), 1, 1)
    assert schedule.mean([first, second]) == schedule.Loops(2.5, 4.0, 1.5, 1.5, 4.0, 4.0)


@pytest.mark.quick
def test_passes_are_noted_while_a_round_is_traced():
    """And the loops of each have its name in the program."""
    mime = algorithms.mime(softmax_loss, optax.sgd(0.1), batch_size=4, num_epochs=3)
    cohort = softmax_population(SIZES).cohort(np.arange(4))
    with schedule.recording() as passes:
        lowered = jax.jit(mime.round).lower(mime.init(softmax_params()), cohort, jax.random.key(0))
    assert [each.num_slots for each in passes] == [4, 4]
    assert [each.work.num_epochs for each in passes].count(3) == 1
    text = lowered.as_text(debug_info=True)
    for number in range(2):
        assert f"pass_of_clients_{number}/client_loop" in text


def test_trips_of_named_loops():
    loops = [schedule.Loops(4.0, 12.0, 8.0, 6.0, 0.0, 0.0), schedule.Loops(1.0, 5.0, 2.0, 0.0, 0.0, 0.0)]
    count = schedule.trips(loops)

    def loop(scope):
        return Instruction("while.1", "while", (), (), "", f'metadata={{op_name="{scope}"}}')

    base = "jit(run)/vmap(pass_of_clients_0)/shard_map/client_loop"
    assert count(loop(f"{base}/while")) == 4
    assert count(loop(f"{base}/while/body/local_steps/while")) == 3
    assert count(loop(f"{base}/while/body/client_ends/while")) == 2
    assert count(loop(f"{base}/while/body/client_starts/while")) == 1.5
    assert count(loop("jit(run)/pass_of_clients_1/vmap(client_loop)/while/body/vmap(local_steps)/while")) == 5
    assert count(loop(f"{base}/while/body/local_steps/while/body/model/while")) is None  # a loop of the model's own
    assert count(loop("jit(run)/while")) is None
