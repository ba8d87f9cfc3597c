"""FedLoGe."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import classifiers
from algorithms.parts.architectures import head_of, put


class FedLoGeState(NamedTuple):
    """What FedLoGe knows.

    Attributes:
      params: the model x = (theta, psi), whose head is psi.
      etf: W, float[d, C], as it is for good.
      personal: rows, every client's own head phi_i.
      realigned: bool[], whether heads are realigned, which another round takes back.
      round: rounds done.
    """

    params: fc.Params
    etf: fc.Array
    personal: fc.ClientTable
    realigned: fc.Array
    round: fc.Counter = 0


def fedloge(
    task: fc.TaskWithHead,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    labels: classifiers.Labels = lambda examples: examples["y"],
    sparsity: fc.Scalar = 0.6,
    etf_norm: fc.Scalar = 0.1,
    etf_steps: int = 10_000,
    generic_norm: fc.Scalar = 1.7,
    own_start: bool = True,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedLoGe: a body learns under a fixed, sparse classifier, and heads beside it learn what classes are frequent.

    Before the first round: W [d, C] is a simplex ETF with floor(sparsity d C) entries of 0, whose others take etf_steps
             steps of Adam down sum_c (|w_c| - etf_norm)^2 - mean_c min_j angle(w_c, w_j).
    Client, from (theta, psi) = x and phi = phi_i, with z = features of theta, constant for psi and phi:
             theta <- theta - lr grad CE(W' z, c);  psi <- psi - lr grad CE(psi(z), c);
             phi <- phi - lr grad CE(phi(z), c), K times, all three on one batch;  phi_i <- phi.
    Server:  x <- x + server_lr sum_S w_i (x_i - x).
    All predict with W' z, a client with phi_i(z) + psi(z).
    After the last round heads are realigned, class c by its column of the kernel: all predict with psi whose columns
             are generic_norm psi_c / |psi_c|; a client with phi_i(z) + psi(z) whose columns are psi_c |phi_ic|, among
             the classes that it has examples of.

    Down: theta and psi (1P). W is drawn once. Up: x_i - x (1P).

    Args:
      task: a `Task` with features [B, d], d >= C, and a head that is one dense layer with a bias, which is psi; its
        loss is not used.
      client_optimizer: optax optimizer of theta, psi and phi at once, started anew in every round, or a function of the
        round, or of the round and the client's id, giving one.
      num_clients: size of the population.
      labels: `labels(examples) -> int[B]`, the class of each example.
      sparsity: share of W's entries that are 0, in [0, 1).
      etf_norm: what the columns of W are drawn to.
      etf_steps: steps of Adam on W, of rate 1e-4.
      generic_norm: of the columns of the realigned generic head.
      own_start: whether every client begins with a head of its own, drawn by the task's init; else with psi.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    What is drawn is drawn by the key of `init`, without one by that of seed 0. The training loss that is reported is
    the sum of the three. The event "realign" is what is done after the last round; the views "global" and "personal"
    have the heads of that time. For a client without examples all classes count.

    Differences: in the released code W has a bias by mistake, which is drawn and stays. It leaves classes out by
    weights of -1e10, which features below 0 turn around; here their score is minus infinity, so that an example of such
    a class has an infinite loss. It takes the classes of a client's test examples; here they are those that the client
    has seen. Its option to average psi class by class is left out. It weighs clients by their number of examples
    (`weights="examples"`).

    Paper: Xiao, Chen, Liu, Feng, Wu, Liu, Zhou, Yang, Liu, "FedLoGe: Joint Local and Generic Federated Learning under
    Long-tailed Data", 2024, algorithm 1.
    """
    classifiers.check(task, labels)
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("sparsity", sparsity, low=0, high=1, high_open=True)
    fc.checks.scalar("etf_norm", etf_norm, low=0, low_open=True)
    fc.checks.scalar("generic_norm", generic_norm, low=0, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    if etf_steps != 0:
        fc.checks.positive_int("etf_steps", etf_steps, "steps on W, or 0 to leave it as it is drawn")
    clients = fc.local_training(**local)

    def init(params: fc.Params, key: fc.Key | None = None) -> FedLoGeState:
        psi = classifiers.dense(task, params)
        if not len(psi.bias):
            raise ValueError("the task's head has no bias, by which classes are left out: give it one")
        of_etf, of_heads = fc.keys.split(jax.random.key(0) if key is None else key)
        dim, classes = psi.kernel.shape
        etf = classifiers.sparse_etf(
            of_etf, dim, classes, sparsity=sparsity, norm=etf_norm, steps=etf_steps, dtype=psi.kernel.dtype
        )
        first = head_of(task, params, None)
        heads = fc.client_table(num_clients, first)
        if own_start:
            heads = heads._replace(rows=classifiers.drawn_heads(task, first, of_heads, num_clients))
        return FedLoGeState(params, etf, heads, jnp.bool_(False))

    def direction(models, batch, shared, own):
        def risks(models, examples, key, mask):
            x, phi = models
            fixed = classifiers.with_dense(task, x, shared[1])
            z, outputs = classifiers.features_and_outputs(task, fixed, examples, key, mask)
            z = jax.lax.stop_gradient(z)
            heads = (outputs, classifiers.of_head(task, x, z), classifiers.of_head(task, put(phi, x), z))
            c = classifiers.classes_of(labels, examples)
            return sum(classifiers.cross_entropy(scores, c) for scores in heads)

        return fc.value_and_grad(risks)(models, batch)

    def upload(done: fc.Descent, shared):
        x, phi = done.params
        return optax.tree.sub(x, shared[0]), phi

    def update(state: FedLoGeState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, direction, start=lambda shared, phi: (shared[0], phi), upload=upload)
        shared = (state.params, fc.Message(state.etf, 0))  # clients have W
        results = clients.run(program, shared, cohort, key, client_inputs=fc.gather(state.personal, cohort))
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        personal = fc.scatter(state.personal, cohort, results.outputs)
        return state._replace(params=params, personal=personal, realigned=jnp.bool_(False)), results

    def realign(state: FedLoGeState, cohort: fc.Cohort, key: fc.Key) -> FedLoGeState:
        return state._replace(realigned=jnp.bool_(True))

    def generic(state: FedLoGeState) -> fc.Params:
        psi = classifiers.dense(task, state.params)
        aligned = (generic_norm * psi.kernel / norms(psi.kernel)).astype(psi.kernel.dtype)
        kernel = jnp.where(state.realigned, aligned, state.etf)
        return classifiers.with_dense(task, state.params, kernel, jnp.where(state.realigned, psi.bias, 0))

    def own_head(shared: tuple[fc.Params, fc.Array], row: Any) -> fc.Params:
        x, realigned = shared
        if not isinstance(row, classifiers.Counted):  # of a client that is not asked to count
            row = classifiers.Counted(row, jnp.zeros(classifiers.num_classes(task, x), jnp.int32))
        psi, phi = classifiers.dense(task, x), classifiers.dense(task, put(row.own, x))
        square = jnp.sum(jnp.square(phi.kernel), axis=0)
        kernel = phi.kernel + psi.kernel * jnp.where(realigned, jnp.sqrt(square), 1)
        absent = realigned & (row.counts == 0) & jnp.any(row.counts > 0)
        return classifiers.with_dense(task, x, kernel, jnp.where(absent, -jnp.inf, phi.bias + psi.bias))

    counting = classifiers.counting(labels, lambda shared: classifiers.num_classes(task, shared[0]))
    personal = fc.View(
        lambda state: (state.params, state.realigned),
        own_head,
        lambda state: state.personal,
        fc.Adaptation(counting, clients.full_pass().work),
    )
    events = {"realign": fc.Event(realign, "after")}
    return fc.federated(init, update, generic, views={"personal": personal}, events=events)


def norms(kernel: fc.Array) -> fc.Array:
    """Lengths float[C] of the columns of a kernel [d, C]; 1 for one of zeros."""
    return classifiers.length(kernel.T)[:, 0]
