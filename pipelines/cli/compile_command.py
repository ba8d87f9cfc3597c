"""The command `fedjax-core compile`: a run's rounds compiled for a slice of TPUs that is not there."""

import json
import logging
from pathlib import Path
from typing import Any

import click
import jax

from pipelines.cli import choosing, options, terminal
from pipelines.cli.terminal import usage_errors
from pipelines.common.progress import duration, size
from pipelines.configuration.config import Config

_HELP = """Compile the rounds of a run for a slice of TPUs that is not there, and predict memory and time.

The options are those of `fedjax-core train`, so that a run is tried before a slice is paid for; --mesh takes some of
the slice's chips, and --lanes is one a chip unless given. It needs the extra tpu, `pip install 'fedjax-core[tpu]'`, and
no TPU. Everything is compiled by the TPU's own compiler and predicted; nothing is run.

\b
Examples:
  fedjax-core compile --topology v5e:2x2
  fedjax-core compile --topology v5e:4x4 --model cnn --clients 100 --cohort-size 64 --lanes 64
  fedjax-core compile --topology v5e:16x16 --dataset fashion_mnist --model resnet18_gn --seeds 1 --largest
  fedjax-core compile --topology v5p:2x2x1 --config mine.toml --json

Exit codes: 0 done, 2 a mistake in the arguments, or more memory needed than a chip has.
"""


@click.command(
    name="compile",
    cls=options.Command,
    help=_HELP,
    short_help="Compile a run for TPUs that are not there, and predict it.",
)
@options.option(
    "TPU",
    "--topology",
    required=True,
    metavar="NAME",
    help="Slice, as chip and grid of chips: v5e:2x2 to v5e:16x16, v5p:2x2x1, v6e:4x4 and others.",
)
@options.option(
    "TPU",
    "--largest",
    is_flag=True,
    help="Find the most lanes and the largest cohort that fit into memory; compiles several times.",
)
@options.CONFIG[0]
@options.choices(Config)
@options.option("Output", "--json", "as_json", is_flag=True, help="Print an object a line, one for each method.")
@click.pass_context
def compile_(
    ctx: click.Context, topology: str, largest: bool, config_path: Path | None, as_json: bool, **values: Any
) -> None:
    """Compile a run for TPUs that are not there; the help text is given above."""
    from pipelines.compiled import compiling

    logging.getLogger("absl").setLevel(logging.ERROR)
    with terminal.warnings_as_lines(), usage_errors(ctx):
        # What is here does nothing but trace, and a TPU that is here is left alone.
        jax.config.update("jax_platforms", "cpu")
        config = Config(**choosing.choices(options.given(ctx, Config), config_path))
        tpus, experiment = compiling.prepare(config, topology)
        if not as_json:
            for line in compiling.assumptions(tpus):
                click.echo(f"assumption: {line}")
        for name in config.methods:
            report = compiling.compile_method(experiment, tpus, name)
            limits = _limits(config, topology, name) if largest else {}
            if as_json:
                found = {key: None if limit is None else limit._asdict() for key, limit in limits.items()}
                click.echo(json.dumps({**report.as_json(), **found, "assumptions": compiling.assumptions(tpus)}))
                continue
            click.echo()
            for line in [*described(report, tpus), *_said(limits)]:
                click.echo(line)


def _time(seconds: float) -> str:
    """Seconds in words, short ones too: "12 us", "3.4 ms"."""
    if seconds >= 1:
        return duration(seconds)
    number, unit = (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "us")
    return f"{number:.3g} {unit}"


def _limits(config: Config, topology: str, name: str) -> dict[str, Any]:
    from pipelines.compiled import compiling

    counted = config.participation.sampler in ("uniform", "weighted", "cyclic")
    return {
        "most_lanes_a_chip": compiling.most_lanes(config, topology, name),
        "largest_cohort": compiling.largest_cohort(config, topology, name) if counted else None,
    }


def _said(limits: dict[str, Any]) -> list[str]:
    lines = []
    for key, limit in limits.items():
        if limit is None:
            continue
        what = key.replace("_", " ")
        if not limit.fits:
            lines.append(f"  {what}: not even one fits")
            continue
        end = "all that there can be" if limit.too_many is None else f"{limit.too_many} do not fit"
        lines.append(f"  {what}: {limit.fits}, which need {size(limit.needs)} ({end}; {limit.compiled} compiled)")
    return lines


def described(report: Any, tpus: Any) -> list[str]:
    """A report in lines."""
    memory, seconds = report.memory, report.seconds
    parts = ", ".join(f"{name} {size(number)}" for name, number in memory.items() if name != "together")
    share = "" if report.model_parallel == 1 else f", {report.model_parallel} to a model"
    lines = [
        f"{report.method}: compiled for {report.topology} in {duration(report.compile_seconds)}, not run",
        f"  {report.num_chips} chips{share}, {report.lanes} lanes a chip, {report.slots} clients a round of all seeds, "
        f"{report.parameters:,} parameters",
        f"  memory of a chip: {size(memory['together'])} of {size(report.hbm_bytes)}, "
        f"{memory['together'] / report.hbm_bytes:.1%} ({parts})",
        f"  a round, the busiest chip: {report.flops / 1e9:,.3f} GFLOP of products, "
        f"{size(report.moved_bytes)} moved to and from HBM",
    ]
    for number, each in enumerate(report.loops):
        idle = 1 - each.useful / each.executed if each.executed else 0.0
        lines.append(
            f"  pass {number + 1}: {each.useful:,.0f} local steps, {each.steps:,.0f} in turn on the busiest chip; of "
            f"all lanes {idle:.0%} idle"
        )
    for kind, number, together, times in report.collectives:
        lines.append(f"  {kind} of {size(number)} over {together} chips, {times:g} times a round")
    if not report.collectives:
        lines.append("  no collectives")
    lines.append(
        f"  predicted by roofline: {_time(seconds['roofline'])} a round (products {_time(seconds['products'])}, "
        f"memory {_time(seconds['memory'])}, collectives {_time(seconds['collectives'])})"
    )
    if seconds["compiler"] is not None:
        lines.append(f"  predicted by the compiler's estimates: {_time(seconds['compiler'])} a round")
    lines.append(f"  share of peak, at the longer of these: {report.share_of_peak:.2%}")
    if report.unknown_loops:
        lines.append(f"  loops of unknown length, counted once: {', '.join(report.unknown_loops)}")
    if report.host_calls:
        lines.append(f"  calls to the host: {', '.join(report.host_calls)}")
    return lines
