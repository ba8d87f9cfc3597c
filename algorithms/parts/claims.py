"""What theory says of a method, as data that a measurement can confirm or contradict."""

from typing import NamedTuple

SETTINGS = {
    "drift": "quadratics, no noise, everybody takes part, Hessians differ",
    "equal": "quadratics, no noise, everybody takes part, equal Hessians",
    "noise": "quadratics, noise, no heterogeneity, everybody takes part, equal Hessians",
    "partial": "quadratics, no noise, half of the clients take part in a round, Hessians differ",
    "irregular": "quadratics, no noise, clients take part with unequal probabilities, Hessians differ",
    "unequal": "quadratics, no noise, everybody takes part, clients take unequal numbers of steps, Hessians differ",
    "apart": "quadratics, no noise, everybody takes part, Hessians differ, heterogeneity above all gradients of F",
    "values": "quadratics, no noise, everybody takes part, equal Hessians, rates at which queries average out",
    "logistic": "logistic regression, whole batches, everybody takes part, minimizer by Newton's method",
    "pl": "not convex, of Polyak and Lojasiewicz (sine), no noise, everybody takes part",
    "nonconvex": "not convex, flat far away (saturating), no noise, everybody takes part",
    "nonconvex noise": "not convex, flat far away (saturating), noise, no heterogeneity, everybody takes part",
}
"""Where a claim holds, of clients whose steps are plain SGD at a constant rate."""

CONSTANTS = {
    "zeta": "heterogeneity, the root of the mean of ||grad f_i(x*)||^2",
    "sigma": "noise, the root of the variance of the gradient of one example",
    "curvature": "the least eigenvalue of the Hessian of F at x*",
    "client_lr": "the learning rate of the clients",
    "num_steps": "K, the local steps of a round",
    "num_steps - 1": "K - 1",
    "clients": "N, the number of clients",
    "rounds": "the number of rounds",
    "beta": "weight of the fresh gradient beside momentum",
    "1 - beta": "what the weight of stale updates lacks to 1",
    "mu": "weight of a proximal term; of methods from function values, the length of a difference",
    "rho": "length of a step uphill",
}
"""What a quantity may depend on."""

QUANTITIES = ("floor", "rate", "mean")

MEASURES = {
    "distance": "the squared distance",
    "gradient": "the squared gradient",
    "excess": "F - F*",
    "consensus": "the consensus error",
}
"""Errors that quantities are of: ||x - x*||^2, ||grad F(x)||^2, F(x) - F*, and the mean over the participants of
||y_i - x||^2 at the end of their local training."""

RELATIONS = ("equal", "at most", "at least")


class Claim(NamedTuple):
    """One statement: `quantity` ~ `constant`^`exponent`, or that there is no floor.

    Attributes:
      quantity: of a measure: "floor", what it stays at in the mean; "rate", c of its fall like exp(-c t) over rounds t;
        or "mean", that over all rounds so far.
      setting: where it holds, of `SETTINGS`.
      source: who shows it, with the number of the theorem or proposition.
      constant: what it depends on, of `CONSTANTS`; "" if there is no floor.
      exponent: of the constant, 0 if it does not depend on it; None if there is no floor.
      exact: whether it holds for every value at which the method is stable, and not only to leading order for a small
        learning rate.
      measure: of `MEASURES`.
      relation: whether the exponent is "equal" to that, or by a bound "at most" or "at least" that.
    """

    quantity: str
    setting: str
    source: str
    constant: str = ""
    exponent: float | None = None
    exact: bool = False
    measure: str = "distance"
    relation: str = "equal"

    def __str__(self) -> str:
        quantity = self.quantity if self.measure == "distance" else f"{self.quantity} of {MEASURES[self.measure]}"
        if self.exponent is None:
            return f"there is no {quantity}"
        if self.exponent == 0 and self.relation == "equal":
            return f"the {quantity} does not depend on {self.constant}"
        constant = f"({self.constant})" if " " in self.constant else self.constant
        if self.relation == "equal":
            return f"the {quantity} goes with {constant}^{self.exponent:g}"
        return f"the {quantity} goes with a power of {constant} of {self.relation} {self.exponent:g}"


Theory = tuple[Claim, ...]


def check(claim: Claim) -> None:
    """Raises ValueError if a claim is about something that is not known here."""
    for name, value, known in (
        ("quantity", claim.quantity, QUANTITIES),
        ("setting", claim.setting, SETTINGS),
        ("constant", claim.constant, ("", *CONSTANTS)),
        ("measure", claim.measure, MEASURES),
        ("relation", claim.relation, RELATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} of a claim is none of {', '.join(known)}: take one of them")
    if (claim.exponent is None) != (not claim.constant) or (not claim.constant and claim.quantity != "floor"):
        raise ValueError(f"a claim has constant={claim.constant!r} and exponent={claim.exponent}: give both or neither")
    if claim.relation != "equal" and claim.exponent is None:
        raise ValueError(f"a claim has relation={claim.relation!r} and no exponent: a bound is one of an exponent")
    if claim.constant == "rounds" and claim.quantity != "mean":
        raise ValueError(f"a {claim.quantity} is not one of some number of rounds: take the mean")
    if not claim.source:
        raise ValueError("a claim has no source: say who shows it")
