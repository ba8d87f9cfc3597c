"""What theory says of a method, as data that a measurement can confirm or contradict."""

from typing import NamedTuple

SETTINGS = {
    "drift": "no noise, everybody takes part, Hessians differ",
    "equal": "no noise, everybody takes part, equal Hessians",
    "noise": "noise, no heterogeneity, everybody takes part, equal Hessians",
    "partial": "no noise, half of the clients take part in a round, Hessians differ",
    "unequal": "no noise, everybody takes part, clients take unequal numbers of steps, Hessians differ",
}
"""Where a claim holds: on strongly convex quadratics, of clients whose steps are plain SGD at a constant rate."""

CONSTANTS = {
    "zeta": "heterogeneity, the root of the mean of ||grad f_i(x*)||^2",
    "sigma": "noise, the root of the variance of the gradient of one example",
    "client_lr": "the learning rate of the clients",
    "num_steps": "K, the local steps of a round",
    "num_steps - 1": "K - 1",
    "clients": "N, the number of clients",
    "beta": "weight of the fresh gradient beside momentum",
    "mu": "weight of a proximal term",
}
"""What a quantity may depend on."""


class Claim(NamedTuple):
    """One statement: `quantity` ~ `constant`^`exponent`, or that there is no floor.

    Attributes:
      quantity: "floor", what the squared distance to the minimizer stays at in the mean; or "rate", c of its fall like
        exp(-c t) over rounds t.
      setting: where it holds, of `SETTINGS`.
      source: who shows it, with the number of the theorem or proposition.
      constant: what it depends on, of `CONSTANTS`; "" if there is no floor.
      exponent: of the constant, 0 if it does not depend on it; None if there is no floor.
      exact: whether it holds for every value at which the method is stable, and not only to leading order for a small
        learning rate.
    """

    quantity: str
    setting: str
    source: str
    constant: str = ""
    exponent: float | None = None
    exact: bool = False

    def __str__(self) -> str:
        if self.exponent is None:
            return "there is no floor"
        if self.exponent == 0:
            return f"the {self.quantity} does not depend on {self.constant}"
        constant = f"({self.constant})" if " " in self.constant else self.constant
        return f"the {self.quantity} goes with {constant}^{self.exponent:g}"


Theory = tuple[Claim, ...]


def check(claim: Claim) -> None:
    """Raises ValueError if a claim is about something that is not known here."""
    for name, value, known in (
        ("quantity", claim.quantity, ("floor", "rate")),
        ("setting", claim.setting, SETTINGS),
        ("constant", claim.constant, ("", *CONSTANTS)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} of a claim is none of {', '.join(known)}: take one of them")
    if (claim.exponent is None) != (not claim.constant) or (not claim.constant and claim.quantity != "floor"):
        raise ValueError(f"a claim has constant={claim.constant!r} and exponent={claim.exponent}: give both or neither")
    if not claim.source:
        raise ValueError("a claim has no source: say who shows it")
