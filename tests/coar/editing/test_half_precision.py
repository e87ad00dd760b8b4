"""Models in half precision: ablation is exact, other edits are found in float32 and rounded once; inference mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import ablate
from ablate import ComponentIndex, Examples
from coar.editing.edits.edit import Edit
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.errors import EditError

Untouched = Callable[..., AbstractContextManager[None]]

X = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(10) % 3
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {"rate": 1e-3, "steps": 5},
    "paint": {"rate": 1e-2, "warm_up": 1, "epochs": 3, "rule": "none"},
    "lowrank": {"steps": 5, "restarts": 1},
    "rewriting": {"steps": 5, "rate": 1e-2},
    "output-collision": {"steps": 5},
    "random-mask": {"steps": 5, "density": 0.5, "rate": 1e-3},
}


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval().to(dtype)


def _request(dtype: torch.dtype) -> Request:
    held_out = Examples(X + 1, Y), Examples(X - 1, Y)
    x = X[:5].to(dtype)
    return Request(x, Y[:5], originals=0.9 * x, reference=Examples(X[5:], Y[5:]), validation=held_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_an_edit_is_the_float32_edit_rounded_once(name: str, dtype: torch.dtype, untouched: Untouched) -> None:
    half = _model(dtype)
    request, lifted = _request(dtype), copy.deepcopy(half).float()
    with untouched(half, request.inputs):
        edit = get_editor(name, **METHODS[name]).edit(half, request)
    exact = get_editor(name, **METHODS[name]).edit(lifted, _request(dtype))
    error = change = 0.0
    for key, value in edit.changed_weights(half).items():
        wanted = exact.changed_weights(lifted)[key]
        assert value.dtype == dtype
        assert torch.equal(value, wanted.to(dtype)), key
        error += float((value.float() - wanted).square().sum())
        change += float((wanted - lifted.get_parameter(key).detach()).square().sum())
    said = edit.details["rounding"]
    assert said["dtype"] == str(dtype).removeprefix("torch.")
    assert said["relative_error"] == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert said["relative_error"] > 0
    assert f"rounded to {said['dtype']}: the change differs by" in edit.details["log"]["why"]
    assert edit.base == ablate.model_hash(half)


def test_steps_too_small_to_survive_are_counted() -> None:
    half = _model(torch.bfloat16)
    found = get_editor("finetune", rate=1e-7, steps=1).edit(half, _request(torch.bfloat16))
    assert found.details["rounding"]["lost"] > 0.9
    assert found.details["rounding"]["relative_error"] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ablation_is_exact_in_half_precision(dtype: torch.dtype, untouched: Untouched) -> None:
    half = _model(dtype)
    for given in (dtype, torch.float32):
        with untouched(half):
            edit = get_editor("coar", k=2, passes=4, ablate_fraction=0.2).edit(half, _request(given))
        assert "rounding" not in edit.details
        for key, value in edit.changed_weights(half).items():
            before = half.get_parameter(key)
            assert bool(((value == before) | (value == 0)).all())
            assert not torch.equal(value, before)


def test_quantised_weights_are_refused() -> None:
    model = _model()
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(EditError) as refused:
        get_editor("finetune").edit(model, _request(torch.float32), ComponentIndex.from_model(model).everything())
    assert str(refused.value) == (
        "'0.weight' is float8_e4m3fn, expected float32, float64, bfloat16 or float16. Edit the model it was made from, "
        "before it was quantised."
    )


def test_float64_inputs_of_a_float32_model_are_named() -> None:
    with pytest.raises(
        EditError, match=r"^The model fails on inputs of shape \(5, 6\) and type float64: RuntimeError: "
    ):
        get_editor("finetune").edit(_model(), _request(torch.float64))


@pytest.mark.parametrize("name", [*METHODS, "coar"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_was_made_in_inference_mode_is_edited_like_anything(name: str, inside: bool) -> None:
    with torch.inference_mode():
        model, x = copy.deepcopy(_model()), X[:5].clone()
    settings = METHODS.get(name, {"k": 2, "passes": 4, "ablate_fraction": 0.2})
    with torch.inference_mode(inside):
        request = Request(x, Y[:5], 0.9 * x, reference=Examples(X[5:], Y[5:]), validation=_request(x.dtype).validation)
        edit = get_editor(name, **settings).edit(model, request)
        report = evaluate_edit(model, edit, {"all": (x, Y[:5])})
    expected = get_editor(name, **settings).edit(_model(), _request(torch.float32))
    assert edit.operation == expected.operation
    again = evaluate_edit(_model(), expected, {"all": (X[:5], Y[:5])})
    assert report.sets["all"].kept.edited.tolist() == again.sets["all"].kept.edited.tolist()


@pytest.mark.parametrize("name", [*METHODS, "coar"])
def test_autocast_around_an_editor_changes_nothing(name: str) -> None:
    settings = METHODS.get(name, {"k": 2, "passes": 4, "ablate_fraction": 0.2})
    expected = get_editor(name, **settings).edit(_model(), _request(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edit = get_editor(name, **settings).edit(_model(), _request(torch.float32))
        found = evaluate_edit(_model(), Edit(edit.selection), {"all": (X, Y)}).sets["all"].kept
    assert edit.operation == expected.operation
    assert found.base.tolist() == _model()(X).argmax(1).tolist()


def test_inputs_that_require_a_gradient_get_none() -> None:
    x = X[:5].clone().requires_grad_(True)
    get_editor("finetune", rate=1e-3, steps=2).edit(_model(), Request(x, Y[:5]))
    assert x.grad is None
    assert x.requires_grad
