"""What a sum or a chain of edits says of itself: relative changes, strengths, conflicts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex
from coar.editing.edits.conflicts import conflicts
from coar.editing.edits.covered import covered
from coar.editing.edits.operations import Ablate, Delta, Scale
from coar.editing.edits.parts import Parts
from coar.editing.methods.finetune import FineTuning
from coar.editing.request import Request

Rows = dict[str, float]


@pytest.fixture
def index(conv_net: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def _moved(
    model: nn.Module, index: ComponentIndex, ids: list[int], size: float, whole: tuple[str, ...] = ()
) -> coar.Edit:
    generator = torch.Generator().manual_seed(len(ids))
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    after = {name: value + size * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    operation = Delta.between(before, after, covered(index.select(ids), model), whole)
    return coar.Edit(index.select(ids), operation, base=ablate.model_hash(model), method=f"by {size}").measured(model)


def _said(edit: coar.Edit, model: nn.Module | None = None) -> Rows:
    table = edit.describe(model).set_index("module")
    return {str(module): float(value) for module, value in table["relative_change"].items()}


def _by_hand(edit: coar.Edit, model: nn.Module) -> Rows:
    """Relative changes of the weights that come out, per parameter."""
    edited = dict(edit.apply(model, any_weights=True).named_parameters())
    found = {}
    for name, value in model.named_parameters():
        change = float((edited[name] - value).detach().norm() / value.detach().norm())
        if change:
            found[name] = change
    return found


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.1, 0.1), (0.1, 1.0), (0.0, 0.5)])
def test_a_sum_says_the_change_of_all_its_parts(
    conv_net: nn.Module, index: ComponentIndex, strengths: tuple[float, float], tmp_path: Path
) -> None:
    first = _moved(conv_net, index, [0, 1, 12], 0.3, ("bn1.weight",))
    second = _moved(conv_net, index, [2, 5], 2.0)
    total = first.at(strengths[0]) + second.at(strengths[1])
    for edit in (total, total.at(0.5)):
        expected = _by_hand(edit, conv_net)
        for said in (_said(edit), _said(edit, conv_net)):
            for name, value in expected.items():
                assert said[name if name == "bn1.weight" else name.removesuffix(".weight")] == pytest.approx(
                    value, rel=1e-5
                )
        edit.save(tmp_path / "sum.safetensors")
        assert _said(coar.load_edit(tmp_path / "sum.safetensors")) == _said(edit)
    assert isinstance(total.operation, Parts)
    assert [part.alpha for part in total.operation.parts] == list(strengths)


def test_what_a_sum_cannot_know_is_no_number(conv_net: nn.Module, index: ComponentIndex) -> None:
    """An ablation by hand has no norms: the change of what it touches is not 0, and not the other part's."""
    measured, by_hand = _moved(conv_net, index, [0, 12], 0.3), coar.Edit(index.select([1, 5]))
    said = _said(measured + by_hand)
    assert math.isnan(said["conv1"])
    assert math.isnan(said["conv2"])
    assert said["fc"] == pytest.approx(_said(measured)["fc"])
    truth = _by_hand(measured + by_hand, conv_net)
    assert _said(measured + by_hand, conv_net)["conv1"] == pytest.approx(truth["conv1.weight"], rel=1e-5)
    assert "relative_change" not in (by_hand + coar.Edit(index.select([2]), Scale(2.0))).describe()


def test_a_chain_says_what_it_knows(conv_net: nn.Module, index: ComponentIndex) -> None:
    first = _moved(conv_net, index, [0, 12], 0.3)
    second = _moved(first.apply(conv_net), index, [0, 5], 0.5)
    chain = first.at(0.5).then(second, any_weights=True)
    said, truth = _said(chain), _by_hand(chain, conv_net)
    assert math.isnan(said["conv1"]), "both change it"
    assert said["fc"] == pytest.approx(truth["fc.weight"], rel=1e-5)
    assert said["conv2"] == pytest.approx(truth["conv2.weight"], rel=1e-5)
    assert _said(chain, conv_net)["conv1"] == pytest.approx(truth["conv1.weight"], rel=1e-5)
    assert _said(chain.measured(conv_net)) == _said(chain, conv_net)


@pytest.mark.parametrize("alpha", [1.5, 0.4, -0.5])
def test_ablations_of_one_strength_are_one(conv_net: nn.Module, index: ComponentIndex, alpha: float) -> None:
    one, two = (
        coar.Edit(index.select(ids)).measured(conv_net).at(alpha, extrapolate=True) for ids in ([0, 1, 12], [1, 5])
    )
    total = one + two
    assert (total.operation, total.alpha, total.extrapolates) == (Ablate(), alpha, True)
    weight, edited = (net.get_parameter("conv1.weight") for net in (conv_net, total.apply(conv_net)))
    torch.testing.assert_close(edited[:2], weight[:2] * (1 - alpha))
    assert torch.equal(edited[2:], weight[2:])
    said = _said(total)
    assert math.isnan(said["conv1"]), "they share a filter, whose share of the norm is not known"
    assert said["fc"] == pytest.approx(_by_hand(total, conv_net)["fc.weight"], rel=1e-5)


