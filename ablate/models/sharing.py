"""Tensors that lie in the same memory, whole or in part: ties that names and identities do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Extent(NamedTuple):
    """Where a tensor lies: its storage, and the bytes that it spans there."""

    storage: int
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Tensor) -> Extent | None:
        """Returns the extent of a tensor, None of one that has no memory of its own (empty, meta, sparse)."""
        if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
            return None
        last = int(sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))
        start = int(tensor.storage_offset()) * tensor.element_size()
        return cls(tensor.untyped_storage().data_ptr(), start, start + (last + 1) * tensor.element_size())


def overlapping(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Returns the names of tensors that lie over each other, in groups of two and more, each in the order given."""
    order = {name: position for position, name in enumerate(tensors)}
    extents = sorted((extent, order[name], name) for name, t in tensors.items() if (extent := Extent.of(t)) is not None)
    groups: list[list[str]] = []
    storage, reach = -1, 0
    for extent, _, name in extents:
        if extent.storage == storage and extent.start < reach:
            groups[-1].append(name)
            reach = max(reach, extent.stop)
        else:
            groups.append([name])
            storage, reach = extent.storage, extent.stop
    return [sorted(group, key=order.__getitem__) for group in groups if len(group) > 1]


def same_memory(one: Tensor, two: Tensor) -> bool:
    """Returns whether two tensors are one in all but name: the same numbers of the same memory, in the same places."""
    extent = Extent.of(one)
    return (
        extent is not None
        and extent == Extent.of(two)
        and (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
    )


def lies_over_itself(tensor: Tensor) -> bool:
    """Returns whether two entries of a tensor may be one number in memory, as those of `expand` are."""
    if Extent.of(tensor) is None:
        return False
    reach = 0  # of all axes with smaller strides
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def first_names(model: nn.Module) -> dict[str, str]:
    """Returns, for every parameter that is another in all but name, the first name of that one."""
    parameters = dict(model.named_parameters())
    found = {}
    for group in overlapping(parameters):
        for position, name in enumerate(group):
            same = (first for first in group[:position] if same_memory(parameters[first], parameters[name]))
            first = next(same, None)
            if first is not None:
                found[name] = first
    return found


def tie(model: nn.Module) -> None:
    """Makes one parameter of those that are one in all but name, in place: it is cast, moved and gated as one."""
    others = first_names(model)
    if not others:
        return
    parameters = dict(model.named_parameters())
    one = {id(parameters[other]): parameters[first] for other, first in others.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in one:
                module._parameters[name] = one[id(parameter)]


def copied_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors of one storage and dtype that lie over each other as they do."""
    extents = {name: extent for name, t in tensors.items() if (extent := Extent.of(t)) is not None}
    size = next(iter(tensors.values())).element_size()
    start = min(extent.start for extent in extents.values()) // size
    stop = max(extent.stop for extent in extents.values()) // size
    first = next(iter(tensors.values())).detach()
    memory = torch.as_strided(first, (stop - start,), (1,), start).clone()
    return {
        name: torch.as_strided(memory, t.shape, t.stride(), t.storage_offset() - start) for name, t in tensors.items()
    }
