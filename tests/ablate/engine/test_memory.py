"""The memory plan: what it predicts is what a process takes, and a budget is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.engine.memory import fitting_batch, measured_peak, per_example

Randomise = Callable[[nn.Module, int], nn.Module]

PROCESS = """
import sys, torch, ablate
from ablate.loading import load_model
from ablate.loading.sources import TimmModel, TorchvisionModel
torch.set_num_threads(1)
name, budget = sys.argv[1], int(sys.argv[2])
if name == "resnet18":
    model, pixels = load_model(TorchvisionModel(source="torchvision", name=name))[0], 64
else:
    model, pixels = load_model(TimmModel(source="timm", name=name, image_size=96))[0], 96
images, labels = torch.randn(320, 3, pixels, pixels), torch.arange(320) % 1000
index = ablate.ComponentIndex.from_model(model)
few = ablate.Engine(model, index, batch_size=256, memory_budget=budget or None, example_inputs=images[:4])
examples = ablate.Examples(images, labels)
plan = few.plan(examples)
keep = ablate.KeepPlan(len(index), 1, 0.1).take(0, 1)
gates = torch.ones(320, len(index))

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

for gradients in (False, True):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
    before = memory("VmRSS")
    (few.gate_gradients(gates, examples) if gradients else few.outputs(keep, examples))
    grown = memory("VmHWM") - before
    print(grown + plan.model, plan.peak(320, gradients), plan.gradient_batch_size if gradients else plan.batch_size)
"""


def _in_a_process(name: str, budget: int = 0) -> list[tuple[int, int, int]]:
    """Returns, for outputs and for gradients: what a call took with the weights, the plan's peak, its batch size."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, name, str(budget)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr
    found = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    return [(taken, planned, batch) for taken, planned, batch in found]


needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory"
)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_plan_is_within_a_quarter_of_what_a_call_takes(name: str) -> None:
    outputs, gradients = _in_a_process(name)
    assert outputs[2] == 256
    for taken, planned, _ in (outputs, gradients):
        assert 0.75 * taken <= planned <= 1.25 * taken


@needs_proc
@pytest.mark.slow
def test_a_budget_is_kept() -> None:
    budget = 320 * 2**20
    outputs, gradients = _in_a_process("resnet18", budget)
    assert 1 <= gradients[2] < outputs[2] <= 256
    for taken, planned, _ in (outputs, gradients):
        assert taken <= budget
        assert planned <= budget


def test_a_budget_changes_rounding_only(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net)
    keep = ablate.KeepPlan(len(index), 3, 0.3).take(0, 3)
    free = ablate.Engine(conv_net, index)
    plan = free.plan(images, labels)
    tight = ablate.Engine(conv_net, index, memory_budget=plan.model + 2 * plan.forward_fixed + 5 * plan.forward_each)
    torch.testing.assert_close(tight.outputs(keep, images, labels), free.outputs(keep, images, labels))
    assert tight.batch_size < 7


def test_a_budget_that_is_too_small(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net)
    engine = ablate.Engine(conv_net, index, memory_budget=100)
    with pytest.raises(ablate.OutOfMemoryError, match=r"^The model and one example .* Give a larger "):
        engine.outputs(ablate.KeepPlan(len(index), 1, 0.3).take(0, 1), images, labels)


def test_bytes_that_live_at_one_time_count() -> None:
    def run() -> None:
        a = torch.empty(1000, dtype=torch.float32)
        b = a.add(1)  # 8,000 bytes live
        del a
        b.view(10, 100).mul_(2)  # neither a view nor an in-place product takes more
        c = b.double()  # 4,000 + 8,000
        del b, c
        torch.empty(500, dtype=torch.float64)

    assert measured_peak(run) == 12_000


def test_fixed_and_per_example_from_two_runs() -> None:
    assert per_example(lambda n: torch.empty(100 + 7 * n, dtype=torch.uint8)) == (100, 7)


def test_the_largest_batch_that_fits() -> None:
    assert fitting_batch(1000, 128, 300, 100, 50) == 12
    assert fitting_batch(1000, 8, 300, 100, 50) == 8
    with pytest.raises(ablate.OutOfMemoryError):
        fitting_batch(449, 8, 300, 100, 50)
