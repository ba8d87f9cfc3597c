"""Which views of a method are evaluated, and on which examples each client is tested.

A method has views (`fedjax_core.View`): "global", one model for all, and often "personal", what each client would use;
it says itself by which it is to be judged (`Algorithm.main_view`). Where the configuration names none, all that the
method has are evaluated. A view of one model is tested on all test examples. A view in which clients differ is tested
client by client, each on examples of its own: its test part where the federation has one, else its share of the data
set's test examples (`own_tests`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_core import Algorithm, View
from fedjax_core.types import Params
from pipelines.common.names import pick
from pipelines.configuration.config import Config
from pipelines.federation import federations, splits
from pipelines.federation.federations import Federation, Part

GLOBAL, PERSONAL = "global", "personal"

_CHOICE = 0xDEA1


class Evaluated(NamedTuple):
    """The views of a method that are evaluated.

    Attributes:
      names: of all of them, in the order of the method.
      main: the one that stands for the method: in the curves and tables, and in decisions about when to stop and
        which model is best.
    """

    names: tuple[str, ...]
    main: str

    def of_clients(self, algorithm: Algorithm, states: Any) -> tuple[str, ...]:
        """Those that are tested client by client; states have leaves [S, ...], and may be shapes."""
        return tuple(name for name in self.names if differs(algorithm, name, states))

    def of_one_model(self, algorithm: Algorithm, states: Any) -> tuple[str, ...]:
        """The others."""
        return tuple(name for name in self.names if not differs(algorithm, name, states))


def evaluated(config: Config, algorithm: Algorithm, name: str = "the method") -> Evaluated:
    """The views of a method that a run evaluates.

    Raises:
      ValueError: if the configuration names views and the method has none of them.
    """
    asked = config.evaluation.evaluate
    there = tuple(algorithm.views)
    names = tuple(view for view in asked if view in there or view == PERSONAL) if asked else there
    if not names:
        # "personal" can always be asked for: without such a view each client would use the global model.
        pick(f"view of {name} in evaluate", asked[0], dict.fromkeys([*there, PERSONAL]))
    return Evaluated(names, algorithm.main_view if algorithm.main_view in names else names[0])


def check_names(config: Config, algorithms: Mapping[str, Algorithm]) -> None:
    """Raises ValueError if the configuration names a view that no method has, or none of a method's."""
    known = list(dict.fromkeys([*(view for each in algorithms.values() for view in each.views), PERSONAL]))
    for view in config.evaluation.evaluate:
        if view not in known:
            raise ValueError(
                f"evaluate names the view {view!r}, and the methods of this run have {', '.join(known)}: take of these"
            )
    for name, algorithm in algorithms.items():
        evaluated(config, algorithm, name)


def view_of(algorithm: Algorithm, name: str) -> View:
    """The view of that name; what each client would use where there is no view "personal"."""
    return algorithm.personal if name == PERSONAL else algorithm.views[name]


def differs(algorithm: Algorithm, name: str, states: Any) -> bool:
    """Whether clients are tested one by one in this view: it has rows, or adapts, or is what each client would use.

    Args:
      algorithm: the method.
      name: of the view.
      states: states of the method, leaves [S, ...], or their shapes.
    """
    view = view_of(algorithm, name)
    if name == PERSONAL or view.adapt is not None:
        return True
    return jax.eval_shape(jax.vmap(view.rows), states) is not None


def has_one_global(algorithm: Algorithm) -> bool:
    """Whether the global model is one for all clients: it is not where they differ in architecture."""
    return algorithm.views[GLOBAL].groups is None


def one_model(algorithm: Algorithm, name: str, state: Any) -> Params:
    """The model of a view in which clients do not differ."""
    view = view_of(algorithm, name)
    return view.model(view.shared(state), ())


def keeps_states(config: Config, algorithm: Algorithm) -> bool:
    """Whether a run that validates keeps whole states of its best and last rounds, and not only global models.

    It does where something else than the global model is made of them.
    """
    return evaluated(config, algorithm).names != (GLOBAL,) or bool(algorithm.events_at("after"))


def own_tests(config: Config, federation: Federation) -> Part:
    """The examples that each client is tested on, in the views in which clients differ.

    Its own test part where the federation has one. Else, where it was made by the labels alone, the data set's test
    examples are dealt out in the shares in which clients hold the classes of the training part: they are as much a
    client's own as those that it trains on. Every test example goes to at most one client.

    Raises:
      ValueError: if no test example is a client's own.
    """
    if "test" in federation.parts:
        return federation.parts["test"]
    chosen, dataset = config.federation, federation.dataset
    by_labels = federations.reads(chosen.partition) == "labels"
    if not by_labels or chosen.feature_skew != "none":
        why = f"partition={chosen.partition!r}" if not by_labels else f"feature_skew={chosen.feature_skew!r}"
        raise ValueError(
            f"clients differ in more than their labels ({why}), so that no test example of the data set is a client's "
            "own, by which its own model is tested: give test_share, for example 0.2, or evaluate the global model "
            "alone (evaluate global)"
        )
    # Sequences have no class: they are dealt out by numbers alone.
    strata = [np.zeros(len(y), np.int64) if dataset.is_sequence else y for y in (dataset.train["y"], dataset.test["y"])]
    train = federation.parts["train"].assignment
    return Part("test", splits.deal(train, *strata, seed=chosen.partition_seed))


def chosen_clients(config: Config, num_clients: int) -> np.ndarray:
    """int64[K], ascending: the clients that are tested in the views in which they differ, the same in all rounds."""
    number = config.evaluation.evaluate_clients
    if number is None or number >= num_clients:
        return np.arange(num_clients)
    rng = np.random.default_rng([config.federation.partition_seed, _CHOICE])
    return np.sort(rng.choice(num_clients, number, replace=False))


def is_dealt(federation: Federation) -> bool:
    """Whether `own_tests` deals test examples out, as clients have no test part."""
    return "test" not in federation.parts
