"""Output collision: the layer computes for transformed inputs what it computes for the originals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Examples
from coar.editing.edits.covered import covered
from coar.editing.methods.output_collision import OutputCollision
from coar.editing.request import Request
from coar.editing.where.blocks import find_block, run_until

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def net(randomise: Randomise) -> nn.Module:
    """A chain of two convolutions with batch norm, and a head; `0` to `7`."""
    chain = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(180, 3)),
    )
    return randomise(chain, 1).eval()


@pytest.fixture
def index(net: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(net, ["conv_filter"])


@pytest.fixture
def pairs(images: Tensor) -> Request:
    """Five images with noise on them, and without."""
    noise = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    return Request(images[:5] + 0.5 * noise, originals=images[:5])


def _values(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return run_until(model, find_block(model, layer), inputs)


def _distance(model: nn.Module, edited: nn.Module, layer: str, request: Request) -> float:
    assert request.originals is not None
    return float(F.mse_loss(_values(edited, layer, request.inputs), _values(model, layer, request.originals)))


def _changed(model: nn.Module, edited: nn.Module) -> set[str]:
    after = edited.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_it_brings_the_values_together(
    scope: Any, net: nn.Module, index: ComponentIndex, pairs: Request, untouched: Untouched
) -> None:
    with untouched(net, pairs.inputs):
        edit = OutputCollision(scope=scope, steps=200, rate=0.03).edit(net, pairs, index.where(module="3"))
    edited = edit.apply(net)
    before, after = _distance(net, net, "3", pairs), _distance(net, edited, "3", pairs)
    assert edit.details["log"]["loss_first"] == pytest.approx(before, rel=1e-5)
    assert after < 0.7 * before
    assert _changed(net, edited) == ({"3.weight"} if scope == "local" else {"0.weight", "3.weight"})
    assert edit.details["log"]["block"] == ["3", "4", "5"]


def test_it_is_gradient_descent_with_momentum_and_decay(net: nn.Module, index: ComponentIndex, pairs: Request) -> None:
    assert pairs.originals is not None
    start = net.get_parameter("3.weight").detach().clone()
    target = net[:6](pairs.originals).detach()  # type: ignore[index]
    optimizer = torch.optim.SGD([net.get_parameter("3.weight")], lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(6):
        optimizer.zero_grad()
        value = net[:6](pairs.inputs)  # type: ignore[index]
        ((value - target) ** 2).flatten(1).mean(dim=1).mean().backward()  # over features, then over examples
        optimizer.step()
    expected = net.get_parameter("3.weight").detach().clone()
    with torch.no_grad():
        net.get_parameter("3.weight").copy_(start)
    net.zero_grad(set_to_none=True)
    edit = OutputCollision(rate=0.05, steps=6).edit(net, pairs, index.where(module="3"))
    torch.testing.assert_close(edit.changed_weights(net)["3.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_no_change_without_a_transformation(scope: Any, net: nn.Module, index: ComponentIndex, images: Tensor) -> None:
    same = Request(images, originals=images.clone())
    layer = index.where(module="3")
    still = OutputCollision(scope=scope, weight_decay=0, stop_loss=None, steps=5).edit(net, same, layer)
    assert not _changed(net, still.apply(net)), "the gradient is 0"
    assert still.details["log"]["losses"] == [0.0] * 5
    noop = OutputCollision(scope=scope).edit(net, same, layer)
    assert (noop.details["log"]["stop"], noop.details["log"]["steps"]) == ("noop", 0)
    decayed = OutputCollision(scope=scope, stop_loss=None, steps=5).edit(net, same, layer)
    assert _changed(net, decayed.apply(net)), "decay moves weights even then"


def test_global_at_the_first_layer_is_local(net: nn.Module, index: ComponentIndex, pairs: Request) -> None:
    edits = [
        OutputCollision(scope=scope, steps=20, rate=0.03).edit(net, pairs, index.where(module="0"))
        for scope in ("local", "global")
    ]
    assert edits[0].operation == edits[1].operation
    assert edits[0].selection == edits[1].selection
    assert _changed(net, edits[0].apply(net)) == {"0.weight"}


def test_some_filters_only(net: nn.Module, index: ComponentIndex, pairs: Request) -> None:
    selection = index.where(module="3").sample(2, 0)
    edit = OutputCollision(steps=30).edit(net, pairs, selection)
    ((name, mask),) = covered(selection, net).items()
    before, after = net.get_parameter(name), edit.apply(net).get_parameter(name)
    assert torch.equal(before[~mask], after[~mask])
    assert (before[mask] != after[mask]).any()


def test_the_symmetric_target_collapses(randomise: Randomise) -> None:
    """With both sides edited, a layer of zeros has loss 0, and descent leads there. The fixed target does not."""
    model = randomise(nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)), 1).eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 6, generator=generator)
    request = Request(-x, originals=x)
    layer = ComponentIndex.from_model(model, ["linear_neuron"]).where(module="0")
    zeros = coar.Edit(layer).apply(model)
    assert F.mse_loss(_values(zeros, "0", -x), _values(zeros, "0", x)) == 0
    start = model.get_parameter("0.weight").detach().norm()
    ends = {}
    for target in ("original", "symmetric"):
        editor = OutputCollision(target=target, steps=1000, rate=1.5, stop_loss=1e-8)
        edited = editor.edit(model, request, layer).apply(model)
        ends[target] = float(edited.get_parameter("0.weight").detach().norm() / start)
        if target == "symmetric":
            assert float(F.mse_loss(_values(edited, "0", -x), _values(edited, "0", x))) <= 1e-8
    assert ends["symmetric"] < 0.05 < ends["original"]


def test_a_transformer_with_its_skip_connection(randomise: Randomise) -> None:
    model = randomise(timm.create_model("test_vit", num_classes=3, img_size=32), 4).eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    request = Request(x + 0.3 * torch.randn(x.shape, generator=generator), originals=x)
    index = ComponentIndex.from_model(model, ["ffn_out"])
    layer = index.where(module="blocks.2.*")
    edit = OutputCollision(steps=40).edit(model, request, layer)
    assert edit.details["log"]["block"] == ["blocks.2"]
    assert _changed(model, edit.apply(model)) == {"blocks.2.mlp.fc2.weight"}
    assert edit.details["log"]["loss_last"] < edit.details["log"]["loss_first"]
    deep = OutputCollision(scope="global", steps=3).edit(model, request, layer)
    changed = _changed(model, deep.apply(model))
    assert "patch_embed.proj.weight" in changed
    assert not [name for name in changed if name.startswith(("blocks.3", "head", "norm")) or name.endswith("bias")]


def test_early_stopping_keeps_the_best_weights(net: nn.Module, index: ComponentIndex, pairs: Request) -> None:
    assert pairs.originals is not None
    pairs = Request(pairs.inputs + 4 * (pairs.inputs - pairs.originals), originals=pairs.originals)
    assert pairs.originals is not None
    with torch.no_grad():
        right = net(pairs.originals).argmax(dim=1)
        start = float((net(pairs.inputs).argmax(dim=1) == right).float().mean())
    examples = Examples(pairs.inputs, right)
    request = Request(pairs.inputs, originals=pairs.originals, validation=(examples, examples))
    layer = index.where(module="0")
    edit = OutputCollision(steps=300, early_stopping=True, patience=20).edit(net, request, layer)
    found = edit.details["log"]["early_stopping"]
    with torch.no_grad():
        end = float((edit.apply(net)(pairs.inputs).argmax(dim=1) == right).float().mean())
    assert end == found["best_accuracy"] > start
    with pytest.raises(coar.EditError, match=r"^early_stopping needs validation"):
        OutputCollision(early_stopping=True).edit(net, pairs, layer)


def test_several_layers_are_refused(net: nn.Module, index: ComponentIndex, pairs: Request) -> None:
    with pytest.raises(coar.EditError) as refused:
        OutputCollision().edit(net, pairs, index.everything())
    assert str(refused.value) == (
        "Output collision edits one layer, the selection lies in 2: 0, 3. Select with index.where(module=...)."
    )


def test_settings_that_cannot_work_are_all_named() -> None:
    wrong: dict[str, Any] = {"scope": "forward", "target": "mean", "rate": -1, "patience": 0, "stop_loss": -1.0}
    with pytest.raises(coar.EditError) as refused:
        OutputCollision(**wrong)
    assert str(refused.value) == (
        "These settings cannot work: scope is 'forward', expected one of local, global; target is 'mean', expected "
        "one of original, symmetric; rate is -1, expected a number above 0; stop_loss is -1.0, expected a number "
        "from 0 or None; patience is 0, expected an integer from 1."
    )
    assert [f.name for f in fields(OutputCollision) if f.name not in f"{OutputCollision.__doc__}seed"] == []
