"""Import of campaigns: the folders that the published code leaves, finished or not, checked before they are data."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from torch import nn
from zarr.storage import MemoryStore

import ablate
import coar
import stores
from coar.attributions.reload import reload_engine
from coar.interchange import InterchangeError, import_campaign, importing, incumbent
from coar.interchange.subject import read_index

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
COMPONENTS, EXAMPLES, FRACTION = 40, 6, 0.2


def make_folder(folder: Path, masks: Bools, margins: Floats, completed: Bools, split: str = "test") -> Path:
    """Fills a folder as the published code does: arrays full of zeros, then row by row, the mark last."""
    folder.mkdir(parents=True)
    names = {"masks": masks, f"{split}_margins": margins, "_completed": completed}
    for name, values in names.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", values.dtype, values.shape).flush()
    for row in np.random.default_rng(0).permutation(np.flatnonzero(completed)):
        for name, values in names.items():
            array = np.lib.format.open_memmap(folder / f"{name}.npy", "r+")
            array[row] = values[row]
            array.flush()
    return folder


@pytest.fixture(scope="module")
def linear() -> tuple[Floats, Floats]:
    """Planted weights (examples, components) and biases (examples,), exact in float16 as all their sums are."""
    generator = np.random.default_rng(1)
    return generator.integers(-8, 9, (EXAMPLES, COMPONENTS)) / 16, generator.integers(-8, 9, EXAMPLES) / 16


@pytest.fixture(scope="module")
def masks() -> Bools:
    """Masks (200, components) drawn as the published code draws them: True = kept."""
    return np.random.default_rng(2).random((200, COMPONENTS)) < 1 - FRACTION


@pytest.fixture(scope="module")
def margins(masks: Bools, linear: tuple[Floats, Floats]) -> npt.NDArray[np.float16]:
    """Margins (200, examples) float16, exactly linear in the masks."""
    return (masks @ linear[0].T + linear[1]).astype(np.float16)


@pytest.fixture(scope="module")
def completed() -> Bools:
    """All rows but each seventh and the last thirty."""
    completed: Bools = np.arange(200) % 7 != 3
    completed[170:] = False
    return completed


@pytest.fixture
def published(tmp_path: Path, masks: Bools, margins: Floats, completed: Bools) -> Path:
    """A folder of the published code whose run has not finished."""
    return make_folder(tmp_path / "run", masks, margins, completed)


def _overwrite(path: Path, values: npt.NDArray[Any]) -> None:
    np.save(path, values, allow_pickle=False)


def test_completed_rows_become_a_campaign(
    published: Path, tmp_path: Path, masks: Bools, margins: Floats, completed: Bools
) -> None:
    campaign = import_campaign(published, tmp_path / "a.zarr")
    assert campaign.progress.complete
    np.testing.assert_array_equal(campaign.keep[:], masks[completed], strict=True)
    np.testing.assert_array_equal(campaign.outputs[:], margins[completed].astype(np.float32), strict=True)
    identity = campaign.header["identity"]
    assert identity["imported"] == {
        "files": {
            name: hashlib.sha256((published / name).read_bytes()).hexdigest()
            for name in ("masks.npy", "test_margins.npy", "_completed.npy")
        },
        "rows_in_files": 200,
        "all_assumed_completed": False,
        "true_means": "kept",
    }
    assert identity["plan"]["ablate_fraction"] == round(1 - masks[completed].mean(), 6)
    assert identity["plan"]["rows"] == campaign.rows == completed.sum()
    assert (identity["model"], identity["data"]) == (None, "not known (imported)")
    assert campaign.header["loadable"] is False
    assert campaign.examples["id"].tolist() == list("012345")
    assert campaign.components["name"][2] == "unknown:component[2]"


def test_a_fit_on_it_finds_the_planted_weights(published: Path, tmp_path: Path, linear: tuple[Floats, Floats]) -> None:
    attributions = coar.fit(import_campaign(published, tmp_path / "a.zarr"), method="ols")
    np.testing.assert_allclose(attributions.weights[:], linear[0], atol=1e-5)
    np.testing.assert_allclose(attributions.bias[:], linear[1], atol=1e-4)
    assert attributions.quality["correlation"].min() > 0.9999


def test_without_a_spec_it_fits_no_model(published: Path, tmp_path: Path, conv_net: nn.Module) -> None:
    attributions = coar.fit(import_campaign(published, tmp_path / "a.zarr"), tmp_path / "b.zarr")
    edit = coar.coar_edit(attributions, [0, 1], [2, 3], k=3)
    with pytest.raises(coar.EditMismatchError, match="no parameter 'unknown'"):
        edit.apply(conv_net)
    with pytest.raises(coar.QueryError, match="was made from Python objects"):
        reload_engine(attributions)


def test_rows_that_are_not_completed_are_never_looked_at(
    published: Path, tmp_path: Path, masks: Bools, margins: Floats, completed: Bools
) -> None:
    spoilt = margins.copy()
    spoilt[~completed] = np.nan
    _overwrite(published / "test_margins.npy", spoilt)
    campaign = import_campaign(published, tmp_path / "a.zarr")
    np.testing.assert_array_equal(campaign.outputs[:], margins[completed].astype(np.float32))
    np.testing.assert_array_equal(campaign.keep[:], masks[completed])


@pytest.mark.parametrize(("dtype", "order"), [(np.float32, "C"), (np.float64, "C"), (np.float16, "F")])
def test_other_dtypes_and_orders(
    published: Path, tmp_path: Path, margins: Floats, completed: Bools, dtype: type, order: Any
) -> None:
    _overwrite(published / "test_margins.npy", np.asarray(margins, dtype=dtype, order=order))
    campaign = import_campaign(published, MemoryStore())
    np.testing.assert_array_equal(campaign.outputs[:], margins[completed].astype(np.float32), strict=True)


def test_chunks_change_no_number(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = import_campaign(published, tmp_path / "whole.zarr")
    monkeypatch.setattr(incumbent, "CHUNK_BYTES", 1)  # one row at a time
    monkeypatch.setattr(importing, "LEAST_BLOCK_ROWS", 3)
    monkeypatch.setattr(importing, "BLOCK_BYTES", 1)
    parts = import_campaign(published, tmp_path / "parts.zarr")
    assert (whole.block_rows, parts.block_rows) == (min(1024, whole.rows), 3)
    np.testing.assert_array_equal(parts.keep[:], whole.keep[:])
    np.testing.assert_array_equal(parts.outputs[:], whole.outputs[:])
    assert parts.header["identity"] == whole.header["identity"]


def test_an_interrupted_import_goes_on(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "LEAST_BLOCK_ROWS", 20)
    monkeypatch.setattr(importing, "BLOCK_BYTES", 1)
    whole = import_campaign(published, tmp_path / "whole.zarr")
    original, calls = stores.CampaignStore.write_block, []

    def write_block(store: stores.CampaignStore, block: int, *values: Any) -> Any:
        calls.append(block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(store, block, *values)

    monkeypatch.setattr(stores.CampaignStore, "write_block", write_block)
    with pytest.raises(KeyboardInterrupt):
        import_campaign(published, tmp_path / "a.zarr")
    campaign = import_campaign(published, tmp_path / "a.zarr")
    assert calls == [0, 1, 2, *range(2, -(-campaign.rows // 20))]
    assert campaign.fingerprint == whole.fingerprint
    assert import_campaign(published, tmp_path / "a.zarr").fingerprint == whole.fingerprint
    assert len(calls) == 1 + -(-campaign.rows // 20)  # a finished one is returned as it is


def test_another_campaign_is_not_overwritten(published: Path, tmp_path: Path, margins: Floats) -> None:
    import_campaign(published, tmp_path / "a.zarr")
    changed = margins.copy()
    changed[0, 0] += 1
    _overwrite(published / "test_margins.npy", changed)
    with pytest.raises(stores.StoreMismatchError) as refused:
        import_campaign(published, tmp_path / "a.zarr")
    assert [difference.key for difference in refused.value.differences] == ["imported.files.test_margins.npy"]
    assert str(refused.value).endswith("\nName another store for this import.")


def test_what_true_means_may_be_said(published: Path, tmp_path: Path, masks: Bools, completed: Bools) -> None:
    _overwrite(published / "masks.npy", ~masks)
    share = (~masks[completed]).mean()
    message = (
        f"{published}/masks.npy: {share:.4g} of all entries are True. The published code writes True for kept, so "
        f"{1 - share:.4g} of the components would be ablated in each row. Say which it is: true_means='kept' or "
        "'ablated' (`--true-means`)."
    )
    with pytest.raises(InterchangeError, match=f"^{re.escape(message)}$"):
        import_campaign(published, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()
    campaign = import_campaign(published, tmp_path / "a.zarr", true_means="ablated")
    np.testing.assert_array_equal(campaign.keep[:], masks[completed], strict=True)
    assert campaign.header["identity"]["plan"]["ablate_fraction"] == round(share, 6)
    with pytest.raises(ablate.errors.UnknownNameError, match=r"No meaning of True 'off'\. Known: kept, ablated"):
        import_campaign(published, tmp_path / "b.zarr", true_means="off")  # type: ignore[arg-type]


def test_the_ablate_fraction_is_checked(published: Path, tmp_path: Path) -> None:
    assert import_campaign(published, tmp_path / "a.zarr", ablate_fraction=0.2).header["identity"]["plan"] == {
        "algorithm": "imported",
        "components": COMPONENTS,
        "rows": 146,
        "ablate_fraction": 0.2,
        "seed": None,
    }
    with pytest.raises(InterchangeError, match=r"ablated if True means kept, expected about 0\.05\. Correct"):
        import_campaign(published, tmp_path / "b.zarr", ablate_fraction=0.05)
    with pytest.raises(InterchangeError, match=r"ablated if True means ablated, expected about 0\.2\. Correct"):
        import_campaign(published, tmp_path / "b.zarr", ablate_fraction=0.2, true_means="ablated")
    with pytest.raises(InterchangeError, match=r"ablate_fraction is 1\.5, expected a number between 0 and 1"):
        import_campaign(published, tmp_path / "b.zarr", ablate_fraction=1.5)
    assert not (tmp_path / "b.zarr").exists()


def test_the_margins_are_chosen_where_there_are_several(published: Path, tmp_path: Path, margins: Floats) -> None:
    _overwrite(published / "val_margins.npy", margins[:, :2])
    with pytest.raises(
        InterchangeError,
        match=r"has test_margins\.npy, val_margins\.npy, expected one such file\. Choose one with margins=",
    ):
        import_campaign(published, tmp_path / "a.zarr")
    assert import_campaign(published, tmp_path / "a.zarr", margins="val_margins").example_count == 2
    assert import_campaign(published, tmp_path / "b.zarr", margins="test_margins.npy").example_count == EXAMPLES
    with pytest.raises(ablate.errors.UnknownNameError, match=r"No file of margins 'vall_margins\.npy'. Did you mean"):
        import_campaign(published, tmp_path / "c.zarr", margins="vall_margins")


def test_a_missing_ledger_is_not_taken_for_done(published: Path, tmp_path: Path, masks: Bools, margins: Floats) -> None:
    (published / "_completed.npy").unlink()
    message = (
        f"{published} has no _completed.npy, which says which rows were computed. Restore it; or, if you know that all "
        "of them were, pass assume_completed=True (`--assume-completed`)."
    )
    with pytest.raises(InterchangeError, match=f"^{re.escape(message)}$"):
        import_campaign(published, tmp_path / "a.zarr")
    with pytest.raises(InterchangeError, match="row 3 is marked completed, but all of it is zero, as in a row that"):
        import_campaign(published, tmp_path / "a.zarr", assume_completed=True)
    _overwrite(published / "masks.npy", masks)
    _overwrite(published / "test_margins.npy", margins)
    campaign = import_campaign(published, tmp_path / "a.zarr", assume_completed=True)
    assert campaign.rows == 200
    assert campaign.header["identity"]["imported"]["all_assumed_completed"] is True


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_named(published: Path, tmp_path: Path, margins: Floats, value: float) -> None:
    spoilt = margins.copy()
    spoilt[100, 4] = value
    _overwrite(published / "test_margins.npy", spoilt)
    message = (
        f"{published}/test_margins.npy: row 100, example 4 is {value}, expected a finite number; 1 example has such "
        f"numbers, of {EXAMPLES}. Nothing was imported. To go on, pass on_nan='drop' (`--on-nan drop`) to leave these "
        "examples out, or set _completed.npy to False in the rows that have them."
    )
    with pytest.raises(InterchangeError, match=f"^{re.escape(message)}$"):
        import_campaign(published, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def test_examples_with_nan_are_left_out_when_asked(published: Path, tmp_path: Path, margins: Floats) -> None:
    whole = import_campaign(published, tmp_path / "whole.zarr")
    spoilt = margins.copy()
    spoilt[100, 4] = np.nan
    _overwrite(published / "test_margins.npy", spoilt)
    campaign = import_campaign(published, tmp_path / "a.zarr", on_nan="drop")
    kept = [i for i in range(EXAMPLES) if i != 4]
    np.testing.assert_array_equal(campaign.outputs[:], whole.outputs[:][:, kept])
    assert campaign.examples["id"].tolist() == [str(i) for i in kept]
    assert campaign.header["identity"]["imported"]["drop"] == 1
    with pytest.raises(InterchangeError, match=r"on_nan is 'keep', expected 'drop': a campaign holds finite outputs"):
        import_campaign(published, tmp_path / "b.zarr", on_nan="keep")  # type: ignore[arg-type]


def test_a_number_too_large_for_float32_is_named(published: Path, tmp_path: Path, margins: Floats) -> None:
    spoilt = margins.astype(np.float64)
    spoilt[100, 4] = 1e300
    _overwrite(published / "test_margins.npy", spoilt)
    with pytest.raises(InterchangeError, match="row 100, example 4 is inf, expected a finite number"):
        import_campaign(published, tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "masks.npy",
            np.ones((200, 4), dtype=np.uint8),
            "masks.npy is uint8 of shape (200, 4), expected bool with 2 dimensions, none of them empty. Give the files "
            "of one run as they are.",
        ),
        ("masks.npy", np.ones(200, dtype=bool), "masks.npy is bool of shape (200,), expected bool with 2 dimensions"),
        ("masks.npy", np.ones((200, 0), dtype=bool), "masks.npy is bool of shape (200, 0), expected bool with 2"),
        (
            "test_margins.npy",
            np.ones((200, 2), dtype=np.int64),
            "test_margins.npy is int64 of shape (200, 2), expected float16, float32 or float64 with 2 dimensions",
        ),
        (
            "_completed.npy",
            np.ones((200, 1), dtype=bool),
            "_completed.npy is bool of shape (200, 1), expected bool with 1 dimension, none",
        ),
        (
            "_completed.npy",
            np.ones(199, dtype=bool),
            ": the files have different numbers of rows: masks.npy 200, test_margins.npy 200, _completed.npy 199. Give "
            "those of one run.",
        ),
        (
            "_completed.npy",
            np.zeros(200, dtype=bool),
            ": none of 200 rows is completed (_completed.npy). There is nothing to import.",
        ),
        (
            "masks.npy",
            np.ones((200, 4), dtype=bool),
            "masks.npy: 1 of all entries are True: each row is the same, and there is no effect to see. Give another "
            "run.",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    published: Path, tmp_path: Path, name: str, values: npt.NDArray[Any], message: str
) -> None:
    _overwrite(published / name, values)
    with pytest.raises(InterchangeError, match=re.escape(message)):
        import_campaign(published, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return (Path("pickle-was-run").write_text, ("yes",))


@pytest.mark.parametrize("name", ["masks.npy", "test_margins.npy", "_completed.npy"])
@pytest.mark.parametrize("damage", ["pickle", "cut", "empty", "text", "gone"])
def test_damaged_files_are_named_and_nothing_is_run(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = published / name
    if damage == "pickle":
        objects = np.empty((200, 2), dtype=object)
        objects[:] = [[_Evil(), _Evil()]] * 200
        np.save(path, objects, allow_pickle=True)
    elif damage == "gone":
        path.unlink()
    else:
        content = {"cut": path.read_bytes()[:-7], "empty": b"", "text": b"row,example\n0,1\n"}[damage]
        path.write_bytes(content)
    expected = "expected one such file" if (damage, name) == ("gone", "test_margins.npy") else re.escape(name)
    with pytest.raises(InterchangeError, match=expected):
        import_campaign(published, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()
    assert not (tmp_path / "pickle-was-run").exists()


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"No folder at .*none\. Give the folder with masks\.npy"):
        import_campaign(tmp_path / "none", tmp_path / "a.zarr")
    with pytest.raises(InterchangeError, match=r"has no \*_margins\.npy, expected one such file"):
        import_campaign(tmp_path, tmp_path / "a.zarr")


def test_components_and_examples_from_tables(published: Path, tmp_path: Path) -> None:
    index = ablate.ComponentIndex(
        [
            ablate.Port("conv_filter", 0, "conv1", "conv1.weight", "out", 0, 16, 1, 27),
            ablate.Port("attention_head", 1, "attn", "attn.proj.weight", "in", 1, 24, 8, 64),
        ]
    )
    index.table().to_csv(tmp_path / "index.csv", index=False)
    (tmp_path / "index.json").write_text(index.to_json())
    examples = pd.DataFrame({"id": list("uvwxyz"), "label": range(6), "group": ["a", "b"] * 3})
    examples.to_csv(tmp_path / "examples.csv", index=False)
    for given in (index, tmp_path / "index.csv", tmp_path / "index.json"):
        table = examples if given is index else tmp_path / "examples.csv"
        campaign = import_campaign(published, MemoryStore(), components=given, examples=table, output="logit")
        assert coar.fit(campaign).index == index
        assert campaign.header["identity"]["index"] == index.hash
        assert campaign.header["identity"]["output"] == "logit (imported)"
        assert campaign.components["name"][17] == "attn.proj:attention_head[1]"
        assert campaign.examples["id"].tolist() == list("uvwxyz")
        assert campaign.examples["label"].tolist() == list(range(6))
        assert campaign.examples["group"].tolist() == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("kinds", "count"),
    [(["conv_filter"], 10), (["linear_neuron"], 8), (["linear_input", "conv_filter"], 21), (["layer"], 4)],
)
def test_every_index_survives_as_a_table(conv_net: nn.Module, tmp_path: Path, kinds: list[str], count: int) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, kinds)
    assert len(index) == count
    index.table().to_csv(tmp_path / "index.csv", index=False)
    assert read_index(tmp_path / "index.csv") == index


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": "short.csv"}, "is about 40 components, what was given to describe it about 3. Describe these"),
        ({"components": "gap.csv"}, "gap.csv: row 1 starts at 2 of 'c.weight', expected 1. Rows must be in the order"),
        ({"components": "names.csv"}, "names.csv: row 2 has name 'c[7]', its other columns say 'c[2]'."),
        ({"components": "columns.csv"}, "columns.csv lacks the columns axis, n_parameters. Write it with index.table"),
        ({"components": "words.csv"}, "words.csv: row 0 has start 'one', expected an integer."),
        ({"components": "none.csv"}, "none.csv cannot be read as a CSV table"),
        ({"components": "none.json"}, "none.json cannot be read as a component index"),
        ({"components": "bad.json"}, "bad.json cannot be read as a component index: This is no component index in"),
        ({"examples": pd.DataFrame({"id": ["a"]})}, "is about 6 examples, what was given to describe it about 1."),
        ({"examples": pd.DataFrame({"id": list("aabcde")})}, "the id 'a' is there more than once. Ids must be distin"),
        ({"examples": pd.DataFrame({"name": list("abcdef")})}, "has no column 'id', it has name. Name each example."),
        (
            {"examples": pd.DataFrame({"id": list("abcdef"), "label": [0, 1, 2, 3, 4, 0.5]})},
            "the table of examples: row 5 has label 0.5, expected an integer.",
        ),
        ({"spec": "spec.toml", "output": "logit"}, "components, examples or output are given beside a spec, which"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    index = ablate.ComponentIndex([ablate.Port("conv_filter", 0, "c", "c.weight", "out", 0, 3, 1, 9)])
    table = index.table()
    table.to_csv("short.csv", index=False)
    table.drop(index=1).to_csv("gap.csv", index=False)
    table.assign(name=["c[0]", "c[1]", "c[7]"]).to_csv("names.csv", index=False)
    table.drop(columns=["axis", "n_parameters"]).to_csv("columns.csv", index=False)
    table.assign(start=["one", "1", "2"]).to_csv("words.csv", index=False)
    Path("bad.json").write_text("{}")
    with pytest.raises(InterchangeError, match=re.escape(message)):
        import_campaign(published, tmp_path / "a.zarr", **options)
    assert not (tmp_path / "a.zarr").exists()


def test_an_unknown_output_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ablate.errors.UnknownNameError, match=r"No output 'margn'\. Did you mean 'margin'"):
        import_campaign(published, tmp_path / "a.zarr", output="margn")


def test_with_a_spec_the_model_can_be_asked(folder: Path, tmp_path: Path) -> None:
    """The published folder of a real campaign: fitted, and judged on fresh keep-vectors of the reloaded model."""
    own = stores.CampaignStore.open(folder / "campaign.zarr")
    masks, margins = own.keep[:], own.outputs[:]
    run = make_folder(tmp_path / "run", masks, margins, np.ones(len(masks), dtype=bool))
    campaign = import_campaign(run, tmp_path / "a.zarr", spec=folder / "spec.toml")
    assert campaign.header["identity"]["plan"]["ablate_fraction"] == 0.05  # the spec's, and the masks agree
    for key in ("model", "data", "index"):
        assert campaign.header["identity"][key] == own.header["identity"][key]
    np.testing.assert_array_equal(campaign.examples["id"], own.examples["id"])
    fitted, expected = coar.fit(campaign, tmp_path / "b.zarr"), coar.fit(own)
    np.testing.assert_array_equal(fitted.weights[:], expected.weights[:], strict=True)
    judged = [coar.evaluate(a, *reload_engine(a), rows=8, seed=5).fractions[0] for a in (fitted, expected)]
    np.testing.assert_array_equal(judged[0].correlations, judged[1].correlations)


def test_a_spec_of_something_else_is_refused(folder: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match="is about 40 components, what was given to describe it about 736"):
        import_campaign(published, tmp_path / "a.zarr", spec=folder / "spec.toml")
