"""Rounds of several passes over the clients, whose results are merged into those of one.

    heads = on_head.run(fit_head, x, cohort, head_key, client_inputs=own)
    body = clients.run(fit_body, Message(x, 0), cohort, body_key, client_inputs=heads.outputs)
    ...
    return state, merge_phases(heads, body)

A phase is a pass of its own, and not a branch in the steps of one: under `vmap` over lanes a branch costs both of its
sides in every step. What a client keeps from one phase to the next is the output of the one and the input of the other.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from fedjax_core.clients import ClientResults, check_results


def merge_phases(*phases: ClientResults, bytes_of: Sequence[ClientResults] = ()) -> ClientResults:
    """The passes of a round over one cohort as one pass, for the metrics.

    Each pass counts what it sends. What clients have from an earlier one is sent as `Message(value, 0)`.

    Args:
      phases: passes in which clients train, in their order. A client that takes no part in one is an empty slot there
        (`cohort.only`).
      bytes_of: other passes of the round, in which clients find something out (a gradient, prototypes, which model
        loses least). They have sent bytes too, and add no steps and no loss.

    Returns:
      Of each client the steps of all phases, the mean loss over these steps, and its weight in the last phase in which
      it weighs anything; the bytes and the executed steps of all passes; and tuples of their aggregates and outputs as
      they are, phases first.

    Raises:
      ValueError: if there is no phase, or passes are over cohorts of other sizes.
      TypeError: if one is no `ClientResults`.
    """
    if not phases:
        raise ValueError("there are no phases: pass the results of at least one pass in which clients train")
    if isinstance(bytes_of, ClientResults):
        raise TypeError("bytes_of must be a list of ClientResults, got one: pass bytes_of=[results]")
    passes = (*phases, *bytes_of)
    for number, results in enumerate(passes):
        name = f"phases[{number}]" if number < len(phases) else f"bytes_of[{number - len(phases)}]"
        check_results(name, results, "one argument for each pass")
        slots, expected = results.steps.shape[0], phases[0].steps.shape[0]
        if slots != expected:
            raise ValueError(
                f"{name} is of a cohort of {slots} slots, and phases[0] of {expected}: run all passes of a round over "
                "one cohort, with cohort.only(mask) where some clients take no part"
            )
    merged = phases[0]
    for phase in phases[1:]:
        merged = _followed(merged, phase)
    return merged._replace(
        aggregate=tuple(results.aggregate for results in passes),
        outputs=tuple(results.outputs for results in passes),
        executed_steps=sum((results.executed_steps for results in passes), jnp.int32(0)),
        bytes_up=sum((results.bytes_up for results in passes[1:]), passes[0].bytes_up),
        bytes_down=sum((results.bytes_down for results in passes[1:]), passes[0].bytes_down),
    )


def _followed(first: ClientResults, last: ClientResults) -> ClientResults:
    """Loss, steps and weights of two phases."""
    steps = first.steps + last.steps
    share = first.steps.astype(last.loss.dtype) / jnp.maximum(steps, 1).astype(last.loss.dtype)
    # A loss that does not count may be NaN.
    of_first, of_last = jnp.where(first.steps > 0, first.loss, 0), jnp.where(share < 1, last.loss, 0)
    loss = share * of_first + (1 - share) * of_last
    weights = jnp.where(last.weights > 0, last.weights, first.weights)
    return last._replace(loss=loss, steps=steps, weights=weights)
