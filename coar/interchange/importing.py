"""Import of campaigns: the published code's folders become campaign stores, checked before anything is written."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any, Literal

import stores
from ablate.campaign.identity import package_versions
from ablate.work.progress import progress_bar
from coar.interchange.errors import InterchangeError
from coar.interchange.incumbent import MarginFolder, Meaning, ablated_share
from coar.interchange.subject import Components, Spec, Subject, Table
from stores import CampaignStore, StoreMismatchError, StoreNotFoundError
from stores.format.groups import Location
from stores.storage.places import user_path

BLOCK_BYTES = 32 * 2**20
LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS = 64, 1024


def import_campaign(
    folder: str | os.PathLike[str],
    store: Location,
    *,
    margins: str | None = None,
    true_means: Meaning | None = None,
    ablate_fraction: float | None = None,
    spec: Spec | None = None,
    components: Components | None = None,
    examples: Table | None = None,
    output: str | None = None,
    assume_completed: bool = False,
    on_nan: Literal["drop"] | None = None,
    progress: bool = False,
) -> CampaignStore:
    """Returns a campaign store with the completed rows of a folder of the published code. The folder is unchanged.

    The folder holds `masks.npy` (rows, components) bool, `*_margins.npy` (rows, examples) float16 to float64 and
    `_completed.npy` (rows,) bool. Rows that are not completed are left out, the others keep their order and are
    numbered anew. `coar.fit` works on the store; the model cannot be run again from it, unless a spec says how.

    Args:
      folder: Where the files lie; nothing in them is unpickled.
      store: Where to write. The same import again finishes one that was interrupted, and returns a finished one.
      margins: Which file of margins, where there are several: `test_margins`.
      true_means: What True means in the masks: "kept" (the published code) or "ablated". None: kept, if at least half
        of all entries are True.
      ablate_fraction: Share of components that was ablated; the masks must agree. None: as the masks say.
      spec: A campaign spec, or its file, with the model, data and components that the files are about.
      components: Without a spec: a ComponentIndex, or its file (JSON of `to_json`, CSV of `table()`). None: components
        without names, which fit no model.
      examples: Without a spec: a table with id and, if known, label and group. None: "0", "1", ...
      output: Without a spec: what the margins are; None: "margin".
      assume_completed: Take all rows where `_completed.npy` is missing.
      on_nan: "drop" leaves out examples with a margin that is not finite in any completed row. None: refused.
      progress: Show a progress bar on stderr.

    Returns:
      The store, complete: `keep` (rows, components) True = kept, `outputs` (rows, examples) float32. Its identity
      names the files with their sha256.

    Cost: reads the files four times (two checks, sha256, copy), some megabytes at a time.

    Raises:
      InterchangeError: Files are missing or do not fit together or what was said of them; a completed row was never
        written, or holds NaN (see `on_nan`). Nothing is then written.
      stores.StoreMismatchError: There is another campaign at `store`.
    """
    if on_nan not in (None, "drop"):
        raise InterchangeError(f"on_nan is {on_nan!r}, expected 'drop': a campaign holds finite outputs only.")
    files = MarginFolder.open(user_path(folder), margins, assume_completed)
    subject = Subject.of(str(folder), (files.components, files.examples), spec, components, examples, output)
    files = files.without_nan(on_nan)
    said = subject.ablate_fraction if ablate_fraction is None else ablate_fraction
    share, meaning = ablated_share(files, true_means, said)
    plan = {
        "algorithm": "imported",
        "components": files.components,
        "rows": len(files.rows),
        "ablate_fraction": round(share, 6),
        "seed": None,
    }
    source = {
        "files": files.files,
        "rows_in_files": files.rows_in_files,
        "all_assumed_completed": files.all_completed,
        "true_means": meaning,
    }
    if files.kept is not None:
        subject = subject.only(files.kept)
        source["drop"] = files.examples - files.example_count
    campaign = _open_or_create(store, files, subject, {**subject.identity(plan), "imported": source})
    missing = campaign.missing_blocks()
    with progress_bar("import", campaign.rows, campaign.progress.finished_rows, "row", progress) as bar:
        for block in missing:
            span = campaign.span(block)
            masks, outputs = files.take(files.rows[span])
            campaign.write_block(block, masks if meaning == "kept" else ~masks, outputs)
            bar.update(len(outputs))
    return CampaignStore.open(store)


def _open_or_create(
    place: Location, files: MarginFolder, subject: Subject, identity: Mapping[str, Any]
) -> CampaignStore:
    try:
        campaign = CampaignStore.open(place, mode="r+")
    except StoreNotFoundError:
        each = 4 * files.example_count + files.components
        return CampaignStore.create(
            place,
            header={
                "identity": dict(identity),
                "spec": subject.spec,
                "loadable": subject.loadable,
                "index": subject.index.to_json(),
                "environments": [environment()],
            },
            components=subject.index.columns,
            examples=subject.examples,
            rows=len(files.rows),
            block_rows=max(LEAST_BLOCK_ROWS, min(MOST_BLOCK_ROWS, BLOCK_BYTES // each)),
        )
    found = stores.differences(campaign.header.get("identity", {}), identity)
    if found:
        raise StoreMismatchError(f"Campaign {campaign.where}", found, "Name another store for this import.")
    return campaign


def environment() -> dict[str, Any]:
    """Returns with what an import was written, as a store's header keeps it."""
    return {"versions": package_versions(), "python": platform.python_version(), "device": "none (imported)"}
