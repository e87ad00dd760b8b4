"""Buffers that a forward pass writes (caches of positions, counters): part of a model's state, not of what it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ablate.state import hash_tensors, named_tensors

DIGITS = 16  # of a hash per buffer


@contextmanager
def written_buffers(model: nn.Module) -> Iterator[list[str]]:
    """Gives a list that holds, after the `with` block, the names of the buffers that were written in it, sorted."""
    before = {name: (buffer, _copy(buffer)) for name, buffer in named_buffers(model).items()}
    written: list[str] = []
    yield written
    for name, buffer in sorted(named_buffers(model).items()):
        known, value = before.get(name, (None, None))
        if buffer is not known or not _same(buffer, value):
            written.append(name)


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Puts every buffer back at the end of a `with` block: the same tensors with the same bits, also on error."""
    kept = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()]
    values = {id(b): (b, _copy(b)) for _, buffers, _ in kept for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values.values():
                if value is not None and not _same(buffer, value):
                    buffer.data = value if buffer.shape != value.shape else buffer.data.copy_(value)
        for module, buffers, names in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = names


def named_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Returns all buffers by name; None for one that is registered and has no value yet."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def own_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Returns the buffers that a forward may write in eval mode: all but those of torch's own normalisations."""
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    return {name: buffer for name, buffer in named_buffers(model).items() if name not in norms}


def describe_weights(
    model: nn.Module, rewritten: Collection[str] = (), tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Returns what of a model's tensors decides its outputs, JSON-able: to be compared by `same_weights`.

    Empty for a model whose only buffers are those of torch's normalisations: then `model_hash` says it all.

    Args:
      model: The model.
      rewritten: Names of the buffers that its forward writes, as far as is known.
      tensors: Its parameters and buffers by name; None: as it names them.
    """
    own = own_buffers(model)
    if not own:
        return {}
    digests = {name: None if b is None else hash_tensors({name: b})[:DIGITS] for name, b in sorted(own.items())}
    others = {n: t for n, t in (named_tensors(model) if tensors is None else tensors).items() if n not in own}
    return {"hash": hash_tensors(others), "buffers": digests, "rewritten": sorted(rewritten)}


def same_weights(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Returns whether two models, as `describe_weights` has them, differ in nothing but what a forward writes."""
    if not stored or not now or stored["hash"] != now["hash"]:
        return False
    names = {*stored["buffers"], *now["buffers"]} - {*stored["rewritten"], *now["rewritten"]}
    return all(stored["buffers"].get(name) == now["buffers"].get(name) for name in names)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


def _same(buffer: Tensor | None, value: Tensor | None) -> bool:
    if buffer is None or value is None:
        return buffer is value
    return buffer.shape == value.shape and buffer.dtype == value.dtype and bool(_bits(buffer).equal(_bits(value)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
