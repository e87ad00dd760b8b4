"""Holds the reference to the packages' public names, and links names in the text to it.

Hooks of mkdocs. The packages are read, never imported. A warning stops a strict build.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

log = logging.getLogger("mkdocs.hooks.public_names")
ROOT = Path(__file__).resolve().parents[2]
PAGES = {"ablate": "ablate.md", "coar": "coar.md", "coar.metrics": "metrics.md", "stores": "stores.md"}

# Code, with what is called on it, as in `ablate.Engine(...)`; before it, what a link inside would break.
_CODE = re.compile(r"<(pre|a|h[1-6])\b.*?</\1>|<code>(?P<name>\w+(?:\.\w+)*)(?:\([^<]*)?</code>", re.DOTALL)


def public_names(package: str, root: Path = ROOT) -> set[str]:
    """Returns the names that a package passes on: those that its `__init__` imports as themselves, wherever in it."""
    source = (root / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.asname == alias.name}


def problems(package: str, page: Path, root: Path = ROOT) -> Iterator[str]:
    """Yields what is wrong with a package's page of the reference."""
    public = {f"{package}.{name}" for name in public_names(package, root)}
    entries = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    yield from (f"{page.name} lacks {name}" for name in sorted(public - set(entries)))
    yield from (f"{page.name} has {name}, which is not public" for name in sorted(set(entries) - public))
    yield from (f"{page.name} has {name} twice" for name in sorted(public) if entries.count(name) > 1)
    read = griffe.load(package, search_paths=[root], allow_inspection=False, resolve_aliases=True)
    yield from (f"{name} has no docstring" for name in sorted(public) if not read[name.split(".")[-1]].has_docstring)


def _entries() -> dict[str, str]:
    """Returns the entry that a name in the text leads to: full names, and classes by their name alone."""
    known = {f"{package}.{name}": f"{package}.{name}" for package in PAGES for name in public_names(package)}
    for full in known.copy():
        short = full.rpartition(".")[2]
        if re.match(r"[A-Z]\w*[a-z]", short):
            known.setdefault(short, full)
    return known


def linked(html: str, entries: dict[str, str]) -> str:
    """Returns a page's html with public names that stand as code linked to their entries in the reference."""

    def link(found: re.Match[str]) -> str:
        name = found["name"] or ""
        head = next((known for known in entries if name == known or name.startswith(f"{known}.")), None)
        if head is None:
            return found[0]
        member = name.removeprefix(head)  # a field, which stands in its class's table, has no entry of its own
        return f'<autoref identifier="{entries[head]}{member}"{" optional" if member else ""}>{found[0]}</autoref>'

    return _CODE.sub(link, html)


def on_pre_build(config: Any) -> None:
    """Called by mkdocs before it builds."""
    for package, page in PAGES.items():
        for problem in problems(package, Path(config.docs_dir) / "reference" / page):
            log.warning(problem)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page's html. Autorefs comes later, and warns of names without an entry."""
    return linked(html, _entries())
