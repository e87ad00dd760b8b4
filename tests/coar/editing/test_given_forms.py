"""What users have is taken as they have it: pairs, data sets, arrays, lists, positions; anything else is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import coar
from ablate import ComponentIndex, Engine, Examples
from coar.editing.coar_edit.ranking import rank_components, sweep_edit_size
from coar.editing.edits.edit import Edit
from coar.editing.given import as_examples, as_positions
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.judging.single_edits import evaluate_single_edits
from coar.editing.methods.interpolation import interpolation_curve
from coar.editing.predicting import predictions
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.errors import EditError

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
FORMS: dict[str, Callable[[slice], Any]] = {
    "a pair": lambda part: (X[part], Y[part]),
    "arrays": lambda part: (X[part].numpy(), Y[part].numpy()),
    "lists": lambda part: (X[part].tolist(), Y[part].tolist()),
    "a data set": lambda part: TensorDataset(X[part], Y[part]),
    "a list of items": lambda part: list(zip(X[part], Y[part].tolist(), strict=True)),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.fixture
def edit(model: nn.Module) -> Edit:
    return Edit(ComponentIndex.from_model(model).select([0, 2]))


@pytest.mark.parametrize("form", FORMS)
def test_examples_in_every_form(form: str, model: nn.Module, edit: Edit) -> None:
    given, plain = FORMS[form], lambda part: Examples(X[part], Y[part])
    one, two = slice(0, 6), slice(6, 12)
    results = []
    for make in (given, plain):
        kept = evaluate_single_edits(model, lambda m, x, y: edit, {"a": make(one)}, make(two), more={"b": make(two)})
        curve = interpolation_curve(model, edit, {"original": make(one), "edited": make(two)})
        request = Request(X[one], Y[one], 0.9 * X[one], reference=make(two), validation=(make(one), make(two)))
        made = [
            get_editor(name, **settings).edit(model, request).operation
            for name, settings in (("coar", {"passes": 2}), ("rewriting", {"steps": 2}), ("paint", {"warm_up": 1}))
        ]
        ranking = rank_components(coar.estimate(model, (X, Y), passes=4), [0, 1], [5, 6, 7])
        sweep = sweep_edit_size(ranking, Engine(model, ranking.index), make(one), [0, 2])
        results.append(
            (
                predictions(model, make(one)).tolist(),
                evaluate_edit(model, edit, {"a": make(one)}).table().to_dict(),
                [part.edited.tolist() for part in (*kept.groups.values(), *kept.sets.values())],
                curve.table().to_dict(),
                made,
                sweep.to_dict(),
            )
        )
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X, r"^reference is a Tensor, expected ablate\.Examples, .* Labels are missing"),
        (5, r"^reference is a int, expected ablate\.Examples, a pair \(inputs, targets\), or a data set"),
        ({"x": X}, r"^reference is a dict, expected"),
        ("folder", r"^reference is a str, expected"),
        ((X, Y[:3]), r"^reference is a tuple, .* Examples do not line up"),
        ((X,), r"^reference is a tuple, .* Labels are missing"),
    ],
)
def test_what_is_no_examples_is_named(value: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        as_examples(value, "reference")


def test_requests_name_what_they_cannot_read(model: nn.Module) -> None:
    wrong: Any = {"labels": "abc", "reference": X, "validation": (X, Y), "originals": [1, 2]}
    with pytest.raises(EditError) as refused:
        get_editor("finetune").edit(model, Request(X[:2], **wrong))
    lines = str(refused.value).splitlines()
    assert lines[0] == "Fine-tuning on labels cannot edit with this request:"
    assert lines[1] == "  labels is a str, expected a tensor, an array or a list of integers."
    assert lines[2] == "  originals is a list, expected a tensor or an array."
    assert lines[3].startswith("  reference is a Tensor, expected ablate.Examples, ")
    assert lines[4].startswith("  validation is a tuple, expected a pair of ablate.Examples")


def test_sets_without_names_are_refused(model: nn.Module, edit: Edit) -> None:
    unnamed: Any = Examples(X, Y)
    for call in (
        lambda: evaluate_edit(model, edit, unnamed),
        lambda: interpolation_curve(model, edit, unnamed),
        lambda: evaluate_single_edits(model, lambda m, x, y: edit, unnamed),
    ):
        with pytest.raises(EditError, match=r"^(sets|groups) is a Examples, expected examples by name: \{'name': "):
            call()


@pytest.mark.parametrize(
    "positions",
    [[0, 1], (0, 1), range(2), np.array([0, 1]), np.array([0, 1], dtype=np.uint8), torch.tensor([0, 1]),
     [torch.tensor(0), torch.tensor(1)], [np.int64(0), 1]],
)  # fmt: skip
def test_positions_in_every_form(model: nn.Module, positions: Any) -> None:
    attributions = coar.estimate(model, (X, Y), passes=4)
    expected = coar.coar_edit(attributions, [0, 1], [5, 6, 7], k=2)
    assert coar.coar_edit(attributions, positions, torch.tensor([5, 6, 7]), k=2) == expected
    editor = get_editor("coar", k=2, attributions=attributions, target=positions, reference=np.array([5, 6, 7]))
    ordinary: Any = (X[5:8], Y[5:8])
    made = editor.edit(model, Request(X[:2], Y[:2], reference=ordinary))
    assert made.selection == expected.selection


@pytest.mark.parametrize(
    "positions", [5, "01", None, torch.tensor([True, False]), np.array([0.0, 1.0]), [0.5], [None], torch.tensor(1)]
)
def test_what_is_no_positions_is_named(positions: Any) -> None:
    with pytest.raises(EditError, match=r"^The target set (holds|has shape) .*, expected positions: "):
        as_positions(positions, "target", 12)
