"""The files beside the code that tell people what to do: they are true of the code as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+)`|\]\(([\w./-]+)\)")
NAME_IN_FILE = re.compile(r"`([A-Z_]+|_\w+|[A-Z]\w+|[a-z]\w+)`(?: of [^`|]*)? in `([\w/]+\.py)`")
ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{5})")

yaml: Any = pytest.importorskip("yaml", reason="PyYAML is not installed")


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_that_is_named_exists(page: str) -> None:
    named = {path for pair in PATH.findall(_text(page)) for path in pair if path}
    assert len(named) >= 3
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_names_to_copy_from_are_in_the_files_that_are_named() -> None:
    found = NAME_IN_FILE.findall(_text("CONTRIBUTING.md"))
    assert len(found) >= 6
    lacking = [(name, file) for name, file in found if not re.search(rf"\b{name}\b", _text(file))]
    assert not lacking


def test_contributing_is_one_page() -> None:
    assert len(_text("CONTRIBUTING.md").splitlines()) <= 60


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", _text("Makefile"), flags=re.MULTILINE))
    pages = _text("CONTRIBUTING.md") + _text("README.md")
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", pages, flags=re.MULTILINE))
    assert {"test", "demo", "dist", "test-oldest"} <= named <= targets


def test_commits_are_checked_as_make_lint_checks() -> None:
    [recipe] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", _text("Makefile"), flags=re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    hooks = [hook for repo in yaml.safe_load(_text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == commands
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)


def test_the_citation_is_complete() -> None:
    """What version 1.2 of the format requires, of the toolkit and of every paper."""
    cited = yaml.safe_load(_text("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert "version" not in cited, "versions come from pyproject.toml"
    for paper in cited["references"]:
        assert {"type", "title", "authors"} <= paper.keys()
        assert all("family-names" in author for author in paper["authors"])
        assert all({"type", "value"} <= identifier.keys() for identifier in paper.get("identifiers", []))


def test_every_paper_of_a_method_is_cited() -> None:
    files = [file for folder in ("coar", "docs") for file in (ROOT / folder).rglob("*.[pm][yd]")]
    used = {number for file in files for number in ARXIV.findall(file.read_text(encoding="utf-8"))}
    assert len(used) >= 5
    assert used <= set(ARXIV.findall(_text("CITATION.cff")))
