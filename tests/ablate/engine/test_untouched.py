"""Law 3: nothing is changed behind the user's back, also when the call raises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
from ablate.ablation import MeanAblation, ScaleAblation
from ablate.loading import TimmModel, TorchvisionModel

Untouched = Callable[..., AbstractContextManager[None]]


class Fragile(nn.Module):
    """Raises for an example whose first value is 99; draws random numbers and writes a buffer when it runs."""

    calls: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        np.random.rand(3)
        if bool((x[:, 0, 0, 0] == 99).any()):
            raise RuntimeError("on purpose")
        logits: Tensor = self.dropout(self.model(x))
        return logits


@pytest.fixture(params=["eval", "train", "mixed"])
def model(request: pytest.FixtureRequest, conv_net: nn.Module, images: Tensor) -> nn.Module:
    """A user's model in use: with gradients, hooks, frozen parts, weights that are NaN, -0.0 and infinite."""
    fragile = Fragile(conv_net).train(request.param == "train")
    if request.param == "mixed":
        fragile.model.get_submodule("bn1").train()
    conv_net.get_parameter("conv1.weight").requires_grad_(False)
    conv_net.get_submodule("fc").register_forward_hook(lambda module, inputs, output: None)
    conv_net.get_submodule("head").register_forward_pre_hook(lambda module, inputs: None)
    conv_net(images).sum().backward()
    with torch.no_grad():
        conv_net.get_parameter("conv1.weight")[0, 0, 0] = torch.tensor([-0.0, 1e-42, 3.0])
        conv_net.get_parameter("fc.weight")[4] = float("nan")  # component 4 of `fc` below is always ablated
    return fragile


