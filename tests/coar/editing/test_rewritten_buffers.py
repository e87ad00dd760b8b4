"""Buffers that a forward writes are no part of what a model is: caches of positions, counters of calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import coar
from ablate.models.buffers import named_buffers, restored_buffers, written_buffers
from stores import CampaignStore, StoreMismatchError

INPUTS = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
DATA = ablate.Examples(INPUTS, [0, 1, 2, 0, 1, 2])


class Rotary(nn.Module):
    """A linear layer over positions, whose angles are kept in a buffer that grows when it must."""

    frequencies: Tensor
    angles: Tensor | None

    def __init__(self, persistent: bool, empty: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("frequencies", torch.linspace(0.1, 1, 8))
        self.register_buffer("angles", None if empty else torch.zeros(0, 8), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.angles is None or len(self.angles) < x.shape[1]:
            self.angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        logits: Tensor = self.last((self.first(x) * self.angles[: x.shape[1]].cos()).relu().mean(1))
        return logits


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.last(self.first(x).relu().mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rotary cache": lambda: Rotary(persistent=False, empty=False),
    "rotary cache without a value": lambda: Rotary(persistent=False, empty=True),
    "rotary cache in the state": lambda: Rotary(persistent=True, empty=False),
    "counter": Counting,
}


def _edit(model: nn.Module) -> coar.Edit:
    return coar.get_editor("finetune", rate=1e-3, steps=2).edit(model, coar.Request(INPUTS[:2], DATA.targets[:2]))


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_applies_to_its_own_model_after_forwards(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    edit = _edit(model)
    edit.save(tmp_path / "e.safetensors")
    coar.evaluate_edit(model, edit, {"all": DATA})
    model(INPUTS)
    changed = edit.apply(model)
    for again in (coar.load_edit(tmp_path / "e.safetensors"), _edit(model)):
        assert torch.equal(again.apply(model)(INPUTS), changed(INPUTS))
    coar.load_edit(tmp_path / "e.safetensors").apply(MODELS[name]().eval())
    groups = {"g": DATA.take([0])}
    coar.evaluate_single_edits(model, coar.get_editor("finetune", steps=2), groups, DATA.take([1, 2]))


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_still_refuses_other_weights_and_other_buffers(name: str) -> None:
    edit = _edit(MODELS[name]().eval())
    other = MODELS[name]().eval()
    with torch.no_grad():
        (other.frequencies if isinstance(other, Rotary) else other.get_parameter("first.weight")).add_(1e-3)
    with pytest.raises(coar.EditMismatchError, match="made for a model with weights"):
        edit.apply(other)


@pytest.mark.parametrize("name", MODELS)
def test_a_campaign_goes_on_after_forwards_and_before_any(name: str) -> None:
    for used_first in (False, True):
        place, model = MemoryStore(), MODELS[name]().eval()
        if used_first:
            model(INPUTS)
        spec: dict[str, Any] = {"data": DATA, "rows": 40, "ablate_fraction": 0.3, "block_rows": 20}
        ablate.run(ablate.CampaignSpec(model=model, **spec), place, progress=False)
        model(INPUTS)
        CampaignStore.open(place, mode="r+").blocks.forget(1)
        ablate.run(ablate.CampaignSpec(model=model, **spec), place, progress=False)
        ablate.run(ablate.CampaignSpec(model=MODELS[name]().eval(), **spec), place, progress=False)
        coar.coar_edit(coar.fit(place), [0], [1, 2], k=1).apply(model)


def test_a_buffer_that_no_forward_writes_counts() -> None:
    place = MemoryStore()
    spec: dict[str, Any] = {"data": DATA, "rows": 4, "ablate_fraction": 0.3}
    ablate.run(ablate.CampaignSpec(model=Rotary(False, False).eval(), **spec), place, progress=False)
    other = Rotary(False, False).eval()
    other.frequencies = other.frequencies * 2
    with pytest.raises(StoreMismatchError, match="model: "):
        ablate.run(ablate.CampaignSpec(model=other, **spec), place, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_judging_an_edit_leaves_every_buffer_as_it_was(name: str) -> None:
    model = MODELS[name]().eval()
    edit = _edit(model)
    before = {key: (value, None if value is None else value.clone()) for key, value in named_buffers(model).items()}
    coar.evaluate_edit(model, edit, {"all": DATA})
    for key, buffer in named_buffers(model).items():
        known, value = before[key]
        assert buffer is known
        assert buffer is None or (value is not None and torch.equal(buffer, value))


def test_buffers_are_restored_after_an_error_and_told_by_content() -> None:
    model = nn.BatchNorm1d(2)
    with suppress(ZeroDivisionError), restored_buffers(model):
        model(torch.randn(4, 2))
        raise ZeroDivisionError
    assert int(model.get_buffer("num_batches_tracked")) == 0
    assert torch.equal(model.get_buffer("running_mean"), torch.zeros(2))
    with written_buffers(model) as written:
        model(torch.randn(4, 2))
    assert written == ["num_batches_tracked", "running_mean", "running_var"]
