"""One virtual environment for each peer, so that none decides what the others get."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# pip prefers the CPU build of PyTorch where the package index has one. Flower 1.42 asked for a release of certifi that
# the package index did not have yet.
REQUIREMENTS = {
    "torch": ["torch==2.13.0", "numpy==2.4.6"],
    "pfl": ["pfl[pytorch]==0.6.0", "torch==2.13.0", "numpy==2.4.6"],
    "flower": ["flwr[simulation]==1.41.0", "torch==2.13.0", "numpy==2.4.6"],
    "fedjax": ["fedjax==0.0.17", "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "numpy==2.4.6"],
}
"""What is installed for each peer; its own dependencies are left to pip."""

_DONE, _FAILED = "peers-requirements.txt", "peers-error.txt"


def python_of(folder: Path, peer: str) -> Path:
    """The interpreter of a peer's environment."""
    windows = folder / peer / "Scripts" / "python.exe"
    return windows if windows.exists() else folder / peer / "bin" / "python"


def problem(folder: Path, peer: str) -> str:
    """Why a peer's environment cannot be used; empty if it can."""
    if (folder / peer / _FAILED).exists():
        return (folder / peer / _FAILED).read_text().strip()
    if not (folder / peer / _DONE).exists():
        return "not installed: run `python -m benchmarks.peers --setup`"
    if (folder / peer / _DONE).read_text().split() != REQUIREMENTS[peer]:
        return "other versions are installed: run `python -m benchmarks.peers --setup`"
    return ""


def install(folder: Path, peer: str, python: str) -> str:
    """Makes a peer's environment with an interpreter, unless it is there; returns what went wrong, if anything."""
    if not problem(folder, peer):
        return ""
    place = folder / peer
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    done = subprocess.run([python, "-m", "venv", str(place)], capture_output=True, text=True)
    if not done.returncode:
        pip = [str(python_of(folder, peer)), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        done = subprocess.run([*pip, *REQUIREMENTS[peer]], capture_output=True, text=True)
    if done.returncode:
        error = last_error(done.stderr or done.stdout)
        (place / _FAILED).write_text(error + "\n")
        return error
    (place / _DONE).write_text("\n".join(REQUIREMENTS[peer]) + "\n")
    return ""


def last_error(text: str) -> str:
    """The last line of a program's complaints that names an error, without this machine's folders."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "ERROR" in line or "Exception" in line]
    line = (named or lines or ["it ended without a word"])[-1]
    return line.replace(str(ROOT), ".").replace(str(Path.home()), "~")[:300]
