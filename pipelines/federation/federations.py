"""A federation: who trains on which examples, who is tested on which, and what each client does to its inputs.

    dataset = data.load("fashion_mnist", data_dir=...)
    federation = build(Config(dataset="fashion_mnist", clients=100, alpha=0.1), dataset)
    federation.population("train")

It is a pure function of the configuration and the data set. Saved in a directory it can be shared: the digest of the
examples and of the assignments is checked when it is loaded.

    federation.json                     the configuration, digests, measures and warnings
    train.npz, validation.npz, ...      one `pipelines.federation.assignment.Assignment` for each part
"""

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_core import HostPopulation, Population
from pipelines.common import files
from pipelines.common.names import pick, shortened
from pipelines.configuration.config import FEDERATION_FIELDS, Config
from pipelines.data.dataset import Dataset
from pipelines.federation import embedding, heterogeneity, partition, skew, splits
from pipelines.federation.assignment import Assignment

PARTITIONS: dict[str, Callable[..., Assignment]] = {**partition.PARTITIONS, "embedding": embedding.embedding}
"""Name to partitioner; the name of its first argument says what it reads: labels, groups or embeddings."""

PUBLIC = "public"
"""The part of a federation that the server holds."""

_FORMAT = 1
_FILE = "federation.json"


class Part(NamedTuple):
    """Examples that are assigned to clients.

    Attributes:
      source: the part of the data set they are of, "train" or "test".
      assignment: who holds which rows of it.
    """

    source: str
    assignment: Assignment


