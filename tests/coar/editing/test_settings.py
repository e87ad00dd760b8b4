"""Settings of the wrong type are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import coar
from coar.editing.methods.finetune import FineTuning
from coar.editing.methods.interpolation import Paint
from coar.editing.methods.output_collision import OutputCollision
from coar.editing.settings import wrong_types
from coar.editing.training.descent import Descent


@dataclass(frozen=True)
class Some:
    steps: int = 1
    rate: float = 1.0
    fast: bool = False
    name: str = ""
    clip: float | None = None
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "fine", [{}, {"rate": 1}, {"clip": None}, {"clip": np.float32(1)}, {"steps": np.int64(3)}, {"shape": "any"}]
)
def test_what_fits(fine: dict[str, Any]) -> None:
    assert wrong_types(Some(**fine)) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"steps": 1.5}, "steps is 1.5, expected an integer"),
        ({"steps": True}, "steps is True, expected an integer"),
        ({"steps": None}, "steps is None, expected an integer"),
        ({"rate": "0.1"}, "rate is '0.1', expected a number"),
        ({"fast": 1}, "fast is 1, expected True or False"),
        ({"name": None}, "name is None, expected text"),
        ({"clip": "none"}, "clip is 'none', expected a number or None"),
    ],
)
def test_what_does_not_fit(wrong: dict[str, Any], text: str) -> None:
    assert wrong_types(Some(**wrong)) == [text]


@pytest.mark.parametrize("kind", [Descent, FineTuning, OutputCollision, Paint])
def test_methods_look_before_they_compare(kind: Any) -> None:
    with pytest.raises(coar.EditError) as refused:
        kind(rate="fast", steps=1.5)
    assert str(refused.value) == (
        "These settings cannot work: rate is 'fast', expected a number; steps is 1.5, expected an integer."
    )
