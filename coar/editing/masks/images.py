"""Images to draw from, of a tensor or of examples, which may be read from disk item by item."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ablate import Examples
from coar.errors import EditError


class Images:
    """Images as a model takes them. Mutates nothing.

    Raises:
      EditError: Fewer than two, not (examples, channels, height, width), or values that are not finite in a tensor.
    """

    def __init__(self, source: Tensor | Examples) -> None:
        self._source = source
        shape = tuple(source.shape) if isinstance(source, Tensor) else (len(source), *source.input(0).shape)
        if len(shape) != 4 or shape[0] < 2:
            raise EditError(
                f"Images have shape {shape}, expected (examples, channels, height, width) with at least 2 examples: a "
                "rectangle of one is pasted into another."
            )
        if isinstance(source, Tensor) and not (source.is_floating_point() and bool(torch.isfinite(source).all())):
            raise EditError(
                f"Images are {source.dtype} or hold values that are not finite; expected floats as the model takes "
                "them. For uint8 pixels give ablate.Examples(..., normalize=(mean, std))."
            )

    def __len__(self) -> int:
        return len(self._source)

    def choose(self, count: int, draw: torch.Generator) -> list[int]:
        """Returns distinct positions, `count` of them or, of fewer images, the largest even number there is."""
        count = min(count, len(self) - len(self) % 2)
        return [int(position) for position in torch.randperm(len(self), generator=draw)[:count]]

    def draw(self, positions: Sequence[int]) -> Tensor:
        """Returns the images at these positions, ready for the model."""
        if isinstance(self._source, Tensor):
            return self._source[list(positions)]
        return self._source.prepared(torch.stack([self._source.input(position) for position in positions]))

    @cached_property
    def hash(self) -> str:
        """The sha256 (hex) of all images. Cost: one pass over them."""
        if not isinstance(self._source, Tensor):
            return self._source.hash
        hasher = hashlib.sha256(f"{self._source.dtype}:{tuple(self._source.shape)};".encode())
        for image in self._source.detach().cpu():
            hasher.update(image.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()
