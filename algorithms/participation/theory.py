"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_SAMPLING = "docs/converge.md, proposition 3"

THEORY: dict[str, Theory] = {
    "fedvarp": (
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 2),
    ),
}
