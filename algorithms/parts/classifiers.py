"""The last layer of a model taken by itself: fixed ones, a client's beside the model's, and risks of unequal classes.

Shapes: B examples in a batch, d features, C classes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts.architectures import check_has_head, head_of, put

Labels = Callable[[fc.Examples], fc.Array]
"""`labels(examples) -> int[B]`, the class of each example."""


class Dense(NamedTuple):
    """A dense layer.

    Attributes:
      kernel: float[d, C].
      bias: float[C]; () where the layer has none.
    """

    kernel: fc.Array
    bias: Any


def check(task: Any, labels: Labels) -> None:
    """Raises TypeError unless the task has features and a head, and labels are a function of examples."""
    fc.checks.takes("labels", labels, ("examples",), example='lambda examples: examples["y"]')
    check_has_head("task", task)


def dense(task: fc.Task, params: fc.Params) -> Dense:
    """The dense layer that is a model's head.

    Raises:
      ValueError: if the head is anything else, or of fewer than two classes.
    """
    leaves = jax.tree.leaves(head_of(task, params, None))
    shapes = [jnp.shape(leaf) for leaf in leaves]
    kernels = [leaf for leaf in leaves if jnp.ndim(leaf) == 2]
    biases = [leaf for leaf in leaves if jnp.ndim(leaf) == 1]
    fits = len(kernels) == 1 and len(biases) <= 1 and len(leaves) == len(kernels) + len(biases)
    if not fits or any(bias.shape != kernels[0].shape[1:] for bias in biases):
        raise ValueError(
            "the task's head must be one dense layer, a kernel [d, C] with or without a bias [C], got leaves of shapes "
            f"{', '.join(str(list(shape)) for shape in shapes)}: give the model such a last layer"
        )
    if kernels[0].shape[1] < 2:
        raise ValueError("the task's head has one output, and classes are told apart by one each: give it two or more")
    return Dense(kernels[0], biases[0] if biases else ())


def with_dense(task: fc.Task, params: fc.Params, kernel: fc.Array, bias: Any = 0.0) -> fc.Params:
    """The model with another kernel [d, C] and another bias in its head; the bias broadcasts to [C]."""

    def new(leaf: fc.Array) -> fc.Array:
        return jnp.broadcast_to(kernel if leaf.ndim == 2 else bias, leaf.shape).astype(leaf.dtype)

    return put(jax.tree.map(new, head_of(task, params, None)), params)


def num_classes(task: fc.Task, params: fc.Params) -> int:
    """C, from the head of a model."""
    return int(dense(task, params).kernel.shape[1])


def features_and_outputs(
    task: fc.Task, params: fc.Params, examples: fc.Examples, key: fc.Key | None, mask: fc.Array
) -> tuple[fc.Array, fc.Array]:
    """What the head is applied to, float[B, d], and what it makes of that, float[B, C].

    Of a task with statistics both are asked for, as `outputs` alone updates these; the compiler sees that the two are
    one pass.
    """
    assert task.features is not None
    z = task.features(params, examples, key, mask)
    if jnp.ndim(z) != 2:
        raise ValueError(f"a task's features must be float[B, d], got shape {list(jnp.shape(z))}: flatten them")
    return z, task.outputs(params, examples, key, mask) if task.has_statistics else of_head(task, params, z)


def of_head(task: fc.Task, params: fc.Params, z: fc.Array) -> fc.Array:
    """What the head of a model makes of features float[B, d], float[B, C]."""
    assert task.head is not None
    return task.head(params, z)


def cross_entropy(outputs: fc.Array, y: fc.Array) -> fc.Array:
    """-log softmax(outputs)[y], float[B], of outputs float[B, C] and classes int[B]."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def length(vectors: fc.Array) -> fc.Array:
    """Lengths float[B, 1] of vectors float[B, n]; 1 for one of zeros, by which they can be divided."""
    square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


# Fixed classifiers.


def simplex_etf(key: fc.Key, dim: int, num_classes: int, dtype: Any = float) -> fc.Array:
    """A simplex equiangular tight frame, float[dim, C]: C unit columns, any two of cosine -1 / (C - 1).

    It is that of a random basis, the orthonormal factor of uniform numbers; see `etf_of`.

    Raises:
      ValueError: if there are fewer dimensions than classes.
    """
    if dim < num_classes:
        raise ValueError(
            f"a frame of {num_classes} classes needs as many features, got {dim}: widen the layer before the head, to "
            f"{num_classes} or more"
        )
    # Drawn in single precision, so that it is the same frame in both.
    uniform = jax.random.uniform(key, (dim, num_classes), jnp.float32)
    basis, _ = fc.linalg.qr(uniform.astype(fc.sums.accumulator(jnp.result_type(dtype))))
    return etf_of(basis).astype(dtype)


def etf_of(basis: fc.Array) -> fc.Array:
    """sqrt(C / (C - 1)) P (I - 1 1' / C), float[d, C], for a matrix P float[d, C] of orthonormal columns."""
    classes = basis.shape[1]
    return math.sqrt(classes / (classes - 1)) * (basis - jnp.mean(basis, axis=1, keepdims=True))


