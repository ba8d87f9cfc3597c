"""What is known of the convergence of the methods in this folder, and by whom (`algorithms.theory`)."""

from algorithms.parts.claims import Claim, Theory

_FIXED_POINT = "docs/converge.md, proposition 1"
_NOISE = "docs/converge.md, proposition 2"
_SAMPLING = "docs/converge.md, proposition 3"
_CONTROLS = "docs/converge.md, proposition 4"
_UPHILL = "docs/converge.md, proposition 5"
_BEYOND = "docs/converge.md, proposition 8"
_CONSENSUS = "docs/converge.md, proposition 9"
_THEOREM = (
    f"{_CONTROLS}; for lr K <= 1 / (81 L) Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, theorem III, whose "
    "bound has no term of heterogeneity"
)

_LIKE_FEDAVG = (
    Claim("floor", "drift", _FIXED_POINT, "zeta", 2, exact=True),
    Claim("floor", "drift", _FIXED_POINT, "client_lr", 2),
    Claim("floor", "drift", _FIXED_POINT, "num_steps - 1", 2),
)
"""Of methods that come to rest where FedAvg does, for heterogeneity and the length of local steps."""

THEORY: dict[str, Theory] = {
    "scaffold": (
        Claim("floor", "drift", _THEOREM),
        Claim("floor", "drift", _CONSENSUS, measure="consensus"),
        Claim("floor", "partial", _THEOREM),
        Claim("floor", "irregular", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
        Claim("rate", "drift", _CONTROLS, "client_lr", 1),
        Claim("rate", "drift", _CONTROLS, "num_steps", 1),
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
        Claim("floor", "noise", _NOISE, "num_steps", 0, exact=True),
        Claim("floor", "noise", _NOISE, "client_lr", 1),
        Claim("floor", "logistic", _BEYOND),
        Claim("rate", "logistic", _BEYOND, "client_lr", 1),
        Claim("rate", "logistic", _BEYOND, "curvature", 1),
        Claim("floor", "pl", _BEYOND, measure="excess"),
        Claim("rate", "pl", _BEYOND, "client_lr", 1, measure="excess"),
        Claim("mean", "nonconvex", _BEYOND, "rounds", -1, measure="gradient", relation="at most"),
    ),
    "fedprox": (
        *_LIKE_FEDAVG,
        Claim("floor", "drift", _FIXED_POINT, "mu", 0),
        Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
        Claim("floor", "equal", _FIXED_POINT),
    ),
    "fedavg_m": (
        *_LIKE_FEDAVG,
        Claim("floor", "drift", _FIXED_POINT, "beta", 2),
        Claim("floor", "drift", _CONSENSUS, "beta", 2, measure="consensus"),
        Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
        Claim("floor", "equal", _FIXED_POINT),
    ),
    "fedavg_m_vr": (
        *_LIKE_FEDAVG,
        Claim("floor", "drift", _FIXED_POINT, "beta", 0, exact=True),
        Claim("floor", "drift", _CONSENSUS, "beta", 2, exact=True, measure="consensus"),
        Claim("rate", "drift", _FIXED_POINT, "zeta", 0, exact=True),
        Claim("rate", "drift", _FIXED_POINT, "client_lr", 1),
        Claim("rate", "drift", _FIXED_POINT, "num_steps", 1),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
    ),
    "scaffold_m": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "partial", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
    ),
    "scaffold_m_vr": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "drift", _CONSENSUS, measure="consensus"),
        Claim("floor", "partial", _CONTROLS),
        Claim("floor", "irregular", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
        Claim("rate", "drift", _CONTROLS, "client_lr", 1),
        Claim("rate", "drift", _CONTROLS, "num_steps", 1),
        Claim("floor", "noise", _NOISE, "sigma", 2, exact=True),
        Claim("floor", "noise", _NOISE, "clients", -1, exact=True),
    ),
    "feddyn": (
        Claim("floor", "drift", _CONTROLS),
        Claim("floor", "partial", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
    ),
    "fedspeed": (
        Claim("floor", "drift", _UPHILL, "rho", 2),
        Claim("floor", "drift", _UPHILL, "zeta", 0),
        Claim("floor", "drift", _UPHILL, "client_lr", 0, exact=True),
        Claim("floor", "drift", _UPHILL, "num_steps", 0, exact=True),
        Claim("floor", "drift", _UPHILL, measure="consensus"),
        Claim("floor", "partial", _UPHILL, "client_lr", 0, exact=True),
    ),
    "mime": (
        Claim("floor", "drift", _CONTROLS),
        Claim("rate", "drift", _CONTROLS, "zeta", 0, exact=True),
        Claim("rate", "drift", _CONTROLS, "client_lr", 1),
        Claim("floor", "noise", _NOISE),
        Claim("floor", "partial", _SAMPLING, "zeta", 2, exact=True),
        Claim("floor", "partial", _SAMPLING, "client_lr", 1),
    ),
}
