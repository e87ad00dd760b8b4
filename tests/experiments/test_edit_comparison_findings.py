"""The findings of the comparison of editing methods: what the numbers must be like for a finding to reappear."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.edit_comparison import concept
from experiments.edit_comparison.findings import ablation, concave, over_the_chord, rewriting, sparse_masks
from experiments.edit_comparison.summary import interval


def _row(name: str, before: int, after: int, examples: int = 10, **more: Any) -> dict[str, Any]:
    row = {"case": "c", "set": name, "examples": examples, "right_before": before, "right_after": after}
    return {**row, "fixed": 0, "broken": 0, "agreeing": examples, **more}


def test_an_interval_is_students() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert interval([5.0])[0] == 5.0
    assert np.isnan(interval([5.0])[1])
    assert np.isnan(interval([])[0])


def _values(rewriting_other: float, tuning_other: float) -> pd.DataFrame:
    rows = []
    for seed in (0, 1, 2):
        for arm, other in (("rewriting", rewriting_other), ("fine-tuning, local", tuning_other)):
            for name, gain in ((concept.TARGET, 0.3), (concept.OTHER, other), (concept.OTHER_HELD_OUT, other)):
                about = {"task": "concept", "network": "cnn", "seed": seed, "arm": arm, "examples": 10, "protocol": ""}
                rows.append({**about, "metric": f"{name}: before", "value": 0.4})
                rows.append({**about, "metric": f"{name}: accuracy", "value": 0.4 + gain + 0.001 * seed})
    return pd.DataFrame(rows)


def test_a_finding_reappears_only_where_the_numbers_say_so() -> None:
    assert rewriting(_values(0.2, -0.1)).verdict == "Reappears"
    assert "fine-tuning does not hurt them" in rewriting(_values(0.2, 0.1)).verdict
    assert "rewriting does not always help them" in rewriting(_values(-0.2, -0.1)).verdict
    only_tuning = _values(0.2, 0.1)
    only_tuning = only_tuning[only_tuning["arm"] != "rewriting"]
    assert rewriting(only_tuning).verdict == "Not tested"


def test_the_way_is_compared_with_the_straight_line() -> None:
    assert over_the_chord([1.0, 1.0, 0.0], [0.0, 1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert over_the_chord([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]) == pytest.approx(-math.sqrt(0.5))
    assert over_the_chord([1.0, 0.9, 0.5, 0.0], [0.0, 0.1, 0.5, 1.0]) == pytest.approx(0.0)
    assert over_the_chord([1.0, 0.5, 1.0], [0.0, 0.5, 0.0]) == 0.0, "nothing lies between equal ends"


def test_concavity_is_read_off_the_curves_of_interpolation() -> None:
    def curves(middle: float, arm: str = "PAINT") -> pd.DataFrame:
        rows = [
            {"arm": arm, "moves": True, "original": [1.0, middle, 0.0], "edited": [0.0, middle + i / 100, 1.0]}
            for i in range(5)
        ]
        return pd.DataFrame(rows).assign(gain_at_best=0.1)

    assert concave(curves(0.8)).verdict == "Reappears"
    assert concave(curves(0.2)).verdict == "Does not reappear"
    both = concave(pd.concat([curves(0.2), curves(0.8, "rewriting")]))
    assert both.verdict == "Does not reappear"
    assert "the other methods: +" in both.numbers
    assert concave(pd.DataFrame()).verdict == "Not tested"


def _masks(learned: int, kept: int) -> pd.DataFrame:
    rows = []
    for seed in (0, 1, 2):
        for kind, right, stayed in (("learned", learned, kept), ("random", 4, 16)):
            about = {"task": "cue", "network": "cnn", "seed": seed, "mask": kind, "density": 0.05}
            rows.append({**about, **_row("x", 1, right + seed, 20)})
            rows.append({**about, **_row("ordinary", 20, stayed, 20)})
    return pd.DataFrame(rows)


def test_learned_masks_are_compared_with_random_ones_in_what_they_gain_and_keep() -> None:
    names = {"cue": "x"}, {"cue": "ordinary"}
    better = sparse_masks(_masks(9, 16), *names)
    assert better.verdict == "Reappears"
    assert "density 0.05: gained +25.0 points [+25.0, +25.0], kept +0.0 points" in better.numbers
    assert sparse_masks(_masks(2, 16), *names).verdict == "Does not reappear"
    assert sparse_masks(_masks(9, 8), *names).verdict == "Does not reappear", "it gains 25 points and loses 40"
    assert sparse_masks(pd.DataFrame(), *names).verdict == "Not tested"


def test_ablation_that_did_not_run_is_not_tested() -> None:
    edits = pd.DataFrame({"method": ["finetune"], "arm": ["x"], "mean_steps": [3.0]})
    assert ablation(_values(0.1, 0.1), edits).verdict == "Not tested"
