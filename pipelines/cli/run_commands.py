"""The commands that use a finished run: `fedjax-core evaluate` and `fedjax-core export`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipelines.cli import terminal
from pipelines.cli.terminal import usage_errors
from pipelines.configuration.options import LIMIT

_RUN = click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
_METHOD = click.option(
    "--method", "methods", multiple=True, metavar="NAME", help="Of the run; may be given several times.  [default: all]"
)
_SEED = click.option(
    "--seed", "seeds", type=int, multiple=True, metavar="SEED", help="Likewise, a seed of the run.  [default: all]"
)


@click.command(
    short_help="Test the models of a finished run on a data set.",
    help="""Test what the run in the directory RUN has come to, on its own data or on another data set: the global
models, and on the run's own data what each client would use, on examples of its own.

\b
Examples:
  fedjax-core evaluate runs/mine
  fedjax-core evaluate runs/mine --split train --method scaffold --seed 0
  fedjax-core evaluate runs/mine --view personal
  fedjax-core evaluate runs/mine --dataset mine.npz

Neither the devices nor, with --dataset, the data of the run need be there. Exit codes: 0 done, 2 a mistake in the
arguments.
""",
)
@_RUN
@click.option("--dataset", metavar="NAME", help="Data set to test on, a .npz file too.  [default: the run's own]")
@click.option("--data-dir", metavar="DIR", help="Prepared data.  [default: that of the run]")
@click.option(
    "--split",
    default="test",
    show_default=True,
    metavar="NAME",
    help="test or train: a part of the data set; of the run's own also validation and new, those of its clients.",
)
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="NAME",
    help="View to test, such as global or personal; may be given several times.  [default: those of the run]",
)
@_METHOD
@_SEED
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of a table.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    run: Path,
    dataset: str | None,
    data_dir: str | None,
    split: str,
    views: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    as_json: bool,
) -> None:
    """Test the models of a run; the help text is given above."""
    from pipelines.run import loading, scoring

    with terminal.warnings_as_lines(), usage_errors(ctx):
        terminal.check_jax()
        loaded = loading.load_run(run, methods=methods or None, with_data=dataset is None)
        examples, note = scoring.examples_of(loaded, dataset, data_dir, split)
        chosen = tuple(dict.fromkeys(name.strip() for text in views for name in text.split(",")))
        part = split if dataset is None and split != "new" else None
        scores = scoring.score(loaded, examples, seeds=seeds or None, views=chosen, part=part)
    if note:
        click.echo(f"note: {note}", err=True)
    if as_json:
        for row in scores:
            click.echo(json.dumps(row))
        return
    _print(scores, dataset or loaded.config.data.dataset, split, len(examples["y"]))


@click.command(
    short_help="Write the models of a finished run to files that other programs read.",
    help="""Write the models of the run in the directory RUN to files: of every method and seed the global model, or
with --client or --personal the models of clients.

\b
Examples:
  fedjax-core export runs/mine --format npz --out models
  fedjax-core export runs/mine --method scaffold --seed 0 --out scaffold.msgpack
  fedjax-core export runs/mine --format safetensors --method scaffold --client 0,1,2 --out models

The names of leaves are their paths in the model, such as params.Dense_0.kernel; docs/runs.md shows how each format is
read. Neither the devices nor the data of the run need be there. Exit codes: 0 done, 2 a mistake in the arguments.
""",
)
@_RUN
@click.option("--format", "kind", metavar="NAME", help="safetensors, msgpack or npz.  [default: the ending of --out]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A directory, or with one model a file that ends in the format's name.  [default: RUN/models]",
)
@_METHOD
@_SEED
@click.option("--client", "clients", metavar="ID,ID,...", help="Clients whose models to write, counted from 0.")
@click.option("--personal", is_flag=True, help="The models of all clients.")
@click.pass_context
def export(
    ctx: click.Context,
    run: Path,
    kind: str | None,
    out: Path | None,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    clients: str | None,
    personal: bool,
) -> None:
    """Write the models of a run; the help text is given above."""
    from pipelines.common import files
    from pipelines.run import export, loading

    with terminal.warnings_as_lines(), usage_errors(ctx):
        ending = "" if out is None else out.suffix.removeprefix(".")
        as_file = ending in export.FORMATS
        if kind is None and not as_file:
            raise ValueError(f"say --format {', '.join(export.FORMATS)}, or give --out a file that ends so")
        kind = export.checked_format(kind or ending)
        if as_file and kind != ending:
            raise ValueError(f"--format {kind} and --out {out}: let the file end in .{kind}, or leave --format out")
        ids: Sequence[int] | None = _ids(clients)
        if personal and ids is not None:
            raise ValueError("--client names some clients and --personal means all: give one of them")
        files.check_directory(run / "models" if out is None else out.parent if as_file else out)
        terminal.check_jax()
        loaded = loading.load_run(run, methods=methods or None, with_data=False)
        if personal:
            ids = range(loaded.data["clients"])
        many = _count(loaded, seeds, ids)
        if as_file and many != 1:
            raise ValueError(
                f"--out {out} is one file and there are {many} models: choose one by --method and --seed, or give a "
                "directory"
            )
        for note in export.notes(loaded, personal=ids is not None):
            click.echo(f"note: {note}", err=True)
        target = run / "models" if out is None else out
        written = 0
        for model in export.models_of(loaded, methods=methods or None, seeds=seeds or None, clients=ids):
            files.make_directory(target.parent if as_file else target)
            path = target if as_file else target / f"{model.name}.{kind}"
            export.write(path, model.params, kind)
            written += 1
    click.echo(f"written: {target}" if as_file else f"written: {written} models in {target}, {path.name} the last")


def _count(loaded: Any, seeds: Sequence[int], ids: Sequence[int] | None) -> int:
    each = 1 if ids is None else len(ids)
    return each * sum(len(seeds or trained.seeds) for trained in loaded.methods.values())


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        ids = []
    if not ids or max(map(abs, ids)) > LIMIT:
        raise ValueError(f"--client {text!r} is no list of client numbers: write for example 0,3,7")
    return ids


def _print(scores: Sequence[dict[str, Any]], dataset: str, split: str, count: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    plain = ["method", "view", "seed", "round"]
    if all(row["view"] == "global" for row in scores):
        plain.remove("view")
    names = list(dict.fromkeys(name for row in scores for name in row if name not in (*plain, "view")))
    shorter = {"accuracy_sd": "s.d.", "accuracy_worst_decile": "worst tenth"}
    for heading in (*plain, *names):
        table.add_column(
            shorter.get(heading, heading), justify="left" if heading in ("method", "view") else "right", no_wrap=True
        )
    for row in scores:
        table.add_row(*(str(row[name]) for name in plain), *(f"{row[n]:.6g}" if n in row else "" for n in names))
    console = Console(highlight=False)
    if not console.is_terminal:  # nothing is cut off where nobody looks at the width
        console = Console(highlight=False, width=200)
    console.print(f"{dataset}, {split}: {count:,} examples", markup=False)
    console.print(table)
