"""Labels in other forms: columns, floats, one-hot rows, items of data sets; none of them is read as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import ablate
from ablate.loading import ArraysData

LABELS = torch.tensor([0, 2, 1, 2])
GREY, COLOUR, FLAT = torch.randn(4, 1, 5, 5), torch.randn(4, 3, 5, 5), torch.randn(4, 3)
TOKENS = torch.randint(0, 9, (4, 3))


@pytest.mark.parametrize("inputs", [GREY, COLOUR, FLAT, TOKENS, torch.randn(4, 1), (GREY * 9).to(torch.uint8)])
@pytest.mark.parametrize(
    "labels",
    [LABELS[:, None], LABELS.float(), LABELS.double()[:, None], LABELS.to(torch.uint8), LABELS[:, None].numpy()],
)
def test_a_column_or_whole_floats_are_labels(inputs: Tensor, labels: Any) -> None:
    examples = ablate.Examples(inputs, labels)
    assert not examples.per_token
    assert examples.targets.dtype == torch.int64
    assert examples.targets.tolist() == LABELS.tolist()
    assert examples.hash == ablate.Examples(inputs, LABELS).hash


def test_a_target_for_the_only_token_stays_one_per_token() -> None:
    assert ablate.Examples(TOKENS[:, :1], LABELS[:, None]).per_token


def test_embedded_tokens_may_have_targets() -> None:
    assert ablate.Examples(torch.randn(4, 3, 8), torch.tensor([[1, 0, 2]] * 4)).per_token


ONE_HOT = torch.nn.functional.one_hot(LABELS)
ADVICE = (
    r"a single 1 in each row, expected whole numbers of shape \(examples,\)\. Give the classes, targets\.argmax\(1\)"
)


@pytest.mark.parametrize("inputs", [GREY, COLOUR, FLAT, torch.randn(4, 3, 8)])
@pytest.mark.parametrize("rows", [ONE_HOT, ONE_HOT.float()])
def test_one_hot_rows_are_named(inputs: Tensor, rows: Tensor) -> None:
    with pytest.raises(ablate.DataError, match=ADVICE):
        ablate.Examples(inputs, rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((4, 3), 1 / 3), r"with fractions, .* If they are probabilities .* targets\.argmax\(1\)\.$"),
        (torch.tensor([0.0, 1.0, float("nan"), 0.0]), r"with fractions, .* take output='value'"),
        (LABELS[:, None, None], r"shape \(4, 1, 1\), expected .* Give targets\.flatten\(\)\.$"),
        (
            torch.tensor([[0, 1, 2]] * 4),
            r"these are float32 of shape \(examples, 3, 5, 5\)\. Give one class per example",
        ),
    ],
)
def test_other_forms_are_refused_with_what_to_do(labels: Tensor, message: str) -> None:
    with pytest.raises(ablate.DataError, match=message) as caught:
        ablate.Examples(COLOUR, labels)
    assert "token_margin" not in str(caught.value)


class Items(Dataset[Any]):
    def __init__(self, labels: list[Any], inputs: Tensor = GREY) -> None:
        self.labels, self.inputs = labels, inputs

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.inputs[i], self.labels[i]


@pytest.mark.parametrize(
    "make", [int, np.int64, float, torch.tensor, lambda v: np.array([v]), lambda v: torch.tensor([[v]])]
)
def test_one_label_in_any_form_in_the_items_of_a_data_set(make: Any) -> None:
    labels = LABELS.tolist()
    assert ablate.Examples(Items([make(label) for label in labels])).targets.tolist() == labels
    assert ablate.Examples(Items(labels), LABELS[:, None]).targets.tolist() == labels


@pytest.mark.parametrize("label", ["cat", 0.5, None, float("nan"), [[0, 1], [1, 0]]])
def test_an_item_without_a_class_is_named(label: Any) -> None:
    with pytest.raises(ablate.DataError, match=r"^The label of item 1 is .*, expected an integer: the class\.$"):
        ablate.Examples(Items([0, label]))


def test_one_hot_items_are_named() -> None:
    with pytest.raises(ablate.DataError, match=ADVICE):
        ablate.Examples(Items(list(ONE_HOT), COLOUR))


def test_a_column_in_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=GREY.numpy(), targets=LABELS[:, None].numpy())
    examples = ablate.load_data(ArraysData(source="arrays", path=str(tmp_path / "a.npz")))
    assert not examples.per_token
    assert examples.targets.tolist() == LABELS.tolist()
