"""The loop in PyTorch with each local step, forwards, backwards and update, as one CUDA graph.

A graph is captured for each number of examples that a batch has, before the clock starts.
"""

import numpy as np
import torch

from benchmarks.peers import torch_models, workloads
from benchmarks.peers.peer_torch import rounds
from benchmarks.peers.worker import Recorder, Task


class _Step:
    """A captured local step on batches of one size."""

    def __init__(self, model, trained, rate, like: tuple[torch.Tensor, torch.Tensor], size: int, pool) -> None:
        x, y = like
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format  # as the examples lie in memory
        self.x = torch.zeros((size, *x.shape[1:]), dtype=x.dtype, device=x.device).contiguous(memory_format=layout)
        self.y = torch.zeros((size, *y.shape[1:]), dtype=y.dtype, device=y.device)

        def step() -> None:
            gradients = torch.autograd.grad(torch_models.loss(model, self.x, self.y), trained)
            with torch.no_grad():
                torch._foreach_add_(trained, gradients, alpha=-rate)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            step()

    def __call__(self, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> None:
        torch.index_select(x, 0, rows, out=self.x)
        torch.index_select(y, 0, rows, out=self.y)
        self.graph.replay()


def run(task: Task, recorder: Recorder) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU")
    workload, federation, device = task.workload, task.federation, torch.device("cuda")
    model = torch_models.prepare(torch_models.make_model(workload, task.dropout), device)
    trained = [p for p in model.parameters() if p.requires_grad]
    clients = [torch_models.as_tensors(*federation.client(i), device) for i in range(workload.num_clients)]
    torch.manual_seed(0)
    counts = workloads.client_sizes(workload)[np.unique(task.cohorts)]
    sizes = {int(count % workload.batch_size) for count in counts} - {0}
    if (counts >= workload.batch_size).any():
        sizes.add(workload.batch_size)
    pool = torch.cuda.graph_pool_handle()
    steps = {
        size: _Step(model, trained, workload.learning_rate, clients[0], size, pool)
        for size in sorted(sizes, reverse=True)
    }
    torch_models.load(model, task.parameters)
    torch.cuda.synchronize()
    recorder.ready(device.type, {"torch": torch.__version__})

    def train(x: torch.Tensor, y: torch.Tensor) -> None:
        for _ in range(workload.num_epochs):
            make = torch.randperm if task.shuffled else torch.arange
            for rows in make(len(y), device=device).split(workload.batch_size):
                steps[len(rows)](x, y, rows)

    rounds(task, recorder, model, clients, train)
