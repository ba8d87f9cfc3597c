"""What is known of the convergence of each method, as data: `theory.of("fedavg")`.

Claims stand beside the methods, in a file `theory.py` of their folder. `fedjax-core converge` measures them.
"""

from algorithms.averaging import theory as averaging
from algorithms.drift import theory as drift
from algorithms.participation import theory as participation
from algorithms.parts.claims import Claim as Claim
from algorithms.parts.claims import Theory as Theory
from algorithms.zeroth_order import theory as zeroth_order

ALL: dict[str, Theory] = {**averaging.THEORY, **drift.THEORY, **participation.THEORY, **zeroth_order.THEORY}
"""Name of a method to what is known of it."""


def of(name: str) -> Theory:
    """The claims about a method; none if nothing is entered for it."""
    return ALL.get(name, ())
