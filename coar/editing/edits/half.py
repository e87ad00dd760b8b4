"""Models in half precision: edits are found in float32, and what rounding takes from them is said."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coar.editing.edits.covered import covered
from coar.editing.edits.edit import Edit

HALF = (torch.bfloat16, torch.float16)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the type of a model's weights, which its floating inputs have, too; float32 for one without."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def is_half(model: nn.Module) -> bool:
    """Returns whether any of a model's weights are in half precision."""
    return any(parameter.dtype in HALF for parameter in model.parameters())


def lift(copy: nn.Module) -> nn.Module:
    """Turns what is half precision in a model that we own into float32, in place, and returns it."""
    copy._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)  # type: ignore[no-untyped-call]
    return copy


def fitting(model: nn.Module, inputs: Tensor) -> Tensor:
    """Returns floating inputs in the type of the model's weights, if one of the two is half precision. Mutates nothing.

    Other inputs are returned as they are: float64 for a float32 model is a mistake to be named.
    """
    dtype = dtype_of(model)
    cast = inputs.is_floating_point() and (inputs.dtype in HALF or dtype in HALF)
    return inputs.to(dtype) if cast else inputs


def rounding(edit: Edit, model: nn.Module) -> dict[str, Any]:
    """Returns what rounding to half precision takes from an edit at alpha 1, JSON-able. Mutates nothing.

    `relative_error`: norm of the rounding over the norm of the change. `lost`: share of the weights that should move
    and stay as they were, because the change is smaller than the distance of two numbers.
    """
    where = covered(edit.selection, model)
    asked = moved = error = change = 0.0
    for name, after in edit.at(1.0).changed_weights(model).items():
        weight = model.get_parameter(name).detach()
        mask = where.get(name, torch.zeros_like(weight, dtype=torch.bool))
        exact = edit.operation.change(name, weight.float(), mask, 1.0)
        wanted = exact - weight.float()
        error += float((after.float() - exact).double().square().sum())
        change += float(wanted.double().square().sum())
        asked += int((wanted != 0).sum())
        moved += int(((wanted != 0) & (after != weight)).sum())
    return {
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "relative_error": (error / change) ** 0.5 if change else 0.0,
        "lost": 1 - moved / asked if asked else 0.0,
    }


def words(found: dict[str, Any]) -> str:
    """Returns what `rounding` found, as a sentence's end."""
    return (
        f"found in float32 and rounded to {found['dtype']}: the change differs by {found['relative_error']:.1%} from "
        f"what was found, {found['lost']:.1%} of the weights that should move do not"
    )
