"""Packages import each other in one direction only, and training needs none of the packages that only others need."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.flags import sections_of
from evaluation.config import EvalConfig
from training.config import TrainConfig

PROJECT = Path(__file__).resolve().parent.parent
ENTRIES = ["train", "runner_aa_eval", "demo", "hubconf"]

# A package imports from itself and from lower layers only. Entries are scripts and may import one another.
LAYERS = {
    "tools": 6,
    **dict.fromkeys([*ENTRIES, "ablation", "benchmarks"], 5),
    **dict.fromkeys(["training", "evaluation"], 4),
    "zoo": 3,
    **dict.fromkeys(["attacks", "data", "utils_architecture"], 2),
    "common": 1,
}
PACKAGES = ["ablation", "training", "evaluation", "zoo", "attacks", "data", "common"]

# These packages are independent of flags and ranks.
PURE_PACKAGES = ["attacks", "data", "utils_architecture"]
FLAGS_AND_RANKS = ["common.flags", "common.processes"]

# Messages of these packages contain no flags of `train.py` and `runner_aa_eval.py` (`blame` adds them). The packages' own
# command lines may.
INNER_PACKAGES = [*PURE_PACKAGES, "common", "zoo"]
COMMAND_LINES = ["prepare.py", "__main__.py"]

# Libraries that one file alone imports.
OWNERS = {
    "fastargs": "common/flags.py",
    "torch.distributed": "common/processes.py",
    "torch.nn.parallel": "common/processes.py",
}

# Packages that training does not need.
NOT_FOR_TRAINING = [
    "robustbench",
    "pyautoattack",
    "autoattack",
    "GPUtil",
    "sklearn",
    "webdataset",
    "datasets",
]


@dataclass(frozen=True)
class Import:
    """A module that the file at `path`, relative to the project's root, uses in line `line`."""

    path: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} uses {self.module}"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def dotted_name(node: ast.expr) -> str | None:
    """Return `a.b.c` for an expression that is such a chain of names; None for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)) is not None:
        return f"{base}.{node.attr}"
    return None


def modules_used(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import in a file of `package` ("" at the top), also inside functions.

    `from a import b` yields `a.b`, because `b` may be a module. The same holds for an expression `a.b` after `import a`,
    and for a call of `import_module` or `__import__` with a string.
    """
    tree = ast.parse(source)
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                if alias.asname is None:
                    imported.add(alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                name = dotted_name(node)
                if name is not None and name.split(".")[0] in imported:
                    yield node.lineno, name
            case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
                if (dotted_name(function) or "").split(".")[-1] in ("import_module", "__import__"):
                    yield node.lineno, module


def texts(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of every string except docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


def project_files() -> list[Path]:
    """Return every Python file of the project except its tests."""
    packages = [path for name in LAYERS for path in sorted((PROJECT / name).rglob("*.py"))]
    return [*sorted(PROJECT.glob("*.py")), *packages]


def imports_of(path: Path) -> list[Import]:
    relative = path.relative_to(PROJECT)
    found = modules_used(path.read_text(encoding="utf-8"), ".".join(relative.parent.parts))
    return [Import(relative.as_posix(), line, module) for line, module in found]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for path in project_files() for found in imports_of(path)]


def package_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def wrong_imports(imports: list[Import]) -> list[str]:
    """Return the imports from a higher layer, from another package of the same layer, or from the tests."""
    wrong = []
    for found in imports:
        package, target = package_of(found.path), found.module.split(".")[0]
        if package == target or target not in [*LAYERS, "tests"]:
            continue
        both_entries = package in ENTRIES and target in ENTRIES
        if target == "tests" or (LAYERS[target] >= LAYERS[package] and not both_entries):
            wrong.append(str(found))
    return wrong


# The search for imports itself


@pytest.mark.parametrize(
    ("source", "package", "modules"),
    [
        ("import torch.distributed as dist", "", ["torch.distributed"]),
        ("from torch import nn, distributed", "", ["torch.nn", "torch.distributed"]),
        ("import torch\ntorch.distributed.f()", "", ["torch", "torch.distributed.f", "torch.distributed"]),
        ("torch = 1\ntorch.distributed", "", []),
        ("def f():\n    from common import config", "data", ["common.config"]),
        ("from . import loader", "data", ["data.loader"]),
        ("from .loader import Batch", "data", ["data.loader.Batch"]),
        ("from ..common.config import load", "data.readers", ["data.common.config.load"]),
        ("importlib.import_module('fastargs')", "", ["fastargs"]),
        ("__import__('fastargs')", "", ["fastargs"]),
    ],
)
def test_search_finds_every_form_of_import(source: str, package: str, modules: list[str]) -> None:
    assert [module for _, module in modules_used(source, package)] == modules


@pytest.mark.parametrize(
    ("path", "module", "is_wrong"),
    [
        ("attacks/apgd.py", "data.loader", True),
        ("data/loader.py", "utils_architecture.get_new_model", True),
        ("training/step.py", "evaluation.report", True),
        ("zoo/runs.py", "training.state", True),
        ("common/files.py", "attacks", True),
        ("training/step.py", "train.main", True),
        ("evaluation/report.py", "tests.attacks", True),
        ("training/step.py", "training.state", False),
        ("demo.py", "train.main", False),
        ("demo.py", "attacks.apgd", False),
        ("zoo/runs.py", "utils_architecture", False),
        ("data/loader.py", "datasets.load_dataset", False),
    ],
)
def test_imports_go_one_way(path: str, module: str, is_wrong: bool) -> None:
    assert bool(wrong_imports([Import(path, 1, module)])) == is_wrong


# The project


def test_every_entry_and_package_exists_and_has_a_layer() -> None:
    for entry in ENTRIES:
        assert (PROJECT / f"{entry}.py").is_file(), f"the entry {entry}.py is missing"
    for package in PACKAGES:
        init = f"{package}/__init__.py"
        assert (PROJECT / init).is_file(), f"without {init} an installed package of that name would win"
    scripts = {path.stem for path in PROJECT.glob("*.py")}
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")} - {"tests"}
    assert scripts | packages <= set(LAYERS), "a new package: give it a layer in LAYERS"


def test_packages_import_from_lower_layers_only(imports: list[Import]) -> None:
    assert wrong_imports(imports) == []


def test_attacks_data_and_models_are_independent_of_flags_and_ranks(imports: list[Import]) -> None:
    pure = [found for found in imports if package_of(found.path) in PURE_PACKAGES]
    assert pure
    assert [str(found) for found in pure if any(is_within(found.module, name) for name in FLAGS_AND_RANKS)] == []


def test_only_the_outer_layers_have_flags_in_messages() -> None:
    names = {
        f"{section}.{field.name}"
        for config in (TrainConfig, EvalConfig)
        for section, cls in sections_of(config)
        for field in dataclasses.fields(cls)
    }
    inner = [path for path in project_files() if package_of(path.relative_to(PROJECT).as_posix()) in INNER_PACKAGES]
    said = {path: texts(path.read_text(encoding="utf-8")) for path in inner if path.name not in COMMAND_LINES}
    assert len(names) > 80 and len(said) > 40
    flags = re.compile("|".join(map(re.escape, names)))
    assert [f"{path}:{line}" for path, lines in said.items() for line, text in lines if flags.search(text)] == []


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_library_is_used_in_one_file(imports: list[Import], library: str, owner: str) -> None:
    users = [found for found in imports if is_within(found.module, library)]
    assert [str(found) for found in users if found.path != owner] == []
    assert users, f"{owner} no longer uses {library}: take it off the list"


@pytest.mark.parametrize("name", [*ENTRIES, *PACKAGES, "utils_architecture", "tests"])
def test_names_lead_to_this_project(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).is_relative_to(PROJECT)


def test_training_imports_silently_and_without_the_packages_of_evaluation() -> None:
    packages = ["common", "attacks", "data", "zoo", "training"]
    files = [path for package in packages for path in sorted((PROJECT / package).glob("*.py"))]
    names = [".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in files]
    modules = ["train", "utils_architecture", *(name.removesuffix(".__init__") for name in names)]
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder

class WithoutThem(PathFinder):  # as if they were not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {NOT_FOR_TRAINING!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThem
for name in {modules!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "importing a module printed something"
