"""What every peer runs: sizes, examples, models, initial parameters, cohorts. NumPy only, so that all can import it.

Letters in shapes: N clients, C clients of a cohort, T tokens of a sequence.
"""

import math
from typing import NamedTuple

import numpy as np

Parameters = dict[str, np.ndarray]
"""Arrays by path, "block_0/conv_1/kernel"; kernels [inputs, outputs] or [height, width, inputs, outputs]."""


class Workload(NamedTuple):
    """One federated workload; training is local epochs of plain SGD, then the mean weighted by sizes.

    Attributes:
      name: its name, and that of its model.
      shape: of one input: (height, width, channels) of float32, or (T,) of int32 tokens.
      num_classes: labels of an image, or size of the vocabulary (the target is the next token everywhere).
      learning_rate: of the clients.
      mean_size: mean of the log-normal number of examples of a client.
      cpu_mean_size: used instead on a CPU, where the whole would take hours; the same as mean_size if it would not.
      cpu_cohort_size: likewise, for C.
      sigma: standard deviation of the logarithm of the size; 0 makes all clients alike.
      num_clients: N.
      cohort_size: C.
      batch_size: examples of a local step; a client's last batch is smaller.
      rounds: rounds to measure after the first.
      multiple: sizes are rounded up to a multiple of this.
      num_epochs: local epochs.
      num_heads: of a transformer.
      model: the workload whose model it is; its own if empty.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    learning_rate: float
    mean_size: int = 600
    cpu_mean_size: int = 600
    cpu_cohort_size: int = 10
    sigma: float = 0.8
    num_clients: int = 100
    cohort_size: int = 10
    batch_size: int = 20
    rounds: int = 8
    multiple: int = 1
    num_epochs: int = 1
    num_heads: int = 4
    model: str = ""

    @property
    def kind(self) -> str:
        """Which model it trains."""
        return self.model or self.name

    @property
    def is_text(self) -> bool:
        return len(self.shape) == 1


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("logistic", (28, 28, 1), 10, 0.05, rounds=30),
        Workload("mlp", (28, 28, 1), 10, 0.05, rounds=30),
        Workload("cnn", (28, 28, 1), 10, 0.05, rounds=10),
        Workload("lstm", (80,), 80, 0.5, cpu_mean_size=60),
        Workload("resnet", (32, 32, 3), 10, 0.05, cpu_mean_size=20, cpu_cohort_size=4, rounds=4),
        Workload("transformer", (80,), 90, 0.1, cpu_mean_size=120),
        # The protocol of pfl's own CIFAR-10 benchmark, IID: 1,000 users of 50, cohorts of 50, batches of 10.
        Workload(
            "pfl-cifar10",
            (32, 32, 3),
            10,
            0.1,
            mean_size=50,
            cpu_mean_size=50,
            cpu_cohort_size=50,
            sigma=0,
            num_clients=1000,
            cohort_size=50,
            batch_size=10,
            rounds=12,
        ),
    )
}


FOR_ACCELERATORS = {
    workload.name: workload
    for workload in (
        # FL-Simulator's protocol: 10 of 100 clients with 500 images each, batches of 50, 5 epochs: 500 local steps.
        Workload(
            "fl-simulator", (32, 32, 3), 10, 0.05, 500, sigma=0, batch_size=50, rounds=5, num_epochs=5, model="resnet"
        ),
        # A causal decoder of 110 million parameters on 4 clients of 80 sequences: 20 local steps.
        Workload(
            "gpt",
            (512,),
            16_000,
            0.05,
            80,
            sigma=0,
            num_clients=8,
            cohort_size=4,
            batch_size=16,
            rounds=5,
            num_heads=12,
        ),
    )
}
"""Too large for a CPU."""

ALL = WORKLOADS | FOR_ACCELERATORS


def check_version(workload: Workload) -> Workload:
    """A small, unequal federation of whole batches, on which all peers must agree (FedJAX fills up a last batch)."""
    batch = workload.batch_size
    return workload._replace(mean_size=2 * batch, sigma=0.8, num_clients=4, cohort_size=4, multiple=batch)


class Federation(NamedTuple):
    """All examples, client by client: x [total, ...], y [total] or [total, T], offsets int64[N + 1]."""

    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray

    def client(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.x[rows], self.y[rows]


def client_sizes(workload: Workload) -> np.ndarray:
    """int64[N], log-normal with the workload's mean."""
    rng = np.random.default_rng(1)
    mu = math.log(workload.mean_size) - workload.sigma**2 / 2
    sizes = np.exp(rng.normal(mu, workload.sigma, workload.num_clients)).round().astype(np.int64)
    return -(-np.maximum(sizes, 1) // workload.multiple) * workload.multiple


def local_steps(workload: Workload, ids: np.ndarray) -> int:
    """Local steps that the clients `ids` need together."""
    return workload.num_epochs * int((-(-client_sizes(workload)[ids] // workload.batch_size)).sum())


def cohorts(workload: Workload, rounds: int) -> np.ndarray:
    """int64[rounds, C], the participants of each round, without repetition inside a round."""
    rng = np.random.default_rng(2)
    return np.stack([rng.permutation(workload.num_clients)[: workload.cohort_size] for _ in range(rounds)])


def make_federation(workload: Workload) -> Federation:
    """Images: a mean of each class and noise. Text: walks over the vocabulary with steps of 0 to 3."""
    rng = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(client_sizes(workload))])
    total = int(offsets[-1])
    if workload.is_text:
        first = rng.integers(0, workload.num_classes, (total, 1))
        steps = rng.integers(0, 4, (total, *workload.shape))
        walk = (np.concatenate([first, first + np.cumsum(steps, axis=1)], axis=1) % workload.num_classes).astype(
            np.int32
        )
        return Federation(np.ascontiguousarray(walk[:, :-1]), np.ascontiguousarray(walk[:, 1:]), offsets)
    y = rng.integers(0, workload.num_classes, total).astype(np.int32)
    x = rng.standard_normal((total, *workload.shape), np.float32)
    x += rng.standard_normal((workload.num_classes, *workload.shape), np.float32)[y]
    return Federation(x, y, offsets)


class Layer(NamedTuple):
    """Shapes of a layer's arrays by name, and what its products cost.

    Attributes:
      arrays: shapes by name.
      macs: multiplications of its matrix products for one example, forwards.
      products: how many products of that cost a training step takes: 3 with the gradients of the weights and of the
        input, 2 where the input is data.
    """

    arrays: dict[str, tuple[int, ...]]
    macs: int
    products: int = 3


def layers(workload: Workload, **size: int) -> dict[str, Layer]:
    """The workload's model by path of its layers; `size` is for a transformer or ResNet of another width or depth."""
    return _MODELS[workload.kind](workload, **size)


def parameter_shapes(workload: Workload) -> dict[str, tuple[int, ...]]:
    """Shapes by path."""
    return {f"{path}/{name}": shape for path, layer in layers(workload).items() for name, shape in layer.arrays.items()}


def num_parameters(workload: Workload) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(workload).values())


def flops_per_example(workload: Workload, **size: int) -> int:
    """Floating-point operations of the matrix products that training on one example needs, forwards and backwards.

    Nothing else is counted: not activations, normalization, pooling, the loss or the optimizer.
    """
    return sum(2 * layer.products * layer.macs for layer in layers(workload, **size).values())


def flops(workload: Workload, ids: np.ndarray) -> int:
    """Floating-point operations of a round: those of the real examples, padding does not count."""
    return workload.num_epochs * int(client_sizes(workload)[ids].sum()) * flops_per_example(workload)


def initial_parameters(workload: Workload) -> Parameters:
    """Normal with variance 1 / (number of inputs), tables of embeddings with variance 0.01; scales 1, biases 0."""
    rng = np.random.default_rng(4)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = path.rsplit("/", 1)[1]
        if kind in ("bias", "scale"):
            return np.full(shape, kind == "scale", np.float32)
        deviation = 0.1 if kind == "embedding" else 1 / math.sqrt(math.prod(shape[:-1]))
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)

    return {path: draw(path, shape) for path, shape in parameter_shapes(workload).items()}


