"""What `experiments.bench.faults` kills: a small campaign and a small estimate, each block counted when it is begun."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

import ablate
import coar
from ablate.work import loop as working

LEASE_SECONDS = 2.0


def spec() -> ablate.CampaignSpec:
    """Returns the campaign: 48 filters, 120 keep rows in 24 blocks, 192 examples; a block takes some 20 ms."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    inputs = torch.randn(192, 3, 12, 12, generator=generator)
    examples = ablate.Examples(inputs, [i % 5 for i in range(192)], [f"e{i}" for i in range(192)])
    return ablate.CampaignSpec(
        model=model, data=examples, rows=120, ablate_fraction=0.2, seed=3, block_rows=5, device="cpu"
    )


def run_campaign(store: str, worker: str) -> None:
    """Runs the campaign into a store, as a user would."""
    ablate.run(spec(), store, progress=False, worker=worker, lease_seconds=LEASE_SECONDS)


def run_estimate(store: str, worker: str) -> None:
    """Runs a gradient estimate of the same model into a store, in 24 blocks of examples."""
    coar.estimate(
        spec(),
        passes=6,
        quality_rows=10,
        block_examples=8,
        store=store,
        worker=worker,
        lease_seconds=LEASE_SECONDS,
    )


COMMANDS: dict[str, Callable[[str, str], None]] = {"campaign": run_campaign, "estimate": run_estimate}


def work(kind: str, store: str, log: str, worker: str = "0/1") -> None:
    """Runs one of the commands on one thread; adds a line to `log` for every block that is begun."""
    torch.set_num_threads(1)
    one = working._Loop._one

    def counted(loop: Any, block: int) -> None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{block}\n".encode())
        os.close(file)
        one(loop, block)

    with mock.patch.object(working._Loop, "_one", counted):
        COMMANDS[kind](store, worker)
