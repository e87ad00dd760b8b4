"""The rules of the house, read from the code itself: who imports whom, what importing does, what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ["stores", "ablate", "coar", "experiments"]  # imports go down only
SHIPPED = ["stores", "ablate", "coar"]
HEAVY = {"torchvision", "timm", "open_clip", "transformers", "tokenizers", "datasets", "wilds", "gguf"}
LOADERS = "ablate/loading/"


def _files(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yields the top-level name of everything imported, by statement or by a string given to an importing function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).lower()
            if "import" in called or "require" in called:
                for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield value.value.partition(".")[0]


def test_there_is_something_to_read() -> None:
    assert all(_files(package) for package in SHIPPED)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import timm.models as m", {"timm"}),
        ("def f():\n    from torchvision.models import resnet18", {"torchvision"}),
        ("import importlib\nimportlib.import_module('timm.data')", {"importlib", "timm"}),
        ("__import__('coar')", {"coar"}),
        ("_require(package='timm')", {"timm"}),
        ("from . import x", {"."}),
        ("print('timm')", set()),
    ],
)
def test_every_way_to_import_is_seen(code: str, found: set[str]) -> None:
    assert set(_imported(ast.parse(code))) == found


@pytest.mark.parametrize("file", _files(*FLOORS), ids=_name)
def test_imports_go_down_only(file: Path) -> None:
    floor = FLOORS.index(_name(file).partition("/")[0])
    above = {*FLOORS[floor + 1 :], "tests"}
    imported = set(_imported(_tree(file)))
    assert not imported & above, f"{_name(file)} imports from above: {sorted(imported & above)}"
    assert "." not in imported, f"{_name(file)}: write imports in full, not relative"


@pytest.mark.parametrize("file", _files("stores"), ids=_name)
def test_stores_know_nothing_of_torch(file: Path) -> None:
    assert "torch" not in set(_imported(_tree(file)))


@pytest.mark.parametrize("file", [f for f in _files(*FLOORS) if not _name(f).startswith(LOADERS)], ids=_name)
def test_model_libraries_are_imported_by_the_loaders_only(file: Path) -> None:
    assert not set(_imported(_tree(file))) & HEAVY


@pytest.mark.parametrize("file", [f for f in _files("ablate") if _name(f).startswith(LOADERS)], ids=_name)
def test_the_loaders_import_model_libraries_when_used(file: Path) -> None:
    statements = [n for n in _tree(file).body if isinstance(n, ast.Import | ast.ImportFrom)]
    module_level = ast.Module(body=list(statements), type_ignores=[])
    assert not set(_imported(module_level)) & HEAVY


def test_the_loaders_do_import_model_libraries() -> None:
    """Else the two tests above look for the wrong thing. `wilds` is read from disk, without the package."""
    loaders = [file for file in _files("ablate") if _name(file).startswith(LOADERS)]
    assert {name for file in loaders for name in _imported(_tree(file))} & HEAVY == HEAVY - {"wilds"}


@pytest.mark.parametrize("file", _files(*SHIPPED), ids=_name)
def test_no_assert_in_shipped_code(file: Path) -> None:
    lines = [node.lineno for node in ast.walk(_tree(file)) if isinstance(node, ast.Assert)]
    assert not lines, f"{_name(file)}, lines {lines}: raise an error that says what to do"


def _public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for scope in (tree.body, *(c.body for c in classes)):
        functions = [n for n in scope if isinstance(n, ast.FunctionDef)]
        yield from (f for f in functions if not f.name.startswith("_") or f.name in ("__init__", "__call__"))


@pytest.mark.parametrize("file", _files(*SHIPPED), ids=_name)
def test_no_public_parameter_is_called_mask(file: Path) -> None:
    """`keep` says what True means; a mask does not."""
    for function in _public_functions(_tree(file)):
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert not {"mask", "masks"} & set(names), f"{_name(file)}:{function.lineno} {function.name}"


@pytest.mark.parametrize("file", _files(*SHIPPED), ids=_name)
def test_public_functions_and_classes_say_what_they_do(file: Path) -> None:
    tree = _tree(file)
    assert ast.get_docstring(tree) or not tree.body, f"{_name(file)} has no docstring"
    public: list[ast.ClassDef | ast.FunctionDef] = [*_public_functions(tree)]
    public += [n for n in tree.body if isinstance(n, ast.ClassDef)]
    for node in public:
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{_name(file)}:{node.lineno} {node.name} has no docstring"


PROGRAM = """
import logging, random, sys, warnings
import numpy, torch
def state():
    return random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
def world():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, logging.root.handlers[:], logging.root.level, warnings.filters[:])
before = state(), world()
import {package}
after = state(), world()
assert before[0] == after[0], "random state changed"
assert before[1][:6] == after[1][:6], "global settings or log handlers changed"
loaded = {heavy} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize("package", SHIPPED)
def test_importing_changes_nothing(package: str) -> None:
    program = PROGRAM.format(package=package, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_importing_stores_does_not_import_torch() -> None:
    program = "import stores, sys; print(sorted({'torch', 'pandas', 'ablate', 'coar'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_test_files_have_distinct_names() -> None:
    """Without __init__.py, two test files of one name would be one module."""
    names = [file.name for file in _files("tests") if file.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    assert not [file for file in _files("tests") if file.name == "__init__.py"]
