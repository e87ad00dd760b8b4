"""Keeping the user's world as it was: random state kept aside, and a model's content as one hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ablate.ambient import neutral_ambient as neutral_ambient
from ablate.ambient import no_tf32 as no_tf32


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the global random state of Python, numpy and torch (CPU and all CUDA devices) on exit, also on error."""
    python, legacy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters and buffers by name, each tensor once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def model_hash(model: nn.Module, *, leave_out: Collection[str] = ()) -> str:
    """Returns the sha256 (hex) of every parameter's and buffer's name, dtype, shape and bytes. Mutates nothing.

    Args:
      model: The model.
      leave_out: Names that do not count, e.g. of buffers that its forward writes.

    Cost: one copy of one tensor at a time to the CPU; about 0.6 s per GB.
    """
    return hash_tensors({name: tensor for name, tensor in named_tensors(model).items() if name not in leave_out})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 (hex) of every tensor's name, dtype, shape and bytes; cost as of `model_hash`."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _add(hasher, name, tensor)
    return hasher.hexdigest()


def _add(hasher: hashlib._Hash, name: str, tensor: Tensor) -> None:
    value = tensor.detach().cpu().contiguous()
    hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
    hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
