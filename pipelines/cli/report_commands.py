"""The commands that tell of what runs have measured: `fedjax-core report` and `fedjax-core compare`."""

import os
from collections.abc import Callable
from pathlib import Path

import click
import jax

from pipelines.cli import terminal
from pipelines.cli.terminal import usage_errors
from pipelines.common import files

_OUT = click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="A new or empty directory.  [default: RUN itself]"
)


@click.command(
    short_help="Draw the report of a run or a study again.",
    help="""Draw and write the report of what is in the directory RUN again, of `fedjax-core train` or of a study: one
HTML page that has its figures inside, the same as Markdown, tables and figures, and the command that repeats it.

\b
Examples:
  fedjax-core report runs/mine
  fedjax-core report runs/mine --out reports/mine

Nothing is trained or tested, and neither the data nor the devices need be there. What has been stopped is shown as far
as it has come; of a study, its methods that are done. Every number is read from what was saved, whose digests are
checked, and a table that was edited is refused. Exit codes: 0 done, 2 a mistake in the arguments.
""",
)
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@_OUT
@click.pass_context
def report(ctx: click.Context, run: Path, out: Path | None) -> None:
    """Draw a report again; the help text is given above."""
    with terminal.warnings_as_lines(), usage_errors(ctx):
        _stay_on_the_processor()
        again = _again_of(run)
        if out is not None:
            files.check_empty(out)
        elif not os.access(run, os.W_OK):
            raise ValueError(f"{run} cannot be written to: give a directory for the report by --out")
        target = run if out is None else out
        first, *others = again(run, target, click.echo)
    click.echo(f"written: {target / first}, {', '.join(others)}")


@click.command(
    short_help="Lay finished runs beside one another.",
    help="""Lay runs of `fedjax-core train` beside one another, of the same or of other methods, configurations and
seeds: what differs between them and what makes that unfair, their numbers in one table, their curves in one figure, and
differences seed by seed with a paired test. The others are compared with the first.

\b
Examples:
  fedjax-core compare runs/small runs/large
  fedjax-core compare runs/small runs/large --target 0.9 --out comparisons/sizes

Written are one HTML page that has its figure inside, the same as Markdown, and the figure. Nothing is trained or
tested, and neither the data nor the devices need be there. Exit codes: 0 done, 2 a mistake in the arguments.
""",
)
@click.argument("runs", type=click.Path(path_type=Path), metavar="RUN RUN...", nargs=-1, required=True)
@click.option(
    "--target",
    type=click.FloatRange(0, 1),
    metavar="A",
    help="Test accuracy to reach.  [default: that of the first run]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new or empty directory.  [default: comparisons/<names of the runs>]",
)
@click.pass_context
def compare(ctx: click.Context, runs: tuple[Path, ...], target: float | None, out: Path | None) -> None:
    """Lay runs beside one another; the help text is given above."""
    from pipelines.run import comparison

    with terminal.warnings_as_lines(), usage_errors(ctx):
        _stay_on_the_processor()
        out = out or Path("comparisons") / "-".join(run.resolve().name for run in runs)[:100]
        files.check_empty(out)
        found = comparison.load(runs, target)
        for line in comparison.unfair(found):
            click.echo(f"note: {line}")
        written = comparison.write(out, found, comparison.command(runs, out, target))
    click.echo(f"written: {out / written[0]}, {', '.join(written[1:])}")


def _again_of(run: Path) -> Callable[[Path, Path, Callable[[str], None]], list[str]]:
    """`again(run, target, say)` of the command that made what is in a directory."""
    from pipelines.run import measured, run_directory
    from pipelines.studies import continual, sweep_report, zeroth_order
    from pipelines.studies.convergence import study as convergence

    known = {
        "train": measured.again,
        "sweep": sweep_report.again,
        "continual": continual.again,
        "zeroth-order": zeroth_order.again,
        "converge": convergence.again,
    }
    command = run_directory.command_of(run)
    if command not in known:
        raise ValueError(f"{run} is of `fedjax-core {command}`: give a directory of {', '.join(known)}")
    return known[command]


def _stay_on_the_processor() -> None:
    """Leaves accelerators alone, which may be at work for others: a report is a matter of moments."""
    jax.config.update("jax_platforms", "cpu")
