"""Settings of the wrong type are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest

import coar
from coar.editing.methods.finetune import FineTuning
from coar.editing.methods.interpolation import Paint
from coar.editing.methods.output_collision import OutputCollision
from coar.editing.settings import Count, Positive, problems_of
from coar.editing.training.descent import Descent


@dataclass(frozen=True)
class Some:
    steps: int = 1
    rate: float = 1.0
    fast: bool = False
    name: str = ""
    clip: float | None = None
    shape: tuple[int, ...] = ()
    several: Count = 1
    size: Positive | None = None
    how: Literal["fast", "well"] = "fast"
    table: Mapping[str, Any] = field(default_factory=dict)
    once: Callable[[], None] | None = None


def _rules() -> list[str]:
    return ["these two"]


@pytest.mark.parametrize(
    "fine",
    [
        *({}, {"rate": 1}, {"clip": None}, {"clip": np.float32(1)}, {"steps": np.int64(3)}, {"shape": (1, 2)}),
        *({"several": 7, "size": 1e-9, "how": "well"}, {"table": MappingProxyType({"a": 1})}, {"once": print}),
    ],
)
def test_what_fits(fine: dict[str, Any]) -> None:
    assert problems_of(Some(**fine), list) == []
    assert problems_of(Some(**fine), _rules) == ["these two"]


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
        ({"shape": [1, 2]}, "shape is [1, 2], expected a tuple of integers"),
        ({"shape": ("a",)}, "shape is ('a',), expected a tuple of integers"),
        ({"several": True}, "several is True, expected an integer from 1"),
        ({"table": 3}, "table is 3, expected a table"),
        ({"once": 3}, "once is 3, expected a function or None"),
    ],
)
def test_what_does_not_fit(wrong: dict[str, Any], text: str) -> None:
    assert problems_of(Some(**wrong), _rules) == [text], "rules compare values of the right types only"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"several": 0}, "several is 0, expected an integer from 1"),
        ({"size": 0.0}, "size is 0.0, expected a number above 0 or None"),
        ({"size": math.nan}, "size is nan, expected a number above 0 or None"),
        ({"size": math.inf}, "size is inf, expected a number above 0 or None"),
        ({"how": "best"}, "how is 'best', expected one of fast, well"),
    ],
)
def test_what_is_out_of_range(wrong: dict[str, Any], text: str) -> None:
    assert problems_of(Some(**wrong), _rules) == [text, "these two"]


@pytest.mark.parametrize("kind", [Descent, FineTuning, OutputCollision, Paint])
def test_methods_look_before_they_compare(kind: Any) -> None:
    with pytest.raises(coar.EditError) as refused:
        kind(rate="fast", steps=1.5)
    assert str(refused.value) == (
        "These settings cannot work: rate is 'fast', expected a number above 0; steps is 1.5, expected an integer from "
        "1."
    )
