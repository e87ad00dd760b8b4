"""Every method edits networks that people use, at reduced resolution: it changes what it says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ablate import Examples
from coar.editing.edits.covered import covered
from coar.editing.registry import editor_class, editor_names, get_editor
from coar.editing.request import Request
from tests.networks import vgg11_bn

SIZE, CLASSES = 32, 5


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIZE),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "vgg11_bn": lambda: vgg11_bn(CLASSES),
}


CONVOLUTIONAL = ("resnet18", "vgg11_bn")
# each method on the transformer and on one of the other two: those two differ in nothing that a method looks at
PAIRS = [("vit_tiny_patch16_224", name) for name in editor_names()]
PAIRS += sorted((CONVOLUTIONAL[i % 2], name) for i, name in enumerate(editor_names()))


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    """With batch norm statistics of some data: with the initial ones nothing reaches the logits of a deep network."""
    torch.manual_seed(0)
    net = NETWORKS[request.param]()
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, SIZE, SIZE))
    return net.eval()


@pytest.fixture(scope="module")
def wish(model: nn.Module) -> Request:
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, SIZE, SIZE, generator=generator)

    def ordinary(count: int) -> Examples:
        inputs = images(count)
        with torch.no_grad():
            return Examples(inputs, model(inputs).argmax(dim=1))

    originals = images(2)
    region = torch.zeros(2, SIZE, SIZE)
    region[:, :24, :24] = 1
    inputs = torch.where(region[:, None] > 0, images(2), originals)
    with torch.no_grad():
        label = int(model(inputs).topk(2).indices[0, 1])
    changed = Examples(images(4), [label] * 4)
    return Request(inputs, torch.tensor([label, label]), originals, region, ordinary(8), (changed, ordinary(8)))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("model", "name"), PAIRS, indirect=["model"])
def test_an_edit_changes_what_it_says(name: str, model: nn.Module, wish: Request, untouched: Any) -> None:
    editor = get_editor(name, **editor_class(name).quick)
    with untouched(model):
        edit = editor.edit(model, wish).at(1)
        changed = edit.changed_weights(model)
    where = covered(edit.selection, model)
    parameters = dict(model.named_parameters())
    moved = 0
    for parameter, value in changed.items():
        before = parameters[parameter].detach()
        if parameter not in edit.operation.whole:
            assert torch.equal(value[~where[parameter]], before[~where[parameter]])
        moved += int((value != before).sum())
    assert moved > 0
    table = edit.describe()
    assert table["relative_change"].max() > 0
    with torch.no_grad():
        outputs = edit.apply(model)(wish.inputs)
        assert torch.isfinite(outputs).all()
        assert not torch.equal(outputs, model(wish.inputs))
