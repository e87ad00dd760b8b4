"""What every editing method promises, asked of every registered one on a CNN and a ViT.

A new method needs nothing here but its line in the registry; its `quick` settings keep it short.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex, Examples
from coar.editing.abstract import Editor
from coar.editing.edits.covered import covered
from coar.editing.registry import editor_class, editor_names, get_editor
from coar.editing.request import Request

Untouched = Callable[..., AbstractContextManager[None]]
Randomise = Callable[[nn.Module, int], nn.Module]
CLASSES, SIZE = 3, 32


class Residual(nn.Module):
    """A residual block, with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out: Tensor = (x + y).relu()
        return out


class ResidualNet(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


@pytest.fixture(params=["cnn", "vit"])
def model(request: pytest.FixtureRequest, randomise: Randomise) -> nn.Module:
    if request.param == "cnn":
        return randomise(ResidualNet(), 3).eval()
    net = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE)
    return randomise(net, 4).eval()


@pytest.fixture
def wish(model: nn.Module) -> Request:
    """Two images with a patch, to be called what they are not; everything that any method may ask for."""
    generator = torch.Generator().manual_seed(1)
    originals = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(2, SIZE, SIZE)
    masks[:, 8:24, 8:24] = 1
    inputs = originals + masks[:, None] * torch.randn(2, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        second = model(inputs).topk(2).indices[:, 1]
        labels = second[:1].expand(2).clone()  # some methods want one class for all

    def some(count: int) -> Examples:
        images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
        with torch.no_grad():
            return Examples(images, model(images).argmax(dim=1))

    changed = Examples(torch.randn(4, 3, SIZE, SIZE, generator=generator), labels[:1].expand(4).clone())
    return Request(inputs, labels, originals, masks, some(8), (changed, some(6)))


def _quick(name: str) -> Editor:
    return get_editor(name, **editor_class(name).quick)


@pytest.fixture(params=editor_names())
def editor(request: pytest.FixtureRequest) -> Editor:
    return _quick(request.param)


_MADE: dict[tuple[str, str], coar.Edit] = {}


@pytest.fixture
def made(model: nn.Module, wish: Request, editor: Editor, untouched: Untouched) -> coar.Edit:
    """The edit, found once for all tests; finding it left no trace."""
    key = (type(model).__name__, editor.name)
    if key not in _MADE:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        with untouched(model, wish.inputs):
            _MADE[key] = editor.edit(model, wish)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    return _MADE[key]


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().cpu().contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_it_is_described() -> None:
    for name in editor_names():
        kind = editor_class(name)
        assert kind.name == name
        assert kind.title
        assert kind.source
        assert kind.__doc__
        assert set(kind.needs) <= {"labels", "originals", "masks", "reference", "validation"}
        json.dumps(_quick(name).describe())


def test_an_edit_is_a_value(
    model: nn.Module, editor: Editor, made: coar.Edit, untouched: Untouched, tmp_path: Path
) -> None:
    edit, before = made, _bits(model)
    with untouched(model):
        assert edit.base == ablate.model_hash(model)
        assert edit.method == editor.title
        assert _bits(edit.at(0).apply(model)) == before
        full = edit.at(1)
        after = _bits(full.apply(model))
        with full.applied(model):
            assert _bits(model) == after
        with pytest.raises(KeyError, match="user"), full.applied(model):
            raise KeyError("user")
        edit.save(tmp_path / "fix.safetensors")
        loaded = coar.load_edit(tmp_path / "fix.safetensors")
        assert loaded == edit
        assert _bits(loaded.at(1).apply(model)) == after
    assert after != before, "it must change something, or this tests nothing"
    json.dumps(dict(edit.details))
    assert edit.details["method"] == editor.name
    assert edit.details["log"]["stop"] in ("converged", "max_steps", "noop", "failed")
    table = full.describe()
    assert (table["relative_change"] >= 0).all()
    assert table["relative_change"].max() > 0


def test_what_is_not_selected_keeps_its_bits(model: nn.Module, made: coar.Edit) -> None:
    edit = made.at(1)
    after = edit.apply(model).state_dict()
    where = covered(edit.selection, model)
    for name, value in model.state_dict().items():
        if name in edit.operation.whole:
            continue
        mask = where.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(after[name][~mask], value[~mask]), name


def test_the_same_seed_gives_the_same_edit(model: nn.Module, wish: Request, editor: Editor, made: coar.Edit) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    second = editor.edit(model, wish)
    assert (made.selection, made.operation, made.alpha) == (second.selection, second.operation, second.alpha)


def test_half_of_a_layer(model: nn.Module, wish: Request, editor: Editor) -> None:
    """A selection smaller than a layer is kept to."""
    everything = editor.default_selection(model)
    half = everything.index.select(everything.ids[::2])
    edit = editor.edit(model, wish, half)
    assert set(edit.selection.ids) <= set(half.ids) or edit.operation.whole


REFUSED: dict[str, tuple[Callable[[Request], Request], str]] = {
    "no examples": (
        lambda wish: replace(wish, inputs=wish.inputs[:0]),
        "inputs have shape (0, 3, 32, 32), expected (n, ...) with at least one example.",
    ),
    "NaN": (
        lambda wish: replace(wish, inputs=torch.where(wish.inputs < 0.5, wish.inputs, float("nan"))),
        "inputs[0] holds NaN or infinite values.",
    ),
    "no tensor": (
        lambda wish: replace(wish, inputs=wish.inputs.tolist()),  # type: ignore[arg-type]
        "inputs is a list, expected a tensor or an array.",
    ),
    "labels of another length": (
        lambda wish: replace(wish, labels=torch.tensor([0])),
        "labels are (1,) int64, expected (2,) integers: one class per input.",
    ),
    "labels below zero": (
        lambda wish: replace(wish, labels=torch.tensor([0, -1])),
        "labels hold -1; classes count from 0.",
    ),
    "labels that are no integers": (
        lambda wish: replace(wish, labels=torch.tensor([0.0, 1.0])),
        "labels are (2,) float32, expected (2,) integers: one class per input.",
    ),
    "originals of another shape": (
        lambda wish: replace(wish, originals=wish.inputs[:1]),
        "originals have shape (1, 3, 32, 32), inputs (2, 3, 32, 32): pairs are aligned.",
    ),
    "masks of another size": (
        lambda wish: replace(wish, masks=torch.ones(2, 16, 16)),
        "masks have shape (2, 16, 16), expected (2, 32, 32): one per input, of its size.",
    ),
    "masks outside of 0 to 1": (
        lambda wish: replace(wish, masks=torch.full((2, 32, 32), 255.0)),
        "masks must be floating point from 0 (elsewhere) to 1 (the concept).",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(
    case: str, model: nn.Module, wish: Request, editor: Editor, untouched: Untouched
) -> None:
    spoil, text = REFUSED[case]
    with untouched(model), pytest.raises(coar.EditError) as refused:
        editor.edit(model, spoil(wish))
    assert str(refused.value) == f"{editor.title} cannot edit with this request:\n  {text}"


def test_what_is_missing_is_named(model: nn.Module, wish: Request, editor: Editor) -> None:
    for name in editor.needs:
        lacking: Any = {name: None}
        with pytest.raises(coar.EditError, match=f"cannot edit with this request:\n  {name} is missing: "):
            editor.edit(model, replace(wish, **lacking))


def test_a_class_that_the_model_lacks(model: nn.Module, wish: Request, editor: Editor) -> None:
    with pytest.raises(coar.EditError) as refused:
        editor.edit(model, replace(wish, labels=torch.tensor([3, 3])))
    assert str(refused.value) == "labels hold 3, the model has classes 0 to 2."


def test_training_mode_is_refused(model: nn.Module, wish: Request, editor: Editor, untouched: Untouched) -> None:
    model.train()
    with untouched(model), pytest.raises(coar.EditError) as refused:
        editor.edit(model, wish)
    assert str(refused.value) == (
        f"This {type(model).__name__} is in training mode: dropout and batch norm would make the edit depend on "
        "chance. Call model.eval() first."
    )


def test_an_empty_selection_is_refused(model: nn.Module, wish: Request, editor: Editor) -> None:
    nothing = ComponentIndex.from_model(model).select([])
    with pytest.raises(coar.EditError) as refused:
        editor.edit(model, wish, nothing)
    assert str(refused.value) == "The selection is empty: there is nothing to edit. Select at least one component."


def test_another_models_selection_is_refused(model: nn.Module, wish: Request, editor: Editor) -> None:
    other = ComponentIndex.from_model(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), ["linear_neuron"])
    with pytest.raises(coar.EditMismatchError, match=r"^The selection belongs to another model"):
        editor.edit(model, wish, other.select([0]))


def test_half_precision_is_edited_in_float32(model: nn.Module, wish: Request, editor: Editor) -> None:
    """And rounded, once, which is said; what only switches weights off has nothing to round."""
    model.bfloat16()
    edit = editor.edit(model, wish).at(1)
    edited = edit.apply(model)
    assert {value.dtype for value in edited.parameters()} == {torch.bfloat16}
    assert edit.base == ablate.model_hash(model)
    if editor.exact_in_half:
        assert "rounding" not in edit.details
    else:
        assert 0 < edit.details["rounding"]["relative_error"] < 1.1


def test_arrays_lists_and_pairs_are_the_same_request(
    model: nn.Module, wish: Request, editor: Editor, made: coar.Edit
) -> None:
    def pair(examples: Examples) -> Any:
        return examples.inputs().numpy(), examples.targets.tolist()

    same: Any = {"inputs": wish.inputs.numpy(), "labels": wish.labels.tolist(), "originals": wish.originals.numpy()}  # type: ignore[union-attr]
    same |= {"reference": pair(wish.reference), "validation": [pair(part) for part in wish.validation]}  # type: ignore[arg-type,union-attr]
    edit = editor.edit(model, replace(wish, **same))
    assert (edit.operation, edit.selection, edit.alpha) == (made.operation, made.selection, made.alpha)


def test_a_model_whose_examples_influence_each_other_is_refused(
    model: nn.Module, wish: Request, editor: Editor, untouched: Untouched
) -> None:
    class OfTheBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits - logits.mean(dim=0, keepdim=True)

    mixing = OfTheBatch().eval()
    with untouched(mixing), pytest.raises(ablate.GatingError, match=r"^The examples of a batch influence each other"):
        editor.edit(mixing, wish)


def test_weights_that_are_no_numbers_are_refused(model: nn.Module, wish: Request, editor: Editor) -> None:
    name = str(editor.default_selection(model).table()["parameter"][0])
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    with pytest.raises(coar.EditError) as refused:
        editor.edit(model, wish)
    assert str(refused.value) == f"{name!r} holds NaN or infinite weights where the selection covers it."


def test_inputs_that_the_model_does_not_take(model: nn.Module, wish: Request, editor: Editor) -> None:
    blank = Request(torch.zeros(2, 5, SIZE, SIZE), wish.labels, torch.zeros(2, 5, SIZE, SIZE), wish.masks)
    spoilt = replace(wish, inputs=blank.inputs, originals=blank.originals)
    with pytest.raises(coar.EditError, match=r"^The model fails on inputs of shape \(2, 5, 32, 32\) and type float32"):
        editor.edit(model, spoilt)


def test_another_model_is_refused(
    model: nn.Module, made: coar.Edit, randomise: Randomise, untouched: Untouched
) -> None:
    randomise(model, 77)
    with untouched(model), pytest.raises(coar.EditMismatchError, match=r"^This edit was made for a model with weights"):
        made.apply(model)


@pytest.mark.gpu
def test_on_cuda(model: nn.Module, wish: Request, editor: Editor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, there is none")
    on_cuda = model.cuda()
    edit = editor.edit(on_cuda, wish)
    edited = edit.apply(on_cuda)
    assert {p.device.type for p in edited.parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.isfinite(edited(wish.inputs.cuda())).all()


@pytest.mark.parametrize("name", editor_names())
def test_unknown_settings_are_named(name: str) -> None:
    with pytest.raises(coar.EditError, match=f"Method '{name}' has no setting 'colour'; it takes "):
        get_editor(name, colour="red")


def test_an_instance_has_its_own_settings() -> None:
    name: Any = editor_names()[0]
    with pytest.raises(coar.EditError, match=r"Settings \(seed\) were given beside an instance of"):
        get_editor(_quick(name), seed=1)
    with pytest.raises(ablate.UnknownNameError, match="editing method"):
        get_editor("nothing-like-it")
