"""This library on one device: what XLA makes of a CPU unless it is told otherwise."""

from benchmarks.peers import peer_ours
from benchmarks.peers.worker import Recorder, Task


def run(task: Task, recorder: Recorder) -> None:
    peer_ours.run(task, recorder, num_devices=1)
