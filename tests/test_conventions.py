"""Rules of the project, checked on the source: who imports whom, what each folder contains, which names are gone."""

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import algorithms
from algorithms import messages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedjax_core", "algorithms", "models", "pipelines")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks", "docs")

# What a package may import besides the standard library and itself. None: see FORBIDDEN.
ALLOWED = {
    "fedjax_core": {"jax", "numpy", "optax", "chex"},
    "algorithms": {"jax", "numpy", "optax", "chex", "fedjax_core"},
    "models": None,
    "pipelines": None,
}
FORBIDDEN = {"models": {"algorithms", "pipelines"}, "pipelines": {"tests"}}

# Names that newer releases of JAX lack or that this library does not use, and what to use.
GONE = {
    "jax.pmap": "jax.shard_map",
    "jax.tree_map": "jax.tree.map",
    "jax.tree_leaves": "jax.tree.leaves",
    "jax.core.eval_jaxpr": "jax.extend.core.jaxpr_as_fun",
    "jax.experimental.shard_map": "jax.shard_map",
    "jax.experimental.maps": "jax.shard_map",
    "jax.experimental.pjit": "jax.jit",
    "jax.random.PRNGKey": "jax.random.key",
}

# A path of one person's machine, and the address of a package index (taken apart, so that this file passes too).
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:work|root|farm|home/\w+|Users/\w+)/")
INDEX_ADDRESS = re.compile(
    "|".join(
        [
            r"https?://[^\s\"']*/(?:simple|pypi|npm)(?:/|[\"'\s]|$)",
            r"\bpy" + r"pi\.org\b",
            r"\bpython" + r"hosted\.org\b",
            r"\bregistry\.npm" + r"js\.org\b",
            r"\bconda\.ana" + r"conda\.org\b",
        ]
    )
)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def all_python_files() -> list[Path]:
    return [ROOT / "bootstrap.py", *(path for folder in FOLDERS for path in python_files(folder))]


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported_packages(path: Path) -> list[tuple[ast.AST, str]]:
    """Top-level names of everything a file imports, `importlib.import_module("...")` included."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node, node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom) and node.level >= len(path.relative_to(ROOT).parts):
            found.append((node, "a relative import that leaves the package"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found += [(node, str(name.value).split(".")[0]) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return found


def import_is_allowed(package: str, name: str) -> bool:
    if name == package or name in sys.stdlib_module_names:
        return True
    allowed = ALLOWED[package]
    return name not in FORBIDDEN[package] if allowed is None else name in allowed


@pytest.mark.quick
@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str):
    wrong = [
        f"{place(path, node)} imports {name}"
        for path in python_files(package)
        for node, name in imported_packages(path)
        if not import_is_allowed(package, name)
    ]
    assert not wrong, "imports go pipelines -> algorithms, models -> fedjax_core:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "statement", "allowed"),
    [
        ("fedjax_core", "import algorithms.drift", False),
        ("fedjax_core", "from flax import linen", False),
        ("fedjax_core", "import jax.numpy as jnp", True),
        ("algorithms", "from models.cnn import cnn", False),
        ("algorithms", "def f():\n    import pipelines", False),
        ("algorithms", "import importlib\nimportlib.import_module('sklearn.datasets')", False),
        ("algorithms", "from fedjax_core import Algorithm", True),
        ("models", "from fedjax_core import checks", True),
        ("models", "from algorithms import fedavg", False),
        ("models", "import flax.linen as nn", True),
        ("pipelines", "import algorithms, models, fedjax_core, sklearn", True),
    ],
)
def test_the_import_check_sees(package: str, statement: str, allowed: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / package / "module.py"
    file.parent.mkdir()
    file.write_text(statement)
    assert all(import_is_allowed(package, name) for _, name in imported_packages(file)) == allowed


def full_names(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every imported or dotted name of a file, spelled in full: `random.key` after `from jax import random` is
    `jax.random.key`."""
    known: dict[str, str] = {}
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found.append((node, alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.append((node, f"{node.module}.{alias.name}"))
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in known:
            found.append((node, ".".join([known[inner.id], *reversed(parts)])))
    return found


@pytest.mark.quick
def test_methods_share_parts_and_not_each_others_helpers():
    """Of another method's file a method takes the factory or the state; everything else that is shared is a part."""
    folders = [folder for folder in (ROOT / "algorithms").iterdir() if folder.is_dir() and folder.name != "parts"]
    files = [path for folder in folders for path in folder.glob("*.py")]
    methods = {f"algorithms.{path.parent.name}.{path.stem}" for path in files if defines_factory(path)}
    wrong = [
        f"{place(path, node)} takes {alias.name} from {node.module}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module in methods
        for alias in node.names
        if not (alias.name in algorithms.__all__ or alias.name.endswith("State"))
    ]
    assert not wrong, "shared parts live in algorithms/parts:\n" + "\n".join(wrong)


LAYERS = ["common", "data", "configuration", "federation", "experiment", "results", "run", "compiled", "studies", "cli"]


@pytest.mark.quick
def test_pipelines_imports_run_one_way():
    """A package of `pipelines` imports itself and what stands before it in `LAYERS`."""
    folders = [path.name for path in (ROOT / "pipelines").iterdir() if (path / "__init__.py").exists()]
    assert sorted(folders) == sorted(LAYERS), "enter a new package in LAYERS, and in pipelines/README.md"
    wrong = [
        f"{place(path, node)} imports {node.module}"
        for path in python_files("pipelines")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipelines.")
        if path.parent.name in LAYERS
        if LAYERS.index((node.module or "").split(".")[1]) > LAYERS.index(path.parent.name)
    ]
    assert not wrong, "\n".join(wrong)


def defines_factory(path: Path) -> bool:
    return any(getattr(node, "name", None) in algorithms.__all__ for node in ast.parse(path.read_text()).body)


def gone_names(tree: ast.AST) -> list[tuple[ast.AST, str, str]]:
    return [
        (node, name, GONE[gone])
        for node, name in full_names(tree)
        for gone in GONE
        if name == gone or name.startswith(gone + ".")
    ]


@pytest.mark.quick
def test_no_removed_jax_names():
    wrong = [
        f"{place(path, node)}: {name}; use {instead}"
        for path in all_python_files()
        for node, name, instead in gone_names(ast.parse(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.random.PRNGKey(0)",
        "from jax import random as r\nr.PRNGKey(0)",
        "from jax.random import PRNGKey",
        "import jax as j\nj.tree_map(f, x)",
        "from jax.experimental.shard_map import shard_map",
        "import jax.experimental.shard_map",
        "from jax import core\ncore.eval_jaxpr(a, b)",
        "import jax\n@jax.pmap\ndef f(x): pass",
    ],
)
def test_the_check_of_removed_names_sees(source: str):
    assert gone_names(ast.parse(source))
    assert not gone_names(ast.parse("import jax\njax.random.key(0)\njax.tree.map(f, x)\njax.shard_map(f)"))


@pytest.mark.quick
@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str):
    assert (ROOT / package / "py.typed").exists(), f"add an empty {package}/py.typed"
    assert (ROOT / package / "__init__.py").exists(), f"add {package}/__init__.py"


@pytest.mark.quick
@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_say_what_lives_there(folder: str):
    readme = ROOT / folder / "README.md"
    assert readme.exists(), f"add {folder}/README.md: what lives there and what it may import"
    assert readme.read_text().startswith("# ")


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(algorithms.__all__))
def test_methods_carry_their_paper_card(name: str):
    factory = getattr(algorithms, name)
    if not inspect.isfunction(factory):
        pytest.skip("not a factory")
    card = inspect.getdoc(factory) or ""
    first, *_ = card.split("\n")
    assert re.match(r"[^:]{1,40}: \S", first), f'the first line must read "Name: what it is", not {first!r}'
    assert card.split("\n\n")[-1].startswith("Paper: "), (
        f"the card of {name} must end with a paragraph `Paper: authors, title, year, algorithm number`"
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(messages.__all__))
def test_parts_carry_their_paper(name: str):
    card = inspect.getdoc(getattr(messages, name)) or ""
    assert card.split("\n\n")[-1].startswith("Paper: "), f"the card of {name} must end with a paragraph `Paper: ...`"


def code_lines(source: str) -> int:
    """Lines with code on them: no comments, no docstrings, nothing empty."""
    tree, text = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    nothing = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - text)


