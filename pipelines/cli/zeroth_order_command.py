"""The command `fedjax-core zeroth-order`: the experiments of `pipelines.studies.zeroth_order`."""

from pathlib import Path
from typing import Any

import click

from pipelines.cli import terminal
from pipelines.common import files, progress
from pipelines.experiment import memory

_STUDY = (
    click.option("--rounds", type=int, default=50, show_default=True, help="Rounds of each method."),
    click.option("--steps", type=int, default=10, show_default=True, help="Local steps of a round."),
    click.option("--trials", type=int, default=10, show_default=True, help="Functions and starts drawn anew."),
    click.option("--lr", type=float, default=0.01, show_default=True, help="Learning rate of the clients' Adam."),
    click.option("--directions", type=int, default=20, show_default=True, help="Directions of a finite difference."),
    click.option("--mu", type=float, default=0.01, show_default=True, help="Length of a finite difference."),
    click.option("--radius", type=float, default=0.01, show_default=True, help="Half-width of the boxes of FZooS."),
    click.option("--noise", type=float, default=1e-6, show_default=True, help="Variance of a query in its surrogates."),
    click.option("--neighbors", type=int, default=150, show_default=True, help="Queries that a surrogate is given."),
    click.option("--features", type=int, default=10000, show_default=True, help="Random Fourier features."),
    click.option("--lengthscale", type=float, default=1.0, show_default=True, help="Of the features."),
    click.option("--correction-decay", type=float, default=1.0, show_default=True, help="0 keeps corrections whole."),
    click.option("--capacity", type=int, default=1000, show_default=True, help="Queries that a client remembers."),
    click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: runs/<what is run>]"),
)


def _of_study(command: Any) -> Any:
    for option in reversed(_STUDY):
        command = option(command)
    return command


_HELP = """Compare FZooS with FedZO, FedProx-ZO and SCAFFOLD-ZO I and II: function values, no gradients.

F against rounds and against queries, means and standard deviations over trials, as curves.png and .pdf,
curves.csv, summary.md and results.tex. Every core, or other device, has a trial of its own. A study that was
stopped goes on when the same command is given again. Exit codes: 0 done, 2 a mistake in the arguments, 5 the
directory cannot be written to, 130 Ctrl-C, 143 SIGTERM.

\b
fedjax-core zeroth-order synthetic --function quadratic --heterogeneity 5
fedjax-core zeroth-order attack --dataset fashion_mnist --data-dir DIR --steps 5
fedjax-core zeroth-order metric --score jaccard --mu 1 --lr 0.05
"""


@click.group(name="zeroth-order", short_help="Compare methods that query values and have no gradients.", help=_HELP)
def zeroth_order() -> None:
    """Compare methods that have function values and no gradients; the help text is given above."""


@zeroth_order.command(short_help="Quadratic, Ackley or Levy functions.")
@click.option("--function", default="quadratic", show_default=True, help="quadratic, ackley or levy.")
@click.option("--dim", type=int, default=300, show_default=True, help="Dimensions.")
@click.option("--clients", type=int, default=5, show_default=True, help="Number of clients.")
@click.option("--heterogeneity", type=float, default=0.5, show_default=True, help="How much clients differ.")
@_of_study
@click.pass_context
def synthetic(ctx: click.Context, **values: Any) -> None:
    """Synthetic functions whose clients differ."""
    _compare(ctx, "synthetic", values)


@zeroth_order.command(short_help="A black-box attack on the classifiers of all clients.")
@click.option("--dataset", default="digits", show_default=True, help="Images: digits, mnist or fashion_mnist.")
@click.option("--data-dir", default=None, help="Prepared data.  [default: $FEDJAX_CORE_DATA]")
@click.option("--clients", type=int, default=10, show_default=True, help="Number of clients.")
@click.option("--alpha", type=float, default=1.0, show_default=True, help="Of the Dirichlet split; small is skewed.")
@click.option("--epsilon", type=float, default=0.3, show_default=True, help="Largest change of a pixel in [0, 1].")
@_of_study
@click.pass_context
def attack(ctx: click.Context, **values: Any) -> None:
    """One perturbation that is to mislead the classifiers of all clients."""
    _compare(ctx, "attack", values)


@zeroth_order.command(short_help="A metric without a gradient.")
@click.option("--score", default="f1", show_default=True, help="precision, recall, f1 or jaccard.")
@click.option("--dataset", default="digits", show_default=True, help="A data set that is taken as a table.")
@click.option("--data-dir", default=None, help="Prepared data.  [default: $FEDJAX_CORE_DATA]")
@click.option("--clients", type=int, default=7, show_default=True, help="Number of clients.")
@click.option("--alpha", type=float, default=10.0, show_default=True, help="Of the Dirichlet split; small is skewed.")
@click.option("--pool", type=int, default=1, show_default=True, help="Of images, means of squares of that many pixels.")
@click.option("--reach", type=float, default=0.2, show_default=True, help="Largest shift of a weight.")
@_of_study
@click.pass_context
def metric(ctx: click.Context, **values: Any) -> None:
    """A macro-averaged score of a perceptron as a function of its weights."""
    _compare(ctx, "metric", values)


def _compare(ctx: click.Context, task: str, values: dict[str, Any]) -> None:
    from pipelines.common import processes
    from pipelines.studies import zeroth_order

    processes.cores_as_devices()
    directory = values.pop("out")
    own = {name: values.pop(name) for name in zeroth_order.Study._fields if name in values}
    study = zeroth_order.Study(task, tuple(sorted(values.items())), **own)
    out = directory or Path("runs") / zeroth_order.slug(study)
    reporter = terminal.going_on(progress.plain(), out)
    with terminal.warnings_as_lines(), terminal.stops(ctx), terminal.usage_errors(ctx):
        files.check_directory(out)
        zeroth_order.check(study)
        # What a synthetic task draws at least: two numbers for each dimension of each client, in double precision.
        drawn = 16 * values.get("dim", 1) * values["clients"]
        memory.refuse("the functions of the clients", {"trials": drawn}, memory.available())
        terminal.check_jax()
        zeroth_order.compare(study, out, reporter.say)
    reporter.say(f"written: {out / 'summary.md'}, results.tex, curves.png and .pdf, curves.csv")
