"""Training on the server, on data that it holds itself."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class Student(NamedTuple):
    """The server's model, its optimizer's state, and the sum of its losses."""

    params: fc.Params
    opt_state: fc.PyTree
    total: fc.sums.Running


class Teachers(NamedTuple):
    """Models x + d_i of the participants; d has leaves [C, ...]."""

    x: fc.Params
    displacements: fc.Params
    taking: fc.Array

    def model(self, number: fc.Array) -> fc.Params:
        """One teacher, so that no more than the displacements are held."""
        return fc.add_scaled(self.x, 1.0, jax.tree.map(lambda leaf: leaf[number], self.displacements))

    def mean(self, values: fc.Array) -> fc.Array:
        """[...], the mean of [C, ...] over those that take part."""
        total = fc.sums.total(jnp.where(fc.sums.across(self.taking, values), values, 0))
        return (total / jnp.maximum(jnp.sum(self.taking), 1)).astype(values.dtype)


def size_of(examples: fc.Examples, name: str = "public") -> int:
    """The number of the server's examples, or ValueError where there are none."""
    if not jax.tree.leaves(examples):
        raise ValueError(
            "the server trains on public data, and the population has none: give it unlabelled examples, for example "
            'population.with_public({"x": inputs})'
            if name == "public"
            else f"{name} holds no arrays: pass labelled examples, or none"
        )
    size = fc.checks.leading_axis(examples, name)
    if not size:
        raise ValueError(f"{name} holds 0 examples, and the server needs at least 1: give it some")
    return size


@contextlib.contextmanager
def reading(name: str, batch: fc.Examples) -> Iterator[None]:
    """Raises ValueError if a function asks a batch of public examples for what they do not have."""
    try:
        yield
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(batch, Mapping) or key in batch:
            raise
        raise ValueError(
            f"{name} reads {key!r}, and the public examples that the server gives it have "
            f"{', '.join(map(repr, batch))}: name them as those of the clients, population.with_public({{...}}), or "
            "choose them by unlabelled="
        ) from error


def in_batches(target: Callable[..., fc.Array], examples: fc.Examples, size: int, batch_size: int) -> fc.Array:
    """`target(batch, mask)` of all examples, [size, ...], from batches of them."""
    rows = jnp.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size)

    def of_batch(rows: fc.Array) -> fc.Array:
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), examples)
        return target(batch, rows < size)

    found = jax.lax.map(of_batch, rows)
    return found.reshape(-1, *found.shape[2:])[:size]


def until_no_better(
    step: Callable[[fc.Array, Student], Student],
    begun: Student,
    score: Callable[[fc.Params], fc.Array],
    most: int,
    patience: int,
    check_every: int,
) -> tuple[fc.Params, Student, fc.Array]:
    """Steps until a score of the params, float[], gets no smaller.

    Args:
      step: `step(number, student) -> student`.
      begun: the student before the first step.
      score: what is to be small; it is looked at before the first step and after every `check_every` steps.
      most: steps at most.
      patience: steps without a smaller score after which there are no more.
      check_every: steps between looks.

    Returns:
      The params of the smallest score, the last student, and the number of steps taken, int32[].
    """

    def goes_on(now: tuple[Student, fc.Params, fc.Array, fc.Array, fc.Array]) -> fc.Array:
        _, _, _, found, steps = now
        return (steps < most) & (steps - found < patience)

    def body(now: tuple[Student, fc.Params, fc.Array, fc.Array, fc.Array]) -> Any:
        student, best, smallest, found, steps = now
        then = jnp.minimum(steps + check_every, most)
        student = jax.lax.fori_loop(steps, then, step, student)
        value = score(student.params)
        better = value < smallest
        best = optax.tree.where(better, student.params, best)
        return student, best, jnp.where(better, value, smallest), jnp.where(better, then, found), then

    zero = jnp.int32(0)
    start = begun, begun.params, score(begun.params), zero, zero
    student, best, _, _, steps = jax.lax.while_loop(goes_on, body, start)
    return best, student, steps
