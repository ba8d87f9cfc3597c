"""From data to a report: data -> federation -> run -> evaluate -> checkpoint -> report, and the command line.

`fedjax-core train` is `pipelines.run.train.train(Config(...), out)` with words; `Config` is everything that can
change a number. The packages, in the order data passes through them and in which they may import each other: `common`,
`data`, `configuration`, `federation`, `experiment`, `results`, `run`, `studies`, `cli`.

For scripts: `from pipelines import Config, load_run, datasets, sources, partition, federation, setup`, and
`from pipelines.train import train`.
"""

from importlib import import_module
from typing import Any

from pipelines.common import shadows

# Before anything here imports them.
shadows.put_current_directory_last()
shadows.check()

from pipelines.configuration.config import Config  # noqa: E402

__all__ = ["Config", "load_run"]

_FOR_SCRIPTS = {
    "datasets": "pipelines.data.datasets",
    "partition": "pipelines.federation.partition",
    "setup": "pipelines.experiment.setup",
    "sources": "pipelines.data.sources",
}
"""Modules that scripts use most, by the name under which they are found here."""


def __getattr__(name: str) -> Any:
    """A module of `_FOR_SCRIPTS`, imported when it is asked for."""
    if name in _FOR_SCRIPTS:
        return import_module(_FOR_SCRIPTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_run(out: Any, **options: Any) -> Any:
    """A run, loaded from its directory to be used: see `pipelines.run.loading.load_run`."""
    from pipelines.run import loading  # with all that trains and reports, which a configuration does not need

    return loading.load_run(out, **options)
