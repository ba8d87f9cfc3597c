"""The command `fedjax-core converge`: theory beside measurement (`pipelines.studies.convergence`)."""

from pathlib import Path
from typing import Any

import click

from pipelines.cli import options, terminal
from pipelines.common import files
from pipelines.studies.convergence.config import Converge

_HELP = """Measure what theory says of methods: rates and floors on problems with known constants.

\b
Examples:
  fedjax-core converge --method fedavg
  fedjax-core converge --rounds 8000 --seeds 10 --out runs/theory

Each claim that is entered for a method is confirmed, contradicted or not decided, with the interval that decides it:
summary.html and summary.md, claims.csv, a figure for each method and curves.png. A study that was stopped goes on when
the same command is given again, and more methods may join it. Exit codes: 0 done, whatever the verdicts, 2 a mistake in
the arguments, 5 the directory cannot be written to, 130 Ctrl-C, 143 SIGTERM.
"""


@click.command(cls=options.Command, short_help="Measure what theory says of methods.", help=_HELP)
@options.study(Converge)
@click.pass_context
def converge(
    ctx: click.Context,
    out: Path | None,
    quiet: bool,
    config_path: Path | None,
    write_config: Path | None,
    print_config: bool,
    **values: Any,
) -> None:
    """Measure what theory says of methods; the help text is given above."""
    with terminal.warnings_as_lines(), terminal.stops(ctx), terminal.usage_errors(ctx):
        asked = options.asked(ctx, Converge, config_path)
        if options.shown(asked, write_config, print_config):
            return
        from pipelines.studies.convergence import study

        out = out or Path("runs") / study.slug(asked)
        files.check_directory(out)
        terminal.check_jax()
        reporter = terminal.study_reporter(quiet, out)
        _, verdicts = study.run(asked, out, reporter.say)
        said = [f"{sum(each.word == word for each in verdicts)} {word}" for word in study.WORDS]
    where = f"{out / 'summary.html'}, summary.md, claims.csv, curves.png, a figure for each method"
    reporter.say(f"{', '.join(said)}; written: {where}")
