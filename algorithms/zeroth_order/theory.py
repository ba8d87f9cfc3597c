"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_VALUES = "docs/converge.md, proposition 7"

THEORY: dict[str, Theory] = {
    "fedzo": (
        Claim("floor", "values", _VALUES, "mu", 2, exact=True),
        Claim("floor", "values", _VALUES, "clients", -1, exact=True),
        Claim("floor", "values", _VALUES, "zeta", 0, exact=True),
        Claim("floor", "values", _VALUES, "num_steps", 0, exact=True),
        Claim("floor", "values", _VALUES, "client_lr", 1),
    ),
}
