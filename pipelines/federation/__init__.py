"""Who holds which examples, what clients do to them, and what that looks like.

For scripts: `from pipelines import federation`, and `federation.build(config, dataset)`, `save`, `load`.
"""

from typing import Any

_FOR_SCRIPTS = ("PARTITIONS", "Federation", "build", "load", "save")


def __getattr__(name: str) -> Any:
    """The functions of `pipelines.federation.federations`, imported when they are asked for."""
    if name in _FOR_SCRIPTS:
        from pipelines.federation import federations

        return getattr(federations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
