"""What all tests share: small nets whose numbers anyone can follow, and the law that nothing is changed.

Nets have non-trivial biases and batch-norm statistics: with the initial ones (0 and 1) many mistakes cancel out.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

# One thread, here and in child processes: the nets are tiny, other processes share the cores, and waiting for a second
# thread that has no core makes a test thirty times slower. Tests that are about threads ask for more.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What torch says once per process would fail whichever test comes first in this process: each time, or never.
torch.set_warn_always(True)

# The same examples in every run, so that a red run is red again; `HYPOTHESIS_PROFILE=nightly` looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Tests that start several processes and wait for what these do: one such test at a time, whatever else runs beside it.
PROCESSES = {
    "test_kill.py", "test_kill_estimate.py", "test_workers.py", "test_cluster_ray.py", "test_slurm.py",
    "test_cli_workers.py", "test_bench_faults.py", "test_bench_stores.py", "test_fit_while_running.py",
    "test_full_disk.py", "test_memory.py", "test_fit_memory.py", "test_code_blocks.py", "test_background_jobs.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts them into one group, which `--dist loadgroup` gives to one of several pytest processes."""
    for item in items:
        if item.path.name in PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on the random numbers that the tests before it drew."""
    torch.manual_seed(0)


Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]


class ConvNet(nn.Module):
    """Convolutions (one grouped, one without bias), batch norm, two linear layers: 10 filters, 5 + 3 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.head(F.relu(self.fc(x.mean(dim=(2, 3)))))
        return logits


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                fresh = torch.randn(tensor.shape, generator=generator) / (tensor.numel() / len(tensor)) ** 0.5
            elif name.endswith(("weight", "gamma", "running_var")):
                fresh = torch.rand(tensor.shape, generator=generator) + 0.5
            else:
                fresh = torch.randn(tensor.shape, generator=generator) * 0.3
            tensor.copy_(fresh)
    return model


@pytest.fixture(scope="session")
def randomise() -> Randomise:
    """Fills a model, in place, with weights, biases and statistics that all matter; `randomise(model, seed)`."""
    return _randomise


@pytest.fixture
def three_weights() -> nn.Module:
    """Logits (2a·x + 3b·x + 1 + 5c·x, 0) where a, b, c are the gates of `hidden[0]`, `hidden[1]`, `hidden[2]`."""
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(1, 3))
    model.add_module("head", nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("hidden.weight").copy_(torch.tensor([[2.0], [3.0], [5.0]]))
        model.get_parameter("hidden.bias").copy_(torch.tensor([0.0, 1.0, 0.0]))
        model.get_parameter("head.weight").copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    return model.eval()


@pytest.fixture
def conv_net() -> nn.Module:
    """A tiny ConvNet in eval mode, for inputs (examples, 3, 8, 8) and 3 classes."""
    return _randomise(ConvNet(), 1).eval()


@pytest.fixture
def mlp() -> nn.Module:
    """Linear layers 4-5-4-3 with ReLU between, in eval mode; modules `0`, `2`, `4`."""
    return _randomise(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), 2).eval()


@pytest.fixture
def images() -> Tensor:
    """Seven inputs for `conv_net`."""
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels() -> Tensor:
    """Seven labels for `images`, classes 0 to 2."""
    return torch.tensor([0, 1, 2, 2, 1, 0, 1])


@pytest.fixture(scope="session")
def untouched() -> Untouched:
    """`with untouched(model, tensor, ...):` fails if the block changes any of them or any global state.

    Compared: every bit of parameters, buffers and gradients (NaN and -0.0 too), their identity, dtype, device and
    `requires_grad`; modules, training flags and hooks; random state of Python, numpy and torch; grad mode, default
    dtype, threads, TF32 and determinism flags.
    """

    @contextmanager
    def check(*things: nn.Module | Tensor) -> Iterator[None]:
        before = [_snapshot(thing) for thing in things]
        world = _world()
        try:
            yield
        finally:
            changed = [key for key, value in _world().items() if value != world[key]]
            for thing, then in zip(things, before, strict=True):
                now = _snapshot(thing)
                changed += sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
            assert not changed, f"changed behind the user's back: {changed}"

    return check


def _bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    value = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad, value


def _snapshot(thing: nn.Module | Tensor) -> dict[str, Any]:
    if isinstance(thing, Tensor):
        return {"tensor": (_bits(thing), _bits(thing.grad) if thing.is_leaf else None)}
    found: dict[str, Any] = {}
    for name, tensor in [
        *thing.named_parameters(remove_duplicate=False),
        *thing.named_buffers(remove_duplicate=False),
    ]:
        found[f"{name} value"] = _bits(tensor)
        found[f"{name} gradient"] = _bits(tensor.grad)
    for name, module in thing.named_modules(remove_duplicate=False):
        found[f"{name} module"] = id(module), type(module)
        found[f"{name} training"] = module.training
        found[f"{name} hooks"] = {
            key: [id(hook) for hook in value.values()] for key, value in vars(module).items() if key.endswith("hooks")
        }
        found[f"{name} attributes"] = sorted(vars(module))
    return found


def _world() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    return {
        "python random state": random.getstate(),
        "numpy random state": [part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
    }
