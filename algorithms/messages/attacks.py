"""Attacks: what malicious clients send instead of what they trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc
from algorithms.parts import columns, rankings
from fedjax_core.messages import Part, Pass


def sign_flip(malicious: Any, *, factor: fc.Scalar = 1.0) -> Part:
    """Every malicious client sends -factor times its own upload.

    Args:
      malicious: bool[num_clients].
      factor: 1, or 10 for "reverse".

    Paper: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", 2021.
    """
    fc.checks.scalar("factor", factor)
    return _attack("sign_flip", malicious, lambda own, mean, sd, n, f: -factor * own)


def alie(malicious: Any, *, z: fc.Scalar | None = None) -> Part:
    """A little is enough: all malicious clients send mu - z sd of the honest uploads, which hides in their spread.

    z = PhiInv((n - f - s) / (n - f)),  s = floor(n / 2 + 1) - f, of n participants and f malicious ones

    Args:
      malicious: bool[num_clients].
      z: instead of that.

    Differences: released notebooks of other papers use Phi(p) where PhiInv(p) is meant.

    Paper: Baruch, Baruch, Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning", 2019.
    """

    if z is not None:
        fc.checks.scalar("z", z)

    def sent(own: fc.Array, mean: fc.Array, sd: fc.Array, n: fc.Array, f: fc.Array) -> fc.Array:
        needed = jnp.floor(n / 2 + 1) - f
        share = jnp.clip((n - f - needed) / jnp.maximum(n - f, 1), 1e-6, 1 - 1e-6)
        # PhiInv, by a primitive: `scipy.stats.norm.ppf` is a polynomial whose coefficients are arrays.
        deviations = jnp.sqrt(2.0) * jax.lax.erf_inv(2 * share - 1) if z is None else z
        return mean - deviations * sd

    return _attack("alie", malicious, sent)


def inner_product_manipulation(malicious: Any, *, epsilon: fc.Scalar = 0.1) -> Part:
    """All malicious clients send -epsilon times the mean of the honest uploads.

    Against the mean the sign of the result flips exactly when epsilon > (n - f) / f.

    Args:
      malicious: bool[num_clients].
      epsilon: 0.1 is small, 10 is large.

    Paper: Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", 2019.
    """
    fc.checks.scalar("epsilon", epsilon)
    return _attack("inner_product_manipulation", malicious, lambda own, mean, sd, n, f: -epsilon * mean)


def rank_reversal(malicious: Any) -> Part:
    """All malicious clients send the reverse of the ranking that they would elect among themselves.

    V = sum of argsort(R_i) over the malicious participants, who train honestly;  they send argsort(-V)

    For methods whose clients upload rankings, integers [n], such as `frl`.

    Args:
      malicious: bool[num_clients].

    Paper: Mozaffari, Shejwalkar, Houmansadr, "Every Vote Counts: Ranking-Based Training of Federated Learning to
    Resist Poisoning Attacks", 2023.
    """

    def attacked(votes: fc.Array, bad: fc.Array, honest: fc.Array) -> fc.Array:
        if votes.ndim != 2 or not jnp.issubdtype(votes.dtype, jnp.integer):
            raise TypeError(
                f"rank_reversal reverses rankings, integers [n], and what this method's clients upload is "
                f"{votes.dtype}{list(votes.shape[1:])}: take a method whose clients rank, such as frl"
            )
        places = jnp.where(bad[:, None], jax.vmap(rankings.reputation)(votes), 0)
        reverse = rankings.ranking(~jnp.sum(places, axis=0))  # the complement falls where the sum rises
        return jnp.where(bad[:, None] & (votes >= 0), reverse, votes)

    return _by_malicious("rank_reversal", malicious, attacked)


def _attack(name: str, malicious: Any, sent: Callable[..., fc.Array]) -> Part:
    """`sent(own, mean, sd, n, f)` in the place of the uploads of malicious clients, for columns of each leaf of floats.

    own [C, d] are all uploads, mean and sd [d] those of the honest ones (with n - f - 1), n counts participants and f
    the malicious ones among them; what is returned is [d] or [C, d].
    """

    _check_malicious(malicious)
    if fc.checks.is_concrete(malicious) and not np.any(malicious):  # uploads need not be stacked

        def by_nobody(state: Any, asked: Pass, key: fc.Key) -> Any:
            asked.cohort.check_per_client("malicious", malicious)
            return asked.run(), (), jnp.int32(0)

        return Part(by_nobody, name=name)

    def attacked(leaf: fc.Array, bad: fc.Array, honest: fc.Array) -> fc.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf  # indices and switches, of which neither multiples nor means mean anything
        mask, count = honest[:, None], jnp.sum(honest)

        def change(rows: fc.Array) -> fc.Array:
            wide = fc.sums.widen(rows)
            mean = fc.sums.total(jnp.where(mask, wide, 0)) / jnp.maximum(count, 1)
            squares = fc.sums.total(jnp.where(mask, jnp.square(wide - mean), 0))
            sd = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
            other = sent(wide, mean, sd, jnp.sum(honest | bad), jnp.sum(bad))
            return jnp.where(bad[:, None], other.astype(rows.dtype), rows)

        # In place: a choice between all uploads and what is sent instead would hold both.
        return columns.changed(leaf, change)

    def check(upload: fc.PyTree) -> None:
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(upload)})
        if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            raise TypeError(
                f"{name} makes others of the floats of uploads, and this method's clients upload {', '.join(dtypes)}: "
                "take a method that uploads floats, or rank_reversal for rankings"
            )

    return _by_malicious(name, malicious, attacked, check)


def _by_malicious(
    name: str,
    malicious: Any,
    attacked: Callable[..., fc.Array],
    check: Callable[[fc.PyTree], None] = lambda upload: None,
) -> Part:
    """`attacked(leaf, bad, honest)` in the place of each leaf of the uploads, [C, ...]; bad and honest are bool[C].

    `check(upload)` raises where an upload of these shapes and dtypes cannot be attacked.
    """

    _check_malicious(malicious)

    def around(state: Any, asked: Pass, key: fc.Key) -> Any:
        check(asked.received())
        bad = asked.cohort.per_client("malicious", jnp.asarray(malicious, bool)) & asked.cohort.mask
        honest = asked.cohort.mask & ~bad

        def change(uploads: fc.PyTree, weights: fc.Array) -> fc.PyTree:
            return jax.tree.map(lambda leaf: attacked(leaf, bad, honest), uploads)

        return asked.changed(change).run(), (), jnp.sum(bad, dtype=jnp.int32)

    return Part(around, name=name)


def _check_malicious(malicious: Any) -> None:
    """Raises ValueError unless it says of every client whether it is malicious, bool[num_clients]."""
    array = malicious if isinstance(malicious, jax.Array) else np.asarray(malicious)
    if array.ndim == 1 and array.size and array.dtype == bool:
        return
    is_ids = array.ndim == 1 and array.dtype.kind in "iu"
    fix = "numpy.isin(numpy.arange(num_clients), ids)" if is_ids else "True for every client that is malicious"
    raise ValueError(
        f"malicious must be bool[num_clients], got {array.dtype}{list(array.shape)} {malicious!r:.40}: pass {fix}"
    )
