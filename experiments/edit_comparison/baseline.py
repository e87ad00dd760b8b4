"""How right the unedited networks are on every set of a task: whether there is room to improve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pandas as pd
import torch
from torch import nn

from ablate import Examples
from experiments.edit_comparison import concept, confusion, cue
from experiments.edit_comparison.networks import trained_network
from experiments.edit_comparison.tasks import Task, corrupted_versions

TASKS: Mapping[str, ModuleType] = MappingProxyType({"cue": cue, "concept": concept, "confusion": confusion})
CLASSES: Mapping[str, int] = MappingProxyType({"cue": 2, "concept": 10, "confusion": 10})


def trained_task(name: str, network: str, seed: int, cache: Path | None, **options: int) -> tuple[nn.Module, Task]:
    """Returns the network of a task, trained or from the cache, and the task itself."""
    module: Any = TASKS[name]
    model = trained_network(network, name, module.lessons(network, seed), CLASSES[name], seed, cache)
    task: Task = module.task(network, model, seed, **options)
    return model, task


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """Returns the share of examples that the model gets right."""
    predicted = torch.cat([model(inputs).argmax(1) for _, inputs, _ in examples.chunks(256)])
    return float((predicted == examples.targets).float().mean())


def base_accuracies(model: nn.Module, task: Task) -> pd.DataFrame:
    """Returns one row per set of the test split: images, accuracy before any edit, and before the transformation."""
    rows: list[dict[str, object]] = []

    def add(case: str, name: str, examples: Examples, before: Examples | None = None) -> None:
        untouched = accuracy(model, before) if before is not None else float("nan")
        rows.append(
            {
                "task": task.name,
                "network": task.network,
                "seed": task.seed,
                "case": case,
                "set": name,
                "images": len(examples),
                "accuracy": accuracy(model, examples),
                "untransformed": untouched,
            }
        )

    add("", "training", task.train)
    add("", "ordinary", task.test.ordinary)
    if task.test.locality is not task.test.ordinary:
        add("", "locality", task.test.locality)
    for name, examples in corrupted_versions(task.test.ordinary).items():
        add("", f"ordinary, {name}", examples)
    seen = set[str]()
    for case in task.test.cases:
        if case.name in seen:  # of single-example edits the first stands for its group
            continue
        seen.add(case.name)
        for name, pairs in case.sets.items():
            old = pairs.originals
            before = None if old is None else Examples(old, pairs.examples.targets, pairs.examples.ids)
            add(case.name, name, pairs.examples, before)
    return pd.DataFrame(rows)
