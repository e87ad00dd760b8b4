"""Direct low-rank editing: where the product is added, its rank, starts, targets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Selection
from coar.editing.edits.operations import Factors, LowRank
from coar.editing.methods.lowrank import DirectLowRank
from coar.editing.request import Request
from coar.editing.where.layer import place_of
from coar.errors import EditError
from tests.networks import vgg11_bn

Randomise = Callable[[nn.Module, int], nn.Module]


def _vgg(kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, kernel, padding=kernel // 2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=32, num_classes=3)
    return model


def _timm_resnet() -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=3)
    return model


def _request(size: int = 8, count: int = 3) -> Request:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(count, 3, size, size, generator=generator)
    return Request(originals + 0.5 * torch.randn(originals.shape, generator=generator), originals=originals)


def _whole(model: nn.Module, layer: str) -> Selection:
    return ComponentIndex.from_model(model).where(module=layer)


def _quick(**settings: Any) -> DirectLowRank:
    return DirectLowRank(**{**DirectLowRank.quick, **settings})


def _change(edit: coar.Edit, model: nn.Module, layer: str) -> Tensor:
    return edit.changed_weights(model)[f"{layer}.weight"] - model.get_parameter(f"{layer}.weight").detach()


def _first(model: nn.Module) -> Selection:
    """The rows of a model that is one layer: they make what it returns, and are edited only if they are named."""
    return ComponentIndex.from_model(model, ["linear_neuron"]).everything()


def _scalar() -> tuple[nn.Module, Request]:
    """f(x) = x, of one number: 2 should give what 1 gives."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)
    return model, Request(torch.tensor([[2.0]]), originals=torch.tensor([[1.0]]))


@pytest.mark.parametrize(
    ("kernel", "padding", "stride"),
    [(3, 1, 1), (3, 1, 2), (5, 2, 1), (1, 0, 1), (3, 0, 1), (7, 3, 2), (3, 0, 2), (3, 2, 1)],
)
def test_the_centre_tap_is_a_convolution_of_size_one_beside(kernel: int, padding: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(kernel)
    inputs = torch.randn(2, 4, 11, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 4, kernel, kernel, generator=generator, dtype=torch.float64)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (5, 4))
    center = (kernel - 1) // 2
    factors = Factors(left[:, None], right, ((center, center),))
    beside = padding - center  # negative: cropped
    shifted = F.pad(inputs, (beside, beside, beside, beside))
    product = torch.einsum("ir,jr->ij", left, right)[..., None, None]
    expected = F.conv2d(inputs, weight, padding=padding, stride=stride) + F.conv2d(shifted, product, stride=stride)
    found = F.conv2d(inputs, weight + factors.dense(weight), padding=padding, stride=stride)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "taps"),
    [
        (1, [(0, 0)]),
        (3, [(1, 1)]),
        (7, [(3, 3)]),
        (2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (4, [(1, 1), (1, 2), (2, 1), (2, 2)]),
        (6, [(2, 2), (2, 3), (3, 2), (3, 3)]),
    ],
)
def test_which_taps_change(kernel: int, taps: list[tuple[int, int]], randomise: Randomise) -> None:
    model = randomise(_vgg(kernel), 1).eval()
    place = place_of(model, _whole(model, "3"), "A method", None)
    assert list(place.middle) == taps
    change = _change(_quick(restarts=1).edit(model, _request(), _whole(model, "3")), model, "3")
    moved = (change.abs().amax((0, 1)) > 0).nonzero().tolist()
    assert [tuple(tap) for tap in moved] == taps
    for y, x in taps:
        assert torch.allclose(change[:, :, y, x], change[:, :, taps[0][0], taps[0][1]], atol=1e-6)
        assert int(torch.linalg.matrix_rank(change[:, :, y, x], atol=1e-5)) == 1


