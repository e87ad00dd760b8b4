"""The cap on accuracy, and accuracy itself: exact at the border, and no edit where nothing is admissible."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import (
    Accuracy,
    MetricError,
    Setting,
    accuracy,
    accuracy_drop,
    choose_setting,
    is_admissible,
    sweep_caps,
)

BASE = Accuracy(36_850, 50_000)


def test_accuracy_counts() -> None:
    found = accuracy([1, 2, 0, 0], [1, 1, 0, 1])
    assert found == Accuracy(2, 4)
    assert found.value == 0.5
    assert repr(found) == "<Accuracy: 2 of 4 right, 50.00 %>"
    assert math.isnan(Accuracy(0, 0).value)


def test_125_of_50000_are_the_cap() -> None:
    assert is_admissible(BASE, Accuracy(36_850 - 125, 50_000))
    assert not is_admissible(BASE, Accuracy(36_850 - 126, 50_000))
    assert accuracy_drop(BASE, Accuracy(36_850 - 125, 50_000)) == 0.25
    assert accuracy_drop(BASE, Accuracy(36_950, 50_000)) == -0.2


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_border_does_not_round(base: int, cap: int) -> None:
    """A drop of `cap` examples in 1,000 is cap / 10 percentage points, whatever floating point makes of it."""
    lost = min(base, cap)
    assert is_admissible(Accuracy(base, 1000), Accuracy(base - lost, 1000), cap / 10)
    if base > cap:
        assert not is_admissible(Accuracy(base, 1000), Accuracy(base - cap - 1, 1000), cap / 10)


def _setting(name: str, score: float, lost: int) -> Setting:
    return Setting(name, score, Accuracy(BASE.right - lost, BASE.examples))


def test_the_best_admissible_setting_is_chosen() -> None:
    settings = [_setting("strong", 90, 126), _setting("mild", 20, 0), _setting("middle", 60, 125)]
    found = choose_setting(settings, BASE)
    assert (found.chosen, found.score, found.no_edit) == ("middle", 60, False)
    assert found.table["admissible"].tolist() == [False, True, True]
    assert found.table["drop"].tolist() == [0.252, 0.0, 0.25]
    assert found.protocol == (
        "Of 3 settings 2 are admissible (accuracy on 50,000 ordinary examples drops by at most 0.25 percentage points "
        "from 73.70 %); of these best is 'middle'; chosen by the score on validation examples."
    )


def test_the_first_of_equal_scores_is_chosen_and_harmful_ones_too() -> None:
    assert choose_setting([_setting("a", 5, 1), _setting("b", 5, 0)], BASE).chosen == "a"
    assert choose_setting([_setting("worse", -40, 0), _setting("bad", -30, 0)], BASE).score == -30


@pytest.mark.parametrize("settings", [[_setting("strong", 90, 126)], [_setting("unknown", math.nan, 0)]])
def test_where_nothing_can_be_chosen_there_is_no_edit(settings: list[Setting]) -> None:
    found = choose_setting(settings, BASE)
    assert (found.chosen, found.score, found.no_edit) == (None, 0.0, True)
    assert "there is no edit and the score is 0" in found.protocol


def test_a_sweep_over_caps() -> None:
    settings = [_setting("strong", 90, 500), _setting("mild", 20, 25)]
    table = sweep_caps(settings, BASE, [0.0, 0.05, 1.0])
    assert table["chosen"].isna().tolist() == [True, False, False]
    assert table["chosen"].tolist()[1:] == ["mild", "strong"]
    assert table["no_edit"].tolist() == [True, False, False]
    assert table["score"].tolist() == [0.0, 20.0, 90.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Accuracy(3, 2), "3 of 2 examples are right, expected 0 to 2."),
        (lambda: Accuracy(0, 0).exact, "There is no accuracy on 0 examples. Give at least one example."),
        (lambda: choose_setting([], BASE), "There are no settings to choose from. Give at least one."),
        (
            lambda: choose_setting([_setting("a", 1, 0), _setting("a", 2, 0)], BASE),
            "Two settings are called 'a'. Give each its own name.",
        ),
        (
            lambda: choose_setting([Setting("a", 1, Accuracy(1, 2))], BASE),
            "Setting 'a' was judged on 2 ordinary examples, the unedited model on 50000. Use the same ones.",
        ),
        (
            lambda: is_admissible(BASE, BASE, math.nan),
            "cap is nan, expected a number from 0 up, in percentage points.",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
