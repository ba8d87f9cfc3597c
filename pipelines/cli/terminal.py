"""What the command line does on machines where something is missing or broken: streams, devices, errors of our own."""

import contextlib
import importlib
import os
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

from fedjax_core import out_of_memory
from pipelines.common import files, progress
from pipelines.common.progress import Progression, Reporter
from pipelines.data import cache

UNEXPECTED = 4
"""Exit code of an unexpected error, and of output that could not be written."""
UNWRITABLE = 5
"""Exit code where the directory of a run cannot be written to."""
_NARROWEST = 40
_PRINTING = (("click", "utils.py"), ("pipelines", "progress.py"))
_ZSTD = b"\x28\xb5\x2f\xfd"


class Group(click.Group):
    """Commands that report an unexpected error in a sentence; the traceback is kept in a file."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        ready_streams()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except files.Unwritable as error:
            _say(f"Error: {error}")
            ctx.exit(UNWRITABLE)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            broken = error if _of_output(error) else broken_output()
            if broken is not None:
                silence_output()
                if not isinstance(broken, BrokenPipeError):  # `| head` has what it wanted
                    _say(f"Error: the output cannot be written ({_reason(broken)})")
                ctx.exit(UNEXPECTED)
            _say(f"Error: {_unexpected(error)}")
            ctx.exit(UNEXPECTED)


def ready_streams() -> None:
    """Makes the standard streams fit to be written to: there, and with a sign for letters that they do not have."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened, of a checkpoint perhaps, would take what others print.
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # not every stream can be told
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def console() -> Console:
    """Where tables and lines go; on a terminal that says it has hardly any columns lines are longer than it."""
    made = Console(soft_wrap=True, highlight=False)
    if made.width < _NARROWEST:
        made.width = _NARROWEST
    return made


def broken_output() -> OSError | ValueError | None:
    """What is wrong with the standard output, or None."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        return error
    return None


def _of_output(error: Exception) -> bool:
    """Whether the error came about in printing, after which the stream may look sound again: what failed is dropped."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    places = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[-8:]]
    return any(place.parent.name == "rich" or (place.parent.name, place.name) in _PRINTING for place in places)


def silence_output() -> None:
    """Lets everything that is still written to the standard output vanish, so that the end of Python cannot fail."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if sys.stdout.fileno() == 1:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
            sys.stdout.flush()


ERROR = "fedjax_core.error"
"""Where a click context keeps the message of an error that was told."""


def going_on(reporter: Reporter, out: Path) -> Reporter:
    """The reporter, but for one thing: a run goes on when what it says cannot be written any more.

    Hours of training are worth more than the lines about them, and all that counts is in the run directory.
    """
    broken: list[BaseException] = []

    def guarded(action: Any) -> Any:
        def act(*args: Any) -> None:
            if broken:
                return
            try:
                action(*args)
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) and broken_output() is None:  # closed streams say that
                    raise
                broken.append(error)
                silence_output()
                _say(f"Warning: the output cannot be written ({_reason(error)}): the run goes on, see {out}")

        return act

    def update(progression: Progression) -> None:
        guarded(reporter.update)(progression)

    return reporter._replace(
        say=guarded(reporter.say), update=update, finish=guarded(reporter.finish), event=guarded(reporter.event)
    )


def study_reporter(quiet: bool, out: Path) -> Reporter:
    """What tells of a study that writes into `out`: lines, or with --quiet nothing."""
    return progress.silent() if quiet else going_on(progress.plain(), out)


@contextlib.contextmanager
def usage_errors(ctx: click.Context) -> Iterator[None]:
    """A mistake in what was asked for is told in one line, with exit code 2, and without a traceback.

    So are files and folders that cannot be used, and what needs more memory than there is.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        said = str(error)
    except OSError as error:
        if _of_output(error) or broken_output() is not None:
            raise
        said = f"{error.filename}: {_reason(error)}" if error.filename else _reason(error)
    except Exception as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        said = f"this needs more memory than there is ({_first_line(error)}): ask for less of what is large"
    else:
        return
    ctx.meta[ERROR] = said
    _say(f"Error: {said}\nTry `{ctx.command_path} --help`.")
    ctx.exit(2)


