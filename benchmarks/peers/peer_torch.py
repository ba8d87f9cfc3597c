"""What one writes without a framework: a loop over clients and batches in PyTorch, all threads."""

import os
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.peers import torch_models
from benchmarks.peers.worker import Recorder, Task


def run(task: Task, recorder: Recorder) -> None:
    workload, federation = task.workload, task.federation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch_models.prepare(torch_models.make_model(workload, task.dropout), device)
    torch_models.load(model, task.parameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=workload.learning_rate)
    clients = [torch_models.as_tensors(*federation.client(i), device) for i in range(workload.num_clients)]
    torch.manual_seed(0)
    recorder.ready(device.type, {"torch": torch.__version__})

    def train(x: torch.Tensor, y: torch.Tensor) -> None:
        torch_models.train(model, optimizer, x, y, workload, task.shuffled)

    rounds(task, recorder, model, clients, train)


def rounds(
    task: Task,
    recorder: Recorder,
    model: torch.nn.Module,
    clients: list[tuple[torch.Tensor, torch.Tensor]],
    train: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Federated averaging: `train(x, y)` trains the model on the examples of one client, where it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for ids in task.cohorts:
        start = [p.detach().clone() for p in trained]
        total = [torch.zeros_like(p) for p in start]
        weights = np.array([len(clients[i][1]) for i in ids])
        for i, weight in zip(ids, weights / weights.sum(), strict=True):
            with torch.no_grad():
                torch._foreach_copy_(trained, start)
            train(*clients[i])
            with torch.no_grad():
                torch._foreach_add_(total, trained, alpha=float(weight))
        with torch.no_grad():
            torch._foreach_copy_(trained, total)
        if trained[0].is_cuda:
            torch.cuda.synchronize()
        if not recorder.round_done(lambda: torch_models.unload(model, task.parameters)):
            break
