"""pfl's FedAvg on its `SimulatedBackend`, in one process with all threads.

pfl keeps a user's batches from round to round and does not shuffle them; it does less work than the others here.
"""

import os
from importlib.metadata import version

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.peers import torch_models
from benchmarks.peers.worker import Recorder, Task


class _Watch(TrainingProcessCallback):
    def __init__(self, task: Task, recorder: Recorder, model: torch.nn.Module) -> None:
        self._task, self._recorder, self._model = task, recorder, model

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        if next(self._model.parameters()).is_cuda:
            torch.cuda.synchronize()
        more = self._recorder.round_done(lambda: torch_models.unload(self._model, self._task.parameters))
        return not more, Metrics()


def run(task: Task, recorder: Recorder) -> None:
    workload, federation = task.workload, task.federation
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = get_default_device()
    module = torch_models.make_model(workload, task.dropout)
    torch_models.load(module, task.parameters)
    module.loss = lambda x, y: torch_models.loss(module, x, y)
    module.metrics = lambda x, y: {}  # asked for in rounds with an evaluation, of which there is none
    torch_models.prepare(module, device)
    trained = [p for p in module.parameters() if p.requires_grad]
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    # The users of a cohort come one by one; made once, their batches are kept.
    users = [
        PyTorchTensorDataset(torch_models.as_tensors(*federation.client(i), device), user_id=str(i))
        for i in range(workload.num_clients)
    ]
    order = iter(task.cohorts.ravel().tolist())
    backend = SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, lambda: next(order)),
        val_data=None,
        postprocessors=[WeightByDatapoints()],
    )
    algorithm = FederatedAveraging()
    # An evaluation of every user would come with iteration 0, which is the first round and timed apart.
    algorithm._current_central_iteration = 1
    torch.manual_seed(0)
    recorder.ready(device.type, {"pfl": version("pfl"), "torch": torch.__version__})
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=1 + len(task.cohorts),
            evaluation_frequency=10**9,
            train_cohort_size=workload.cohort_size,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=workload.batch_size,
            local_num_epochs=workload.num_epochs,
            local_learning_rate=workload.learning_rate,
        ),
        callbacks=[_Watch(task, recorder, module)],
    )
