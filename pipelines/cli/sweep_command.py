"""The command `fedjax-core sweep`: methods x hyper-parameters x seeds (`pipelines.studies.sweep`)."""

from pathlib import Path
from typing import Any

import click
import jax

from pipelines.cli import choosing, options, terminal
from pipelines.common import files, processes
from pipelines.studies.sweep_config import Sweep

_HELP = """Train methods with every setting of a grid and several seeds, one compiled program a method.

\b
Examples:
  fedjax-core sweep --method fedavg --grid client_lr=0.03,0.1,0.3
  fedjax-core sweep --method fedavg --method fedprox --grid client_lr=log:0.01:1:5 --grid fedprox.mu=0.01,0.1,1
  fedjax-core sweep --method scaffold --grid client_lr=log:0.003:3:27 --halving 3 --seeds 3

Settings are judged on examples that clients keep back (--validation-share). Out come a table of every round
(sweep.parquet), the best settings with confidence intervals (summary.md and .html, results.tex) and maps of the grid
(sensitivity.png and .pdf). A sweep that was stopped goes on when the same command is given again, and more values,
methods and seeds may join it. Exit codes: 0 done, 2 a mistake in the arguments, 5 the directory cannot be written to,
130 Ctrl-C, 143 SIGTERM.
"""


@click.command(cls=options.Command, short_help="Train with every setting of a grid, and find the best.", help=_HELP)
@options.study(Sweep)
@click.pass_context
def sweep(
    ctx: click.Context,
    out: Path | None,
    quiet: bool,
    config_path: Path | None,
    write_config: Path | None,
    print_config: bool,
    **values: Any,
) -> None:
    """Train with every setting of a grid; the help text is given above."""
    with terminal.warnings_as_lines(), terminal.stops(ctx), terminal.usage_errors(ctx):
        asked = Sweep(**choosing.choices(options.given(ctx, Sweep), config_path, Sweep))
        if options.shown(asked, write_config, print_config):
            return
        terminal.keep_compiled()
        out = out or Path("runs") / asked.slug()
        files.check_directory(out)
        processes.cores_as_devices(asked.machine.mesh)
        terminal.check_jax()
        reporter = terminal.study_reporter(quiet, out)
        with jax.enable_x64(asked.machine.x64):
            from pipelines.studies import sweep as study

            study.run(asked, out, reporter.say)
    reporter.say(f"written: {out / 'summary.md'} and .html, results.tex, sweep.parquet, sensitivity.png and .pdf")
