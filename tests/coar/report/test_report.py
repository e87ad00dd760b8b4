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
from torch import nn

import ablate
import coar
from coar.report.html import Section, edit_section, provenance_section, quality_section, stderr_meaning, write_report
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
    sections = [quality_section(attributions), *more, provenance_section(attributions)]
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
    page = _report(tmp_path / "r.html", attributions)
    assert "keep-vectors: mean undefined: outputs are constant." in page
    assert "nan" not in page


def _tiny_estimate(
    model: nn.Module, examples: ablate.Examples, method: str | coar.Estimator, quality_rows: int = 10
) -> coar.Attributions:
    fraction = None if isinstance(method, coar.Gradient) else 0.2
    return coar.estimate(model, examples, method=method, ablate_fraction=fraction, quality_rows=quality_rows)


def test_an_estimate_can_be_reported(tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path) -> None:
    found = _tiny_estimate(tiny_net, tiny_examples, coar.Gradient(passes=6, ablate_fraction=0.2))
    _require_self_contained(_report(tmp_path / "r.html", found))
    quality = quality_section(found)
    correlation = found.quality["correlation"]
    assert list(quality.text) == [
        "9 examples x 10 components, by gradient, 6 passes per example.",
        "Correlation of predicted with true outputs on 10 held-out keep-vectors (20 % of the components ablated): mean "
        f"{correlation.mean():.3f}, median {correlation.median():.3f}; share of examples below 0.5: "
        f"{(correlation < 0.5).mean():.1%}.",
        "Standard errors say how far each weight may be from that of infinitely many passes, judged by all examples "
        "that were estimated together: intervals of 1.96 of them are meant to hold it in 95 % of cases. They do not "
        "count the small bias that comes of gates between 0 and 1.",
    ]
    assert list(quality.tables["Quality per example (correlation and r2 on held-out rows)"]) == [
        "statistic",
        "correlation",
        "r2",
        "residual_sd",
        "passes",
    ]
    tables = provenance_section(found).tables
    assert tables["Method"].set_index("key")["value"].to_dict() == {
        "method": "gradient",
        "passes": "6",
        "ablate_fraction": "0.2",
        "background": "mixed",
        "tolerance": "0.02",
        "most_passes": "1000",
        "forward_rows": "0",
        "quality_rows": "10",
    }
    assert tables["Ablate fraction and seed"].to_dict("list") == {
        "key": ["ablate_fraction", "seed"],
        "value": ["0.2", "0"],
    }
    assert not {"passes", "rows", "block_rows", "store"} & set(tables["Spec"]["key"])  # of the spec, but not used


def test_a_quality_that_was_not_measured_is_called_so(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tiny_campaign: CampaignStore, tmp_path: Path
) -> None:
    estimate = _tiny_estimate(tiny_net, tiny_examples, "leave_one_out", quality_rows=0)
    for found in (estimate, coar.fit(tiny_campaign, held_out=False)):
        page = _report(tmp_path / "r.html", found)
        assert "How well they predict outputs was not measured: no rows were held out." in page
        assert "nan" not in "".join(_Page(page).text).lower()
        assert _Page(page).tags.count("img") == 1
        assert "held-out correlation not measured, " in repr(found)
    assert quality_section(estimate).text[0] == "9 examples x 10 components, by leave_one_out, 11 passes per example."


@pytest.mark.parametrize("method", [*coar.estimator_names(), "ridge", "ols", "lasso"])
def test_what_standard_errors_count_is_told_for_every_method(method: str) -> None:
    assert "see the method" not in stderr_meaning({"method": method})


def test_what_standard_errors_count() -> None:
    assert stderr_meaning({"method": "ridge", "ridge": 0.0}) == stderr_meaning({"method": "ols"})
    exact = stderr_meaning({"method": "gradient", "background": "bernoulli"})
    assert stderr_meaning({"method": "gradient", "background": "mixed"}) == (
        f"{exact} They do not count the small bias that comes of gates between 0 and 1."
    )
    assert stderr_meaning({"method": "mine"}) == "For what the standard errors count, see the method: mine."


def test_one_example_can_be_reported(write_attributions: Callable[..., coar.Attributions], tmp_path: Path) -> None:
    assert "1 examples x 2 components" in _report(tmp_path / "r.html", write_attributions([[1, 2]]))


def test_an_edit_by_hand_predicts_nothing(tiny_fit: coar.Attributions) -> None:
    section = edit_section(coar.Edit(tiny_fit.index.select([1]), alpha=0.5))
    assert section.text == ["by hand: ablate 1 components at alpha = 0.5."]


def test_provenance_names_every_source(tiny_fit: coar.Attributions) -> None:
    tables = provenance_section(tiny_fit, {"fit": 1.25}).tables
    of = tiny_fit.header["identity"]["of"]
    hashes = tables["Hashes (sha256)"].set_index("key")["value"].to_dict()
    assert hashes == {name: of[name] for name in ("model", "data", "index")}
    assert tables["Keep plan"].set_index("key")["value"]["seed"] == "1"
    assert tables["Spec"].set_index("key")["value"]["rows"] == "300"
    assert "versions.torch" in tables["Written with"]
    assert tables["Timings of the run that wrote this report"].to_dict("list") == {"step": ["fit"], "seconds": ["1.2"]}
