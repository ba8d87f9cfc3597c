"""Sets the project up in a virtual environment of its own and runs it; needs only Python.

    python3 bootstrap.py train [arguments of `fedjax-core train`]
    python3 bootstrap.py test [--quick] [arguments of pytest]

The first use installs the package and its dependencies, by uv where that is installed, which takes a few minutes; later
uses start at once until pyproject.toml or the interpreter changes.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 11)
WINDOWS = os.name == "nt"
MARKER = "fedjax-core-install.json"  # in the environment: what has been installed from what, and whether it is whole
MAX_WORKERS = 8  # every test process holds a JAX of its own, near 1 GB
NO_NETWORK = ("connect", "timed out", "name resolution", "unreachable", "no matching distribution", "proxy", "ssl")


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
    parser.add_argument("--pinned", action="store_true", help="install the versions of constraints.txt")
    parser.add_argument("command", choices=["train", "test"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the tool")
    options = parser.parse_args()
    if sys.version_info[:2] < OLDEST:
        needed = ".".join(map(str, OLDEST))
        stop(
            f"Python {needed} or newer is needed, and {sys.executable} is Python {version()}: start this script with a "
            "newer one, for example `python3.12 bootstrap.py test`"
        )
    venv = Path(options.venv).expanduser().resolve()
    try:
        install(venv, options.command == "test", options.pinned)
        return test(venv, options.arguments) if options.command == "test" else train(venv, options.arguments)
    except OSError as error:
        stop(f"cannot write {venv} ({error.strerror}): choose another place with --venv DIR")
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; the same command starts over where needed", file=sys.stderr)
        return 130


def train(venv: Path, arguments: "list[str]") -> int:
    """Runs the main job."""
    return hand_over([str(program(venv, "fedjax-core")), "train", *arguments])


def test(venv: Path, arguments: "list[str]") -> int:
    """Runs the linters, unless only the quick subset is wanted, and then pytest, whose summary so comes last."""
    os.chdir(str(ROOT))
    python, quick = str(program(venv, "python")), "--quick" in arguments
    for tool in [] if quick else (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        say("running " + " ".join(tool))
        code = subprocess.call([python, "-m", *tool])
        if code != 0:
            print(f"bootstrap: {' '.join(tool)} failed, so the tests were not started", file=sys.stderr)
            return code
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Tests of one group (a method, say) share compiled functions, so they stay in one process.
    parallel = ["-n", str(max(1, min(cores, MAX_WORKERS))), "--dist", "loadgroup"]
    chosen = any(argument.startswith(("-n", "--numprocesses")) for argument in arguments)
    command = ["pytest", *([] if chosen else parallel), *(["-m", "quick"] if quick else [])]
    command += [argument for argument in arguments if argument != "--quick"]
    say("running " + " ".join(command))
    return hand_over([python, "-m", *command])


def install(venv: Path, for_tests: bool, pinned: bool) -> None:
    """Makes the environment and installs the package into it, unless that is done already."""
    sources = [ROOT / "pyproject.toml", *([ROOT / "constraints.txt"] if pinned else [])]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    wanted = {"complete": True, "pyproject": digest, "python": sys.version, "checkout": str(ROOT), "venv": str(venv)}
    marker, python = venv / MARKER, program(venv, "python")
    try:
        state = json.loads(marker.read_text())
    except (OSError, ValueError):
        state = {}
    whole = python.exists() and all(state.get(name) == wanted[name] for name in ("complete", "python", "venv"))
    # The tests build the documentation too.
    extras = sorted({*state.get("extras", []), *(["docs", "test"] if for_tests else [])})
    if whole and extras == state["extras"] and all(state.get(name) == wanted[name] for name in wanted):
        return
    # An interrupted installation leaves half a package, so its environment is made anew; one of the user's never is.
    made_here = bool(state.get("made_here")) or not venv.exists() or (venv.is_dir() and not any(venv.iterdir()))
    if made_here and not whole:
        make_venv(venv)
    elif not made_here and not usable(venv):
        stop(
            f"{venv} exists and is no working virtual environment of Python {version()}: delete it, or give --venv DIR"
        )
    state = {"complete": False, "made_here": made_here, "extras": extras}
    marker.write_text(json.dumps(state))
    package = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    say(f"installing fedjax-core and what it needs into {venv} (a few minutes the first time)")
    arguments = ["--editable", package, *(["--constraint", str(ROOT / "constraints.txt")] if pinned else [])]
    commands, uv = [[str(python), "-m", "pip", "install", "--progress-bar", "off", *arguments]], shutil.which("uv")
    if uv:  # pip comes second all the same: uv does not read pip's settings, and may not reach what pip reaches
        commands.insert(0, [uv, "pip", "install", "--python", str(python), *arguments])
    run_first_that_works(commands, venv / "fedjax-core-install.log")
    marker.write_text(json.dumps({**state, **wanted}))


def make_venv(venv: Path) -> None:
    """Makes the virtual environment anew, by Python's own module or, where that is missing, by uv."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    uv = shutil.which("uv")
    if missing and not uv:
        stop(
            f"{sys.executable} lacks the standard module {' and '.join(missing)}, which makes virtual environments: on "
            f"Debian and Ubuntu `sudo apt install python{version()}-venv` adds it, elsewhere take a complete Python"
        )
    say(f"making a virtual environment of Python {version()} at {venv}")
    if venv.is_dir():
        shutil.rmtree(str(venv))
    venv.parent.mkdir(parents=True, exist_ok=True)
    by_uv = [uv, "venv", "--seed", "--python", sys.executable, str(venv)]
    made = run([sys.executable, "-m", "venv", str(venv)] if not missing else by_uv)
    if made.returncode != 0:
        stop(f"could not make the virtual environment:\n{tail(made.stdout)}")


def usable(venv: Path) -> bool:
    """Whether the folder is a virtual environment of this Python version, with pip."""
    python = program(venv, "python")
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])!r})"
    return (venv / "pyvenv.cfg").exists() and python.exists() and run([str(python), "-c", check]).returncode == 0


def run_first_that_works(commands: "list[list[str]]", log: Path) -> None:
    """Runs installers until one works; the output of the last one is kept in `log`."""
    for command in commands:
        done = run(command)
        log.write_text(done.stdout)
        if done.returncode == 0:
            return
        if command is not commands[-1]:
            say("uv could not install it, so pip tries")
    advice = f"the whole output is in {log}"
    if any(sign in done.stdout.lower() for sign in NO_NETWORK):
        advice = (
            "a package could not be got: check the network connection (and pip's proxy and index settings where they "
            f"are needed), then run the same command again; {advice}"
        )
    stop(f"installing failed:\n{tail(done.stdout)}\n{advice}")


def run(command: "list[str]") -> "subprocess.CompletedProcess[str]":
    """Runs a command, its output and errors as one text."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(ROOT), text=True, errors="replace"
    )


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


def program(venv: Path, name: str) -> Path:
    """Path of a program in a virtual environment."""
    return venv / "Scripts" / (name + ".exe") if WINDOWS else venv / "bin" / name


def version() -> str:
    """This Python's version, such as 3.12."""
    return ".".join(map(str, sys.version_info[:2]))


def say(text: str) -> None:
    """Prints one line about what happens."""
    print(f"bootstrap: {text}", flush=True)


def stop(text: str) -> None:
    """Ends with an error."""
    sys.exit(f"bootstrap: {text}")


def tail(text: str) -> str:
    """Last lines of a text."""
    return "\n".join(text.strip().splitlines()[-15:])


if __name__ == "__main__":
    sys.exit(main())
