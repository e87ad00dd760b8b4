"""Weights from local files: data, never code; every name and shape must fit."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ablate.errors import LoadError


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or of a PyTorch checkpoint of plain tensors; runs no code from it.

    A checkpoint may hold them under `state_dict` or `model`, and their names may begin with `module.`.
    """
    file = Path(path)
    if not file.is_file():
        raise LoadError(f"No checkpoint at {file}. Give the path of a .safetensors or .pt file.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types
        raise not_plain_tensors(file, error) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise LoadError(f"{file} holds a {type(loaded).__name__}, expected a mapping from names to tensors.")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def not_plain_tensors(file: Path, error: Exception) -> LoadError:
    """Returns the error of a file that torch or safetensors refused to read."""
    # torch's own text advises to load the file all the same: never repeat that
    code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if code is not None:
        why = f"it asks for {code[1]}, which is code. Files that contain code are refused, and none of it ran"
    else:
        why = f"it is damaged or of another format ({type(error).__name__})"
    return LoadError(f"{file} is no checkpoint of plain tensors: {why}. Save the state_dict as .safetensors.")


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copies a checkpoint's tensors into `model`, in place; every name and shape must fit, both ways.

    Raises:
      LoadError: Lists what is missing, unexpected or of another shape; the model is then unchanged.
    """
    state = model.state_dict()
    problems = [f"missing: {name}" for name in state if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in state]
    problems += [
        f"{name}: shape {tuple(weights[name].shape)}, expected {tuple(state[name].shape)}"
        for name in state
        if name in weights and weights[name].shape != state[name].shape
    ]
    if problems:
        raise does_not_fit(where, type(model).__name__, problems)
    model.load_state_dict(weights)


def does_not_fit(where: str, kind: str, problems: Sequence[str]) -> LoadError:
    """Returns the error of a checkpoint whose names or shapes are not the model's."""
    shown = "\n".join(f"  {problem}" for problem in problems[:8])
    more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
    return LoadError(f"{where} does not fit a {kind}:\n{shown}{more}")
