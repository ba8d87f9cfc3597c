"""Counts the operations of a program, for formulas that claim to know them."""

import math

from jax.extend.core import jaxprs_in_params


def count_flops(jaxpr) -> int:
    """Floating-point operations of all matrix products, those of a scan's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        inner = sum(count_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total
