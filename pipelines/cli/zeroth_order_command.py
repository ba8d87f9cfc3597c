"""The command `fedjax-core zeroth-order`: the experiments of `pipelines.studies.zeroth_order`."""

from pathlib import Path
from typing import Any

import click

from pipelines.cli import options, terminal
from pipelines.common import files, processes
from pipelines.experiment import memory
from pipelines.studies.zeroth_order_config import STUDIES, Study

_HELP = """Compare FZooS with FedZO, FedProx-ZO and SCAFFOLD-ZO I and II: function values, no gradients.

F against rounds and against queries, means and standard deviations over seeds, as curves.png and .pdf,
curves.csv, summary.md and .html, results.tex. Every core, or other device, has a trial of its own. A study that was
stopped goes on when the same command is given again, and more seeds or methods may join it. Exit codes: 0 done,
2 a mistake in the arguments, 5 the directory cannot be written to, 130 Ctrl-C, 143 SIGTERM.

\b
fedjax-core zeroth-order synthetic --function quadratic --heterogeneity 5
fedjax-core zeroth-order attack --dataset fashion_mnist --data-dir DIR --steps 5
fedjax-core zeroth-order metric --score jaccard --mu 1 --lr 0.05
"""


@click.group(name="zeroth-order", short_help="Compare methods that query values and have no gradients.", help=_HELP)
def zeroth_order() -> None:
    """Compare methods that have function values and no gradients; the help text is given above."""


def _add(task: str, short_help: str) -> None:
    """Adds the command of a task, whose options are the choices of its kind of study."""
    kind = STUDIES[task]

    @zeroth_order.command(cls=options.Command, name=task, short_help=short_help, help=short_help)
    @options.study(kind)
    @click.pass_context
    def command(ctx: click.Context, **values: Any) -> None:
        _compare(ctx, kind, **values)


def _compare(
    ctx: click.Context,
    kind: type[Study],
    out: Path | None,
    quiet: bool,
    config_path: Path | None,
    write_config: Path | None,
    print_config: bool,
    **values: Any,
) -> None:
    from pipelines.studies import zeroth_order

    processes.cores_as_devices()
    with terminal.warnings_as_lines(), terminal.stops(ctx), terminal.usage_errors(ctx):
        study = options.asked(ctx, kind, config_path)
        if options.shown(study, write_config, print_config):
            return
        out = out or Path("runs") / zeroth_order.slug(study)
        reporter = terminal.study_reporter(quiet, out)
        files.check_directory(out)
        # What a synthetic task draws at least: two numbers for each dimension of each client, in double precision.
        drawn = 16 * study.flat().get("dim", 1) * study.flat()["clients"]
        memory.refuse("the functions of the clients", {"seeds": drawn}, memory.available())
        terminal.check_jax()
        zeroth_order.compare(study, out, reporter.say)
    reporter.say(f"written: {out / 'summary.md'} and .html, results.tex, curves.png and .pdf, curves.csv")


_add("synthetic", "Quadratic, Ackley or Levy functions.")
_add("attack", "A black-box attack on the classifiers of all clients.")
_add("metric", "A metric without a gradient.")
