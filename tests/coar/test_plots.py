"""Figures draw what they are given, whatever is in the ids, and leave global plotting state alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import coar
from coar import plots

NASTY = "cost $x^{ <b>&\\frac$"


def _draw(figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")


def _bars(figure: Figure, panel: int) -> list[float]:
    return [patch.get_width() for patch in figure.axes[panel].patches if isinstance(patch, Rectangle)]


@pytest.fixture
def attributions(write_attributions: Callable[..., coar.Attributions]) -> coar.Attributions:
    """Two examples of 6 components, with ids and groups that are no nice text."""
    return write_attributions(
        [[1, -2, 3, 0, 0.5, 0], [1, 1, 1, 1, 1, 1]], ids=[NASTY, "second"], groups=["low", "high"], stderr=0.25
    )


@pytest.fixture
def curve() -> pd.DataFrame:
    """What `ablation_curve` returns."""
    return pd.DataFrame({"ablated": [0, 1, 2], "predicted": [3.0, 1.0, 0.5], "actual": [3.0, 1.5, -1.0]})


@pytest.mark.parametrize("image", [None, np.zeros((6, 6)), np.zeros((6, 6, 3))], ids=["none", "grey", "colour"])
def test_top_components(attributions: coar.Attributions, curve: pd.DataFrame, image: Any) -> None:
    before = dict(mpl.rcParams)
    figure = plots.top_components(attributions, 0, image, curve, k=3)
    _draw(figure)
    assert dict(mpl.rcParams) == before
    assert _bars(figure, 1) == [1, -2, 3]  # strongest on top: drawn last
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["front[0]", "front[1]", "front[2]"]
    assert figure.axes[0].get_title() == f"{NASTY}\nlow"
    actual, predicted, _ = figure.axes[2].get_lines()
    np.testing.assert_array_equal(actual.get_ydata(), [3.0, 1.5, -1.0])
    np.testing.assert_array_equal(predicted.get_ydata(), [3.0, 1.0, 0.5])
    assert len(figure.axes[0].get_images()) == (image is not None)


def test_prediction_quality() -> None:
    figure = plots.prediction_quality(np.array([0.5, np.nan, 1.0, 0.6]), "Title")
    _draw(figure)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["mean 0.700"]


def test_prediction_quality_where_no_correlation_is_defined() -> None:
    _draw(plots.prediction_quality(np.array([np.nan, np.nan]), "Title"))
    _draw(plots.prediction_quality(np.array([1.0, 1.0]), "Title"))


@pytest.mark.parametrize("count", [1, 3])
def test_predicted_against_actual(count: int) -> None:
    values = np.random.default_rng(1).normal(size=(9, count))
    figure = plots.predicted_against_actual(values, values * 2, [NASTY] * count)
    _draw(figure)
    assert len(figure.axes) == count
    offsets = np.asarray(figure.axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(offsets, np.stack([values[:, 0] * 2, values[:, 0]], axis=1))


def test_predicted_against_actual_of_constants() -> None:
    _draw(plots.predicted_against_actual(np.zeros((4, 1)), np.zeros((4, 1)), ["constant"]))


def test_layer_effects(attributions: coar.Attributions) -> None:
    figure = plots.layer_effects(attributions.by_layer(0))
    _draw(figure)
    assert _bars(figure, 0) == [0.5, 6.0, 0.5, 2.0]  # absolute of back and front, then their sums


def test_edit_sweep() -> None:
    sweep = pd.DataFrame({"k": [0, 5], "worst": [0.1, 0.4], "average": [0.8, 0.7]})
    figure = plots.edit_sweep({"validation": sweep, "test": sweep}, chosen=5)
    _draw(figure)
    assert len(figure.axes[0].get_lines()) == 5


def test_group_bars() -> None:
    before = coar.group_accuracy([True, False, True], ["a-$^$", "a-$^$", "b"])
    after = coar.group_accuracy([True, True, False], ["a-$^$", "a-$^$", "b"])
    figure = plots.group_bars(before, after)
    _draw(figure)
    heights = [patch.get_height() for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert heights == pytest.approx([0.5, 1.0, 2 / 3, 1.0, 0.0, 2 / 3])


def test_formats() -> None:
    assert {"png", "svg", "pdf"} <= set(plots.formats())
