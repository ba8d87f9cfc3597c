"""One body with a head for every task."""

from typing import Any

import jax.numpy as jnp

from fedjax_core import Array, Key, Params
from models._common import Model, Stage, check_positive, span


def multi_head(model: Model, num_tasks: int) -> Model:
    """A classifier of K classes in each of T tasks, from one of T K outputs.

    The head's kernel [d, T K] and bias [T K] are the tasks' heads side by side. An example meets that of its own task
    alone, so that no other gets a gradient from it.

    Args:
      model: with outputs [B, T K].
      num_tasks: T.

    Returns:
      A `Model` of inputs {"inputs": [B, ...], "task": int[B]} with outputs [B, K], NaN for a task outside 0..T-1. What
      stands between its stages is such a dict too.
    """
    check_positive("num_tasks", num_tasks)

    def own_head(outputs: Array, task: Array) -> Array:
        if outputs.shape[-1] % num_tasks:
            raise ValueError(
                f"num_tasks must divide the model's {outputs.shape[-1]} outputs, got {num_tasks}; build the model with "
                "num_tasks times the classes of a task."
            )
        heads = outputs.reshape(len(outputs), num_tasks, -1)
        task = jnp.asarray(task, jnp.int32)
        own = jnp.take_along_axis(heads, jnp.clip(task, 0, num_tasks - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((task >= 0) & (task < num_tasks))[:, None], own, jnp.nan)

    def apply(params: Params, x: dict[str, Array], key: Key | None = None) -> Array:
        return own_head(model.apply(params, x["inputs"], key), x["task"])

    def features(params: Params, x: dict[str, Array], key: Key | None = None) -> Array:
        return model.features(params, x["inputs"], key)

    def run(
        params: Params, x: dict[str, Any], start: Stage = None, stop: Stage = None, key: Key | None = None
    ) -> dict[str, Any] | Array:
        first, last = span(model.stages, start, stop)
        if first == last:
            return x
        outputs = model.run(params, x["inputs"], first, last, key)
        return {"inputs": outputs, "task": x["task"]} if last < len(model.stages) else own_head(outputs, x["task"])

    return model._replace(apply=apply, features=features, run=run)
