"""Masked fine-tuning: exactly the chosen weights move, all of them is plain fine-tuning, and the controls."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import ComponentIndex, Examples, Selection
from coar.editing.edits.covered import covered
from coar.editing.edits.files import load_edit
from coar.editing.log import EditLog
from coar.editing.masks import (
    HypernetworkMask,
    MeanMask,
    MetaSettings,
    RandomMask,
    binarise,
    density_sweep,
    load_hypernetwork,
    train_hypernetwork,
)
from coar.editing.masks.masked import MaskedEditor
from coar.editing.methods.finetune import FineTuning
from coar.editing.request import Request
from coar.editing.training.descent import Descent, descend
from coar.errors import EditError, EditMismatchError
from tests.networks import vgg11_bn

Untouched = Callable[..., AbstractContextManager[None]]
SETTINGS = MetaSettings.preset("code", iterations=3, batch=2, free_steps=2, inner_steps=1, blocks=1, width=8, rate=1e-2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def selection(tiny_net: nn.Module) -> Selection:
    return ComponentIndex.from_model(tiny_net, ["conv_filter"]).everything()


@pytest.fixture(scope="module")
def request_(images: Tensor) -> Request:
    return Request(images[:3], torch.tensor([2, 0, 1]), reference=Examples(images[3:], [0] * 9))


@pytest.fixture(scope="module")
def artefact(
    tiny_net: nn.Module, selection: Selection, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    train_hypernetwork(tiny_net, selection, images, SETTINGS, store=path)
    return str(path)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_mask_of_ones_is_plain_fine_tuning_step_for_step(
    tiny_net: nn.Module, selection: Selection, request_: Request, artefact: str
) -> None:
    editor = HypernetworkMask(hypernetwork=artefact, density=1.0, rate=1e-3, steps=12)
    edit = editor.edit(tiny_net, request_, selection)
    assert edit.selection == selection
    plain = copy.deepcopy(tiny_net).requires_grad_(False)
    log = EditLog()
    labels = request_.labels
    assert labels is not None
    descend(
        plain,
        covered(selection, plain),
        lambda: F.cross_entropy(plain(request_.inputs), labels),
        Descent(optimizer="rmsprop", rate=1e-3, steps=12),
        log,
        lambda: False,
    )
    assert edit.details["log"]["losses"] == log.losses
    assert len(log.losses) == 12
    edited = _weights(edit.apply(tiny_net))
    for name, weight in _weights(plain).items():
        assert torch.equal(edited[name], weight)
    for same in (RandomMask(density=1.0, rate=1e-3, steps=12), FineTuning(rate=1e-3, steps=12)):
        assert same.edit(tiny_net, request_, selection).operation == edit.operation


def test_a_mask_of_zeros_changes_nothing(tiny_net: nn.Module, selection: Selection, request_: Request) -> None:
    model = copy.deepcopy(tiny_net).requires_grad_(False)
    labels = request_.labels
    assert labels is not None
    none = {name: torch.zeros_like(mask) for name, mask in covered(selection, model).items()}
    descend(model, none, lambda: F.cross_entropy(model(request_.inputs), labels), Descent(rate=0.1, steps=5), EditLog())
    for name, weight in _weights(model).items():
        assert torch.equal(weight, _weights(tiny_net)[name])
    assert torch.equal(model(request_.inputs), tiny_net(request_.inputs))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_weights_that_are_not_chosen_keep_their_bits(
    tiny_net: nn.Module, selection: Selection, request_: Request, artefact: str, density: float
) -> None:
    edit = HypernetworkMask(hypernetwork=artefact, density=density, rate=1e-2).edit(tiny_net, request_, selection)
    assert len(edit.selection) == int(density * 10)
    assert edit.details["log"]["mask"]["chosen"] == int(density * 10)
    assert set(edit.selection.ids) < set(selection.ids)
    where, edited = covered(edit.selection, tiny_net), _weights(edit.apply(tiny_net))
    for name, weight in _weights(tiny_net).items():
        chosen = where.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(edited[name][~chosen], weight[~chosen])
        assert (edited[name][chosen] != weight[chosen]).any() == bool(chosen.any())


def test_the_first_step_moves_every_chosen_weight_by_ten_rates(
    tiny_net: nn.Module, selection: Selection, request_: Request
) -> None:
    edit = RandomMask(density=0.5, rate=1e-3, steps=1).edit(tiny_net, request_, selection)
    changes = edit.changed_weights(tiny_net)
    assert changes
    for name, mask in covered(edit.selection, tiny_net).items():
        moved = (_weights(edit.apply(tiny_net))[name] - _weights(tiny_net)[name])[mask].abs()
        moved = moved[moved > 0]  # a filter behind a dead ReLU has no gradient
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)


def test_it_stops_before_the_first_step_if_there_is_nothing_to_do(
    tiny_net: nn.Module, selection: Selection, images: Tensor
) -> None:
    with torch.no_grad():
        labels = tiny_net(images).argmax(dim=1)
    edit = RandomMask(density=0.5, stop_loss=1e3).edit(tiny_net, Request(images, labels), selection)
    assert (edit.details["log"]["steps"], edit.details["log"]["stop"]) == (0, "noop")
    assert torch.equal(edit.apply(tiny_net)(images), tiny_net(images))
    wrong = RandomMask(density=0.5, stop_loss=1e3, steps=3).edit(tiny_net, Request(images, (labels + 1) % 3), selection)
    assert wrong.details["log"]["steps"] > 0  # the loss alone does not end it: every label must be predicted


def test_it_stops_when_labels_and_loss_are_reached(tiny_net: nn.Module, request_: Request) -> None:
    everything = ComponentIndex.from_model(tiny_net, ["conv_filter", "linear_neuron"]).everything()
    edit = RandomMask(density=0.8, rate=3e-3).edit(tiny_net, request_, everything)
    labels = request_.labels
    assert labels is not None
    assert edit.details["log"]["stop"] == "converged"
    assert 0 < edit.details["log"]["steps"] <= 100
    with torch.no_grad():
        logits = edit.apply(tiny_net)(request_.inputs)
    assert torch.equal(logits.argmax(dim=1), labels)
    assert float(F.cross_entropy(logits, labels)) <= 0.01


def test_the_mask_of_identical_samples_is_that_of_one(
    tiny_net: nn.Module, selection: Selection, request_: Request, artefact: str
) -> None:
    editor = HypernetworkMask(hypernetwork=artefact, density=0.5)
    one = Request(request_.inputs[:1], torch.tensor([1]))
    five = Request(request_.inputs[:1].expand(5, 1, 6, 6).clone(), torch.ones(5, dtype=torch.int64))
    network = load_hypernetwork(artefact, tiny_net, selection)
    torch.testing.assert_close(
        editor.mask(network, tiny_net, five), editor.mask(network, tiny_net, one), rtol=0, atol=1e-6
    )
    assert editor.edit(tiny_net, five).selection == editor.edit(tiny_net, one).selection


def test_several_samples_average_their_continuous_masks(tiny_net: nn.Module, request_: Request, artefact: str) -> None:
    network = load_hypernetwork(artefact, tiny_net)
    expected = binarise(network.masks(tiny_net, request_.inputs).mean(dim=0), density=0.3)
    edit = HypernetworkMask(hypernetwork=artefact, density=0.3).edit(tiny_net, request_)
    assert edit.selection == network.layout.chosen(expected)


def test_a_threshold_instead_of_a_density(tiny_net: nn.Module, request_: Request, artefact: str) -> None:
    network = load_hypernetwork(artefact, tiny_net)
    mask = network.masks(tiny_net, request_.inputs).mean(dim=0)
    middle = float(mask.sort().values[6])
    edit = HypernetworkMask(hypernetwork=artefact, density=None, threshold=middle).edit(tiny_net, request_)
    assert edit.selection == network.layout.chosen(mask > middle)
    assert edit.details["density"] is None


def test_the_mean_mask_is_the_mean_over_the_reference(tiny_net: nn.Module, request_: Request, artefact: str) -> None:
    network = load_hypernetwork(artefact, tiny_net)
    assert request_.reference is not None
    mean = network.masks(tiny_net, request_.reference.inputs()).mean(dim=0)
    editor = MeanMask(hypernetwork=artefact, density=0.3)
    edit = editor.edit(tiny_net, request_)
    assert edit.selection == network.layout.chosen(binarise(mean, density=0.3))
    other = replace(request_, inputs=request_.inputs + 1)
    assert editor.edit(tiny_net, other).selection == edit.selection  # it does not look at the request
    few = MeanMask(hypernetwork=artefact, density=0.3, images=1, seed=3).edit(tiny_net, request_)
    assert len(few.selection) == 3


def test_the_random_mask_is_drawn_by_its_seed(
    tiny_net: nn.Module, selection: Selection, images: Tensor, request_: Request
) -> None:
    drawn = [RandomMask(density=0.3, steps=1, seed=seed).edit(tiny_net, request_, selection) for seed in range(12)]
    assert {len(edit.selection) for edit in drawn} == {3}
    assert len({edit.selection.ids for edit in drawn}) > 6
    assert {i for edit in drawn for i in edit.selection.ids} == set(range(10))
    other = replace(request_, inputs=images[5:8])
    assert RandomMask(density=0.3, steps=1, seed=4).edit(tiny_net, other, selection).selection == drawn[4].selection


def test_the_sweep_gives_nested_masks_of_exact_sizes(
    tiny_net: nn.Module, selection: Selection, request_: Request, artefact: str
) -> None:
    editor = HypernetworkMask(hypernetwork=artefact, steps=2)
    edits = density_sweep(editor, tiny_net, request_, selection, densities=(0.8, 0.5, 0.1))
    assert {density: len(edit.selection) for density, edit in edits.items()} == {0.8: 8, 0.5: 5, 0.1: 1}
    assert set(edits[0.1].selection.ids) < set(edits[0.5].selection.ids) < set(edits[0.8].selection.ids)
    assert list(density_sweep(RandomMask(steps=1), tiny_net, request_, selection, densities=(0.2,))) == [0.2]


@pytest.mark.parametrize("make", [HypernetworkMask, MeanMask, RandomMask])
def test_a_vision_transformer_in_about_a_second(make: type[MaskedEditor], untouched: Untouched) -> None:
    torch.manual_seed(2)
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
    inputs = torch.randn(14, 3, 32, 32)
    request = Request(inputs[:2], torch.tensor([1, 2]), reference=Examples(inputs[2:], [0] * 12))
    with untouched(model, inputs):
        edit = make(**make.quick).edit(model, request)
        again = make(**make.quick).edit(model, request)
    assert again == edit or (again.operation == edit.operation and again.selection == edit.selection)
    table = edit.selection.table()
    assert set(table["kind"]) == {"ffn_in", "ffn_out"}
    assert set(table["module"]) == {f"blocks.{block}.mlp.{fc}" for block in (2, 3, 4) for fc in ("fc1", "fc2")}
    assert len(edit.selection) == 6 * 192 // 4
    assert edit.details["log"]["loss_last"] < edit.details["log"]["loss_first"]
    logits = edit.apply(model)(inputs[:2])
    assert not torch.equal(logits, model(inputs[:2]))


def test_training_inside_an_edit_is_noted(tiny_net: nn.Module, request_: Request) -> None:
    edit = HypernetworkMask(**{**HypernetworkMask.quick, "preset": "paper", "seed": 3}).edit(tiny_net, request_)
    noted = edit.details["log"]["hypernetwork"]
    assert (noted["file"], noted["iterations"], noted["settings"]["seed"]) == (None, 2, 3)
    assert noted["settings"]["free_optimizer"] == "adam"
    assert noted["kl_last"] >= 0


def test_what_is_wrong_with_the_request_is_said(
    tiny_net: nn.Module, selection: Selection, request_: Request, artefact: str
) -> None:
    def refuse(editor: MaskedEditor, request: Request, message: str, chosen: Selection | None = None) -> None:
        with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
            editor.edit(tiny_net, request, chosen or selection)

    without = replace(request_, reference=None)
    refuse(
        HypernetworkMask(),
        without,
        "Hypernetwork mask needs a hypernetwork: give the file of a trained one (hypernetwork='masks.safetensors'), or "
        "ordinary images to train one on (request.reference).",
    )
    wide = replace(request_, reference=Examples(torch.zeros(4, 1, 7, 7), [0] * 4))
    refuse(
        HypernetworkMask(density=0.5),
        wide,
        "inputs have shape (1, 6, 6), the reference images (1, 7, 7): the hypernetwork sees both, so they must be "
        "alike.",
    )
    refuse(
        RandomMask(density=0.05),
        request_,
        "density 0.05 of 10 components is 0.5: none would be selected. Give at least 0.1.",
    )
    fewer = selection.index.select([0, 1, 5])
    with pytest.raises(EditMismatchError, match="selection: "):
        HypernetworkMask(hypernetwork=artefact).edit(tiny_net, request_, fewer)
    with pytest.raises(EditError, match=r"^Hypernetwork mask would train a hypernetwork for each density"):
        density_sweep(HypernetworkMask(), tiny_net, request_)
    with pytest.raises(EditError, match=r"^densities is empty"):
        density_sweep(RandomMask(), tiny_net, request_, densities=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "0.1"}, "These settings cannot work: density is '0.1', expected a number or None."),
        ({"density": True}, "These settings cannot work: density is True, expected a number or None."),
        (
            {"density": None, "threshold": "0.5", "iterations": 1.5},
            "These settings cannot work: threshold is '0.5', expected a number or None; iterations is 1.5, expected an "
            "integer or None.",
        ),
        (
            {"training": 3},
            'These settings cannot work: training is 3, expected settings of MetaSettings by name, e.g. {"width": 16}.',
        ),
        (
            {"training": {"rate": "0.1"}},
            "The settings of the hypernetwork's training: 1 problem\n  1. rate is '0.1', expected a number above 0.",
        ),
        (
            {"threshold": 0.5},
            "A mask needs a density or a threshold, not both: both are given. Leave the other one None.",
        ),
        ({"density": 2.0}, "density is 2.0, expected a share above 0 and up to 1, e.g. 0.05."),
        ({"rate": 0.0}, "These settings cannot work: rate is 0.0, expected a number above 0."),
        ({"stop_loss": -1.0}, "These settings cannot work: stop_loss is -1.0, expected a number from 0 or None."),
        ({"preset": "mine"}, "preset is 'mine', expected one of code, paper."),
        (
            {"batch": 0},
            "The settings of the hypernetwork's training: 1 problem\n  1. batch is 0, expected an integer from 1.",
        ),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        HypernetworkMask(**settings)


def test_an_edit_survives_its_file(tiny_net: nn.Module, request_: Request, artefact: str, tmp_path: Path) -> None:
    edit = HypernetworkMask(hypernetwork=artefact, density=0.5, rate=1e-3).edit(tiny_net, request_)
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert torch.equal(again.apply(tiny_net)(request_.inputs), edit.apply(tiny_net)(request_.inputs))
    assert torch.equal(edit.at(0).apply(tiny_net)(request_.inputs), tiny_net(request_.inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sides", "bits"), [("vit_tiny", 64, 6 * 768), ("resnet18", 64, 3 * 512), ("vgg11_bn", 64, 3 * 512)]
)
def test_published_models_at_a_small_resolution(name: str, sides: int, bits: int, untouched: Untouched) -> None:
    import torchvision

    torch.manual_seed(3)
    model: nn.Module
    if name == "vit_tiny":
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=sides)
    elif name == "vgg11_bn":
        model = vgg11_bn(7)
    else:
        model = torchvision.models.resnet18(num_classes=7)
    model.eval()
    inputs = torch.randn(6, 3, sides, sides)
    request = Request(inputs[:2], torch.tensor([1, 2]), reference=Examples(inputs[2:], [0] * 4))
    editor = HypernetworkMask(**{**HypernetworkMask.quick, "rate": 1e-4, "steps": 5})
    with untouched(model, inputs):
        edit = editor.edit(model, request)
    assert edit.details["log"]["mask"]["of"] == bits
    assert len(edit.selection) == bits // 4
    where, edited = covered(edit.selection, model), _weights(edit.apply(model))
    for parameter, weight in _weights(model).items():
        chosen = where.get(parameter, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(edited[parameter][~chosen], weight[~chosen])
    assert any((edited[parameter] != weight).any() for parameter, weight in _weights(model).items())
