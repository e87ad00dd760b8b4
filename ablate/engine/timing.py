"""Choosing by measuring: which of several ways to do the same work is the fastest here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

ROUNDS = 3
GOOD = 1.03  # a batch is good if an example costs at most this much more than at the best batch


def faster(ways: Mapping[str, Callable[[], object]], device: torch.device | None = None) -> str:
    """Returns the name of the fastest way: each is run once to warm up, then in turn; the smallest time counts."""
    best = _times(ways, device)
    return min(best, key=lambda name: best[name])


def smallest_good_batch(sizes: Sequence[int], run: Callable[[int], object], device: torch.device) -> int:
    """Returns the smallest batch at which an example costs hardly more than at the best of these sizes."""
    times = _times({str(size): lambda size=size: run(size) for size in sizes}, device)  # type: ignore[misc]
    each = {size: times[str(size)] / size for size in sizes}
    return min(size for size in sizes if each[size] <= GOOD * min(each.values()))


def _times(ways: Mapping[str, Callable[[], object]], device: torch.device | None) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
