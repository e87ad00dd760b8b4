"""Pseudo-samples: what is pasted, where, how large, and the pairs that teach nothing."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from coar.editing.masks.cutmix import Pasted, paste, patch_of, random_crops
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError

CODE, PAPER = MetaSettings.preset("code"), MetaSettings.preset("paper")


def _many(settings: MetaSettings, side: int, patch: tuple[int, int] | None, pairs: int = 1500) -> Pasted:
    """Black images with rectangles of white ones."""
    images = torch.cat([torch.zeros(pairs, 1, side, side), torch.ones(pairs, 1, side, side)])
    return paste(images, settings, patch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [CODE, PAPER])
def test_rectangles_are_three_to_eight_patches_of_fourteen(settings: MetaSettings) -> None:
    boxes = _many(settings, 56, (4, 4)).boxes
    assert {box.height for box in boxes} == {box.width for box in boxes} == {4 * cells for cells in range(3, 9)}
    assert all(value % 4 == 0 for box in boxes for value in box)
    shares = torch.tensor([box.height * box.width / 56**2 for box in boxes], dtype=torch.float64)
    assert round(100 * float(shares.min()), 1) == 4.6
    assert round(100 * float(shares.max()), 1) == 32.7
    assert float(shares.mean()) == pytest.approx(0.155, abs=0.004)  # exactly (5.5 / 14)**2 = 0.1543


def test_the_last_row_and_column_are_never_covered_by_the_codes_preset() -> None:
    code = _many(CODE, 56, (4, 4)).mixed.amax(dim=(0, 1))
    assert not code[-4:].any()
    assert not code[:, -4:].any()
    assert code[:52, :52].all()


def test_they_are_covered_otherwise() -> None:
    assert _many(PAPER, 56, (4, 4)).mixed.amax(dim=(0, 1)).all()


def test_pixels_where_there_are_no_patches() -> None:
    boxes = _many(PAPER, 28, None).boxes
    assert {box.height for box in boxes} == set(range(6, 17))  # 3/14 to 8/14 of 28
    assert {box.top % 4 for box in boxes} == {0, 1, 2, 3}


def test_what_is_pasted_is_the_partners_at_the_same_place() -> None:
    images = torch.randn(8, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    pasted = paste(images, PAPER, (8, 8), torch.Generator().manual_seed(2))
    assert torch.equal(images, before)
    assert torch.equal(pasted.clean, images[:4])
    for i, box in enumerate(pasted.boxes):
        inside = torch.zeros(32, 40, dtype=torch.bool)
        inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
        assert torch.equal(pasted.mixed[i][:, inside], images[4 + i][:, inside])
        assert torch.equal(pasted.mixed[i][:, ~inside], images[i][:, ~inside])


def test_a_pair_that_does_not_change_is_left_out() -> None:
    images = torch.cat([torch.zeros(3, 1, 14, 14), torch.ones(3, 1, 14, 14)])
    images[4] = 0  # the partner of image 1
    pasted = paste(images, PAPER, None, torch.Generator().manual_seed(0))
    assert pasted.clean.shape == pasted.mixed.shape == (2, 1, 14, 14)
    assert len(pasted.boxes) == 2


@pytest.mark.parametrize(
    ("images", "settings", "patch", "message"),
    [
        (
            torch.zeros(3, 1, 8, 8),
            PAPER,
            None,
            "Images have shape (3, 1, 8, 8), expected (examples, channels, height, width) with an even number of "
            "examples, at least 2: each needs another to take a rectangle from.",
        ),
        (
            torch.zeros(4, 1, 8, 8),
            PAPER,
            None,
            "No image changes when a rectangle of another is pasted in: the images are all alike. Give reference "
            "images that differ.",
        ),
        (
            torch.zeros(4, 1, 8, 8),
            CODE,
            (8, 8),
            "An image side of 8 pixels is 1 x 8: too short to place a rectangle of up to 1 x 8. Give larger images, or "
            "a smaller patch_largest.",
        ),
    ],
)
def test_images_that_cannot_be_paired(
    images: Tensor, settings: MetaSettings, patch: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        paste(images, settings, patch, torch.Generator())


def test_the_patches_of_a_model(tiny_net: nn.Module) -> None:
    assert patch_of(timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)) == (8, 8)
    assert patch_of(tiny_net) is None
    assert patch_of(timm.create_model("test_resnet", num_classes=3)) is None


def test_random_crops() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.linspace(0, 1, 32).expand(50, 1, 24, 32).contiguous()  # a slope from left to right
    assert random_crops(images, 1.0, generator) is images
    cropped = random_crops(images, 0.25, generator)
    assert cropped.shape == images.shape
    slopes = (cropped[:, 0, 12, 24] - cropped[:, 0, 12, 8]) / (images[:, 0, 12, 24] - images[:, 0, 12, 8])
    assert slopes.min() > 0.37  # a quarter of the area, at 3:4, is 12 of 32 pixels wide
    assert slopes.max() < 1.05
    assert slopes.std() > 0.1
