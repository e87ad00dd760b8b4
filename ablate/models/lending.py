"""A user's live model, lent for a few forwards: whatever they write into it is put back, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONTAINERS = (dict, OrderedDict, list, set)  # exactly these: others may copy themselves in a way of their own


@contextmanager
def lent(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Gives the memory of a model's parameters, by name, to write into, in eval mode, for the time of a `with` block.

    On exit, also on error, all is as before: parameters and buffers (bits, memory, how often they were written), what
    forwards leave as attributes, training flags. Not what hooks write elsewhere.

    Args:
      model: The model.
      values: What its parameters are to hold, by name; best what they hold, for then nothing more is kept of them.

    Memory: a copy of buffers, of tensors kept as attributes, and of parameters that hold something else than `values`.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    parameters = {name: _Kept(parameter, values.get(name)) for name, parameter in model.named_parameters()}
    others = [_Kept(tensor, None) for tensor in _loose_tensors(model)]
    all_kept = [*parameters.values(), *others]
    written = tuple(kept.tensor for kept in all_kept if not kept.tensor.is_inference())
    with _unsafe_preserve_version_counter(written):
        try:
            for name, kept in parameters.items():
                kept.hold(values.get(name))
            model.eval()
            yield {name: kept.memory for name, kept in parameters.items()}
        finally:
            for module, attributes in modules:
                _put_back(module, attributes)
            for kept in all_kept:
                kept.put_back()


class _Kept:
    """A tensor's memory and bits."""

    def __init__(self, tensor: Tensor, value: Tensor | None) -> None:
        self.tensor, self.memory = tensor, tensor.data
        self._bits = value if value is not None and _same_bits(self.memory, value) else self.memory.clone()

    def hold(self, value: Tensor | None) -> None:
        """Writes a value into the tensor's memory, unless it is there."""
        if value is not None and value is not self._bits:
            with torch.inference_mode():  # may write into what was made in it
                self.memory.copy_(value)

    def put_back(self) -> None:
        """Gives the tensor its memory, and the memory its bits."""
        if self.tensor.data_ptr() != self.memory.data_ptr() or self.tensor.dtype != self.memory.dtype:
            self.tensor.data = self.memory
        if not _same_bits(self.memory, self._bits):
            with torch.inference_mode():
                self.memory.copy_(self._bits)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Returns whether two tensors are equal bit for bit, NaN and -0.0 too."""
    if one.shape != two.shape or one.dtype != two.dtype or one.device != two.device:
        return False
    if one.layout is not torch.strided or one.is_quantized:
        return False
    if one.is_complex():
        one, two = torch.view_as_real(one), torch.view_as_real(two)
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), two.view(bits))


def _loose_tensors(model: nn.Module) -> list[Tensor]:
    """Returns buffers, and tensors that modules hold as attributes or in containers that are attributes."""
    found: dict[int, Tensor] = {}
    known = {id(parameter) for parameter in model.parameters()}
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else [value]
            for item in items:
                if isinstance(item, Tensor) and id(item) not in known:
                    found.setdefault(id(item), item)
    return list(found.values())


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns a module's attributes, each with a copy of what is in it if it is a container."""
    return {key: (value, value.copy() if type(value) in _CONTAINERS else None) for key, value in vars(module).items()}


def _put_back(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    for key in own.keys() - attributes.keys():
        del own[key]
    for key, (value, content) in attributes.items():
        if key not in own or own[key] is not value:
            own[key] = value
        if content is not None:
            _fill(value, content)


def _fill(container: Any, content: Any) -> None:
    """Makes a container hold what it held, without touching one that does."""
    if isinstance(container, dict):
        if list(map(id, container.values())) != list(map(id, content.values())) or [*container] != [*content]:
            container.clear()
            container.update(content)
    elif isinstance(container, list):
        if list(map(id, container)) != list(map(id, content)):
            container[:] = content
    elif {id(item) for item in container} != {id(item) for item in content}:
        container.clear()
        container.update(content)
