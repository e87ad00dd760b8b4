"""Why data is not the data of a store, as far as the store's table of examples tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate.data.examples import Examples


def what_changed(stored: Mapping[str, npt.NDArray[Any]], examples: Examples) -> str:
    """Returns a sentence on what differs between a store's columns id and label and the examples; "" if neither does.

    Then it is the inputs, or how they are prepared, that differ.
    """
    ids, labels = [str(name) for name in stored["id"]], examples.columns()["label"]
    if len(ids) != len(examples):
        return f"The store is about {len(ids):,} examples, the data has {len(examples):,}."
    if ids != list(examples.ids):
        first = next(i for i, (old, new) in enumerate(zip(ids, examples.ids, strict=True)) if old != new)
        return f"Other examples, or another order: example {first} was {ids[first]!r} and is {examples.ids[first]!r}."
    changed = np.flatnonzero(stored["label"] != labels)
    if not len(changed):
        return ""
    first = int(changed[0])
    return (
        f"The examples are the same by their ids, but {len(changed):,} of {len(ids):,} labels differ: that of "
        f"{ids[first]!r} was {stored['label'][first]} and is {labels[first]}. Labels of folders of images depend on "
        "`classes` in the table of the data."
    )
