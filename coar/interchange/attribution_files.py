"""Import of attributions: `.pt` files of the published code and `.npz` files become attribution stores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ablate.errors import UnknownNameError
from ablate.progress import progress_bar
from coar.attributions import Attributions
from coar.estimators.storing import open_same, remove
from coar.interchange.errors import InterchangeError
from coar.interchange.foreign import PUBLISHED_FILE, ForeignAttributions, opened
from coar.interchange.importing import environment
from coar.interchange.incumbent import Meaning
from coar.interchange.slabs import SLAB_BYTES
from coar.interchange.subject import Components, Spec, Subject, Table
from stores import AttributionStore
from stores.schema import Location

MOST_BLOCK_EXAMPLES = 256


def import_attributions(
    path: str | os.PathLike[str],
    store: Location,
    *,
    true_means: Meaning | None = None,
    ablate_fraction: float | None = None,
    spec: Spec | None = None,
    components: Components | None = None,
    examples: Table | None = None,
    output: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Attributions:
    """Returns attributions that another program wrote, in a store of their own. The file is unchanged.

    Reads: a `.pt` file of the published code (`weight` (components, examples), `bias` (examples,), perhaps `lam`
    (examples,)), or the folder that has it as `datamodels.pt`; an `.npz` with `weight` and `bias` of the same shapes;
    an `.npz` of `coar.export`, which gives back the attributions with names, standard errors and quality. Nothing is
    unpickled. Where the file has no standard errors they are 0, and z is NaN; quality counts as not measured.

    Args:
      path: The file or folder.
      store: Where to write. The same import again finishes one that was interrupted, and returns a finished one.
      true_means: What the weights were fitted to: "kept" (the default, as in the published code), or "ablated": then
        weights change their sign, and the bias becomes the prediction with every component ablated.
      ablate_fraction: Share of components that was ablated for the fit. None: the spec's, else not known.
      spec, components, examples, output: What the numbers are about, as for `coar.import_campaign`.
      overwrite: Replace other attributions.
      progress: Show a progress bar on stderr.

    Cost: reads the file three times (check, sha256, copy), slab by slab; an `.npz` with `weight` is held in memory.

    Raises:
      InterchangeError: The file cannot be read as data, its shapes do not fit, a number is not finite, or an `.npz` of
        `coar.export`, which says itself what it is about, is told otherwise. Nothing is then written.
      stores.StoreMismatchError: There are other attributions at `store`.
    """
    file = Path(path)
    if file.is_dir():
        file /= PUBLISHED_FILE
    if not file.is_file():
        raise InterchangeError(f"No file at {file}. Give a .pt or .npz file, or the folder that has {PUBLISHED_FILE}.")
    if true_means not in (None, "kept", "ablated"):
        raise UnknownNameError("meaning of True", str(true_means), ("kept", "ablated"))
    described = {"spec": spec, "components": components, "examples": examples, "output": output}
    with opened(file) as source:
        if source.header:
            told = {**described, "true_means": true_means, "ablate_fraction": ablate_fraction}
            subject, identity = _own(file, source, told)
        else:
            subject = Subject.of(str(file), (source.components, source.examples), **described)  # type: ignore[arg-type]
            fraction = subject.ablate_fraction if ablate_fraction is None else ablate_fraction
            plan = {"algorithm": "not known (imported)", "ablate_fraction": fraction, "seed": None}
            identity = {"method": "imported", "held_out": False, "of": subject.identity(plan)}
        source.check()
        identity["imported"] = {"file": file.name, "sha256": _sha256(file), "true_means": true_means or "kept"}
        target = open_same(store, identity, overwrite)
        if target is None:
            if overwrite:
                remove(store)
            target = _create(store, source, subject, identity)
        _copy(source, target, true_means == "ablated", progress)
    return Attributions(AttributionStore.open(store))


def _own(file: Path, source: ForeignAttributions, told: Mapping[str, Any]) -> tuple[Subject, dict[str, Any]]:
    """Returns subject and identity of an .npz of ours, which says both."""
    given = [name for name, value in told.items() if value is not None]
    if given:
        raise InterchangeError(
            f"{file} is an export of this toolkit and says itself what it is about. Leave out {', '.join(given)}."
        )
    return source.own_subject(), dict(source.header["identity"])


def _create(
    place: Location, source: ForeignAttributions, subject: Subject, identity: Mapping[str, Any]
) -> AttributionStore:
    header = {
        "identity": dict(identity),
        "spec": subject.spec,
        "loadable": subject.loadable,
        "index": subject.index.to_json(),
        "environments": [environment()],
    }
    return AttributionStore.create(
        place,
        header=header,
        components=subject.index.columns,
        examples=subject.examples,
        block_examples=max(1, min(MOST_BLOCK_EXAMPLES, source.examples, SLAB_BYTES // (8 * source.components))),
        quality=list(source.quality),
    )


def _copy(source: ForeignAttributions, target: AttributionStore, turn: bool, progress: bool) -> None:
    missing = target.missing_blocks()
    spans = {block: target.span(block) for block in missing}
    done = target.example_count - sum(span.stop - span.start for span in spans.values())
    with progress_bar("import", target.example_count, done, "example", progress) as bar:
        for block, span in spans.items():
            weights, bias = source.weights(span).astype(np.float32), source.bias[span]
            if turn:  # w * ablated + b = -w * kept + (b + the sum of all w)
                bias, weights = bias + weights.sum(axis=1, dtype=np.float64), -weights
            stderr = np.zeros_like(weights) if source.stderr is None else source.stderr(span)
            values = {"weights": weights, "stderr": stderr, "bias": bias}
            values |= {f"quality/{name}": column[span] for name, column in source.quality.items()}
            target.write_block(block, {name: value.astype(np.float32) for name, value in values.items()})
            bar.update(span.stop - span.start)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
