"""Attributions as tables for pandas, polars, DuckDB and spreadsheets: Parquet and CSV, written slab by slab.

Two shapes. *Per example*: one row per example with its weights and standard errors as lists, beside a table of the
components. *Long*: one row per example and component, all or the k strongest of each example, beside a table of the
examples, which has the bias and the quality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate.loading.packages import require
from coar.interchange.slabs import slabs
from stores import AttributionStore

Array = npt.NDArray[Any]

_LONG_ROW_BYTES = 120  # of one row of a long table, its texts and its line of CSV


def example_columns(store: AttributionStore) -> dict[str, Array]:
    """Returns the table of the examples: example (position), id, label, group, bias and the quality columns."""
    columns = store.examples
    named = {name: columns[name] for name in ("id", "label", "group")}
    return {"example": np.arange(store.example_count), **named, "bias": store.bias[:], **store.quality}


def component_columns(store: AttributionStore) -> dict[str, Array]:
    """Returns the table of the components: component (its id), name, and all other columns of the index."""
    columns = store.components
    rest = {name: values for name, values in columns.items() if name not in ("id", "name")}
    return {"component": columns["id"], "name": columns["name"], **rest}


def write_parquet(store: AttributionStore, path: Path, beside: Path) -> None:
    """Writes one row per example to `path`, with lists `weights` and `stderr`, and the components to `beside`."""
    arrow, parquet = require("pyarrow", "tables"), require("pyarrow.parquet", "tables")
    parquet.write_table(arrow.table(_plain(component_columns(store))), beside, compression="zstd")
    examples, writer = _plain(example_columns(store)), None
    try:
        for span in slabs(store, 2 * 4 * store.component_count):
            columns: dict[str, Any] = {name: arrow.array(values[span]) for name, values in examples.items()}
            for name, view in (("weights", store.weights), ("stderr", store.stderr)):
                flat = arrow.array(view[span].reshape(-1))
                columns[name] = arrow.FixedSizeListArray.from_arrays(flat, store.component_count)
            table = arrow.table(columns).replace_schema_metadata({"coar": _provenance(store)})
            if writer is None:
                # float32 that hardly repeat: dictionaries and statistics of the lists would only cost
                plain = list(examples)
                writer = parquet.ParquetWriter(
                    path, table.schema, compression="zstd", use_dictionary=["group"], write_statistics=plain
                )
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def write_long_parquet(store: AttributionStore, path: Path, beside: Path, k: int) -> None:
    """Writes the k strongest components of each example to `path`, and the examples to `beside`."""
    arrow, parquet = require("pyarrow", "tables"), require("pyarrow.parquet", "tables")
    parquet.write_table(arrow.table(_plain(example_columns(store))), beside, compression="zstd")
    writer = None
    try:
        for part in _long(store, k):
            table = arrow.table(_plain(part)).replace_schema_metadata({"coar": _provenance(store)})
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def write_csv(store: AttributionStore, path: Path, beside: Path, k: int) -> None:
    """Writes the k strongest components of each example to `path`, and the examples to `beside`."""
    form: dict[str, Any] = {"index": False, "lineterminator": "\n", "encoding": "utf-8"}
    pd.DataFrame(example_columns(store)).to_csv(beside, **form)
    for i, part in enumerate(_long(store, k)):
        pd.DataFrame(part).to_csv(path, mode="a", header=i == 0, **form)


def _long(store: AttributionStore, k: int) -> Iterator[dict[str, Array]]:
    """Yields the long table in parts: example, id, component, name, layer, weight, stderr; the strongest first.

    With all components, in the order of their ids.
    """
    ids, components = store.examples["id"], store.components
    layers = components.get("layer", np.zeros(store.component_count, dtype=np.int64))
    for span in slabs(store, 8 * store.component_count + _LONG_ROW_BYTES * k):
        weights, stderr = store.weights[span], store.stderr[span]
        chosen = np.broadcast_to(np.arange(store.component_count), weights.shape)
        if k < store.component_count:
            chosen = np.argsort(-np.abs(weights), axis=1, kind="stable")[:, :k]
        example = np.repeat(np.arange(span.start, span.stop), k)
        flat = chosen.reshape(-1)
        yield {
            "example": example,
            "id": ids[example],
            "component": flat,
            "name": components["name"][flat],
            "layer": layers[flat],
            "weight": np.take_along_axis(weights, chosen, axis=1).reshape(-1),
            "stderr": np.take_along_axis(stderr, chosen, axis=1).reshape(-1),
        }


def _provenance(store: AttributionStore) -> str:
    """Returns what was estimated, how and from what, as JSON."""
    return json.dumps({"identity": store.header.get("identity"), "spec": store.header.get("spec")}, sort_keys=True)


def _plain(columns: dict[str, Array]) -> dict[str, Any]:
    """Returns columns with texts as lists, which become string columns also where there are none."""
    return {
        name: np.array([str(v) for v in values], dtype=object) if values.dtype.kind in "OUT" else values
        for name, values in columns.items()
    }
