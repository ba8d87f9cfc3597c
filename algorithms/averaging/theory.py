"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_FIXED_POINT = "docs/converge.md, proposition 1"
_NOISE = "docs/converge.md, proposition 2"
_SAMPLING = "docs/converge.md, proposition 3"

_DRIFT = (
    Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
    Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
    Claim("floor", "drift", _FIXED_POINT, "num_steps - 1", 2),
    Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
    Claim("rate", "drift", _FIXED_POINT, "client_lr", 1),
    Claim("rate", "drift", _FIXED_POINT, "num_steps", 1),
    Claim("floor", "equal", _FIXED_POINT),
)

THEORY: dict[str, Theory] = {
    "fedavg": (
        *_DRIFT,
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
        Claim("floor", "noise", _NOISE, "num_steps", 0, exact=True),
        Claim("floor", "noise", _NOISE, "client_lr", 1),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim(
            "floor",
            "unequal",
            f"{_FIXED_POINT}; Wang, Liu, Liang, Joshi, Poor 2020, whose objective inconsistency it is",
            "client_lr",
            0,
        ),
    ),
    "fednova": (
        *_DRIFT,
        Claim("floor", "unequal", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "unequal", _FIXED_POINT, "zeta", 2, exact=True),
    ),
}
