"""The choices of the commands as tables for the pages, from what configurations declare.

Between `<!-- choices: Config -->` and `<!-- end of choices -->` a page has the table of a configuration;
`python docs/build.py --write` brings that up to date, and a test compares.
"""

from itertools import groupby

import cards
from pipelines.cli.options import default_of
from pipelines.configuration.config import Config
from pipelines.configuration.options import Section, fields_of
from pipelines.studies.continual_config import Continual
from pipelines.studies.convergence.config import Converge
from pipelines.studies.sweep_config import Sweep
from pipelines.studies.zeroth_order_config import Attack, Metric, Synthetic

KINDS: dict[str, type[Section]] = {
    kind.__name__: kind
    for kind in (Config, Sweep, Converge, Continual, Synthetic, Attack, Metric)
}


def tables(kind: type[Section]) -> str:
    """A table for each heading, as Markdown: name in files, option, default, meaning."""
    shown = []
    for heading, fields in groupby(
        fields_of(kind).values(), key=lambda field: field.heading
    ):
        listed = [field for field in fields if not field.option.hidden]
        sections = {field.path[0] for field in listed if len(field.path) > 1}
        where = f" (table `[{sections.pop()}]`)" if sections else ""
        rows = [
            f"| `{field.path[-1]}` | {', '.join(f'`{flag}`' for flag in field.flags)} "
            f"| {default_of(field)} | {field.option.help} |"
            for field in listed
        ]
        shown += [
            f"**{heading}**{where}",
            "\n".join(
                [
                    "| in a file | option | default | |",
                    "| --- | --- | --- | --- |",
                    *rows,
                ]
            ),
        ]
    return "\n\n".join(shown)


def renewed(page: str) -> str:
    """A page with the tables as they are now."""
    return cards.filled(page, "choices", lambda name: tables(KINDS[name]))
