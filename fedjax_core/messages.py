"""What stands between clients and server, around any method: codecs, privacy, attacks, rules, observers, clocks.

    algorithm = with_part(fedavg, top_k(0.01), like=population)

A method's round makes passes over its clients (`for_each_client`). A cohort may carry a route, and then each pass
goes through it. A `Part` says what happens to a pass on its way: what the clients upload, how it is decoded and
aggregated, what is added to the result. It may keep state, on the server or a row for every client, and each pass of
the method's round that uploads something has its own.

Parts nest. The one that was put around the method first is nearest to the clients: with_part(with_part(method, clip),
codec) clips what is then encoded. On the server messages are decoded in the other order; then what parts make of all
decoded uploads at once (attacks) is made, in the order of the parts, and then they are aggregated.

Parts draw apart from the method and from each other, two of the same name too, and what a part draws does not depend on
parts that are put around it later or that have other names.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, execution, keys, sizes, sums, tasks
from fedjax_core.aggregation import Aggregator, Stacked, bounded_sum, itself, mapped
from fedjax_core.algorithm import Algorithm, Event, check_algorithm, parts_around, separate
from fedjax_core.batching import LocalWork
from fedjax_core.clients import (
    ClientProgram,
    ClientResults,
    for_each_client,
    map_tables,
    replaced,
    upload_of,
    without_steps,
)
from fedjax_core.groups import Groups
from fedjax_core.population import Cohort, Population
from fedjax_core.sizes import Message
from fedjax_core.staging import HostPopulation
from fedjax_core.types import Array, Key, Metrics, Params, PyTree


class Pass(NamedTuple):
    """A pass over the clients of a cohort, as a method asks for it: the arguments of `for_each_client`.

    Attributes:
      program: what each client does.
      shared: what is sent to every participant.
      client_inputs: leaves [C, ...], or ().
      cohort: the clients; its route is what is left of the way to the server.
      key: the round's key.
      options: `work`, `weights`, `plan`.
      aggregator: what becomes of the uploads, once they are decoded.
      decode: `decode(sent) -> upload`, on the server; of a `Message` it gets the payload.
      change: `change(uploads, weights) -> uploads` of all decoded uploads at once, leaves [C, ...], before they are
        aggregated.
      looks: pairs (look, changes before it) of those who look at the uploads of single clients, see `watched`.
    """

    program: ClientProgram
    shared: PyTree
    client_inputs: PyTree
    cohort: Cohort
    key: Key
    options: dict[str, Any]
    aggregator: Aggregator | Stacked
    decode: Callable[[PyTree], PyTree] | None = None
    change: Callable[[PyTree, Array], PyTree] | None = None
    looks: tuple[tuple[Callable[[PyTree], PyTree], Callable[[PyTree, Array], PyTree] | None], ...] = ()

    def run(self) -> ClientResults:
        """Goes on, to the next part or to the clients."""
        if self.cohort.route is not None:
            routed: ClientResults = self.cohort.route(self)
            return routed
        # Where uploads are not held anyway, each is looked at alone, where it is made.
        one_by_one = bool(self.looks) and self.change is None
        results = for_each_client(
            self._showing() if one_by_one else self.program,
            self.shared,
            self.cohort,
            self.key,
            self.client_inputs,
            aggregator=self._whole_aggregator(),
            **self.options,
        )
        if one_by_one:
            outputs, seen = results.outputs
            return results._replace(outputs=outputs, seen=seen)
        if self.looks:
            aggregate, seen = results.aggregate
            return results._replace(aggregate=aggregate, seen=seen)
        return results

    def _showing(self) -> ClientProgram:
        """The program whose clients keep, beside their output, what is seen of their decoded upload."""
        program, decode = self.program, self.decode

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            upload, output = program.final(shared, carry)
            sent = sizes.opened(upload)
            received = sent if decode is None else decode(sent)
            return upload, (output, tuple(look(received) for look, _ in self.looks))

        return program._replace(final=final)

    def upload(self) -> PyTree:
        """Shapes and dtypes of what a client sends, the payloads of messages in their place."""
        return upload_of(self.program, self.shared, self.client_inputs, self.key)

    def received(self) -> PyTree:
        """Shapes and dtypes of what the server makes of a message: the upload as the codecs inside restore it."""
        sent = self.upload()
        return sent if self.decode is None else jax.eval_shape(self.decode, sent)

    def decoded(self, decode: Callable[[PyTree], PyTree]) -> "Pass":
        """The pass whose messages are decoded by this function, and then as before."""
        before = self.decode
        return self._replace(decode=decode if before is None else lambda message: before(decode(message)))

    def changed(self, change: Callable[[PyTree, Array], PyTree]) -> "Pass":
        """The pass of whose decoded uploads, all at once, others are made after what has been made of them before.

        Args:
          change: `change(uploads, weights) -> uploads`, leaves [C, ...], zeros in slots that take no part.
        """
        before = self.change
        if before is None:
            return self._replace(change=change)
        return self._replace(change=lambda uploads, weights: change(before(uploads, weights), weights))

    def watched(self, look: Callable[[PyTree], PyTree]) -> "Pass":
        """The pass in which `look(upload)` is taken of what the server has of each client.

        That is the upload as all codecs have decoded it, and as it was changed before (`changed`). Of uploads that are
        not held anyway no more than one is held for this. What is seen is the last entry of `seen` in the results,
        leaves [C, ...]: who has asked for it takes it out, `*rest, mine = results.seen`.
        """
        return self._replace(looks=(*self.looks, (look, self.change)))

    def with_rule(self, rule: Callable[[PyTree, Array], PyTree], name: str) -> "Pass":
        """The pass whose weighted mean over the clients is another rule, `rule(uploads, weights) -> result`.

        Raises:
          TypeError: if the method does not take a weighted mean of what its clients send.
        """
        mean_of = self._mean_of(name)
        return self._replace(aggregator=Stacked(lambda uploads, weights: rule(jax.vmap(mean_of)(uploads), weights)))

    def with_sum(
        self,
        bound: Callable[[PyTree], tuple[PyTree, PyTree]],
        finish: Callable[[PyTree], PyTree],
        name: str,
    ) -> "Pass":
        """The pass whose weighted mean becomes `finish(total)` of the sum of what a bound leaves of each upload.

        The bound is the last thing before the sum, whatever parts are inside or outside of this one: of what a client
        has sent, decoded, and changed by attacks. Every participant counts once, whatever the weights, so that it adds
        to the sum what the bound leaves and no more. The sum is in the dtypes that sums are taken in, the result in
        those of the uploads, and no more than the sum is ever held.

        Args:
          bound: `bound(upload) -> (upload, told)`, see `fedjax_core.bounded_sum`.
          finish: `finish(total) -> total`, such as noise and a fixed denominator.
          name: of the part, in errors.

        Returns:
          The pass; the aggregate of its results is (what the method gets, the sum of what was told).

        Raises:
          TypeError: if the method does not take a weighted mean of its clients' uploads, or takes that of something
            that the server makes of them.
        """
        if self._mean_of(name) is not itself:
            raise TypeError(
                f"{name} bounds what each client adds to a sum, and this method averages something that the server "
                "makes of the uploads: take a method that averages the uploads themselves"
            )
        return self._replace(aggregator=bounded_sum(bound, finish), options=self.options | {"weights": "uniform"})

    def _mean_of(self, name: str) -> Callable[[PyTree], PyTree]:
        if not isinstance(self.aggregator, Aggregator) or self.aggregator.mean_of is None:
            raise TypeError(
                f"{name} takes the place of a weighted mean, and this method aggregates its uploads in another way: "
                "take a method that averages"
            )
        return self.aggregator.mean_of

    def _whole_aggregator(self) -> Aggregator | Stacked:
        """The aggregation of what is sent: decoded, changed, aggregated."""
        decode, change, inner, mask = self.decode, self.change, self.aggregator, self.cohort.mask
        if change is None and isinstance(inner, Aggregator):
            return inner if decode is None else mapped(decode, inner)

        def participants(leaf: Array) -> Array:
            return jnp.where(sums.across(mask, leaf), leaf, 0)

        def aggregated(uploads: PyTree, weights: Array) -> PyTree:
            if isinstance(inner, Stacked):
                return inner.finish(uploads, weights)

            def summand(row: tuple[PyTree, Array, Array]) -> PyTree:
                upload, weight, takes_part = row
                return jax.tree.map(lambda leaf: jnp.where(takes_part, leaf, 0), inner.lift(upload, weight))

            # The same to the bit where nothing was changed.
            return inner.finish(sums.in_order((uploads, weights, mask), summand))

        def finish(sent: PyTree, weights: Array) -> PyTree:
            decoded = sent if decode is None else jax.vmap(decode)(sent)
            if change is None:
                return aggregated(decoded, weights)
            aggregate = aggregated(change(decoded, weights), weights)
            if not self.looks:
                return aggregate
            had = ((look, decoded if before is None else before(decoded, weights)) for look, before in self.looks)
            return aggregate, tuple(jax.tree.map(participants, jax.vmap(look)(uploads)) for look, uploads in had)

        return Stacked(finish)


Around = Callable[[Any, Pass, Key], tuple[ClientResults, Any, Any]]


class Traffic(NamedTuple):
    """What a round asks of its clients, as it is known before the round: all passes together.

    Attributes:
      examples: float[C], examples that a client trains on, each as often as it does.
      bytes_up: float[C], bytes that it sends, as the parts inside leave them. Where a `Message` states its size as a
        traced number, which is not known yet, those of its arrays count.
      bytes_down: float[C], bytes that it is sent, likewise.
    """

    examples: Array
    bytes_up: Array
    bytes_down: Array


class Admission(NamedTuple):
    """Who takes part in a round, which a part decides before the method knows of it: by clocks, budgets, availability.

    Attributes:
      choose: `choose(state, cohort, traffic, key) -> (cohort, state, info)`, once a round: the cohort with fewer
        participants (`Cohort.only`), and a pytree of arrays that the metrics show.
      begin: `begin() -> state`, the state before the first round, a pytree of arrays; nothing unless given.
      apart: whether it depends on a client and what the server knows alone that it takes part, and on no other client.
        Around and inside of a private part only such are allowed: where one client's absence lets another one in, a
        client changes the sum by more than what is its own.
    """

    choose: Callable[[Any, Cohort, Traffic, Key], tuple[Cohort, Any, Any]]
    begin: Callable[[], Any] = lambda: ()
    apart: bool = False


def _as_it_is(state: Any, asked: Pass, key: Key) -> tuple[ClientResults, Any, tuple[()]]:
    return asked.run(), state, ()


class Part(NamedTuple):
    """What happens to the passes of a method on their way to the server and back, or to its cohorts.

    Attributes:
      around: `around(state, pass, key) -> (results, state, info)`: sends the pass on with `pass.run()`, changed as it
        may be. info is a pytree of arrays that the metrics show. As it is unless given.
      init: `init(upload, num_clients) -> state` of one pass, from the shapes of what a client uploads; a
        `ClientTable` in it has a row for every client. Of a pass of a group (`Groups.split`) they are the group's
        clients. No state unless given.
      name: in errors and metrics.
      private: whether the part hides by noise what clients send and who has sent something. Then a round without
        participants is a round like any other, with its noise, and what would reach the server beside the part is
        refused: uploads of events, and statistics that are averaged around it.
      admission: who takes part in a round, or None: everybody in the cohort.
    """

    around: Around = _as_it_is
    init: Callable[[PyTree, int], Any] = lambda upload, num_clients: ()
    name: str = "part"
    private: bool = False
    admission: Admission | None = None


class PartState(NamedTuple):
    """The state of a method with a part around it.

    Attributes:
      method: the state of the method.
      passes: of each of its passes that upload something, the state of the part.
      admission: the state of the part's admission, () without one.
    """

    method: Any
    passes: tuple[Any, ...]
    admission: Any = ()

    @property
    def round(self) -> Array:
        """int32[], number of rounds done, which the method counts."""
        counted: Array = self.method.round
        return counted


class PartMetrics(NamedTuple):
    """The own metrics of a method with a part around it.

    Attributes:
      method: those of the method.
      passes: of each of its passes that upload something, what the part tells.
      admission: what its admission tells, () without one.
    """

    method: Any
    passes: tuple[Any, ...]
    admission: Any = ()


def with_part(algorithm: Algorithm, part: Part, *, like: Population | HostPopulation) -> Algorithm:
    """The method with a part between its clients and its server.

    Args:
      algorithm: any method; its round must not have been compiled by itself, see below.
      part: what happens to the passes of its rounds.
      like: the population, or one with as many clients and examples of the same shapes.

    Its state is a `PartState`, its own metrics are `PartMetrics`. Events of a method beside its rounds go past the
    part, which a private part refuses.

    Raises:
      TypeError: if an argument is of another type, such as a part's factory that was not called; or if one part is
        private, and by another one it depends on other clients whether a client takes part.

    Raises (the functions that are returned):
      TypeError: if what the part returns is no (results, state, info), or its state changes its structure, shapes or
        dtypes. If the round that is wrapped has been given to `jax.jit` before, for the part could not take part in
        what is compiled already: wrap first, jax.jit(with_part(...).round). If the part is private and clients upload
        something in an event.
    """
    if isinstance(algorithm, Part):
        raise TypeError("algorithm must be an Algorithm, got Part: the order of arguments is (algorithm, part)")
    check_algorithm(algorithm)
    _check_part(part)
    if not isinstance(like, Population | HostPopulation):
        got = checks.misplaced(like) or type(like).__name__
        raise TypeError(f"like must be a population, got {got}: pass like=population, whose clients the part is for")
    inner = parts_around(algorithm)
    _check_apart((*inner, part))

    def init(params: Params, key: Key | None = None) -> PartState:
        state = algorithm.init(params, key)
        uploads = _uploads(algorithm.round, state, like, part.name)
        for name, event in algorithm.events.items() if part.private else ():
            if _uploads(event.run, state, like, part.name):
                raise TypeError(_PAST.format(name, part.name))
        passes = tuple(_begun(part, upload, like.num_clients) for upload in uploads)
        begun = part.admission.begin() if part.admission else ()
        return separate(PartState(state, passes, begun), params)

    init._has_checks = True  # type: ignore[attr-defined]  # the method's own, which know what it takes
    init._parts = (*inner, part)  # type: ignore[attr-defined]
    # Parts draw apart from each other: by their names, and of the same name by their number from the inside.
    salt = zlib.crc32(f"{part.name} {sum(other.name == part.name for other in inner)}".encode())

    def round(state: PartState, cohort: Cohort, key: Key) -> tuple[PartState, Metrics]:
        admitted, told = state.admission, ()
        if part.admission is not None:
            traffic = _traffic(algorithm.round, state.method, cohort, key)
            choice_key = jax.random.fold_in(jax.random.fold_in(keys.one(key), _TAG - 1), salt)
            returned = part.admission.choose(admitted, cohort, traffic, choice_key)
            what = f"{part.name}.admission.choose"
            cohort, admitted, told = _returned(what, "cohort", Cohort, returned, admitted)
        route = _Route(part, state.passes, key, salt)
        routed = through(cohort, route)
        new, metrics = algorithm.round(state.method, replace(routed, private=part.private or cohort.private), key)
        states, infos = route.end()
        metrics = metrics._replace(extra=PartMetrics(metrics.extra, infos, told))
        return PartState(new, states, admitted), metrics

    def of_method(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state: function(state.method)

    def passing_by(event: Event) -> Event:
        return event._replace(
            run=lambda state, cohort, key: state._replace(method=event.run(state.method, cohort, key))
        )

    return Algorithm(
        init,
        round,
        of_method(algorithm.params),
        {
            name: view._replace(shared=of_method(view.shared), rows=of_method(view.rows))
            for name, view in algorithm.views.items()
        },
        {name: passing_by(event) for name, event in algorithm.events.items()},
        algorithm.main,
    )


def _check_apart(parts: tuple[Part, ...]) -> None:
    """Raises TypeError if one of the parts is private, and another one lets clients in because others are not there."""
    private = next((part.name for part in parts if part.private), None)
    for part in parts if private is not None else ():
        if part.admission is not None and not part.admission.apart:
            raise TypeError(
                f"with {part.name} it depends on other clients whether a client takes part, so that one client changes "
                f"a sum by more than {private} hides: decide for each client apart (a deadline without `first`; "
                "Admission(..., apart=True) says that of a part of your own), or leave one of the two out"
            )


def _check_part(part: object) -> None:
    """Raises TypeError unless `part` is a part whose functions can be called as they will be."""
    if not isinstance(part, Part):
        name = getattr(part, "__name__", "")
        fix = f"call it first, {name}(...)" if callable(part) and name else "pass for example messages.top_k(0.01)"
        got = checks.misplaced(part) or checks.described(part)
        raise TypeError(f"part must be a Part, got {got}: {fix}; the order of arguments is (algorithm, part)")
    functions: list[tuple[str, Callable[..., Any], tuple[str, ...], str]] = [
        ("around", part.around, ("state", "asked", "key"), "around(state, asked, key) -> (results, state, info)"),
        ("init", part.init, ("upload", "num_clients"), "init(upload, num_clients) -> state"),
    ]
    if part.admission is not None:
        if not isinstance(part.admission, Admission):
            got = checks.described(part.admission)
            raise TypeError(f"part.admission must be an Admission, got {got}: pass Admission(choose, begin)")
        choose, begin = part.admission.choose, part.admission.begin
        example = "choose(state, cohort, traffic, key) -> (cohort, state, info)"
        functions.append(("admission.choose", choose, ("state", "cohort", "traffic", "key"), example))
        functions.append(("admission.begin", begin, (), "begin() -> state"))
    for name, function, arguments, example in functions:
        checks.takes(f"part.{name}", function, arguments, example=example)


def _returned(what: str, first: str, kind: type, returned: Any, state: Any) -> tuple[Any, Any, Any]:
    """What a function of a part returns, after a look whether it is (what it is to be, the state as it was, arrays)."""
    if not isinstance(returned, tuple) or len(returned) != 3 or not isinstance(returned[0], kind):
        types = ", ".join(type(value).__name__ for value in returned) if isinstance(returned, tuple) else ""
        got = f"({types})" if isinstance(returned, tuple) else checks.described(returned)
        raise TypeError(
            f"{what} must return ({first}, state, info), the first a {kind.__name__}, got {got}: return () where there "
            "is no state or no info"
        )
    _, new, info = returned
    for path, leaf in jax.tree_util.tree_flatten_with_path(info)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(
                f"{what} returns info{jax.tree_util.keystr(path)} that is {checks.described(leaf)}: metrics are arrays"
            )
    if not _alike(new, state):
        before, after = (jax.tree.map(_kind, tree) for tree in (state, new))
        raise TypeError(
            f"{what} returns the state {after}, and was given {before}: keep structure, shapes and dtypes from round "
            "to round (cast with astype)"
        )
    return returned


def through(cohort: Cohort, route: Callable[[Pass], ClientResults]) -> Cohort:
    """The cohort whose passes go through `route(pass) -> ClientResults`, and then on to where they went before."""
    before = cohort.route

    def way(asked: Pass) -> ClientResults:
        return route(asked._replace(cohort=replace(asked.cohort, route=before)))

    return replace(cohort, route=way)


class _Route:
    """One part's way of the passes of one round, while the round is traced."""

    def __init__(self, part: Part, states: tuple[Any, ...], key: Key, salt: int) -> None:
        self._part, self._states, self._key, self._salt = part, states, key, salt
        self._new: list[Any] = []
        self._infos: list[Any] = []
        self._trace = tasks.current_trace()

    def __call__(self, asked: Pass) -> ClientResults:
        if self._trace is None or self._trace != tasks.current_trace():
            raise TypeError(_COMPILED.format(self._part.name))
        if not jax.tree.leaves(asked.upload()):
            return asked.run()
        number = len(self._new)
        if number >= len(self._states):
            raise ValueError(
                f"the round makes more passes than the {len(self._states)} that {self._part.name} has a state for: "
                "begin with init of the wrapped method"
            )
        key = jax.random.fold_in(jax.random.fold_in(keys.one(self._key), _TAG + number), self._salt)
        what, state = f"{self._part.name}.around", self._states[number]
        try:
            returned = self._part.around(state, asked, key)
        except Exception as error:
            if (note := _IN_PART.format(self._part.name)) not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        results, state, info = _returned(what, "results", ClientResults, returned, state)
        if len(results.seen) != len(asked.looks):
            raise TypeError(
                f"{what} has looked at uploads and not taken out what was seen: return "
                "results._replace(seen=tuple(rest)) of *rest, mine = results.seen"
            )
        self._new.append(state)
        self._infos.append(info)
        return results

    def end(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The states after the round, and what the part tells."""
        if len(self._new) != len(self._states):
            raise ValueError(
                f"{len(self._new)} passes of the round went through {self._part.name}, which has a state for "
                f"{len(self._states)}: begin with init of the wrapped method"
            )
        self._trace = None  # whoever keeps the cohort cannot send anything through it any more
        return tuple(self._new), tuple(self._infos)


_IN_PART = "this happened in the part {} between clients and server, or in the clients' program behind it"
_COMPILED = (
    "the round that {} is put around was compiled (or is looped over) by itself: wrap the method first and compile "
    "then, jax.jit(with_part(algorithm, part, like=population).round)"
)
_PAST = (
    "in the event {!r} of the method clients upload something, which would reach the server without {}: take a method "
    "without such an event, or leave it out, with_part(method._replace(events={{}}), ...)"
)
_TAG = 2**30
"""Apart from what clients and methods fold into the key of a round."""


class _Upload(NamedTuple):
    """What a client uploads in a pass, as shapes and dtypes, and the group that the pass is of."""

    shapes: PyTree
    group: tuple[Groups, int] | None


def _begun(part: Part, upload: _Upload, num_clients: int) -> Any:
    """The part's state of a pass. Of a pass of a group its tables have rows for the clients of the group alone."""
    if upload.group is None:
        return part.init(upload.shapes, num_clients)
    groups, number = upload.group
    state, index = part.init(upload.shapes, int(groups.sizes[number])), groups.index(number)
    return map_tables(lambda table: table._replace(index=jnp.asarray(index)), state)


def _uploads(
    run: Callable[[Any, Cohort, Key], Any], state: Any, like: Population | HostPopulation, name: str
) -> list[_Upload]:
    """What a client uploads in each pass, of a round or an event, that uploads something."""
    found: list[_Upload] = []
    begun: list[Any] = []

    def record(asked: Pass) -> ClientResults:
        if tasks.current_trace() != begun[0]:
            raise TypeError(_COMPILED.format(name))
        upload = asked.upload()
        if jax.tree.leaves(upload):
            found.append(_Upload(upload, asked.cohort.group))
        return asked.run()

    def round(state: Any, population: Population, key: Key) -> Any:
        begun.append(tasks.current_trace())
        return run(state, through(population.cohort(jnp.arange(1)), record), key)

    # Of the examples one row is enough to know their shapes.
    examples = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), _dtype(leaf)), like.examples)
    offsets: Any = jax.ShapeDtypeStruct((like.num_clients + 1,), jnp.int32)
    public = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _dtype(leaf)), like.public)
    population = Population(examples, offsets, public)
    with replaced(without_steps):
        jax.eval_shape(round, state, population, jax.random.key(0))
    return found


