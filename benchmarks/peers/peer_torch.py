"""What one writes without a framework: a loop over clients and batches in PyTorch, all threads."""

import os

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

    for ids in task.cohorts:
        start = [p.detach().clone() for p in trained]
        total = [torch.zeros_like(p) for p in start]
        weights = np.array([len(clients[i][1]) for i in ids])
        for i, weight in zip(ids, weights / weights.sum(), strict=True):
            with torch.no_grad():
                torch._foreach_copy_(trained, start)
            for _ in range(workload.num_epochs):
                x, y = clients[i]
                if task.shuffled:
                    order = torch.randperm(len(y), device=device)
                    x, y = x[order], y[order]
                for batch_x, batch_y in zip(x.split(workload.batch_size), y.split(workload.batch_size), strict=True):
                    optimizer.zero_grad()
                    torch_models.loss(model, batch_x, batch_y).backward()
                    optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, trained, alpha=float(weight))
        with torch.no_grad():
            torch._foreach_copy_(trained, total)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not recorder.round_done(lambda: torch_models.unload(model, task.parameters)):
            break