@contextlib.contextmanager
def stops(ctx: click.Context) -> Iterator[None]:
    """A run that was stopped by a signal says how to go on, with the exit code of that signal."""
    from pipelines.run.run_directory import Interrupted

    try:
        yield
    except Interrupted as stop:
        _say(stop.message)
        ctx.exit(128 + stop.signal)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of this package in one line, without the source line, and each once."""
    from pipelines.run.checkpoint import CheckpointWarning

    ours = (CheckpointWarning, cache.CacheWarning, files.RecordWarning)
    show, said = warnings.showwarning, set[str]()

    def line(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        found = repaired(str(message))
        if not (found or issubclass(category, ours)):
            show(message, category, *args, **kwargs)
        elif (text := f"Warning: {found or message}") not in said:
            said.add(text)
            _say(text)

    with warnings.catch_warnings():
        for category in ours:
            warnings.simplefilter("always", category)
        warnings.filterwarnings("always", "Error reading persistent compilation cache")
        warnings.showwarning = line
        yield


def check_jax() -> None:
    """Looks whether JAX can do what a run needs; to be called before JAX computes anything.

    Raises:
      ValueError: if there is no device of the kinds that JAX was told to use, or it was told not to compile.
    """
    if _configured("jax_disable_jit"):
        raise ValueError(
            "JAX_DISABLE_JIT is set, and a run is a compiled program: unset it (to look into a round, call "
            "algorithm.round from a script, as examples/write_your_own_method.py does)"
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError, AttributeError, ValueError) as error:  # `python -O` leaves assertions out
        asked = os.environ.get("JAX_PLATFORMS") or _configured("jax_platforms")
        if asked:
            said = f"JAX_PLATFORMS={asked}, but JAX finds no such device ({_first_line(error)}): unset it, or"
        else:
            said = f"JAX finds no device ({_first_line(error)}):"
        raise ValueError(f"{said} install jax for the device, `pip install jax[cuda13]` for a GPU of NVIDIA") from None


def keep_compiled() -> None:
    """Keeps compiled programs between processes, in the user's cache folder unless JAX is told of another.

    Where nothing can be kept, that is said once.
    """
    folder = _configured("jax_compilation_cache_dir")
    if folder is None:
        try:
            own = cache.user_folder("compiled")
            own.mkdir(parents=True, exist_ok=True)
            if not os.access(own, os.W_OK | os.X_OK):
                raise PermissionError(13, "it cannot be written to", str(own))
        except OSError as error:
            jax.config.update("jax_enable_compilation_cache", False)
            where = f"{error.filename}: " if error.filename else ""
            warnings.warn(
                f"compiled programs are not kept ({where}{_reason(error)}), every start compiles them again; choose "
                "another place with JAX_COMPILATION_CACHE_DIR, or leave it with --no-cache",
                cache.CacheWarning,
                stacklevel=2,
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def repaired(message: str) -> str | None:
    """Removes the damaged programs that a warning of JAX is about, so that the next ones are written in their place.

    JAX compiles anew what it cannot read, but writes nothing where there is a file. A process that was killed while it
    wrote leaves such a file.

    Returns:
      What to say instead of the warning; None if it is about something else.
    """
    if not message.startswith("Error reading persistent compilation cache entry for"):
        return None
    folder = Path(_configured("jax_compilation_cache_dir") or "")
    name = message.partition("'")[2].partition("'")[0]
    entries = [entry for entry in folder.glob("*-cache") if name and entry.name.startswith(f"{name}-")]
    damaged = [entry for entry in entries if not _readable(entry)]
    removed = 0
    for entry in damaged or entries:  # readable, and not understood: any of them may be the one
        with contextlib.suppress(OSError):
            entry.unlink()
            removed += 1
    if not removed:
        return f"a compiled program in {folder} cannot be read: it is compiled again at every start, empty the folder"
    return f"a compiled program in {folder} was damaged: it is compiled and kept again"


def _configured(name: str) -> Any:
    return getattr(jax.config, name)  # its type stub does not have them all


def _readable(entry: Path) -> bool:
    """Whether what JAX has compressed, by zstd where that is installed and else by zlib, can be unpacked."""
    try:
        content = entry.read_bytes()
        if content.startswith(_ZSTD):
            importlib.import_module("zstandard").decompress(content)
        else:
            zlib.decompress(content)
    except ImportError:
        return True  # nothing can be said
    except Exception:  # whatever kind of error the library has
        return False
    return True


def _unexpected(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    command = f"fedjax-core {' '.join(sys.argv[1:])}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fedjax-core-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"{command}\n\n{text}")
        where = f"The traceback is in {file.name}"
    except OSError:
        where = f"The traceback:\n{text}"
    return (
        f"unexpected {type(error).__name__}: {_first_line(error)}\n{where}; `fedjax-core --debug ...` shows it. What a "
        "run has saved is whole. Please report this."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or _first_line(error)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nothing is left to complain to
        click.echo(text, err=True)
