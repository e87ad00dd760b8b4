"""What a store is bound to beside weights: the network's code, settings of the output, and the numbers they give."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import coar
from ablate.campaign.identity import compared, require_same, whatever_the_data
from ablate.models.calls import LONGEST, Calls, shortened
from ablate.models.network import describe_modules
from ablate.models.stack import Stack
from ablate.outputs import output_names
from stores import CampaignStore, StoreMismatchError

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers with a forward that is given; equal weights whatever the forward."""

    def __init__(self, forward: Forward, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8, **settings), nn.Linear(8, 3)
        self._forward = forward
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _plain(net: Net, x: Tensor) -> Tensor:
    logits: Tensor = net.last(F.relu(net.norm(net.first(x))))
    return logits


def _sequential(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)).eval()


def _convolution(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 3, **{"padding": 1, **settings}), *pooled).eval()


class Attending(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.last = nn.MultiheadAttention(6, heads, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] + torch.eye(6)
        logits: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return logits


DATA = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def _spec(model: nn.Module, **changes: Any) -> ablate.CampaignSpec:
    components = {"kinds": ["linear_neuron"]}
    settings: dict[str, Any] = {"rows": 6, "block_rows": 2, "ablate_fraction": 0.3, "components": components}
    return ablate.CampaignSpec(model=model.eval(), data=DATA, **(settings | changes))


def _campaign(spec: ablate.CampaignSpec, place: Any, **options: Any) -> None:
    ablate.run(spec, place, progress=False, **options)


def _estimate(spec: ablate.CampaignSpec, place: Any, **options: Any) -> None:
    coar.estimate(spec, passes=2, quality_rows=0, store=place, **options)


def _refused(make: Callable[..., None], first: ablate.CampaignSpec, second: ablate.CampaignSpec, **options: Any) -> str:
    place = MemoryStore()
    make(first, place)
    make(first, place)  # the same goes on
    with pytest.raises(StoreMismatchError) as refused:
        make(second, place, **options)
    return str(refused.value)


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "another activation module": (
        lambda: _sequential(nn.ReLU()), lambda: _sequential(nn.GELU()),
        "code.types.1: torch.nn.modules.activation.ReLU -> torch.nn.modules.activation.GELU",
    ),
    "another slope": (
        lambda: _sequential(nn.LeakyReLU(0.1)), lambda: _sequential(nn.LeakyReLU(0.2)),
        "code.settings.1.negative_slope: 0.1 -> 0.2",
    ),
    "another function": (
        lambda: Net(_plain), lambda: Net(lambda net, x: net.last(F.gelu(net.norm(net.first(x))))),
        "code.calls.(model): relu() -> gelu()",
    ),
    "another slope of a function": (
        lambda: Net(lambda net, x: net.last(F.leaky_relu(net.first(x), 0.1))),
        lambda: Net(lambda net, x: net.last(F.leaky_relu(net.first(x), 0.2))),
        "code.calls.(model): leaky_relu(negative_slope=0.1) -> leaky_relu(negative_slope=0.2)",
    ),
    "another order": (
        lambda: Net(_plain), lambda: Net(lambda net, x: net.last(net.norm(F.relu(net.first(x))))),
        "code.order: first, norm, (model), last -> first, (model), norm, last",
    ),
    "another operand": (
        lambda: Net(lambda net, x: net.last(net.first(x) - net.norm(net.first(x)))),
        lambda: Net(lambda net, x: net.last((b := net.first(x)) * 0 + net.norm(b) - b)),
        "code.calls.(model)",
    ),
    "the same functions of other results": (
        lambda: Net(lambda net, x: net.last((a := net.first(x)) - net.norm(a))),
        lambda: Net(lambda net, x: net.last(-(net.norm(a) - a) if (a := net.first(x)) is None else net.norm(a) - a)),
        "code.flow",
    ),
    "another epsilon": (lambda: Net(_plain), lambda: Net(_plain, eps=0.1), "code.settings.norm.eps: 1e-05 -> 0.1"),
    "another stride": (_convolution, lambda: _convolution(stride=2), "code.settings.1.stride: [1] -> [2]"),
    "another padding": (_convolution, lambda: _convolution(padding=2), "code.settings.1.padding: [1] -> [2]"),
    "another number of heads": (
        lambda: Attending(2), lambda: Attending(3), "code.settings.attention.num_heads: 2 -> 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", [_campaign, _estimate])
@pytest.mark.parametrize("pair", PAIRS)
def test_equal_weights_under_other_code_are_refused_by_name(pair: str, make: Callable[..., None]) -> None:
    first, second, line = PAIRS[pair]
    one, two = first(), second()
    assert ablate.model_hash(one) == ablate.model_hash(two)
    assert line in _refused(make, _spec(one), _spec(two))


def test_an_unfinished_campaign_is_refused_with_the_numbers_that_differ() -> None:
    place = MemoryStore()
    _campaign(_spec(_sequential(nn.ReLU())), place)
    CampaignStore.open(place, mode="r+").blocks.forget(1)
    with pytest.raises(StoreMismatchError, match=r"sample_outputs: .* -> .*\nThe network or the output computes other"):
        _campaign(_spec(_sequential(nn.GELU())), place, accept_code=True, accept_versions=True)


@pytest.mark.parametrize("make", [_campaign, _estimate])
def test_code_that_was_only_rewritten_is_accepted_by_a_flag(make: Callable[..., None]) -> None:
    place = MemoryStore()
    rewritten = Net(lambda net, x: F.linear(net.norm(net.first(x)).clamp(min=0), net.last.weight, net.last.bias))
    make(_spec(Net(_plain)), place)
    with pytest.raises(StoreMismatchError, match="accept_code=True"):
        make(_spec(rewritten), place)
    make(_spec(rewritten), place, accept_code=True)


@pytest.mark.parametrize("make", [_campaign, _estimate])
def test_the_flag_accepts_no_other_numbers(make: Callable[..., None]) -> None:
    text = _refused(make, _spec(_sequential(nn.ReLU())), _spec(_sequential(nn.GELU())), accept_code=True)
    assert "sample_outputs" in text
    assert "computes other numbers than when the store was made" in text


def test_numbers_are_compared_where_the_code_cannot_tell() -> None:
    class Hidden(torch.autograd.Function):
        factor = 1.0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * Hidden.factor

    place, net = MemoryStore(), Net(lambda net, x: net.last(Hidden.apply(net.first(x))))
    _campaign(_spec(net), place)
    CampaignStore.open(place, mode="r+").blocks.forget(0)
    _campaign(_spec(net), place)
    CampaignStore.open(place, mode="r+").blocks.forget(0)
    Hidden.factor = 2.0
    with pytest.raises(StoreMismatchError, match="sample_outputs"):
        _campaign(_spec(net), place)


def test_what_changes_no_number_is_no_other_code() -> None:
    class Counting(nn.Module):
        def __init__(self, calls: int, inplace: bool, p: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.act, self.drop = nn.Linear(6, 8), nn.ReLU(inplace), nn.Dropout(p)
            self.last, self.calls = nn.Linear(8, 3), calls

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.last(self.drop(self.act(self.first(x))))
            return logits

    place = MemoryStore()
    for calls, inplace, p in ((0, False, 0.1), (7, True, 0.5)):
        _campaign(_spec(Counting(calls, inplace, p)), place)


def test_a_store_of_before_is_gone_on_with_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    place, model = MemoryStore(), _sequential(nn.ReLU())
    _campaign(_spec(model), place)
    stored = CampaignStore.open(place).header["identity"]
    old = {key: value for key, value in stored.items() if key not in ("code", "weights", "output_settings")}
    assert compared({k: v for k, v in old.items() if k != "sample_outputs"}, stored) == []
    with caplog.at_level("INFO", logger="ablate"):
        require_same("a.zarr", old, lambda: stored, lambda: "", finished=True)
    assert [vars(record)["event"] for record in caplog.records] == ["code_not_compared"]


class Scaled(ablate.Output):
    name = "scaled logit"

    def __init__(self, factor: Any) -> None:
        self._factor = factor

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        scaled: Tensor = self._factor * logits
        return scaled.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("make", [_campaign, _estimate])
def test_an_output_with_other_settings_is_refused(make: Callable[..., None]) -> None:
    model = _sequential(nn.ReLU())
    text = _refused(make, _spec(model, output=Scaled(1.0)), _spec(model, output=Scaled(1000.0)))
    assert "output_settings._factor: 1.0 -> 1000.0" in text
    tensors = _refused(make, _spec(model, output=Scaled(torch.ones(3))), _spec(model, output=Scaled(torch.zeros(3))))
    assert "output_settings._factor: " in tensors


def test_a_setting_of_the_class_counts_and_the_registered_have_none() -> None:
    kind = type("Other", (Scaled,), {"temperature": 2.0, "shift": lambda self: 0})
    assert kind(1.0).describe() == {"_factor": 1.0, "temperature": 2.0}
    assert [ablate.outputs.get_output(name).describe() for name in output_names()] == [{}] * len(output_names())


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (ablate.ScaleAblation(0.5), ablate.ScaleAblation(0.25), "ablation: scale 0.5 -> scale 0.25"),
        (ablate.MeanAblation(DATA[0]), ablate.MeanAblation(DATA[0][:4]), "ablation: mean over "),
    ],
)
def test_an_ablation_with_other_settings_is_refused(first: Any, second: Any, line: str) -> None:
    model = _sequential(nn.ReLU())
    assert line in _refused(_campaign, _spec(model, ablation=first), _spec(model, ablation=second))


