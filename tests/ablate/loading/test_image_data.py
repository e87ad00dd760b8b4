"""Images by name: torchvision's data sets, Hugging Face data sets on disk, Waterbirds and CelebA as WILDS has them."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablate
from ablate.loading import HuggingFaceData, TimmModel, TorchvisionData, Transform, WildsData

Untouched = Callable[..., AbstractContextManager[None]]

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def transform() -> Transform:
    _, found = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    assert found is not None
    return found


def _same_as_the_library(examples: ablate.Examples, images: list[Any], transform: Transform) -> None:
    assert examples.inputs().dtype == torch.uint8
    assert not examples.in_memory
    expected = torch.stack([transform(image.convert("RGB")) for image in images])
    assert torch.equal(examples.model_inputs(), expected)


def _mnist(root: Path, name: str = "MNIST") -> list[Any]:
    """Writes three images of digits as MNIST's files have them."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("t10k", 3), ("train", 1)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, count, 28, 28) + pixels[:count].tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes([7, 0, 9][:count]))
        for kind in ("images-idx3", "labels-idx1"):
            file = raw / f"{part}-{kind}-ubyte"
            (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    return [Image.fromarray(image) for image in pixels]


def _torchvision(root: Path, transform: Transform | None, **values: Any) -> ablate.Examples:
    source = TorchvisionData(**{"source": "torchvision", "root": str(root), "split": "test"} | values)
    return ablate.load_data(source, transform)


@pytest.mark.parametrize(("name", "groups"), [("MNIST", "7 - seven"), ("FashionMNIST", "Sneaker")])
def test_files_of_mnist(name: str, groups: str, tmp_path: Path, transform: Transform, untouched: Untouched) -> None:
    images = _mnist(tmp_path, name)
    with untouched():
        examples = _torchvision(tmp_path, transform, name=name)
    assert examples.targets.tolist() == [7, 0, 9]
    assert examples.ids == ("test/00000", "test/00001", "test/00002")
    assert examples.groups[0] == groups
    _same_as_the_library(examples, images, transform)
    assert len(_torchvision(tmp_path, transform, name=name, split="train")) == 1


def test_files_of_cifar10(tmp_path: Path, transform: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    from torchvision.datasets import cifar

    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": pixels.reshape(2, -1), "labels": [3, 5]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    with pytest.raises(
        ablate.LoadError, match=r"^torchvision cannot read CIFAR10 at .*: missing, incomplete or damaged"
    ):
        _torchvision(tmp_path, transform, name="CIFAR10")  # other files than the published ones are not unpickled
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    examples = _torchvision(tmp_path, transform, name="CIFAR10")
    assert examples.targets.tolist() == [3, 5]
    assert examples.groups == ("class 3", "class 5")
    _same_as_the_library(examples, [Image.fromarray(p.transpose(1, 2, 0)) for p in pixels], transform)


def test_files_of_gtsrb(tmp_path: Path, transform: Transform, photo: Any) -> None:
    folder = tmp_path / "gtsrb" / "GTSRB" / "Training"
    images = [photo, photo.rotate(90), photo.rotate(180)]
    for label, image in zip((0, 0, 1), images, strict=True):
        (folder / f"{label:05d}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{label:05d}" / f"{len(list(folder.rglob('*.ppm')))}.ppm")
    examples = _torchvision(tmp_path, transform, name="GTSRB", split="train")
    assert examples.targets.tolist() == [0, 0, 1]
    assert examples.groups == ("0", "0", "1"), "torchvision has no names for these classes"
    _same_as_the_library(examples, images, transform)


def test_a_data_set_without_splits(tmp_path: Path, transform: Transform, photo: Any) -> None:
    for name in ("AnnualCrop", "Forest"):
        (tmp_path / "eurosat" / "2750" / name).mkdir(parents=True)
        photo.save(tmp_path / "eurosat" / "2750" / name / "1.png")
    examples = _torchvision(tmp_path, transform, name="EuroSAT", split=None)
    assert examples.groups == ("AnnualCrop", "Forest")
    assert examples.ids == ("00000", "00001")


def test_every_named_data_set_is_torchvisions() -> None:
    from torchvision import datasets

    from ablate.loading.datasets.images import TORCHVISION_FILES

    assert not [name for name in TORCHVISION_FILES if name not in datasets.__all__]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "CIFAR-10"},
            "No torchvision data set 'CIFAR-10'. Did you mean 'CIFAR10' or 'CIFAR100'? Other images: source = "
            "'imagefolder'; ImageNet's val folder is one.",
        ),
        (
            {"name": "MNIST", "split": "val"},
            "torchvision's MNIST refuses split 'val': its splits are train and test.",
        ),
        ({"name": "MNIST", "split": None}, "torchvision's MNIST has splits. Name one, e.g. split = 'test'."),
        ({"name": "EuroSAT"}, "torchvision's EuroSAT has no splits. Leave split out."),
        ({"name": "GTSRB", "split": "val"}, "torchvision's GTSRB refuses split 'val': Unknown value 'val' for"),
        (
            {"name": "CIFAR10"},
            "torchvision cannot read CIFAR10 at {0}/cifar-10-batches-py: missing, incomplete or damaged. Nothing is "
            "downloaded here. Where there is a network, run torchvision.datasets.CIFAR10('{0}', train=False, "
            "download=True), and copy cifar-10-batches-py into {0}.",
        ),
        ({"name": "Food101"}, "torchvision cannot read Food101 at {0}/food-101: missing, incomplete or damaged."),
        ({"name": "SVHN"}, "torchvision cannot read SVHN at {0}/test_32x32.mat: missing, incomplete or damaged."),
    ],
)
def test_torchvision_data_that_cannot_be(
    values: dict[str, Any], message: str, tmp_path: Path, transform: Transform
) -> None:
    with pytest.raises(ablate.AblateError) as caught:
        _torchvision(tmp_path, transform, **values)
    assert str(caught.value).startswith(message.format(tmp_path))


