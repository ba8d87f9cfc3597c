"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_FIXED_POINT = "docs/converge.md, proposition 1"
_NOISE = "docs/converge.md, proposition 2"
_CONTROLS = "docs/converge.md, proposition 4"
_THEOREM = (
    f"{_CONTROLS}; for lr K <= 1 / (81 L) Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, theorem III, whose "
    "bound has no term of heterogeneity"
)

THEORY: dict[str, Theory] = {
    "scaffold": (
        Claim("floor", "drift", _THEOREM),
        Claim("floor", "partial", _THEOREM),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
        Claim("rate", "drift", _CONTROLS, "client_lr", 1),
        Claim("rate", "drift", _CONTROLS, "num_steps", 1),
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
        Claim("floor", "noise", _NOISE, "num_steps", 0, exact=True),
        Claim("floor", "noise", _NOISE, "client_lr", 1),
    ),
    "fedprox": (
        Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
        Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "drift", _FIXED_POINT, "num_steps - 1", 2),
        Claim("floor", "drift", _FIXED_POINT, "mu", 0),
        Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
        Claim("floor", "equal", _FIXED_POINT),
    ),
    "fedavg_m": (
        Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
        Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "drift", _FIXED_POINT, "num_steps - 1", 2),
        Claim("floor", "drift", _FIXED_POINT, "beta", 2),
        Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
        Claim("floor", "equal", _FIXED_POINT),
    ),
    "scaffold_m": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "partial", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
    ),
    "feddyn": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "partial", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
    ),
}
