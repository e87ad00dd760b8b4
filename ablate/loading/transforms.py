"""A model's own image preprocessing, split into geometry (gives uint8 pixels) and normalisation (where the model runs).

The two together equal the library's own transform bit for bit in float32. Pixels as uint8 are a quarter of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.errors import DataError
from ablate.loading.packages import one_line, require
from ablate.loading.pixels import in_mode, plain

Transform = Callable[[Any], Tensor]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input: `geometry`, and then the normalisation, if it could be split off."""

    geometry: Callable[[Any], Any]
    normalize: Normalisation | None

    def __call__(self, image: Any) -> Tensor:
        """Returns uint8 pixels (channels, height, width) where there is a normalisation, else what the model takes."""
        prepared = self.geometry(self._right_mode(image))
        if self.normalize is not None and not isinstance(prepared, Tensor):
            prepared = require("torchvision").transforms.functional.pil_to_tensor(prepared)
        if not isinstance(prepared, Tensor) or prepared.ndim != 3:
            got = f"{tuple(prepared.shape)}" if isinstance(prepared, Tensor) else f"a {type(prepared).__name__}"
            raise DataError(
                f"The model's transform turns an image into {got}, expected a tensor (channels, height, width). End "
                "it with a step that makes tensors, as torchvision.transforms.ToTensor does."
            )
        return prepared

    def _right_mode(self, image: Any) -> Any:
        if not hasattr(image, "convert"):
            return image  # no PIL image: the transform must know what to do
        image = plain(image)
        if self.normalize is not None:
            return in_mode(image, "L" if len(self.normalize[0]) == 1 else "RGB")
        return in_mode(image, "L" if image.mode == "L" else "RGB")


def split_transform(transform: Transform) -> Preparation:
    """Returns the transform in two parts, where it is one of torchvision's, timm's or open_clip's; else in one."""
    transforms = require("torchvision").transforms
    known: Any = transform
    if type(known) is transforms._presets.ImageClassification:
        return Preparation(_PresetGeometry(known), _normalisation(known.mean, known.std))
    if type(known) is transforms.Compose and len(known.transforms) >= 2:
        *geometry, to_tensor, normalise = known.transforms
        # timm's and open_clip's MaybeToTensor are ToTensor for images
        if isinstance(to_tensor, transforms.ToTensor) and type(normalise) is transforms.Normalize:
            found = _normalisation(normalise.mean, normalise.std)
            if len(found[0]) in (1, 3) and len(found[0]) == len(found[1]):
                return Preparation(transforms.Compose(geometry), found)
    return Preparation(transform, None)


class _PresetGeometry:
    """The resize and crop of torchvision's preset for classification."""

    def __init__(self, preset: Any) -> None:
        self._preset = preset

    def __call__(self, image: Any) -> Any:
        functional = require("torchvision").transforms.functional
        preset = self._preset
        image = functional.resize(
            image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias
        )
        image = functional.center_crop(image, preset.crop_size)
        return image if isinstance(image, Tensor) else functional.pil_to_tensor(image)


def _normalisation(mean: Any, std: Any) -> Normalisation:
    return _numbers(mean), _numbers(std)


def _numbers(values: Tensor | Sequence[float]) -> tuple[float, ...]:
    """Returns plain numbers; those of a float32 tensor as they are written, 0.485 and not 0.48500001430511475."""
    if isinstance(values, Tensor) and values.dtype == torch.float32:
        return tuple(float(str(np.float32(value))) for value in values.tolist())
    return tuple(float(value) for value in values)


def apply(preparation: Preparation, image: Any, name: str) -> Tensor:
    """Returns the prepared image; an error says which image it was."""
    try:
        return preparation(image)
    except DataError as error:
        raise DataError(f"Image {name!r}: {error}") from error
    except Exception as error:  # whatever a transform raises
        raise DataError(
            f"Image {name!r} cannot be prepared: {type(error).__name__}: {one_line(error)}. "
            "Check the file, and the transform that came with the model."
        ) from error
