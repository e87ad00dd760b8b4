"""Examples by name: .npz files, folders of images, and the digits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import ablate
from ablate.loading import ArraysData, DigitsData, ImageFolderData, TimmModel, Transform

COLOURS = {"cat": [(255, 0, 0), (0, 255, 0)], "dog": [(0, 0, 255), (9, 9, 9), (99, 0, 99)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two classes of tiny PNGs, each of one colour."""
    from PIL import Image

    for name, colours in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, colour in enumerate(colours):
            Image.new("RGB", (20 + i, 30), colour).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def transform() -> Transform:
    _, found = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    assert found is not None
    return found


def _arrays(path: Path) -> ablate.Examples:
    return ablate.load_data(ArraysData(source="arrays", path=str(path)))


def _folder(path: Path, transform: Transform | None) -> ablate.Examples:
    return ablate.load_data(ImageFolderData(source="imagefolder", path=str(path)), transform)


def test_arrays_with_ids_and_groups(tmp_path: Path) -> None:
    inputs = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "x.npz", inputs=inputs, targets=[0, 1, 1, 0], ids=list("abcd"), groups=list("xyyx"))
    examples = _arrays(tmp_path / "x.npz")
    assert examples.hash == ablate.Examples(inputs, [0, 1, 1, 0], list("abcd"), list("xyyx")).hash
    assert examples.ids == ("a", "b", "c", "d")


def test_arrays_without_ids_and_groups(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.zeros((2, 3)), targets=np.array([1, 0], dtype=np.int32))
    examples = _arrays(tmp_path / "x.npz")
    assert (examples.ids, examples.groups) == (("0", "1"), ("1", "0"))


def test_arrays_of_pixels(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    np.savez(tmp_path / "x.npz", inputs=pixels, targets=[0, 1], mean=[0.5] * 3, std=[0.25] * 3)
    examples = _arrays(tmp_path / "x.npz")
    assert examples.normalize == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(examples.model_inputs(), (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25)
    np.savez(tmp_path / "x.npz", inputs=pixels, targets=[0, 1], mean=[0.5] * 3)
    with pytest.raises(
        ablate.LoadError, match=r"x\.npz has one of mean and std\. Give both, to normalise uint8 images"
    ):
        _arrays(tmp_path / "x.npz")


def test_arrays_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ablate.LoadError) as caught:
        _arrays(tmp_path / "x.npz")
    assert str(caught.value) == (
        f"No file at {tmp_path}/x.npz. Make one with numpy.savez(path, inputs=..., targets=...)."
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": [1]}, "has no targets; it has inputs."),
        ({"x": [1], "targets": [1]}, "has no inputs; it has targets, x."),
        ({}, "has no inputs and no targets; it has nothing."),
    ],
)
def test_arrays_without_targets(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(ablate.LoadError) as caught:
        _arrays(path)
    assert str(caught.value) == f"{path} {message} Expected inputs, targets and, if wanted, ids and groups."


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"targets": [0.5, 1.0]},
            "Targets are torch.float64 of shape (2,) with fractions, expected whole numbers of shape (examples,): the "
            "class of each. Of a model that predicts a number leave them out and take output='value'; for a loss "
            "against true values pass an Output of your own that holds them.",
        ),
        (
            {"targets": [0, 1], "ids": ["a", "a"]},
            "Ids must be distinct: 1 of 2 repeat another, the first is 'a'.",
        ),
    ],
)
def test_arrays_that_cannot_be_examples_name_their_file(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, inputs=np.zeros((2, 3)), **arrays)
    with pytest.raises(ablate.DataError) as caught:
        _arrays(path)
    assert str(caught.value) == f"{path}: {message}"


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, inputs=np.array([{"a": 1}], dtype=object), targets=[0])
    with pytest.raises(ablate.LoadError) as caught:
        _arrays(path)
    assert str(caught.value) == (
        f"{path} cannot be read as .npz: ValueError: Object arrays cannot be loaded when allow_pickle=False."
    )


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_files_that_are_no_arrays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ablate.LoadError, match=rf"^{path} cannot be read as \.npz: \w+Error: "):
        _arrays(path)


def test_an_image_folder_is_prepared_as_the_model_wants(folder: Path, transform: Transform) -> None:
    from PIL import Image

    examples = _folder(folder, transform)
    assert examples.ids == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png")
    assert examples.groups == ("cat", "cat", "dog", "dog", "dog")
    assert examples.targets.tolist() == [0, 0, 1, 1, 1]
    assert not examples.in_memory
    assert examples.inputs().shape == (5, 3, 160, 160)
    assert examples.inputs().dtype == torch.uint8
    with Image.open(folder / "dog" / "2.png") as image:
        assert torch.equal(examples.model_inputs(4)[0], transform(image.convert("RGB")))


def test_an_image_folder_needs_a_transform(folder: Path) -> None:
    with pytest.raises(ablate.LoadError) as caught:
        _folder(folder, None)
    assert str(caught.value) == (
        "An image folder needs a model that knows how its images are prepared: torchvision, timm, open_clip, or a "
        "factory that returns (model, transform). For your own model, you may also prepare the images yourself and "
        "pass source = 'arrays'."
    )


def test_image_folders_that_cannot_be(tmp_path: Path, transform: Transform) -> None:
    with pytest.raises(ablate.LoadError) as caught:
        _folder(tmp_path / "nothing", transform)
    assert str(caught.value) == (f"No folder at {tmp_path}/nothing. Expected one sub-folder of images per class.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ablate.LoadError) as caught:
        _folder(tmp_path / "empty", transform)
    assert str(caught.value) == (
        f"{tmp_path}/empty is no image folder: Couldn't find any class folder in {tmp_path}/empty."
    )
    (tmp_path / "empty" / "cat").mkdir()
    with pytest.raises(ablate.LoadError, match=r"empty is no image folder: Found no valid file for the classes cat\. "):
        _folder(tmp_path / "empty", transform)


def test_digits_by_group_and_by_split(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    with untouched():
        few = ablate.load_data(DigitsData(source="digits", train_per_group=1, test_per_group=2))
        split = ablate.load_data(DigitsData(source="digits", split="validation"))
    assert len(few) == 4 * (1 + 2)
    assert few.ids[0].startswith("train/digit-")
    assert few.ids[-1].startswith("test/digit-")
    assert len(split) == 400


@pytest.mark.parametrize("arguments", [{}, {"split": "test", "train_per_group": 1}])
def test_digits_are_asked_for_in_one_way(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give either split, or train_per_group and test_per_group"):
        DigitsData(source="digits", **arguments)
