"""Tasks: a model with its loss and its metrics, as one object (`fedjax_core.Task`)."""

from typing import Any

from fedjax_core import Array, Examples, Key, Params, Task, checks, tasks
from models import losses, metrics
from models._common import Model
from models.batch_norm import StatisticsModel
from models.losses import inputs_of

KINDS = ("classification", "sequence", "regression", "reconstruction")

# Losses and metrics of a model, applied to outputs that are there already.
_OUTPUTS = Model(lambda key: {}, lambda outputs, x, key=None: outputs, lambda outputs, x, key=None: outputs)


def task(
    model: Model | StatisticsModel,
    kind: str = "classification",
    *,
    pad_id: int | None = None,
    label_smoothing: float | Array = 0.0,
) -> Task:
    """The task of a model on examples {"x": inputs, "y": targets}.

    Args:
      model: any model of this package, with running statistics or without.
      kind: "classification" (logits [B, K], labels int[B]), "sequence" (logits [B, T, V], next tokens int[B, T]; its
        metrics count tokens), "regression" (targets of the shape of the outputs) or "reconstruction" (of the inputs, as
        an autoencoder does it, without targets); see `models.losses` and `models.metrics`.
      pad_id: for "sequence", the target that is left out.
      label_smoothing: for "classification", see `losses.cross_entropy`; metrics are without.

    Raises:
      ValueError: for another kind, or an option that means nothing to it.
    """
    checks.one_of("kind", kind, KINDS)
    if pad_id is not None and kind != "sequence":
        raise ValueError(f"pad_id={pad_id!r} means nothing to kind={kind!r}: leave it out, or choose 'sequence'")
    if kind != "classification" and not (isinstance(label_smoothing, float | int) and label_smoothing == 0):
        raise ValueError(f"label_smoothing means nothing to kind={kind!r}: leave it out, or choose 'classification'")
    if kind == "classification":
        loss_fn, metric_fn = losses.cross_entropy(_OUTPUTS, label_smoothing), metrics.classification(_OUTPUTS)
    elif kind == "sequence":
        loss_fn, metric_fn = losses.sequence_cross_entropy(_OUTPUTS, pad_id), metrics.sequence(_OUTPUTS, pad_id)
    else:
        loss_fn = losses.squared_error(_OUTPUTS) if kind == "regression" else _of_inputs

        def metric_fn(outputs: Params, batch: Examples) -> dict[str, Any]:
            return {"loss": loss_fn(outputs, batch, None)}

    def loss(outputs: Any, examples: Examples, mask: Array) -> Array:
        return loss_fn(outputs, examples, None)

    def of_outputs(outputs: Any, examples: Examples, mask: Array) -> Any:
        return metric_fn(outputs, examples)

    if isinstance(model, StatisticsModel):
        with_statistics: StatisticsModel = model

        def forward_with(
            variables: Any, examples: Examples, *, key: Key | None, mask: Array | None, frozen: bool = False
        ) -> tuple[Any, Any]:
            return with_statistics.apply(variables, inputs_of(examples), key, mask, frozen)

        def features_with(
            variables: Any, examples: Examples, key: Key | None = None, mask: Array | None = None
        ) -> Array:
            x, frozen = inputs_of(examples), tasks.is_frozen()
            return with_statistics.features(tasks.model_of(variables), x, key, mask, frozen)[0]

        return Task(
            model.init, forward_with, loss, of_outputs, features_with, model.head, model.paths, has_statistics=True
        )
    plain: Model = model

    def forward(params: Params, examples: Examples, *, key: Key | None, mask: Array | None) -> tuple[Any, Any]:
        return plain.apply(params, inputs_of(examples), key), ()

    def features(params: Params, examples: Examples, key: Key | None = None, mask: Array | None = None) -> Array:
        return plain.features(params, inputs_of(examples), key)

    head = (lambda params, z: plain.run(params, z, "head")) if plain.stages else None
    return Task(plain.init, forward, loss, of_outputs, features, head, plain.paths)


def _of_inputs(outputs: Any, examples: Examples, key: Key | None) -> Array:
    return losses.reconstruction_error(outputs, inputs_of(examples))
