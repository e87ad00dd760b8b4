"""Published attributions, of standardised masks, come out in units of the output; or what needs them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import coar
from coar.attributions.reload import reload_engine
from coar.errors import QueryError
from coar.interchange import InterchangeError, export, import_attributions
from coar.report.html import edit_section, quality_section

ROWS, COMPONENTS, EXAMPLES = 400, 6, 5
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def _published_fit(masks: Bools, outputs: Floats, share: float) -> dict[str, torch.Tensor]:
    """Least squares as the published solver sees it: masks standardised by the share of True, the mean in the bias."""
    seen = (masks - share) / np.sqrt(share * (1 - share))
    design = np.column_stack([seen, np.ones(len(masks))])
    solved = np.linalg.lstsq(design, outputs, rcond=None)[0]
    return {"weight": torch.from_numpy(solved[:-1]), "bias": torch.from_numpy(solved[-1])}


@pytest.fixture
def truth() -> tuple[Floats, Floats]:
    """The effect of each component (examples, components), and the output without any."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(EXAMPLES, COMPONENTS)), generator.normal(size=EXAMPLES)


def _keep(fraction: float, rows: int = ROWS, seed: int = 1) -> Bools:
    return np.random.default_rng(seed).random((rows, COMPONENTS)) >= fraction


def _outputs(keep: Bools, truth: tuple[Floats, Floats]) -> Floats:
    found: Floats = keep @ truth[0].T + truth[1]
    return found


