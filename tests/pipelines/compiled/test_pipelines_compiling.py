"""Rounds compiled for slices of TPUs that are not there; without libtpu these tests are skipped."""

import json
from importlib.util import find_spec

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import algorithms
from fedjax_core import ClientTable, Groups, Plan, needs, replicated, shardings
from pipelines import Config
from pipelines.cli import commands
from pipelines.compiled import chips, compiling
from pipelines.compiled.program import Collective, Program
from tests.algorithms import test_every_method as methods
from tests.problems import softmax_population

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install 'fedjax-core[tpu]'"
)


def small(**options):
    return Config(**{"clients": 12, "cohort_size": 6, "seeds": 1, "methods": ("fedavg",)} | options)


@pytest.fixture(scope="module")
def compiled_mlp():
    """(the experiment, the report) of a small MLP, which takes the compiler ten seconds: several tests share it."""
    with jax.enable_x64(False):
        tpus, experiment = compiling.prepare(small(hidden=(32,), batch_size=8, epochs=3), "v5e:2x2")
        return experiment, compiling.compile_method(experiment, tpus, "fedavg")


# What goes wrong before anything is compiled.

BAD = [
    ("v5e", {}, r"topology='v5e' is no name of a slice: write the chip and the grid of chips, such as v5e:4x4"),
    ("v5e:4y4", {}, "is no name of a slice"),
    ("v9:2x2", {}, "unknown TPU 'v9'"),
    ("v5e:2x2x2", {}, "chips of v5e make grids of 2 axes, as v5e:4x4"),
    ("v5p:4x4", {}, "chips of v5p make grids of 3 axes, as v5p:4x4x4"),
    ("v5e:0x4", {}, "make grids of 2 axes"),
    ("v5e:32x16", {}, "has 512 chips, and the largest slice of v5e has 256: take a smaller one"),
    ("v5e:2x2", {"staged": True}, "leave out --staged"),
    ("v5e:2x2", {"x64": True}, "TPUs compute in single precision: leave out --x64"),
    ("v5e:2x2", {"mesh": 8}, "mesh=8 but v5e:2x2 has 4 chips: lower it"),
    ("v5e:2x2", {"mesh": 4, "model_parallel": 3}, "model_parallel=3 does not divide"),
    ("v5e:2x2", {"model_parallel": 1, "lanes": 6}, "lanes=6 is no multiple of the 4 chips .* take 8"),
]


@pytest.mark.parametrize(("topology", "options", "message"), BAD)
def test_bad_input_is_refused_before_compiling(topology, options, message, monkeypatch):
    stand_ins = lambda tpus: [jax.devices()[0]] * tpus.num_chips  # noqa: E731
    monkeypatch.setattr(chips, "devices", stand_ins)
    monkeypatch.setattr(compiling, "compile_method", lambda *args: pytest.fail("it was compiled"))
    with pytest.raises(ValueError, match=message):
        compiling.compile_for(small(**options), topology)


def test_without_the_compiler_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package libtpu.*extra tpu, `pip install 'fedjax-core\[tpu\]'`"):
        compiling.compile_for(small(), "v5e:2x2")


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know():
    with pytest.raises(ValueError, match=r"no slice that the compiler knows .* take another, such as v5e:2x2"):
        compiling.compile_for(small(), "v5e:3x3")


@pytest.mark.quick
def test_every_chip_has_a_source_and_makes_sense():
    for name, chip in chips.CHIPS.items():
        assert chip.name == name
        assert chip.source.startswith("https://")
        assert chip.flops / chip.hbm_bytes_per_second > 100 > chip.hbm_bytes_per_second / chip.link_bytes_per_second
        assert chips.parse(f"{name}:{'x'.join(['2'] * chip.axes)}").num_chips == 2**chip.axes


