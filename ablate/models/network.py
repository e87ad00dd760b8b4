"""A network's modules as they are written: their types, and their settings that are no tensors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ablate.models.calls import ITSELF, shortened
from ablate.state import hash_tensors, model_hash

_OF_TRAINING = {"training", "inplace"}  # change no output in eval mode
_HERE = ("__main__", "__mp_main__")  # a script's own module has either name
_AS_STORED = {  # modules of this package whose classes are in models, under the names that stores know them by
    "ablate.loading.digits": "ablate.digits",
    "ablate.loading.networks.clip": "ablate.loaders.clip",
    "ablate.loading.networks.packaged_encoders": "ablate.loaders.packaged_encoders",
    "ablate.loading.networks.text": "ablate.loaders.text",
}


def describe_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the type of every module, `types`, and its public settings, `settings`; JSON-able. Mutates nothing."""
    types, settings = {}, {}
    for name, module in model.named_modules():
        types[name or ITSELF] = qualified_name(type(module))
        ignored = _OF_TRAINING | ({"p"} if isinstance(module, nn.modules.dropout._DropoutNd) else set())
        values = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in ignored}
        found = plain_settings(values)
        if found:
            settings[name or ITSELF] = found
    return {"types": types, "settings": settings}


def plain_settings(values: Mapping[str, Any], *, tensors: bool = False) -> dict[str, Any]:
    """Returns the values that are numbers, texts, switches, functions, or tuples of them, JSON-able.

    Args:
      values: By name.
      tensors: Also tensors and modules, as their hashes; and of every other value its type.
    """
    found = {name: _plain(value, tensors) for name, value in sorted(values.items())}
    return {name: value for name, value in found.items() if value is not None}


def qualified_name(kind: Any) -> str:
    """Returns the name of a class or function with its module, unless it is of the script that runs."""
    module, name = getattr(kind, "__module__", None), getattr(kind, "__qualname__", type(kind).__qualname__)
    module = _AS_STORED.get(str(module), module)
    return name if module is None or module in _HERE else f"{module}.{name}"


def _plain(value: Any, tensors: bool) -> Any:
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, (tuple, list)):
        items = [_plain(item, tensors) for item in value]
        return None if None in items else items
    if inspect.isroutine(value) or isinstance(value, (type, torch.dtype)):
        return str(value) if isinstance(value, torch.dtype) else qualified_name(value)
    if not tensors or value is None:
        return None
    if isinstance(value, Tensor):
        return hash_tensors({"": value})
    if isinstance(value, nn.Module):
        return model_hash(value)
    if isinstance(value, Mapping):
        return plain_settings({str(key): item for key, item in value.items()}, tensors=True)
    return f"a {qualified_name(type(value))}"
