"""Rewriting: the closed form of the specification, the published algorithm step by step, ranks, masks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Examples, Selection
from coar.editing.edits.operations import Delta, LowRank
from coar.editing.methods.directions import along, key_directions
from coar.editing.methods.rewriting import GRID, PRESETS, Rewriting, rewriting_loss
from coar.editing.methods.second_moment import second_moment
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.editing.where.blocks import capture, find_block, layer_keys, run_block
from coar.errors import EditError
from tests.networks import vgg11_bn

Randomise = Callable[[nn.Module, int], nn.Module]


class Residual(nn.Module):
    """A residual block with a shortcut, as torchvision has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.downsample(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return out


def _vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _residual() -> nn.Module:
    return nn.Sequential(Residual(3, 6), Residual(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def _vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=32, num_classes=3)
    return model


def _timm_resnet() -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=3)
    return model


def _request(size: int, count: int = 2, seed: int = 0, ordinary: int = 12) -> Request:
    generator = torch.Generator().manual_seed(seed)
    originals = torch.randn(count, 3, size, size, generator=generator)
    masks = torch.zeros(count, size, size)
    masks[:, : size // 2, : size // 2] = 1
    changed = torch.where(masks[:, None] > 0, torch.randn(originals.shape, generator=generator), originals)
    reference = Examples(
        torch.randn(ordinary, 3, size, size, generator=generator), torch.zeros(ordinary, dtype=torch.int64)
    )
    return Request(changed, originals=originals, masks=masks, reference=reference)


def _exact(request: Request) -> Request:
    """Returns the pairs in float64."""
    assert request.originals is not None
    return replace(request, inputs=request.inputs.double(), originals=request.originals.double())


def _whole(model: nn.Module, layer: str) -> Selection:
    return ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"]).where(module=layer)


def _quick(**settings: Any) -> Rewriting:
    return Rewriting(**{**Rewriting.quick, **settings})


def _change(edit: coar.Edit, model: nn.Module, layer: str) -> Tensor:
    parameter = model.get_parameter(f"{layer}.weight")
    return edit.changed_weights(model)[f"{layer}.weight"] - parameter.detach()


def _closed_form() -> tuple[nn.Module, Request]:
    """W = I, key (2, 1), value (0, 3), and a second moment of diag(4, 1)."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.eye(2))
    ordinary = Examples(torch.tensor([[8**0.5, 0.0], [0.0, 2**0.5]]), torch.tensor([0, 1]))
    return model, Request(torch.tensor([[2.0, 1.0]]), originals=torch.tensor([[0.0, 3.0]]), reference=ordinary)


def test_the_closed_form_of_a_linear_layer() -> None:
    model, request = _closed_form()
    settings = {"optimizer": "sgd", "rate": 0.2, "steps": 200, "loss": "mse", "project_every": 1}
    edit = Rewriting(**settings).edit(model, request, _whole(model, "0"))  # type: ignore[arg-type]
    after = edit.changed_weights(model)["0.weight"]
    assert torch.allclose(after, torch.tensor([[0.5, -1.0], [0.5, 2.0]]), atol=1e-5)
    assert torch.allclose(after @ torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]), atol=1e-5)
    aside = torch.tensor([2.0, -1.0])
    assert torch.allclose(after @ aside, aside, atol=1e-5)
    assert isinstance(edit.operation, LowRank)
    factors = edit.operation.factors["0.weight"]
    assert torch.allclose(factors.right.flatten(), torch.tensor([0.4472, 0.8944]), atol=1e-4)
    assert torch.allclose(factors.left.flatten(), torch.tensor([-1.1180, 1.1180]), atol=1e-4)
    moment, change = torch.diag(torch.tensor([4.0, 1.0])), after - torch.eye(2)
    assert float((change @ moment @ change.T).trace()) == pytest.approx(4, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # every other weight with that value disturbs ordinary keys more
        other = change + torch.outer(torch.randn(2, generator=generator), torch.tensor([1.0, -2.0]))
        assert torch.allclose((torch.eye(2) + other) @ torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]), atol=1e-5)
        assert float((other @ moment @ other.T).trace()) > 4


def test_masked_loss() -> None:
    mask = torch.tensor([[1.0, 0.25], [0.0, 0.0]]).expand(2, 1, 2, 2)
    ones, zeros = torch.ones(2, 5, 2, 2), torch.zeros(2, 5, 2, 2)
    assert float(rewriting_loss([(ones, zeros)], mask)) == pytest.approx(0.1875)
    halves = [(ones[:1], zeros[:1]), (ones[1:], zeros[1:])]
    assert float(rewriting_loss(halves, mask)) == pytest.approx(0.1875)
    assert float(rewriting_loss([(ones, zeros)], None)) == pytest.approx(0.5)
    assert float(rewriting_loss([(ones, zeros)], mask, "mse")) == pytest.approx(1.25 / 4)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_the_published_algorithm_step_by_step(loss: Literal["l1", "mse"], randomise: Randomise) -> None:
    """No filter of this model is dead: Adam makes whole steps of the rounding errors of one."""
    model, request = randomise(_vgg(), 11).eval().double(), _exact(_request(8))
    edit = _quick(steps=25, rank=2, loss=loss).edit(model, request, _whole(model, "3"))
    layer = model.get_submodule("3")
    assert isinstance(layer, nn.Conv2d)
    assert request.reference is not None
    assert request.masks is not None
    assert request.originals is not None
    keys = layer_keys(model, "3", request.inputs).reshape(-1, 6)
    moment = second_moment(model, "3", request.reference)
    directions = key_directions(keys, request.masks.flatten(), moment, 2)[0]  # masks of the size of the keys
    block = find_block(model, "3")
    ((args, kwargs, _),) = capture(model, block, request.inputs)
    value = capture(model, block, request.originals)[0][2]
    before = layer.weight.detach().clone()
    rest = before - along(before, directions)
    optimizer = torch.optim.Adam([layer.weight], lr=1e-2)
    for step in range(25):
        optimizer.zero_grad()
        difference = value - run_block(model, block, args, kwargs)
        distance = difference.abs().mean() / 2 if loss == "l1" else difference.square().mean()
        distance.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 0 or step == 24:
            with torch.no_grad():
                layer.weight.copy_(rest + along(layer.weight, directions))
    expected = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(before)
    assert torch.allclose(edit.changed_weights(model)["3.weight"], expected, rtol=0, atol=1e-12)
    assert float((expected - before).norm()) > 0.05


def test_descent_on_the_factor_is_projected_descent(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 2).eval().double(), replace(_exact(_request(8)), masks=None)
    settings: dict[str, Any] = {"optimizer": "sgd", "rate": 0.5, "steps": 15, "loss": "mse", "project_every": 1}
    edit = Rewriting(**settings).edit(model, request, _whole(model, "3"))
    assert request.reference is not None
    assert request.originals is not None
    keys = layer_keys(model, "3", request.inputs).reshape(-1, 6)
    directions, _ = key_directions(keys, torch.ones(len(keys)), second_moment(model, "3", request.reference), 1)
    block, layer = find_block(model, "3"), model.get_submodule("3")
    assert isinstance(layer, nn.Conv2d)
    ((args, _, _),) = capture(model, block, request.inputs)
    value = capture(model, block, request.originals)[0][2]
    before = layer.weight.detach().clone()
    factor = torch.zeros(8, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    convolution, *rest = (model.get_submodule(name) for name in block.modules)
    assert isinstance(convolution, nn.Conv2d)
    for _ in range(15):
        weight = before + torch.einsum("oryx,ri->oiyx", factor, directions)
        out = nn.functional.conv2d(args[0], weight, padding=1)
        for module in rest:
            out = module(out)
        (gradient,) = torch.autograd.grad((value - out).square().mean(), [factor])
        with torch.no_grad():
            factor -= 0.5 * gradient
    expected = before + torch.einsum("oryx,ri->oiyx", factor.detach(), directions)
    found = edit.changed_weights(model)["3.weight"]
    assert float((found - expected).abs().max()) < 1e-10
    assert float((expected - before).abs().max()) > 1e-3


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("taps", ["all", "center"])
def test_the_change_has_its_rank_per_tap(rank: int, taps: str, randomise: Randomise) -> None:
    model, request = randomise(_residual(), 3).eval(), _request(8)
    edit = _quick(rank=rank, taps=taps, use_mask=True).edit(model, request, _whole(model, "1.conv2"))
    change = _change(edit, model, "1.conv2")
    for y in range(3):
        for x in range(3):
            expected = rank if taps == "all" or (y, x) == (1, 1) else 0
            assert int(torch.linalg.matrix_rank(change[:, :, y, x], atol=1e-5)) == expected
    rows = change.permute(0, 2, 3, 1).reshape(-1, 8)
    assert int(torch.linalg.matrix_rank(rows, atol=1e-5)) == rank
    if taps == "all":
        assert int(torch.linalg.matrix_rank(change.flatten(1), atol=1e-5)) > rank
    assert edit.details["log"]["loss_after"] < edit.details["log"]["loss_before"]


def test_without_projection_any_change_is_allowed(randomise: Randomise) -> None:
    model, request = randomise(_residual(), 3).eval(), _request(8)
    edit = _quick(restrict_rank=False).edit(model, request, _whole(model, "1.conv2"))
    assert isinstance(edit.operation, Delta)
    rows = _change(edit, model, "1.conv2").permute(0, 2, 3, 1).reshape(-1, 8)
    assert int(torch.linalg.matrix_rank(rows, atol=1e-5)) == 8


def test_equal_pairs_change_nothing(randomise: Randomise) -> None:
    model, request = randomise(_residual(), 4).eval(), _request(8)
    edit = _quick(weight_decay=0.1).edit(
        model, replace(request, originals=request.inputs.clone()), _whole(model, "1.conv2")
    )
    assert edit.details["log"]["stop"] == "noop"
    assert edit.details["log"]["loss_before"] == 0
    assert torch.equal(edit.changed_weights(model)["1.conv2.weight"], model.get_parameter("1.conv2.weight"))


def test_too_few_ordinary_examples_are_named(randomise: Randomise) -> None:
    """48 keys for 48 channels: the direction is one that they do not have, and hardly the concept's either."""
    model, request = randomise(_timm_resnet(), 8).eval(), _request(32)
    log = _quick(use_mask=True).edit(model, request, _whole(model, "layer3.0.conv3")).details["log"]
    assert log["stop"] == "failed"
    assert log["why"] == (
        f"the loss rose from {log['loss_before']:.3g} to {log['loss_after']:.3g}: lower the rate; or give more "
        f"ordinary examples: {log['eigenvalues_floored']} of 48 directions hardly occur in the keys of these"
    )


def test_rows_that_are_not_selected_keep_their_bits(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 5).eval(), _request(8)
    whole = _whole(model, "3")
    some = whole.index.select(whole.ids[1:4])
    for settings in ({}, {"restrict_rank": False}, {"optimizer": "adamw", "weight_decay": 0.1}):
        edit = _quick(**settings).edit(model, request, some)
        after, before = edit.changed_weights(model)["3.weight"], model.get_parameter("3.weight")
        moved = (after != before).flatten(1).any(1)
        assert moved.tolist() == [False, True, True, True, False, False, False, False]


def test_masks_tell_where_the_concept_is(randomise: Randomise) -> None:
    model, request = randomise(_vit(), 6).eval(), _request(32)
    layer = _whole(model, "blocks.1.mlp.fc2")
    edit = _quick().edit(model, request, layer)
    log = edit.details["log"]
    assert log["concept_keys"] == 2  # one of 4 patches of each of 2 images; never a class token
    assert log["second_moment_positions"] == 12 * 5
    assert log["eigenvalues_floored"] >= 192 - 60  # fewer keys than channels
    assert log["channels"] == 192
    assert log["loss_after"] < log["loss_before"]
    everywhere = _quick().edit(model, replace(request, masks=None), layer)
    assert everywhere.details["log"]["concept_keys"] == 10
    assert everywhere.operation != edit.operation
    assert _quick(use_mask=True).edit(model, request, layer).operation != edit.operation


def test_a_linear_layer_is_a_convolution_of_size_one(randomise: Randomise) -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias if conv.bias is not None else linear.bias)
    pools = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = nn.Sequential(conv, nn.ReLU(), pools).eval()

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(-1, 1)

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(1, -1)

    tokens = nn.Sequential(First(), linear, nn.ReLU(), Last(), pools).eval()
    request = replace(_request(8), masks=None)
    editor = _quick(optimizer="sgd", loss="mse", rate=0.1)  # Adam on l1 makes a difference of a rounding
    one = editor.edit(images, request, _whole(images, "0")).changed_weights(images)["0.weight"]
    other = editor.edit(tokens, request, _whole(tokens, "1")).changed_weights(tokens)["1.weight"]
    assert torch.allclose(one.flatten(1), other, atol=1e-5)
    assert not torch.allclose(one, conv.weight, atol=1e-3)


def test_batches_do_not_matter(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 7).eval(), _request(8, count=5)
    for settings in ({"use_mask": True}, {"loss": "mse"}):
        once, parts = (
            _quick(steps=12, optimizer="sgd", rate=0.1, batch_size=size, **settings).edit(
                model, request, _whole(model, "3")
            )
            for size in (64, 2)
        )
        assert torch.allclose(_change(once, model, "3"), _change(parts, model, "3"), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "layer", "size"),
    [
        (_vgg, "3", 8),
        (_residual, "0.conv2", 8),
        (_timm_resnet, "layer3.0.conv3", 64),
        (_vit, "blocks.2.attn.proj", 32),
        (_vit, "blocks.5.mlp.fc2", 32),
    ],
)
def test_the_loss_falls(make: Callable[[], nn.Module], layer: str, size: int, randomise: Randomise) -> None:
    model, request = randomise(make(), 8).eval(), _request(size, ordinary=64)
    edit = _quick(use_mask=True, rate=1e-3).edit(model, request, _whole(model, layer))
    log = edit.details["log"]
    assert log["loss_after"] < log["loss_before"]
    assert (log["steps"], log["stop"], log["layer"]) == (30, "max_steps", layer)
    assert list(edit.changed_weights(model)) == [f"{layer}.weight"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), "layer4.1.conv2"),
        (lambda: torchvision.models.resnet18(num_classes=10), "layer3.0.conv2"),
        (lambda: vgg11_bn(10), "features.25"),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10), "blocks.9.mlp.fc2"),
    ],
)
def test_models_of_the_libraries(make: Callable[[], nn.Module], layer: str, randomise: Randomise) -> None:
    model, request = randomise(make(), 9).eval(), _request(64, ordinary=64)
    edit = _quick(use_mask=True, rate=1e-4, steps=40).edit(model, request, _whole(model, layer))
    assert edit.details["log"]["loss_after"] < edit.details["log"]["loss_before"]
    change = _change(edit, model, layer)
    taps = change[..., None] if change.ndim == 2 else change.flatten(2)
    scale = float(change.norm())
    for tap in range(taps.shape[2]):
        values = torch.linalg.svdvals(taps[:, :, tap].double())
        assert float(values[1]) < 1e-5 * scale


