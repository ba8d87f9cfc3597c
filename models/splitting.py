"""A model cut into what clients run and what a server runs between."""

from collections.abc import Callable
from typing import Any

from fedjax_core import Array, Examples, Key, Params, Split, combine
from models._common import Model, Stage, span
from models.batch_norm import StatisticsModel, with_frozen_statistics


def split(
    model: Model | StatisticsModel, loss: Callable[[Array, Examples], Array], *, head: Stage, tail: Stage
) -> Split:
    """Head, body and tail of a model, a part of whose parameters is trained.

    Its parameters are those of `model`, cut by `fedjax_core.partition` into what is trained, y, and the rest, the
    public data. The body is run with the rest alone, so that nothing of it can be trained. Both cuts may lie at any
    stage: the head has those before the stage `head`, the body those before `tail`.

    Args:
      model: of this package, with stages; `tuned.joint` where an adapter is trained. One with running statistics is
        one of `Variables`, whose statistics stay as they are.
      loss: `loss(outputs, examples) -> float[B]`; inputs are examples["x"].
      head: first stage that is not the head's, a name or a number, as in `model.run`.
      tail: first stage of the tail.

    Raises:
      ValueError: if there is no such stage, or head, body or tail would have none.
    """
    model = with_frozen_statistics(model)
    first, last = span(model.stages, head, tail)
    if not 0 < first < last < len(model.stages):
        raise ValueError(
            f"head={head!r} and tail={tail!r} leave a piece of the model without a stage: choose two of "
            f"{', '.join(model.stages[1:])} in this order"
        )

    def run_body(public: Any, s: Any, key: Key | None) -> Any:
        try:
            return model.run(public, s, first, last, key)
        except Exception as error:
            error.add_note(
                f"the body, stages {model.stages[first]} to {model.stages[last - 1]}, has the frozen parameters alone: "
                "train none of its own, or cut elsewhere"
            )
            raise

    def run_head(y: Params, public: Any, examples: Examples, key: Key | None) -> Any:
        return model.run(combine(y, public), examples["x"], None, first, key)

    def run_tail(y: Params, public: Any, r: Any, key: Key | None) -> Array:
        outputs: Array = model.run(combine(y, public), r, last, None, key)
        return outputs

    return Split(run_head, run_body, run_tail, loss)
