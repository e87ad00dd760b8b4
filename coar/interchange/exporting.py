"""Export: attributions as files that other tools read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from ablate.errors import UnknownNameError
from ablate.files import refuse_existing, written_whole
from coar.attributions.attributions import Attributions
from coar.interchange.errors import InterchangeError
from coar.interchange.npz import write_npz
from coar.interchange.tables import write_csv, write_long_parquet, write_parquet
from stores import AttributionStore, UnfinishedStoreError
from stores.format.groups import Location
from stores.storage.places import user_path

Format = Literal["parquet", "npz", "csv", "pt"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(
    attributions: Attributions | AttributionStore | Location,
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    k: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Returns the path of a file with all attributions of a finished store, written whole or not at all.

    Formats; weights and standard errors are float32, in units of the output (but for pt):
      parquet: One row per example: example (position), id, label, group, bias, the quality columns, and the lists
        `weights` and `stderr` with one number per component. Beside it NAME.components.parquet: one row per component.
        With `k` a long table: example, id, component, name, layer, weight, stderr; beside it NAME.examples.parquet.
      csv: The long table, of all components or of the k strongest, beside it NAME.examples.csv with bias and quality.
      npz: weights, stderr (examples, components), bias, quality_*, example_*, component_* and a JSON header; no
        pickle. `coar.import_attributions` gives the same store again.
      pt: The published code's layout and units: `weight` (components, examples) per standard deviation of the masks,
        and `bias`, the mean output; beside them `ablate_fraction`. Reads with `torch.load(weights_only=True)`. Standard
        errors and names are not in it.

    Args:
      attributions: Attributions, their store, or where it is. It is not changed.
      path: The file to write; folders are made.
      format: None: by the ending of `path`.
      k: For parquet and csv: only the k components of each example with the largest absolute weight, strongest first.
      overwrite: Replace files that are there.

    Cost: reads the store once or twice, slab by slab: memory stays bounded. All components as csv is large: about 80
      bytes for each example and component.

    Raises:
      InterchangeError: No format goes with this ending, pt goes without a known ablate fraction, or k is out of range
        or has no meaning in this format.
      stores.StoreExistsError: A file is there already.
      stores.UnfinishedStoreError: The store is not finished.
      ablate.LoadError: Parquet, and pyarrow is not installed.
    """
    store = _finished(attributions)
    target = user_path(path)
    chosen = _format(target, format)
    _check_k(k, chosen, store.component_count)
    if chosen in ("npz", "pt"):
        with written_whole(target, overwrite) as draft:
            _writer(chosen)(store, draft)
        return target
    per_example = chosen == "parquet" and k is None
    beside = sidecar(target, "components" if per_example else "examples")
    refuse_existing(target, overwrite)
    with written_whole(target, overwrite) as draft, written_whole(beside, overwrite) as other:
        if per_example:
            write_parquet(store, draft, other)
        elif chosen == "parquet":
            write_long_parquet(store, draft, other, k or store.component_count)
        else:
            write_csv(store, draft, other, k or store.component_count)
    return target


def _writer(chosen: str) -> Callable[[AttributionStore, Path], None]:
    if chosen == "npz":
        return write_npz
    from coar.interchange.torch_file import write_torch_file  # which needs torch

    return write_torch_file


def sidecar(path: Path, table: str) -> Path:
    """Returns where the other table of an export to `path` lies: NAME.components.parquet beside NAME.parquet."""
    return path.with_name(f"{path.stem}.{table}{path.suffix}")


def _finished(attributions: Attributions | AttributionStore | Location) -> AttributionStore:
    if isinstance(attributions, Attributions):
        attributions = attributions.store
    store = attributions if isinstance(attributions, AttributionStore) else AttributionStore.open(attributions)
    missing = store.missing_blocks()
    if missing:
        raise UnfinishedStoreError(
            f"{store.where}: {len(missing)} blocks of examples are not estimated yet. Run the same again to finish "
            "it, then export."
        )
    return store


def _format(path: Path, given: str | None) -> Format:
    name = path.suffix.removeprefix(".").lower() if given is None else given
    for known in FORMATS:
        if name == known:
            return known
    if given is not None:
        raise UnknownNameError("format", given, FORMATS)
    raise InterchangeError(
        f"{path}: the ending {path.suffix!r} says no format, expected one of {', '.join(f'.{f}' for f in FORMATS)}. "
        "Give the path such an ending, or pass format=."
    )


def _check_k(k: int | None, chosen: Format, components: int) -> None:
    if k is None:
        return
    if chosen in ("npz", "pt"):
        raise InterchangeError(f"k={k} is given for {chosen}, which holds all components. Leave it out.")
    if not 1 <= k <= components:
        raise InterchangeError(f"k is {k}, expected 1 to {components}: there are {components} components.")
