"""A Flower client; imported by name in Flower's worker processes, so that each loads the examples once."""

import json
import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.peers import torch_models
from benchmarks.peers.worker import Task, make_task

REQUEST = "FEDJAX_CORE_PEER_REQUEST"

app = ClientApp()


@cache
def _loaded() -> tuple[Task, torch.nn.Module, torch.device]:
    task = make_task(json.loads(os.environ[REQUEST]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return task, torch_models.prepare(torch_models.make_model(task.workload, task.dropout), device), device


@cache
def _client(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    task, _, device = _loaded()
    return torch_models.as_tensors(*task.federation.client(i), device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the client whose number the server has sent, on the model it has sent."""
    (task, model, _), (x, y) = _loaded(), _client(message.content["config"]["client"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    workload = task.workload
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=workload.learning_rate)
    torch_models.train(model, optimizer, x, y, workload, task.shuffled)
    reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
    return Message(content=RecordDict(reply), reply_to=message)
