"""Every Python block of README and docs runs, page by page, in order, in a folder of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# pages that run whole campaigns
SLOW = {"cluster", "first-campaign", "how-many-passes", "what-is-in-a-store", "when-something-goes-wrong"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Returns (language, code, line) of every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(m.group(1), m.group(2), text[: m.start()].count("\n") + 2) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in SLOW else page for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a page may add its folder
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, code, line in blocks(page):
        assert language in ("python", "text"), f"{page}:{line}: a block is python (it runs) or text (it does not)"
        if language == "python":
            # blank lines put the right line numbers into a traceback
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # noqa: S102


def test_readme_example_is_about_twenty_lines() -> None:
    code = next(code for language, code, _ in blocks(ROOT / "README.md") if language == "python")
    assert 15 <= len([line for line in code.splitlines() if line.strip()]) <= 22


def test_readme_opens_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:8]
    assert any("make demo" in line for line in head)
    assert any("make test" in line for line in head)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page}: {target} does not exist"
