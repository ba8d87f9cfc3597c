"""Models of different architecture that have a header in common."""

from typing import Any

import jax
import numpy as np

import fedjax_core as fc


def head_of(task: fc.Task, model: fc.Params, header: fc.Where | None) -> fc.Params:
    """The header of a model, with a `Hole` for each leaf of its extractor."""
    part: fc.Params = fc.partition(model, task.paths("head") if header is None else header)[0]
    return part


def put(head: fc.Params, model: fc.Params) -> fc.Params:
    """The model with another header."""

    def is_hole(node: Any) -> bool:
        return isinstance(node, fc.Hole)

    return jax.tree.map(lambda new, old: old if is_hole(new) else new, head, model, is_leaf=is_hole)


def check_has_head(name: str, task: Any) -> None:
    """Raises TypeError unless this is a task with features and a head."""
    if not isinstance(task, fc.Task) or task.features is None or task.head is None:
        raise TypeError(
            f"{name} must be a Task with features and a head, got {type(task).__name__}: make one by "
            "models.task(model), or give yours both"
        )


def checked_tasks(tasks: Any, num_groups: int) -> tuple[fc.Task, ...]:
    """The tasks of the groups, each with features and a head, and none with statistics; or an error that says which."""
    if not isinstance(tasks, list | tuple) or len(tasks) != num_groups:
        got = f"{len(tasks)} tasks" if isinstance(tasks, list | tuple) else type(tasks).__name__
        raise ValueError(f"tasks must be one for each of {num_groups} groups, got {got}: pass a tuple of them")
    for g, task in enumerate(tasks):
        check_has_head(f"tasks[{g}]", task)
        if task.has_statistics:
            raise TypeError(
                f"tasks[{g}] has statistics, and groups keep none: take a model without (group normalization in the "
                "place of batch normalization)"
            )
    return tuple(tasks)


def check_models(models: Any, tasks: tuple[fc.Task, ...]) -> None:
    """Raises ValueError unless there is a model for each group, of the architecture of its task."""
    if not isinstance(models, list | tuple) or len(models) != len(tasks):
        raise ValueError(
            f"init needs a tuple of {len(tasks)} models, one for each group: pass tuple(t.init(key) for t in tasks)"
        )
    wanted = [_shapes(jax.eval_shape(lambda task=task: task.init(jax.random.key(0)))) for task in tasks]
    for g, model in enumerate(models):
        found = _shapes(model)
        if found == wanted[g]:
            continue
        fits = [other for other, shapes in enumerate(wanted) if shapes == found]
        hint = f"it is one of tasks[{fits[0]}]" if fits else f"make it by tasks[{g}].init(key)"
        for path in [*wanted[g], *found]:
            want, got = (f"float{list(s[path])}" if path in s else "nothing" for s in (wanted[g], found))
            if want != got:
                raise ValueError(
                    f"models[{g}] has {got} at {path!r}, where tasks[{g}] has {want}: {hint}, and models are in the "
                    "order of the tasks"
                )


def _shapes(model: fc.Params) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in zip(fc.leaf_paths(model), jax.tree.leaves(model), strict=True)}


def check_headers(headers: list[list[fc.Array]]) -> None:
    """Raises ValueError unless the leaves of all groups' headers have the same shapes and dtypes."""
    first, *others = [[(leaf.shape, leaf.dtype) for leaf in leaves] for leaves in headers]
    for g, other in enumerate(others, 1):
        if other != first:
            shapes, expected = ([f"{dtype}{list(shape)}" for shape, dtype in each] for each in (other, first))
            raise ValueError(
                f"the header of group {g} has leaves {', '.join(shapes)}, and that of group 0 {', '.join(expected)}: "
                "give all architectures features of one width, or choose what they have in common with header="
            )
