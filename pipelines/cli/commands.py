"""The command line, `fedjax-core`; other modules of this package have the commands of finished runs and of studies."""

import logging
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click
import jax
from click.shell_completion import get_completion_class
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli import catalog, choosing, options, terminal
from pipelines.cli.compile_command import compile_
from pipelines.cli.converge_command import converge
from pipelines.cli.report_commands import compare, report
from pipelines.cli.run_commands import evaluate, export
from pipelines.cli.sweep_command import sweep
from pipelines.cli.terminal import usage_errors
from pipelines.cli.zeroth_order_command import zeroth_order
from pipelines.common import files, processes, progress
from pipelines.common.names import pick
from pipelines.common.own import short
from pipelines.common.progress import duration, size
from pipelines.configuration import config_file, methods
from pipelines.configuration.config import FEDERATION_FIELDS, MOST_DEVICES, Config
from pipelines.federation import heterogeneity
from pipelines.results import logs
from pipelines.studies.continual_config import Continual

_LOST = 3


_HELP = """Federated learning research in JAX: a whole federated round is one compiled step.

\b
fedjax-core train            compare FedAvg, SCAFFOLD and FedAdam on handwritten digits
fedjax-core sweep            train with every setting of a grid, and find the best
fedjax-core converge         measure what theory says of methods, on problems with known constants
fedjax-core federate         describe and draw a federation before anything is trained
fedjax-core continual        learn one task after another, and see what is forgotten
fedjax-core list             what there is to choose from
fedjax-core list scaffold    a method's card and hyper-parameters
fedjax-core zeroth-order     compare methods that have function values and no gradients
fedjax-core report RUN       draw a run or a study again, as one HTML page and as Markdown
fedjax-core compare RUN RUN  lay runs beside one another: numbers, curves, what makes it unfair
fedjax-core evaluate RUN     test the models of a finished run on a data set
fedjax-core compile          compile a run for TPUs that are not there, and predict memory and time
fedjax-core export RUN       write them to files that other programs read
fedjax-core completion bash  make the shell complete all of these (or zsh, or fish)
"""


@click.group(
    cls=terminal.Group,
    help=_HELP,  # not the docstring, which `python -OO` leaves out
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="fedjax-core", prog_name="fedjax-core")
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
def main(debug: bool) -> None:
    """Federated learning research in JAX; the help text is given above."""


main.add_command(converge)
main.add_command(sweep)
main.add_command(zeroth_order)
main.add_command(report)
main.add_command(compare)
main.add_command(evaluate)
main.add_command(export)
main.add_command(compile_)


_EXAMPLES = """

\b
Examples:
  fedjax-core train
  fedjax-core train --method fedavg --method fedprox --set fedprox.mu=0.01
  fedjax-core train --dataset fashion_mnist --data-dir DIR --clients 100 --alpha 0.1 --seeds 1
  fedjax-core train --dataset wine --model logistic_regression --clients 10 --cohort-size 5 --alpha 0.1
  fedjax-core train --personal --method fedper --method ditto --clients 20 --test-share 0.25
  fedjax-core train --sampler markov --turn-on 0.1 --turn-off 0.3 --rounds 500 --out runs/markov
  fedjax-core train --set client_lr=0.3 --set fedadam.client_lr=0.1 --set fedadam.server_lr=0.01

A run that was stopped, by Ctrl-C or otherwise, goes on when the same command is given again. A finished one goes on
with more --rounds, --seeds or --method in the same --out. Exit codes: 0 done,
1 the loss or the model is no longer finite, 2 a mistake in the arguments, 3 another process of the run is gone, 4 an
unexpected error, whose traceback is kept in a file, 5 the run directory cannot be
written to, 130 stopped by Ctrl-C.
"""

_PROCESSES = "Join the other processes of a run on several machines; each gives the same command."
_DISTRIBUTED = options.several(
    options.option("Processes", "--processes", "join_processes", is_flag=True, help=_PROCESSES),
    options.option("Processes", "--coordinator", metavar="HOST:PORT", help="The first one, where no cluster says."),
    options.option("Processes", "--num-processes", type=int, metavar="N", help="How many, where no cluster says."),
    options.option("Processes", "--process-id", type=int, metavar="I", help="Which this is, where no cluster says."),
)


