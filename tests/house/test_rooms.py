"""The rooms of the house, read from the imports: no circle, no arrow up, no crowd, and a door with a sign."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {  # lower ones first; a file or folder imports from its own line only itself, and from those above nothing
    "stores": """
        on_demand comparison records
        errors
        storage
        format
        blocks
        work
        campaign attributions
        opening
        maintenance
        __init__
    """,
    "ablate": """
        errors ambient
        immutable state logits keep files
        models
        outputs devices
        data
        index
        ablation
        gating
        engine
        work
        loading
        digits campaign
        workers
        __init__
    """,
    "coar": """
        errors
        statistics
        metrics
        attributions
        judging
        estimators/abstract
        estimators/plain estimators/storing
        estimators/differentiable estimators/baselines estimators/gradient estimators/regression
        estimators/registry
        estimators/estimate
        editing/edits
        editing/given editing/running editing/log editing/settings
        editing/where
        editing/request
        editing/abstract editing/predicting
        editing/judging
        editing/training
        editing/methods editing/coar_edit
        editing/masks
        editing/registry editing/toy
        editing
        interchange report
        planning
        demo
        __init__
        cli
        __main__
    """,
}
FLOOR_OF = {
    f"{package}/{room}": (number, f"{package}/{room}")
    for package, floors in FLOORS.items()
    for number, floor in enumerate(floors.strip().splitlines())
    for room in floor.split()
}
MOST_FILES = 16


def _modules() -> dict[str, Path]:
    files = [file for package in FLOORS for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = _modules()


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yields the modules of ours that a file imports, wherever in it, for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _graph() -> dict[str, set[str]]:
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
    return {name: {other for other in _imported(tree) if other in MODULES} - {name} for name, tree in trees.items()}


GRAPH = _graph()


def _floor(module: str) -> tuple[int, str] | None:
    path = MODULES[module].relative_to(ROOT).with_suffix("").as_posix()
    if path.count("/") > 1:
        path = path.removesuffix("/__init__")
    fits = [room for room in FLOOR_OF if path == room or path.startswith(room + "/")]
    return FLOOR_OF[max(fits, key=len)] if fits else None


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the modules that import each other, directly or through others, in groups."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set[str](), [start]
        while ahead:
            for other in graph.get(ahead.pop(), set()) - seen:
                seen.add(other)
                ahead.append(other)
        reached[start] = seen
    groups = defaultdict(list)
    for name, seen in reached.items():
        if name in seen:
            groups[frozenset(other for other in seen if name in reached[other])].append(name)
    return sorted(sorted(group) for group in groups.values())


def test_circles_are_seen() -> None:
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_modules_import_each_other() -> None:
    """Imports inside functions and for types count: two files that need each other are one idea cut in two."""
    assert _circles(GRAPH) == []


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down_the_floors(package: str) -> None:
    wrong = []
    for module, others in GRAPH.items():
        here = _floor(module)
        if here is None or not module.startswith(package):
            continue
        for other in others:
            there = _floor(other)
            if there is None or other.partition(".")[0] != package:
                continue
            if there[0] > here[0] or (there[0] == here[0] and there[1] != here[1]):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_every_file_has_its_floor() -> None:
    homeless = {str(MODULES[m].relative_to(ROOT)) for m in MODULES if _floor(m) is None}
    assert homeless == {"coar/estimators/__init__.py"}  # a sign only: it imports nothing
    rooms = {floor[1] for module in MODULES if (floor := _floor(module))}
    assert rooms == set(FLOOR_OF), "a floor names what is not there"


def test_no_room_is_crowded() -> None:
    folders = defaultdict(list)
    for file in MODULES.values():
        folders[file.parent].append(file.name)
    assert {str(f.relative_to(ROOT)): len(n) - 1 for f, n in folders.items() if len(n) - 1 > MOST_FILES} == {}


@pytest.mark.parametrize(
    "door",
    [f for f in MODULES.values() if f.name == "__init__.py" and f.parent.parent != ROOT],
    ids=lambda f: str(f.parent),
)
def test_every_room_says_what_it_is_for(door: Path) -> None:
    text = " ".join((ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) or "").split())
    assert "May import: " in text
    assert "Start reading in `" in text


@pytest.mark.parametrize(
    "door",
    [f for f in MODULES.values() if f.name == "__init__.py" and f.parent.parent != ROOT],
    ids=lambda f: str(f.parent),
)
def test_signs_name_the_rooms_that_are_imported(door: Path) -> None:
    """Rooms beside it; files beside it and the root's are not told one by one."""
    room = door.parent
    sign = " ".join((ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) or "").split())
    allowed = sign[sign.index("May import: ") : sign.index("Start reading")]
    if "everything" in allowed:
        return
    used = set()
    for module, file in MODULES.items():
        if file.is_relative_to(room):
            for other in GRAPH[module]:
                used |= _rooms_beside(room, MODULES[other])
    assert {name for name in used if f"`{name}`" not in allowed} == set()


def _rooms_beside(room: Path, file: Path) -> set[str]:
    """Returns the name of the room of this package that a file is in, seen from a room."""
    if file.is_relative_to(room) or room.is_relative_to(file.parent):
        return set()
    package = ROOT / room.relative_to(ROOT).parts[0]
    above = next(folder for folder in room.parents if file.is_relative_to(folder))
    return {file.relative_to(above).parts[0]} if above.is_relative_to(package) else set()


def test_no_two_classes_have_one_name() -> None:
    found = defaultdict(list)
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_module_hides_behind_a_public_name() -> None:
    """`import coar.evaluate as m` must not give a function."""
    for package in (*FLOORS, "coar.editing", "coar.metrics", "coar.interchange", "coar.planning", "ablate.loading"):
        face = MODULES[package]
        names = {
            a.asname or a.name
            for n in ast.walk(ast.parse(face.read_text()))
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        }
        assert not {name for name in names if f"{package}.{name}" in MODULES}, package
