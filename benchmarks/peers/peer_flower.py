"""Flower's FedAvg in its simulation, with a worker process for each core and one thread in each, as it advises."""

import json
import os
import time
from importlib.metadata import version

# Reports about usage to the makers of Flower and Ray are no part of a round.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers import flower_client, torch_models
from benchmarks.peers.worker import Recorder, Task


class _TimedFedAvg(FedAvg):
    """FedAvg with the workload's cohorts, and a watch."""

    def __init__(self, task: Task, recorder: Recorder, model: torch.nn.Module) -> None:
        super().__init__(fraction_train=task.workload.cohort_size / task.workload.num_clients, fraction_evaluate=0.0)
        self._task, self._recorder, self._model, self._more = task, recorder, model, True

    def configure_train(self, server_round, arrays, config, grid):
        if not self._more:
            return []
        # The virtual nodes are alike; the message says whose examples to train on.
        nodes = sorted(grid.get_node_ids())
        return [
            Message(
                content=RecordDict({"arrays": arrays, "config": ConfigRecord({"client": int(i)})}),
                message_type=MessageType.TRAIN,
                dst_node_id=nodes[i],
            )
            for i in self._task.cohorts[server_round - 1]
        ]

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if not self._more:
            return None, None
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None or any(reply.has_error() for reply in replies):
            errors = [reply.error.reason for reply in replies if reply.has_error()]
            raise RuntimeError(f"Flower's clients failed: {errors}")

        def parameters():
            self._model.load_state_dict(arrays.to_torch_state_dict())
            return torch_models.unload(self._model, self._task.parameters)

        self._more = self._recorder.round_done(parameters)
        return arrays, metrics


def run(task: Task, recorder: Recorder) -> None:
    model = torch_models.make_model(task.workload, task.dropout)
    torch_models.load(model, task.parameters)
    strategy = _TimedFedAvg(task, recorder, model)
    os.environ[flower_client.REQUEST] = json.dumps(recorder.request)
    server = ServerApp()
    cores = len(os.sched_getaffinity(0))

    @server.main()
    def main(grid, context):
        gpus = torch.cuda.device_count()
        # The simulation registers its nodes one after the other, and a thousand of them take longer than a start.
        while len(list(grid.get_node_ids())) < task.workload.num_clients:
            time.sleep(0.1)
        recorder.ready(
            "cuda" if gpus else "cpu", {"flwr": version("flwr"), "ray": version("ray"), "torch": version("torch")}
        )
        strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=len(task.cohorts))

    run_simulation(
        server,
        flower_client.app,
        num_supernodes=task.workload.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / cores},
            "init_args": {"num_cpus": cores, "include_dashboard": False},
        },
    )
