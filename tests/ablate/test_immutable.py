"""Values that have a hash cannot be assigned to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ablate
from ablate.campaign.spec import on_device


def _values() -> dict[str, tuple[Any, str, Any]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    index = ablate.ComponentIndex.from_model(model)
    examples = ablate.Examples(torch.zeros(2, 3), [0, 1])
    spec = ablate.CampaignSpec(model=model, data=examples, ablate_fraction=0.1, seed=5)
    return {
        "selection": (index.select([0, 1]), "ids", (5,)),
        "selection's index": (index.select([0, 1]), "index", None),
        "index": (index, "ports", ()),
        "hash of an index": (index, "hash", "0"),
        "examples": (examples, "targets", torch.ones(2)),
        "hash of examples": (examples, "hash", "0"),
        "spec": (spec, "settings", None),
        "placed spec": (on_device(spec, "cpu"), "settings", None),
    }


@pytest.mark.parametrize("name", _values())
def test_no_attribute_can_be_assigned_or_deleted(name: str) -> None:
    value, attribute, other = _values()[name]
    before = getattr(value, attribute)
    with pytest.raises(ablate.ImmutableError, match=rf"\.{attribute} cannot be changed: .* Make another one instead"):
        setattr(value, attribute, other)
    with pytest.raises(AttributeError):
        delattr(value, attribute)
    assert getattr(value, attribute) is before


def test_settings_of_a_spec_cannot_be_assigned() -> None:
    spec = _values()["spec"][0]
    with pytest.raises(ValueError, match="frozen"):
        spec.settings.seed = 7
    assert spec.with_storage({"region": "x"}).settings.storage == {"region": "x"}
    assert spec.settings.storage == {}
    assert spec.with_storage({}).load()[1] is spec.load()[1]


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", ["selection", "index", "examples"])
def test_copies_are_equal(name: str, clone: Any) -> None:
    value = _values()[name][0]
    assert clone(value).__dict__.keys() >= {key for key in value.__dict__ if not key.startswith("_")}
    assert hash(clone(value)) == hash(value) or name == "examples"


def test_somebodys_own_kind_is_closed_when_its_own_init_ends() -> None:
    class Photos(ablate.Examples):
        def __init__(self) -> None:
            super().__init__(torch.zeros(2, 3), [0, 1])
            self.place = "here"

    photos = Photos()
    assert photos.place == "here"
    for name in ("place", "something_new"):
        with pytest.raises(ablate.ImmutableError):
            setattr(photos, name, "there")
