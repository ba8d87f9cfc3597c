"""Nothing is traced twice: how often a loss is called while a round, or a simulation of many, is compiled once."""

import jax
import optax
import pytest

import algorithms
from algorithms import messages as parts
from fedjax_core import needs, samplers, simulate, testing
from fedjax_core.messages import with_part

PROBLEM = testing.classification()
CLIENTS = PROBLEM.population.num_clients
IDS, KEY = [0, 1, 2], jax.random.key(0)

# The gradients that each client's step, and a pass of its own, take by the method's formula.
GRADIENTS = {"fedavg": 1, "scaffold": 1, "fedper": 1, "feddyn": 1, "fedsam": 2, "mime": 1 + 2}
PARTS = {
    "none": (),
    "codec and privacy": (parts.top_k(0.5), parts.client_level_dp(1.0, 0.1, expected=3.0)),
    "clock": (parts.deadline(1.0, seconds_per_example=0.1),),
    "attack and rule": (parts.sign_flip([True] + [False] * (CLIENTS - 1)), parts.coordinate_median()),
}


class Calls:
    """A method whose loss counts its calls, and the number of calls since it was last asked."""

    def __init__(self, name, used=()):
        self.count, brought = 0, {"num_clients": CLIENTS, "personal": "b", "loss": self.loss}
        factory = getattr(algorithms, name)
        asked = {argument: brought[what] for argument, what in needs(factory).items() if what in brought}
        self.method = factory(**asked, client_optimizer=optax.sgd(0.1), batch_size=4)
        for part in used:
            self.method = with_part(self.method, part, like=PROBLEM.population)

    def loss(self, params, batch, key):
        self.count += 1
        return PROBLEM.loss_fn(params, batch, key)

    def taken(self):
        count, self.count = self.count, 0
        return count


@pytest.mark.parametrize("used", PARTS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_loss_is_traced_once_for_each_gradient(name, used):
    """And not to find out what a round uploads, nor to look whether the loss mixes examples."""
    calls = Calls(name, PARTS[used])
    state = calls.method.init(PROBLEM.params)
    assert calls.taken() == 0
    jax.jit(calls.method.round).trace(state, PROBLEM.population.cohort(IDS), KEY)
    assert calls.taken() == GRADIENTS[name]


@pytest.mark.parametrize("used", ["none", "codec and privacy"])
def test_neither_rounds_nor_seeds_trace_a_loss_again(used):
    calls = Calls("scaffold", PARTS[used])
    run = simulate(calls.method, samplers.uniform(CLIENTS, 3), 5)
    jax.jit(run).trace(PROBLEM.params, PROBLEM.population, KEY)
    assert calls.taken() == 1
    over_seeds = jax.vmap(run, in_axes=(None, None, 0))
    jax.jit(over_seeds).trace(PROBLEM.params, PROBLEM.population, jax.random.split(KEY, 3))
    assert calls.taken() == 1


def test_a_new_method_with_the_same_loss_traces_it_once():
    """What was looked at before is not looked at again, and counts the same."""
    calls = Calls("fedavg")
    for _ in range(2):
        method = algorithms.fedavg(calls.loss, optax.sgd(0.1), batch_size=4)
        jax.jit(method.round).trace(method.init(PROBLEM.params), PROBLEM.population.cohort(IDS), KEY)
        assert calls.taken() == 1