@main.command(
    cls=options.Command,
    help="Train with one or several federated methods, all seeds at once, and compare them." + _EXAMPLES,
    short_help="Train and compare federated methods.",
)
@options.several(*options.CONFIG)
@options.choices(Config)
@options.option(
    "Evaluation",
    "--personal",
    is_flag=True,
    help="Test each client by the model that it would use itself, the global model beside it, and say how many clients "
    "are better off than alone and than with FedAvg, which are run too.",
)
@_DISTRIBUTED
@options.OUT
@options.QUIET
@options.option(
    "Output",
    "--json",
    "as_json",
    is_flag=True,
    help="Print what happens as JSON, an object a line, and nothing else on the standard output.",
)
@options.option(
    "Output",
    "--log",
    "log_to",
    multiple=True,
    metavar="NAME",
    help="Log metrics to tensorboard or wandb (offline), in the run directory. May be given twice.",
)
@options.option(
    "Output",
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep compiled programs in the user's cache folder, so that a second run starts at once.",
)
@click.pass_context
def train(
    ctx: click.Context,
    out: Path | None,
    quiet: bool,
    cache: bool,
    join_processes: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    config_path: Path | None,
    write_config: Path | None,
    print_config: bool,
    as_json: bool,
    log_to: tuple[str, ...],
    personal: bool,
    **values: Any,
) -> None:
    """Train and compare federated methods; the help text is given above."""
    typed = options.given(ctx, Config)
    # Orbax tells of every step it takes through this logger.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if as_json:
        ctx.call_on_close(lambda: _error_as_json(ctx))
    with terminal.warnings_as_lines(), usage_errors(ctx):
        if cache:
            terminal.keep_compiled()
        chosen = choosing.choices(typed, config_path, personal=personal)
        config = Config(**chosen)
        if options.shown(config, write_config, print_config):
            return
        explicit = set(chosen)
        out = out or Path("runs") / config.slug()
        files.check_directory(out)
        # Of very many none is made, and the mesh is refused (`config.MOST_DEVICES`).
        processes.cores_as_devices(
            None if join_processes or (config.machine.mesh or 1) > MOST_DEVICES else config.machine.mesh
        )
        if join_processes and not processes.is_supervised():
            sys.exit(_supervised(out))
        if join_processes:
            processes.connect(coordinator, num_processes, process_id)
        elif coordinator is not None or num_processes is not None or process_id is not None:
            raise ValueError("--coordinator, --num-processes and --process-id are for --processes: add it")
        terminal.check_jax()
        logged = logs.logger(log_to, config, out) if log_to else None
    console = terminal.console()
    quiet = quiet or not processes.is_first()
    shown = progress.bar(console) if console.is_terminal else progress.plain()
    reporter = progress.silent() if quiet else progress.json_lines() if as_json else shown
    reporter = terminal.going_on(reporter, out)
    if logged is not None and processes.is_first():
        said = reporter.finish
        reporter = reporter._replace(log=logged.log, finish=lambda: (said(), logged.finish())[0])
    for line in _unused(config, typed):
        reporter.say(f"note: {line}")
    try:
        status = _train(ctx, config, out, explicit, reporter)
    except files.Unwritable as error:
        reporter.event("error", {"message": str(error), "exit_code": terminal.UNWRITABLE})
        raise
    if status == _LOST:
        processes.leave(status)
    sys.exit(status)


def _unused(config: Config, typed: Collection[str]) -> list[str]:
    from pipelines.experiment import setup  # slow to import

    return setup.unused(config, typed)


def _error_as_json(ctx: click.Context) -> None:
    """Tells the error that ended a command, if one did."""
    if terminal.ERROR in ctx.meta:
        progress.json_lines().event("error", {"message": ctx.meta[terminal.ERROR], "exit_code": 2})


def _supervised(out: Path) -> int:
    """Runs this command in a process of its own and returns the exit code."""
    try:
        return processes.supervise(sys.argv[1:], out)
    except processes.Lost as error:
        click.echo(f"Error: {error}", err=True)
        return _LOST


