"""Running a model on many examples: a batch at a time, and what fails told apart: memory, inputs, outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ablate.errors import AblateError, OutOfMemoryError
from coar.errors import EditError

BATCH = 64  # examples at a time, where nothing else is said
SCARCE = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # what torch says of memory in plain RuntimeErrors


def run(model: nn.Module, inputs: Tensor) -> Any:
    """Returns what a model returns for inputs. Mutates nothing.

    Raises:
      EditError: The model raises on them: its type, shape and reason are named. Not where memory is short: that passes.
    """
    try:
        return model(inputs)
    except Exception as error:  # whatever a model raises on inputs it does not take
        if is_out_of_memory(error):
            raise
        kind, reason = str(inputs.dtype).removeprefix("torch."), str(error).partition("\n")[0].rstrip(".")
        raise EditError(
            f"The model fails on inputs of shape {tuple(inputs.shape)} and type {kind}: {type(error).__name__}: "
            f"{reason}. Give inputs as the model takes them."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether torch or Python raised this because memory did not suffice."""
    if isinstance(error, AblateError):
        return isinstance(error, OutOfMemoryError)
    plain = isinstance(error, RuntimeError) and any(text in str(error) for text in SCARCE)
    return plain or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@contextmanager
def memory_reported(examples: int, setting: str = "batch_size") -> Iterator[None]:
    """Says what to lower where memory does not suffice, for the time of a `with` block.

    Args:
      examples: How many run at a time.
      setting: What says so; "": no setting does.

    Raises:
      OutOfMemoryError: In place of what torch raises.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AblateError) or not is_out_of_memory(error):
            raise
        lower = f"Lower {setting} (now {examples}, try {max(1, examples // 2)})" if setting and examples > 1 else ""
        raise OutOfMemoryError(
            f"The memory did not suffice for {examples} {'examples' if examples > 1 else 'example'} at a time. "
            f"{lower or 'Give fewer examples'}, or use a device with more memory. The model is unchanged. "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
