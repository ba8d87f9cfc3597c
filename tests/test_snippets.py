"""The code on the pages of the documentation runs as it stands there, on less data where it would take long."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core
import models
from pipelines import Config
from pipelines.data import sources
from pipelines.run.train import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "*/README.md", "docs/*.md", "docs/methods/*.md")
    for path in ROOT.glob(pattern)
    if "```python" in path.read_text() and path.name != "frameworks.md"  # test_frameworks.py runs that
)
CLIENTS = 100

# What stands for what on a page, so that it takes seconds.
INSTEAD = {
    "docs/concepts.md": {"num_rounds=500": "num_rounds=2"},
    "docs/data.md": {
        'datasets.load("fashion_mnist", data_dir="DATA")': "images_of_ten_classes",
        "clients=100": "clients=10",
        "25, alpha=0.5, min_size=128": "5, alpha=0.5, min_size=2",
    },
    "docs/mesh.md": {'jax.config.update("jax_num_cpu_devices", 2)': "", "client_mesh()": "client_mesh(2)"},
    "models/README.md": {"images, ": "images[:2], ", "labels}": "labels[:2]}"},
    "docs/methods/feddf.md": {"server_steps=1000": "server_steps=2"},
    "docs/methods/fal.md": {"attack_steps=20": "attack_steps=2"},
    "docs/methods/autoflip.md": {"explore_epochs=20": "explore_epochs=2"},
    "docs/methods/fedlex.md": {"explore_epochs=20": "explore_epochs=2"},
    "docs/methods/fedfix.md": {"500": "20"},
    "docs/runs.md": {"rounds=20)": 'rounds=2, seeds=1, model="logistic_regression")'},
    "pipelines/README.md": {"rounds=50)": 'rounds=2, seeds=1, model="logistic_regression")'},
}
RUN = {"docs/reports.md", "docs/runs.md"}  # are about the run `runs/mine`
NEEDS = {"docs/tpu.md": "libtpu"}  # what a page is about, too large for every environment
LONG = {
    *RUN,
    "docs/converge.md",
    "docs/data.md",
    "docs/own.md",
    "docs/sweep.md",
    "pipelines/README.md",
}  # take many seconds; their imports are always tried


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    for old, new in INSTEAD.get(page, {}).items():
        assert old in text, f"{page} has no {old!r} any more: mend INSTEAD"
        text = text.replace(old, new)
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def linear(page: str, rng: np.random.Generator) -> dict:
    """A plain function as the model, as the pages of the guide have it."""
    y = jnp.arange(3 * CLIENTS) % 3
    x = jnp.asarray(rng.normal(size=(3 * CLIENTS, 4)), jnp.float32)

    def loss_fn(params, batch, key):
        logits = batch["x"] @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    sizes = np.full(CLIENTS, 3)
    examples = {"x": x, "y": y}
    population = fedjax_core.Population.from_sizes(examples, sizes)
    many = jnp.arange(100)[:, None] + jnp.arange(2)  # different clients in every round
    of_two = page == "docs/quickstart.md"  # makes a population of two clients
    return {
        "params": {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)},
        "loss_fn": loss_fn,
        "algorithm": algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=2),
        "population": population,
        "examples": jax.tree.map(np.asarray, examples),
        "sizes": sizes,
        "offsets": np.arange(0, 3 * CLIENTS + 1, 3),
        "examples_0": {"x": x[:2], "y": y[:2]},
        "examples_1": {"x": x[2:], "y": y[2:]},
        **{"x_0": x[:2], "y_0": y[:2], "x_1": x[2:], "y_1": y[2:]},
        "ids": many % CLIENTS if page == "README.md" else jnp.arange(4),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1), 2),
        "sample_key": jax.random.key(2),
        "train_key": jax.random.key(3),
        "rates": jnp.array([0.1, 0.2]),
        "sampler": fedjax_core.samplers.uniform(*((2, 1) if of_two else (CLIENTS, 2))),
    }


def network(rng: np.random.Generator) -> dict:
    """A small model of the library on images, as the pages of the methods have it, with `rates` of the clients."""
    model = models.mlp((28, 28, 1), 10, hidden=(4, 4))
    x = jnp.asarray(rng.uniform(size=(2 * CLIENTS, 28, 28, 1)), jnp.float32)
    y = jnp.arange(2 * CLIENTS) % 10
    population = fedjax_core.Population.from_sizes({"x": x, "y": y}, np.full(CLIENTS, 2))
    params = model.init(jax.random.key(0))
    loss_fn = models.losses.cross_entropy(model)
    method = algorithms.autoflip(loss_fn, optax.sgd(0.1))
    return {
        "model": model,
        "params": params,
        "loss_fn": loss_fn,
        "metric_fn": models.metrics.classification(model),
        "population": population,
        "tasks": [population, population],
        "images": x,
        **{"x": x[:2], "labels": y, "rounds": 1, "ids": jnp.arange(3), "key": jax.random.key(1)},
        "test": {"x": x[:4], "y": y[:4]},
        "steps": jnp.full(CLIENTS, 2),
        "times": np.arange(CLIENTS) % 5 + 1,
        "rates": jnp.full(CLIENTS, 0.1),
        **{"method": method, "state": method.init(params)},
    }


def given(page: str) -> dict:
    """What the reader of a page has at hand."""
    rng = np.random.default_rng(0)
    modules = {"jax": jax, "jnp": jnp, "np": np, "numpy": np, "optax": optax, "algorithms": algorithms}
    core = {name: getattr(fedjax_core, name) for name in dir(fedjax_core) if not name.startswith("_")}
    names = {**core, **modules, "models": models, "__name__": "snippet"}
    if page == "docs/data.md":
        from pipelines.federation import embedding, partition

        images = rng.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
        found = sources.from_arrays(images, np.arange(300) % 10, name="fashion_mnist")
        return names | {"images_of_ten_classes": found, "embedding": embedding, "partition": partition}
    if page.startswith("docs/methods/") or page == "models/README.md":
        names |= network(rng)
    else:
        names |= linear(page, rng)
    if page == "docs/methods/ewc.md":
        names["state"] = algorithms.ewc(names["loss_fn"], optax.sgd(0.1)).init(names["params"])
    if page == "docs/own.md":  # its method is that of an example
        method, _, _ = (ROOT / "examples" / "write_your_own_method.py").read_text().partition("# From here on")
        names["pytest"] = pytest
        exec(compile(method, "write_your_own_method.py", "exec"), names)
    if page == "docs/runs.md":
        names |= {"x": rng.normal(size=(100, 8, 8, 1)).astype(np.float32), "y": np.arange(100) % 3}
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the run `runs/mine`."""
    folder = tmp_path_factory.mktemp("snippets")
    run = {"dataset": "digits", "model": "logistic_regression", "clients": 10, "rounds": 2, "seeds": 1}
    config = Config(**run, methods=("fedavg", "scaffold"), validation_share=0.1, keep_best=True)
    train(config, folder / "runs" / "mine")
    return folder


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in LONG else ()) for page in PAGES])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, request):
    if page in NEEDS and find_spec(NEEDS[page]) is None:
        pytest.skip(f"the page is about {NEEDS[page]}, which is not installed")
    monkeypatch.chdir(request.getfixturevalue("finished") if page in RUN else tmp_path)
    with jax.enable_x64(False):
        names = given(page)
        for number, code in enumerate(blocks(page), 1):
            exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_imports_is_there(page):
    """What cannot be parsed is set as text, and not left out here."""
    for code in blocks(page):
        statements = [each for each in ast.parse(code, page).body if isinstance(each, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(statements, []), page, "exec"), {})


SCRIPT = re.compile(r"python3? (?:-m (benchmarks\.\w+)|((?:benchmarks|examples)/\w+\.py))((?: [^`\n#()]*)?)")


def test_benchmarks_and_examples_that_are_named_have_these_options():
    missing, count = [], 0
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]:
        for module, file, rest in SCRIPT.findall(re.sub(r"\\\n\s*", "", path.read_text())):
            count += 1
            script = ROOT / (file or f"{module.replace('.', '/')}.py")
            script = script if script.exists() else script.with_suffix("") / "__main__.py"
            source = script.read_text() if script.exists() else ""
            options = re.findall(r"(?<= )--[a-z-]+", rest)
            unknown = [o for o in options if o != "--help" and f'"{o}"' not in source]
            missing += [f"{path.name}: {script.name} {o}" for o in unknown] + (
                [] if source else [f"{path.name}: {script}"]
            )
    assert count > 30
    assert missing == []