def _train(ctx: click.Context, config: Config, out: Path, explicit: set[str], reporter: progress.Reporter) -> int:
    """Runs a configuration and returns the exit code."""
    from pipelines.experiment import plans, setup, views
    from pipelines.results import early, personal, subject
    from pipelines.results import report as reports
    from pipelines.run import train

    with jax.enable_x64(config.machine.x64), terminal.warnings_as_lines():
        with usage_errors(ctx):
            # A run that goes on keeps its plan, and with it its numbers to the last bit.
            saved = train.saved_config(out)
            if saved is not None:
                config = plans.kept(config.with_methods_of(saved), saved, explicit)
            else:
                config = plans.tuned(config, reporter)
            experiment = setup.prepare(config)
            train.claim(out, config, experiment.federation)
        for line in subject.described(experiment):
            reporter.say(line)
        for line in (setup.unlikely_classes(experiment.dataset), setup.much_local_work(experiment)):
            if line:
                reporter.say(f"note: {line}")
        for name in config.methods:
            parts = setup.predicted_memory(experiment, name)
            made_up = ", ".join(f"{part} {size(number)}" for part, number in parts.items())
            reporter.say(f"{name}: {reports.settings_line(config, name)}")
            if advised := methods.advice(name, subject.num_parameters(experiment)):
                reporter.say(f"note: {advised}")
            reporter.say(f"{name}: about {size(sum(parts.values()))} of memory predicted ({made_up})")
        reporter.say(f"results: {out}")
        try:
            results = train.run(experiment, out, reporter=reporter)
        except (train.Refused, train.checkpoint.OtherRun) as error:
            return _failed(reporter, error, 2)
        except processes.Lost as error:
            return _failed(reporter, error, _LOST)
        except train.Interrupted as stop:
            click.echo(stop.message, err=True)
            reporter.event("stopped", {"message": stop.message})
            return 128 + stop.signal
        except train.Diverged as error:
            return _failed(reporter, error, 1)
        eval_rounds = train.history.evaluated_rounds(config.rounds, config.evaluation.eval_every)
        about = subject.of_experiment(experiment)
        histories = {name: early.reported(config, each.history, eval_rounds) for name, each in results.items()}
        for name, result in results.items():
            view = views.evaluated(config, experiment.algorithms[name]).main
            shown = histories[name]
            accuracy = shown[train.history.of_view("test", view, "accuracy")]
            final = reports.mean_sd(train.history.final_scores(shown, view, "accuracy").astype(float))
            reached = reports.rounds_to_target(accuracy, eval_rounds, config.report.target)
            of = "" if view == views.GLOBAL else f"{view} "
            compiled = "" if config.machine.staged else f"compiled in {duration(result.info['compile_seconds'])}, "
            better = "".join(
                f"{personal.shown(each)} clients {personal.WORDS[other]}, "
                for other, each in personal.others(about, histories, name, view).items()
                if each is not None
            )
            reporter.say(
                f"{name}: {of}test accuracy {final}, {better}rounds to {100 * config.report.target:g} %: {reached} "
                f"({compiled}ran {duration(result.info['run_seconds'])})"
            )
        reporter.say(
            f"written: {out / 'summary.md'}, .html and .json, results.tex, metrics.csv, clients.csv, "
            f"{'clients.parquet, ' if config.evaluation.clients_over_time else ''}checkpoints; curves and "
            "clients as .png and .pdf"
        )
        reporter.event("finished", {"path": str(out)})
    return 0


def _failed(reporter: progress.Reporter, error: Exception, exit_code: int) -> int:
    """Tells an error that ended a run, and returns the exit code."""
    click.echo(f"Error: {error}", err=True)
    reporter.event("error", {"message": str(error), "exit_code": exit_code})
    return exit_code


