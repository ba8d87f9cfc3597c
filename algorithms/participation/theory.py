"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_FIXED_POINT = "docs/converge.md, proposition 1"
_NOISE = "docs/converge.md, proposition 2"
_SAMPLING = "docs/converge.md, proposition 3"
_CONTROLS = "docs/converge.md, proposition 4"
_ARRIVALS = f"{_SAMPLING}; Yang, Zhang, Khanduri, Liu 2022, whose bound for AFA-CD has an error that arrivals leave"
_REUSE = f"{_SAMPLING}; Yang, Zhang, Khanduri, Liu 2022, whose bound for AFA-CS has none of AFA-CD's error of arrivals"

THEORY: dict[str, Theory] = {
    "fedvarp": (
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 2),
        Claim("floor", "irregular", _SAMPLING, "client_lr", 2),
    ),
    "fedstale": (
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim("floor", "partial", _SAMPLING, "1 - beta", 2),
    ),
    "fedau": (
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim("floor", "irregular", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "irregular", _SAMPLING, "client_lr", 1),
    ),
    "fedamd": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "partial", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
        Claim("rate", "drift", _CONTROLS, "client_lr", 1),
        Claim("rate", "drift", _CONTROLS, "num_steps", 1),
        Claim("floor", "noise", _NOISE),
    ),
    "afa_cd": (
        Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
        Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "drift", _FIXED_POINT, "num_steps - 1", 2),
        Claim("rate", "drift", _FIXED_POINT, "client_lr", 1),
        Claim("rate", "drift", _FIXED_POINT, "num_steps", 0),
        Claim("floor", "unequal", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim("floor", "irregular", _ARRIVALS, "client_lr", 0),
    ),
    "afa_cs": (
        Claim("floor", "unequal", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 2),
        Claim("floor", "irregular", _REUSE, "client_lr", 2),
    ),
    "fedfix": (
        Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
        Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim(
            "floor",
            "irregular",
            f"{_SAMPLING}; Fraboni, Vidal, Kameni, Lorenzi 2023, whose weights have to fit the shares of deliveries",
            "client_lr",
            0,
        ),
    ),
}
