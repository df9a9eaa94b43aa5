"""The house rules: imports run backwards along the pipeline, and what no file may hold."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import convnn_geo

ROOT = Path(convnn_geo.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in FILES]

#: Each line may import from the lines above it, and from its own.
PIPELINE = [
    {"typing", "checks", "caching", "extras", "compiled", "gpu", "operators", "shapes", "workers"},
    {"points"},
    {"encodings"},
    {"metrics"},
    {"candidates"},
    {"neighborhood"},
    {"search"},
    {"transforms"},
    {"selection"},
    {"pairs"},
    {"weighting"},
    {"kernels"},
    {"operation"},
    {"lowering"},
    {"nn"},
    {"recipes"},
    {"convert"},
    {"models"},
    {"console", "datasets"},
    {"viz"},
    {"train"},
    {"experiments"},
]
OPTIONAL = {
    "faiss",
    "flashlib",
    "lightning_fabric",
    "matplotlib",
    "pyg_lib",
    "pykeops",
    "rich",
    "scipy",
    "skimage",
    "sklearn",
    "torch_cluster",
    "tensorboard",
    "timm",
    "torch_scatter",
    "torchbvh",
    "torchvision",
    "triton",
    "yaml",
}


def place(module):
    """Where a module of the package stands; what is not in the pipeline uses all of it."""
    part = module.split(".")[1]
    for number, names in enumerate(PIPELINE):
        if part in names:
            return number
    return len(PIPELINE)


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(tree, into_functions=True):
    """All nodes of a file, less those for type checkers alone."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if is_type_checking(node) or (inner and not into_functions):
            continue
        pending.extend(ast.iter_child_nodes(node))


def imported(path, into_functions=True):
    """Full names of the modules that a file imports."""
    for node in nodes(ast.parse(path.read_text()), into_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports within the package are written in full"
            yield node.module
            if node.module == "convnn_geo":
                yield from (f"convnn_geo.{alias.name}" for alias in node.names)


def own(names):
    return [n for n in names if n.startswith("convnn_geo.") and n != "convnn_geo.__version__"]


def test_the_pipeline_is_there():
    for names in PIPELINE:
        for name in names:
            assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file(), name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_backwards_along_the_pipeline(path):
    module = module_of(path)
    if module == "convnn_geo":
        return
    for name in own(imported(path)):
        assert place(name) <= place(module), f"{module} imports {name}, which comes later"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_optional_packages_are_imported_where_they_are_used(path):
    if path.parent.name == "gpu":  # kernels, which are imported where they are used
        return
    outside = set(imported(path, into_functions=False))
    kernels = {name for name in outside if name.startswith("convnn_geo.gpu.")}
    for name in kernels:  # what needs no triton may be imported anywhere
        outside |= set(imported(ROOT.parent / f"{name.replace('.', '/')}.py"))
    assert not {name.split(".")[0] for name in outside} & OPTIONAL
    assert {n for n in outside if n.startswith("convnn_geo.gpu.")} <= kernels


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_assert_and_no_long_file(path):
    text = path.read_text()
    found = [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert not found, f"assert in lines {found}: python -O would drop it"
    assert text.count("\n") <= 500


def test_the_rules_would_notice(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport numpy as np\n"
        "from convnn_geo import nn\nimport torch_cluster\n"
        "if TYPE_CHECKING:\n    import rich\n"
        "def f():\n    from convnn_geo.search import knn\n    import sklearn\n"
    )
    names = set(imported(path))
    assert {"convnn_geo.nn", "convnn_geo.search", "torch_cluster", "sklearn"} <= names
    assert "rich" not in names
    outside = set(imported(path, into_functions=False))
    assert "torch_cluster" in outside and "sklearn" not in outside
    assert place("convnn_geo.nn.conv") > place("convnn_geo.search") > place("convnn_geo.points")
    assert place("convnn_geo.verify") > place("convnn_geo.recipes")


def test_importing_the_package_imports_nothing_optional():
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import torch, torch_geometric.nn, torch_geometric.data\n"
        "before = set(sys.modules)\n"
        "import convnn_geo\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    new = set(done.stdout.split())
    assert "convnn_geo" in new
    assert not new & OPTIONAL


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_what_a_package_exports_is_there(path):
    module = importlib.import_module(module_of(path))
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for name in exported:
        assert hasattr(module, name), f"{module.__name__}.{name}"


def test_every_file_of_the_package_goes_into_a_wheel():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["convnn_geo"]
    there = {path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    carried = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert ROOT / "search" / "costs.json" in there
    assert {path for path in there - carried if path.suffix != ".py"} == set()
