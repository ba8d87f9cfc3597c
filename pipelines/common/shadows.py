"""Refuses to start where a user's `models.py` or the like stands in for a package of this library.

Python looks for a module first in the folder of the script that is run, then among the installed packages.
"""

import importlib.util
import sys
from pathlib import Path

OURS = Path(__file__).resolve().parents[2]
NEEDED = ("fedjax_core", "algorithms", "models")


def put_current_directory_last() -> None:
    """For `python -m pipelines`, which has the current directory first: what lies there shadows nothing then."""
    is_command = sys.argv[:1] == ["-m"] and "pipelines" in sys.orig_argv  # argv is this until the module is found
    if is_command and not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))


def check() -> None:
    """Raises ImportError, which says which file it is, if `import models` and the like would give something else."""
    for name in NEEDED:
        place = _place(name)
        if place is not None and place != OURS / name:
            raise ImportError(
                f"{place} shadows fedjax-core's package {name!r} ({OURS / name}), which pipelines imports: "
                "rename it, or run the script from another folder",
                name=name,
                path=str(place),
            )


def _place(name: str) -> Path | None:
    """The folder of a package or the file of a module that `import name` gives; None where nothing is found."""
    try:
        spec = importlib.util.find_spec(name)  # of the imported one if it is
    except ValueError:  # imported by a loader that leaves no spec
        file = getattr(sys.modules[name], "__file__", None)
        return None if file is None else Path(file).resolve()
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return next((Path(folder).resolve() for folder in spec.submodule_search_locations), None)
    return None if spec.origin is None else Path(spec.origin).resolve()
