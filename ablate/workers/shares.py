"""Which device each worker of this machine gets, and how many threads."""

from __future__ import annotations

import os

import torch

from ablate.devices import check_device_name
from ablate.errors import SpecError

MOST_WORKERS = 1024


def choose_devices(devices: str | None, workers: int | None) -> list[str | None]:
    """Returns the device of each worker of this machine; None: the spec's.

    Args:
      devices: "all" (every CUDA device; where there is none, the CPU), or names with commas between: "cuda:0,cuda:1"
        or "cpu,cpu": one worker each.
      workers: How many workers; the devices are given out in turn. None: one per device.

    Raises:
      SpecError: No such device here, or a number of workers that makes no sense.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise SpecError("Workers", [f"workers: got {workers}, expected 1 to {MOST_WORKERS}."])
    if devices is None:
        return [None] * (workers or 1)
    names = [name.strip() for name in devices.split(",")]
    if names == ["all"]:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    if "all" in names or "" in names:
        expected = "all, or names such as cuda:0,cuda:1 or cpu,cpu"
        raise SpecError("Workers", [f"devices: got {devices!r}, expected {expected}."])
    for name in names:
        check_device_name(name)
    return [names[i % len(names)] for i in range(workers or len(names))]


def share_threads(workers: int, asked: int | None = None) -> int:
    """Returns how many threads each of so many workers of this machine gets: its cores are divided among them.

    An OMP_NUM_THREADS in the environment that is smaller holds; `asked` holds in any case.
    """
    if asked is not None:
        if asked < 1:
            raise SpecError("Workers", [f"threads: got {asked}, expected at least 1."])
        return asked
    share = max(1, core_count() // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdecimal() and int(given) > 0 else share


def core_count() -> int:
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
