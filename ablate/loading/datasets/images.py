"""Images of torchvision's data sets, of folders, and of Hugging Face data sets on disk; decoded when they are used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ablate.data.examples import Examples
from ablate.errors import DataError, LoadError, UnknownNameError
from ablate.loading.packages import one_line, require
from ablate.loading.transforms import Preparation, Transform, apply, split_transform

# What torchvision can read without a download, and where under `root` it looks for the files.
TORCHVISION_FILES = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "Caltech101": "caltech101",
    "Caltech256": "caltech256",
    "Country211": "country211",
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "FGVCAircraft": "fgvc-aircraft-2013b",
    "FashionMNIST": "FashionMNIST/raw",
    "Flowers102": "flowers-102",
    "Food101": "food-101",
    "GTSRB": "gtsrb",
    "Imagenette": "imagenette2",
    "KMNIST": "KMNIST/raw",
    "MNIST": "MNIST/raw",
    "OxfordIIITPet": "oxford-iiit-pet",
    "RenderedSST2": "rendered-sst2",
    "STL10": "stl10_binary",
    "SUN397": "SUN397",
    "SVHN": "{split}_32x32.mat",
    "StanfordCars": "stanford_cars",
}


class PreparedImages(Dataset[tuple[Tensor, int]]):
    """Images, read and prepared when an item is asked for."""

    def __init__(
        self, read: Callable[[int], Any], labels: Sequence[int], ids: Sequence[str], preparation: Preparation
    ) -> None:
        self._read, self._labels, self._ids, self._preparation = read, labels, ids, preparation

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        name = self._ids[item]
        try:
            image = self._read(item)
        except DataError as error:
            raise DataError(f"Image {name!r}: {error}") from error
        except Exception as error:  # whatever a decoder raises
            raise DataError(
                f"Image {name!r} cannot be read: {type(error).__name__}: {one_line(error)}. Check or remove it."
            ) from error
        return apply(self._preparation, image, name), self._labels[item]


def image_examples(
    read: Callable[[int], Any],
    labels: Sequence[int],
    ids: Sequence[str],
    groups: Sequence[str] | None,
    transform: Transform | None,
    what: str,
) -> Examples:
    """Returns examples whose image i is `read(i)`, a PIL image, prepared by the model's transform.

    Reads the first image, so that a transform that does not fit is named at once; the others when they are used.
    """
    if transform is None:
        raise LoadError(
            f"{what} needs a model that knows how its images are prepared: torchvision, timm, open_clip, or a factory "
            "that returns (model, transform). For your own model, you may also prepare the images yourself and pass "
            "source = 'arrays'."
        )
    preparation = split_transform(transform)
    images = PreparedImages(read, labels, ids, preparation)
    if len(images) > 0:
        images[0]
    return Examples(images, labels, ids, groups, normalize=preparation.normalize)


def torchvision_data(name: str, root: Path, split: str | None, transform: Transform | None) -> Examples:
    """Returns a split of one of torchvision's data sets, from files that lie under `root`; downloads nothing.

    CIFAR10 and CIFAR100 are pickled Python: torchvision itself reads them, after it has compared their md5 with the
    published one. Groups are the classes.
    """
    datasets = require("torchvision").datasets
    if name not in TORCHVISION_FILES:
        advice = "Other images: source = 'imagefolder'; ImageNet's val folder is one."
        raise UnknownNameError("torchvision data set", name, TORCHVISION_FILES, advice)
    kind = getattr(datasets, name)
    arguments = _split_argument(name, kind, split)
    place = TORCHVISION_FILES[name].format(split=split)
    try:
        data = kind(str(root), **arguments, download=False)
    except ValueError as error:
        raise LoadError(f"torchvision's {name} refuses split {split!r}: {one_line(error)}.") from error
    except ImportError as error:
        raise LoadError(f"torchvision's {name} needs another package: {one_line(error)}.") from error
    except Exception as error:  # missing and damaged files: RuntimeError, OSError and what parsers raise
        call = ", ".join([repr(str(root)), *(f"{key}={value!r}" for key, value in arguments.items())])
        raise LoadError(
            f"torchvision cannot read {name} at {root / place}: missing, incomplete or damaged. Nothing is downloaded "
            f"here. Where there is a network, run torchvision.datasets.{name}({call}, download=True), and copy {place} "
            f"into {root}."
        ) from error
    labels = _labels_of(data)
    ids = [f"{split}/{i:05d}" if split else f"{i:05d}" for i in range(len(labels))]
    return image_examples(
        partial(_image, data), labels, ids, _class_names(getattr(data, "classes", None), labels), transform, name
    )


def _split_argument(name: str, kind: Any, split: str | None) -> dict[str, Any]:
    """Returns how this class of torchvision is told which split."""
    parameters = inspect.signature(kind).parameters
    if "split" not in parameters and "train" not in parameters:
        if split is not None:
            raise LoadError(f"torchvision's {name} has no splits. Leave split out.")
        return {}
    if split is None:
        raise LoadError(f"torchvision's {name} has splits. Name one, e.g. split = 'test'.")
    if "split" in parameters:
        return {"split": split}
    if split not in ("train", "test"):
        raise LoadError(f"torchvision's {name} refuses split {split!r}: its splits are train and test.")
    return {"train": split == "train"}


def _labels_of(data: Any) -> list[int]:
    """Returns all labels; decodes no image where torchvision keeps the labels beside them."""
    for name in ("targets", "labels", "_labels", "y"):
        labels = getattr(data, name, None)
        if labels is not None and len(labels) == len(data):
            return [int(label) for label in labels]
    for name in ("samples", "_samples"):
        samples = getattr(data, name, None)
        if samples is not None and len(samples) == len(data):
            return [int(sample[1]) for sample in samples]
    return [int(data[i][1]) for i in range(len(data))]


def _class_names(names: Any, labels: Sequence[int]) -> list[str] | None:
    """Returns each example's class by name, or None where the names are not known."""
    if not names or max(labels, default=0) >= len(names) or min(labels, default=0) < 0:
        return None
    return [str(names[label]) for label in labels]


