"""A user's own method, model or data set, named `module:name` or `path/to/file.py:name` wherever the library's are.

The current directory can be imported from. A file there goes before an installed module and before a package of this
library of the same name, so that it may be called `models.py`. What a name gives is what the module has when it is
first asked for; the digest of its file is recorded in a run's directory.
"""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.common.names import pick

_NAME = re.compile(r"(?P<module>.*[^:]):(?P<name>[A-Za-z_]\w*)", re.DOTALL)
_LONGEST = 80  # bytes: two such names, and more, are in the name of a run's directory, which has 255 at most
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

# File to (its module, the sha256 of its source): each is run once in a process, whatever it is called by.
_loaded: dict[Path, tuple[ModuleType, str]] = {}


def is_own(name: str) -> bool:
    """Whether a name is of the form `module:name` or `path/to/file.py:name`."""
    return _NAME.fullmatch(name) is not None


def short(name: str) -> str:
    """The name without its module."""
    return name.rpartition(":")[2] if is_own(name) else name


def file_name(name: str) -> str:
    """The name as that of a file or folder, cut to 80 bytes with a digest where it is longer."""
    plain = re.sub(r"[^\w.+-]+", "_", name)
    content = plain.encode("utf-8", "replace")
    if len(content) <= _LONGEST:
        return plain
    return f"{content[: _LONGEST - 9].decode('utf-8', 'ignore')}-{sha256(content).hexdigest()[:8]}"


def find(kind: str, name: str) -> Any:
    """What `name` stands for.

    Args:
      kind: what it should be, for messages: "method", "model", "data set".
      name: of the form `module:name`.

    Raises:
      ValueError: if there is no such module (with the nearest one), it fails when it is imported (with the line), or it
        has no such name (with the nearest one).
    """
    module = _module(kind, name)
    attribute = short(name)
    if not hasattr(module, attribute):
        written_here = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_")
            and not inspect.ismodule(value)
            and getattr(value, "__module__", module.__name__) == module.__name__
        ]
        pick(f"{kind} in {_shown(module)}", attribute, written_here)
        raise ValueError(f"{_shown(module)} has no {attribute!r}")
    return getattr(module, attribute)


def function(kind: str, name: str) -> Any:
    """What `name` stands for, which can be called.

    Raises:
      ValueError: as `find`; or if it cannot be called.
    """
    found = find(kind, name)
    if not callable(found):
        raise ValueError(
            f"{kind} {name!r} is of type {type(found).__name__} and cannot be called: name the function that makes it"
        )
    return found


