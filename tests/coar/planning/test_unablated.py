"""The accuracy before ablation, and what it says about labels, weights and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from coar.planning.unablated import MOST, Unablated, unablated_accuracy

CLASSES = 5


class _Says(nn.Module):
    """Predicts the class that its input is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(x[:, 0].long(), CLASSES).float()


def _judged(predicted: Sequence[int], labels: Sequence[int]) -> Unablated:
    found = unablated_accuracy(_Says().eval(), ablate.Examples(torch.tensor(predicted)[:, None].float(), labels))
    assert found is not None
    return found


def _many(seed: int = 0, classes: int = CLASSES, count: int = 200) -> list[int]:
    return [int(v) for v in np.random.default_rng(seed).integers(0, classes, count)]


def test_a_good_model_has_no_warning() -> None:
    labels = _many()
    found = _judged(labels[:180] + _many(1)[180:], labels)
    assert found.accuracy.right >= 180
    assert found.warning is None
    assert found.text() == (
        f"Unablated accuracy: {found.accuracy.right} of 200 examples are right, {found.accuracy.right / 2:.1f} %."
    )


def test_guesses_are_at_chance() -> None:
    found = _judged(_many(1), _many(2))
    assert found.warning is not None
    assert found.warning.startswith("Warning: that is at chance, ")
    most = np.bincount(_many(2)).argmax()
    assert f"(always saying the most frequent class, {most}; binomial test, p = " in found.warning


def test_the_most_frequent_class_is_no_skill() -> None:
    labels = [0] * 160 + [1, 2, 3, 4] * 10
    found = _judged([0] * 200, labels)
    assert (found.accuracy.value, found.chance) == (0.8, 0.8)
    assert found.warning is not None
    assert "80.0 % (always saying the most frequent class, 0;" in found.warning


def test_of_some_classes_chance_is_one_in_all() -> None:
    found = _judged([0] * 100, [0] * 100)
    assert found.chance_is == "one of 5 classes"
    assert found.warning is None
    wrong = _judged([3] * 100, [0] * 100)
    assert wrong.warning is not None


def test_too_few_examples_tell_nothing() -> None:
    assert _judged([1], [0]).warning is None


def test_labels_in_another_order_are_noticed() -> None:
    order = [0, 1, 4, 2, 3]  # two of five are right: far above chance
    labels = _many()
    found = _judged([order[label] for label in labels], labels)
    assert found.p < 0.001
    assert found.renamed == 1
    assert found.warning is not None
    assert "with the labels renamed 100.0 % would be right: the labels seem to be in another order" in found.warning
    assert _judged([0] * 200, labels).renamed is None, "one class for all is no order"


def test_of_many_examples_some_are_drawn() -> None:
    found = _judged(labels := _many(count=MOST + 500), labels)
    assert (found.accuracy.right, found.accuracy.examples, found.examples) == (MOST, MOST, MOST + 500)
    assert "1,024 of 1,024 examples (1,024 drawn of all)" in found.text() or "drawn of all" in found.text()


def test_time_is_bounded() -> None:
    labels = _many()
    examples = ablate.Examples(torch.tensor(labels)[:, None].float(), labels)
    found = unablated_accuracy(_Says().eval(), examples, seconds=0)
    assert found is not None
    assert found.accuracy.examples == 32


class _Other(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [lambda x: x[:, 0], lambda x: [x, x], lambda x: x.new_full((len(x), 5), float("nan")), lambda x: x[:, :2] / 0],
)
def test_where_there_are_no_predictions_there_is_no_accuracy(make: Callable[[Tensor], Any]) -> None:
    assert unablated_accuracy(_Other(make).eval(), ablate.Examples(torch.ones(4, 3), [0, 1, 0, 1])) is None


def test_the_commands_tell_it(run: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    for arguments in (("index",), ("plan", "--seconds", "0.3")):
        code, out, err = run(arguments[0], folder / "spec.toml", *arguments[1:])
        assert code == 0, err
        assert "Unablated accuracy: " in out
        assert "of 16 examples are right, " in out
        code, out, err = run(arguments[0], folder / "spec.toml", *arguments[1:], "--json")
        found = json.loads(out)["unablated"]
        assert found["of"] == 16
        assert found["accuracy"] == found["right"] / found["examples"]
