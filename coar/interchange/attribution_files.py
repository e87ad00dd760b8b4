"""Import of attributions: `.pt` files of the published code and `.npz` files become attribution stores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ablate.errors import UnknownNameError
from ablate.work.progress import progress_bar
from coar.attributions.attributions import Attributions
from coar.estimators.storing import open_same, remove
from coar.interchange.errors import InterchangeError
from coar.interchange.foreign import PUBLISHED_FILE, ForeignAttributions, opened
from coar.interchange.importing import environment
from coar.interchange.incumbent import Meaning
from coar.interchange.slabs import SLAB_BYTES
from coar.interchange.subject import Components, Spec, Subject, Table
from coar.interchange.units import (
    OTHER_UNITS,
    OUTPUT_UNITS,
    UNKNOWN,
    Conversion,
    Fraction,
    known_fraction,
)
from stores import AttributionStore
from stores.format.groups import Location
from stores.storage.places import user_path

OnNaN = Literal["drop", "keep"]

MOST_BLOCK_EXAMPLES = 256


def import_attributions(
    path: str | os.PathLike[str],
    store: Location,
    *,
    true_means: Meaning | None = None,
    ablate_fraction: Fraction = None,
    standardised: bool = True,
    on_nan: OnNaN | None = None,
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

    The published solver standardises the masks: its weights are per standard deviation, its bias is the mean output.
    With the keep probability p they become `weight / sqrt(p (1 - p))` and `bias - p * (sum of these)`, in units of the
    output. An .npz of `coar.export` has these units already.

    Args:
      path: The file or folder.
      store: Where to write. The same import again finishes one that was interrupted, and returns a finished one.
      true_means: What the weights were fitted to: "kept" (the default, as in the published code), or "ablated": then
        weights change their sign, and the bias becomes the prediction with every component ablated.
      ablate_fraction: Share of components that was ablated for the fit, for the units. None: the file's, where it says
        it, else the spec's. "unknown": weights stay as they are, and whatever needs them in units of the output is
        refused.
      standardised: False for a file whose weights and bias are in units of the output already.
      on_nan: What becomes of examples with a number that is not finite: "drop" leaves them out, "keep" keeps their
        places, without an attribution. None: refused.
      spec, components, examples, output: What the numbers are about, as for `coar.import_campaign`.
      overwrite: Replace other attributions.
      progress: Show a progress bar on stderr.

    Cost: reads the file three times (check, sha256, copy), slab by slab; an `.npz` with `weight` is held in memory.

    Raises:
      InterchangeError: The file cannot be read as data, its shapes do not fit, a number is not finite, the ablate
        fraction is not known, or an `.npz` of `coar.export`, which says itself what it is about, is told otherwise.
        Nothing is then written.
      stores.StoreMismatchError: There are other attributions at `store`.
    """
    file = user_path(path)
    if file.is_dir():
        file /= PUBLISHED_FILE
    if not file.is_file():
        raise InterchangeError(f"No file at {file}. Give a .pt or .npz file, or the folder that has {PUBLISHED_FILE}.")
    if true_means not in (None, "kept", "ablated"):
        raise UnknownNameError("meaning of True", str(true_means), ("kept", "ablated"))
    if on_nan not in (None, "drop", "keep"):
        raise UnknownNameError("way to treat NaN", str(on_nan), ("drop", "keep"))
    described = {"spec": spec, "components": components, "examples": examples, "output": output}
    with opened(file) as source:
        if source.header:
            told = {**described, "true_means": true_means, "ablate_fraction": ablate_fraction}
            told["standardised"] = None if standardised else False
            subject, identity = _own(file, source, told)
            conversion = Conversion(None, False)
        else:
            subject = Subject.of(str(file), (source.components, source.examples), **described)  # type: ignore[arg-type]
            turn = true_means == "ablated"
            if standardised:
                fraction = known_fraction(str(file), ablate_fraction, subject.ablate_fraction, source.ablate_fraction)
                share = None if fraction is None else fraction if turn else 1 - fraction
            else:
                fraction, share = _fraction_beside(ablate_fraction, subject.ablate_fraction), None
            conversion = Conversion(share, turn)
            plan = {"algorithm": "not known (imported)", "ablate_fraction": fraction, "seed": None}
            units = OTHER_UNITS if standardised and share is None else OUTPUT_UNITS
            identity = {"method": "imported", "held_out": False, "units": units, "of": subject.identity(plan)}
        kept, lost = _finite(source, on_nan)
        identity["imported"] = {"file": file.name, "sha256": _sha256(file), "true_means": true_means or "kept"}
        if len(lost):
            identity["imported"][on_nan] = len(lost)
        if on_nan == "drop" and len(lost):
            source, subject = source.only(kept), subject.only(kept)
            identity["of"] = {**identity["of"], "data": subject.data}
        target = open_same(store, lambda: identity, overwrite)
        if target is None:
            if overwrite:
                remove(store)
            lacking = [int(i) for i in lost] if on_nan == "keep" else []
            target = _create(store, source, subject, identity, lacking)
        _copy(source, target, conversion, progress)
    return Attributions(AttributionStore.open(store))


