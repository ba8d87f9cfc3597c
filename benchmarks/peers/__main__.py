"""The same federated workloads through this library and through its peers.

    python -m benchmarks.peers --setup      # once: an environment with pinned versions for each peer
    python -m benchmarks.peers              # all of it, 25 minutes on two cores; prints a table and draws a plot

    python -m benchmarks.peers --only cnn fl-simulator --peers torch torch_graphs pfl fedjax ours    # on a GPU

Peers: a plain loop in PyTorch, the same with each step as a CUDA graph (on a GPU), pfl, Flower in its simulation,
FedJAX, and this library's round written naively. Every pair of a workload and a peer runs in a process of its own, one
at a time. What is measured is kept in results/peers.json after every pair; the same command goes on where it was
interrupted. `docs/benchmarks.md` says what is the same for all and what is not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from benchmarks import _measure
from benchmarks.peers import environments, report, workloads
from benchmarks.peers.environments import ROOT

# The environment of each peer; None is the one that this program runs in.
PEERS = {
    "torch": "torch",
    "torch_graphs": "torch",
    "pfl": "pfl",
    "flower": "flower",
    "fedjax": "fedjax",
    "naive": None,
    "ours": None,
    "ours_one": None,
}
STOPPED = "stopped after"
LEAST_ROUNDS = 3  # are measured after the first, however long they take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="install what is missing, and stop")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers", help="where (default: .venv-peers)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments, 3.11 was used")
    parser.add_argument("--only", nargs="+", choices=workloads.ALL, default=list(workloads.WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[name for name in PEERS if name != "torch_graphs"])
    parser.add_argument("--here", action="store_true", help="all peers are installed for this interpreter")
    parser.add_argument("--no-check", action="store_true", help="without the round on which all must agree")
    parser.add_argument("--no-peaks", action="store_true", help="without the speed of matrix products beside")
    parser.add_argument("--seconds", type=float, default=6, help="of rounds after the first, for each pair (6)")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which a process is stopped (100)")
    parser.add_argument("--rounds", type=int, help="after the first (default: the workload's own number)")
    parser.add_argument("--full", action="store_true", help="the whole size of every workload, on a CPU too")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--save", default="peers", help="name of the results (peers)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no peer outlives this program
    if options.setup:
        set_up(options)
        return

    result = _measure.saved(options.save) or {"machine": machine(), "peaks": [], "workloads": {}}
    for name in options.only:
        workload = settings(name, options, result["machine"]["backend"])
        pending = [peer for peer in options.peers if options.fresh or not is_done(result, workload, peer)]
        if not pending:
            continue
        entry = result["workloads"].get(name)
        if entry is None or not is_same(entry, workload):
            entry = result["workloads"][name] = {
                "settings": workload._asdict(),
                "parameters": workloads.num_parameters(workload),
                "flops_per_example": workloads.flops_per_example(workload),
                "cells": {},
            }
        if not options.no_peaks:
            result["peaks"].append(measure_peak(options, f"before {name}"))
        for peer in pending:
            print(f"{name}, {peer} ...", end=" ", flush=True)
            entry["cells"][peer] = cell = measure(workload, peer, options)
            _measure.save(options.save, result)
            print(cell["error"] or f"{cell['median_s']:.4g} s a round")
        if not options.no_peaks:
            result["peaks"].append(measure_peak(options, f"after {name}"))
        _measure.save(options.save, result)
    report.write(result, options.save)


def set_up(options: argparse.Namespace) -> None:
    for peer in environments.REQUIREMENTS:
        print(f"{peer} ...", end=" ", flush=True)
        print(environments.install(options.environments, peer, options.python) or "is there")


def settings(name: str, options: argparse.Namespace, backend: str) -> workloads.Workload:
    """The workload as it is run here."""
    workload = workloads.ALL[name]
    if backend == "cpu" and not options.full:
        workload = workload._replace(mean_size=workload.cpu_mean_size, cohort_size=workload.cpu_cohort_size)
    return workload._replace(rounds=options.rounds or workload.rounds)


def machine() -> dict:
    """What this runs on, asked in a process of its own: JAX takes hold of an accelerator that it looks at."""
    program = "import json; from benchmarks import _measure; print(json.dumps(_measure.machine()))"
    return json.loads(
        subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout
    )


def is_same(entry: dict, workload: workloads.Workload) -> bool:
    """Whether what is there was measured at these sizes."""
    return entry["settings"] == json.loads(json.dumps(workload._asdict()))


def is_done(result: dict, workload: workloads.Workload, peer: str) -> bool:
    entry = result["workloads"].get(workload.name)
    known = entry is not None and is_same(entry, workload) and peer in entry["cells"]
    return known and (not entry["cells"][peer]["error"] or entry["cells"][peer]["error"].startswith(STOPPED))


def interpreter(peer: str, options: argparse.Namespace) -> str:
    environment = PEERS[peer]
    return (
        sys.executable
        if environment is None or options.here
        else str(environments.python_of(options.environments, environment))
    )


def measure(workload: workloads.Workload, peer: str, options: argparse.Namespace) -> dict:
    """Times the rounds of one peer, and lets it do the round on which all must agree."""
    error = environments.problem(options.environments, PEERS[peer]) if PEERS[peer] and not options.here else ""
    if error:
        return {"error": error}
    request = {
        "workload": workload.name,
        "mean_size": workload.mean_size,
        "cohort_size": workload.cohort_size,
        "rounds": workload.rounds,
        "least_rounds": LEAST_ROUNDS,
        "seconds": options.seconds,
        "check": False,
    }
    events, error = run_worker(peer, request, options)
    rounds = [event for event in events if event["event"] == "round"]
    cell: dict = {"error": error}
    for event in events:
        if event["event"] == "ready":
            cell |= {"device": event["device"], "versions": event["versions"]}
        if event["event"] == "done":
            cell["peak_memory_mib"] = event["peak_memory_mib"]
    if rounds:
        cell["first_round_s"] = rounds[0]["seconds"]
        cell["first_round_moved"] = float(np.linalg.norm(list(rounds[0]["moved"].values())))
    if len(rounds) < 2:
        cell["error"] = error or "no round after the first"
        return cell
    later = rounds[1:]
    cell |= _measure.summary([event["seconds"] for event in later])
    cell |= {"seconds": [event["seconds"] for event in later], "steps": [event["steps"] for event in later]}
    cell["useful_step_share"] = sum(e["steps"] for e in later) / sum(e["executed_steps"] for e in later)
    ids = workloads.cohorts(workload, len(rounds))[1:]
    speeds = [workloads.flops(workload, i) / e["seconds"] / 1e9 for i, e in zip(ids, later, strict=True)]
    cell["gflops"] = float(np.median(speeds))
    if not error and not options.no_check:
        events, error = run_worker(peer, request | {"check": True}, options)
        cell["check_moved"] = next((event["moved"] for event in events if event["event"] == "round"), None)
        cell["error"] = error and f"in the check: {error}"
    return cell


def run_worker(peer: str, request: dict, options: argparse.Namespace) -> tuple[list[dict], str]:
    """Runs a peer's process; returns what it said and what went wrong, if anything."""
    command = [interpreter(peer, options), "-m", "benchmarks.peers.worker", f"peer_{peer}", json.dumps(request)]
    events, late = [], threading.Event()
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
            start_new_session=True,  # so that a peer's own processes end with it
        )

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(options.limit, stop)
        timer.start()
        try:
            events = [json.loads(line) for line in process.stdout]
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        complaints.seek(0)
        if late.is_set():
            return events, f"{STOPPED} {options.limit:.0f} s"
        if events and events[-1]["event"] == "done":
            return events, ""
        return events, environments.last_error(complaints.read())


def measure_peak(options: argparse.Namespace, when: str) -> dict:
    """GFLOP/s of matrix products by library, and the load of the machine."""
    peaks = {"when": when, "load": os.getloadavg()[0]}
    for library, peer in (("numpy", "ours"), ("jax", "ours"), ("torch", "torch")):
        command = [interpreter(peer, options), "-m", "benchmarks.peers.peak", library]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        peaks[library] = json.loads(done.stdout)["gflops"] if done.returncode == 0 else None
    return peaks


if __name__ == "__main__":
    main()