def test_images_need_a_transform(tmp_path: Path) -> None:
    _mnist(tmp_path)
    with pytest.raises(ablate.LoadError, match=r"^MNIST needs a model that knows how its images are prepared: torch"):
        _torchvision(tmp_path, None, name="MNIST")


@pytest.fixture
def hugging_face(tmp_path: Path, photo: Any) -> Path:
    """A data set on disk with a split, named classes, a column of groups and one of numbers."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "place": datasets.Value("string"),
            "weight": datasets.Value("float32"),
        }
    )
    rows = {
        "image": [photo, photo.rotate(90), photo.convert("L")],
        "label": [1, 0, 1],
        "place": ["sofa", "tree", "tree"],
        "weight": [0.5, 1.5, 2.5],
    }
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path / "pets")
    data.save_to_disk(tmp_path / "flat")
    return tmp_path


def _hf(path: Path, transform: Transform | None, **values: Any) -> ablate.Examples:
    return ablate.load_data(HuggingFaceData(**{"source": "datasets", "path": str(path)} | values), transform)


def test_a_data_set_of_hugging_face(hugging_face: Path, transform: Transform, photo: Any, untouched: Untouched) -> None:
    with untouched():
        examples = _hf(hugging_face / "pets", transform, split="test")
        examples.inputs()
    assert examples.targets.tolist() == [1, 0, 1]
    assert examples.groups == ("dog", "cat", "dog")
    assert examples.ids == ("test/00000", "test/00001", "test/00002")
    _same_as_the_library(examples, [photo, photo.rotate(90), photo.convert("L")], transform)
    flat = _hf(hugging_face / "flat", transform, group_column="place")
    assert flat.groups == ("sofa", "tree", "tree")
    assert flat.ids == ("00000", "00001", "00002")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nothing", {}, "No folder at {0}/nothing. Make one with the data set's save_to_disk(path)."),
        ("", {}, "{0} is no data set of Hugging Face's datasets on disk: FileNotFoundError: "),
        ("pets", {}, "{0}/pets has splits: train, test. Name one, e.g. split = 'test'."),
        ("pets", {"split": "tset"}, "No split of {0}/pets 'tset'. Did you mean 'test'?"),
        ("flat", {"split": "test"}, "{0}/flat has no splits. Leave split out."),
        ("flat", {"image_column": "images"}, "No column of {0}/flat 'images'. Did you mean 'image'?"),
        ("flat", {"image_column": "weight"}, "Column 'weight' of {0}/flat holds Value, expected images: cast it with"),
        ("flat", {"label_column": "place"}, "Column 'place' of {0}/flat holds 'sofa', expected integers: the classes."),
    ],
)
def test_hugging_face_data_that_cannot_be(
    name: str, values: dict[str, Any], message: str, hugging_face: Path, transform: Transform
) -> None:
    with pytest.raises(ablate.AblateError) as caught:
        _hf(hugging_face / name, transform, **values)
    assert str(caught.value).startswith(message.format(hugging_face))


def test_a_missing_package_is_named(tmp_path: Path, transform: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ablate.LoadError, match=r"Install it: pip install 'component-attribution\[datasets\]'$"):
        _hf(tmp_path, transform)


@pytest.fixture
def wilds(tmp_path: Path, photo: Any) -> Path:
    """Both data sets with four images each, one of them in the train split."""
    birds = tmp_path / "waterbirds_v1.0"
    faces = tmp_path / "celebA_v1.0"
    (birds / "001.Albatross").mkdir(parents=True)
    (faces / "img_align_celeba").mkdir(parents=True)
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    attributes, partition = ["image_id,Male,Young,Blond_Hair"], ["image_id,partition"]
    for i, (y, place, split) in enumerate([(0, 0, 2), (1, 0, 2), (0, 1, 0), (1, 1, 2)]):
        image = photo.rotate(20 * i)
        image.save(birds / "001.Albatross" / f"{i}.png")
        image.save(faces / "img_align_celeba" / f"{i:06d}.png")
        rows.append(f"{i + 1},001.Albatross/{i}.png,{y},{split},{place},/b/beach/1.jpg")
        attributes.append(f"{i:06d}.png,{2 * place - 1},1,{2 * y - 1}")
        partition.append(f"{i:06d}.png,{split}")
    (birds / "metadata.csv").write_text("\n".join(rows))
    (faces / "list_attr_celeba.csv").write_text("\n".join(attributes))
    (faces / "list_eval_partition.csv").write_text("\n".join(partition))
    return tmp_path


def _wilds(root: Path, transform: Transform | None, **values: Any) -> ablate.Examples:
    source = WildsData(**{"source": "wilds", "name": "waterbirds", "root": str(root), "split": "test"} | values)
    return ablate.load_data(source, transform)


def test_waterbirds(wilds: Path, transform: Transform, photo: Any, untouched: Untouched) -> None:
    with untouched():
        examples = _wilds(wilds, transform)
    assert examples.ids == tuple(f"001.Albatross/{i}.png" for i in (0, 1, 3))
    assert examples.targets.tolist() == [0, 1, 1]
    assert examples.groups == (
        "y:landbird-background:land",
        "y:waterbird-background:land",
        "y:waterbird-background:water",
    )
    _same_as_the_library(examples, [photo.rotate(20 * i) for i in (0, 1, 3)], transform)
    assert _wilds(wilds, transform, split="train").groups == ("y:landbird-background:water",)


def test_celeba(wilds: Path, transform: Transform, photo: Any) -> None:
    examples = _wilds(wilds, transform, name="celebA")
    assert examples.ids == ("000000.png", "000001.png", "000003.png")
    assert examples.targets.tolist() == [0, 1, 1]
    assert examples.groups == ("y:not_blond-male:no", "y:blond-male:no", "y:blond-male:yes")
    _same_as_the_library(examples, [photo.rotate(20 * i) for i in (0, 1, 3)], transform)


def test_wilds_that_cannot_be(wilds: Path, transform: Transform) -> None:
    with pytest.raises(ablate.LoadError) as caught:
        _wilds(wilds / "x", transform)
    assert str(caught.value) == (
        f"No file at {wilds}/x/waterbirds_v1.0/metadata.csv. root must hold the folder waterbirds_v1.0 as WILDS has "
        "it; nothing is downloaded."
    )
    with pytest.raises(ablate.LoadError, match=r"waterbirds_v1\.0 lists no images of split 'val'\.$"):
        _wilds(wilds, transform, split="val")
    table = wilds / "waterbirds_v1.0" / "metadata.csv"
    text = table.read_text()
    table.write_text(text.replace("place,", "plaza,"))
    with pytest.raises(ablate.LoadError, match=r"metadata\.csv has no column place; it has img_id, img_filename, y,"):
        _wilds(wilds, transform)
    table.write_text(text.replace("3.png,1", "3.png,2"))
    with pytest.raises(ablate.LoadError) as caught:
        _wilds(wilds, transform)
    assert str(caught.value) == (
        f"{wilds}/waterbirds_v1.0 has a label or background outside the known ones, for '001.Albatross/3.png'."
    )
    partition = wilds / "celebA_v1.0" / "list_eval_partition.csv"
    partition.write_text(partition.read_text().replace("000001", "000007"))
    with pytest.raises(ablate.LoadError, match=r"do not list the same images in the same order\.$"):
        _wilds(wilds, transform, name="celebA")
