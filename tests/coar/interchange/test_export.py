"""Export: every number that leaves is the number in the store, in each format, whole or not at all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ablate
import coar
import stores
from coar.interchange import InterchangeError, export, exporting, import_attributions, slabs, tables

FORMATS = ["parquet", "npz", "csv", "pt"]


@pytest.fixture(scope="module")
def attributions(
    tmp_path_factory: pytest.TempPathFactory, write_attributions: Callable[..., coar.Attributions]
) -> coar.Attributions:
    """7 examples, 5 components, in blocks of 3, 3 and 1; one correlation is not defined."""
    generator = np.random.default_rng(0)
    return write_attributions(
        generator.standard_normal((7, 5)),
        tmp_path_factory.mktemp("export") / "a.zarr",
        bias=generator.standard_normal(7),
        stderr=generator.random((7, 5)),
        correlation=[0.5, np.nan, *generator.random(5)],
        ids=["ü,0", 'b"1', "c", "d", "e", "f", "g"],
    )


def test_parquet_has_a_row_per_example(attributions: coar.Attributions, tmp_path: Path) -> None:
    path = export(attributions, tmp_path / "new" / "a.parquet")
    table = pd.read_parquet(path)
    assert list(table.columns) == [
        *("example", "id", "label", "group", "bias", "correlation", "r2", "ridge", "residual_sd", "weights", "stderr")
    ]
    np.testing.assert_array_equal(np.stack(list(table["weights"])), attributions.weights[:], strict=True)
    np.testing.assert_array_equal(np.stack(list(table["stderr"])), attributions.stderr[:], strict=True)
    np.testing.assert_array_equal(table["bias"], attributions.bias[:])
    pd.testing.assert_frame_equal(
        table[["id", "label", "group"]].astype(object), attributions.examples.astype(object), check_dtype=False
    )
    np.testing.assert_array_equal(table["correlation"], attributions.quality["correlation"])
    components = pd.read_parquet(tmp_path / "new" / "a.components.parquet")
    assert components["component"].tolist() == [0, 1, 2, 3, 4]
    assert components["name"].tolist() == attributions.index.columns["name"].tolist()
    assert set(components) == {"component", *attributions.index.columns} - {"id"}


def test_parquet_is_written_block_by_block_and_says_where_it_is_from(
    attributions: coar.Attributions, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = parquet.ParquetFile(export(attributions, tmp_path / "a.parquet"))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 1]
    assert json.loads(file.schema_arrow.metadata[b"coar"])["identity"] == attributions.header["identity"]
    assert str(file.schema_arrow.field("weights").type).startswith("fixed_size_list<")


def _long(attributions: coar.Attributions, k: int) -> pd.DataFrame:
    """The long table, one top-k query after the other."""
    rows = []
    for example, name in enumerate(attributions.examples["id"]):
        top = attributions.top(example, k)
        rows.append(top[["component", "name", "layer", "weight", "stderr"]].assign(example=example, id=name))
    return pd.concat(rows, ignore_index=True)[["example", "id", "component", "name", "layer", "weight", "stderr"]]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_the_strongest_components_as_a_long_table(attributions: coar.Attributions, tmp_path: Path, ending: str) -> None:
    path = export(attributions, tmp_path / f"a.{ending}", k=2)
    read = pd.read_parquet if ending == "parquet" else pd.read_csv
    table, examples = read(path), read(tmp_path / f"a.examples.{ending}")
    pd.testing.assert_frame_equal(
        table.astype({"weight": np.float32, "stderr": np.float32}).astype(object),
        _long(attributions, 2).astype(object),
        check_dtype=False,
    )
    assert examples["id"].tolist() == attributions.examples["id"].tolist()
    np.testing.assert_array_equal(examples["bias"].astype(np.float32), attributions.bias[:])
    np.testing.assert_array_equal(
        examples["correlation"].astype(np.float32), attributions.quality["correlation"].astype(np.float32)
    )


def test_csv_holds_everything_that_a_prediction_needs(attributions: coar.Attributions, tmp_path: Path) -> None:
    table = pd.read_csv(export(attributions, tmp_path / "a.csv"))
    examples = pd.read_csv(tmp_path / "a.examples.csv")
    assert table["component"].tolist() == [0, 1, 2, 3, 4] * 7
    weights = table.pivot_table(index="example", columns="component", values="weight").to_numpy().astype(np.float32)
    np.testing.assert_array_equal(weights, attributions.weights[:], strict=True)
    keep = np.array([[True, False, True, True, False]])
    predicted = keep.astype(np.float32) @ weights.T + examples["bias"].to_numpy().astype(np.float32)
    np.testing.assert_allclose(predicted, attributions.predict(keep), rtol=1e-6)


def test_npz_needs_no_pickle_and_is_always_the_same(attributions: coar.Attributions, tmp_path: Path) -> None:
    path = export(attributions, tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["weights"], attributions.weights[:], strict=True)
        np.testing.assert_array_equal(found["stderr"], attributions.stderr[:], strict=True)
        np.testing.assert_array_equal(found["bias"], attributions.bias[:], strict=True)
        assert found["example_id"].tolist() == attributions.examples["id"].tolist()
        assert found["component_name"].tolist() == attributions.index.columns["name"].tolist()
        np.testing.assert_array_equal(found["quality_correlation"], attributions.quality["correlation"])
        assert json.loads(str(found["header"]))["identity"] == attributions.header["identity"]
    again = export(attributions, tmp_path / "b.npz")
    assert again.read_bytes() == path.read_bytes()


def test_npz_gives_the_same_attributions_back(attributions: coar.Attributions, tmp_path: Path) -> None:
    path = export(attributions, tmp_path / "a.npz")
    found = import_attributions(path, tmp_path / "back.zarr")
    for name in ("weights", "stderr", "bias"):
        np.testing.assert_array_equal(getattr(found, name)[:], getattr(attributions, name)[:], strict=True)
    pd.testing.assert_frame_equal(found.quality, attributions.quality)
    pd.testing.assert_frame_equal(found.examples, attributions.examples)
    assert found.index == attributions.index
    identity = dict(found.header["identity"])
    assert identity.pop("imported")["file"] == "a.npz"
    assert identity == attributions.header["identity"]
    pd.testing.assert_frame_equal(found.top(3, 2), attributions.top(3, 2))


def test_pt_is_read_as_the_published_code_reads_it(attributions: coar.Attributions, tmp_path: Path) -> None:
    loaded = torch.load(export(attributions, tmp_path / "a.pt"), weights_only=True)
    assert set(loaded) == {"weight", "bias", "ablate_fraction"}
    assert loaded["weight"].shape == (5, 7)  # components, examples
    fraction = attributions.header["identity"]["of"]["plan"]["ablate_fraction"]
    assert float(loaded["ablate_fraction"]) == fraction
    # the published solver sees standardised masks
    keep = torch.tensor([[True, False, False, True, True]])
    seen = (keep.float() - (1 - fraction)) / (fraction * (1 - fraction)) ** 0.5
    predicted = seen @ loaded["weight"] + loaded["bias"]
    np.testing.assert_allclose(predicted.numpy(), attributions.predict(keep.numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", FORMATS)
def test_slabs_change_no_number(
    attributions: coar.Attributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    whole = export(attributions, tmp_path / f"whole.{ending}")
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)  # one example at a time
    assert len(list(slabs.slabs(attributions.store, 4))) == 7
    parts = export(attributions, tmp_path / f"parts.{ending}")
    if ending == "parquet":  # the row groups differ
        pd.testing.assert_frame_equal(pd.read_parquet(parts), pd.read_parquet(whole))
    elif ending == "pt":
        one, two = torch.load(parts, weights_only=True), torch.load(whole, weights_only=True)
        assert all(torch.equal(one[name], two[name]) for name in ("weight", "bias"))
    else:
        assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_is_replaced_only_when_asked(attributions: coar.Attributions, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text("mine")
    message = (
        f"There is something at {path} already. Choose another path, or replace it with overwrite=True (`--overwrite`)."
    )
    with pytest.raises(stores.StoreExistsError, match=f"^{re.escape(message)}$"):
        export(attributions, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "mine"
    assert export(attributions, path, overwrite=True) == path
    assert path.read_bytes() != b"mine"


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_the_file_beside_is_not_replaced_either(attributions: coar.Attributions, tmp_path: Path, ending: str) -> None:
    beside = tmp_path / ("a.components.parquet" if ending == "parquet" else "a.examples.csv")
    beside.write_text("mine")
    with pytest.raises(stores.StoreExistsError, match=re.escape(f"There is something at {beside} already")):
        export(attributions, tmp_path / f"a.{ending}")
    assert [file.name for file in tmp_path.iterdir()] == [beside.name]


class _EndsEarly:
    """Weights of which only the first slab can be read, as from a disk that fails."""

    def __init__(self, rows: stores.Rows) -> None:
        self._rows = rows

    def __getitem__(self, key: slice) -> Any:
        if key.start:
            raise OSError("input/output error")
        return self._rows[key]


@pytest.mark.parametrize("ending", FORMATS)
def test_an_export_that_fails_leaves_what_was_there(
    attributions: coar.Attributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text("before")
    rows = attributions.weights
    monkeypatch.setattr(stores.AttributionStore, "weights", property(lambda _: _EndsEarly(rows)))
    with pytest.raises(OSError, match="input/output error"):
        export(attributions, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_an_unfinished_store_is_refused(tmp_path: Path, write_attributions: Callable[..., coar.Attributions]) -> None:
    write_attributions(np.ones((7, 5)), tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "ledger" / "c" / "1" / "0").unlink()
    with pytest.raises(stores.UnfinishedStoreError, match="only 2 of 3 blocks of examples are estimated"):
        export(tmp_path / "a.zarr", tmp_path / "a.npz")
    going_on = stores.AttributionStore.open(tmp_path / "a.zarr", finish=True)
    with pytest.raises(stores.UnfinishedStoreError, match="1 blocks of examples are not estimated yet"):
        export(going_on, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "a.txt",
            {},
            InterchangeError,
            "a.txt: the ending '.txt' says no format, expected one of .parquet, .npz, .csv, .pt. Give the path such "
            "an ending, or pass format=.",
        ),
        ("a.npz", {"format": "np"}, ablate.errors.UnknownNameError, "No format 'np'. Did you mean 'npz'?"),
        ("a.npz", {"k": 2}, InterchangeError, "k=2 is given for npz, which holds all components. Leave it out."),
        ("a.csv", {"k": 0}, InterchangeError, "k is 0, expected 1 to 5: there are 5 components."),
        ("a.csv", {"k": 6}, InterchangeError, "k is 6, expected 1 to 5: there are 5 components."),
    ],
)
def test_what_cannot_be_exported_is_refused(
    attributions: coar.Attributions,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=f"{re.escape(message)}$"):
        export(attributions, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced(attributions: coar.Attributions, tmp_path: Path) -> None:
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(stores.StoreExistsError, match=r"a\.npz is a folder, expected the path of a file to write"):
        export(attributions, tmp_path / "a.npz", overwrite=True)


def test_a_format_may_be_given_for_any_name(attributions: coar.Attributions, tmp_path: Path) -> None:
    path = export(attributions.store.location, tmp_path / "weights.bin", "pt")
    assert torch.load(path, weights_only=True)["weight"].shape == (5, 7)
    assert exporting.sidecar(Path("x/a.b.csv"), "examples") == Path("x/a.b.examples.csv")


def test_parquet_without_pyarrow_says_what_to_install(
    attributions: coar.Attributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ablate.LoadError, match=r"pip install 'component-attribution\[tables\]'"):
        export(attributions, tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


def test_texts_that_are_no_plain_words_survive(
    tmp_path: Path, write_attributions: Callable[..., coar.Attributions]
) -> None:
    ids = ["NA", "", "1e5", "=1+1", "line\nbreak", "\U0001f600"]
    found = write_attributions(np.ones((6, 2)), tmp_path / "a.zarr", ids=ids, groups=ids)
    path = export(found, tmp_path / "a.csv")
    assert pd.read_csv(tmp_path / "a.examples.csv", keep_default_na=False, dtype=str)["id"].tolist() == ids
    assert pd.read_csv(path, keep_default_na=False, dtype=str)["id"].tolist() == [i for i in ids for _ in range(2)]
    assert pd.read_parquet(export(found, tmp_path / "a.parquet"))["group"].tolist() == ids
    assert import_attributions(export(found, tmp_path / "a.npz"), tmp_path / "b.zarr").examples["id"].tolist() == ids


def test_rows_of_a_long_table_fit_into_a_slab(attributions: coar.Attributions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2 * (8 * 5 + tables._LONG_ROW_BYTES * 3))
    assert [len(part["component"]) for part in tables._long(attributions.store, 3)] == [6, 3, 6, 3, 3]
