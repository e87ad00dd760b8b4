"""Editing and judging rest on what the engine rests on: equal inputs give equal logits, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Engine, Examples, GatingError
from ablate.campaign.steady import require_steady
from coar.editing.edits.edit import Edit
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.judging.single_edits import evaluate_single_edits
from coar.editing.methods.interpolation import interpolation_curve
from coar.editing.predicting import predictions
from coar.editing.registry import get_editor
from coar.editing.request import Request

Untouched = Callable[..., AbstractContextManager[None]]

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 3


def _net(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3)).eval()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Batch(nn.Module):
    """What others in the batch have is taken off: as batch norm without running statistics does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


UNSTEADY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm of the batch": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.BatchNorm1d(3, track_running_stats=False), nn.Flatten()),
        r"Batch norm '1\.1' uses the statistics of the batch",
    ),
    "the mean of the batch": (Batch, "The examples of a batch influence each other"),
    "noise": (Noise, "The model is random in eval mode: .* module '1'"),
}


@pytest.mark.parametrize("case", UNSTEADY)
def test_the_same_refusal_as_the_engines(case: str, untouched: Untouched) -> None:
    kind, message = UNSTEADY[case]
    model = _net(kind())
    index = ComponentIndex.from_model(model, ["linear_neuron"])
    edit, pair = Edit(index.select([0])), (X, Y)
    wish = Request(X[:3], Y[:3], reference=Examples(X[3:], Y[3:]))
    calls: list[Callable[[], Any]] = [
        lambda: Engine(model, index).outputs(index.everything().keep()[None], X, Y),
        lambda: require_steady(model, X[:2]),
        lambda: predictions(model, pair),
        lambda: evaluate_edit(model, edit, {"a": pair}),
        lambda: evaluate_single_edits(model, lambda m, x, y: edit, {"a": pair}),
        lambda: interpolation_curve(model, edit, {"original": pair, "edited": pair}),
        lambda: get_editor("finetune", steps=1).edit(model, Request(X, Y), index.select([0])),
        lambda: get_editor("coar", k=1).edit(model, wish, index.select([0])),
    ]
    for call in calls:
        with untouched(model), pytest.raises(GatingError, match=message):
            call()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_influence(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    deep = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    model = nn.Sequential(*deep, nn.Linear(64, 5)).eval().to(dtype)
    require_steady(model, torch.randn(count, 64).to(dtype))


def test_a_small_influence_is_seen_in_float32() -> None:
    class Slightly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * x.mean(0)

    with pytest.raises(GatingError, match="influence each other"):
        require_steady(_net(Slightly()), X[:2])


def test_a_model_that_changes_what_it_is_given_is_refused() -> None:
    """Else judging an edit would change the user's examples."""
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).eval(), X.clone()
    with pytest.raises(GatingError, match="changes its inputs in place"):
        predictions(model, (x, Y))
