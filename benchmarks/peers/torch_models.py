"""The workloads' models in PyTorch, as the torch, pfl and Flower peers train them.

Submodules are named like the paths of `workloads.parameter_shapes`, so that one pair of functions moves parameters in
and out. Images are [B, channels, height, width].
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from benchmarks.peers.workloads import Parameters, Workload, layers


class MLP(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        for path, layer in layers(workload).items():
            setattr(self, path, nn.Linear(*layer.arrays["kernel"]))

    def forward(self, x):
        x = x.flatten(1)
        for name, layer in self.named_children():
            x = layer(x) if name == "head" else F.relu(layer(x))
        return x


class CNN(nn.Module):
    """The CNN of the FedAvg paper."""

    image_before = "dense"

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.conv_0 = nn.Conv2d(workload.shape[2], 32, 5, padding=2)
        self.conv_1 = nn.Conv2d(32, 64, 5, padding=2)
        self.dense = nn.Linear(*layers(workload)["dense"].arrays["kernel"])
        self.head = nn.Linear(512, workload.num_classes)

    def forward(self, x):
        # Pooling before the ReLU gives the same numbers from less work, here as in the JAX model.
        x = F.relu(F.max_pool2d(self.conv_0(x), 2))
        x = F.relu(F.max_pool2d(self.conv_1(x), 2))
        return self.head(F.relu(self.dense(x.flatten(1))))


class PflCNN(nn.Module):
    """The CNN of pfl's CIFAR-10 benchmark."""

    image_before = "dense"

    def __init__(self, workload: Workload, dropout: bool) -> None:
        super().__init__()
        self.conv_0 = nn.Conv2d(workload.shape[2], 32, 3)
        self.conv_1 = nn.Conv2d(32, 64, 3)
        self.dense = nn.Linear(*layers(workload)["dense"].arrays["kernel"])
        self.head = nn.Linear(128, workload.num_classes)
        self.dropout = dropout

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv_1(F.relu(self.conv_0(x)))), 2)
        x = F.dropout(x, 0.25, self.dropout).flatten(1)
        return self.head(F.dropout(F.relu(self.dense(x)), 0.5, self.dropout))


