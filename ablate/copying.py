"""Taking a model over: the copy that an engine works on, and the device that it is on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ablate.errors import DataError, GatingError


def copy_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model. Mutates nothing.

    Raises:
      GatingError: The model is scripted or compiled.
      DataError: It cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        how = (
            "compiled: pass the module it was made of (model._orig_mod)" if hasattr(model, "_orig_mod") else "scripted"
        )
        raise GatingError(f"This {type(model).__name__} is {how}. The engine gates first and compiles after.")
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    except Exception as error:  # whatever the model's own attributes raise
        raise DataError(
            f"This {type(model).__name__} cannot be copied, and the engine works on a copy: {error}. If it keeps "
            "activations as attributes, delete them, or run it under torch.no_grad()."
        ) from error


def copy_with(model: nn.Module, weights: Mapping[str, Tensor], share: bool = True) -> nn.Module:
    """Returns a copy of a model with other values in some parameters, given by name. The model given is unchanged.

    Args:
      model: The model.
      weights: The new values; the copy owns them.
      share: Parameters that are not named share their memory with the model's; buffers never do, because training mode
        changes them. False: nothing is shared.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        if name in weights:
            value = weights[name].detach()
        elif share and type(parameter) is nn.Parameter:
            value = parameter.detach()
        else:
            continue
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a model is on, the CPU for one without tensors; raises DataError if it is on several."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise DataError(f"The model is spread over {names}. Move it to one device, or pass device=.")
    return devices.pop() if devices else torch.device("cpu")