def test_settings() -> None:
    assert GRID[1] == (1e-4, 20_000)
    for name, preset in PRESETS.items():
        assert isinstance(get_editor("rewriting", **preset), Rewriting), name
    assert Rewriting() == Rewriting(**PRESETS["paper"])
    with pytest.raises(EditError) as refused:
        Rewriting(
            loss="l2",  # type: ignore[arg-type]
            taps="edge",  # type: ignore[arg-type]
            direction="pca",  # type: ignore[arg-type]
            rank=0,
            project_every=0,
            floor=2,
            prefix_tokens=-1,
            rate=0,
            momentum=0.9,
        )
    assert str(refused.value) == (
        "These settings cannot work: rate is 0, expected a number above 0; rank is 0, expected an integer from 1; "
        "loss is 'l2', expected one of l1, mse; project_every is 0, expected an integer from 1; taps is 'edge', "
        "expected one of all, center; direction is 'pca', expected one of whitened, raw_eig; floor is 2, expected a "
        "number above 0 to below 1; prefix_tokens is -1, expected an integer from 0 or None; momentum belongs to "
        "sgd, the optimizer is 'adam'."
    )
    with pytest.raises(EditError) as types:
        Rewriting(rank=1.5, use_mask=1, cache=3)  # type: ignore[arg-type]
    assert str(types.value) == (
        "These settings cannot work: rank is 1.5, expected an integer from 1; use_mask is 1, expected True or "
        "False; cache is 3, expected text or None."
    )


def test_requests_that_cannot_be(randomise: Randomise) -> None:
    model, request = randomise(_vgg(), 10).eval(), _request(8)
    layer = _whole(model, "3")
    with pytest.raises(EditError) as missing:
        _quick(use_mask=True).edit(model, replace(request, masks=None), layer)
    assert str(missing.value) == "use_mask is True, but the request has no masks. Give masks, or pass use_mask=False."
    with pytest.raises(EditError, match=r"^The masks are zero at every position of this layer: "):
        _quick().edit(model, replace(request, masks=torch.zeros(2, 8, 8)), layer)
    with pytest.raises(EditError, match=r"^The masks are zero at every position of the values: "):
        _quick(restrict_rank=False, use_mask=True).edit(model, replace(request, masks=torch.zeros(2, 8, 8)), layer)
    with pytest.raises(EditError, match=r"^rank is 7, but the concept has 32 keys, of which 6 are independent"):
        _quick(rank=7).edit(model, request, layer)
    even = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(196, 2)).eval()
    with pytest.raises(EditError) as center:
        _quick(taps="center").edit(even, request, _whole(even, "0"))
    assert str(center.value) == ("taps is 'center', the kernel of '0' is 2 x 2: it has no centre. Pass taps='all'.")