class Federation(NamedTuple):
    """A federation of N clients.

    Attributes:
      dataset: the data set, inputs as the clients see them.
      parts: "train", what each client trains on; "validation" and "test", what it is tested on, if there are such;
        "new", clients that take no part in training. All but the last are of the same N clients. "public" is what the
        server holds, as if it were one client.
      domains: names [N] of the domain that each client is of, or nothing where clients do not come from domains.
    """

    dataset: Dataset
    parts: dict[str, Part]
    domains: tuple[str, ...] = ()

    @property
    def num_clients(self) -> int:
        """N."""
        return self.parts["train"].assignment.num_clients

    @property
    def sizes(self) -> np.ndarray:
        """int64[N], number of training examples of each client."""
        return self.parts["train"].assignment.sizes

    @property
    def public_inputs(self) -> dict[str, np.ndarray] | None:
        """The examples that the server holds, without labels, {"x": [M, ...]}; None if it holds none."""
        if PUBLIC not in self.parts:
            return None
        source, assignment = self.parts[PUBLIC]
        return {"x": getattr(self.dataset, source)["x"][assignment.rows]}

    def population(self, part: str) -> Population:
        """The examples of a part, grouped by client, on the device."""
        source, assignment = self.parts[part]
        examples = {name: leaf[assignment.rows] for name, leaf in getattr(self.dataset, source).items()}
        return Population.from_flat(examples, assignment.offsets, check_finite=False)

    def host_population(self, part: str) -> HostPopulation:
        """The examples of a part, where they are: in host memory or in memory-mapped files."""
        source, assignment = self.parts[part]
        return HostPopulation.from_flat(getattr(self.dataset, source), assignment.offsets, assignment.rows)

    def digest(self) -> str:
        """The sha256, in hex, of the inputs and labels as the clients see them and of who holds them."""
        hashed = sha256()
        for part in (self.dataset.train, self.dataset.test):
            for name in sorted(part):
                hashed.update(_fingerprint(part[name]).encode())
        for name, (source, assignment) in sorted(self.parts.items()):
            hashed.update(f"{name} {source} {assignment.digest()}".encode())
        return hashed.hexdigest()

    def measures(self) -> dict[str, float]:
        """How the clients' training parts differ; see `pipelines.federation.heterogeneity.measure`."""
        return heterogeneity.measure(self.parts["train"].assignment, self.dataset.train["y"], self.dataset.num_classes)

    def warnings(self, batch_size: int) -> list[str]:
        """What would spoil a study; see `pipelines.federation.heterogeneity.warnings`."""
        dataset, test = self.dataset, self.parts.get("test")
        if test is not None and test.source == "train":
            dataset = dataset._replace(test=dataset.train)
        return heterogeneity.warnings(
            dataset,
            self.parts["train"].assignment,
            test_assignment=None if test is None else test.assignment,
            batch_size=batch_size,
        )


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Says of an error that the value is that of a field of the configuration."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def build(config: Config, dataset: Dataset) -> Federation:
    """Builds the federation that a configuration describes.

    In this order: test examples that join the pool, the long tail, the server's public part, the partition, new
    clients, each client's validation and test parts, the feature skew. With the natural partition, test examples of the
    data set that belong to the groups of training clients are these clients' test part, unless `test_share` asks for
    one; and groups that are only in the test part are new clients, unless `new_clients` asks for some. With the
    partition domains, the test examples of a domain are dealt out to its clients, those of each class in the shares in
    which they hold it, unless `test_share` asks for a test part.

    Args:
      config: `FEDERATION_FIELDS` of it.
      dataset: the data set that it names.

    Raises:
      ValueError: for anything that cannot be met, before any of it is done.
    """
    chosen = config.federation
    pick("partition", chosen.partition, PARTITIONS)
    if chosen.feature_skew != "none":
        pick("feature skew", chosen.feature_skew, ["none", *skew.SKEWS])
        skew.parameters(chosen.feature_skew, dataset.input_shape, 1, severity=chosen.severity)
    if chosen.pool and not chosen.test_share:
        raise ValueError(
            "pool=True leaves nothing to test on: give test_share, the share of a client's examples that test it, for "
            "example 0.2"
        )
    dataset = _pooled(config, dataset)
    seed = chosen.partition_seed
    rows = np.arange(len(dataset.train["y"]))
    if chosen.imbalance > 1:
        with _named("imbalance"):
            rows = splits.long_tail(dataset.train["y"], chosen.imbalance, seed=seed)
    parts: dict[str, Part] = {}
    if chosen.public_share:
        with _named("public_share"):
            public, rows = splits.hold_out_rows(rows, chosen.public_share, seed=seed)
        parts[PUBLIC] = Part("train", Assignment.from_parts([public]))
    train = _partition(config, dataset, rows).within(rows)
    if chosen.new_clients:
        with _named("new_clients"):
            held = splits.hold_out_clients(train, chosen.new_clients, seed=seed)
        train = held.kept
        parts["new"] = Part("train", held.new)
    shares = chosen.validation_share, chosen.test_share
    if any(shares):
        labels = None if chosen.split_by == "position" or dataset.is_sequence else dataset.train["y"]
        split = splits.split_clients(train, shares, by=chosen.split_by, labels=labels, gap=chosen.gap, seed=seed)
        train = split.train
        if chosen.validation_share:
            parts["validation"] = Part("train", split.validation)
        if chosen.test_share:
            parts["test"] = Part("train", split.test)
    elif chosen.gap:
        raise ValueError(f"gap={chosen.gap} without validation_share or test_share: there is nothing to keep apart")
    if chosen.partition == "natural" and dataset.test_groups is not None and dataset.groups is not None:
        _add_test_groups(parts, train, dataset.groups, dataset.test_groups)
    if chosen.partition == "domains" and "test" not in parts:
        _deal_in_domains(parts, train, dataset, seed)
    parts = {"train": Part("train", train), **parts}
    return _federation(config, dataset, parts)


def save(federation: Federation, config: Config, directory: str | Path) -> dict[str, Any]:
    """Saves a federation in a directory, which is made if need be.

    The examples are not in it, only who holds which; what is there of a federation is replaced.

    Returns:
      The content of federation.json; "digest" and "warnings" take a pass over all examples.
    """
    folder = Path(directory)
    files.make_directory(folder)
    for name, (source, assignment) in federation.parts.items():
        assignment.save(folder / f"{name}.npz", source=source, dataset=federation.dataset.name)
    content = {
        "format": _FORMAT,
        "digest": federation.digest(),
        "config": config.federation_fields(),
        "parts": {name: part.source for name, part in federation.parts.items()},
        "measures": federation.measures(),
        "warnings": federation.warnings(config.local.batch_size),
    }
    files.write_text(folder / _FILE, json.dumps(content, indent=2) + "\n")
    return content


def read(directory: str | Path) -> tuple[dict[str, Any], str]:
    """(the fields of `Config` that a saved federation was made with, its digest).

    Raises:
      ValueError: if the directory holds no federation, or one that this version cannot read.
    """
    content = _content(Path(directory))
    return {k: v for k, v in content["config"].items() if k in FEDERATION_FIELDS}, content["digest"]


