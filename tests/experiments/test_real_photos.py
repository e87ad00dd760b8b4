"""Photos of a folder: their classes by every layout, splits that share no bytes and never change, the right ones."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ablate.errors import DataError, LoadError
from experiments.real.photos import Photo, find_photos, photo_examples, right_ones, split


def _save(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), (red, 20, 30), dtype=np.uint8)).save(path)


def _prepare(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("207.png", 207),
        ("007.PNG", 7),
        ("207_golden_retriever.png", 207),
        ("817_sports_car/3.png", 817),
        ("snow/817_sports_car/a.png", 817),
        ("n01440764/ILSVRC2012_val_00000293.png", 0),
        ("val/n02099601/n02099601_10.png", 207),
        ("n02099601_golden_retriever.png", 207),
    ],
)
def test_name_or_folder_says_the_class(tmp_path: Path, name: str, label: int) -> None:
    _save(tmp_path / name, 1)
    (found,) = find_photos(tmp_path)
    assert (found.id, found.label) == (name, label)


@pytest.mark.parametrize("name", ["cat.png", "1000.png", "n99999999/a.png", "3d.png", "20240101.png"])
def test_a_photo_without_a_class_is_named(tmp_path: Path, name: str) -> None:
    _save(tmp_path / name, 1)
    with pytest.raises(
        DataError, match=rf"^The class of {re.escape(str(tmp_path / name))} cannot be told\. Pass --phot"
    ):
        find_photos(tmp_path)


def test_without_photos_it_says_where_they_come_from(tmp_path: Path) -> None:
    empty = f"{re.escape(str(tmp_path))} holds no photos"
    for folder, start in ((None, "No photos are given"), (tmp_path / "no", "No folder at "), (tmp_path, empty)):
        with pytest.raises(LoadError, match=rf"^{start}.*ImageNet's validation photos are at image-net\.org"):
            find_photos(folder)


def _photos(count: int) -> list[Photo]:
    return [Photo(f"{i}.jpg", Path(), i, hashlib.sha256(b"%d" % i).hexdigest()) for i in range(count)]


def test_splits_are_disjoint_stable_and_of_about_the_wanted_size() -> None:
    photos = _photos(3000)
    parts = split(photos, {"train": 0.6, "validation": 0.1, "test": 0.3})
    assert sorted(photo.label for part in parts.values() for photo in part) == list(range(3000))
    np.testing.assert_allclose([len(part) / 3000 for part in parts.values()], [0.6, 0.1, 0.3], atol=0.03)
    for name, part in split(photos[1000:1100], {"train": 0.6, "validation": 0.1, "test": 0.3}).items():
        assert set(part) <= set(parts[name]), "a photo moved when others went"


def test_a_copy_under_another_name_goes_where_the_photo_went(tmp_path: Path) -> None:
    for i in range(20):
        _save(tmp_path / f"{i}.png", i)
        _save(tmp_path / f"{i}_again.png", i)
    halves = split(find_photos(tmp_path))
    assert sum(len(half) for half in halves.values()) == 40
    hashes = [{photo.sha256 for photo in half} for half in halves.values()]
    assert not hashes[0] & hashes[1]
    assert all(hashes)


@pytest.mark.parametrize("parts", [{}, {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.0}])
def test_shares_must_add_up(parts: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected shares above 0 that add up to 1"):
        split(_photos(3), parts)


class _Red(nn.Module):
    """Takes a photo for class 1 where it is more than half red, else for class 0."""

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 2)."""
        red = images[:, 0].mean(dim=(1, 2))
        return torch.stack([0.5 - red, red - 0.5], dim=1)


def test_the_right_ones_are_found(tmp_path: Path) -> None:
    for name, red in (("0_a", 10), ("0_b", 250), ("1_a", 250), ("1_b", 10), ("1_c", 200)):
        _save(tmp_path / f"{name}.png", red)
    examples = photo_examples(find_photos(tmp_path), _prepare)
    assert examples.groups[:3] == ("000 tench", "000 tench", "001 goldfish")
    right = right_ones(_Red(), examples, batch=2)
    assert [examples.ids[i] for i in right] == ["0_a.png", "1_a.png", "1_c.png"]


def test_photos_can_be_shrunk(tmp_path: Path) -> None:
    _save(tmp_path / "3.png", 100)
    examples = photo_examples(find_photos(tmp_path), _prepare, size=4)
    assert examples.in_memory
    torch.testing.assert_close(examples.inputs()[0, :, 0, 0] * 255, torch.tensor([100.0, 20.0, 30.0]))
    assert examples.inputs().shape == (1, 3, 4, 4)
