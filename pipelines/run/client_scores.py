"""How clients fare in a view in which they differ: each predicts for itself, on examples of its own.

Clients are brought to the device in blocks, so that neither examples nor rows of all of them need be there, and no
model is put together but where it predicts. A block is the same whatever the plan, and so is what a client draws when
it adapts.

Letters: S seeds, N clients, K of them tested.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import (
    Algorithm,
    ClientStatistics,
    HostPopulation,
    Population,
    client_statistics,
    evaluate_view,
    join_tables,
    split_tables,
)
from fedjax_core.types import Key, PyTree
from pipelines.experiment import views
from pipelines.experiment.setup import EVAL_BATCH, Experiment, initial_states, run_keys
from pipelines.federation import splits
from pipelines.federation.federations import Federation, Part
from pipelines.results.history import History, of_view
from pipelines.run import engines

_MOST_CLIENTS = 1024
_MOST_EXAMPLES = 64 * EVAL_BATCH
_NEW_TEST_SHARE = 0.5
ADAPTED_AT_ONCE = 8
"""Clients that adapt together before they are tested."""


class _Block(NamedTuple):
    """Clients that are tested in one call.

    Attributes:
      ids: their numbers.
      number: of the block.
    """

    ids: np.ndarray
    number: int


class Scorer(NamedTuple):
    """Tests clients in a view.

    Attributes:
      view: name of the view.
      scores: `scores(states, part="test") -> {metric: [S, N]}` for states [S, ...], on a part of the federation, of
        which "test" is `views.own_tests`; NaN for a client that is not tested or has no examples. All parts share one
        compiled program.
    """

    view: str
    scores: Callable[..., History]


def scorers(experiment: Experiment, algorithm: Algorithm) -> list[Scorer]:
    """A scorer for each evaluated view of a method in which clients differ."""
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
    chosen = views.evaluated(experiment.config, algorithm)
    return [scorer(experiment, algorithm, view) for view in chosen.of_clients(algorithm, states)]


def scorer(experiment: Experiment, algorithm: Algorithm, view_name: str) -> Scorer:
    """The scorer of one view; see `scorers`."""
    config, federation = experiment.config, experiment.federation
    parts = {name: part for name, part in federation.parts.items() if name in ("train", "validation")}
    parts["test"] = views.own_tests(config, federation)
    hosts = {name: population_of(experiment, part) for name, part in parts.items()}
    view, num_clients = views.view_of(algorithm, view_name), federation.num_clients
    chosen = views.chosen_clients(config, num_clients)
    # Groups of clients that differ in architecture have tables of their own: these are left whole.
    blocks = [_Block(np.arange(num_clients), 0)] if view.groups else list(_blocks(chosen, list(hosts.values())))
    most = max(len(block.ids) for block in blocks)
    room = max(int(host.sizes_of(block.ids).sum()) for block in blocks for host in hosts.values())
    put, public = engines.placement(experiment), experiment.population.public
    kept: dict[str, Population] = {}

    def population(part: str, block: _Block) -> Population:
        if part in kept:
            return kept[part]
        found: Population = put(_padded(hosts[part], block.ids, most, room, public))
        if len(blocks) == 1 and not config.machine.staged:  # it has room beside the training examples
            kept[part] = found
        return found

    def score(states: PyTree, examples: Population, own: Population | None, ids: Any, keys: Key, number: Any) -> Any:
        def of_seed(state: PyTree, key: Key) -> Any:
            return evaluate_view(
                experiment.metric_fn,
                view,
                state,
                examples,
                ids,
                at_once=ADAPTED_AT_ONCE,
                batch_size=EVAL_BATCH,
                plan=experiment.plan,
                adapt_on=own,
                key=None if own is None else jax.random.fold_in(key, number),
            )

        return jax.vmap(of_seed)(states, keys)

    jitted = jax.jit(score, out_shardings=engines.replicated_results(experiment))
    rows_of = jax.jit(lambda rows, ids: jax.tree.map(lambda leaf: leaf[:, ids], rows))
    keys = put(jax.vmap(key_of)(experiment.keys))

    def scores(states: PyTree, part: str = "test") -> History:
        device, tables = split_tables(states)
        found: History = {}
        for block in blocks:
            ids = np.pad(block.ids, (0, most - len(block.ids)))
            on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tables))
            if view.groups:
                rows = tables
            else:
                rows = jax.tree.map(lambda leaf, ids=ids: leaf[:, ids], tables) if on_host else rows_of(tables, ids)
            asked = np.pad(np.isin(block.ids, chosen), (0, most - len(block.ids)))
            values = jitted(
                join_tables(device, rows),
                population(part, block),
                None if view.adapt is None else population("train", block),
                put(jnp.where(asked, jnp.arange(most), -1)),
                keys,
                np.int32(block.number),
            )
            for metric, value in values.items():
                value = np.asarray(value)[:, : len(block.ids)]
                dtype = np.result_type(value.dtype, np.float32)
                all_of = found.setdefault(metric, np.full((len(value), num_clients), np.nan, dtype))
                all_of[:, block.ids] = value
        return found

    return Scorer(view_name, scores)


def of_new_clients(experiment: Experiment, algorithm: Algorithm) -> list[Scorer]:
    """Scorers of clients that took no part in training, in the views in which clients adapt the model of all.

    They adapt on one part of their examples and are tested on the other, the share of the configuration's test parts or
    half. In views with rows a client that was never there has none, and there is no scorer.
    """
    federation, chosen = experiment.federation, experiment.config.federation
    if "new" not in federation.parts:
        return []
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
    names = []
    for name in views.evaluated(experiment.config, algorithm).of_clients(algorithm, states):
        view = views.view_of(algorithm, name)
        if view.adapt is not None and view.groups is None and jax.eval_shape(jax.vmap(view.rows), states) is None:
            names.append(name)
    if not names:
        return []
    source, assignment = federation.parts["new"]
    by_class = chosen.split_by == "random" and not experiment.dataset.is_sequence
    split = splits.split_clients(
        assignment,
        (0.0, chosen.test_share or _NEW_TEST_SHARE),
        by=chosen.split_by,
        labels=getattr(experiment.dataset, source)["y"] if by_class else None,
        gap=chosen.gap,
        seed=chosen.partition_seed,
    )
    own = Federation(experiment.dataset, {"train": Part(source, split.train), "test": Part(source, split.test)})
    return [scorer(experiment._replace(federation=own), algorithm, name) for name in names]


def population_of(experiment: Experiment, part: Part) -> HostPopulation:
    """The examples of a part where they are."""
    source, assignment = part
    return HostPopulation.from_flat(getattr(experiment.dataset, source), assignment.offsets, assignment.rows)


def key_of(key: Key) -> Key:
    """What clients draw from when they adapt before they are tested, to be folded with a block's number.

    Args:
      key: of a seed.
    """
    return jax.random.fold_in(run_keys(key)[1], 0xAD)


def over_clients(view: str, values: History) -> History:
    """The mean over clients of each metric, and of the accuracy its spread: "test/<view>/<metric>" [S]."""
    found = named(view, {metric: _statistics(of_clients) for metric, of_clients in values.items()})
    return {name: np.asarray(value) for name, value in found.items()}


def named(view: str, values: Mapping[str, ClientStatistics]) -> dict[str, Any]:
    """Statistics over clients in a view by the names of a history."""
    found: dict[str, Any] = {}
    for metric, there in values.items():
        found[of_view("test", view, metric)] = there.mean
        if metric == "accuracy":
            found[of_view("test", view, "accuracy_sd")] = there.std
            found[of_view("test", view, "accuracy_worst_decile")] = there.worst_decile
    return found


def means(values: History) -> History:
    """The mean over clients of each metric, [S]."""
    return {metric: np.asarray(_statistics(of_clients).mean) for metric, of_clients in values.items()}


@jax.jit
def _statistics(values: Any) -> Any:
    return jax.vmap(client_statistics)(values)


def _blocks(ids: np.ndarray, hosts: Sequence[HostPopulation]) -> Iterator[_Block]:
    """The clients in blocks of few enough clients and examples; one with very many is a block of its own."""
    sizes = np.max([host.sizes_of(ids) for host in hosts], axis=0)
    begin, number = 0, 0
    while begin < len(ids):
        fit = int(np.searchsorted(np.cumsum(sizes[begin : begin + _MOST_CLIENTS]), _MOST_EXAMPLES, side="right"))
        end = begin + max(fit, 1)
        yield _Block(ids[begin:end], number)
        begin, number = end, number + 1


def _padded(host: HostPopulation, ids: np.ndarray, clients: int, room: int, public: Any) -> Population:
    """The examples of some clients as a population of so many clients and examples, of which the last are none's."""
    rows = host.rows_of(ids)

    def fill(leaf: np.ndarray) -> Any:
        filled = np.zeros((room, *leaf.shape[1:]), leaf.dtype)
        filled[: len(rows)] = leaf[rows]
        return jnp.asarray(filled)

    ends = np.cumsum(host.sizes_of(ids))
    offsets = np.concatenate([[0], ends, np.full(clients - len(ids), ends[-1])])
    return Population(jax.tree.map(fill, host.examples), jnp.asarray(offsets, jnp.int32), public)
