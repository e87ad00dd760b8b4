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
from coar.report import plots

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


def _curves(*names: str) -> pd.DataFrame:
    rows = [
        {"estimator": name, "budget": n, "cost": cost, "mean": mean, "low": mean - 0.02, "high": mean + 0.01}
        for i, name in enumerate(names)
        for n, cost, mean in ((20, 200.0, 0.9 - 0.1 * i), (2, 5.0 + i, 0.5))
    ]
    return pd.DataFrame(rows)


def test_cost_quality() -> None:
    figure = plots.cost_quality(_curves(NASTY, "second"), target=0.85, title="Title")
    _draw(figure)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_title()) == ("log", "Title")
    first, second, target = axes.get_lines()
    np.testing.assert_array_equal(first.get_xydata(), [[5, 0.5], [200, 0.9]])  # in order of cost
    np.testing.assert_array_equal(second.get_xydata(), [[6, 0.5], [200, 0.8]])
    assert (target.get_ydata(), target.get_linestyle()) == ([0.85, 0.85], "--")
    assert {text.get_text() for text in axes.texts} == {NASTY, "second", "target 0.85"}
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert {tuple(at) for at in np.round(band, 9)} >= {(5.0, 0.48), (5.0, 0.51), (200.0, 0.88), (200.0, 0.91)}


def test_names_beside_lines_do_not_cover_each_other() -> None:
    figure = plots.cost_quality(_curves(*(f"an estimator {i}" for i in range(6))), target=0.6)
    _draw(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 7
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    assert not any(a.overlaps(b) for a, b in pairs)
    inside = figure.axes[0].get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_cost_quality_of_single_runs() -> None:
    figure = plots.cost_quality(_curves("only").iloc[:1])
    _draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["only"]


@pytest.mark.parametrize("count", [0, 7])
def test_cost_quality_refuses(count: int) -> None:
    curves = _curves(*(f"e{i}" for i in range(count))) if count else _curves("one").iloc[:0]
    with pytest.raises(coar.QueryError) as refused:
        plots.cost_quality(curves)
    assert str(refused.value) == f"There are {count} estimators, expected 1 to 6: give some of them."


def test_formats() -> None:
    assert {"png", "svg", "pdf"} <= set(plots.formats())
