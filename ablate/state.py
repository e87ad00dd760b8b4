"""Keeping the user's world as it was: random state kept aside, and a model's content as one hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

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


def model_hash(model: nn.Module) -> str:
    """Returns the sha256 (hex) of every parameter's and buffer's name, dtype, shape and bytes. Mutates nothing.

    Cost: one copy of one tensor at a time to the CPU; about 0.6 s per GB.
    """
    hasher = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
