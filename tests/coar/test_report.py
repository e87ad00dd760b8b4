"""A report is one file that needs nothing else, shows quality and hashes, and treats every id as text."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

import coar
from coar.report import Section, edit_section, provenance_section, quality_section, write_report
from stores import CampaignStore

NASTY = '<b onclick="x()">&amp;</b>{{ 7 * 7 }}'


class _Page(HTMLParser):
    """What a browser would find: tags, every address that would be loaded, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _require_self_contained(page: str) -> None:
    found = _Page(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(found.tags)
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert not re.search(r"https?://|url\(|@import", page)


def _report(path: Path, attributions: coar.Attributions, *more: Section) -> str:
    sections = [quality_section(attributions), *more, provenance_section(attributions.header)]
    assert write_report(path, "Title", "Lead", sections) == path
    return path.read_text(encoding="utf-8")


def test_a_report_is_self_contained_and_complete(tiny_fit: coar.Attributions, tmp_path: Path) -> None:
    edit = coar.coar_edit(tiny_fit, [0, 1], [2, 3], k=2)
    page = _report(tmp_path / "new" / "report.html", tiny_fit, edit_section(edit))
    _require_self_contained(page)
    found = _Page(page)
    assert found.tags.count("img") == 2
    for address in found.addresses:
        assert base64.b64decode(address.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    of = tiny_fit.header["identity"]["of"]
    for value in (of["model"], of["data"], of["index"], "How good the attributions are", "The edit", "torch"):
        assert value in found.text or any(value in text for text in found.text)
    text = "".join(found.text)
    assert f"mean {tiny_fit.quality['correlation'].mean():.3f}" in text
    assert f"target {edit.details['predicted_change_target']:+.3f}" in text
    assert os.listdir(tmp_path / "new") == ["report.html"]


def test_names_are_text_never_html(write_attributions: Callable[..., coar.Attributions], tmp_path: Path) -> None:
    attributions = write_attributions([[1, 2], [3, 4]], ids=[NASTY, "b"], groups=["<i>", "<script>alert(1)</script>"])
    section = Section(NASTY, text=[NASTY], tables={NASTY: pd.DataFrame({NASTY: [NASTY]})})
    page = _report(tmp_path / "r.html", attributions, section)
    _require_self_contained(page)
    found = _Page(page)
    assert not {"b", "i"} & set(found.tags)
    assert found.text.count(NASTY) == 6  # title, paragraph, caption, column, cell; and the worst examples


def test_a_report_replaces_an_older_one_whole_or_not_at_all(tiny_fit: coar.Attributions, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    with pytest.raises(AttributeError, match="savefig"):
        write_report(path, "Title", "Lead", [Section("A", figures={"no figure": None})])  # type: ignore[dict-item]
    assert path.read_text() == "old"
    _report(path, tiny_fit)
    assert path.read_text().startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["r.html"]


def test_attributions_of_constant_outputs_can_be_reported(
    write_campaign: Callable[..., CampaignStore], planted_keep: npt.NDArray[np.bool_], tmp_path: Path
) -> None:
    attributions = coar.fit(write_campaign(planted_keep, np.full((200, 2), 0.1)))
    assert "mean nan" in _report(tmp_path / "r.html", attributions)


def test_one_example_can_be_reported(write_attributions: Callable[..., coar.Attributions], tmp_path: Path) -> None:
    assert "1 examples x 2 components" in _report(tmp_path / "r.html", write_attributions([[1, 2]]))


def test_an_edit_by_hand_predicts_nothing(tiny_fit: coar.Attributions) -> None:
    section = edit_section(coar.Edit(tiny_fit.index.select([1]), alpha=0.5))
    assert section.text == ["by hand: ablate 1 components at alpha = 0.5."]


def test_provenance_names_every_source(tiny_fit: coar.Attributions) -> None:
    tables = provenance_section(tiny_fit.header, {"fit": 1.25}).tables
    of = tiny_fit.header["identity"]["of"]
    hashes = tables["Hashes (sha256)"].set_index("key")["value"].to_dict()
    assert hashes == {name: of[name] for name in ("model", "data", "index")}
    assert tables["Keep plan"].set_index("key")["value"]["seed"] == "1"
    assert tables["Spec"].set_index("key")["value"]["rows"] == "300"
    assert "versions.torch" in tables["Written with"]
    assert tables["Timings of the run that wrote this report"].to_dict("list") == {"step": ["fit"], "seconds": ["1.2"]}