def test_code_is_plain_and_the_same_for_every_batch_and_copy() -> None:
    def code(model: nn.Module, data: Tensor) -> Any:
        index = ablate.ComponentIndex.from_model(model)
        return ablate.Engine(model, index).identity(data, torch.zeros(len(data), dtype=torch.int64)).code

    net = Net(_plain).eval()
    found = code(net, DATA[0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert code(copy.deepcopy(net), DATA[0][:2]) == found
    assert whatever_the_data(found)["calls"] == {"(model)": "relu", "first": "linear", "last": "linear",
                                                 "norm": "layer_norm"}  # fmt: skip


def test_a_long_line_ends_in_its_hash() -> None:
    long = ", ".join(["add()"] * LONGEST)
    assert len(shortened(long)) < LONGEST + 30
    assert shortened(long) != shortened(f"{long}, mul()")


def test_where_a_tensor_is_and_of_which_type_says_nothing() -> None:
    def calls(run: Callable[[Tensor], Tensor]) -> Any:
        stack = Stack(nn.Identity())
        with stack.watching(), (found := Calls(stack)):
            run(torch.ones(2, 3))
        return found.describe()

    assert calls(lambda x: x.to("cpu").relu()) == calls(lambda x: x.relu())
    assert calls(lambda x: x * torch.zeros(3, device="cpu")) == calls(lambda x: x * torch.zeros(3))


def test_settings_are_those_of_the_module_itself() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Dropout(0.3), nn.Softmax(dim=1))
    found = describe_modules(model)
    assert found["types"]["(model)"] == "torch.nn.modules.container.Sequential"
    assert found["settings"]["0"]["padding"] == "same"
    assert found["settings"]["2"] == {"dim": 1}
    assert "1" not in found["settings"], "no dropout in eval mode"