@pytest.fixture
def index(model: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"]).expect(18)


@pytest.fixture
def keep(index: ablate.ComponentIndex) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    keep[:, 14] = False
    return keep


Keep = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def _versions(model: nn.Module) -> list[int]:
    """How often each tensor was written to, ever."""
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


def test_making_an_index(model: nn.Module, untouched: Untouched) -> None:
    with untouched(model):
        index = ablate.ComponentIndex.from_model(model)
        index.check(model)
        index.table()
        index.left_out()


def test_engine(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    images.requires_grad_(True)
    versions = _versions(model)
    with untouched(model, images, labels):
        engine = ablate.Engine(model, index, batch_size=2, data_budget=1)
        engine.outputs(keep, images, labels)
        engine.outputs(torch.tensor(keep), images, labels)
    assert _versions(model) == versions, "not even written and put back"


def test_engine_in_double_precision(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    with untouched(model, images, labels):
        ablate.Engine(model, index, precision="float64").outputs(keep, images, labels)


def test_engine_whose_model_raises(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    engine = ablate.Engine(model, index, batch_size=2)
    before = engine.outputs(keep, images, labels)
    broken = images.clone()
    broken[5, 0, 0, 0] = 99
    with untouched(model, broken, labels), pytest.raises(RuntimeError, match="on purpose"):
        engine.outputs(keep, broken, labels)
    assert torch.equal(engine.outputs(keep, images, labels), before), "the engine itself goes on, too"


MODES = ("weight", "activation")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_every_call_of_the_engine(
    mode: str,
    precision: str,
    model: nn.Module,
    index: ablate.ComponentIndex,
    images: Tensor,
    labels: Tensor,
    untouched: Untouched,
) -> None:
    with torch.no_grad():
        torch.nan_to_num_(model.get_parameter("model.fc.weight"))
    images.requires_grad_(True)
    gates = torch.rand(len(images), len(index), generator=torch.Generator().manual_seed(0)).requires_grad_()
    versions = _versions(model)
    with untouched(model, images, labels, gates):
        engine = ablate.Engine(model, index, mode=mode, precision=precision, batch_size=3, example_inputs=images)
        engine.outputs(gates.detach() > 0.2, images, labels)
        engine.gated_outputs(gates, images, labels)
        engine.example_outputs(gates, images, labels)
        engine.gate_gradients(gates, images, labels)
        engine.explain()
    assert _versions(model) == versions


@pytest.mark.parametrize("ablation", ["mean", "scale"])
def test_other_ablations(
    ablation: str,
    model: nn.Module,
    index: ablate.ComponentIndex,
    keep: Keep,
    images: Tensor,
    labels: Tensor,
    untouched: Untouched,
) -> None:
    with torch.no_grad():
        torch.nan_to_num_(model.get_parameter("model.fc.weight"))
    chosen = {"mean": MeanAblation(images), "scale": ScaleAblation(0.5)}[ablation]
    with untouched(model, images, labels):
        for mode in MODES:
            ablate.Engine(model, index, ablation=chosen, mode=mode).outputs(keep, images, labels)


def test_calls_that_fail_half_way(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    with torch.no_grad():
        torch.nan_to_num_(model.get_parameter("model.fc.weight"))
    broken = images.detach().clone()
    broken[5, 0, 0, 0] = 99
    gates = torch.ones(len(images), len(index))
    engines = [ablate.Engine(model, index, mode=mode, batch_size=2) for mode in MODES]
    for engine in engines:
        before = engine.outputs(keep, images, labels), engine.gate_gradients(gates, images, labels)[1]
        calls: list[Callable[[], object]] = [
            lambda engine=engine: engine.outputs(keep, broken, labels),  # type: ignore[misc]
            lambda engine=engine: engine.gated_outputs(gates, broken, labels),  # type: ignore[misc]
            lambda engine=engine: engine.example_outputs(gates, broken, labels),  # type: ignore[misc]
            lambda engine=engine: engine.gate_gradients(gates, broken, labels),  # type: ignore[misc]
        ]
        for call in calls:
            with untouched(model, broken, labels), pytest.raises(RuntimeError, match="on purpose"):
                call()
            assert torch.equal(engine.outputs(keep, images, labels), before[0]), "the engine itself goes on, too"
            assert torch.equal(engine.gate_gradients(gates, images, labels)[1], before[1])


def test_a_first_call_that_fails(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    broken = images.detach().clone()
    broken[0, 0, 0, 0] = 99
    engine = ablate.Engine(model, index)
    with untouched(model, broken, labels), pytest.raises(ablate.DataError, match="on purpose"):
        engine.outputs(keep, broken, labels)
    with untouched(model, images, labels), pytest.raises(ablate.DataError, match="on purpose"):
        ablate.Engine(model, index, example_inputs=broken)
    assert engine.outputs(keep, images, labels).shape == (4, 7)


@pytest.mark.parametrize("fused", [True, False])
def test_the_switch_of_fused_attention(fused: bool, untouched: Untouched) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 3))
    index = ablate.ComponentIndex.from_model(model, ["qkv_neuron", "linear_neuron"])
    inputs = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    gates = torch.ones(4, len(index))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with untouched(model, inputs):
            engine = ablate.Engine(model, index)
            engine.outputs(gates > 0, inputs, [0, 1, 2, 0])
            engine.gate_gradients(gates, inputs, [0, 1, 2, 0])
            with pytest.raises(ablate.LabelError):
                engine.example_outputs(gates, inputs, [0, 1, 2, 3])
            with pytest.raises(ablate.DataError):
                ablate.Engine(model, index).outputs(gates > 0, inputs[..., :7], [0, 1, 2, 0])
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_the_users_hooks_run_on_the_engines_copy_too(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A hook that changes activations is part of what the model computes."""
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    keep = ablate.KeepPlan(len(index), 4, 0.2).take(0, 4)
    plain = ablate.Engine(conv_net, index).outputs(keep, images, labels)
    handles = [
        conv_net.get_submodule("conv1").register_forward_hook(lambda module, inputs, output: 2 * output),
        conv_net.get_submodule("fc").register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,)),
    ]
    expected = ablate.reference_outputs(conv_net, index, keep, images, labels)
    for mode in MODES:
        outputs = ablate.Engine(conv_net, index, mode=mode).outputs(keep, images, labels)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs, plain)
    for handle in handles:
        handle.remove()


def test_engine_with_bad_arguments(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    with untouched(model, images, labels):
        engine = ablate.Engine(model, index)
        with pytest.raises(ablate.KeepError, match=r"\(4, 17\), expected \(rows, 18\)"):
            engine.outputs(keep[:, 1:], images, labels)
        with pytest.raises(ablate.DataError, match="Labels are missing"):
            engine.outputs(keep, images)
        with pytest.raises(ablate.LabelError, match="label of example 0 is 3"):
            engine.outputs(keep, images, labels + 3)
        with pytest.raises(ablate.NonFiniteOutputError, match="keep row 0 on example 0"):
            engine.outputs(~keep, images * float("nan"), labels)
        with pytest.raises(ablate.UnknownNameError, match="No output 'foo'"):
            ablate.Engine(model, index, "foo")
        with pytest.raises(ablate.UnknownNameError, match="No module 'foo'"):
            ablate.ComponentIndex.from_model(model, include=["foo"])


def test_reference(
    model: nn.Module, index: ablate.ComponentIndex, keep: Keep, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    versions = _versions(model)
    with untouched(model, images, labels):
        ablate.reference_outputs(model, index, keep, images, labels)
    assert _versions(model) == versions


def test_ablated(
    model: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    with untouched(model, images, labels):
        with ablate.ablated(model, index.everything()):
            pass
        with ablate.ablated(model, index.select([1, 5, 14])), ablate.ablated(model, index.select([5, 6])):
            pass


def test_a_campaign(
    model: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    with torch.no_grad():
        torch.nan_to_num_(model.get_parameter("model.fc.weight"))
    store = MemoryStore()
    versions = _versions(model)
    with untouched(model, images, labels):
        spec = ablate.CampaignSpec(
            model=model, data=(images, labels), index=index, rows=5, block_rows=2, ablate_fraction=0.2
        )
        ablate.run(spec, store, progress=False)
        ablate.run(spec, store, progress=False)
    assert _versions(model) == versions


def test_a_campaign_that_fails(
    model: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    images[2, 0, 0, 0] = 99
    spec = ablate.CampaignSpec(model=model, data=(images, labels), index=index, rows=5, ablate_fraction=0.2)
    with untouched(model, images, labels), pytest.raises(RuntimeError, match="on purpose"):
        ablate.run(spec, MemoryStore(), progress=False)


def test_hashing_a_model(model: nn.Module, untouched: Untouched) -> None:
    with untouched(model):
        assert ablate.model_hash(model) == ablate.model_hash(model)


def test_loading_models(untouched: Untouched) -> None:
    import timm  # noqa: F401 - imported before the snapshot, as a user's first import may do anything
    import torchvision  # noqa: F401

    with untouched():
        ablate.load_model(TorchvisionModel(source="torchvision", name="shufflenet_v2_x0_5", classes=3))
        ablate.load_model(TimmModel(source="timm", name="test_resnet", classes=3))
        with pytest.raises(ablate.UnknownNameError, match="No timm model 'test_resnett'"):
            ablate.load_model(TimmModel(source="timm", name="test_resnett", classes=3))


def test_preserved_random_state_also_on_error(untouched: Untouched) -> None:
    with untouched():
        with ablate.preserved_random_state():
            torch.rand(3)
            np.random.rand(3)
        with pytest.raises(RuntimeError, match="on purpose"), ablate.preserved_random_state():
            Fragile(nn.Identity())(torch.full((1, 1, 1, 1), 99.0))


def test_the_check_itself_sees_changes(conv_net: nn.Module, images: Tensor, untouched: Untouched) -> None:
    """A guard that cannot fail guards nothing."""
    weight = conv_net.get_parameter("conv1.weight")
    with torch.no_grad():
        weight[0, 0, 0, 0] = 0.0

    def negate_zero() -> None:
        with torch.no_grad():
            weight[0, 0, 0, 0] = -0.0

    changes: dict[str, Callable[[], object]] = {
        "conv1.weight value": negate_zero,
        "head.bias value": lambda: conv_net.get_parameter("head.bias").requires_grad_(False),
        "fc.bias gradient": lambda: setattr(conv_net.get_parameter("fc.bias"), "grad", torch.zeros(5)),
        "bn1 training": lambda: conv_net.get_submodule("bn1").train(),
        "bn1.running_mean value": lambda: conv_net.get_buffer("bn1.running_mean").add_(1),
        "fc hooks": lambda: conv_net.get_submodule("fc").register_forward_hook(lambda *_: None),
        "fc module": lambda: conv_net.add_module("fc", nn.Linear(6, 5)),
        "tensor": lambda: images.mul_(2),
        "torch random state": lambda: torch.rand(1),
        "numpy random state": lambda: np.random.rand(1),
    }
    for what, change in changes.items():
        with (
            ablate.preserved_random_state(),
            pytest.raises(AssertionError, match=rf"changed behind the user's back: .*'{what}'"),
            untouched(conv_net, images),
        ):
            change()
