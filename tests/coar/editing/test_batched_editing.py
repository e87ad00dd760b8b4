"""Memory follows how many examples run at a time, not how many there are; and where it is short, that is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate import Examples
from coar.editing.edits.edit import Edit
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.methods import pairs
from coar.editing.methods.directions import ConceptKeys, key_directions
from coar.editing.methods.second_moment import SecondMoment
from coar.editing.predicting import predictions
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.editing.running import BATCH, memory_reported, run
from coar.editing.training.labels import LabelLoss

ROOM = 16  # examples that the device of these tests holds


class OnSmallDevice(nn.Module):
    """Raises what torch raises as soon as more examples run at a time than the device holds."""

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room, self.a, self.b, self.head = room, nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"out of memory with {len(x)} examples")
        logits: Tensor = self.head(self.b(self.a(x).relu()).relu())
        return logits


def _request(count: int) -> Request:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    others = torch.randn(count, 8, generator=generator)
    held_out = Examples(others + 1, y)
    return Request(x, y, originals=0.9 * x, reference=Examples(others, y), validation=(held_out, Examples(others, y)))


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning on batches": ("finetune", {"batch_size": 16, "steps": 3}),
    "fine-tuning on all inputs": ("finetune", {"at_once": 16, "steps": 3, "stop_loss": 0.01}),
    "fine-tuning on large batches": ("finetune", {"batch_size": 24, "at_once": 16, "steps": 3, "stop_loss": None}),
    "early stopping": ("finetune", {"batch_size": 16, "steps": 3, "early_stopping": True}),
    "1-LI": ("1-li", {"batch_size": 16, "warm_up": 1, "epochs": 1}),
    "PAINT": ("paint", {"at_once": 16, "warm_up": 1, "epochs": 1}),
    "output collision": ("output-collision", {"batch_size": 16, "steps": 2}),
    "output collision of all layers": ("output-collision", {"batch_size": 16, "steps": 2, "scope": "global"}),
    "symmetric collision": ("output-collision", {"batch_size": 16, "steps": 2, "target": "symmetric"}),
    "low rank": ("lowrank", {"batch_size": 16, "steps": 2, "restarts": 1}),
    "rewriting": ("rewriting", {"batch_size": 16, "steps": 2}),
    "COAR-Edit": ("coar", {"batch_size": 16, "passes": 2, "most": 2}),
}


@pytest.mark.parametrize("case", METHODS)
def test_ten_times_the_examples_fit_where_few_do(case: str) -> None:
    name, settings = METHODS[case]
    model = OnSmallDevice().eval()
    for count in (ROOM, 10 * ROOM):
        get_editor(name, **settings).edit(model, _request(count))


@pytest.mark.parametrize("case", METHODS)
def test_a_method_that_does_not_fit_says_what_to_lower(case: str) -> None:
    name, settings = METHODS[case]
    with pytest.raises(
        ablate.OutOfMemoryError, match=r"(Lower (batch_size|at_once) \(now 16, try 8\))|Lower batch_size"
    ):
        get_editor(name, **settings).edit(OnSmallDevice(8).eval(), _request(10 * ROOM))


@pytest.mark.parametrize(
    ("name", "whole", "parts"),
    [
        ("finetune", {"steps": 5, "rate": 1e-3, "optimizer": "sgd"}, {"at_once": 7}),
        ("output-collision", {"steps": 5}, {"batch_size": 7}),
        ("output-collision", {"steps": 5, "scope": "global"}, {"batch_size": 7}),
        ("lowrank", {"steps": 5, "restarts": 1}, {"batch_size": 7}),
        ("rewriting", {"steps": 5, "loss": "mse", "optimizer": "sgd", "rate": 1e-2}, {"batch_size": 7}),
    ],
)
def test_a_step_on_all_examples_is_the_same_in_parts(name: str, whole: dict[str, Any], parts: dict[str, Any]) -> None:
    model, request = OnSmallDevice(64).eval(), _request(40)
    one, other = (get_editor(name, **settings).edit(model, request) for settings in (whole, {**whole, **parts}))
    after = one.changed_weights(model)
    assert any(not torch.equal(value, model.get_parameter(key)) for key, value in after.items())
    for key, value in other.changed_weights(model).items():
        torch.testing.assert_close(value, after[key], rtol=1e-4, atol=1e-6)
    assert one.details["log"]["loss_last"] == pytest.approx(other.details["log"]["loss_last"], rel=1e-4)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_values_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    """Of the model as it was, whatever its weights are by then: bit for bit what keeping them gives."""
    model, request = OnSmallDevice().eval(), _request(40)
    edits = []
    for held in (pairs.HELD, 12 * 16 * 4 * 3, 0):
        for kind in (pairs.Pairs, pairs.ThroughoutPairs):
            monkeypatch.setattr(kind.__init__, "__defaults__", (held,))
        edits.append(get_editor("output-collision", batch_size=16, steps=4, scope=scope).edit(model, request))
    assert edits[0].operation == edits[1].operation == edits[2].operation
    assert float(edits[0].describe()["relative_change"].max()) > 0


def test_keys_of_a_concept_are_replaced_by_few_when_they_are_many() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 6, generator=generator) * torch.tensor([5.0, 3, 2, 1, 1, 1]) + 0.5
    weights = torch.rand(500, generator=generator) * (torch.rand(500, generator=generator) > 0.2)
    moment = SecondMoment(torch.diag(torch.arange(1.0, 7, dtype=torch.float64)), 100)
    few = ConceptKeys(held=150)
    for part, weight in zip(torch.split(keys, 90), torch.split(weights, 90), strict=True):
        few.add(part, weight)
    assert sum(kept.numel() for kept in few._keys) <= 150
    assert few.count == int((weights > 0).sum())
    for how in ("whitened", "raw_eig"):
        expected, floored = key_directions(keys, weights, moment, 2, how)
        found = few.directions(moment, 2, how, 1e-6)
        torch.testing.assert_close(found[0], expected)
        assert found[1] == floored


def test_no_graph_is_kept_for_what_only_stops_the_training() -> None:
    model = OnSmallDevice(64).eval()
    request = _request(40)
    loss = LabelLoss(model, request.inputs, request.labels.long(), 0.01, at_once=8)  # type: ignore[union-attr]
    loss.done()
    assert loss._pending is None
    assert len(list(loss.loss())) == 5


def test_predictions_say_what_to_lower() -> None:
    model, x = OnSmallDevice(8).eval(), torch.randn(40, 8)
    with pytest.raises(ablate.OutOfMemoryError) as refused:
        predictions(model, (x, torch.zeros(40, dtype=torch.int64)), batch_size=32)
    assert str(refused.value) == (
        "The memory did not suffice for 32 examples at a time. Lower batch_size (now 32, try 16), or use a device with "
        "more memory. The model is unchanged. out of memory with 32 examples"
    )
    edit = Edit(ablate.ComponentIndex.from_model(model).select([0]))
    report = evaluate_edit(model, edit, {"all": (x, torch.zeros(40, dtype=torch.int64))}, batch_size=8)
    assert len(report.sets["all"].kept) == 40


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_short_memory_is_never_taken_for_wrong_inputs(error: Exception) -> None:
    class Short(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    message = r"^The memory did not suffice for 1 example at a time\. Give"
    with pytest.raises(ablate.OutOfMemoryError, match=message), memory_reported(1):
        run(Short(), torch.zeros(1))


def test_the_largest_number_at_a_time_is_what_a_method_says() -> None:
    seen: list[int] = []
    model = OnSmallDevice(10**6).eval()
    request = _request(3 * BATCH)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, _: seen.append(len(args[0])) if isinstance(module, OnSmallDevice) else None
    )
    try:
        get_editor("finetune", steps=2).edit(model, replace(request, validation=None))
    finally:
        hook.remove()
    assert max(seen) == BATCH
