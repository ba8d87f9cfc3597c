"""From data to a report: data -> federation -> run -> evaluate -> checkpoint -> report, and the command line.

`fedjax-core train` is `pipelines.train.train(Config(...), out)` with words; `Config` is everything that can change a
number. The modules, in the order data passes through them: `data`, `partition`, `methods`, `config`, `setup`, `train`
(with `checkpoint` and `history`), `report`, `cli`.
"""

from typing import Any

from pipelines.config import Config

__all__ = ["Config", "load_run"]


def load_run(out: Any, **options: Any) -> Any:
    """A run, loaded from its directory to be used: see `pipelines.loading.load_run`."""
    from pipelines import loading  # with all that trains and reports, which a configuration does not need

    return loading.load_run(out, **options)
