"""The feature that a hypernetwork sees: the input of the classifier head, whatever the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import timm
import torch
from torch import nn

from coar.editing.masks.features import find_site, predict_with_feature
from coar.errors import EditError

Untouched = Callable[..., AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("name", "site", "width"), [("test_vit", "head", 64), ("test_resnet", "fc", 96), ("test_convnext", "head.fc", 64)]
)
def test_the_head_of_timm_models(name: str, site: str, width: int, untouched: Untouched) -> None:
    model, images = timm.create_model(name, num_classes=3).eval(), torch.randn(2, 3, 160, 160)
    with untouched(model, images):
        assert find_site(model, images) == site
        logits, feature = predict_with_feature(model, site, images)
    assert feature.shape == (2, width)
    with torch.no_grad():
        assert torch.equal(logits, model(images))
        assert torch.equal(logits, model.get_submodule(site)(feature))


def test_planes_are_averaged() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Conv2d(5, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(3, 1, 6, 6)
    assert find_site(model, images) == "1"
    with torch.no_grad():
        torch.testing.assert_close(predict_with_feature(model, "1", images)[1], model[0](images).mean(dim=(2, 3)))


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(inputs).flatten(1)
        return out


@pytest.mark.parametrize(
    ("site", "inputs", "message"),
    [
        ("neck", torch.zeros(2, 4), "_Unused has no module 'neck' to read a feature from."),
        (
            "unused",
            torch.zeros(2, 4),
            "Module 'unused' does not run, so its input is no feature. Name another feature_site.",
        ),
        (
            "used",
            torch.zeros(2, 3, 4),
            "The input of 'used' has shape (2, 3, 4), expected one vector per example: (2, width). Name another "
            "feature_site.",
        ),
        (
            "used",
            torch.tensor([[0.0] * 4, [torch.inf] * 4]),
            "The feature of example 1, the input of 'used', is not finite. Check inputs and model.",
        ),
    ],
)
def test_what_is_no_feature(site: str, inputs: torch.Tensor, message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        predict_with_feature(_Unused().eval(), site, inputs)


def test_a_model_without_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 6), nn.Flatten()).eval()
    message = (
        "Sequential runs no linear layer, so it has no classifier head to read a feature from. Name the module whose "
        "input is the feature: feature_site='...'."
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        find_site(model, torch.zeros(1, 1, 6, 6))
