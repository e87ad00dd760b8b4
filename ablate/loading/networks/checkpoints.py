"""Weights from local files: data, never code; every name and shape must fit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ablate.errors import LoadError, UnknownNameError, nearest
from ablate.loading.networks.fitting import Fit, WeightSet, averages_beside, best_attempt, fits, rivals

_KNOWN_KEYS = ("state_dict", "model", "model_state_dict")
_DEPTH = 4  # how deep weights may lie in a file; optimisers keep their tensors deeper, under numbers


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], key: str | None = None) -> None:
    """Copies the weights in a file into `model`, in place; runs no code from the file.

    They may lie under any key of the file, and their names may have the prefixes and marks of wrappers (`module.`,
    `_orig_mod.`, `model.`): what fits the model's own names and shapes is taken.

    Args:
      model: What the weights are for.
      path: A .safetensors file, or a PyTorch checkpoint of plain tensors.
      key: Of a file with several sets of weights that fit: which, as the refusal names them.

    Raises:
      LoadError: Nothing in the file fits, or several sets do and `key` does not say which; the model is unchanged.
      UnknownNameError: No weights under `key`.
    """
    _load(model, weight_sets(path), os.fspath(path), key)


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copies tensors by name into `model`, in place; every name and shape must fit, both ways, but for wrappers' marks.

    Raises:
      LoadError: Lists what is missing, unexpected or of another shape; the model is then unchanged.
    """
    _load(model, [WeightSet("", weights)], where, None)


def _load(model: nn.Module, sets: Sequence[WeightSet], where: str, key: str | None) -> None:
    found = [fit for one in sets for fit in fits(model, one)]
    if key is not None:
        sets, found = _under(key, sets, found, where)
    if not found:
        raise does_not_fit(where, type(model).__name__, best_attempt(model, sets))
    chosen, *others = found
    several = rivals(chosen, others) or ([] if key is not None else averages_beside(chosen, sets))
    if several:
        raise LoadError(
            f"{where} holds several sets of weights for a {type(model).__name__}, and they differ: "
            f"{', '.join(map(_shown, (chosen.label, *several)))}. Say which one you mean, e.g. "
            f"checkpoint_key = {chosen.label!r}."
        )
    chosen.copy_into(model)


def _under(key: str, sets: Sequence[WeightSet], found: Sequence[Fit], where: str) -> tuple[list[WeightSet], list[Fit]]:
    """Returns the sets of weights, and those that fit, which a key names: exactly, or else as the place they lie in."""
    exact = [fit for fit in found if fit.label == key]
    if exact:
        return [fit.source for fit in exact], exact
    below = [one for one in sets if one.label == key or one.label.startswith(f"{key}.")]
    if not below:
        known = dict.fromkeys(label for label in (*(s.label for s in sets), *(fit.label for fit in found)) if label)
        raise UnknownNameError(f"weights in {where} under checkpoint_key", key, known)
    return below, [fit for fit in found if fit.source in below]


def _shown(label: str) -> str:
    return repr(label) if label else "the file itself"


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or of a PyTorch checkpoint of plain tensors; runs no code from it.

    Names are as in the file: `load_checkpoint` takes off what wrappers add. A checkpoint may hold the tensors under
    `state_dict`, `model` or `model_state_dict`; `key` names another place.

    Raises:
      LoadError: There is no such file, it is damaged or asks for code, or it does not say which tensors are meant.
    """
    sets = weight_sets(path)
    labels = {one.label: one for one in sets}
    if key is not None:
        if key not in labels:
            raise UnknownNameError(f"weights in {path} under checkpoint_key", key, [name for name in labels if name])
        return dict(labels[key].tensors)
    usual = [labels[name] for name in _KNOWN_KEYS if name in labels]
    if len(usual) == 1 or len(sets) == 1:
        return dict((usual or sets)[0].tensors)
    if "" in labels and not usual:
        return dict(labels[""].tensors)
    names = ", ".join(_shown(name) for name in labels)
    raise LoadError(f"{path} holds several sets of weights: {names}. Say which one: key = {_shown(sets[-1].label)}.")


def weight_sets(path: str | os.PathLike[str]) -> list[WeightSet]:
    """Returns all sets of named tensors in a file, each under the keys that lead to it; runs no code from it."""
    file = Path(path)
    loaded = _read(file)
    found = list(_sets_in(loaded, (), _DEPTH)) if isinstance(loaded, dict) else []
    if not found:
        raise LoadError(f"{file} holds a {type(loaded).__name__}, expected a mapping from names to tensors.")
    return found


def _sets_in(mapping: dict[Any, Any], at: tuple[str, ...], depth: int) -> Iterator[WeightSet]:
    tensors = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield WeightSet(".".join(at), tensors)
    for key, value in mapping.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            value = {str(i): part for i, part in enumerate(value)}  # an average may be kept without names
        if depth > 1 and isinstance(key, str) and isinstance(value, dict):
            yield from _sets_in(value, (*at, key), depth - 1)


def _read(file: Path) -> Any:
    if not file.is_file():
        raise LoadError(f"No checkpoint at {file}. Give the path of a .safetensors or .pt file.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types
        raise not_plain_tensors(file, error) from error


def not_plain_tensors(file: Path, error: Exception) -> LoadError:
    """Returns the error of a file that torch or safetensors refused to read."""
    # torch's own text advises to load the file all the same: never repeat that
    code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if code is not None:
        why = f"it asks for {code[1]}, which is code. Files that contain code are refused, and none of it ran"
    else:
        why = f"it is damaged or of another format ({type(error).__name__})"
    return LoadError(f"{file} is no checkpoint of plain tensors: {why}. Save the state_dict as .safetensors.")


def does_not_fit(where: str, kind: str, problems: Sequence[str]) -> LoadError:
    """Returns the error of a checkpoint whose names or shapes are not the model's."""
    unexpected = [text.removeprefix("unexpected: ") for text in problems if text.startswith("unexpected: ")]
    shown = "\n".join(f"  {problem}{_hint(problem, unexpected)}" for problem in problems[:8])
    more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
    return LoadError(f"{where} does not fit a {kind}:\n{shown}{more}")


def _hint(problem: str, unexpected: Sequence[str]) -> str:
    """Returns the nearest name in the file, for a name that is missing there."""
    if not problem.startswith("missing: "):
        return ""
    close = nearest(problem.removeprefix("missing: "), unexpected, limit=1)
    return f" (nearest in the file: {close[0]})" if close else ""
