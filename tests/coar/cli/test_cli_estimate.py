"""`coar estimate` on a small real spec: the same as `coar.estimate`, what it prints, its JSON, its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablate
import coar
import stores

Run = Callable[..., tuple[int, str, str]]


def estimated(path: Path) -> bytes:
    """Returns everything that an estimate stores per example, as bytes."""
    store = coar.open_attributions(path).store
    arrays = [store.weights[:], store.stderr[:], store.bias[:], *store.quality.values()]
    return b"".join(array.tobytes() for array in arrays)


def test_estimate(
    run: Run, run_json: Callable[..., Any], folder: Path, digits_spec: Callable[..., str], tmp_path: Path
) -> None:
    spec, target = tmp_path / "spec.toml", tmp_path / "mine-estimate.zarr"
    text = digits_spec(tmp_path / "mine.zarr").replace("rows = 60\n", "")  # an estimate needs none
    spec.write_text(text)
    code, out, err = run("estimate", spec, "--quality-rows", "10", "--quiet")
    assert (code, err) == (0, "")
    same = coar.open_attributions(folder / "campaign-estimate.zarr")  # by coar.estimate, from the same settings
    mean = same.quality["correlation"].mean()
    assert out == (
        f"16 attributions by gradient from 4 passes per example in {target}. Correlation on 10 held-out keep-vectors, "
        f"mean over examples: {mean:.3f}\n"
    )
    assert estimated(target) == estimated(folder / "campaign-estimate.zarr")
    assert coar.open_attributions(target).header["identity"] == same.header["identity"]
    assert run_json("estimate", spec, "--quality-rows", "10") == {
        "store": str(target),
        "method": "gradient",
        "examples": 16,
        "passes": 4.0,
        "ablate_fraction": 0.05,
        "held_out_correlation": pytest.approx(mean),
    }
    assert not (tmp_path / "mine.zarr").exists()  # no campaign was run
    code, _, err = run("ablate", spec)
    assert (code, "rows: missing" in err) == (2, True)


def test_estimate_with_every_option(
    run: Run, run_json: Callable[..., Any], folder: Path, untouched: Any, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "a.zarr"
    options: list[object] = ["--out", target, "--method", "gradient", "--ablate-fraction", "0.2"]
    options += ["--background", "mixed", "--passes", "auto", "--tolerance", "0.9", "--forward-rows", "12"]
    options += ["--quality-rows", "0", "--block-examples", "5", "--memory-gib", "1.5", "--quiet"]
    with untouched():
        code, out, err = run("estimate", folder / "spec.toml", *options)
    assert (code, err) == (0, "")
    assert out == f"16 attributions by gradient from 8 passes per example in {target}. Quality was not measured.\n"
    found = coar.open_attributions(target)
    expected = coar.estimate(
        ablate.CampaignSpec.from_dict(found.header["spec"], "the spec that was stored"),
        method=coar.Gradient("auto", 0.2, background="mixed", tolerance=0.9, forward_rows=12),
        quality_rows=0,
        block_examples=5,
    )
    assert found.header["identity"] == expected.header["identity"]
    assert (found.header["spec"]["passes"], found.header["spec"]["ablate_fraction"]) == ("auto", 0.2)
    np.testing.assert_array_equal(found.weights[:], expected.weights[:])
    assert found.store.block_examples == 5
    assert run_json("estimate", folder / "spec.toml", *options)["held_out_correlation"] is None
    assert repr(found) == f"<Attributions: 16 examples x 736 components, held-out correlation not measured, {target}>"


def test_estimate_by_a_baseline(run: Run, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    command = ("estimate", folder / "spec.toml", "--method", "gradient_times_gate", "--out", target)
    code, out, _ = run(*command, "--quality-rows", "0", "--quiet")
    assert code == 0
    assert out.startswith("16 attributions by gradient_times_gate from 1 pass per example in ")
    code, out, _ = run("top", target, "--example", "0", "-k", "1")
    assert code == 0
    assert out.splitlines()[-2].endswith("│  0.000 │ - │")  # no standard error, so no weight in units of it


def test_estimate_goes_on_where_it_stopped(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("estimate", folder / "spec.toml", "--quality-rows", "10", "--block-examples", "8", "--quiet", "--out")
    assert run(*command, tmp_path / "whole.zarr")[0] == 0
    write = stores.AttributionStore.write_block
    written: list[int] = []

    def killed(store: stores.AttributionStore, block: int, values: Any) -> None:
        if block == 1 and not written:
            written.append(block)
            raise OSError("the disk is full")
        write(store, block, values)

    monkeypatch.setattr(stores.AttributionStore, "write_block", killed)
    code, out, err = run(*command, tmp_path / "a.zarr")
    assert (code, out, err) == (1, "", "error: the disk is full\n")
    assert run("top", tmp_path / "a.zarr", "--example", "0")[0] == 3
    assert run(*command, tmp_path / "a.zarr")[0] == 0
    assert estimated(tmp_path / "a.zarr") == estimated(tmp_path / "whole.zarr")


def test_estimate_refuses_to_replace_another_estimate_unasked(run: Run, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    command = ("estimate", folder / "spec.toml", "--out", target, "--quality-rows", "0", "--quiet")
    assert run(*command)[0] == 0
    assert run(*command, "--passes", "3") == (
        4,
        "",
        f"error: Attribution store {target} was made from something else. What differs (stored -> now):\n"
        "  passes: 4 -> 3\n"
        "Name another store, or replace this one with overwrite=True (`--overwrite`).\n",
    )
    assert run(*command, "--passes", "3", "--overwrite")[0] == 0
    assert (coar.open_attributions(target).quality["passes"] == 3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--method", "gradeint"],
            "error: No method 'gradeint'. Did you mean 'gradient'? Regression (ridge, ols, lasso) needs a campaign: "
            "`coar ablate`, then `coar fit`.\n",
        ),
        (["--passes", "many"], "error: passes is 'many', expected an integer from 2 to 32,767, or 'auto'.\n"),
        (["--passes", "1"], "error: passes is 1, expected an integer from 2 to 32,767, or 'auto'.\n"),
        (["--tolerance", "0.1"], "error: tolerance is given beside 4 passes. Give it with --passes auto only.\n"),
        (
            ["--method", "random", "--passes", "3"],
            "error: Method 'random' has no setting 'passes'; it takes no settings.\n",
        ),
        (
            ["--method", "random", "--tolerance", "0.1"],
            "error: Method 'random' has no setting 'tolerance'; it takes no settings.\n",
        ),
        (["--quality-rows", "3"], "error: quality_rows is 3, expected 0 (none) or at least 10.\n"),
        (["--memory-gib", "0.01"], "error: memory=10,737,418 bytes is too small for 736 components: at least "),
        (["--ablate-fraction", "0.7"], "error: ablate_fraction is 0.7, expected "),
        (["--background", "mixd"], "error: background is 'mixd', expected "),
    ],
)
def test_estimate_refuses(run: Run, folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run("estimate", folder / "spec.toml", "--out", tmp_path / "a.zarr", *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert message.endswith(" ") or err == message
    assert not (tmp_path / "a.zarr").exists()


def test_estimate_at_one_of_several_fractions(
    run: Run, digits_spec: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(digits_spec().replace("= 0.05", "= [0.05, 0.1]"))
    command = ("estimate", tmp_path / "spec.toml", "--out", tmp_path / "a.zarr", "--quality-rows", "10", "--quiet")
    assert run(*command) == (
        2,
        "",
        f"error: {tmp_path}/spec.toml has several ablate fractions (0.05, 0.1), an estimate is about one. Choose it "
        "with --ablate-fraction.\n",
    )
    assert run(*command, "--ablate-fraction", "0.05")[0] == 0
    assert estimated(tmp_path / "a.zarr") == estimated(folder / "campaign-estimate.zarr")


def test_estimate_stops_at_an_output_that_is_no_number(
    run: Run, digits_spec: Callable[..., str], tmp_path: Path
) -> None:
    inputs = np.zeros((3, 1, 16, 16), dtype=np.float32)
    inputs[2, 0, 3, 3] = np.nan
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=[0, 1, 0], ids=["fine", "well", "sick"])
    text = digits_spec(tmp_path / "sick.zarr").split("[data]")[0]
    (tmp_path / "spec.toml").write_text(f'{text}\n[data]\nsource = "arrays"\npath = "{tmp_path}/data.npz"\n')
    code, out, err = run("estimate", tmp_path / "spec.toml", "--quiet")
    assert (code, out) == (1, "")
    assert "example 2" in err
    assert "(id 'sick') is nan, expected a finite number." in err
