"""Where a run starts that explores first: on a mesh, from what every seed's own exploration has found."""

import jax
import numpy as np

from pipelines.experiment import setup
from pipelines.run import engines
from tests.problems import assert_trees_close, assert_trees_equal


def test_a_run_starts_with_the_exploration(small):
    """With a table of all clients' maps, split over the devices."""
    settings = {"threshold": 0.5, "explore_epochs": 2, "num_maps": 6}
    # In stored order the exploration draws nothing, so that its key does not matter.
    config = small.replace(methods=("autoflip",), settings={"autoflip": settings}, order="sequential", mesh=2)
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        algorithm = experiment.algorithms["autoflip"]
        engine = engines.engine(experiment, algorithm)
        states = engine.start()
        assert_trees_equal(*(jax.tree.map(lambda leaf: np.array(leaf.shape), t) for t in (states, engine.expected)))
        np.testing.assert_array_equal(states.maps.explorers, [6, 6])
        explore, cohort = jax.jit(algorithm.events["explore"].run), experiment.population.cohort(np.arange(6))
        for s, key in enumerate(experiment.keys):
            x0 = experiment.model.init(setup.run_keys(key)[0])
            expected = explore(algorithm.init(x0), cohort, jax.random.key(0))
            of_seed = jax.tree.map(lambda leaf, s=s: np.asarray(leaf[s]), states)
            assert_trees_close(of_seed.maps, expected.maps, rtol=1e-4, atol=1e-7)
            assert_trees_equal(of_seed.mask, expected.mask)
            kept = jax.tree.map(lambda b, leaf: np.where(b, leaf, 0), expected.mask, x0)
            assert_trees_equal(algorithm.params(of_seed), kept)
            assert sum(int(b.sum()) for b in jax.tree.leaves(of_seed.mask)) <= (4 * 3 + 3) // 2