def _fraction_beside(told: Fraction, spec: float | None) -> float | None:
    """Returns the ablate fraction where no number depends on it."""
    return spec if told is None else None if told == UNKNOWN else float(told)


def _finite(source: ForeignAttributions, on_nan: OnNaN | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the positions of the examples whose numbers are all finite, and those of the others."""
    lost, first = source.not_finite()
    if len(lost) and (on_nan is None or len(lost) == source.examples):
        which = "1 example has" if len(lost) == 1 else f"{len(lost):,} examples have"
        advice = "on_nan='drop' (`--on-nan drop`) leaves them out, 'keep' keeps their places without an attribution."
        raise InterchangeError(
            f"{source.path}: {first}, expected a finite number; {which} such numbers, of {source.examples:,}. Nothing "
            f"was imported. {advice if len(lost) < source.examples else 'Compute the file again.'}"
        )
    return np.setdiff1d(np.arange(source.examples), lost), lost


def _own(file: Path, source: ForeignAttributions, told: Mapping[str, Any]) -> tuple[Subject, dict[str, Any]]:
    """Returns subject and identity of an .npz of ours, which says both."""
    given = [name for name, value in told.items() if value is not None]
    if given:
        raise InterchangeError(
            f"{file} is an export of this toolkit and says itself what it is about. Leave out {', '.join(given)}."
        )
    return source.own_subject(), dict(source.header["identity"])


def _create(
    place: Location, source: ForeignAttributions, subject: Subject, identity: Mapping[str, Any], lacking: list[int]
) -> AttributionStore:
    header = {
        **({"lacking": lacking} if lacking else {}),
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


def _copy(source: ForeignAttributions, target: AttributionStore, conversion: Conversion, progress: bool) -> None:
    missing, lacking = target.missing_blocks(), target.header.get("lacking", [])
    spans = {block: target.span(block) for block in missing}
    done = target.example_count - sum(span.stop - span.start for span in spans.values())
    with progress_bar("import", target.example_count, done, "example", progress) as bar:
        for block, span in spans.items():
            weights, bias = conversion(source.weights(span), source.bias[span])
            without = np.isin(np.arange(span.start, span.stop), lacking)
            weights[without], bias[without] = np.nan, np.nan
            stderr = np.zeros_like(weights) if source.stderr is None else source.stderr(span)
            values = {"weights": weights, "stderr": stderr, "bias": bias}
            values |= {f"quality/{name}": column[span] for name, column in source.quality.items()}
            target.write_block(block, {name: value.astype(np.float32) for name, value in values.items()})
            bar.update(span.stop - span.start)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