def _traffic(run: Callable[[Any, Cohort, Key], Any], state: Any, cohort: Cohort, key: Key) -> Traffic:
    """What a round asks of the clients of a cohort, by tracing it without the clients' steps."""
    passes: list[tuple[LocalWork, Any, Any, tuple[Groups, int] | None]] = []

    def record(asked: Pass) -> ClientResults:
        up: list[Any] = []

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            upload, output = asked.program.final(shared, carry)
            up.append(_known_bytes(upload))
            return upload, output

        asked._replace(program=asked.program._replace(final=final)).upload()
        passes.append((asked.options["work"], up[-1], _known_bytes(asked.shared), asked.cohort.group))
        return asked.run()

    def alone(state: Any, cohort: Cohort, key: Key) -> Any:
        return run(state, through(cohort, record), key)

    with replaced(without_steps):
        jax.eval_shape(alone, state, replace(cohort, route=None), key)
    traffic = Traffic(*[jnp.zeros(cohort.ids.shape)] * 3)
    for work, bytes_up, bytes_down, group in passes:
        own = cohort.mask
        if group is not None:
            groups, number = group
            own &= cohort.per_client("groups", groups.of) == number
        asked = Traffic(work.examples(cohort.ids, cohort.sizes), bytes_up, bytes_down)
        traffic = jax.tree.map(lambda so_far, more, own=own: so_far + jnp.where(own, more, 0), traffic, asked)
    return traffic


