"""Edits and operations are values: nothing of them can be assigned, and they do not follow what they were made from."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

import coar
from ablate import ComponentIndex, Port
from ablate.immutable import FrozenDict
from coar.editing.edits.frozen import frozen
from coar.editing.edits.operations import Ablate, Delta, Factors, LowRank, Scale

INDEX = ComponentIndex([Port("linear_neuron", 0, "fc", "fc.weight", "out", 0, 4, 1, 3)])


def _edit() -> coar.Edit:
    details = {"log": {"steps": 3}}
    return coar.Edit(INDEX.select([0, 1]), details=details, norms={"fc.weight": (1.0, 2.0)}, notes={"fc.weight": "a"})


VALUES: list[Any] = [
    _edit(),
    Ablate(),
    Scale(2.0),
    LowRank({"fc.weight": Factors(torch.ones(4, 1, 1), torch.ones(3, 1))}),
    Factors(torch.ones(4, 1, 1), torch.ones(3, 1)),
    Delta({"fc.weight": torch.ones(6)}, starts={"fc.weight": torch.zeros(6)}),
    (_edit() + coar.Edit(INDEX.select([2]), Scale(2.0))).operation,
    _edit().then(_edit()).operation,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_nothing_can_be_assigned(value: Any) -> None:
    for name in (*vars(value), "something_new"):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 1)
    mappings = [mapping for mapping in vars(value).values() if isinstance(mapping, dict)]
    for mapping in mappings:
        for change in (
            lambda m=mapping: m.update(a=1),
            lambda m=mapping: m.__setitem__("a", 1),
            mapping.clear,
            mapping.popitem,
            lambda m=mapping: m.pop("fc.weight"),
            lambda m=mapping: m.setdefault("a", 1),
            lambda m=mapping: m.__delitem__("fc.weight"),
            lambda m=mapping: m.__ior__({"a": 1}),
        ):
            with pytest.raises(TypeError, match=r"belongs to an immutable value and cannot be changed\. Change a copy"):
                change()


def test_nested_mappings_are_frozen_too() -> None:
    with pytest.raises(TypeError, match="immutable"):
        _edit().details["log"]["steps"] = 4


def test_an_edit_does_not_follow_the_mapping_it_was_made_from() -> None:
    details: dict[str, Any] = {"k": 1}
    values = {"fc.weight": torch.ones(3)}
    edit = coar.Edit(INDEX.select([0]), Delta(values), details=details)
    before = hash(edit)
    details["k"] = 2
    values["other"] = torch.ones(3)
    assert (edit.details, list(edit.operation.values)) == ({"k": 1}, ["fc.weight"])  # type: ignore[attr-defined]
    assert hash(edit) == before


def test_frozen_mappings_are_dicts_to_everybody_else() -> None:
    mapping = frozen({"a": {"b": [1]}})
    assert mapping == {"a": {"b": [1]}}
    assert json.loads(json.dumps(mapping)) == mapping
    for twin in (copy.copy(mapping), copy.deepcopy(mapping), pickle.loads(pickle.dumps(mapping))):  # noqa: S301 - ours
        assert twin == mapping
        assert type(twin) is FrozenDict
    edit = _edit()
    assert copy.deepcopy(edit) == edit
    assert pickle.loads(pickle.dumps(edit)) == edit  # noqa: S301 - ours
