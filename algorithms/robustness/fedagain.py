"""FedAgain: adaptive gain by trust."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import trust as parts
from algorithms.parts.server_training import in_batches, size_of


class FedAgainState(NamedTuple):
    """Global model x, the logarithm of the trust in each client, and the number of rounds done."""

    params: fc.Params
    log_trust: fc.ClientTable
    round: fc.Counter = 0


class FedAgainMetrics(NamedTuple):
    """What the server has seen and made of it.

    Attributes:
      error: float[], mean of the errors r_i over the participants whose signals are finite.
      divergence: float[], the same of their divergences d_i.
      effective: float[], 1 / sum_i lambda_i^2, as many participants as have a say; 0 of none.
    """

    error: fc.Array
    divergence: fc.Array
    effective: fc.Array


def fedagain(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    a: fc.Scalar = 1.0,
    b: fc.Scalar = 1.0,
    rho: fc.Scalar = 1.0,
    reference: str = "median",
    divergence: str = "model",
    floor: fc.Scalar = 0.0,
    benchmark: Callable[[Any], fc.Examples] | None = None,
    held_out: fc.Scalar = 0.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAgain: clients weigh by how well their models reconstruct and by how near they have stayed to the global one.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              r_i = mean error of y_i;  d_i = |y_i - x|;
                         s_i = exp(-a r_i / ref(r) - b d_i / ref(d));  tau_i <- (1 - rho) tau_i + rho s_i;
                         lambda_i = w_i tau_i / sum_S w_j tau_j;  x <- x + server_lr sum_S lambda_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P), and r_i where clients report it. The server holds the uploads of all participants.

    The errors are values of the loss, which is the reconstruction error of an autoencoder (`models.autoencoder` and
    `models.losses.reconstruction`) or any other of examples that all clients should be good at. ref is taken over the
    participants, so that all errors, or all divergences, may be multiplied by a number. Where ref is 0 all count as 1.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; where errors are measured the key is None.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      a: how much errors count; 0 leaves them out.
      b: how much divergence counts; 0 leaves it out. With a = b = 0 this is FedAvg.
      rho: 1 takes this round's trust alone, less what there was before with it; an absent client's stays.
      reference: "median", which one client cannot move however bad it is, or "mean".
      divergence: "model", or "layers", the root of sum_l |y_l - x_l|^2 / |x_l|^2 over the leaves of the model (those
        that are 0 as they are).
      floor: where no participant has a trust s_i as large, all weigh the same.
      benchmark: `benchmark(public) -> examples`, clean examples as the loss takes them that the server has in the
        population's public data, on which it measures all r_i itself. Unless given clients report their own, which a
        forger can choose.
      held_out: share of its examples, the last ones, that a client does not train on and measures its error on; of the
        others where the share is less than one example. Means nothing with a benchmark.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. The
        reconstruction weighs by n_i (`weights="examples"`).

    A client whose error or divergence is not finite weighs nothing. One that sends x back has d = 0 and is not found
    out by that: only its error tells.

    Differences: the formulas are a reconstruction from the abstract of the paper, which names the two signals and what
    they are for; no code of the authors is known.

    Paper: Reyes-Amezcua, Lopez-Tiro, Larose, Daul, Mendez-Vazquez, Ochoa-Ruiz, "Robust Federated Anomaly Detection
    Using Dual-Signal Autoencoders: Application to Kidney Stone Identification in Ureteroscopy", 2025.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("a", a, low=0)
    fc.checks.scalar("b", b, low=0)
    fc.checks.scalar("rho", rho, low=0, high=1)
    fc.checks.one_of("reference", reference, ("median", "mean"))
    fc.checks.one_of("divergence", divergence, ("model", "layers"))
    fc.checks.scalar("floor", floor, low=0)
    if benchmark is not None:
        fc.checks.takes("benchmark", benchmark, ("public",), example="lambda public: public")
    fc.checks.scalar("held_out", held_out, low=0, high=1, high_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient, reporting = fc.value_and_grad(loss_fn), parts.mean_loss(loss_fn)

    def init(params: fc.Params) -> FedAgainState:
        return FedAgainState(params, fc.client_table(num_clients, jnp.zeros(())))

    def on_benchmark(x: fc.Params, displacements: fc.Params, public: Any) -> fc.Array:
        """float[C], the mean error of every client's model."""
        assert benchmark is not None
        if not jax.tree.leaves(public):
            raise ValueError(
                "the benchmark is part of the population's public data, and there is none: give it clean examples, for "
                "example population.with_public({'x': inputs}), or leave benchmark out"
            )
        examples = benchmark(public)
        size = size_of(examples, "benchmark")

        def of_client(displacement: fc.Params) -> fc.Array:
            y = fc.add_scaled(x, 1.0, displacement)

            def errors(batch: fc.Examples, mask: fc.Array) -> fc.Array:
                values: fc.Array = fc.masks.call(loss_fn, y, batch, None, mask=mask, name="loss_fn")
                return values

            return fc.sums.total(in_batches(errors, examples, size, min(size, 256))) / size

        return jax.lax.map(of_client, displacements)

    def signals(state: FedAgainState, cohort: fc.Cohort, key: fc.Key) -> tuple[fc.Params, fc.Array, fc.ClientResults]:
        """Displacements, leaves [C, ...], errors, float[C], and what the passes were."""
        x, optimizer = state.params, fc.optimizer_at(client_optimizer, state.round)
        if benchmark is not None:
            results = clients.run(fc.local_descent(optimizer, gradient), x, cohort, key, aggregator=fc.stacked())
            return results.aggregate, on_benchmark(x, results.aggregate, cohort.public), results
        training, measuring = parts.parted(cohort, held_out)
        program = fc.local_descent(
            optimizer, gradient, upload=lambda done, x: (optax.tree.sub(done.params, x), done.params)
        )
        results = clients.run(program, x, training, key, aggregator=fc.stacked())
        said = clients.full_pass().run(reporting, (), measuring, key, results.outputs, aggregator=fc.stacked())
        return results.aggregate, said.aggregate, fc.merge_phases(results, bytes_of=[said])

    def update(state: FedAgainState, cohort: fc.Cohort, key: fc.Key):
        displacements, r, results = signals(state, cohort, key)
        d = parts.divergences(displacements, state.params, divergence)
        known = cohort.mask & (results.weights > 0) & jnp.isfinite(r) & jnp.isfinite(d)
        log_s = parts.log_trust(r, d, a, b, known, reference)
        # In logarithms, for trust is soon too small for a float.
        log_tau = jnp.logaddexp(jnp.log1p(-rho) + fc.gather(state.log_trust, cohort), jnp.log(rho) + log_s)
        share = parts.shares(results.weights, log_tau, log_s, known, floor)
        used = jax.tree.map(lambda leaf: jnp.where(fc.sums.across(share > 0, leaf), leaf, 0), displacements)
        params = fc.add_scaled(state.params, server_lr, fc.sums.weighted(share, used))
        square, n = jnp.sum(jnp.square(share)), jnp.maximum(jnp.sum(known), 1)
        error, mean_divergence = (fc.sums.total(jnp.where(known, values, 0)) / n for values in (r, d))
        effective = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1), 0)
        told = FedAgainMetrics(error, mean_divergence, effective)
        return FedAgainState(params, fc.scatter(state.log_trust, cohort, log_tau)), results, told

    return fc.federated(init, update)
