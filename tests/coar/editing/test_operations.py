"""Operations: each formula on weights by hand, exact where nothing is edited, and exact in a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex
from coar.editing.edits.covered import covered
from coar.editing.edits.operations import Ablate, Delta, Factors, LowRank, Operation, Scale


@pytest.fixture
def index(conv_net: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _moved(model: nn.Module, index: ComponentIndex, ids: list[int], whole: tuple[str, ...] = ()) -> Delta:
    generator = torch.Generator().manual_seed(5)
    before = _weights(model)
    after = {name: value + torch.randn(value.shape, generator=generator) for name, value in before.items()}
    return Delta.between(before, after, covered(index.select(ids), model), whole)


def _operations(model: nn.Module, index: ComponentIndex) -> dict[str, Operation]:
    factors = Factors(torch.ones(4, 9, 2), torch.rand(3, 2) + 1, tuple((y, x) for y in range(3) for x in range(3)))
    return {
        "ablate": Ablate(),
        "scale": Scale(1.5),
        "lowrank": LowRank({"conv1.weight": factors}),
        "delta": _moved(model, index, [0, 2, 12]),
        "delta with whole parameters": _moved(model, index, [0, 2, 12], ("bn1.weight", "fc.bias")),
    }


NAMES = ("ablate", "scale", "lowrank", "delta", "delta with whole parameters")


@pytest.fixture(params=NAMES)
def edit(request: pytest.FixtureRequest, conv_net: nn.Module, index: ComponentIndex) -> coar.Edit:
    """Filters 0 and 2 of conv1 and neuron 2 of fc."""
    operation = _operations(conv_net, index)[request.param]
    return coar.Edit(index.select([0, 2, 12]), operation, base=ablate.model_hash(conv_net))


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_nothing_but_the_covered_weights_changes(conv_net: nn.Module, edit: coar.Edit) -> None:
    before, after = _weights(conv_net), _weights(edit.apply(conv_net))
    where = covered(edit.selection, conv_net)
    whole = edit.operation.whole
    touched = 0
    for name, value in before.items():
        mask = where.get(name, torch.zeros(value.shape, dtype=torch.bool))
        if name in whole:
            assert not torch.equal(after[name], value)
            assert whole[name] == value.numel()
        else:
            assert torch.equal(after[name][~mask], value[~mask])
            touched += int((after[name][mask] != value[mask]).sum())
    assert touched == (2 * 27 + (0 if edit.operation.name == "lowrank" else 6))


def test_alpha_zero_is_the_original_and_one_the_end_point(conv_net: nn.Module, edit: coar.Edit, untouched: Any) -> None:
    before, after = _bits(conv_net), _bits(edit.apply(conv_net))
    with untouched(conv_net):
        assert _bits(edit.at(0).apply(conv_net)) == before
        with edit.at(0).applied(conv_net):
            assert _bits(conv_net) == before
        with edit.applied(conv_net):
            assert _bits(conv_net) == after != before
        ends = [_bits(edit.at(alpha).apply(conv_net)) for alpha in (1.0, 0.5, 1.0)]
    assert ends[0] == ends[2] != ends[1]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_models_along_alpha_lie_on_a_line(conv_net: nn.Module, edit: coar.Edit, alpha: float) -> None:
    start, end = _weights(conv_net), _weights(edit.apply(conv_net))
    for name, value in _weights(edit.at(alpha).apply(conv_net)).items():
        torch.testing.assert_close(value, torch.lerp(start[name], end[name], alpha), rtol=1e-5, atol=1e-6)
        same = start[name] == end[name]
        assert torch.equal(value[same], start[name][same]), "unedited weights drift by no bit"


def test_outside_of_zero_to_one_only_if_asked(conv_net: nn.Module, edit: coar.Edit) -> None:
    with pytest.raises(coar.EditError, match=r"alpha is 2.0, expected 0 \(the original model\) to 1"):
        edit.at(2.0)
    start, end = _weights(conv_net), _weights(edit.apply(conv_net))
    for name, value in _weights(edit.at(2.0, extrapolate=True).apply(conv_net)).items():
        torch.testing.assert_close(value, start[name] + 2 * (end[name] - start[name]), rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(conv_net: nn.Module, edit: coar.Edit, tmp_path: Path) -> None:
    path = tmp_path / "fix.safetensors"
    edit = edit.measured(conv_net).at(0.7)
    edit.save(path)
    loaded = coar.load_edit(path)
    assert loaded == edit
    assert loaded.norms == edit.norms
    assert hash(loaded) == hash(edit)
    assert _bits(loaded.apply(conv_net)) == _bits(edit.apply(conv_net))
    assert edit.at(0.5) != edit


def test_only_the_change_is_saved(conv_net: nn.Module, index: ComponentIndex, tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(100, 500), nn.Linear(500, 3)).eval()
    index = ComponentIndex.from_model(wide, ["linear_neuron"])
    edit = coar.Edit(index.select([7]), _moved(wide, index, [7]))
    edit.save(tmp_path / "fix.safetensors")
    assert (tmp_path / "fix.safetensors").stat().st_size < 5000, "one row of 100 numbers, of 50,000 weights"


def test_describe_says_how_much(conv_net: nn.Module, edit: coar.Edit) -> None:
    table = edit.at(0.5).describe(conv_net).set_index("module")
    start, end = _weights(conv_net), _weights(edit.apply(conv_net))
    for module in table.index:
        name = module if module in edit.operation.whole else f"{module}.weight"
        share = 0.5 * float((end[name] - start[name]).norm() / start[name].norm())
        assert table.loc[module, "relative_change"] == pytest.approx(share, rel=1e-5)
    assert list(table.loc["conv1", ["kind", "edited", "parameters", "components"]]) == ["conv_filter", 2, 54, 4]
    assert "relative_change" not in edit.describe()
    assert edit.measured(conv_net).at(0.5).describe().equals(edit.at(0.5).describe(conv_net))


def test_low_rank_by_hand(conv_net: nn.Module, index: ComponentIndex) -> None:
    left, right = torch.tensor([[[1.0]], [[2.0]], [[0.0]], [[3.0]]]), torch.tensor([[1.0], [10.0], [100.0]])
    centre = LowRank({"conv1.weight": Factors(left, right, ((1, 1),))})
    edit = coar.Edit(index.select([0, 1]), centre)
    change = _weights(edit.at(0.5).apply(conv_net))["conv1.weight"] - _weights(conv_net)["conv1.weight"]
    expected = torch.zeros(4, 3, 3, 3)
    expected[0, :, 1, 1], expected[1, :, 1, 1] = torch.tensor([0.5, 5, 50]), torch.tensor([1.0, 10, 100])
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)
    two = LowRank({"conv1.weight": Factors(left, right, ((0, 0), (2, 1)))})
    shared = _weights(coar.Edit(index.select(range(4)), two).apply(conv_net))["conv1.weight"]
    change = shared - _weights(conv_net)["conv1.weight"]
    torch.testing.assert_close(change[..., 0, 0], change[..., 2, 1], rtol=1e-4, atol=1e-4)
    assert int((change.abs() > 1e-6).sum()) == 2 * 9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Scale(float("nan")), "factor is nan, expected a finite number, e.g. 0.5 to halve the weights."),
        (
            lambda: Factors(torch.zeros(4, 2, 1), torch.zeros(3, 1), ((0, 0),)),
            "Factors do not fit: left (4, 2, 1), right (3, 1), 1 taps; expected (outputs, taps or 1, rank) and "
            "(inputs, rank).",
        ),
        (
            lambda: Factors(torch.zeros(4, 1, 2), torch.zeros(3, 1)),
            "Factors do not fit: left (4, 1, 2), right (3, 1), 1 taps; expected (outputs, taps or 1, rank) and "
            "(inputs, rank).",
        ),
    ],
)
def test_what_cannot_be(make: Any, text: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        make()
    assert str(refused.value) == text


def test_factors_of_another_shape_or_outside_the_kernel(conv_net: nn.Module, index: ComponentIndex) -> None:
    wrong = LowRank({"conv1.weight": Factors(torch.ones(5, 1, 1), torch.ones(3, 1))})
    with pytest.raises(coar.EditError) as refused:
        coar.Edit(index.select([0]), wrong).apply(conv_net)
    assert str(refused.value) == "The factors of 'conv1.weight' are for a weight (5, 3), it has (4, 3, 3, 3)."
    outside = LowRank({"conv1.weight": Factors(torch.ones(4, 1, 1), torch.ones(3, 1), ((3, 0),))})
    with pytest.raises(coar.EditError) as refused:
        coar.Edit(index.select([0]), outside).apply(conv_net)
    assert str(refused.value) == "The factors of 'conv1.weight' have taps ((3, 0),) outside its 3 x 3."


def test_a_delta_of_another_selection_is_refused(conv_net: nn.Module, index: ComponentIndex) -> None:
    edit = coar.Edit(index.select([0]), _moved(conv_net, index, [0, 2]))
    with pytest.raises(coar.EditError) as refused:
        edit.apply(conv_net)
    assert str(refused.value) == "The edit holds 54 values for 'conv1.weight', its selection covers 27."


def test_a_delta_that_diverged(conv_net: nn.Module, index: ComponentIndex) -> None:
    before = _weights(conv_net)
    after = {**before, "conv1.weight": before["conv1.weight"] * float("nan")}
    with pytest.raises(coar.EditError) as refused:
        Delta.between(before, after, covered(index.select([0]), conv_net))
    assert str(refused.value) == (
        "The edited 'conv1.weight' holds values that are not finite: the training diverged. Lower the rate."
    )


def test_a_residual_branch_is_edited_with_its_bias() -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    index = ComponentIndex.from_model(model, ["residual_branch"])
    branch = index.where(module="blocks.0.mlp.fc2")
    assert set(covered(branch, model)) == {"blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"}
    edited = coar.Edit(branch, Scale(0.0)).apply(model)
    assert not edited.get_parameter("blocks.0.mlp.fc2.bias").any()


def test_sums_do_both_whatever_the_order(conv_net: nn.Module, index: ComponentIndex, tmp_path: Path) -> None:
    base = ablate.model_hash(conv_net)
    first = coar.Edit(index.select([0]), _moved(conv_net, index, [0]), 0.5, base, "one", norms={"a": (1.0, 2.0)})
    second = coar.Edit(index.select([2]), Scale(3.0), base=base, method="two")
    third = coar.Edit(index.select([12]), _moved(conv_net, index, [12], ("fc.bias",)), base=base, method="three")
    by_hand = first.apply(conv_net)
    for part in (second, third):
        by_hand = part.apply(by_hand, any_weights=True)
    for total in (first + second + third, third + (first + second), (second + third) + first):
        assert total.operation.name == "together"
        assert total.selection.ids == (0, 2, 12)
        assert _bits(total.apply(conv_net)) == _bits(by_hand)
        assert _bits(total.at(0).apply(conv_net)) == _bits(conv_net)
        total.at(0.5).save(tmp_path / "sum.safetensors")
        loaded = coar.load_edit(tmp_path / "sum.safetensors")
        assert loaded == total.at(0.5)
        assert _bits(loaded.apply(conv_net)) == _bits(total.at(0.5).apply(conv_net))
    assert (first + second).method == "one + two"
    halves = copy.deepcopy(conv_net)
    for part in (first.at(0.25), second.at(0.5), third.at(0.5)):
        halves = part.apply(halves, any_weights=True)
    assert _bits((first + second + third).at(0.5).apply(conv_net)) == _bits(halves)


def test_two_ablations_are_one(conv_net: nn.Module, index: ComponentIndex) -> None:
    total = coar.Edit(index.select([0, 1])) + coar.Edit(index.select([1, 2]))
    assert (total.operation, total.selection.ids, total.alpha) == (Ablate(), (0, 1, 2), 1.0)


def test_what_does_not_add_up(conv_net: nn.Module, index: ComponentIndex) -> None:
    first = coar.Edit(index.select([0, 2]), Scale(2.0), base="a" * 64)
    refusals = {
        "Both edits change weights of 'conv1.weight': what the sum means is not clear. Let them select distinct "
        "components; or apply one, then find the other on the model that comes out.": coar.Edit(index.select([2, 4])),
        f"These edits were made for different models, {'a' * 12} and {'b' * 12}. Edits of one model add up.": coar.Edit(
            index.select([4]), base="b" * 64
        ),
        f"These edits have different indices, {index.hash[:12]} (18 components) and ": coar.Edit(
            ComponentIndex.from_model(conv_net, ["conv_filter"]).select([4])
        ),
    }
    for text, second in refusals.items():
        with pytest.raises(coar.EditError) as refused:
            _ = first + second
        assert str(refused.value).startswith(text)
    with pytest.raises(coar.EditError, match="An edit adds to another edit only, got a int"):
        _ = first + 1  # type: ignore[operator]


def test_a_whole_parameter_conflicts_with_its_slices(conv_net: nn.Module, index: ComponentIndex) -> None:
    whole = coar.Edit(index.select([12]), _moved(conv_net, index, [12], ("conv1.weight",)))
    with pytest.raises(coar.EditError, match=r"Both edits change weights of 'conv1\.weight'"):
        _ = whole + coar.Edit(index.select([0]), Scale(2.0))


def test_an_empty_selection_needs_whole_parameters(conv_net: nn.Module, index: ComponentIndex) -> None:
    edit = coar.Edit(index.select([]), _moved(conv_net, index, [], ("fc.bias",)))
    assert set(edit.changed_weights(conv_net)) == {"fc.bias"}
    assert repr(edit) == "<Edit: delta 0 of 18 components and 1 whole parameters at alpha=1, by by hand>"
