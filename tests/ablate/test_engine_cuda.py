"""The engine on a GPU: the CPU's numbers within a stated tolerance, float32 without TF32, and no setting changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import ablate
from ablate.digits import ResidualCNN
from ablate.engine import _no_tf32

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")

# largest difference, as a share of the largest output
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


@pytest.fixture
def model(randomise: Randomise) -> nn.Module:
    return randomise(ResidualCNN(widths=(8, 16, 16), classes=3), 0).eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(21, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.arange(21) % 3


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", TOLERANCE)
def test_cpu_and_cuda_agree(
    precision: str, model: nn.Module, inputs: Tensor, targets: Tensor, untouched: Untouched
) -> None:
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 8, 0.1).take(0, 8)
    on_cpu = ablate.Engine(model, index, device="cpu", precision=precision).outputs(keep, inputs, targets)
    with untouched(model, inputs, targets):
        engine = ablate.Engine(model, index, device="cuda", precision=precision, batch_size=8)
        on_cuda = engine.outputs(keep, inputs, targets)
    assert on_cuda.device.type == "cpu"
    assert float((on_cuda - on_cpu).abs().max()) <= TOLERANCE[precision] * float(on_cpu.abs().max())


@pytest.mark.gpu
@needs_cuda
def test_streaming_changes_nothing_on_cuda(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 4, 0.1).take(0, 4)
    resident = ablate.Engine(model, index, device="cuda", batch_size=8).outputs(keep, inputs, targets)
    streamed = ablate.Engine(model, index, device="cuda", batch_size=8, data_budget=1)
    outputs = streamed.outputs(torch.tensor(keep).cuda(), TensorDataset(inputs, targets))
    assert float((outputs - resident).abs().max()) <= TOLERANCE["float32"] * float(resident.abs().max())


@pytest.mark.gpu
@needs_cuda
def test_a_model_on_cuda_stays_there(model: nn.Module, inputs: Tensor, targets: Tensor, untouched: Untouched) -> None:
    model.cuda()
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 2, 0.1).take(0, 2)
    with untouched(model):
        engine = ablate.Engine(model, index)
        engine.outputs(keep, inputs, targets)
        with ablate.ablated(model, index.everything()):
            pass
    assert engine.device.type == "cuda"
    assert ablate.model_hash(model) == ablate.model_hash(model.cpu())


@pytest.mark.gpu
@needs_cuda
def test_a_campaign_picks_cuda_by_itself(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    spec = ablate.CampaignSpec(model=model, data=(inputs, targets), rows=3, ablate_fraction=0.1)
    store = ablate.run(spec, MemoryStore(), progress=False)
    assert store.header["environments"][0]["device"] == "cuda"


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_off_inside_and_as_before_outside(fails: bool) -> None:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = True
    try:
        try:
            with _no_tf32():
                assert (cuda.allow_tf32, cudnn.allow_tf32) == (False, False)
                if fails:
                    raise ZeroDivisionError  # noqa: TRY301
        except ZeroDivisionError:
            pass
        assert (cuda.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before