class LSTM(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.embed = nn.Embedding(workload.num_classes, 8)
        self.lstm_0 = nn.LSTM(8, 256, batch_first=True)
        self.lstm_1 = nn.LSTM(256, 256, batch_first=True)
        self.head = nn.Linear(256, workload.num_classes)
        for layer in (self.lstm_0, self.lstm_1):
            # PyTorch has two biases for a gate. One stays zero, so that models and steps are the same everywhere.
            nn.init.zeros_(layer.bias_hh_l0).requires_grad_(False)

    def forward(self, x):
        y, _ = self.lstm_0(self.embed(x))
        y, _ = self.lstm_1(y)
        return self.head(y)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.attention_norm(x)
        q, k, v = (f(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        names = layers(workload)
        width = names["head"].arrays["kernel"][0]
        self.embed, self.position = nn.Embedding(workload.num_classes, width), nn.Embedding(workload.shape[0], width)
        self.num_blocks = sum(name.endswith("/up") for name in names)
        for i in range(self.num_blocks):
            setattr(self, f"block_{i}", Block(width, workload.num_heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, workload.num_classes)

    def forward(self, x):
        y = self.embed(x) + self.position.weight[: x.shape[1]]
        for i in range(self.num_blocks):
            y = getattr(self, f"block_{i}")(y)
        return self.head(self.norm(y))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv_1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = (nn.GroupNorm(2, width, eps=1e-6) for _ in range(2))
        if stride == 2:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut_norm = nn.GroupNorm(2, width, eps=1e-6)

    def forward(self, x):
        y = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x)))))
        return F.relu(y + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class ResNet(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.stem = nn.Conv2d(workload.shape[2], 64, 3, padding=1, bias=False)
        self.stem_norm = nn.GroupNorm(2, 64, eps=1e-6)
        widths = [64 * 2 ** (i // 2) for i in range(8)]
        for i, (inputs, width) in enumerate(zip([64, *widths], widths, strict=False)):
            setattr(self, f"block_{i}", ResidualBlock(inputs, width))
        self.head = nn.Linear(512, workload.num_classes)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        for i in range(8):
            x = getattr(self, f"block_{i}")(x)
        return self.head(x.mean((2, 3)))


def make_model(workload: Workload, dropout: bool) -> nn.Module:
    """The model with parameters of its own, on the CPU."""
    if workload.kind == "pfl-cifar10":
        return PflCNN(workload, dropout)
    kinds = {"cnn": CNN, "lstm": LSTM, "transformer": Transformer, "gpt": Transformer, "resnet": ResNet}
    return kinds.get(workload.kind, MLP)(workload)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over examples, and over tokens."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    workload: Workload,
    shuffled: bool,
) -> None:
    """The local epochs of a client, on the model as it is."""
    for _ in range(workload.num_epochs):
        if shuffled:
            order = torch.randperm(len(y), device=x.device)
            x, y = x[order], y[order]
        for batch_x, batch_y in zip(x.split(workload.batch_size), y.split(workload.batch_size), strict=True):
            optimizer.zero_grad()
            loss(model, batch_x, batch_y).backward()
            optimizer.step()


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, set up for its fastest single precision.

    On a GPU that is TF32 products, which JAX takes too unless told otherwise, and images with their channels last.
    """
    if device.type != "cuda":
        return model.to(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return model.to(device, memory_format=torch.channels_last)


def as_tensors(x, y, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's examples as the models take them."""
    x, y = torch.from_numpy(x), torch.from_numpy(y).long().to(device)
    if not x.is_floating_point():
        return x.long().to(device), y
    x = x.to(device).permute(0, 3, 1, 2)  # on a GPU channels stay last in memory
    return (x if device.type == "cuda" else x.contiguous()), y


@torch.no_grad()
def load(model: nn.Module, parameters: Parameters) -> None:
    """Copies the parameters into the model."""
    for path, tensor, shape, order in _correspondence(model, parameters):
        tensor.copy_(torch.from_numpy(parameters[path]).reshape(shape).permute(order).reshape(tensor.shape))


@torch.no_grad()
def unload(model: nn.Module, like: Parameters) -> Parameters:
    """The model's parameters in the layout of `like`."""
    result = {}
    for path, tensor, shape, order in _correspondence(model, like):
        inverse = [order.index(axis) for axis in range(len(order))]
        array = tensor.detach().cpu().reshape([shape[axis] for axis in order]).permute(inverse)
        result[path] = array.reshape(like[path].shape).numpy().copy()
    return result


def _correspondence(model: nn.Module, parameters: Parameters):
    """(path, tensor, shape to give the array, order of its axes in the tensor) of every parameter."""
    found = set()
    for path, array in parameters.items():
        layer, kind = path.replace("/", ".").rsplit(".", 1)
        module = model.get_submodule(layer)
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}.get(kind)
        if isinstance(module, nn.LSTM):
            name = {"kernel": "weight_ih_l0", "recurrent": "weight_hh_l0", "bias": "bias_ih_l0"}[kind]
        shape, order = array.shape, tuple(range(array.ndim))
        if kind in ("kernel", "recurrent"):
            order = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
            if layer == getattr(model, "image_before", None):
                # Rows are (height, width, channel) of an image, which here is flattened as (channel, height, width).
                channels = model.conv_1.out_channels
                side = round((array.shape[0] // channels) ** 0.5)
                shape, order = (side, side, channels, array.shape[1]), (3, 2, 0, 1)
        tensor = getattr(module, name)
        found.add(tensor)
        yield path, tensor, shape, order
    missing = [name for name, tensor in model.named_parameters() if tensor.requires_grad and tensor not in found]
    assert not missing, f"parameters that the workload does not know: {missing}"