def arguments(kind: str, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of what can be given, the arguments that the function `name` takes.

    Raises:
      ValueError: if it needs another one.
    """
    parameters = signature(kind, name)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(known)
    for p in parameters:
        needed = p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        if p.kind is p.POSITIONAL_ONLY or (needed and p.name not in known):
            raise ValueError(
                f"{kind} {name!r} needs an argument {p.name!r}, and what it can be given is {', '.join(known)}: name "
                "it so, or give it a default"
            )
    return {p.name: known[p.name] for p in parameters if p.name in known}


def signature(kind: str, name: str) -> list[inspect.Parameter]:
    """The parameters of the function `name`.

    Raises:
      ValueError: as `function`; or if it is of a kind whose arguments cannot be found out.
    """
    found = function(kind, name)
    try:
        return list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        raise ValueError(f"{kind} {name!r} does not say what arguments it takes: wrap it in a function") from None


@contextmanager
def explain_errors(kind: str, name: str) -> Iterator[None]:
    """Turns what a user's own code raises into one sentence with its place; other errors it leaves as they are."""
    try:
        yield
    except Exception as error:
        if not is_own(name) or name in str(error):
            raise
        file = Path(getattr(_module(kind, name), "__file__", None) or "").resolve()
        if not any(Path(frame.filename).resolve() == file for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise ValueError(f"{kind} {name!r} fails: {_told(error, file)}") from error


def sources(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of each own name, the file it is in and the sha256 of that file as it was imported; the others are left out.

    What the file imports is not looked at.
    """
    found: dict[str, dict[str, str]] = {}
    for name in filter(is_own, names):
        module = _module("module of", name)
        file = Path(getattr(module, "__file__", None) or "")
        digest = next((d for m, d in _loaded.values() if m is module), "")
        found[name] = {"file": file.name, "sha256": digest}
    return found


def _module(kind: str, name: str) -> ModuleType:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{kind} {name!r} is not of the form module:name or path/to/file.py:name")
    module = match["module"]
    if module.endswith(".py") or "/" in module or "\\" in module:
        path = Path(module).expanduser()
        if not path.is_file():
            raise ValueError(f"{kind} {name!r}: there is no file {module}{_nearest_file(path)}")
        return _from_file(kind, name, path)
    if not _MODULE.fullmatch(module):
        raise ValueError(f"{kind} {name!r}: {module!r} is no name of a module: write module:name or file.py:name")
    here = Path(*module.split("."))
    for path in (here.with_suffix(".py"), here / "__init__.py"):
        top = sys.modules.get(module.split(".")[0])
        if path.is_file() and top is not None and not _is_here(top):
            return _from_file(kind, name, path)
    return _imported(kind, name, module)


def _imported(kind: str, name: str, module: str) -> ModuleType:
    """A module by its dotted name, the current directory first."""
    if module not in sys.modules:
        folder = str(Path.cwd())
        sys.path.insert(0, folder)
        try:
            importlib.invalidate_caches()
            found = importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
                near = difflib.get_close_matches(module, [path.stem for path in Path.cwd().glob("*.py")], n=1)
                guess = f"did you mean '{near[0]}:{short(name)}'? " if near else ""
                raise ValueError(
                    f"{kind} {name!r}: there is no module {module!r}: {guess}it is looked for in the current directory "
                    "and among the installed packages"
                ) from None
            raise ValueError(f"{kind} {name!r}: importing {module} fails: {_told(error)}") from error
        finally:
            # At the end of the path from now on: what it imports later is found, and shadows nothing.
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)
        _remember(found)
    found = sys.modules[module]
    _remember(found)
    return found


def _from_file(kind: str, name: str, path: Path) -> ModuleType:
    """A module from its file, run once."""
    path = path.resolve()
    if path in _loaded:
        return _loaded[path][0]
    folder = path.parent.parent if path.stem == "__init__" else path.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # the modules beside it
    called = f"_own_{sha256(str(path).encode()).hexdigest()[:8]}_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(called, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{kind} {name!r}: {path.name} is no Python file: its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses, among others, look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[called]
        raise ValueError(f"{kind} {name!r}: running {path.name} fails: {_told(error)}") from error
    _remember(module)
    return module


def _remember(module: ModuleType) -> None:
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() in _loaded:
        return
    path = Path(file).resolve()
    _loaded[path] = module, sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _is_here(module: ModuleType) -> bool:
    """Whether a module is of the current directory."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path.cwd() in Path(place).resolve().parents for place in places)


def _shown(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return Path(file).name if file else module.__name__


def _nearest_file(path: Path) -> str:
    known = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, known, n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ": check the path"


def _told(error: Exception, file: Path | None = None) -> str:
    """An error in one line, with the last line that it came through of `file`, or of what no package is."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if (Path(f.filename).resolve() == file if file else _foreign(f.filename))]
    where = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({Path(error.filename).name}, line {error.lineno})"
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {message[:500]}{where}"


def _foreign(file: str) -> bool:
    """Whether a file is neither Python's import machinery nor of this package nor installed."""
    path = Path(file)
    return (
        path.is_file()
        and Path(__file__).resolve().parents[1] not in path.resolve().parents
        and not {"site-packages", "importlib"} & set(path.parts)
    )
