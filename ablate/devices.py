"""Which device each worker of this machine gets, how many threads, and a spec that runs on another device."""

from __future__ import annotations

import torch

from ablate.errors import SpecError


def check_device_name(device: str) -> None:
    """Raises SpecError for what is no device, or none of this machine."""
    where, names = "Workers", "cpu, cuda, cuda:0, cuda:1, ..., or auto"
    try:
        found = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise SpecError(where, [f"device: got {device!r}, expected {names}."]) from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise SpecError(where, [f"device: got {device!r}, but there is no CUDA device here."])
        if (found.index or 0) >= count:
            raise SpecError(where, [f"device: got {device!r}, expected cuda:0 to cuda:{count - 1}: there are {count}."])
