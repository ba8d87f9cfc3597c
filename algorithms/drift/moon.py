"""MOON."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class MoonState(NamedTuple):
    """Global model x, every client's previous local model v_i, and the number of rounds done."""

    params: fc.Params
    client_models: fc.ClientTable
    round: fc.Counter = 0


def moon(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    features: fc.FeatureFn,
    num_clients: fc.NumClients,
    mu: fc.Scalar = 1.0,
    temperature: fc.Scalar = 0.5,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """MOON: representations are drawn to the global model's and pushed off those of the client's last local model.

    Client, from y = x:  z, z_g, z_p = features of the batch under y, x and v_i (x and v_i are constants);
                         l_con = -log(e^(cos(z, z_g) / T) / (e^(cos(z, z_g) / T) + e^(cos(z, z_p) / T)));
                         y <- y - lr grad_y (loss + mu l_con), K times;  v_i <- y_i.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). One gradient and two more passes forward per step. The clients remember 1P.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      features: `features(params, batch, key) -> float[B, ...]`, the representation of each example; all axes but the
        first are taken as one vector. With a model of `models` it is
        `lambda params, batch, key: model.features(params, batch["x"], key)`.
      num_clients: size of the population, N.
      mu: weight of the contrast; 0 is FedAvg.
      temperature: T, above 0.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The training loss that is reported includes mu l_con.

    Differences: v_i starts as the first global model (released code: as an initial model of the client's own). A client
    that takes part in the first round therefore sees no contrast in any step of it: z_p is z_g, and l_con log 2. Only
    the latest local model is remembered. The paper weighs clients by their number of examples (`weights="examples"`)
    and adds a projection head to the model, which is the model's business here. A representation of zeros has cosine 0
    with everything.

    Paper: Li, He, Song, "Model-Contrastive Federated Learning", 2021, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("mu", mu, low=0)
    fc.checks.scalar("temperature", temperature, low=0, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def unit_features(params: fc.Params, examples: fc.Examples, key: fc.Key, mask: fc.Array) -> fc.Array:
        """The representations [B, d], scaled to length 1."""
        z = fc.masks.call(features, params, examples, key, mask=mask)
        size = fc.checks.leading_axis(examples)
        if jnp.ndim(z) < 2 or z.shape[0] != size:
            raise ValueError(
                f"features must return one representation per example, float[{size}, ...], but returned shape "
                f"{list(jnp.shape(z))}: do not average over the batch"
            )
        z = z.reshape(size, -1)
        square = jnp.sum(jnp.square(z), axis=1, keepdims=True)
        return z / jnp.sqrt(jnp.where(square > 0, square, 1))

    def init(params: fc.Params) -> MoonState:
        return MoonState(params, fc.client_table(num_clients, params))

    def direction(y, batch, x, v_i):
        z_g = unit_features(x, batch.examples, batch.key, batch.mask)
        z_p = unit_features(v_i, batch.examples, batch.key, batch.mask)

        def contrastive_loss(y, examples, key, mask):
            z = unit_features(y, examples, key, mask)
            l_con = jax.nn.softplus(jnp.sum(z * (z_p - z_g), axis=1) / temperature)
            return fc.masks.call(loss_fn, y, examples, key, mask=mask) + mu * l_con

        return fc.value_and_grad(contrastive_loss)(y, batch)

    def upload(done, x):
        return optax.tree.sub(done.params, x), done.params

    def update(state: MoonState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction, upload=upload)
        results = clients.run(program, state.params, cohort, key, client_inputs=fc.gather(state.client_models, cohort))
        params = fc.add_scaled(state.params, server_lr, results.aggregate)
        return MoonState(params, fc.scatter(state.client_models, cohort, results.outputs)), results

    return fc.federated(init, update)