@main.command(
    cls=options.Command,
    short_help="Build, describe and draw a federation before anything is trained.",
    help="""Build a federation, say how its clients differ and what would spoil a study with it, and save it.

\b
Examples:
  fedjax-core federate --dataset fashion_mnist --clients 100 --alpha 0.1
  fedjax-core federate --clients 20 --compare iid --compare shards
  fedjax-core federate --dataset shakespeare --partition natural --clients all
  fedjax-core federate --dataset mnist+usps --partition domains --clients 10
  fedjax-core federate --dataset cifar10 --partition iid --feature-skew rotation --out federations/turned
  fedjax-core train --federation federations/turned

In the directory are federation.md, federation.png and .pdf, the assignments as .npz, and federation.json with their
digest, so that a federation can be shared and is checked when it is used. Exit codes: 0 done, 2 a mistake in the
arguments.
""",
)
@options.CONFIG[0]
@options.choices(Config, (*FEDERATION_FIELDS, "data_dir"))
@options.choices(Config, ["batch_size"])
@options.option(
    "Output",
    "--compare",
    multiple=True,
    metavar="NAME",
    shell_complete=options.completing("partition"),
    help="Another partition to measure beside it, with the same options. May be given several times.",
)
@options.option(
    "Output",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory.  [default: federations/<what it is>]",
)
@click.pass_context
def federate(
    ctx: click.Context, out: Path | None, compare: tuple[str, ...], config_path: Path | None, **values: Any
) -> None:
    """Build, describe and draw a federation; the help text is given above."""
    from pipelines.experiment import setup
    from pipelines.federation import federations, portrait

    typed = options.given(ctx, Config)
    with terminal.warnings_as_lines(), usage_errors(ctx):
        filed = {} if config_path is None else config_file.read(config_path)
        config = Config(**{name: value for name, value in choosing.beside(typed, filed).items() if name in values})
        out = out or Path("federations") / config.federation_slug()
        files.check_directory(out)
        terminal.check_jax()
        for name in compare:
            choices = [n for n in federations.PARTITIONS if n != config.federation.partition]
            pick("partition to compare with", name, choices)
        built = setup.federate(config)
        others = {name: _train_part(config, built, name) for name in compare}
    with usage_errors(ctx):
        saved = federations.save(built, config, out)
        rows = portrait.comparison(config, built, others)
        portrait.write(out, config, built, rows, saved["warnings"])
    console = terminal.console()
    for line in portrait.described(config, built):
        console.print(Text(line))
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*[heterogeneity.shown(value) for value in row.values()])
    console.print()
    console.print(table)
    console.print()
    for line in setup.unused(config, [name for name in typed if name != "public_share"]):  # methods come later
        console.print(Text(f"note: {line}"))
    for line in saved["warnings"]:
        console.print(Text(f"warning: {line}"))
    console.print(Text(f"digest: {saved['digest']}"))
    console.print(Text(f"written: {out / 'federation.md'}, .png, .pdf and .json, and the assignments"))


def _train_part(config: Config, built: Any, partition: str) -> Any:
    """The training part of the federation that another partition gives."""
    from pipelines.federation import federations

    other = config.replace(partition=partition, feature_skew="none")
    return federations.build(other, built.dataset).parts["train"].assignment


@main.command(
    cls=options.Command,
    short_help="Learn one task after another, and see what is forgotten.",
    help="""Train methods on one task after another and measure what they still know of the tasks before.

\b
Examples:
  fedjax-core continual
  fedjax-core continual --method fot,fedavg,ewc,fedprox,joint
  fedjax-core continual --scenario split --dataset cifar10 --model cnn --tasks 5 --rounds 20
  fedjax-core continual --dataset mnist --data-dir DIR --tasks 10 --rounds 200 --clients 125 --cohort-size 64 \\
      --hidden 400,400,400 --dropout 0.2,0.5,0.5 --batch-size 64 --lr 0.01 --energy 0.96

In the run directory are accuracy.png and .pdf, the test accuracy on every task after every task, the same as
accuracy.csv, results.tex, and summary.md, .html and .json. A run that was stopped goes on when the same command is
given again, and other methods and seeds may join it. Exit codes: 0 done, 1 the loss is no longer finite, 2 a mistake in
the arguments, 5 the run directory cannot be written to, 130 Ctrl-C, 143 SIGTERM.
""",
)
@options.study(Continual)
@click.pass_context
def continual(
    ctx: click.Context,
    out: Path | None,
    quiet: bool,
    config_path: Path | None,
    write_config: Path | None,
    print_config: bool,
    **values: Any,
) -> None:
    """Learn one task after another; the help text is given above."""
    from pipelines.studies.continual import run, slug

    logging.getLogger("absl").setLevel(logging.ERROR)
    processes.cores_as_devices()
    with terminal.warnings_as_lines(), terminal.stops(ctx), usage_errors(ctx):
        config = options.asked(ctx, Continual, config_path)
        if options.shown(config, write_config, print_config):
            return
        out = out or Path("runs") / slug(config)
        files.check_directory(out)
        terminal.check_jax()
        reporter = terminal.study_reporter(quiet, out)
        try:
            run(config, out, reporter=reporter)
        except FloatingPointError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
    reporter.say(
        f"written: {out / 'accuracy.png'} and .pdf, accuracy.csv, results.tex, summary.md, .html and .json, checkpoints"
    )