def test_collectives_take_as_long_as_assumed():
    tpus = chips.parse("v5e:4x4")
    number = 100_000_000
    # A ring of 16 in both directions at 50 GB/s, twice; two hops along each of two axes, twice.
    assert compiling.collective_seconds(Collective("all-reduce", number, 16), tpus) == pytest.approx(
        2 * (15 / 16 * number / 100e9 + 4e-6)
    )
    assert compiling.collective_seconds(Collective("all-gather", number, 16), tpus) == pytest.approx(
        15 / 16 * number / 100e9 + 4e-6
    )
    assert compiling.collective_seconds(Collective("all-reduce", number, 1), tpus) == 0


def test_what_does_not_fit_is_told_from_the_compilers_words():
    said = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    assert compiling._needed(said, chips.parse("v5e:2x2")) == (20.5 * 2**30, 15.75 * 2**30)
    assert compiling._needed("RESOURCE_EXHAUSTED", chips.parse("v5e:2x2"))[0] == float("inf")


@pytest.mark.parametrize("most_that_fits", [0, 1, 7, 100, 999, 1000])
def test_the_search_for_the_most_that_fits(most_that_fits):
    """To an eighth, in few programs, also where the compiler does not say how much too large one is."""
    tried = []

    def need(number):
        tried.append(number)
        line = 0.1 + 0.9 * number / max(most_that_fits, 0.5)
        return (float("inf") if number > most_that_fits and number % 2 else line), 1.0

    found = compiling._most(need, 1000)
    assert found.fits <= most_that_fits <= max(found.fits * 1.125, found.fits + 1)
    assert found.too_many is None if most_that_fits == 1000 else found.too_many > most_that_fits
    assert len(tried) == found.compiled <= 12


# What is compiled.


@needs_libtpu
def test_an_mlp_against_a_count_by_hand(compiled_mlp):
    """Operations, steps and the one collective of a round; the compiler itself counts a step once."""
    experiment, report = compiled_mlp
    with jax.enable_x64(False):
        cohorts = compiling._cohorts(experiment)
    steps = np.mean([3 * np.ceil(row / 8).sum() for row in cohorts])
    forward = 2 * 8 * (64 * 32 + 32 * 10)
    step = 2 * forward + 2 * 8 * 32 * 10  # gradients of both kernels, and of the hidden layer
    assert report.useful_flops == pytest.approx(steps * step)
    assert report.flops == pytest.approx(report.loops[0].steps * step)
    assert report.loops[0].useful == steps
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    assert report.parameters == parameters
    (collective,) = report.collectives
    assert (collective[0], collective[2], collective[3]) == ("all-reduce", 4, 1)
    assert 0 <= collective[1] - 4 * parameters < 1000  # and the sums of losses, weights and counts
    assert report.unknown_loops == report.host_calls == []
    assert 0 < report.memory["together"] < report.hbm_bytes
    assert report.seconds["roofline"] >= max(report.seconds["products"], report.seconds["collectives"])


@needs_libtpu
def test_the_command_prints_what_is_asked(compiled_mlp, monkeypatch):
    experiment, report = compiled_mlp
    monkeypatch.setattr(compiling, "prepare", lambda config, topology, *_: (chips.parse(topology), experiment))
    monkeypatch.setattr(compiling, "compile_method", lambda *args: report)
    run = click.testing.CliRunner().invoke
    options = ["compile", "--topology", "v5e:2x2", "--method", "fedavg", "--clients", "12", "--cohort-size", "6"]
    shown = run(commands.main, [*options, "--largest"])
    assert shown.exit_code == 0, shown.output
    for words in (
        "assumption: compiled and predicted, not run",
        "fedavg: compiled for v5e:2x2 in",
        "4 chips, 1 lanes a chip, 6 clients",
        "all-reduce of 9.",
        "over 4 chips, 1 times a round",
        "predicted by roofline",
        "predicted by the compiler's estimates",
        "most lanes a chip: 2",
        "largest cohort: 12",
    ):
        assert words in shown.output
    told = json.loads(run(commands.main, [*options, "--json"]).output)
    assert told["method"] == "fedavg"
    assert told["run"] is False
    assert told["collectives"][0]["times"] == 1
    assert told["assumptions"]