def test_a_sum_extrapolates_if_a_part_does(conv_net: nn.Module, index: ComponentIndex) -> None:
    beyond = coar.Edit(index.select([0])).at(1.5, extrapolate=True)
    plain = coar.Edit(index.select([5]), Scale(2.0))
    total = beyond + plain
    assert total.extrapolates
    assert not (plain + coar.Edit(index.select([0]))).extrapolates
    assert beyond.then(plain).extrapolates
    weight = conv_net.get_parameter("conv1.weight")
    torch.testing.assert_close(total.apply(conv_net).get_parameter("conv1.weight")[0], -0.5 * weight[0])
    torch.testing.assert_close(total.at(0.5).apply(conv_net).get_parameter("conv1.weight")[0], 0.25 * weight[0])


STRENGTHS = [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), np.float32(0.5), np.array(0.5), 0.5]


@pytest.mark.parametrize("alpha", STRENGTHS, ids=lambda alpha: type(alpha).__name__)
def test_strengths_become_plain_numbers(index: ComponentIndex, alpha: float, tmp_path: Path) -> None:
    for edit in (coar.Edit(index.select([0])).at(alpha), coar.Edit(index.select([0]), alpha=alpha)):
        assert type(edit.alpha) is float
        edit.save(tmp_path / "edit.safetensors")
        assert coar.load_edit(tmp_path / "edit.safetensors").alpha == 0.5
    assert type(Scale(alpha).factor) is float


@pytest.mark.parametrize("alpha", [True, np.True_, torch.tensor(True), "0.5", None, [0.5], torch.ones(1), 1j])
def test_strengths_that_are_no_numbers_are_refused_when_they_are_set(index: ComponentIndex, alpha: float) -> None:
    with pytest.raises(coar.EditError, match=r"^alpha is .*; expected a number, e\.g\. 0\.5\.$"):
        coar.Edit(index.select([0])).at(alpha)
    with pytest.raises(coar.EditError, match=r"^factor is "):
        Scale(alpha)


class Block(nn.Module):
    """A residual block that ends in a norm with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return out


@pytest.fixture
def residual(request: pytest.FixtureRequest) -> nn.Module:
    stem, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
    net = nn.Sequential(stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return request.getfixturevalue("randomise")(net, 1).eval()  # type: ignore[no-any-return]


def test_a_residual_branch_conflicts_by_its_bias(residual: nn.Module) -> None:
    """It takes the bias along, so what moves that bias touches the same weight: the sum would depend on the order."""
    index = ComponentIndex.from_model(residual, ["conv_filter", "residual_branch"])
    branch, name = coar.Edit(index.where(kind="residual_branch")), "1.bn2.bias"
    bias = coar.Edit(index.select([0]), Delta({"0.weight": torch.ones(9), name: torch.full((4,), 7.0)}, (name,)))
    for one, two in ((bias, branch), (branch, bias)):
        assert conflicts(one, two) == [name]
        with pytest.raises(coar.EditError, match=r"^Both edits change weights of '1\.bn2\.bias': what the sum means"):
            _ = one + two
    assert not bias.then(branch).apply(residual).get_parameter(name).any()
    assert (branch.then(bias).apply(residual).get_parameter(name) == 7).all()


def test_fine_tuning_conflicts_with_the_branch_that_it_trained(residual: nn.Module) -> None:
    index = ComponentIndex.from_model(residual, ["conv_filter", "residual_branch"])
    request = Request(torch.randn(4, 1, 8, 8), torch.tensor([1, 1, 1, 1]))
    tuned = FineTuning(scope="global", rate=1e-2, steps=5).edit(residual, request, index.where(module="1.conv2"))
    branch = coar.Edit(index.where(kind="residual_branch"))
    with pytest.raises(coar.EditError, match=r"weights of '1\.bn2\.bias', '1\.bn2\.weight'"):
        _ = tuned + branch


def test_a_branch_is_described_with_its_bias(residual: nn.Module) -> None:
    index = ComponentIndex.from_model(residual, ["residual_branch"])
    assert _said(coar.Edit(index.everything(), Scale(0.5)), residual) == {"1.bn2": pytest.approx(0.5)}
    halved = coar.Edit(index.everything(), alpha=0.5).measured(residual)
    assert set(halved.norms) == {"1.bn2.weight", "1.bn2.bias"}