def _dense(inputs: int, outputs: int, times: int = 1, products: int = 3) -> Layer:
    return Layer({"kernel": (inputs, outputs), "bias": (outputs,)}, times * inputs * outputs, products)


def _conv(size: int, inputs: int, outputs: int, image: int, bias: bool = True, products: int = 3) -> Layer:
    """A convolution whose outputs have `image` x `image` pixels."""
    kernel = (size, size, inputs, outputs)
    return Layer({"kernel": kernel} | ({"bias": (outputs,)} if bias else {}), image**2 * math.prod(kernel), products)


def _norm(width: int) -> Layer:
    return Layer({"scale": (width,), "bias": (width,)}, 0)


def _embed(rows: int, width: int) -> Layer:
    return Layer({"embedding": (rows, width)}, 0)


def _logistic(workload: Workload) -> dict[str, Layer]:
    return {"head": _dense(math.prod(workload.shape), workload.num_classes, products=2)}


def _mlp(workload: Workload) -> dict[str, Layer]:
    return {
        "dense_0": _dense(math.prod(workload.shape), 200, products=2),
        "dense_1": _dense(200, 200),
        "head": _dense(200, workload.num_classes),
    }


def _cnn(workload: Workload) -> dict[str, Layer]:
    side, _, channels = workload.shape
    return {
        "conv_0": _conv(5, channels, 32, side, products=2),
        "conv_1": _conv(5, 32, 64, side // 2),
        "dense": _dense((side // 4) ** 2 * 64, 512),
        "head": _dense(512, workload.num_classes),
    }


def _pfl_cnn(workload: Workload) -> dict[str, Layer]:
    """pfl's `simple_cnn`: two 3x3 convolutions without padding, 2x2 pooling, dropout, a dense layer, dropout."""
    side, _, channels = workload.shape
    return {
        "conv_0": _conv(3, channels, 32, side - 2, products=2),
        "conv_1": _conv(3, 32, 64, side - 4),
        "dense": _dense(((side - 4) // 2) ** 2 * 64, 128),
        "head": _dense(128, workload.num_classes),
    }


def _lstm(workload: Workload) -> dict[str, Layer]:
    (T,), hidden = workload.shape, 256

    def cell(inputs: int) -> Layer:
        arrays = {"kernel": (inputs, 4 * hidden), "recurrent": (hidden, 4 * hidden), "bias": (4 * hidden,)}
        return Layer(arrays, T * (inputs + hidden) * 4 * hidden)

    return {
        "embed": _embed(workload.num_classes, 8),
        "lstm_0": cell(8),
        "lstm_1": cell(hidden),
        "head": _dense(hidden, workload.num_classes, T),
    }


def _transformer(workload: Workload, width: int = 128, blocks: int = 2) -> dict[str, Layer]:
    """Causal pre-norm blocks; how many heads there are changes neither shapes nor products."""
    (T,) = workload.shape
    model = {"embed": _embed(workload.num_classes, width), "position": _embed(T, width)}
    for i in range(blocks):
        model |= {f"block_{i}/{name}_norm": _norm(width) for name in ("attention", "mlp")}
        model |= {f"block_{i}/{name}": _dense(width, width, T) for name in ("query", "key", "value", "out")}
        model |= {f"block_{i}/up": _dense(width, 4 * width, T), f"block_{i}/down": _dense(4 * width, width, T)}
        # Scores and weighted values; the products with the masked half are computed too.
        model[f"block_{i}/attention"] = Layer({}, 2 * T * T * width)
    return model | {"norm": _norm(width), "head": _dense(width, workload.num_classes, T)}


def _resnet(workload: Workload, width: int = 64) -> dict[str, Layer]:
    """ResNet-18 with group normalization and the stem used for CIFAR, whose channels are the width."""
    side, _, channels = workload.shape
    model = {"stem": _conv(3, channels, width, side, bias=False, products=2), "stem_norm": _norm(width)}
    inputs = width
    for i in range(8):
        outputs = width * 2 ** (i // 2)
        side = side // 2 if outputs != inputs else side
        model[f"block_{i}/conv_1"] = _conv(3, inputs, outputs, side, bias=False)
        model[f"block_{i}/conv_2"] = _conv(3, outputs, outputs, side, bias=False)
        model |= {f"block_{i}/norm_{k}": _norm(outputs) for k in (1, 2)}
        if outputs != inputs:
            model[f"block_{i}/shortcut"] = _conv(1, inputs, outputs, side, bias=False)
            model[f"block_{i}/shortcut_norm"] = _norm(outputs)
        inputs = outputs
    return model | {"head": _dense(inputs, workload.num_classes)}


def _gpt(workload: Workload) -> dict[str, Layer]:
    return _transformer(workload, width=768, blocks=12)


_MODELS = {
    "logistic": _logistic,
    "mlp": _mlp,
    "cnn": _cnn,
    "lstm": _lstm,
    "resnet": _resnet,
    "transformer": _transformer,
    "pfl-cifar10": _pfl_cnn,
    "gpt": _gpt,
}
