"""Commands that ask, judge, edit and report, on attributions of a campaign and on estimates from gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablate
import coar
from coar.attributions.reload import reload_engine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["attributions", "estimate"])
def attributions(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The attribution stores of `folder`: fitted to a campaign, and estimated from gradients."""
    return folder / f"campaign-{request.param}.zarr"


def test_evaluate(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    found = run_json("evaluate", attributions, "--rows", "12", "--ablate-fraction", "0.1", "--seed", "3")
    assert (found["rows"], found["seed"], len(found["fractions"])) == (12, 3, 1)
    statistics = ["mean", "low", "high", "25%", "median", "75%", "share below 0.5", "spearman", "examples"]
    assert list(found["fractions"][0]) == ["ablate_fraction", *statistics]
    opened = coar.open_attributions(attributions)
    expected = coar.evaluate(opened, *reload_engine(opened), rows=12, ablate_fraction=0.1, seed=3).table()
    assert found["fractions"][0] == pytest.approx(expected.iloc[0].to_dict())
    code, out, _ = run("evaluate", attributions, "--rows", "12", "--seed", "3")
    assert code == 0
    assert out.startswith("Correlation on 12 fresh keep-vectors; low and high: 95 % interval of the mean.\n")
    assert "0.050" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--seed", "0"],
            "error: seed=0 is the one that these attributions were made with. Give another seed.",
        ),
        (["--ablate-fraction", "2"], "error: ablate_fraction is 2.0, expected a number between 0 and 1 (exclusive)."),
    ],
)
def test_evaluate_refuses(run: Run, attributions: Path, options: list[str], message: str) -> None:
    assert run("evaluate", attributions, "--rows", "12", *options) == (2, "", message + "\n")


