"""Taking a model over: the copy that an engine works on, what it is cast to, and the device that it is on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ablate.errors import DataError, GatingError
from ablate.models.reaching import require_own
from ablate.models.sharing import copied_together, overlapping

COMPLEX = {torch.float64: torch.complex128}  # what complex numbers beside real ones of a dtype are; else complex64


def copy_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model; parameters that lie over each other in memory do so in the copy. Mutates nothing.

    Raises:
      GatingError: The model is scripted or compiled, has no weights yet, or holds functions that would go on running
        the original's weights; names them.
      DataError: It cannot be copied.
    """
    if hasattr(model, "_orig_mod"):
        raise GatingError(
            f"This {type(model).__name__} is compiled: pass the module it was made of (model._orig_mod). The engine "
            "gates first and compiles after."
        )
    return copy_with(model, {})


def copy_with(model: nn.Module, weights: Mapping[str, Tensor], share: bool = False) -> nn.Module:
    """Returns a copy of a model with other values in some parameters, given by name. The model given is unchanged.

    Tensors that lie in the memory of a named one change with it, as they would in the model.

    Args:
      model: The model.
      weights: The new values; the copy owns them.
      share: Parameters that are not named share their memory with the model's; buffers never do, because training mode
        changes them, nor does a model made in inference mode. False: nothing is shared.

    Raises: as `copy_of`, but for compiled models: their copy is compiled anew.
    """
    _require_copyable(model)
    parameters = dict(model.named_parameters())
    tensors = parameters | dict(model.named_buffers())
    share = share and not any(p.is_inference() for p in parameters.values())  # their memory can need no gradients
    with torch.inference_mode(False):
        values = {n: p.detach() for n, p in parameters.items() if share and type(p) is nn.Parameter}
        values |= {name: _ordinary(value.detach()) for name, value in weights.items()}
        for group in overlapping(tensors):
            if not share or set(group) & set(weights):
                values |= copied_together({name: tensors[name] for name in group})
                for name in set(group) & set(weights):
                    values[name].copy_(weights[name])
        memo: dict[int, object] = {id(tensors[name]): _like(tensors[name], value) for name, value in values.items()}
        try:
            made = copy.deepcopy(model, memo)
        except Exception as error:  # whatever the model's own attributes raise
            _not_copied(model, error)
    require_own(model, made)
    return made


def _ordinary(tensor: Tensor) -> Tensor:
    """Returns a tensor that may need gradients: one made in inference mode is copied outside of it."""
    return tensor.clone() if tensor.is_inference() else tensor


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value


def _require_copyable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise GatingError(f"This {type(model).__name__} is scripted. The engine gates first and compiles after.")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise GatingError(
            f"The parameter {lazy[0]!r} of this {type(model).__name__} has no shape yet (a lazy module). Run the model "
            "once on inputs first."
        )


def _not_copied(model: nn.Module, error: Exception) -> NoReturn:
    keeps = "deepcopy protocol" in str(error)  # of tensors that are results of a computation
    advice = " It keeps activations as attributes: delete them, or run it under torch.no_grad()." if keeps else ""
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    raise DataError(
        f"This {type(model).__name__} cannot be copied, and the engine works on a copy: {reason}.{advice}"
    ) from error


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves a model to a device and its real numbers to a dtype, in place, and returns it.

    Complex numbers stay complex, which `model.to(dtype)` would make real.
    """

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, COMPLEX.get(dtype, torch.complex64))
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    model._apply(converted)  # type: ignore[no-untyped-call]
    return model


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a model is on, the CPU for one without tensors; raises DataError if it is on several."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise DataError(f"The model is spread over {names}. Move it to one device, or pass device=.")
    return devices.pop() if devices else torch.device("cpu")