def test_constant_inputs_gain_four_times_the_product(randomise: Randomise) -> None:
    model, request = randomise(_vgg(4), 2).eval(), _request()
    for normalize, times in ((False, 4), (True, 1)):
        edit = _quick(restarts=1, normalize=normalize).edit(model, request, _whole(model, "3"))
        assert isinstance(edit.operation, LowRank)
        factors = edit.operation.factors["3.weight"]
        ones = torch.ones(1, 6, 9, 9)
        weight = model.get_parameter("3.weight").detach()
        gain = F.conv2d(ones, weight + factors.dense(weight)) - F.conv2d(ones, weight)
        product = factors.left[:, 0] @ factors.right.T * (4 if normalize else 1)
        expected = times * product.sum(1)
        assert torch.allclose(gain, expected[None, :, None, None].expand_as(gain), atol=1e-4)
        assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_change_has_its_rank_and_is_linear_in_alpha(rank: int, randomise: Randomise) -> None:
    model = randomise(_vgg(), 3).eval()
    edit = _quick(rank=rank).edit(model, _request(), _whole(model, "3"))
    change = _change(edit, model, "3")
    assert int(torch.linalg.matrix_rank(change[:, :, 1, 1], atol=1e-6)) == rank
    change[:, :, 1, 1] = 0
    assert not change.any()
    assert isinstance(edit.operation, LowRank)
    factors = edit.operation.factors["3.weight"]
    assert factors.left.numel() + factors.right.numel() == rank * (8 + 6)
    scaled = Factors(0.3 * factors.left, factors.right, factors.taps)
    weight = model.get_parameter("3.weight").detach()
    part = edit.at(0.3).changed_weights(model)["3.weight"]
    assert torch.allclose(part, weight + scaled.dense(weight), atol=1e-7)


