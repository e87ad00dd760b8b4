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
from ablate.state import no_tf32

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
            with no_tf32():
                assert (cuda.allow_tf32, cudnn.allow_tf32) == (False, False)
                if fails:
                    raise ZeroDivisionError  # noqa: TRY301
        except ZeroDivisionError:
            pass
        assert (cuda.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_both_ways_and_gradients_agree_with_the_cpu(
    compiled: bool, model: nn.Module, inputs: Tensor, targets: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 8, 0.1).take(0, 8)
    gates = torch.rand(21, len(index), generator=torch.Generator().manual_seed(2))
    on_cpu = ablate.Engine(model, index, device="cpu")
    expected, (values, gradients) = on_cpu.outputs(keep, inputs, targets), on_cpu.gate_gradients(gates, inputs, targets)
    for mode in ("weight", "activation", "auto"):
        speed = ablate.Speed(compile=compiled)
        engine = ablate.Engine(model, index, device="cuda", mode=mode, batch_size=64, speed=speed)
        difference = engine.outputs(keep, inputs, targets) - expected
        assert float(difference.abs().max()) <= TOLERANCE["float32"] * float(expected.abs().max())
    out, slopes = engine.gate_gradients(gates, inputs, targets)
    assert float((out - values).abs().max()) <= TOLERANCE["float32"] * float(values.abs().max())
    assert float((slopes - gradients).abs().max()) <= 10 * TOLERANCE["float32"] * float(gradients.abs().max())


@pytest.mark.gpu
@needs_cuda
def test_bfloat16_on_cuda_is_near(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 8, 0.1).take(0, 8)
    exact = ablate.Engine(model, index, device="cpu", precision="float64").outputs(keep, inputs, targets)
    engine = ablate.Engine(model, index, device="cuda", precision="bfloat16", batch_size=64)
    rough = engine.outputs(keep, inputs, targets)
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) <= 0.1 * float(exact.abs().max())


@pytest.mark.gpu
@needs_cuda
def test_the_batch_is_found_by_timing_on_cuda(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(model)
    engine = ablate.Engine(model, index, device="cuda", speed=ablate.Speed(compile=False))
    engine.check(inputs, targets)
    assert engine.batch_size in (64, 128, 256, 512, 1024)
    assert engine.plan(inputs, targets).peak(21) < torch.cuda.mem_get_info()[1]


@pytest.mark.gpu
@needs_cuda
def test_pixels_stay_uint8_on_cuda(model: nn.Module, targets: Tensor) -> None:
    pixels = torch.randint(0, 256, (21, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    examples = ablate.Examples(pixels, targets, normalize=((0.5,), (0.25,)))
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 4, 0.1).take(0, 4)
    engine = ablate.Engine(model, index, device="cuda", batch_size=8, speed=ablate.Speed(compile=False))
    on_cpu = ablate.Engine(model, index, device="cpu", batch_size=8).outputs(keep, examples)
    assert float((engine.outputs(keep, examples) - on_cpu).abs().max()) <= 1e-4 * float(on_cpu.abs().max())
    assert engine._placed is not None
    assert engine._placed.inputs.dtype == torch.uint8


@pytest.mark.gpu
@needs_cuda
def test_too_large_a_batch_says_what_to_lower(model: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(model)
    examples = ablate.Examples(
        torch.zeros(1, 1, 16, 16).expand(2**22, 1, 16, 16), torch.zeros(2**22, dtype=torch.int64)
    )
    engine = ablate.Engine(model, index, device="cuda", batch_size=2**22, speed=ablate.Speed(compile=False))
    with pytest.raises(ablate.OutOfMemoryError, match=r"Lower batch_size \(now 4194304, try 2097152\)"):
        engine.gate_gradients(torch.ones(1, len(index)).expand(2**22, -1), examples)
