"""Privacy of clients: what a single client can change, and noise that hides it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc
from fedjax_core.messages import Part, Pass


class PrivacyInfo(NamedTuple):
    """What was clipped.

    Attributes:
      clipped: float[], share of the participants whose upload was longer than the clip, or not finite.
    """

    clipped: fc.Array


def client_level_dp(clip: fc.Scalar, noise_multiplier: fc.Scalar, *, expected: fc.Scalar) -> Part:
    """DP-FedAvg: a sum of clipped uploads with Gaussian noise, over a number of clients that is fixed beforehand.

    u_i <- u_i min(1, S / ||u_i||);  result = (sum_i u_i + N(0, z^2 S^2 I)) / (q N)

    Clipped is what the server has decoded, as the last thing before the sum: wherever codecs and attacks stand, a
    client changes the sum by at most S. An upload whose norm is not finite adds nothing. Clients are to be sampled by
    independent coin flips of rate q (`samplers.bernoulli`); a round without anybody is noise alone, as every round
    behind this part is. Weights of clients do not count: of w_i u_i the longest would be max_j w_j S.

    For methods that average their uploads, floats, themselves: what a server makes of them first (`fc.mapped`) may be
    longer than the clip, and is refused, as are uploads in events. Each pass that uploads has noise of its own, and
    counts as one release. Losses, participants and the other metrics are the simulation's, without noise.

    Args:
      clip: S, the longest upload, Euclidean norm of all leaves together.
      noise_multiplier: z.
      expected: q N, participants to be expected.

    Paper: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", 2018.
    """
    for name, value in (("clip", clip), ("expected", expected)):
        fc.checks.scalar(name, value, low=0, low_open=True, finite=name != "clip")
    fc.checks.scalar("noise_multiplier", noise_multiplier, low=0)
    infinite = fc.checks.is_concrete(clip) and np.isinf(clip)
    if infinite and not (fc.checks.is_concrete(noise_multiplier) and noise_multiplier == 0):
        raise ValueError(
            f"clip is infinite and noise_multiplier={noise_multiplier!r:.60}: the noise has deviation noise_multiplier "
            "* clip, choose a finite clip, or noise_multiplier=0.0 for none"
        )
    # Nothing is added where it is known that there is none: the clip may be infinite then.
    has_noise = not fc.checks.is_concrete(noise_multiplier) or noise_multiplier > 0

    def clipped(upload: fc.PyTree) -> tuple[fc.PyTree, fc.Array]:
        norm = fc.sums.norm(upload)
        finite = jnp.isfinite(norm)
        factor = jnp.minimum(1, clip / jnp.where(finite & (norm > 0), norm, 1))
        shorter = jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * jnp.where(finite, leaf, 0), upload)
        return shorter, (~finite | (norm > clip)).astype(jnp.result_type(float))

    def around(state: Any, asked: Pass, key: fc.Key) -> Any:
        _check_floats(asked.received())
        # Apart from the keys of clients, which codecs round by: noise that depends on what is sent hides less.
        noise_key = jax.random.fold_in(key, fc.checks.LARGEST_INT)

        def finish(total: fc.PyTree) -> fc.PyTree:
            noisy = _with_noise(total, noise_multiplier * clip, noise_key) if has_noise else total
            return jax.tree.map(lambda leaf: leaf / expected, noisy)

        results = asked.with_sum(clipped, finish, "client_level_dp").run()
        aggregate, too_long = results.aggregate
        share = too_long / jnp.maximum(asked.cohort.num_participants, 1)
        return results._replace(aggregate=aggregate), state, PrivacyInfo(share)

    return Part(around, name="client_level_dp", private=True)


def _check_floats(upload: fc.PyTree) -> None:
    for leaf in jax.tree.leaves(upload):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"client_level_dp scales uploads and adds noise, and this method's clients upload {leaf.dtype}: take a "
                "method that uploads floats"
            )


def _with_noise(tree: fc.PyTree, deviation: fc.Scalar, key: fc.Key) -> fc.PyTree:
    """Adds normal noise, which is drawn in float32: the same in both precisions."""
    leaves, treedef = jax.tree.flatten(tree)
    noise = (
        jax.random.normal(k, leaf.shape, jnp.float32).astype(leaf.dtype)
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    )
    noisy = [leaf + jnp.asarray(deviation, leaf.dtype) * n for leaf, n in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(treedef, noisy)
