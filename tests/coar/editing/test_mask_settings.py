"""Settings of meta-training: the two presets, and everything wrong named at once."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from coar.editing.masks.settings import PRESETS, MetaSettings
from coar.errors import EditError


def test_the_presets_hold_what_paper_and_code_say() -> None:
    code, paper = MetaSettings.preset("code"), MetaSettings.preset("paper")
    assert code == MetaSettings()
    for settings in (code, paper):
        assert (settings.inner_steps, settings.inner_rate, settings.free_steps, settings.batch) == (5, 1e-3, 10, 8)
        assert (settings.free_rate, settings.rate, settings.decoupled) == (0.1, 1e-4, True)
    differing = {
        field.name for field in fields(MetaSettings) if getattr(code, field.name) != getattr(paper, field.name)
    }
    assert differing == set(PRESETS["paper"])
    assert (code.free_optimizer, paper.free_optimizer) == ("rmsprop", "adam")
    assert (code.temperature, paper.temperature) == (5, 1)
    assert (code.label_slope, paper.label_slope) == (3, 10)
    assert (code.iterations, paper.iterations) == (10_000, 7_000)
    assert (code.reach_edge, paper.reach_edge) == (False, True)


def test_the_cosine_of_the_code_and_the_constant_of_the_paper() -> None:
    code, paper = MetaSettings.preset("code"), MetaSettings.preset("paper")
    assert code.rate_at(0) == 1e-4
    assert round(code.rate_at(7_000), 6) == 7.3e-5
    assert paper.rate_at(6_999) == 1e-4


def test_every_problem_is_named_at_once() -> None:
    message = (
        "The settings of the hypernetwork's training: 6 problems\n"
        "  1. batch is 0, expected an integer from 1.\n"
        "  2. temperature is nan, expected a number above 0.\n"
        "  3. sparsity is -1, expected a number from 0.\n"
        "  4. free_optimizer is 'sgd', expected one of rmsprop, adam.\n"
        "  5. width is 0, expected an integer from 1 or None.\n"
        "  6. patch_smallest and patch_largest are 0.5 and 0.25, expected shares of the image's side: above 0, "
        "below 1, the smallest first."
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        MetaSettings(
            batch=0,
            width=0,
            temperature=float("nan"),
            sparsity=-1,
            patch_smallest=0.5,
            patch_largest=0.25,
            free_optimizer="sgd",  # type: ignore[arg-type]
        )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(EditError, match=r"^preset is 'mine', expected one of code, paper\.$"):
        MetaSettings.preset("mine")  # type: ignore[arg-type]
    with pytest.raises(
        EditError, match=r"^The hypernetwork's training has no setting 'iteration'\. Known: alignment, "
    ):
        MetaSettings.preset("code", iteration=3)
