"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ablate.data.classes import class_count
from ablate.data.examples import Examples
from ablate.errors import LoadError
from ablate.loading.datasets.class_folders import Classes, folder_labels
from ablate.loading.datasets.images import image_examples
from ablate.loading.packages import require
from ablate.loading.pixels import read_image
from ablate.loading.transforms import Transform

_WHAT = "An image folder"


def image_folder(
    path: Path,
    transform: Transform | None,
    classes: Classes | None = None,
    model: nn.Module | None = None,
    white: float | None = None,
) -> Examples:
    """Returns the images of a folder with one sub-folder per class; groups are the classes. Hidden folders are none.

    Args:
      path: The folder.
      transform: The model's, from a PIL image to its input.
      classes: Which label each folder has: see `folder_labels`.
      model: Whose number of classes the folders are checked against, by one forward. None: not checked.
      white: The number that is white, of images with more than 8 bits: see `plain`.

    Raises:
      DataError: Which label a folder has cannot be known.
      LoadError: There is no such folder, or no image in it.
    """
    files = _files(path)
    ids = [f"{name}/{file}" for name, inside in files.items() for file in inside]
    groups = [name for name, inside in files.items() for _ in inside]
    read = partial(_read, path, ids, white)
    count = None
    if model is not None:
        unlabelled = image_examples(read, [0] * len(ids), ids, groups, transform, _WHAT)
        count = class_count(model, unlabelled.model_inputs(0, 1))
    labels = folder_labels(path, list(files), classes, count)
    return image_examples(read, [labels[name] for name in groups], ids, groups, transform, _WHAT)


def _read(path: Path, ids: Sequence[str], white: float | None, i: int) -> Any:
    return read_image(path / ids[i], white)


def _files(path: Path) -> dict[str, list[str]]:
    """Returns the images in each class's folder, relative to it; all in the order of their names as texts."""
    if not path.is_dir():
        raise LoadError(f"No folder at {path}. Expected one sub-folder of images per class.")
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name))
    if not names:
        raise LoadError(f"{path} is no image folder: Couldn't find any class folder in {path}.")
    endings = require("torchvision").datasets.folder.IMG_EXTENSIONS
    files = {name: _images(path / name, endings) for name in names}
    empty = [name for name, inside in files.items() if not inside]
    if empty:
        raise LoadError(
            f"{path} is no image folder: Found no valid file for the classes {', '.join(empty)}. Supported extensions "
            f"are: {', '.join(endings)}."
        )
    return files


def _images(folder: Path, endings: Sequence[str]) -> list[str]:
    found = []
    for root, inside, files in os.walk(folder, followlinks=True):
        inside[:] = [name for name in inside if not _hidden(name)]
        found.append((root, [name for name in files if name.lower().endswith(tuple(endings)) and not _hidden(name)]))
    # the order that torchvision's ImageFolder has
    return [
        (Path(root) / name).relative_to(folder).as_posix() for root, files in sorted(found) for name in sorted(files)
    ]


def _hidden(name: str) -> bool:
    return name.startswith(".")
