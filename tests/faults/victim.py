"""One small campaign, and a program that runs it slowly so that a test can kill it.

`victim.py STORE THREADS DELAY [POINT]` runs it; with a POINT, the process dies there. Tests load `small_spec` from
here, so that the program and the tests mean the same campaign: 10 components, 40 keep rows in 5 blocks of 7 and one of
5, on 9 examples.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ablate
from stores.blocks.blocks import Blocks
from stores.storage import objects


def small_model(seed: int = 0) -> nn.Sequential:
    """Returns a network of two convolutions (10 filters) for inputs (examples, 3, 8, 8) and 3 classes."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


def small_examples() -> ablate.Examples:
    """Returns nine examples named `cat-0` to `cat-8`."""
    inputs = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return ablate.Examples(inputs, [0, 1, 2] * 3, [f"cat-{i}" for i in range(9)])


def small_spec(**changes: Any) -> ablate.CampaignSpec:
    """Returns the campaign, or one with these keys changed."""
    values: dict[str, Any] = {
        "model": small_model(),
        "data": small_examples(),
        "rows": 40,
        "ablate_fraction": 0.3,
        "seed": 5,
        "block_rows": 7,
        "device": "cpu",
        **changes,
    }
    return ablate.CampaignSpec(**values)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(
    function: Callable[..., Any], count: int, counts: Callable[..., bool] = lambda *_: True
) -> Callable[..., Any]:
    """Returns `function`, but the process dies when its call number `count` is done; only calls that `counts` count."""
    calls = iter(range(1, 1_000_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if counts(*args) and next(calls) == count:
            _die()
        return result

    return call


def _begins(*prefixes: str) -> Callable[..., bool]:
    """Returns what tells whether a call is about an object whose key begins so."""

    def about(_: Any, key: str | list[str], *__: Any) -> bool:
        keys = [key] if isinstance(key, str) else key
        return any(key.startswith(prefixes) for key in keys)

    return about


CREATE, FLUSH = "stores.storage.objects.create", "stores.storage.objects.flush"
POINTS: dict[
    str, tuple[str, Callable[..., Any]]
] = {  # where the process dies: what stands there, and what is put there
    "draft begun": ("stores.format.groups._consolidate", _die),
    "draft complete": ("os.rename", _die),
    "store made": ("os.rename", _dying(os.rename, 1)),
    "block claimed": (CREATE, _dying(objects.create, 4, _begins("work/leases/"))),
    "outputs written, keep not": (CREATE, _dying(objects.create, 4, _begins("outputs/c/"))),
    "data written, not flushed": (CREATE, _dying(objects.create, 4, _begins("keep/c/"))),
    "data flushed, mark not written": (FLUSH, _dying(objects.flush, 4, _begins("outputs/c/"))),
    "mark written, not flushed": (CREATE, _dying(objects.create, 4, _begins("ledger/c/"))),
    "mark flushed": ("stores.blocks.blocks.Blocks.write", _dying(Blocks.write, 4)),
    "last data flushed, mark not written": (FLUSH, _dying(objects.flush, 6, _begins("outputs/c/"))),
}


def run(store: str, threads: int, delay: float, point: str = "") -> None:
    """Runs the campaign; each forward takes `delay` seconds longer. With a point, the process dies there."""
    torch.set_num_threads(threads)
    spec = small_spec()
    model, _ = spec.load()

    def slow(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        time.sleep(delay)

    model.register_forward_pre_hook(slow)
    if point:
        mock.patch(*POINTS[point]).start()
    ablate.run(spec, store, progress=False)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
