"""Stops the build where a page or a style sheet would fetch something: the site must work without a network."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.nothing_remote")
FETCHED = {"src", "srcset", "data", "poster", "background"}  # of any tag; `href` of all but links to follow
FOLLOWED = {"a", "area"}
_IN_STYLE = re.compile(r"(?:@import\s+(?:url\()?|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


class _Resources(HTMLParser):
    """Collects what a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            is_fetched = name in FETCHED or (name == "href" and tag not in FOLLOWED)
            if is_fetched and re.match(r"\s*(https?:)?//", value or "", re.IGNORECASE):
                self.remote.append(f"<{tag} {name}={value}>")
            elif name == "style":
                self.remote += _IN_STYLE.findall(value or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.remote += _IN_STYLE.findall(data)


def remote_resources(site: Path) -> Iterator[str]:
    """Yields what the built pages and style sheets fetch from elsewhere, with the file's name."""
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            parser = _Resources()
            parser.feed(file.read_text(encoding="utf-8"))
            found = parser.remote
        elif file.suffix in (".css", ".svg"):
            found = _IN_STYLE.findall(file.read_text(encoding="utf-8"))
        else:
            continue
        yield from (f"{file.relative_to(site)}: {resource}" for resource in found)


def on_post_build(config: Any) -> None:
    """Called by mkdocs after it has built."""
    for resource in remote_resources(Path(config.site_dir)):
        log.warning("fetched from elsewhere: %s", resource)