@pytest.fixture
def file(tmp_path: Path, truth: tuple[Floats, Floats]) -> Path:
    """What the published regression writes of a campaign at 5 %."""
    keep = _keep(0.05)
    torch.save(_published_fit(keep, _outputs(keep, truth), 0.95), tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("meaning", ["kept", "ablated"])
def test_predictions_are_the_outputs(
    fraction: float, meaning: Any, tmp_path: Path, truth: tuple[Floats, Floats]
) -> None:
    keep = _keep(fraction)
    masks, share = (keep, 1 - fraction) if meaning == "kept" else (~keep, fraction)
    torch.save(_published_fit(masks, _outputs(keep, truth), share), tmp_path / "a.pt")
    found = import_attributions(tmp_path / "a.pt", tmp_path / "a.zarr", ablate_fraction=fraction, true_means=meaning)
    fresh = _keep(0.3, rows=20, seed=2)
    np.testing.assert_allclose(found.predict(fresh), _outputs(fresh, truth), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.weights[:], truth[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.bias[:], truth[1], rtol=1e-4, atol=1e-5)
    assert found.in_output_units
    assert "units" not in found.top(0, 3)
    edit = coar.coar_edit(found, [0, 1], [2, 3], k=2)
    ids = list(edit.selection.ids)
    assert edit.details["predicted_change_target"] == pytest.approx(-truth[0][:2][:, ids].mean(axis=0).sum(), rel=1e-4)


def test_the_ablate_fraction_must_be_said(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"per standard deviation of the masks, .*`--ablate-fraction 0\.05`"):
        import_attributions(file, tmp_path / "a.zarr")
    with pytest.raises(InterchangeError, match=r"ablate_fraction is 1\.5, expected a number between 0 and 1"):
        import_attributions(file, tmp_path / "a.zarr", ablate_fraction=1.5)
    with pytest.raises(InterchangeError, match=r"ablate_fraction is 'unknwon', expected a number between 0 and 1"):
        import_attributions(file, tmp_path / "a.zarr", ablate_fraction="unknwon")  # type: ignore[arg-type]
    assert not (tmp_path / "a.zarr").exists()


def test_an_export_says_it_itself(tmp_path: Path, write_attributions: Callable[..., coar.Attributions]) -> None:
    own = write_attributions(np.random.default_rng(4).standard_normal((6, 30)))
    path = export(own, tmp_path / "own.pt")
    found = import_attributions(path, tmp_path / "a.zarr")
    np.testing.assert_allclose(found.weights[:], own.weights[:], rtol=1e-6)
    np.testing.assert_allclose(found.bias[:], own.bias[:], rtol=1e-4, atol=1e-5)
    with pytest.raises(InterchangeError, match=r"the ablate fraction is given as 0\.11, but the file says"):
        import_attributions(path, tmp_path / "b.zarr", ablate_fraction=0.11)


@pytest.fixture
def unknown(file: Path, tmp_path: Path) -> coar.Attributions:
    """Imported without knowing the ablate fraction."""
    return import_attributions(file, tmp_path / "unknown.zarr", ablate_fraction="unknown")


def test_without_the_fraction_every_number_says_so(unknown: coar.Attributions, tmp_path: Path) -> None:
    assert not unknown.in_output_units
    assert repr(unknown).endswith(", not in units of the output>")
    for table in (unknown.top(0, 3), unknown.for_component(0, 2), unknown.by_layer()):
        assert set(table["units"]) == {"not in units of the output"}
    with pytest.raises(
        QueryError, match=r"A prediction needs weights in units of the output, .* --ablate-fraction 0\.05"
    ):
        unknown.predict(np.ones((1, COMPONENTS), dtype=bool))
    edit = coar.coar_edit(unknown, [0, 1], [2, 3], k=2)
    assert "predicted_change_target" not in edit.details
    expected = "No change of the output is predicted: the attributions are not in units of the output."
    assert expected in edit_section(edit).text
    assert any("Weights are not in units of the output" in text for text in quality_section(unknown).text)
    again = import_attributions(export(unknown, tmp_path / "b.pt"), tmp_path / "b.zarr", ablate_fraction="unknown")
    np.testing.assert_array_equal(again.weights[:], unknown.weights[:])


def test_the_ranking_of_an_edit_does_not_depend_on_units(
    file: Path, unknown: coar.Attributions, tmp_path: Path
) -> None:
    known = import_attributions(file, tmp_path / "a.zarr", ablate_fraction=0.05)
    edits = [coar.coar_edit(found, [0, 1], [2, 3], k=3).details["ids_in_order"] for found in (known, unknown)]
    assert edits[0] == edits[1]


def test_attributions_of_other_units_are_not_compared(file: Path, unknown: coar.Attributions, tmp_path: Path) -> None:
    known = import_attributions(file, tmp_path / "a.zarr", ablate_fraction=0.05)
    with pytest.raises(
        QueryError, match=r"A comparison with attributions in units of the output needs weights in units"
    ):
        coar.compare(known, unknown)


def test_imports_of_before_are_not_in_units_of_the_output(unknown: coar.Attributions) -> None:
    identity = {name: value for name, value in unknown.header["identity"].items() if name != "units"}
    unknown.header = {**unknown.header, "identity": identity}
    assert not unknown.in_output_units


@pytest.fixture
def spoilt(file: Path) -> Path:
    """A file in which example 1 has a NaN among its weights, and example 3 an infinite bias."""
    values = torch.load(file, weights_only=True)
    values["weight"][2, 1], values["bias"][3] = float("nan"), float("inf")
    torch.save(values, file)
    return file


def test_one_nan_does_not_refuse_a_file(spoilt: Path, tmp_path: Path, truth: tuple[Floats, Floats]) -> None:
    with pytest.raises(
        InterchangeError, match=r"weights of example 1, component 2 is nan, .*; 2 examples have such num"
    ):
        import_attributions(spoilt, tmp_path / "a.zarr", ablate_fraction=0.05)
    found = import_attributions(spoilt, tmp_path / "a.zarr", ablate_fraction=0.05, on_nan="drop")
    assert found.examples["id"].tolist() == ["0", "2", "4"]
    np.testing.assert_allclose(found.weights[:], truth[0][[0, 2, 4]], rtol=1e-5, atol=1e-5)
    assert found.header["identity"]["imported"]["drop"] == 2


def test_examples_without_an_attribution_keep_their_places(
    spoilt: Path, tmp_path: Path, truth: tuple[Floats, Floats]
) -> None:
    found = import_attributions(spoilt, tmp_path / "a.zarr", ablate_fraction=0.05, on_nan="keep")
    assert (len(found), sorted(found.lacking)) == (EXAMPLES, [1, 3])
    assert np.isnan(found.weights[1]).all()
    assert np.isnan(found.bias[3])
    np.testing.assert_allclose(found.weights[4], truth[0][4], rtol=1e-5, atol=1e-5)
    for ask in (found.top, found.nearest, lambda i, k: found.by_layer(i)):
        with pytest.raises(
            QueryError, match=r"^Example 1 \('1'\) has no attribution: its numbers in the imported file"
        ):
            ask(1, 2)
    with pytest.raises(coar.errors.EditError, match=r"^Example 3 has no attribution"):
        coar.coar_edit(found, [0, 3], [2, 4], k=2)
    assert found.nearest(0, 2)["example"].isin([2, 4]).all()
    assert found.nearest(0, 2, exact=False)["example"].isin([2, 4]).all()
    assert found.for_component(0, 3)["example"].isin([0, 2, 4]).all()
    expected = np.abs(truth[0][[0, 2, 4]]).sum(axis=1).mean()
    assert found.by_layer()["absolute"].sum() == pytest.approx(expected, rel=1e-4)


def test_a_file_of_nothing_but_nan_is_refused(spoilt: Path, tmp_path: Path) -> None:
    values = torch.load(spoilt, weights_only=True)
    torch.save({**values, "bias": torch.full((EXAMPLES,), float("nan"))}, spoilt)
    with pytest.raises(InterchangeError, match=r"5 examples have such numbers, of 5\. .* Compute the file again\."):
        import_attributions(spoilt, tmp_path / "a.zarr", ablate_fraction=0.05, on_nan="drop")


def test_what_needs_the_model_advises_a_spec(file: Path, tmp_path: Path) -> None:
    found = import_attributions(file, tmp_path / "a.zarr", ablate_fraction=0.05)
    with pytest.raises(
        QueryError, match=r"was imported without a spec, .* Import the file again, all examples of it, with"
    ):
        reload_engine(found)


def test_the_command(
    run: Callable[..., tuple[int, str, str]], run_json: Callable[..., Any], spoilt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    code, _, err = run("import", spoilt, "--out", out, "--quiet")
    assert code != 0
    assert "--ablate-fraction 0.05" in err
    code, _, err = run("import", spoilt, "--out", out, "--quiet", "--ablate-fraction", "0.05")
    assert code != 0
    assert "--on-nan drop" in err
    common = ("import", spoilt, "--quiet", "--out")
    code, text, _ = run(*common, out, "--ablate-fraction", "unknown", "--on-nan", "keep")
    assert (code, text) == (
        0,
        f"5 attributions of 6 components in {out}. Quality: not measured. Weights are not in units of the output: "
        "predictions will be refused. 2 examples with NaN or infinity kept without an attribution.\n",
    )
    found = run_json(*common, tmp_path / "b.zarr", "--ablate-fraction", "0.05", "--on-nan", "drop")
    assert (found["in_output_units"], found["examples"], found["examples_dropped"]) == (True, 3, 2)
    plain = run_json(*common, tmp_path / "c.zarr", "--not-standardised", "--on-nan", "drop")
    assert plain["in_output_units"]
    code, text, _ = run(
        "edit", out, "--target", "0", "--target", "2", "--reference", "4", "-k", "2", "--out", tmp_path / "e"
    )
    assert code == 0
    assert "No change of the output is predicted: the attributions are not in units of the output" in text