def _known_bytes(tree: PyTree) -> Any:
    """Bytes of a tree on the wire as far as they are known while tracing."""
    size = sizes.sent_bytes(tree)
    return size if checks.is_concrete(size) else float(sizes.num_bytes(sizes.opened(tree)))


def uploads(algorithm: Algorithm, params: Params, *, like: Population | HostPopulation) -> list[PyTree]:
    """What a client sends in each pass of a round that sends something, as shapes and dtypes, by tracing one round.

    Args:
      algorithm: the method.
      params: a model.
      like: the population, or one with as many clients and examples of the same shapes.
    """
    state = jax.eval_shape(algorithm.init, params, jax.random.key(0))
    return [upload.shapes for upload in _uploads(algorithm.round, state, like, "uploads")]


def _dtype(leaf: Any) -> Any:
    """The dtype that an array of the host has on a device."""
    return jax.dtypes.canonicalize_dtype(leaf.dtype)


# What parts are made of.


def before_sending(
    asked: Pass,
    change: Callable[[PyTree, PyTree, Key], tuple[PyTree, PyTree]],
    rows: PyTree = (),
    key: Key | None = None,
    *,
    envelopes: bool = False,
) -> tuple[Pass, Callable[[ClientResults], tuple[ClientResults, PyTree]]]:
    """The pass whose clients change their upload before they send it, each with a row of its own.

    Args:
      asked: the pass.
      change: `change(upload, row, key) -> (upload, row)`, of one client. It gets the payload of a `Message`, and may
        return one. What it returns counts by its arrays, unless they are of the same shapes and dtypes as those that it
        was given: then a size that was stated still holds.
      rows: leaves [C, ...], of the clients of the cohort.
      key: randomness of the change; a client's is `fold_in(key, client_id)`.
      envelopes: whether the change gets messages as they are, with the sizes that they state.

    Returns:
      The pass, and `taken(results) -> (results, rows)`, which takes the new rows out of its results.
    """
    program = asked.program
    client_keys = keys.derive(key, jnp.maximum(asked.cohort.ids, 0)) if key is not None else ()

    def init(shared: PyTree, inputs: PyTree, client_key: Key) -> PyTree:
        own, row, change_key = inputs
        return program.init(shared, own, client_key), row, change_key

    def step(shared: PyTree, carry: PyTree, batch: Any) -> Any:
        own, *rest = carry
        own, loss = program.step(shared, own, batch)
        return (own, *rest), loss

    def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        own, row, change_key = carry
        upload, output = program.final(shared, own)
        sizes.check_messages("the upload", upload)
        given = execution.strip_weak_type(sizes.opened(upload))
        returned = change(upload if envelopes else given, row, change_key)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"change must return (upload, row), got {checks.described(returned)}: return () in the place of a row "
                "of a client that keeps nothing"
            )
        sent, row = returned
        if sizes.has_message(upload) and not sizes.has_message(sent) and _alike(sent, given):
            sent = Message(sent, sizes.sent_bytes(upload))
        return sent, (output, row)

    def taken(results: ClientResults) -> tuple[ClientResults, PyTree]:
        outputs, new = results.outputs
        return results._replace(outputs=outputs), new

    changed = asked._replace(
        program=ClientProgram(init, step, final), client_inputs=(asked.client_inputs, rows, client_keys)
    )
    return changed, taken


def _alike(tree: PyTree, other: PyTree) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""

    one: object = jax.tree.map(_kind, tree)
    return one == jax.tree.map(_kind, other)


def _kind(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
