"""Values are frozen in fact: nothing of them can be assigned, added or deleted, nor what is inside them written to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablate
import coar
from ablate.campaign.spec import on_device
from ablate.immutable import FrozenDict, Immutable
from ablate.index.table import ComponentTable
from coar.editing.edits.operations import Ablate, Delta, Factors, LowRank, Operation, Scale
from coar.editing.edits.parts import Parts
from coar.editing.registry import editor_class, editor_names
from coar.editing.training.descent import Descent

MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
INDEX = ablate.ComponentIndex.from_model(MODEL)
EXAMPLES = ablate.Examples(torch.zeros(2, 3), [0, 1])
SPEC = ablate.CampaignSpec(
    model=MODEL, data=EXAMPLES, ablate_fraction=[0.1, 0.2], store="s3://bucket/a", storage={"region": "x"}
)
EDIT = coar.Edit(INDEX.select([0, 1]), details={"log": {"steps": 3}})
VALUES: dict[str, Any] = {
    "selection": INDEX.select([0, 1]),
    "index": INDEX,
    "examples": EXAMPLES,
    "normalized": ablate.Examples(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 1], normalize=([0.5] * 3, [1.0] * 3)),
    "spec": SPEC,
    "spec of a file": ablate.CampaignSpec.from_dict(
        {"model": {"source": "digits"}, "data": {"source": "digits", "split": "test"}, "ablate_fraction": 0.1}, "here"
    ),
    "changed spec": SPEC.replace(rows=5),
    "placed spec": on_device(SPEC, "cpu"),
    "plan": ablate.KeepPlan(4, 2, [0.1, 0.2]),
    "edit": EDIT,
    "chain": EDIT.then(EDIT).operation,
    "sum": (EDIT + coar.Edit(INDEX.select([2]), Scale(2.0))).operation,
    "ablate": Ablate(),
    "scale": Scale(2.0),
    "low rank": LowRank({"0.weight": Factors(torch.ones(4, 1, 1), torch.ones(3, 1))}),
    "delta": Delta({"0.weight": torch.ones(6)}),
    "descent": Descent(),
    **{name: editor_class(name)() for name in editor_names()},
}
INDEX.columns, INDEX.hash, EXAMPLES.hash  # noqa: B018 - what is computed when first asked for is frozen, too


def _kinds(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_no_attribute_is_assigned_added_or_deleted(value: Any) -> None:
    before = dict(vars(value))
    for name in (*before, "something_new"):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)
        with pytest.raises(AttributeError):
            delattr(value, name)
    assert vars(value).keys() == before.keys()
    assert all(vars(value)[name] is before[name] for name in before)


def _inside(value: Any) -> Iterator[Any]:
    yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        yield from _inside(part)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_inside_is_not_written_to(value: Any) -> None:
    """But tensors, which torch cannot close, and caches, which are nobody's business: their names begin with _."""
    settings = dict(value.settings) if isinstance(value, ablate.CampaignSpec) else {}
    public = {name: part for name, part in vars(value).items() if not name.startswith("_")}
    for part in _inside(list((public | settings).values())):
        if isinstance(part, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                part[:1] = part[:1]
        if isinstance(part, dict):
            assert isinstance(part, FrozenDict)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_copies_are_frozen_too(value: Any) -> None:
    for clone in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):  # noqa: S301
        with pytest.raises(AttributeError):
            clone.something_new = 1


def test_every_immutable_kind_is_here() -> None:
    kinds = {
        kind for base in (Immutable, Operation) for kind in _kinds(base) if kind.__module__.split(".")[0] != "tests"
    }
    kinds = {kind for kind in kinds if kind.__module__.startswith(("ablate.", "coar."))}
    abstract = {Parts, ComponentTable}
    assert {kind.__name__ for kind in kinds - abstract} <= {type(value).__name__ for value in VALUES.values()}


def test_a_spec_with_other_values() -> None:
    changed = SPEC.replace(rows=5, ablate_fraction=0.3)
    assert (changed.settings.rows, changed.settings.ablate_fraction) == (5, 0.3)
    assert (SPEC.settings.rows, SPEC.settings.ablate_fraction) == (None, (0.1, 0.2))
    assert changed.load()[1] is EXAMPLES
    assert {**SPEC.describe(), "rows": 5, "ablate_fraction": 0.3} == changed.describe()
    others = ablate.Examples(torch.ones(2, 3), [0, 1])
    assert changed.replace(data=others).load()[1] is others, "what was loaded is not kept where it is replaced"
    placed = on_device(SPEC, "cpu").replace(rows=7)
    assert (placed.settings.device, placed.describe()) == ("cpu", SPEC.replace(rows=7).describe())
    with pytest.raises(ablate.SpecError) as refused:
        VALUES["spec of a file"].replace(row=3, seed=-1)
    assert str(refused.value).startswith("here: 2 problems\n")
    assert "row: unknown key. Did you mean 'rows'?" in str(refused.value)
