"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_FIXED_POINT = "docs/converge.md, proposition 1"
_NOISE = "docs/converge.md, proposition 2"
_SAMPLING = "docs/converge.md, proposition 3"
_EXTRAPOLATION = "docs/converge.md, proposition 6"
_BEYOND = "docs/converge.md, proposition 8"
_CONSENSUS = "docs/converge.md, proposition 9"

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
        Claim("rate", "drift", _FIXED_POINT, "curvature", 1),
        Claim("floor", "drift", _CONSENSUS, "zeta", 2, exact=True, measure="consensus"),
        Claim("floor", "drift", _CONSENSUS, "client_lr", 2, measure="consensus"),
        Claim("floor", "drift", _CONSENSUS, "num_steps", 2, measure="consensus"),
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
        Claim("floor", "noise", _NOISE, "num_steps", 0, exact=True),
        Claim("floor", "noise", _NOISE, "client_lr", 1),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim("floor", "irregular", _SAMPLING, "client_lr", 0),
        Claim(
            "floor",
            "unequal",
            f"{_FIXED_POINT}; Wang, Liu, Liang, Joshi, Poor 2020, whose objective inconsistency it is",
            "client_lr",
            0,
        ),
        Claim("floor", "logistic", _BEYOND, "zeta", 2),
        Claim("floor", "logistic", _BEYOND, "client_lr", 2),
        Claim("rate", "logistic", _BEYOND, "client_lr", 1, measure="excess"),
        Claim("rate", "logistic", _BEYOND, "curvature", 1, measure="excess"),
        Claim("floor", "pl", _BEYOND, "zeta", 6, measure="excess"),
        Claim("floor", "pl", _BEYOND, "client_lr", 6, measure="excess"),
        Claim("rate", "pl", _BEYOND, "client_lr", 1, measure="excess"),
        Claim("rate", "pl", _BEYOND, "num_steps", 1, measure="excess"),
        Claim("mean", "nonconvex", _BEYOND, "rounds", -1, measure="gradient", relation="at most"),
        Claim("mean", "nonconvex", _BEYOND, "client_lr", -1, measure="gradient"),
        Claim("mean", "nonconvex", _BEYOND, "num_steps", -1, measure="gradient"),
        Claim("floor", "nonconvex noise", _BEYOND, "sigma", 2, measure="gradient"),
        Claim("floor", "nonconvex noise", _BEYOND, "client_lr", 1, measure="gradient"),
    ),
    "fednova": (
        *_DRIFT,
        Claim("floor", "unequal", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "unequal", _FIXED_POINT, "zeta", 2, exact=True),
    ),
    "fedexp": (
        Claim("floor", "drift", _EXTRAPOLATION, "zeta", 2),
        Claim("floor", "drift", _EXTRAPOLATION, "client_lr", 2),
        Claim("rate", "drift", _EXTRAPOLATION, "zeta", 0),
        Claim("rate", "drift", _EXTRAPOLATION, "client_lr", 1),
        Claim("floor", "apart", _EXTRAPOLATION, "zeta", 2),
        Claim("floor", "apart", _EXTRAPOLATION, "client_lr", 1),
        Claim("floor", "apart", _EXTRAPOLATION, "num_steps", 1),
    ),
}
