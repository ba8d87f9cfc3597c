"""Control variates as in SCAFFOLD: the server's c and every client's c_i, estimates of the gradients of f and f_i."""

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


def start(params: fc.Params, num_clients: int) -> tuple[fc.Params, fc.ClientTable]:
    """(c, the table of all c_i), zeros. c is a sum over rounds, so float32 at least."""
    return fc.sums.wide_zeros(params), fc.client_table(num_clients, optax.tree.zeros_like(params))


def corrected(g: fc.Params, c: fc.Params, c_i: fc.Params) -> fc.Params:
    """g + c - c_i, the direction of a local step."""
    return jax.tree.map(lambda g, c, c_i: g + (c - c_i), g, c, c_i)


def upload(done: fc.Descent, shared: fc.PyTree):
    """For `fedjax_core.local_descent` with `with_mean`, from a model that is sent first, with c_i as client's input.

    A client uploads (y_i - x, c_i+ - c_i) and keeps c_i+, the mean of its raw gradients.
    """
    x, c_i, c_i_new = shared[0], done.own, done.mean
    return (optax.tree.sub(done.params, x), optax.tree.sub(c_i_new, c_i)), c_i_new


def updated(
    state: fc.PyTree, change: fc.Params, results: fc.ClientResults, cohort: fc.Cohort, num_clients: int
) -> tuple[fc.Params, fc.ClientTable]:
    """(c + (1 / N) sum_S (c_i+ - c_i), the table with the c_i+), for a state with `control` and `client_controls`.

    Args:
      state: the method's state, before the round.
      change: mean of c_i+ - c_i over the cohort.
      results: of the pass, with c_i+ as output.
      cohort: the clients of the round, S.
      num_clients: N.
    """
    # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
    control = fc.add_scaled(state.control, jnp.sum(results.weights) / num_clients, change)
    return control, fc.scatter(state.client_controls, cohort, results.outputs)