@main.command(name="list", short_help="Show methods, models, data sets, partitions, samplers, plans.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=options.completing())
@click.option("--data-dir", metavar="DIR", help="Prepared data.  [default: $FEDJAX_CORE_DATA]")
@click.pass_context
def list_(ctx: click.Context, names: tuple[str, ...], data_dir: str | None) -> None:
    """Show all there is, all of one kind ("methods", "data sets"), or everything about the thing called NAME."""
    console = terminal.console()
    with usage_errors(ctx):
        groups = catalog.kinds(data_dir)
        # "data sets" is two words for the shell.
        kind_name = catalog.kind_called(" ".join(names), groups) if names else None
        for i, name in enumerate(names if kind_name is None else [kind_name]):
            if i:
                click.echo()
            kind = catalog.kind_called(name, groups)
            if name in methods.all_names() or methods.looks_own(name):
                _show_method(console, methods.describe(name))
            elif kind is not None and not any(name in entries for entries in groups.values()):
                console.print(_kind_table(kind, groups[kind]))
            else:
                click.echo(catalog.described(name, data_dir))
    if names:
        return
    for i, (kind, entries) in enumerate(groups.items()):
        if i:
            console.print()
        console.print(_kind_table(kind, entries))
    click.echo(
        "\n`fedjax-core list NAME` shows everything about one of them. Your own method, model or data set is named "
        "module:name."
    )


_ANY_OWN = "module:function"


def _kind_table(kind: str, entries: Mapping[str, Callable[[], str]]) -> Table:
    """Everything of a kind, a line each."""
    if kind == "method":
        table = _table("methods", "what it is", "what it asks for", "paper")
        for each in map(methods.describe, entries):
            asks = methods.asks_in_words(each)
            if methods.why_not(each.name):
                asks += " (in Python only)" if methods.why_not(each.name, _ANY_OWN) else " (of your own, --model)"
            table.add_row(each.name, Text(each.title), Text(asks), Text(each.paper))
        return table
    table = _table(f"{kind}s", "what it is")
    for entry, card in entries.items():
        table.add_row(entry, Text(textwrap.shorten(catalog.first_paragraph(card()), 300, placeholder=" ...")))
    return table


@main.command(short_help="Print what makes a shell complete commands, options and names.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes commands, options and names.

    \b
    bash:  echo 'eval "$(fedjax-core completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(fedjax-core completion zsh)"' >> ~/.zshrc
    fish:  fedjax-core completion fish > ~/.config/fish/completions/fedjax-core.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(main, {}, "fedjax-core", "_FEDJAX_CORE_COMPLETE").source())


def _show_method(console: Console, method: methods.Method) -> None:
    click.echo(method.card)
    click.echo()
    click.echo(f"Asks for: {methods.asks_in_words(method) or 'a loss and an optimizer alone'}.")
    if said := methods.why_not(method.name):
        click.echo(f"{said}.")
    click.echo()
    if not method.hyperparameters:
        click.echo("It has no hyper-parameters of its own.")
        return
    table = _table("hyper-parameter", "default of the factory", "in a run unless set")
    for name, default in method.hyperparameters.items():
        used = methods.settings_of(method.name, {}).get(name, "has to be set")
        table.add_row(
            Text(f"--set {short(method.name)}.{name}=..."), "" if default is None else str(default), str(used)
        )
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0)
    return table
