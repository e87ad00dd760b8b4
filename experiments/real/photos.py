"""Photos of a folder with their ImageNet classes, split by their content; none come with the project."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ablate import Examples
from ablate.errors import DataError, LoadError
from ablate.loading.datasets.images import image_examples
from ablate.loading.imagenet import ImageNetClasses
from ablate.loading.pixels import read_image

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
WHERE_FROM = (
    "Pass --photos FOLDER with photos of ImageNet's classes: files or folders named by class index (207.jpg, "
    "207_golden_retriever/a.jpg), or as ImageNet names them (n02099601/ILSVRC2012_val_00000001.JPEG, "
    "n02099601_golden_retriever.JPEG). ImageNet's validation photos are at image-net.org, for research; one photo a "
    "class is in the collection imagenet-sample-images on GitHub. None are downloaded, and none come with the project."
)
HALVES: Mapping[str, float] = {"choose": 0.5, "report": 0.5}


@dataclass(frozen=True)
class Photo:
    """One file: its path within the folder, its class, and the sha256 of its bytes."""

    id: str
    file: Path
    label: int
    sha256: str


def find_photos(folder: Path | None) -> list[Photo]:
    """Returns the photos of a folder and of its sub-folders, by name.

    Raises:
      LoadError: No folder, or no photos in it; says where they come from.
      DataError: A file whose class its name and its folder do not say.
    """
    if folder is None or not folder.is_dir():
        raise LoadError(f"{'No photos are given' if folder is None else f'No folder at {folder}'}. {WHERE_FROM}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise LoadError(f"{folder} holds no photos ({', '.join(sorted(ENDINGS))}). {WHERE_FROM}")
    synsets = {synset: i for i, synset in enumerate(ImageNetClasses("imagenet-1k").wordnet)}
    return [_photo(file, file.relative_to(folder), synsets) for file in files]


def _photo(file: Path, name: Path, synsets: Mapping[str, int]) -> Photo:
    # the folder first: a file in it may have a number that counts
    for part in (*reversed(name.parts[:-1]), name.stem):
        found = re.match(r"(n\d{8}|\d{1,4})(?![0-9a-zA-Z])", part)
        label = -1 if found is None else synsets.get(found[1], -1) if found[1][0] == "n" else int(found[1])
        if 0 <= label < len(synsets):
            return Photo(name.as_posix(), file, label, hashlib.sha256(file.read_bytes()).hexdigest())
    raise DataError(f"The class of {file} cannot be told. {WHERE_FROM}")


def split(photos: Sequence[Photo], parts: Mapping[str, float] = HALVES) -> dict[str, list[Photo]]:
    """Returns the photos of every part; shares are those expected, not exact ones.

    A photo's bytes alone say where it goes: parts share none, whatever files are called, and a photo stays where it is
    when others come or go.
    """
    if not parts or min(parts.values()) <= 0 or abs(sum(parts.values()) - 1) > 1e-9:
        raise DataError(f"Parts are {dict(parts)}, expected shares above 0 that add up to 1.")
    chosen: dict[str, list[Photo]] = {name: [] for name in parts}
    names, ends = list(parts), list(accumulate(parts.values()))
    for photo in photos:
        place = int(photo.sha256[:13], 16) / 16**13
        part = min(bisect_right(ends, place), len(ends) - 1)  # the last part also has what rounding leaves
        chosen[names[part]].append(photo)
    return chosen


def photo_examples(
    photos: Sequence[Photo], transform: Callable[[Any], Any] | None, size: int | None = None
) -> Examples:
    """Returns photos as a model wants them, decoded when they are used; groups are the classes' names.

    Args:
      photos: At least one.
      transform: The model's.
      size: Shrink to so many pixels a side, at once and into memory: real networks run on small images, too, at a
        fraction of the cost. None: as the transform makes them.
    """
    names = ImageNetClasses("imagenet-1k").names
    labels, ids = [photo.label for photo in photos], [photo.id for photo in photos]
    groups = [f"{label:03d} {names[label]}" for label in labels]  # two classes are called crane
    read = partial(_read, [photo.file for photo in photos])
    examples = image_examples(read, labels, ids, groups, transform, "A folder of photos")
    return examples if size is None else _shrunk(examples, size)


def _read(files: Sequence[Path], i: int) -> Any:
    return read_image(files[i])


def _shrunk(examples: Examples, size: int) -> Examples:
    pixels = F.interpolate(examples.inputs().float(), size=(size, size), mode="bicubic", antialias=True)
    if examples.normalize is not None:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return Examples(pixels, examples.targets, examples.ids, examples.groups, normalize=examples.normalize)


def right_ones(model: nn.Module, examples: Examples, batch: int = 50) -> list[int]:
    """Returns the positions of the examples that a model in eval mode predicts right. Mutates nothing."""
    found: list[int] = []
    with torch.inference_mode():
        for start, inputs, targets in examples.chunks(batch):
            right = model(examples.prepared(inputs)).argmax(dim=1) == targets
            found += (start + torch.nonzero(right).flatten()).tolist()
    return found
