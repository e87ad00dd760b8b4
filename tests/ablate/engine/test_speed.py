"""What makes the engine fast changes rounding only: folding, layout, compilation, batches found by timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import timm
import torch
from torch import Tensor, nn

import ablate
from ablate.engine import gated_model as gated_model
from ablate.engine import timing
from ablate.engine.compiling import repeated_blocks

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fold", [None, True, False])
@pytest.mark.parametrize("channels_last", [None, True, False])
def test_folding_and_layout_change_rounding_only(
    fold: bool | None, channels_last: bool | None, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(conv_net)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    speed = ablate.Speed(fold=fold, channels_last=channels_last)
    engine = ablate.Engine(conv_net, index, speed=speed)
    reference = ablate.reference_outputs(conv_net, index, keep, images, labels)
    torch.testing.assert_close(engine.outputs(keep, images, labels), reference, rtol=1e-5, atol=1e-5)
    folded = engine.explain()["notes"].str.contains("folded")
    assert folded.all() if fold is not False else not folded.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_net", "test_vit"])
def test_a_compiled_engine_gives_the_same_numbers(
    name: str,
    request: pytest.FixtureRequest,
    randomise: Randomise,
    images: Tensor,
    labels: Tensor,
    fresh_compiler: None,
    untouched: Untouched,
) -> None:
    if name == "conv_net":
        model: nn.Module = request.getfixturevalue(name)
    else:
        model = randomise(timm.create_model(name, num_classes=3, img_size=32, depth=2), 1).eval()
        images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 3, 0.2).take(0, 3)
    gates = torch.rand(7, len(index), generator=torch.Generator().manual_seed(1))
    eager = ablate.Engine(model, index, batch_size=4)
    with untouched(model):
        compiled = ablate.Engine(model, index, batch_size=4, speed=ablate.Speed(compile=True))
        outputs = compiled.outputs(keep, images, labels)
        example_outputs = compiled.example_outputs(gates, images, labels)
        values, gradients = compiled.gate_gradients(gates, images, labels)
    torch.testing.assert_close(outputs, eager.outputs(keep, images, labels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(example_outputs, eager.example_outputs(gates, images, labels), rtol=1e-4, atol=1e-4)
    expected = eager.gate_gradients(gates, images, labels)
    torch.testing.assert_close(values, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-4)


def test_a_compiled_model_that_goes_its_own_way_is_refused(
    monkeypatch: pytest.MonkeyPatch, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """As a compiler would that froze the weights, or did not see the gates."""

    def stale(model: nn.Module, mode: str | None, whole: bool) -> str:
        forward = model.forward
        before = model.get_parameter("conv1.weight").detach().clone()

        def run(x: Tensor) -> Tensor:
            if torch._dynamo.eval_frame._stance.stance != "force_eager":
                now = model.get_parameter("conv1.weight").detach().clone()
                model.get_parameter("conv1.weight").data.copy_(before)
                logits: Tensor = forward(x)
                model.get_parameter("conv1.weight").data.copy_(now)
                return logits
            return forward(x)  # type: ignore[no-any-return]

        monkeypatch.setattr(model, "forward", run)
        return "the whole model"

    monkeypatch.setattr(gated_model, "compile_model", stale)
    index = ablate.ComponentIndex.from_model(conv_net)
    engine = ablate.Engine(conv_net, index, speed=ablate.Speed(compile=True, fold=False))
    with pytest.raises(ablate.GatingError, match=r"^The compiled ConvNet gives other .*compile=False"):
        engine.outputs(ablate.KeepPlan(len(index), 2, 0.5).take(0, 2), images, labels)


def test_the_block_a_model_repeats() -> None:
    vit = timm.create_model("test_vit", num_classes=3)
    assert [name for name, _ in repeated_blocks(vit)] == [f"blocks.{i}" for i in range(6)]
    assert repeated_blocks(timm.create_model("test_resnet", num_classes=3)) == []
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == []


def test_the_smallest_batch_that_is_hardly_dearer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    cost = {64: 64 * 1.5, 128: 128 * 1.02, 256: 256 * 1.0, 512: 512 * 1.3}

    def run(size: int) -> None:
        clock[0] += cost[size]

    monkeypatch.setattr("ablate.engine.timing.time.perf_counter", lambda: clock[0])
    assert timing.smallest_good_batch(list(cost), run, torch.device("cpu")) == 128
    assert timing.faster({"slow": lambda: run(256), "fast": lambda: run(64)}) == "fast"


def test_attention_backends_agree(images: Tensor, labels: Tensor, randomise: Randomise) -> None:
    model = randomise(timm.create_model("test_vit", num_classes=3, img_size=32), 1).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = ablate.ComponentIndex.from_model(model, ["attention_head"])
    gates = torch.rand(4, len(index), generator=torch.Generator().manual_seed(1))
    results = [
        ablate.Engine(model, index, speed=ablate.Speed(attention=backend)).gate_gradients(gates, images, labels[:4])
        for backend in (None, "math", "flash")
    ]
    for values, gradients in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-3, atol=1e-4)


def test_an_attention_backend_that_does_not_exist(conv_net: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(conv_net)
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.Engine(conv_net, index, speed=ablate.Speed(attention="mth"))
    assert str(caught.value) == "No attention backend 'mth'. Did you mean 'math'?"


@pytest.mark.slow
def test_many_compiled_engines_stay_compiled(mlp: nn.Module, labels: Tensor, fresh_compiler: None) -> None:
    """Torch stops compiling a function after eight graphs, and all engines of a model share its code."""
    inputs = torch.randn(2, 4)
    index = ablate.ComponentIndex.from_model(mlp)
    keep = ablate.KeepPlan(len(index), 1, 0.3).take(0, 1)
    torch._dynamo.utils.counters.clear()
    for batch in range(2, 11):
        engine = ablate.Engine(mlp, index, batch_size=batch, speed=ablate.Speed(compile="default"))
        engine.outputs(keep, inputs, labels[:2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9