def load(directory: str | Path, dataset: Dataset) -> Federation:
    """Loads a saved federation and checks that it is of these very examples.

    Raises:
      ValueError: if the directory holds no federation, a file is damaged, or the examples are not those that it was
        made of.
    """
    folder = Path(directory)
    content = _content(folder)
    config = Config(**content["config"])
    dataset = _pooled(config, dataset)
    parts = {name: Part(source, Assignment.load(folder / f"{name}.npz")) for name, source in content["parts"].items()}
    for name, (source, assignment) in parts.items():
        total = len(getattr(dataset, source)["y"])
        if assignment.rows.max(initial=-1) >= total:
            raise ValueError(
                f"{folder}: {name} holds row {assignment.rows.max()}, but {dataset.name} has {total} examples there: "
                "load the data set that the federation was made of"
            )
    federation = _federation(config, dataset, parts)
    if federation.digest() != content["digest"]:
        raise ValueError(
            f"{folder} was made of other examples than those of {dataset.name} here (its digest differs): use the same "
            "version of the data set, or build the federation again"
        )
    return federation


def options(name: str) -> list[str]:
    """The fields of `Config` that a partition reads: its keyword arguments besides the seed."""
    parameters = inspect.signature(PARTITIONS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seed"]


def reads(name: str) -> str:
    """What a partition goes by: "labels", "groups" or "embeddings", the name of its first argument."""
    return next(iter(inspect.signature(PARTITIONS[name]).parameters))


def _partition(config: Config, dataset: Dataset, rows: np.ndarray) -> Assignment:
    chosen = config.federation
    function = PARTITIONS[chosen.partition]
    takes_all = len(rows) == len(dataset.train["y"])
    if reads(chosen.partition) == "embeddings":
        source = embedding.embed(dataset, seed=chosen.partition_seed)
    elif reads(chosen.partition) == "groups":
        if dataset.groups is None:
            raise ValueError(
                f"partition={chosen.partition!r} assigns examples by group, and {dataset.name} has no groups: take a "
                "data set with natural clients (shakespeare, har), several joined by +, or another partition"
            )
        source = dataset.groups
    else:
        source = dataset.train["y"]
    own = {name: getattr(chosen, name) for name in options(chosen.partition)}
    return function(source if takes_all else source[rows], chosen.clients, seed=chosen.partition_seed, **own)


def _add_test_groups(parts: dict[str, Part], train: Assignment, groups: np.ndarray, test_groups: np.ndarray) -> None:
    """Assigns the data set's own test examples to the clients whose groups they belong to."""
    num_groups = int(max(groups.max(), test_groups.max())) + 1
    client_of = np.full(num_groups, -1)
    held = np.flatnonzero(train.sizes)
    client_of[groups[train.rows[train.offsets[held]]]] = held
    owner = client_of[test_groups]
    if "test" not in parts and (owner >= 0).any():
        parts["test"] = Part("test", Assignment.from_owner(owner, len(train)))
    unseen = np.setdiff1d(test_groups, groups)
    if "new" not in parts and unseen.size:
        newcomer = np.full(num_groups, -1)
        newcomer[unseen] = np.arange(unseen.size)
        parts["new"] = Part("test", Assignment.from_owner(newcomer[test_groups], unseen.size))


def _deal_in_domains(parts: dict[str, Part], train: Assignment, dataset: Dataset, seed: int) -> None:
    """Deals the data set's own test examples out to clients of the domains that they are of."""
    if dataset.groups is None or dataset.test_groups is None:
        return
    own, others = dataset.groups, dataset.test_groups
    if not dataset.is_sequence:  # whose examples have no class
        own = own * dataset.num_classes + dataset.train["y"]
        others = others * dataset.num_classes + dataset.test["y"]
    parts["test"] = Part("test", splits.deal(train, own, others, seed=seed))


def _pooled(config: Config, dataset: Dataset) -> Dataset:
    """The data set with its own test examples behind those of the training part, if that is asked for."""
    if not config.federation.pool:
        return dataset
    train = {name: np.concatenate([leaf, dataset.test[name]]) for name, leaf in dataset.train.items()}
    groups = None
    if dataset.groups is not None and dataset.test_groups is not None:
        groups = np.concatenate([dataset.groups, dataset.test_groups])
    elif reads(config.federation.partition) == "groups" and dataset.groups is not None:
        raise ValueError(
            f"pool=True with partition={config.federation.partition!r}: the test examples of {dataset.name} are of no "
            "group, so that no client can hold them; leave pool out, or give its test part groups"
        )
    return dataset._replace(train=train, groups=groups, test_groups=None)


def _federation(config: Config, dataset: Dataset, parts: dict[str, Part]) -> Federation:
    """The federation of these parts, inputs as its clients see them.

    Where the data set was pooled its test part is that of all clients together, on which the model of all is tested.
    """
    seen = _skewed(config, dataset, parts)
    if config.federation.pool:
        rows = parts["test"].assignment.rows
        if not len(rows):
            raise ValueError(
                f"test_share={config.federation.test_share:g} leaves no client an example to be tested on: raise it"
            )
        test = {name: leaf[rows] for name, leaf in seen.train.items()}
        seen = seen._replace(test=test, test_groups=None if seen.groups is None else seen.groups[rows])
    return Federation(seen, parts, _domains(config, seen, parts))


def _domains(config: Config, dataset: Dataset, parts: dict[str, Part]) -> tuple[str, ...]:
    """The domain of each client in words: the data set that its examples are of, and what was made of them."""
    train = parts["train"].assignment
    words: list[list[str]] = []
    if config.federation.partition == "domains" and dataset.groups is not None and train.sizes.all():
        of_clients = dataset.groups[train.rows[train.offsets[:-1]]]
        names = dataset.group_names or tuple(f"domain {i}" for i in range(int(dataset.groups.max()) + 1))
        words.append([names[i] for i in of_clients])
    if config.federation.feature_skew in skew.KINDS:
        drawn = skew.parameters(
            config.federation.feature_skew,
            dataset.input_shape,
            _clients_in_all(parts),
            severity=config.federation.severity,
            seed=config.federation.partition_seed,
        )
        words.append([str(kind) for kind in drawn[skew.KINDS[config.federation.feature_skew]][: len(train)]])
    return tuple(", ".join(each) for each in zip(*words, strict=True))


def _clients_in_all(parts: Mapping[str, Part]) -> int:
    """Clients that train, and new ones after them."""
    new = parts["new"].assignment.num_clients if "new" in parts else 0
    return parts["train"].assignment.num_clients + new


def _skewed(config: Config, dataset: Dataset, parts: dict[str, Part]) -> Dataset:
    """The data set with every input as its client sees it; test inputs without a client get a random one."""
    chosen = config.federation
    if chosen.feature_skew == "none":
        return dataset
    num_clients = parts["train"].assignment.num_clients
    inputs = {"train": dataset.train["x"], "test": dataset.test["x"]}
    taken = np.zeros(len(inputs["test"]), bool)
    owners: list[tuple[str, str, np.ndarray]] = []
    for name, (source, assignment) in parts.items():
        if name == PUBLIC:  # the server sees things as they are
            continue
        owner = np.full(len(inputs[source]), -1)
        owner[assignment.rows] = assignment.clients + (num_clients if name == "new" else 0)
        owners.append((source, "train" if name == "new" else name, owner))
        if source == "test":
            taken |= owner >= 0
    sizes = parts["train"].assignment.sizes
    rng = np.random.default_rng(chosen.partition_seed)
    rest = np.where(taken, -1, rng.choice(num_clients, len(taken), p=sizes / sizes.sum()))
    for source, name, owner in [*owners, ("test", "test", rest)]:
        inputs[source] = skew.apply(
            chosen.feature_skew,
            inputs[source],
            owner,
            _clients_in_all(parts),
            severity=chosen.severity,
            seed=chosen.partition_seed,
            part=name,  # type: ignore[arg-type]
        )
    return dataset._replace(train={**dataset.train, "x": inputs["train"]}, test={**dataset.test, "x": inputs["test"]})


def _content(folder: Path) -> dict[str, Any]:
    path = folder / _FILE
    if not os.path.isfile(path):  # a name that is too long is no file
        raise ValueError(
            f"{shortened(str(folder))} holds no federation (no {_FILE}): make one with `fedjax-core federate --out`"
        )
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads {_FORMAT}")
        dict(content["config"]), dict(content["parts"]), str(content["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): build the federation again") from None
    return content


def _fingerprint(array: np.ndarray) -> str:
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype("<f4")  # the same in a run of double precision
    header = f"{array.dtype.str} {list(array.shape)}"
    return header + sha256(np.ascontiguousarray(array).data).hexdigest()
