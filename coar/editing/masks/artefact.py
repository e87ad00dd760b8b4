"""A hypernetwork's file: safetensors with a JSON header, for use and, while it is being trained, for going on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Examples, ModelMismatchError, Selection
from ablate.models.copies import device_of
from coar.editing.edits.sealed import read_sealed, write_sealed
from coar.editing.masks.hypernetwork import Hypernetwork, NetworkShape
from coar.editing.masks.network import MaskHypernetwork, identity_of, refuse_differences
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError
from stores.storage.places import user_path

FORMAT = "mask-hypernetwork"
FORMAT_VERSION = 1
KEY = "hypernetwork"


@dataclass(frozen=True)
class Artefact:
    """What is in a file: the hypernetwork, and of one in training the optimiser's state and the images' hash."""

    hypernetwork: MaskHypernetwork
    optimizer: Mapping[str, Tensor]
    images: str | None


def save_hypernetwork(
    hypernetwork: MaskHypernetwork,
    path: str | os.PathLike[str],
    *,
    optimizer: Mapping[str, Tensor] | None = None,
    images: str | None = None,
) -> None:
    """Writes a hypernetwork, whole or not at all. Overwrites a file of that name.

    Args:
      hypernetwork: From `train_hypernetwork`.
      path: Of the file, e.g. `masks.safetensors`.
      optimizer: The optimiser's tensors, for going on with the training.
      images: Hash of the images it was trained on.
    """
    selection = hypernetwork.selection
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": hypernetwork.identity,
        "settings": hypernetwork.settings.describe(),
        "network": hypernetwork.network.shape.describe(),
        "iterations": hypernetwork.iterations,
        "images": images,
        "index": selection.index.to_json(),
    }
    tensors = {f"network/{name}": value for name, value in hypernetwork.network.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in (optimizer or {}).items()}
    tensors |= {"component_ids": torch.tensor(selection.ids, dtype=torch.int64), "history": hypernetwork.history}
    write_sealed(path, KEY, header, tensors)


def load_hypernetwork(
    path: str | os.PathLike[str],
    model: nn.Module,
    selection: Selection | None = None,
    inputs: Tensor | Examples | None = None,
    *,
    unfinished: bool = False,
) -> MaskHypernetwork:
    """Returns the hypernetwork in a file, on the model's device. Mutates nothing.

    Args:
      path: A file of `save_hypernetwork`, or the finished `store` of `train_hypernetwork`.
      model: The model it was trained for, unedited.
      selection: The components it was trained for; None: those in the file.
      inputs: Compare their shape and normalisation, too.
      unfinished: Take one whose training has not reached its end.

    Raises:
      EditError: The file is missing, damaged, something else or unfinished.
      EditMismatchError: Model, selection or inputs are others than in training; each difference is named.
    """
    hypernetwork = read_artefact(path).hypernetwork
    hypernetwork.network.to(device_of(model))
    now = identity_of(
        model, selection or hypernetwork.selection, hypernetwork.site, hypernetwork.network.shape.feature, inputs
    )
    stored = dict(hypernetwork.identity)
    if inputs is None:
        stored["inputs"] = now["inputs"]
    elif isinstance(inputs, Tensor):
        stored["inputs"] = {"shape": stored["inputs"]["shape"]}
    refuse_differences(stored, now, f"{path}: this")
    if hypernetwork.iterations < hypernetwork.settings.iterations and not unfinished:
        raise EditError(
            f"The training of {path} is at iteration {hypernetwork.iterations} of {hypernetwork.settings.iterations}. "
            "Go on with train_hypernetwork(..., store=...), or take it as it is with unfinished=True."
        )
    return hypernetwork


def read_artefact(path: str | os.PathLike[str]) -> Artefact:
    """Returns what is in a file, on the CPU. Raises EditError if it is missing, damaged or something else."""
    from safetensors import SafetensorError

    place = user_path(path)
    if not place.is_file():
        raise EditError(
            f"There is no file {place}. Train a hypernetwork: train_hypernetwork(..., store={str(path)!r})."
        )
    try:
        sealed = read_sealed(place, KEY)
    except (SafetensorError, ValueError) as error:
        raise EditError(f"{place} is damaged or no safetensors file ({error}).") from error
    header = sealed.header or {}
    if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
        raise EditError(
            f"{place} says format {header.get('format')!r}, version {header.get('format_version')}; expected "
            f"{FORMAT!r}, {FORMAT_VERSION}: it is no mask hypernetwork, or one of another version."
        )
    try:
        return _restore(header, sealed.tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, ModelMismatchError) as error:
        raise EditError(f"{place} is damaged: its header and tensors do not fit together ({error}).") from error


def _restore(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Artefact:
    shape = NetworkShape(**{**header["network"], "rows": tuple(header["network"]["rows"])})
    with torch.random.fork_rng(devices=[]):
        network = Hypernetwork(shape)
    network.load_state_dict(_below("network/", tensors))
    index = ComponentIndex.from_json(header["index"])
    hypernetwork = MaskHypernetwork(
        network.eval().requires_grad_(False),
        index.select(tensors["component_ids"].tolist()),
        MetaSettings(**header["settings"]),
        header["identity"],
        int(header["iterations"]),
        tensors["history"],
    )
    return Artefact(hypernetwork, _below("optimizer/", tensors), header["images"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