def sparse_etf(
    key: fc.Key,
    dim: int,
    num_classes: int,
    *,
    sparsity: fc.Scalar,
    norm: fc.Scalar,
    steps: int,
    lr: fc.Scalar = 1e-4,
    dtype: Any = float,
) -> fc.Array:
    """A frame float[dim, C] with floor(sparsity dim C) entries of 0, the others such that `spread` is small.

    Entries of a simplex ETF, chosen from the whole matrix, are set to 0, and the others take steps of Adam.
    """
    of_frame, of_zeros = fc.keys.split(key)
    etf = simplex_etf(of_frame, dim, num_classes, fc.sums.accumulator(jnp.result_type(dtype)))
    zeros = sparsity * etf.size
    zeros = int(zeros) if isinstance(zeros, float) else jnp.floor(zeros).astype(int)
    kept = (jax.random.permutation(of_zeros, etf.size) >= zeros).reshape(etf.shape)
    optimizer = optax.adam(lr)

    def step(_: Any, now: tuple[fc.Array, Any]) -> tuple[fc.Array, Any]:
        frame, state = now
        gradient = jnp.where(kept, jax.grad(spread)(frame, norm), 0)
        return fc.optimizer_step(optimizer, frame, state, gradient)  # a zero that gets no gradient stays one

    start = jnp.where(kept, etf, 0)
    return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0].astype(dtype)


def spread(frame: fc.Array, norm: fc.Scalar) -> fc.Array:
    """sum_c (|w_c| - norm)^2 - mean_c of the angle between w_c and the column next to it, for columns w_c float[d, C].

    Least for columns of that norm that are as far from each other as they can be.
    """
    square = jnp.sum(jnp.square(frame), axis=0)
    norms = jnp.sqrt(jnp.where(square > 0, square, 1))
    unit = frame / norms
    cosines = jnp.matmul(unit.T, unit, precision="highest")
    nearest = jnp.max(jnp.where(jnp.eye(len(cosines), dtype=bool), -jnp.inf, cosines), axis=0)
    angles = jnp.arccos(jnp.clip(nearest, -0.99999, 0.99999))
    return jnp.sum(jnp.square(jnp.where(square > 0, norms, 0) - norm)) - jnp.mean(angles)


def drawn_heads(task: fc.Task, like: fc.Params, key: fc.Key, num_clients: int) -> fc.Params:
    """Heads of first models of the task, leaves [num_clients, ...], one drawn for each client.

    Args:
      task: whose init makes whole models, one at a time.
      like: a head, for its dtypes.
      key: a client's is `fold_in(key, client_id)`.
      num_clients: N.
    """

    def one(client: fc.Array) -> fc.Params:
        drawn = task.init(fc.keys.derive(key, client))
        params = drawn.params if isinstance(drawn, fc.Variables) else drawn
        return fc.sums.cast_like(head_of(task, params, None), like)

    heads: fc.Params = jax.lax.map(one, jnp.arange(num_clients))
    return heads


# How many examples of each class a client has.


class Counted(NamedTuple):
    """What was a client's before it counted, and int32[C], how many examples of each class it has."""

    own: Any
    counts: fc.Array


def counting(labels: Labels, num_classes: Callable[[Any], int]) -> fc.ClientProgram:
    """A client that counts its examples by their classes, in a pass over them; it sends nothing and keeps `Counted`.

    Args:
      labels: the class of each example.
      num_classes: `num_classes(shared)`, C, from what the program is given as shared.
    """

    def init(shared: Any, own: Any, key: fc.Key) -> Counted:
        return Counted(own, jnp.zeros(num_classes(shared), jnp.int32))

    def step(shared: Any, now: Counted, batch: fc.Batch) -> tuple[Counted, fc.Array]:
        of_class = classes_of(labels, batch.examples)[:, None] == jnp.arange(len(now.counts))
        counts = now.counts + jnp.sum(of_class & batch.mask[:, None], axis=0, dtype=jnp.int32)
        return now._replace(counts=counts), jnp.zeros((), jnp.result_type(float))

    return fc.ClientProgram(init, step, lambda shared, now: ((), now))


def classes_of(labels: Labels, examples: fc.Examples) -> fc.Array:
    """The class of each example, int[B].

    Raises:
      ValueError: if labels are anything else.
    """
    try:
        y = labels(examples)
    except KeyError as error:
        raise ValueError(
            f"labels asks examples for {error}, and they have {sorted(examples)}: pass labels=, a function of a batch"
            if isinstance(examples, dict)
            else f"labels asks examples for {error}: pass labels=, a function of a batch"
        ) from error
    if jnp.ndim(y) != 1 or not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise ValueError(
            f"labels must give one class for each example, int[B], got {jnp.result_type(y)}{list(jnp.shape(y))}: pass "
            "labels=, a function of a batch"
        )
    return y


def count(
    clients: fc.LocalTraining, labels: Labels, num_classes: int, cohort: fc.Cohort, key: fc.Key
) -> fc.ClientResults:
    """A pass in which the clients of a cohort count; what they keep are `Counted`, with nothing that was theirs."""
    return clients.full_pass().run(counting(labels, lambda shared: num_classes), (), cohort, key)


def balanced(outputs: fc.Array, counts: fc.Array) -> fc.Array:
    """Outputs [B, C] + log n_c: a client's examples seen as if its classes were equally frequent.

    A class without examples, n_c = 0, is left out of the softmax. A client without any leaves out none.
    """
    present = (counts > 0) | ~jnp.any(counts > 0)
    return outputs + jnp.where(present, jnp.log(jnp.maximum(counts, 1).astype(outputs.dtype)), -jnp.inf)


def shares(counts: fc.Array, dtype: Any) -> fc.Array:
    """C n_c / n, float[C], whose mean is 1; ones for a client without examples."""
    n = counts.astype(dtype)
    total = jnp.sum(n)
    return jnp.where(total > 0, n * len(counts) / jnp.where(total > 0, total, 1), 1)
