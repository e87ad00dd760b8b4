"""Edits on top of edits: deltas are differences on other weights, and a chain of edits is one value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex, Examples
from coar.editing.edits.conflicts import conflicts
from coar.editing.edits.covered import covered
from coar.editing.edits.operations import Delta, Factors, LowRank, Operation, Scale
from coar.editing.edits.parts import Parts
from coar.editing.methods.interpolation import interpolation_curve

Weights = dict[str, Tensor]
IDS = [0, 2, 12]  # two filters of conv1, one neuron of fc
WHOLE = ("bn1.weight", "fc.bias")


@pytest.fixture
def index(conv_net: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def _weights(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def _found(model: nn.Module, index: ComponentIndex, seed: int, ids: list[int] = IDS, size: float = 0.3) -> coar.Edit:
    """An edit as a method finds one on a model: weights moved at random."""
    generator = torch.Generator().manual_seed(seed)
    before = _weights(model)
    after = {name: value + size * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    operation = Delta.between(before, after, covered(index.select(ids), model), WHOLE)
    return coar.Edit(index.select(ids), operation, base=ablate.model_hash(model), method=f"search {seed}").measured(
        model
    )


def test_on_other_weights_a_delta_adds_its_difference(conv_net: nn.Module, index: ComponentIndex) -> None:
    first, second = _found(conv_net, index, 1), _found(conv_net, index, 2)
    start, one, two = (_weights(model) for model in (conv_net, first.apply(conv_net), second.apply(conv_net)))
    there = second.apply(first.apply(conv_net), any_weights=True)
    back = first.apply(second.apply(conv_net), any_weights=True)
    for name, value in _weights(there).items():
        expected = start[name] + (one[name] - start[name]) + (two[name] - start[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(_weights(back)[name], expected, rtol=0, atol=1e-6)
    half = second.at(0.5).apply(first.apply(conv_net), any_weights=True)
    for name, value in _weights(half).items():
        torch.testing.assert_close(value, one[name] + 0.5 * (two[name] - start[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-9, 0.3, 1e9])
def test_on_its_own_model_a_delta_ends_exactly(conv_net: nn.Module, index: ComponentIndex, size: float) -> None:
    """Whatever float arithmetic would make of start + (end - start)."""
    with torch.no_grad():
        conv_net.get_parameter("conv1.weight")[0, 0, 0] = torch.tensor([-0.0, 1e-42, 3e38])
    generator = torch.Generator().manual_seed(3)
    before = _weights(conv_net)
    after = {name: value + size * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    after["conv1.weight"][0, 0, 1] = torch.tensor([-0.0, 1e-42, -3e38])  # negative zero, subnormal, and what overflows
    operation = Delta.between(before, after, covered(index.select(range(18)), conv_net), WHOLE)
    edit = coar.Edit(index.select(range(18)), operation, base=ablate.model_hash(conv_net))
    for any_weights in (False, True):
        edited = edit.apply(conv_net, any_weights=any_weights)
        for name in ("conv1.weight", "conv2.weight", "fc.weight", *WHOLE):
            assert edited.get_parameter(name).detach().numpy().tobytes() == after[name].numpy().tobytes()
    assert _bits(edit.at(0).apply(conv_net)) == _bits(conv_net)


def test_a_chain_is_one_edit_after_the_other(
    conv_net: nn.Module, index: ComponentIndex, tmp_path: Path, untouched: Any
) -> None:
    first = _found(conv_net, index, 1)
    middle = first.apply(conv_net)
    second = _found(middle, index, 2, [2, 4])
    third = coar.Edit(index.select([0, 5]), Scale(3.0), 0.5, ablate.model_hash(second.apply(middle)), "by scale")
    expected = third.apply(second.apply(middle))
    for chain in (first.then(second).then(third), first.then(second.then(third))):
        with untouched(conv_net):
            assert chain.base == first.base
            assert chain.method == "search 1, then search 2, then by scale"
            assert chain.selection.ids == (0, 2, 4, 5, 12)
            assert _bits(chain.apply(conv_net)) == _bits(expected)
            with chain.applied(conv_net) as edited:
                assert _bits(edited) == _bits(expected)
            chain.save(tmp_path / "chain.safetensors")
            loaded = coar.load_edit(tmp_path / "chain.safetensors")
            assert loaded == chain
            assert _bits(loaded.apply(conv_net)) == _bits(expected)
    operation = first.then(second).then(third).operation
    assert isinstance(operation, Parts)
    assert len(operation.parts) == 3


def test_a_chain_at_alpha_lies_on_the_line_to_its_end(conv_net: nn.Module, index: ComponentIndex) -> None:
    first = _found(conv_net, index, 1)
    middle = first.apply(conv_net)
    chain = first.then(_found(middle, index, 2))
    start, end = _weights(conv_net), _weights(chain.apply(conv_net))
    assert _bits(chain.at(0).apply(conv_net)) == _bits(conv_net)
    for name, value in _weights(chain.at(0.3).apply(conv_net)).items():
        torch.testing.assert_close(value, torch.lerp(start[name], end[name], 0.3))
        assert torch.equal(value[start[name] == end[name]], start[name][start[name] == end[name]])
    beyond = chain.at(1.5, extrapolate=True).apply(conv_net)
    torch.testing.assert_close(
        _weights(beyond)["fc.bias"], start["fc.bias"] + 1.5 * (end["fc.bias"] - start["fc.bias"])
    )


def test_a_link_that_was_found_elsewhere_is_refused(
    conv_net: nn.Module, index: ComponentIndex, randomise: Callable[[nn.Module, int], nn.Module]
) -> None:
    first, second = _found(conv_net, index, 1), _found(conv_net, index, 2)
    base = ablate.model_hash(conv_net)
    with pytest.raises(coar.EditError) as refused:
        first.then(second)
    assert str(refused.value) == (
        f"Both edits were found on one model, {base[:12]}. Find the second on what the first gives, "
        "first.apply(model); or pass any_weights=True to add it there as a difference."
    )
    other = _found(second.apply(conv_net), index, 3)
    with pytest.raises(coar.EditMismatchError, match=r"^Link 2 of this chain does not fit: This edit was made for a"):
        first.then(other).apply(conv_net)
    with pytest.raises(coar.EditMismatchError, match=r"^This edit was made for a model with weights"):
        first.then(other).apply(second.apply(conv_net))
    added = first.then(second, any_weights=True)
    by_hand = second.apply(first.apply(conv_net), any_weights=True)
    assert _bits(added.apply(conv_net)) == _bits(by_hand)
    elsewhere = randomise(first.apply(conv_net), 9)
    by_hand = second.apply(first.apply(elsewhere, any_weights=True), any_weights=True)
    assert _bits(first.then(other).apply(elsewhere, any_weights=True)) != _bits(elsewhere)
    assert _bits(added.apply(elsewhere, any_weights=True)) == _bits(by_hand)


def test_what_cannot_be_chained(conv_net: nn.Module, index: ComponentIndex) -> None:
    first = _found(conv_net, index, 1)
    with pytest.raises(coar.EditError, match=r"^After an edit comes another edit, got a int"):
        first.then(1)  # type: ignore[arg-type]
    other = coar.Edit(ComponentIndex.from_model(conv_net, ["conv_filter"]).select([4]))
    with pytest.raises(coar.EditError, match=r"^These edits have different indices"):
        first.then(other)


def test_a_chain_in_a_sum(conv_net: nn.Module, index: ComponentIndex, tmp_path: Path) -> None:
    first = _found(conv_net, index, 1)
    chain = first.then(_found(first.apply(conv_net), index, 2, [2]))
    beside = coar.Edit(index.select([6]), Scale(0.5), base=first.base)
    assert conflicts(chain, beside) == []
    total = chain.at(0.5) + beside
    expected = beside.apply(chain.at(0.5).apply(conv_net), any_weights=True)
    total.save(tmp_path / "sum.safetensors")
    for edit in (total, coar.load_edit(tmp_path / "sum.safetensors")):
        assert _bits(edit.apply(conv_net)) == _bits(expected)
    with pytest.raises(coar.EditError, match=r"Both edits change weights of 'conv1\.weight'"):
        _ = chain + coar.Edit(index.select([2]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kinds", [("delta", "lowrank"), ("ablate", "delta"), ("scale", "lowrank")])
def test_chains_of_every_operation(
    conv_net: nn.Module, index: ComponentIndex, kinds: tuple[str, str], order: tuple[int, int]
) -> None:
    lowrank = LowRank({"conv1.weight": Factors(torch.ones(4, 1, 1), torch.rand(3, 1), ((1, 1),))})
    known: dict[str, Operation] = {
        "ablate": coar.Edit(index.select([0])).operation,
        "scale": Scale(2.0),
        "lowrank": lowrank,
    }

    def make(kind: str, model: nn.Module) -> coar.Edit:
        if kind == "delta":
            return _found(model, index, 5, [0, 1])
        return coar.Edit(index.select([0, 1]), known[kind], 0.7, ablate.model_hash(model))

    one = make(kinds[order[0]], conv_net)
    two = make(kinds[order[1]], one.apply(conv_net))
    expected = two.apply(one.apply(conv_net))
    assert _bits(one.then(two).apply(conv_net)) == _bits(expected)


def test_judging_takes_edits_of_other_weights(
    conv_net: nn.Module, index: ComponentIndex, images: Tensor, labels: Tensor
) -> None:
    first, second = _found(conv_net, index, 1), _found(conv_net, index, 2)
    middle = first.apply(conv_net)
    sets = {"original": Examples(images, labels), "edited": Examples(images, labels)}
    expected = coar.predictions(second.apply(middle, any_weights=True), sets["original"])
    with pytest.raises(coar.EditMismatchError):
        coar.evaluate_edit(middle, second, sets)
    report = coar.evaluate_edit(middle, second, sets, any_weights=True)
    assert report.sets["original"].kept.edited[0].tolist() == expected.tolist()
    with pytest.raises(coar.EditMismatchError):
        interpolation_curve(middle, second, sets, [0, 1])
    curve = interpolation_curve(middle, second, sets, [0, 1], any_weights=True)
    assert curve.columns["edited"][1] == report.sets["edited"].after
    with pytest.raises(coar.EditMismatchError):
        coar.evaluate_single_edits(middle, lambda *_: second, {"group": sets["original"]})
    singles = coar.evaluate_single_edits(middle, lambda *_: second, {"group": sets["original"]}, any_weights=True)
    assert singles.groups["group"].edited[3].tolist() == expected.tolist()


def test_an_end_point_by_hand_is_where_every_weight_goes(conv_net: nn.Module, index: ComponentIndex) -> None:
    edit = coar.Edit(index.select([0]), Delta({"conv1.weight": torch.full((27,), 7.0)}))
    assert edit.operation.end_points == ("conv1.weight",)
    assert (edit.apply(conv_net).get_parameter("conv1.weight")[0] == 7).all()
    bound = coar.Edit(index.select([0]), edit.operation, base="a" * 64)
    with pytest.raises(coar.EditMismatchError) as refused:
        bound.apply(conv_net, any_weights=True)
    assert str(refused.value) == (
        f"This edit was made for a model with weights {'a' * 12}, this ConvNet has {ablate.model_hash(conv_net)[:12]}. "
        "It says where 'conv1.weight' should end, not by how much to move: a file of an earlier format. Load it with "
        "the model it was made for, coar.load_edit(path, base=model), which gives the difference."
    )


def test_starts_that_do_not_fit(index: ComponentIndex) -> None:
    with pytest.raises(
        coar.EditError, match=r"The start of 'a' has shape \(2,\), there is an end point of shape \(3,\)\."
    ):
        Delta({"a": torch.zeros(3)}, starts={"a": torch.zeros(2)})
    with pytest.raises(coar.EditError, match=r"The start of 'b' has shape \(2,\), there is no end point\."):
        Delta({"a": torch.zeros(3)}, starts={"b": torch.zeros(2)})
