"""What an import is about, as far as it is known: components, examples, model; from a spec, from tables, or nothing.

Files of other programs hold numbers only. What the user says they belong to is checked where it can be, by counting.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate import CampaignSpec, ComponentIndex, ModelMismatchError, Port, model_hash, preserved_random_state
from ablate.errors import UnknownNameError
from ablate.outputs import Output, output_names
from coar.interchange.errors import InterchangeError
from stores.storage.places import user_path

Columns = dict[str, npt.NDArray[Any]]
Components = ComponentIndex | str | os.PathLike[str]
Table = pd.DataFrame | str | os.PathLike[str]
Spec = CampaignSpec | str | os.PathLike[str]

NOT_KNOWN = "not known (imported)"
_TEXT = ("kind", "module", "parameter", "port")
_NUMBERS = ("layer", "axis", "start", "stop", "n_parameters")


@dataclass(frozen=True)
class Subject:
    """What imported numbers are about.

    Attributes:
      index: The components, in the order of the files.
      examples: The columns id, label, group.
      model: The model's hash; None: not known, so that an edit fits every model that the index describes.
      data: The data's hash, or NOT_KNOWN.
      output: What was measured.
      spec: What a store says of its making, as JSON-able values.
      loadable: Whether that spec alone can load model and data again.
      ablate_fraction: What the spec says, if it says one.
    """

    index: ComponentIndex
    examples: Columns
    model: str | None
    data: str
    output: str
    spec: dict[str, Any]
    loadable: bool
    ablate_fraction: float | None = None

    @classmethod
    def of(
        cls,
        where: str,
        sizes: tuple[int, int],
        spec: Spec | None,
        components: Components | None,
        examples: Table | None,
        output: str | None,
    ) -> Subject:
        """Returns the subject of files with these numbers of (components, examples).

        Raises:
          InterchangeError: What was given has other counts, contradicts itself or cannot be read.
        """
        if spec is not None:
            if components is not None or examples is not None or output is not None:
                raise InterchangeError(
                    "components, examples or output are given beside a spec, which says them. Give one of the two."
                )
            found = _from_spec(spec)
        else:
            name = output or "margin"
            if name not in output_names():
                raise UnknownNameError("output", name, output_names())
            found = cls(
                index=_generic_index(sizes[0]) if components is None else read_index(components),
                examples=_generic_examples(sizes[1]) if examples is None else read_examples(examples),
                model=None,
                data=NOT_KNOWN,
                output=f"{name} (imported)",
                spec={"source": "imported", "from": where},
                loadable=False,
            )
        counts = {"components": (sizes[0], len(found.index)), "examples": (sizes[1], len(found.examples["id"]))}
        for what, (there, given) in counts.items():
            if there != given:
                raise InterchangeError(
                    f"{where} is about {there:,} {what}, what was given to describe it about {given:,}. Describe these "
                    f"very {what}, in the order of the file."
                )
        return found

    def only(self, kept: npt.NDArray[np.int64]) -> Subject:
        """Returns the subject with some of its examples: no data set that a spec loads has these alone."""
        examples = {name: values[kept] for name, values in self.examples.items()}
        return replace(self, examples=examples, data=NOT_KNOWN, loadable=False)

    def identity(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Returns what estimates from this import are bound to, with a plan of keep-vectors."""
        return {
            "model": self.model,
            "data": self.data,
            "index": self.index.hash,
            "plan": plan,
            "output": self.output,
        }


def _from_spec(given: Spec) -> Subject:
    spec = given if isinstance(given, CampaignSpec) else CampaignSpec.from_file(given)
    with preserved_random_state():
        model, examples = spec.load()
        index = spec.make_index(model)
    fraction = spec.settings.ablate_fraction
    return Subject(
        index=index,
        examples=examples.columns(),
        model=model_hash(model),
        data=examples.hash,
        output=f"{spec.output.name if isinstance(spec.output, Output) else spec.output} (imported)",
        spec=spec.describe(),
        loadable=spec.loadable,
        ablate_fraction=fraction if isinstance(fraction, float) else None,
    )