def test_top(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    opened = coar.open_attributions(attributions)
    name = opened.examples["id"][3]
    table = opened.top(3, 4)
    code, out, _ = run("top", attributions, "--id", name, "-k", "4")
    assert code == 0
    assert out.startswith(f"Example 3: id {name}, label {opened.examples['label'][3]}, group ")
    assert all(component in out for component in table["name"])
    found = run_json("top", attributions, "--example", "3", "-k", "4")
    assert [row["component"] for row in found] == table["component"].tolist()
    assert list(found[0]) == list(table)
    positive = run_json("top", attributions, "--example", "3", "-k", "4", "--sign", "positive")
    assert all(row["weight"] > 0 for row in positive)


def test_top_draws_a_figure(run: Run, attributions: Path, tmp_path: Path) -> None:
    figure = tmp_path / "new" / "top.png"
    assert run("top", attributions, "--example", "0", "--figure", figure)[0] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--id", "train/digit-99999"], "error: No example with id 'train/digit-99999'. Did you mean 'train/digit-"),
        (["--example", "16"], "error: No example 16: positions are 0 to 15. Find one by id with locate([...])."),
        (["--example", "0", "-k", "0"], "error: k is 0, expected 1 to 736: there are 736 components."),
        (["--example", "0", "--sign", "up"], "error: No sign 'up'. Known: both, positive, negative."),
    ],
)
def test_top_refuses(run: Run, attributions: Path, options: list[str], message: str) -> None:
    code, out, err = run("top", attributions, *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --example or --id"),
        (["--example", "0", "--id", "a"], "give either --example or --id"),
        (["--example", "0", "--figure", "top.doc"], "--figure is top.doc; its name must end in one of"),
        (["--example", "first"], "Invalid value for '--example'"),
    ],
)
def test_top_refuses_wrong_usage(run: Run, attributions: Path, options: list[str], message: str) -> None:
    code, out, err = run("top", attributions, *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_ids_are_printed_as_they_are(
    run: Run, write_attributions: Callable[..., coar.Attributions], tmp_path: Path
) -> None:
    write_attributions([[1, 2]], tmp_path / "a.zarr", ids=["[/red]:cat:[b]"], groups=["[bold]"])
    code, out, _ = run("top", tmp_path / "a.zarr", "--example", "0", "-k", "1")
    assert code == 0
    assert out.startswith("Example 0: id [/red]:cat:[b], label 0, group [bold]\n")


def test_edit_and_report(run: Run, run_json: Callable[..., Any], attributions: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "fix.safetensors"
    changed, kept = ("low-horizontal", "high-vertical"), ("low-vertical", "high-horizontal")
    options = ["--ids-contain", "train/", "-k", "7", "--out", str(out_file)]
    for option, groups in (("--target-group", changed), ("--reference-group", kept)):
        options += [word for group in groups for word in (option, group)]
    opened = coar.open_attributions(attributions)
    target, reference = ([i for g in groups for i in opened.group(g, "train/")] for groups in (changed, kept))
    code, out, _ = run("edit", attributions, *options)
    assert code == 0
    assert out.startswith(f"<Edit: ablate 7 of 736 components at alpha=1, by COAR-Edit> -> {out_file}. Predicted ")
    expected = coar.coar_edit(opened, target, reference, k=7)
    assert coar.load_edit(out_file) == expected
    found = run_json("edit", attributions, *options)
    assert found["ids"] == list(expected.selection.ids)
    assert found["details"] == json.loads(json.dumps(dict(expected.details)))

    page = tmp_path / "report.html"
    assert run("report", attributions, "--out", page, "--edit", out_file) == (0, f"Report: {page}\n", "")
    text = page.read_text()
    assert "The edit" in text
    assert f"mean {opened.quality_text()}, median " in text
    assert opened.header["identity"]["method"] in text
    assert opened.header["identity"]["of"]["model"] in text


def test_one_against_one_is_ranked_by_difference(
    run_json: Callable[..., Any], attributions: Path, tmp_path: Path
) -> None:
    found = run_json(
        "edit", attributions, "--target", "0", "--reference", "1", "-k", "3", "--out", tmp_path / "fix.safetensors"
    )
    opened = coar.open_attributions(attributions)
    difference = np.asarray(opened.weights[0], dtype=float) - np.asarray(opened.weights[1], dtype=float)
    assert found["details"]["statistic"] == "difference"
    assert found["details"]["scores"] == pytest.approx(sorted(difference)[:3], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: The target set is empty: give the positions of at least one example."),
        (["--target", "0"], "error: The reference set is empty: give the positions of at least one example."),
        (["--target", "0", "--reference", "0"], "error: Examples [0] are in target and reference: each example can be"),
        (["--target-group", "low"], "error: No group 'low'."),
        (["--target", "0", "--reference", "1", "-k", "0"], "error: k is 0, expected an integer from 1 to 736, the nu"),
        (
            ["--target", "0", "--reference", "1", "--direction", "up"],
            "error: direction is 'up', expected 'raise' or 'lower'.",
        ),
    ],
)
def test_edit_refuses(run: Run, attributions: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run("edit", attributions, "--out", tmp_path / "fix.safetensors", *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert not (tmp_path / "fix.safetensors").exists()


def test_report_refuses_an_edit_of_another_index(run: Run, attributions: Path, tmp_path: Path) -> None:
    index = ablate.ComponentIndex.from_model(torch.nn.Linear(2, 3), ["linear_neuron"])
    coar.Edit(index.select([0])).save(tmp_path / "other.safetensors")
    page = tmp_path / "report.html"
    code, _, err = run("report", attributions, "--out", page, "--edit", tmp_path / "other.safetensors")
    assert code == 2
    assert "Give an edit of the same model." in err
    assert not page.exists()


def test_evaluate_at_several_fractions(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    options = ["--rows", "4", "--ablate-fraction", "0.2", "--ablate-fraction", "0.0000001"]
    found = run_json("evaluate", attributions, *options)["fractions"]
    assert [row["ablate_fraction"] for row in found] == [0.2, 1e-7]
    assert found[:1] == run_json("evaluate", attributions, *options[:4])["fractions"]
    assert (found[1]["mean"], found[1]["examples"]) == (None, 0)
    code, out, _ = run("evaluate", attributions, *options)
    assert code == 0
    assert out.endswith(
        "At 1e-07, 16 of 16 examples have no correlation: their predicted or true outputs are the same in all rows.\n"
    )


def test_nearest(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    opened = coar.open_attributions(attributions)
    table = opened.nearest(3, 2)
    code, out, _ = run("nearest", attributions, "--example", "3", "-k", "2")
    assert code == 0
    assert out.startswith(f"Example 3: id {opened.examples['id'][3]}, label ")
    assert all(name in out for name in table["id"])
    found = run_json("nearest", attributions, "--id", opened.examples["id"][3], "-k", "2")
    assert list(found[0]) == list(table)
    assert [row["example"] for row in found] == table["example"].tolist()
    assert run("nearest", attributions, "--example", "3", "-k", "16") == (
        2,
        "",
        "error: k is 16, expected 1 to 15: there are 15 other examples.\n",
    )


def test_compare(run: Run, run_json: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    attributions = folder / "campaign-attributions.zarr"
    other = coar.fit(folder / "campaign.zarr", tmp_path / "b.zarr", ridge=5.0)
    expected = coar.compare(coar.open_attributions(attributions), other, k=7)
    code, out, _ = run("compare", attributions, tmp_path / "b.zarr", "-k", "7")
    assert code == 0
    assert out.startswith(f"{expected!r}\n")
    assert out.endswith("\nEstimated differently (A -> B):\n  ridge: chosen per example -> 5.0\n")
    found = run_json("compare", attributions, tmp_path / "b.zarr", "-k", "7")
    assert (found["examples"], found["k"]) == (16, 7)
    assert found["differences"] == ["ridge: chosen per example -> 5.0"]
    means = {row["measure"]: row["mean"] for row in found["measures"]}
    assert means == pytest.approx(expected.summary().set_index("measure")["mean"].to_dict())


def test_compare_an_estimate_with_a_fit(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    estimate, fit = folder / "campaign-estimate.zarr", folder / "campaign-attributions.zarr"
    expected = coar.compare(coar.open_attributions(estimate), coar.open_attributions(fit))
    found = run_json("compare", estimate, fit)
    means = {row["measure"]: row["mean"] for row in found["measures"]}
    assert means == pytest.approx(expected.summary().set_index("measure")["mean"].to_dict())
    assert {"method: gradient -> ridge", "passes: 4 -> nothing"} <= set(found["differences"])
    assert not any(key in difference for difference in found["differences"] for key in ("model", "data", "index"))
    code, out, _ = run("compare", estimate, estimate)
    assert code == 0
    assert "Estimated differently" not in out


def test_compare_refuses_other_components(
    run: Run, attributions: Path, tmp_path: Path, write_attributions: Callable[..., coar.Attributions]
) -> None:
    write_attributions([[1, 2]], tmp_path / "c.zarr")
    code, out, err = run("compare", attributions, tmp_path / "c.zarr")
    assert (code, out) == (2, "")
    assert err.endswith("Only attributions of the same components can be compared.\n")
