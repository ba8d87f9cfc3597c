"""What the methods of this folder have beside an `Algorithm`'s rounds: the end of a task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import fedjax_core as fc


class ContinualAlgorithm(NamedTuple):
    """An `Algorithm`, and what happens between its last round on a task and the first on the next.

    Attributes:
      init: as in `Algorithm`. The state has a field `task` besides, int32[], the number of tasks ended.
      round: as in `Algorithm`.
      params: as in `Algorithm`.
      client_params: as in `Algorithm`.
      end_task: `end_task(state, cohort, key) -> state`: the cohort's clients look once at their examples of the task
        that ends, at the global model. The model stays as it is, and so does what is remembered without participants.
    """

    init: Callable[[fc.Params], Any]
    round: Callable[[Any, Any, fc.Key], tuple[Any, fc.Metrics]]
    params: Callable[[Any], fc.Params]
    client_params: Callable[[Any, fc.Array], fc.Params]
    end_task: Callable[[Any, fc.Cohort, fc.Key], Any]
