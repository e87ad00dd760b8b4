"""The documentation site: it has every page and every public name, fetches nothing, and a fault stops its build."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ROOT / "docs" / "hooks"
PACKAGES = ["ablate", "coar", "coar.metrics", "stores"]


def _hook(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HOOKS))
    return importlib.import_module(name)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook that compares the reference with the packages."""
    return _hook("public_names", monkeypatch)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_names_that_are_read_are_those_that_python_sees(package: str, names: ModuleType) -> None:
    module = importlib.import_module(package)
    seen = {name for name in dir(module) if not name.startswith("_") and name != "annotations"}
    assert names.public_names(package) == {n for n in seen if not isinstance(getattr(module, n), ModuleType)}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name_and_no_other(package: str, names: ModuleType) -> None:
    assert list(names.problems(package, ROOT / "docs" / "reference" / names.PAGES[package])) == []


def test_names_that_are_loaded_when_asked_for_are_read_too(tmp_path: Path, names: ModuleType) -> None:
    package = tmp_path / "idle"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from idle.inner import Bare as Bare\n    from idle.inner import Told as Told\n"
    )
    (package / "inner.py").write_text(
        'raise ImportError("it is read, not imported")\n'
        'class Told:\n    """Says what it is."""\nclass Bare:\n    pass\n'
    )
    page = tmp_path / "idle.md"
    page.write_text("::: idle.Told\n\n::: idle.Told\n\n::: idle.inner\n")
    assert list(names.problems("idle", page, tmp_path)) == [
        "idle.md lacks idle.Bare",
        "idle.md has idle.inner, which is not public",
        "idle.md has idle.Told twice",
        "idle.Bare has no docstring",
    ]


def test_public_names_in_the_text_lead_to_the_reference(names: ModuleType) -> None:
    entries = {"coar.fit": "coar.fit", "Plan": "coar.Plan"}
    assert names.linked("<p><code>coar.fit(x)</code></p>", entries) == (
        '<p><autoref identifier="coar.fit"><code>coar.fit(x)</code></autoref></p>'
    )
    assert names.linked("<code>Plan.rows</code>", entries) == (
        '<autoref identifier="coar.Plan.rows" optional><code>Plan.rows</code></autoref>'
    )
    for html in (
        '<a href="x"><code>coar.fit</code></a>',
        "<pre><code>coar.fit</code></pre>",
        "<code>coar.fitted</code>",
    ):
        assert names.linked(html, entries) == html


def test_docstrings_are_read_as_they_are_written_here(monkeypatch: pytest.MonkeyPatch) -> None:
    readable = _hook("docstrings", monkeypatch).readable
    assert readable("Args:\n  low, high: The ends,\n    both.\n  k: Size.") == (
        "Args:\n  low: The ends,\n    both.\n  high: The ends,\n    both.\n  k: Size."
    )
    assert readable("First, second: prose.\nCost: one pass.") == "First, second: prose.\n\n**Cost:** one pass."


def test_what_a_page_or_a_style_sheet_fetches_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = "https://example.org/"
    (tmp_path / "page.html").write_text(
        f'<link rel="stylesheet" href="{remote}1"><script src="//example.org/2"></script>'
        f'<style>@import "{remote}3"</style>'
        f'<p style="background: url({remote}4)"><a href="{remote}paper">a paper</a><img src="5.png"></p>'
    )
    (tmp_path / "site.css").write_text(f"@font-face {{ src: url('{remote}6') }} p {{ background: url(7.png) }}")
    found = list(_hook("nothing_remote", monkeypatch).remote_resources(tmp_path))
    assert [resource.rstrip(">")[-1] for resource in found] == ["1", "2", "3", "4", "6"]


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(part)


def test_the_navigation_reaches_every_page_once() -> None:
    reached = list(_pages(load_config(str(ROOT / "mkdocs.yml")).nav))
    docs = ROOT / "docs"
    assert sorted(reached) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "assets" / "top_components.png").stat().st_size <= 150_000


FAULTY = """# Faulty

[a page](missing.md), [a heading](#missing), [a name][coar.missing], ![a picture](https://example.org/x.png)
"""


def test_a_fault_stops_the_build(tmp_path: Path) -> None:
    """With the site's own settings: a broken link, no such heading or name, a remote picture, a stray page."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Fine\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\nsite_dir: {tmp_path / 'site'}\ndocs_dir: {docs}\nextra_css: []\n"
        f"nav: [index.md]\nhooks: [{HOOKS / 'nothing_remote.py'}]\n"
    )

    def build() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "-f", str(tmp_path / "mkdocs.yml")]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    fine = build()
    assert fine.returncode == 0, fine.stderr
    (docs / "stray.md").write_text(FAULTY)
    faulty = build()
    assert faulty.returncode != 0
    for said in ('not included in the "nav"', "'missing.md'", "'#missing'", "coar.missing", "example.org/x.png"):
        assert said in faulty.stderr, faulty.stderr
