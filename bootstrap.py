"""Sets the project up in a virtual environment of its own and runs it; needs only Python.

    python3 bootstrap.py train [arguments of `fedjax-core train`]
    python3 bootstrap.py test [--quick] [arguments of pytest]

The first use installs the package and its dependencies, which takes a few minutes; later uses start at once
until pyproject.toml or the interpreter changes.
"""

# Kept to what old interpreters can parse, so that they reach the message that they are too old.

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 11)
WINDOWS = os.name == "nt"
MARKER = "fedjax-core-install.json"
MAX_WORKERS = 8  # every test process holds a JAX of its own, near 1 GB

NO_NETWORK = (
    "connection",
    "timed out",
    "name resolution",
    "unreachable",
    "no matching distribution",
    "proxy",
    "ssl",
)


class SetupError(Exception):
    """A problem the user can solve; the text says how."""


def main() -> int:
    """Parses the command line, sets up and hands over to the tool."""
    parser = argparse.ArgumentParser(
        prog="bootstrap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv",
        metavar="DIR",
        default=os.environ.get("FEDJAX_CORE_VENV", str(ROOT / ".venv")),
        help="virtual environment to use, made if missing (default: .venv beside this file, or $FEDJAX_CORE_VENV)",
    )
    parser.add_argument("command", choices=["train", "test"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the tool")
    options = parser.parse_args()
    try:
        check_interpreter()
        venv = Path(options.venv).expanduser().resolve()
        if options.command == "train":
            install(venv, [])
            return hand_over([str(executable(venv, "fedjax-core")), "train", *options.arguments])
        install(venv, ["test"])
        return test(venv, options.arguments)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; the same command starts over where needed", file=sys.stderr)
        return 130


def test(venv: Path, arguments: "list[str]") -> int:
    """Runs the linters, unless only the quick subset is wanted, and then pytest.

    Stops at the first tool that fails. Pytest comes last, so the last line of the output is its summary.
    """
    quick = "--quick" in arguments
    arguments = [argument for argument in arguments if argument != "--quick"]
    os.chdir(str(ROOT))
    python = str(executable(venv, "python"))
    if not quick:
        for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
            say("running " + " ".join(tool))
            code = subprocess.call([python, "-m", *tool])
            if code != 0:
                print(f"bootstrap: {' '.join(tool)} failed, so the tests were not started", file=sys.stderr)
                return code
    command = [python, "-m", "pytest"]
    if not any(argument.startswith(("-n", "--numprocesses")) for argument in arguments):
        # Tests of one group (a method, say) share compiled functions, so they stay in one process.
        command += ["-n", str(workers()), "--dist", "loadgroup"]
    command += ["-m", "quick"] if quick else []
    say("running " + " ".join(["pytest", *command[3:], *arguments]))
    return hand_over([*command, *arguments])


def workers() -> int:
    """Number of test processes: one per core this process may use, capped for memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_WORKERS))


def check_interpreter() -> None:
    """Raises SetupError if this Python is too old or cannot make virtual environments."""
    version = "{}.{}".format(*sys.version_info[:2])
    if sys.version_info[:2] < OLDEST:
        raise SetupError(
            "Python {}.{} or newer is needed, and {} is Python {}: install a newer one and start this script with "
            "it, for example `python3.12 bootstrap.py test`".format(*OLDEST, sys.executable, version)
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} lacks the standard module {' and '.join(missing)}, which makes virtual environments. "
            f"On Debian and Ubuntu `sudo apt install python{version}-venv` adds it; elsewhere use a complete Python "
            f"{version}"
        )


def install(venv: Path, extras: "list[str]") -> None:
    """Makes the environment and installs the package into it, unless that is done already.

    The marker in the environment says what has been installed from what. It says "incomplete" until the very end,
    and an incomplete environment of ours is made anew, because an interrupted pip can leave half a package behind.
    """
    marker = read_marker(venv)
    wanted = {
        "complete": True,
        "pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        "python": sys.version,
        "checkout": str(ROOT),
        "venv": str(venv),
    }
    present = executable(venv, "python").exists()
    installed = marker.get("extras", [])
    if present and set(extras) <= set(installed) and all(marker.get(name) == wanted[name] for name in wanted):
        return

    start = time.monotonic()
    extras = sorted({*extras, *installed})
    keep = present and all(marker.get(name) == wanted[name] for name in ("complete", "python", "venv"))
    made_here = marker.get("made_here", False) if keep else make_venv(venv, marker)
    state = {"made_here": made_here, "extras": extras}
    write_marker(venv, {**state, "complete": False})
    suffix = f"[{','.join(extras)}]" if extras else ""
    say(f"installing fedjax-core{suffix} (a few minutes the first time)")
    pip(venv, ["install", "--editable", f"{ROOT}{suffix}"])
    write_marker(venv, {**state, **wanted})
    say(f"installed in {time.monotonic() - start:.0f} s")


def make_venv(venv: Path, marker: "dict") -> bool:
    """Makes the virtual environment, or takes one that the user made, which it never empties.

    Returns:
      Whether this script made it.
    """
    version = ".".join(map(str, sys.version_info[:2]))
    if venv.exists() and not venv.is_dir():
        raise SetupError(f"{venv} is a file: choose another place with --venv DIR")
    if not marker.get("made_here") and venv.is_dir() and any(venv.iterdir()):
        if not usable(venv):
            raise SetupError(
                f"{venv} exists and is not a working virtual environment of Python {version}: delete it, or choose "
                "another place with --venv DIR"
            )
        say(f"using the virtual environment that is at {venv}")
        return False
    say(f"making a virtual environment of Python {version} at {venv}")
    try:
        venv.mkdir(parents=True, exist_ok=True)
        write_marker(venv, {"complete": False, "made_here": True, "extras": []})
        for entry in venv.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(str(entry))
            elif entry.name != MARKER:
                entry.unlink()
    except OSError as error:
        raise SetupError(f"cannot write {venv} ({error.strerror}): choose another place with --venv DIR") from None
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode != 0:
        raise SetupError(f"could not make the virtual environment:\n{tail(made.stdout.decode(errors='replace'))}")
    return True


def usable(venv: Path) -> bool:
    """Whether the folder is a virtual environment of this Python version, with pip."""
    python = executable(venv, "python")
    if not ((venv / "pyvenv.cfg").exists() and python.exists()):
        return False
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])!r})"
    return subprocess.call([str(python), "-c", check], stderr=subprocess.DEVNULL) == 0


def pip(venv: Path, arguments: "list[str]") -> None:
    """Runs pip, showing on a terminal which package it is at; its whole output is kept in the environment."""
    command = [str(executable(venv, "python")), "-m", "pip", *arguments, "--progress-bar", "off"]
    lines = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(ROOT), text=True, errors="replace"
    )
    for line in process.stdout:
        lines.append(line)
        if sys.stdout.isatty() and line.startswith(("Collecting", "  Downloading", "Building", "Installing")):
            print("\r\033[K  " + line.strip()[:76], end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    output = "".join(lines)
    log = venv / "fedjax-core-install.log"
    log.write_text(output)
    if process.wait() == 0:
        return
    advice = f"The whole output is in {log}."
    if any(sign in output.lower() for sign in NO_NETWORK):
        advice = (
            "pip could not get a package: check the network connection (and pip's proxy and index settings where "
            f"they are needed), then run the same command again. {advice}"
        )
    raise SetupError(f"installing failed:\n{tail(output)}\n{advice}")


def hand_over(command: "list[str]") -> int:
    """Becomes the command, so that Ctrl-C and other signals reach it and nothing else."""
    sys.stdout.flush()
    if not WINDOWS:
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command got it too and decides when to end
            continue


def executable(venv: Path, name: str) -> Path:
    """Path of a program in a virtual environment."""
    return venv / "Scripts" / (name + ".exe") if WINDOWS else venv / "bin" / name


def read_marker(venv: Path) -> "dict":
    """What the marker says; {} without one."""
    try:
        marker = json.loads((venv / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def write_marker(venv: Path, content: "dict") -> None:
    """Replaces the marker in one move, so that it is never half written."""
    draft = venv / (MARKER + ".new")
    draft.write_text(json.dumps(content, indent=2))
    os.replace(str(draft), str(venv / MARKER))


def say(text: str) -> None:
    """Prints one line about what happens."""
    print(f"bootstrap: {text}", flush=True)


def tail(text: str, lines: int = 15) -> str:
    """Last lines of a text."""
    return "\n".join(text.strip().splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