def _image(data: Any, i: int) -> Any:
    return data[i][0]


def hf_images(
    path: Path,
    split: str | None,
    image_column: str,
    label_column: str,
    group_column: str | None,
    transform: Transform | None,
) -> Examples:
    """Returns a Hugging Face data set that was written with `save_to_disk`; groups are a column, or the classes."""
    datasets = require("datasets", "datasets")
    if not path.is_dir():
        raise LoadError(f"No folder at {path}. Make one with the data set's save_to_disk(path).")
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # missing and damaged files raise many types
        raise LoadError(
            f"{path} is no data set of Hugging Face's datasets on disk: {type(error).__name__}: {one_line(error)}. "
            "Make one with the data set's save_to_disk(path)."
        ) from error
    data = _hf_split(path, data, split)
    for column in (image_column, label_column, *([] if group_column is None else [group_column])):
        if column not in data.column_names:
            raise UnknownNameError(f"column of {path}", column, data.column_names)
    kind = type(data.features[image_column]).__name__
    if kind != "Image":
        raise LoadError(
            f"Column {image_column!r} of {path} holds {kind}, expected images: cast it with "
            f"data.cast_column({image_column!r}, datasets.Image()), or name another image_column."
        )
    labels = data[label_column][:]
    if not all(isinstance(label, int) for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int))
        raise LoadError(
            f"Column {label_column!r} of {path} holds {wrong!r}, expected integers: the classes. "
            f"data.class_encode_column({label_column!r}) makes them."
        )
    groups: Any = data[group_column][:] if group_column is not None else None
    if groups is None:
        groups = _class_names(getattr(data.features[label_column], "names", None), labels)
    ids = [f"{split}/{i:05d}" if split else f"{i:05d}" for i in range(len(labels))]
    read = partial(_cell, data.select_columns([image_column]), image_column)
    return image_examples(read, labels, ids, groups, transform, "A data set of images")


def _hf_split(path: Path, data: Any, split: str | None) -> Any:
    splits = list(data) if isinstance(data, dict) else []
    if split is None and splits:
        raise LoadError(f"{path} has splits: {', '.join(splits)}. Name one, e.g. split = {splits[-1]!r}.")
    if split is not None and not splits:
        raise LoadError(f"{path} has no splits. Leave split out.")
    if split is not None and split not in splits:
        raise UnknownNameError(f"split of {path}", split, splits)
    return data[split] if split is not None else data


def _cell(data: Any, column: str, i: int) -> Any:
    return data[i][column]
