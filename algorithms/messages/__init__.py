"""Parts for any method (`fedjax_core.messages.with_part`): codecs, rules, attacks, privacy, observers, clocks."""

from algorithms.messages.attacks import alie, inner_product_manipulation, rank_reversal, sign_flip
from algorithms.messages.clocks import deadline
from algorithms.messages.codecs import stochastic_rounding, top_k
from algorithms.messages.observers import observed
from algorithms.messages.privacy import client_level_dp
from algorithms.messages.rules import coordinate_median, krum, trimmed_mean

__all__ = [
    "alie",
    "client_level_dp",
    "coordinate_median",
    "deadline",
    "inner_product_manipulation",
    "krum",
    "observed",
    "rank_reversal",
    "sign_flip",
    "stochastic_rounding",
    "top_k",
    "trimmed_mean",
]