def read_index(given: Components) -> ComponentIndex:
    """Returns an index as it is, or from a file: JSON of `index.to_json()`, or CSV of `index.table().to_csv()`.

    Raises:
      InterchangeError: The file is missing, or no index follows from it; names the row.
    """
    if isinstance(given, ComponentIndex):
        return given
    path = user_path(given)
    if path.suffix == ".json":
        try:
            return ComponentIndex.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ModelMismatchError) as error:
            raise InterchangeError(f"{path} cannot be read as a component index: {error}") from error
    table = _read_table(path)
    missing = [name for name in (*_TEXT, *_NUMBERS) if name not in table]
    if missing:
        raise InterchangeError(
            f"{path} lacks the columns {', '.join(missing)}. Write it with index.table().to_csv(PATH, index=False)."
        )
    columns: dict[str, list[Any]] = {name: [str(value) for value in table[name]] for name in _TEXT}
    for name in _NUMBERS:
        columns[name] = _integers(path, name, table[name].tolist())
    index = ComponentIndex(_ports(path, columns))
    for own, values in (("name", index.columns["name"]), ("id", index.columns["id"])):
        if own in table:
            for row, (said, found) in enumerate(zip(table[own], values, strict=True)):
                if str(said) != str(found):
                    raise InterchangeError(
                        f"{path}: row {row} has {own} {said!r}, its other columns say {found!r}. Rows must be in the "
                        "order of the index, none left out."
                    )
    return index


def _ports(path: Path, columns: dict[str, list[Any]]) -> list[Port]:
    """Returns the ports of a table of components: runs of rows that slice one parameter from its start on."""
    rows = list(zip(*(columns[name] for name in (*_TEXT, *_NUMBERS)), strict=True))
    ports, run = [], -1

    def key(item: tuple[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        nonlocal run
        *what, layer, axis, start, stop, n_parameters = item[1]
        run += start == 0
        return (*what, layer, axis, stop - start, n_parameters, run)

    for (kind, module, parameter, port, layer, axis, width, n_parameters, _), members in groupby(enumerate(rows), key):
        found = list(members)
        for unit, (row, values) in enumerate(found):
            start = values[-3]
            if start != unit * width:
                raise InterchangeError(
                    f"{path}: row {row} starts at {start} of {parameter!r}, expected {unit * width}. Rows must be in "
                    "the order of the index, none left out."
                )
        ports.append(Port(kind, layer, module, parameter, port, axis, len(found), width, n_parameters))
    if not ports:
        raise InterchangeError(f"{path} has no rows, expected one per component.")
    return ports


def read_examples(given: Table) -> Columns:
    """Returns the columns id, label, group of a DataFrame or CSV file, one row per example in the files' order.

    `id` must be there; `label` is -1 and `group` is "imported" where they are not.
    """
    path = "the table of examples" if isinstance(given, pd.DataFrame) else user_path(given)
    table = given if isinstance(given, pd.DataFrame) else _read_table(user_path(given))
    if "id" not in table:
        raise InterchangeError(f"{path} has no column 'id', it has {', '.join(map(str, table))}. Name each example.")
    ids = [str(value) for value in table["id"]]
    twice = next((name for name, times in Counter(ids).items() if times > 1), None)
    if twice is not None:
        raise InterchangeError(f"{path}: the id {twice!r} is there more than once. Ids must be distinct.")
    labels = _integers(path, "label", table["label"].tolist()) if "label" in table else [-1] * len(ids)
    groups = [str(value) for value in table["group"]] if "group" in table else ["imported"] * len(ids)
    return _example_columns(ids, labels, groups)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, keep_default_na=False, dtype=str)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise InterchangeError(f"{path} cannot be read as a CSV table: {error}") from error


def _integers(path: Path | str, name: str, values: list[Any]) -> list[int]:
    found = []
    for row, value in enumerate(values):
        try:
            number = int(value)
        except (ValueError, OverflowError, TypeError):
            number = None
        if number is None or number != float(value):
            raise InterchangeError(f"{path}: row {row} has {name} {value!r}, expected an integer.")
        found.append(number)
    return found


def _generic_index(count: int) -> ComponentIndex:
    """Returns an index of components of which nothing is known but their number: it describes no model."""
    return ComponentIndex([Port("component", 0, "unknown", "unknown", "out", 0, count, 1, 1)])


def _generic_examples(count: int) -> Columns:
    return _example_columns([str(i) for i in range(count)], [-1] * count, ["imported"] * count)


def _example_columns(ids: list[str], labels: list[int], groups: list[str]) -> Columns:
    return {
        "id": np.array(ids, dtype=object),
        "label": np.array(labels, dtype=np.int64),
        "group": np.array(groups, dtype=object),
    }
