"""Every command line that the documentation shows has options that there are, and values of their kinds."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import pytest

from pipelines import Config
from pipelines.cli import choosing, commands
from pipelines.configuration import methods
from pipelines.configuration.options import fields_of
from pipelines.studies import continual, zeroth_order
from pipelines.studies.continual_config import Continual
from pipelines.studies.zeroth_order_config import Attack, Synthetic

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "*/README.md", "docs/**/*.md", "examples/*.py", "pipelines/*.py", "fedjax_core/*.py")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
_SHOWN = re.compile(r"(?:fedjax-core|bootstrap\.py|python3? -m pipelines)((?: (?:\"[^\"\n]*\"|'[^'\n]*'|[^`\n\"'])*)?)")


def commands_in(text):
    """The words after `fedjax-core` of every command in a text, with lines that end in a backslash joined."""
    found = []
    for match in _SHOWN.finditer(re.sub(r"\\+\n\s*", "", text)):
        # What follows two spaces explains it; `$(...)` and `... > file` are the shell's.
        line = re.split(r"\s#|  +[a-z]|\)| >", match.group(1).strip(), maxsplit=1)[0]
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        words = [word.partition("|")[0] for word in words]  # of alternatives, the first
        if words and words[0] in commands.main.commands:
            found.append(words)
    return found


def parsed(command, words):
    """The values of a command's options, or None where the words only name it; nothing is run."""
    while isinstance(command, click.Group) and words:
        name, words = words[0], words[1:]
        if name.startswith("-"):
            return None
        command = command.commands.get(name) or pytest.fail(f"there is no command {name}")
    if isinstance(command, click.Group) or not words or "--help" in words:
        return None
    context = click.Context(command, info_name="fedjax-core")
    try:
        command.parse_args(context, list(words))
    except click.NoSuchOption:
        raise
    except click.BadOptionUsage:  # "federate --out" in a sentence: the option is there, and takes a value
        return None
    return context.params


def found():
    return [(path.relative_to(ROOT).as_posix(), words) for path in PAGES for words in commands_in(path.read_text())]


def test_commands_are_found():
    shown = found()
    assert len(shown) > 30
    assert {"README.md", "docs/mesh.md", "docs/data.md", "docs/runs.md"} <= {page for page, _ in shown}


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)}"[:120]) for p, w in found()])
def test_a_command_of_the_documentation_can_be_given(page, words):
    try:
        values = parsed(commands.main, words)
        if values and words[0] == "train" and not any(":" in name for name in values["methods"]):
            choosing.parse_settings(values["settings"], values["methods"] or Config().methods)
            for name in values["methods"]:
                methods.describe(name)
    except (click.UsageError, ValueError) as error:
        pytest.fail(f"{page} shows `fedjax-core {' '.join(words)}`: {error}")


def test_a_command_that_there_is_not_is_found():
    assert commands_in("Give `fedjax-core train --rouns 3`, or\n    fedjax-core list      # all") == [
        ["train", "--rouns", "3"],
        ["list"],
    ]
    with pytest.raises(click.UsageError, match="--rouns"):
        parsed(commands.main, ["train", "--rouns", "3"])
    with pytest.raises(click.UsageError, match="integer"):
        parsed(commands.main, ["zeroth-order", "synthetic", "--rounds", "few"])


def test_commands_that_are_shown_one_after_another_have_a_directory_each_or_share_a_run():
    """Without --out a directory is named after what is run; more methods or seeds are the same run."""
    one = Continual()
    others = [replace(one, lam=3.0), replace(one, scenario="split"), replace(one, dataset="mnist", first_seed=1)]
    assert len({continual.slug(config) for config in [one, *others]}) == 4
    assert continual.slug(replace(one, methods=("ewc",), data_dir="there")) == continual.slug(one)
    study = Synthetic(heterogeneity=5.0)
    changed = [study.replace(rounds=3), study.replace(heterogeneity=0.5)]
    assert len({zeroth_order.slug(each) for each in [study, *changed]}) == 3
    assert zeroth_order.slug(study.replace(seeds=99, methods=("fzoos",))) == zeroth_order.slug(study)
    here = Attack(data_dir="there")
    assert zeroth_order.slug(here) == zeroth_order.slug(Attack())
    by_page = {}
    for page, words in found():
        if "--out" in words[:-1] and words[0] == "train":
            by_page.setdefault((page, words[words.index("--out") + 1]), []).append(parsed(commands.main, words))
    pinned = {name for name, field in fields_of(Config).items() if field.option.role == "result"}
    pinned -= {"rounds", "seeds", "methods"}
    for (page, out), runs in by_page.items():
        for before, after in pairwise(runs):
            assert {k: before[k] for k in pinned & set(before)} == {k: after[k] for k in pinned & set(after)}, (
                page,
                out,
            )
            assert (before["rounds"], before["seeds"]) <= (after["rounds"], after["seeds"]), (page, out)