@pytest.mark.quick
def test_code_lines_are_counted():
    assert (
        code_lines('"""A.\n\nB."""\n\n\ndef f(x):\n    """C."""\n    # no\n    return (\n        x  # yes\n    )\n')
        == 4
    )


# One for each corner of what methods do: parts of models, statistics, public data, several models, second derivatives,
# votes, adapters, split models, several architectures.
SHORT = ("fedbn", "feddf", "fedgh", "fedlora", "fedrep", "frl", "ifca", "per_fedavg", "sfprompt")


@pytest.mark.quick
@pytest.mark.parametrize("name", SHORT)
def test_a_method_is_read_in_one_go(name: str):
    source = Path(inspect.getsourcefile(getattr(algorithms, name))).read_text()
    assert code_lines(source) < 120, "what makes it long belongs to algorithms/parts or fedjax_core"


@pytest.mark.quick
@pytest.mark.parametrize("name", messages.__all__)
def test_a_part_is_read_at_a_glance(name: str):
    assert code_lines(inspect.getsource(getattr(messages, name))) < 40


def test_algorithms_are_listed_in_order():
    assert list(algorithms.__all__) == sorted(algorithms.__all__)
    assert list(messages.__all__) == sorted(messages.__all__)


def tracked_files() -> list[Path]:
    """Files under version control, or without git every file that is not in a hidden or generated folder."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0 and top.returncode == 0 and Path(top.stdout.strip()) == ROOT:
        return [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    roots = [ROOT / folder for folder in (*FOLDERS, ".ci")]
    files = [path for root in roots for path in root.rglob("*") if "__pycache__" not in path.parts]
    return [path for path in [*ROOT.glob("*"), ROOT / ".pre-commit-config.yaml", *files] if path.is_file()]


def leaks(text: str) -> list[str]:
    return [match.group() for pattern in (MACHINE_PATH, INDEX_ADDRESS) for match in pattern.finditer(text)]


@pytest.mark.quick
def test_no_machine_paths_or_index_addresses():
    wrong = []
    for path in tracked_files():
        if not path.is_file():
            continue  # deleted, but not yet committed as deleted
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {leak}" for leak in leaks(text)]
    assert not wrong, "\n".join(wrong)


def test_the_check_of_leaks_sees():
    slash = "/"
    for bad in ("see {}home/ann/data", "'{}root/.cache'", "cd {}work/main", "https:/{}mirror.example/simple/"):
        assert leaks(bad.format(slash) + slash), bad
    for good in (
        "https://arxiv.org/abs/1602.05629",
        "runs{0}work{0}home{0}x/",
        "~{0}work/x",
        "$HOME{0}work/",
        "a simple / npm text",
    ):
        assert not leaks(good.format(slash)), good


def test_test_folders_mirror_the_packages():
    """tests/<package>/... holds the tests of <package>/..., and nothing in tests can hide a package."""
    files = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    wrong = [str(path) for path in files if path.parts[:-1] and not (ROOT / path.parent / "__init__.py").exists()]
    assert not wrong, f"these tests lie in a folder that no package has: {wrong}"
    assert {path.parts[0] for path in files if len(path.parts) > 1} <= set(PACKAGES)

    # Outside a package, pytest imports a test file by its bare name.
    bare = [path.name for path in files if not (ROOT / "tests" / path.parent / "__init__.py").exists()]
    twice = sorted({name for name in bare if bare.count(name) > 1})
    assert not twice, f"two test files share a name, which pytest cannot import: {twice}"


@pytest.mark.quick
def test_every_package_has_tests():
    for package in PACKAGES:
        assert list((ROOT / "tests" / package).rglob("test_*.py")), f"tests/{package} is empty"