def test_the_command_says_what_is_wrong():
    shown = click.testing.CliRunner().invoke(commands.main, ["compile", "--topology", "v5e:5"])
    assert shown.exit_code == 2
    assert "make grids of 2 axes" in shown.output


# Every method.


CLIENTS = (*methods.SIZES, 5)  # as many as the chips divide


def lowered_round(name, mesh):
    """(the traced round of a method in single precision, its state's shapes, where the state lies)."""

    def shape(leaf, to):
        dtype = jnp.float32 if leaf.dtype == jnp.float64 else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=to)

    whole = lambda tree: jax.tree.map(lambda leaf: shape(leaf, replicated(mesh)), tree)  # noqa: E731
    public = {"x": softmax_population([7], seed=4).examples["x"]}
    population = whole(softmax_population(CLIENTS).with_public(public))
    params, key = whole(methods.params_of(name)), whole(jax.random.key(0))
    sized = {"num_clients": len(CLIENTS), "groups": Groups.by_modulo(len(CLIENTS), 2)}
    with jax.enable_x64(False):
        options = {a: sized[what] for a, what in needs(getattr(algorithms, name)).items() if what in sized}
        algorithm = methods.make(name, plan=Plan(mesh.size, mesh), **options)
        state = jax.eval_shape(algorithm.init, params, key)
        where = shardings(state, mesh)

        def round(state, population, key):
            return algorithm.round(state, population.cohort(jnp.arange(4)), key)

        jitted = jax.jit(round, donate_argnums=0, out_shardings=(where, replicated(mesh)))
        return jitted.lower(jax.tree.map(shape, state, where), population, key), state, where


def tables_of(state):
    is_table = lambda node: isinstance(node, ClientTable)  # noqa: E731
    return [node for node in jax.tree.leaves(state, is_leaf=is_table) if is_table(node)]


def check_method(name):
    """Compiles a method's round for four chips and looks at the program; returns its collectives."""
    mesh = Mesh(np.asarray(chips.devices(chips.parse("v5e:2x2"))), ("clients",))
    lowered, state, where = lowered_round(name, mesh)
    program = Program(lowered.compile().as_text())
    assert not program.host_calls
    rows = [leaf for table in tables_of(state) for leaf in jax.tree.leaves(table.rows)]
    split = [not s.is_fully_replicated for table in tables_of(where) for s in jax.tree.leaves(table.rows)]
    assert all(split), f"not all rows of {name} are split over the chips: {split}"
    collectives = program.cost(chips.CHIPS["v5e"]).collectives
    smallest = min((leaf.size * leaf.dtype.itemsize for leaf in rows), default=0)
    gathered = [each for each in collectives if each.kind == "all-gather" and each.num_bytes >= smallest > 0]
    assert not gathered, f"{name} gathers rows of clients: {gathered}"
    return collectives


FEW = ["fedavg", "scaffold"]


@needs_libtpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in algorithms.__all__]
)
def test_every_method_compiles_with_its_state_on_the_chips(name):
    collectives = check_method(name)
    if name == "fedavg":
        parameters = sum(leaf.size for leaf in jax.tree.leaves(methods.params_of(name)))
        large = [each for each in collectives if each.num_bytes >= 4 * parameters]
        assert [(each.kind, collectives[each]) for each in large] == [("all-reduce", 1)]


EVERY = [
    pytest.param(name, marks=[] if number % methods.TURNS == methods.TURN else pytest.mark.slow)
    for number, name in enumerate(algorithms.__all__)
]


@pytest.mark.parametrize("name", EVERY)
def test_every_method_can_be_lowered_for_cuda(name):
    """Which needs neither a GPU nor its compiler; another fifth of the methods every day, all with `-m slow`."""
    algorithm = methods.make(name)
    state = jax.eval_shape(algorithm.init, methods.params_of(name), jax.random.key(0))
    population = methods.population()

    def round(state, population, key):
        return algorithm.round(state, population.cohort(jnp.arange(4)), key)

    exported = jax.export.export(jax.jit(round), platforms=["cuda"])(state, population, jax.random.key(0))
    assert exported.platforms == ("cuda",)
    assert "callback" not in exported.mlir_module()
