"""The second moment of what a layer reads, C = mean of k kᵀ: which changes of weights ordinary inputs would notice."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ablate import Examples, model_hash
from ablate.models.copies import device_of
from coar.editing.edits.sealed import read_sealed, write_sealed
from coar.editing.where.blocks import layer_keys
from coar.errors import EditError
from stores.storage.places import user_path

FLOOR = 1e-6  # of the largest eigenvalue: below it, e.g. of channels that never fire, C cannot be inverted
REMEMBERED = 16  # moments kept in memory
KEY = "moment"

_remembered: OrderedDict[str, SecondMoment] = OrderedDict()


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Second moment of the keys of a layer.

    Attributes:
      matrix: (channels, channels) float64, on the CPU.
      positions: How many keys it is the mean of.
      center: Whether the mean key was taken off (then it is a covariance).
    """

    matrix: Tensor
    positions: int
    center: bool = False

    def power(self, exponent: float, floor: float = FLOOR) -> tuple[Tensor, int]:
        """Returns C to a (negative) power and how many eigenvalues were raised to the floor. Mutates nothing.

        Args:
          exponent: -1 or -0.5.
          floor: Smallest eigenvalue that is used as it is, as a part of the largest.

        Raises:
          EditError: All keys are zero.
        """
        values, vectors = torch.linalg.eigh(self.matrix)
        largest = float(values[-1])
        if not largest > 0:
            raise EditError(
                "The second moment is zero: the layer reads nothing but zeros on the reference examples. Select "
                "another layer, or give other reference examples."
            )
        low = values < floor * largest
        powered = values.clamp(min=floor * largest) ** exponent
        return (vectors * powered) @ vectors.T, int(low.sum())


def second_moment(
    model: nn.Module,
    layer: str,
    examples: Examples,
    *,
    center: bool = False,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
) -> SecondMoment:
    """Returns the second moment of what a layer reads, over all positions of all examples. Mutates nothing.

    Computed once per content of model, layer, examples and `center`; kept in memory, and in a file if asked. Cost: one
    pass of the model up to the layer. Memory: two float64 (channels, channels), and one batch of keys in float64.

    Args:
      model: In eval mode.
      layer: Name of the layer.
      examples: Ordinary examples.
      center: Take off the mean key: the covariance instead.
      batch_size: Examples at a time.
      cache: Folder where moments are kept as safetensors.

    Raises:
      EditError: A key that is not finite, or a damaged file in `cache`.
    """
    facts = {"model": model_hash(model), "layer": layer, "data": examples.hash, "center": center}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else user_path(cache) / f"second_moment-{name[:16]}.safetensors"
    found = _remembered.get(name)
    if found is None and path is not None and path.is_file():
        found = _read(path, facts)
    if found is None:
        found = _computed(model, layer, examples, center, batch_size)
    if path is not None and not path.is_file():
        _write(path, found, facts)
    _remembered[name] = found
    _remembered.move_to_end(name)
    while len(_remembered) > REMEMBERED:
        _remembered.popitem(last=False)
    return found


def forget_second_moments() -> None:
    """Forgets the moments kept in memory; files stay. Returns nothing."""
    _remembered.clear()


def _computed(model: nn.Module, layer: str, examples: Examples, center: bool, batch_size: int) -> SecondMoment:
    weight = model.get_parameter(f"{layer}.weight")
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    positions = 0
    for first, batch, _ in examples.chunks(batch_size):
        keys = layer_keys(model, layer, examples.prepared(batch.to(device_of(model)), weight.dtype))
        finite = torch.isfinite(keys).flatten(1).all(dim=1)
        if not finite.all():
            bad = examples.ids[first + int((~finite).nonzero()[0])]
            raise EditError(f"Layer {layer!r} reads NaN or infinite values for reference example {bad!r}.")
        rows = keys.reshape(-1, keys.shape[-1]).double()
        total += (rows.T @ rows).cpu()
        mean += rows.sum(0).cpu()
        positions += len(rows)
    matrix, mean = total / positions, mean / positions
    return SecondMoment(matrix - torch.outer(mean, mean) if center else matrix, positions, center)


def _write(path: Path, moment: SecondMoment, facts: dict[str, Any]) -> None:
    write_sealed(path, KEY, {**facts, "positions": moment.positions}, {"matrix": moment.matrix})


def _read(path: Path, facts: dict[str, Any]) -> SecondMoment:
    try:
        sealed = read_sealed(path, KEY)
        header, matrix = sealed.header, sealed.tensors["matrix"]
        moment = SecondMoment(matrix.double(), int(header["positions"]), bool(facts["center"]))
        intact = {name: header[name] for name in facts} == facts and bool(torch.isfinite(matrix).all())
    except Exception as error:  # safetensors and JSON raise many types
        raise EditError(f"The second moment at {path} cannot be read: {error}. Delete the file.") from error
    if not intact:
        raise EditError(
            f"The second moment at {path} is of something else, or holds values that are not finite. Delete the file."
        )
    return moment