def test_full_rank_reaches_any_change() -> None:
    """Three inputs and three values that only one weight gives: it is found, so the product spans all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).eval()
    originals = torch.randn(3, 3)
    request = Request(torch.eye(3) * 1.5, originals=originals)
    edit = _quick(rank=2, rate=0.2, steps=600, restarts=1).edit(model, request, _first(model))
    weight = model.get_parameter("0.weight").detach()
    assert torch.allclose(1.5 * edit.changed_weights(model)["0.weight"].T, originals @ weight.T, atol=1e-4)
    assert edit.details["log"]["loss_after"] < 1e-9
    single = _quick(rank=1, rate=0.2, steps=600, restarts=1).edit(model, request, _first(model))
    assert single.details["log"]["loss_after"] > 1e-3


def test_it_starts_as_the_original_and_keeps_the_best_start(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 4).eval(), _request()
    log = _quick(restarts=3).edit(model, request, _whole(model, "3")).details["log"]
    assert log["steps"] == 30  # those of the start that was kept
    assert log["losses"][0] == log["loss_before"]
    assert log["kept_start"] == log["losses_of_starts"].index(log["loss_after"])
    kept = _quick(restarts=log["kept_start"] + 1).edit(model, request, _whole(model, "3")).details["log"]
    assert log["losses"] == kept["losses"]
    assert len(set(log["losses_of_starts"])) == 3
    assert log["loss_after"] == min(log["losses_of_starts"]) < log["loss_before"]
    edit = _quick(restarts=3).edit(model, request, _whole(model, "3"))
    edited = edit.apply(model)
    assert isinstance(edited, nn.Sequential)
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        loss = (edited[:7](request.inputs) - model[:7](request.originals)).square().mean()
    assert float(loss) == pytest.approx(log["loss_after"], rel=1e-4)
    both = _quick(init="both", restarts=1).edit(model, request, _whole(model, "3")).details["log"]
    assert both["losses"][0] != both["loss_before"]


def test_seeds(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 4).eval(), _request()
    first, again, other = (_quick(seed=s).edit(model, request, _whole(model, "3")) for s in (0, 0, 1))
    assert first.operation == again.operation
    assert first.operation != other.operation


def test_a_target_that_moves_can_be_forgotten() -> None:
    """Frozen: 2 w = 1. Symmetric: 2 w = w, which only a layer that forgets everything gives."""
    model, request = _scalar()
    for target, expected in (("original", 0.5), ("symmetric", 0.0)):
        edit = _quick(target=target, rate=0.05, steps=300, restarts=1).edit(model, request, _first(model))
        assert float(edit.changed_weights(model)["0.weight"]) == pytest.approx(expected, abs=1e-3)
        assert edit.details["log"]["loss_after"] < 1e-5


def test_equal_pairs_change_nothing(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 5).eval(), _request()
    edit = _quick().edit(model, replace(request, originals=request.inputs), _whole(model, "3"))
    assert edit.details["log"]["stop"] == "noop"
    assert torch.equal(edit.changed_weights(model)["3.weight"], model.get_parameter("3.weight"))


@pytest.mark.parametrize("init", ["zero", "both"])
def test_rows_that_are_not_selected_keep_their_bits(init: str, randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 6).eval(), _request()
    whole = _whole(model, "3")
    edit = _quick(init=init).edit(model, request, whole.index.select(whole.ids[1:4]))
    moved = (edit.changed_weights(model)["3.weight"] != model.get_parameter("3.weight")).flatten(1).any(1)
    assert moved.tolist() == [False, True, True, True, False, False, False, False]
    assert isinstance(edit.operation, LowRank)
    assert not edit.operation.factors["3.weight"].left[[0, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(
    ("make", "layer", "size"),
    [(_timm_resnet, "layer3.0.conv3", 64), (_vit, "blocks.2.attn.proj", 32), (_vit, "blocks.5.mlp.fc2", 32)],
)
def test_the_loss_falls(make: Callable[[], nn.Module], layer: str, size: int, randomise: Randomise) -> None:
    model = randomise(make(), 7).eval()
    edit = _quick().edit(model, _request(size), _whole(model, layer))
    assert edit.details["log"]["loss_after"] < edit.details["log"]["loss_before"]
    change = _change(edit, model, layer).flatten(1)
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), "layer4.1.conv2"),
        (lambda: vgg11_bn(10), "features.25"),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10), "blocks.9.mlp.fc2"),
    ],
)
def test_models_of_the_libraries(make: Callable[[], nn.Module], layer: str, randomise: Randomise) -> None:
    model = randomise(make(), 8).eval()
    edit = _quick(rank=2).edit(model, _request(64, 2), _whole(model, layer))
    assert edit.details["log"]["loss_after"] < edit.details["log"]["loss_before"]
    change = _change(edit, model, layer)
    values = torch.linalg.svdvals((change if change.ndim == 2 else change[:, :, 1, 1]).double())
    assert float(values[2]) < 1e-5 * float(values[0])


def test_what_cannot_work(randomise: Randomise) -> None:
    with pytest.raises(EditError) as settings:
        DirectLowRank(init="ones", target="other", rank=0, restarts=0)  # type: ignore[arg-type]
    assert str(settings.value) == (
        "These settings cannot work: rank is 0, expected an integer from 1; restarts is 0, expected an integer from "
        "1; init is 'ones', expected one of zero, both; target is 'other', expected one of original, symmetric."
    )
    model, request = randomise(_vgg(), 9).eval(), _request()
    with pytest.raises(EditError) as rank:
        _quick(rank=7).edit(model, request, _whole(model, "3"))
    assert str(rank.value) == "rank is 7, the weight of '3' is (8, 6): expected a rank of 1 to 6."
    with pytest.raises(EditError) as diverged:
        _quick(rate=1e20).edit(model, request, _whole(model, "3"))
    assert str(diverged.value) == "All 2 starts diverged: lower the rate, now 1e+20."
    scalar, pair = _scalar()
    log = _quick(rate=0.4, steps=3).edit(scalar, pair, _first(scalar)).details["log"]
    assert log["stop"] == "failed"
    assert log["why"] == f"the loss rose from 1 to {log['loss_after']:.3g}: lower the rate"
