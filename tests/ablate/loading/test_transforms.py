"""A model's own preprocessing in two parts, geometry and normalisation, gives what the library's own gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ablate
from ablate.loading import TimmModel
from ablate.loading.datasets.images import image_examples
from ablate.loading.transforms import Transform, split_transform


def _prepared(transform: Transform, image: Any) -> tuple[ablate.Examples, Tensor]:
    examples = image_examples(lambda _: image, [0], ["photo"], None, transform, "A photo")
    return examples, examples.model_inputs()[0]


TORCHVISION = ["resnet18", "inception_v3", "vit_b_16", "efficientnet_v2_m", "swin_v2_t", "regnet_y_400mf"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_presets(name: str, photo: Any) -> None:
    from torchvision.models import get_model_weights

    transform = get_model_weights(name).DEFAULT.transforms()
    examples, found = _prepared(transform, photo)
    assert examples.inputs().dtype == torch.uint8
    assert torch.equal(found, transform(photo))


# Every way to crop and to interpolate that timm's own models ask for.
TIMM: list[dict[str, Any]] = [
    {},
    {"interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    {"crop_mode": "squash", "crop_pct": 1.0},
    {"crop_mode": "border", "crop_pct": 0.9},
    {"input_size": (3, 64, 96)},
    {"interpolation": "nearest"},
]


@pytest.mark.parametrize("options", TIMM, ids=str)
def test_timm_transforms(options: dict[str, Any], photo: Any) -> None:
    timm: Any = pytest.importorskip("timm")
    transform = timm.data.create_transform(**{"input_size": (3, 64, 64), "is_training": False} | options)
    examples, found = _prepared(transform, photo)
    assert examples.inputs().dtype == torch.uint8
    assert torch.equal(found, transform(photo))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clip_transforms(mode: str, photo: Any) -> None:
    import open_clip

    transform = open_clip.image_transform(64, is_train=False, resize_mode=mode)
    examples, found = _prepared(transform, photo)
    assert examples.normalize == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert torch.equal(found, transform(photo))


def test_numbers_of_a_float32_tensor_are_as_they_are_written() -> None:
    timm: Any = pytest.importorskip("timm")
    transform = timm.data.create_transform(
        input_size=(3, 64, 64), is_training=False
    )  # keeps its mean and std as tensors
    assert split_transform(transform).normalize == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_transform_of_ones_own(photo: Any) -> None:
    from torchvision import transforms

    own = transforms.Compose(
        [transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    )
    examples, found = _prepared(own, photo)
    assert examples.normalize == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(found, own(photo))


def test_grey_images_for_a_grey_model(photo: Any) -> None:
    from torchvision import transforms

    own = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))])
    _, found = _prepared(own, photo)
    assert torch.equal(found, own(photo.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_mode_become_rgb(mode: str, photo: Any) -> None:
    _, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    assert transform is not None
    image = photo.convert(mode)
    _, found = _prepared(transform, image)
    assert torch.equal(found, transform(image.convert("RGB")))


def test_what_cannot_be_split_gives_floats_as_it_is(photo: Any) -> None:
    from torchvision import transforms

    for own in (
        transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()]),
        transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.2,) * 3), transforms.Resize(9)]),
        lambda image: torch.ones(3, 4, 4) * image.size[0],
    ):
        examples, found = _prepared(own, photo)
        assert examples.normalize is None
        assert found.dtype == torch.float32
        assert torch.equal(found, own(photo))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, "The model's transform turns an image into a Image, expected a tensor (channels,"),
        (lambda image: torch.zeros(4), "The model's transform turns an image into (4,), expected a tensor (channels,"),
        (lambda image: image.no_such_thing, "cannot be prepared: AttributeError: "),
    ],
)
def test_a_transform_that_does_not_fit_is_named_at_once(transform: Any, message: str, photo: Any) -> None:
    with pytest.raises(ablate.DataError) as caught:
        _prepared(transform, photo)
    assert str(caught.value).startswith("Image 'photo'")
    assert message in str(caught.value)


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path, photo: Any) -> None:
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    _, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    examples = ablate.load_data(ablate.loading.ImageFolderData(source="imagefolder", path=str(tmp_path)), transform)
    with pytest.raises(ablate.DataError, match=r"^Image 'cat/1\.png' cannot be read: UnidentifiedImageError: .*remove"):
        examples.inputs()
