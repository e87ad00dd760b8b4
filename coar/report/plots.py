"""Figures. Each function returns a matplotlib Figure; none shows, saves or changes global plotting state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from coar.attributions.attributions import Attributions
from coar.errors import QueryError
from coar.metrics import GroupAccuracy

BLUE, RED, GREY = "#2b6cb0", "#c53030", "#718096"
# Colours of falling lightness, each with a marker and a dash of its own: told apart in grey and by every eye.
_LINES = (
    ("#08306b", "o", "-"),
    ("#b2560d", "s", "--"),
    ("#1b7f5c", "^", "-."),
    ("#8a5fb0", "D", ":"),
    ("#c2708f", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#7f8a99", "P", (0, (1, 2))),
)
_STYLE: Any = {
    "text.parse_math": False,  # ids and groups are the user's: a dollar sign is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.dpi": 120,
}


def formats() -> tuple[str, ...]:
    """Returns the file name endings that a figure can be saved under."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def top_components(
    attributions: Attributions,
    example: int,
    image: npt.NDArray[np.floating] | None,
    removed: pd.DataFrame,
    k: int = 10,
) -> Figure:
    """Returns three panels: the image, its k top components, and predicted against actual output as they are ablated.

    Args:
      attributions: What is asked.
      example: Position of the example.
      image: (height, width) or (height, width, 3); None: no image panel is filled.
      removed: From `ablation_curve`: columns ablated, predicted, actual.
      k: Number of components in the bar chart.
    """
    table = attributions.top(example, k)
    row = attributions.examples.iloc[example]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[0.8, 1.5, 1.4])
        if image is not None:
            left.imshow(image, cmap="gray", interpolation="nearest")
        left.set(title=f"{row['id']}\n{row['group']}", xticks=[], yticks=[])
        weights = table["weight"].to_numpy()[::-1]
        middle.barh(
            table["name"][::-1],
            weights,
            xerr=1.96 * table["stderr"][::-1],
            color=[BLUE if w > 0 else RED for w in weights],
            error_kw={"elinewidth": 0.8, "ecolor": "#2d3748"},
        )
        middle.axvline(0, color="black", linewidth=0.6)
        middle.set(title=f"Its {k} strongest components", xlabel="effect of keeping it on the output (95 % interval)")
        right.plot(removed["ablated"], removed["actual"], "o-", color=BLUE, markersize=3, label="actual (model run)")
        right.plot(removed["ablated"], removed["predicted"], "--", color=RED, label="predicted (attribution)")
        right.axhline(0, color=GREY, linewidth=0.6)
        right.set(title="Ablating them, strongest first", xlabel="components ablated", ylabel="output")
        right.legend(frameon=False)
    return figure


def prediction_quality(correlations: npt.NDArray[np.floating], title: str) -> Figure:
    """Returns a histogram of the per-example correlation of predicted with true outputs."""
    finite = np.asarray(correlations)[np.isfinite(correlations)]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel="correlation over keep-vectors", ylabel="examples")
        if len(finite):  # there is no correlation where outputs are constant
            axes.hist(finite, bins=30, color=BLUE)
            axes.axvline(float(finite.mean()), color=RED, label=f"mean {finite.mean():.3f}")
            axes.legend(frameon=False, loc="upper left")
    return figure


def predicted_against_actual(
    predicted: npt.NDArray[np.floating], actual: npt.NDArray[np.floating], labels: Sequence[str]
) -> Figure:
    """Returns one scatter per example of predicted against true outputs; arrays are (rows, examples)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * len(labels), 2.8), layout="constrained")
        for axes, column, label in zip(
            np.ravel(figure.subplots(1, len(labels))), range(len(labels)), labels, strict=True
        ):
            x, y = actual[:, column], predicted[:, column]
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            axes.plot(ends, ends, color=GREY, linewidth=0.8)
            axes.scatter(x, y, s=6, alpha=0.6, color=BLUE, linewidths=0)
            axes.set(title=label, xlabel="actual output", ylabel="predicted" if column == 0 else "")
    return figure


def layer_effects(by_layer: pd.DataFrame) -> Figure:
    """Returns bars of the summed weights per module, from `Attributions.by_layer`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6, 0.24 * len(by_layer) + 1), layout="constrained")
        axes = figure.subplots()
        names = by_layer["module"].to_list()[::-1]
        axes.barh(names, by_layer["absolute"][::-1], color="#bee3f8", label="sum of |weights|")
        axes.barh(names, by_layer["weight"][::-1], height=0.4, color=BLUE, label="sum of weights")
        axes.set(xlabel="effect on the output, mean over examples")
        axes.legend(frameon=False)
    return figure


def ablate_fractions(table: pd.DataFrame, least_kept: float, least_halves: float) -> Figure:
    """Returns what is kept and what a line can explain against the ablate fraction, from `FractionChoice.table`.

    Args:
      table: Columns ablate_fraction, right_kept (NaN: not drawn), halves, halves_error, recommended.
      least_kept, least_halves: The limits that the recommended fraction keeps to, drawn as dotted lines.
    """
    fractions = table["ablate_fraction"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        halves = axes.errorbar(
            fractions, table["halves"], 2 * table["halves_error"], fmt="o-", color=BLUE, markersize=4, capsize=2,
            label="c: what a line can explain at most (± 2 standard errors)",
        )  # fmt: skip
        axes.axhline(least_halves, color=halves[0].get_color(), linewidth=0.8, linestyle=":")
        if table["right_kept"].notna().any():
            axes.plot(fractions, table["right_kept"], "s--", color=RED, markersize=4, label="right predictions kept")
            axes.axhline(least_kept, color=RED, linewidth=0.8, linestyle=":")
        for fraction in fractions[table["recommended"]]:
            axes.axvline(fraction, color="black", linewidth=0.8, label=f"recommended: {fraction:g}")
        axes.set(xlabel="ablate fraction", ylabel="share, correlation", ylim=(-0.05, 1.05))
        axes.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
        axes.set_xticks([], minor=True)
        figure.legend(frameon=False, fontsize=8, loc="outside upper left")
    return figure


def edit_sweep(sweeps: dict[str, pd.DataFrame], chosen: int) -> Figure:
    """Returns worst-group and average accuracy against the number of ablated components, one colour per split."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for (name, sweep), color in zip(sweeps.items(), (GREY, BLUE, RED), strict=False):
            axes.plot(sweep["k"], sweep["worst"], "-", color=color, label=f"{name}: worst group")
            axes.plot(sweep["k"], sweep["average"], "--", color=color, label=f"{name}: average")
        axes.axvline(chosen, color="black", linewidth=0.8, linestyle=":", label=f"chosen: {chosen}")
        axes.set(xlabel="components ablated", ylabel="accuracy", title="How many components to ablate")
        axes.legend(frameon=False, fontsize=8)
    return figure


def cost_quality(curves: pd.DataFrame, target: float | None = None, title: str = "") -> Figure:
    """Returns correlation against cost, one labelled line per estimator, with the interval of the mean as a band.

    Args:
      curves: Columns estimator, budget, cost (plain forward passes), mean, low, high; one row per run. Drawn in order
        of cost, the estimators in the order in which they first come; at most six.
      target: A correlation, drawn as a dashed horizontal line.
      title: Of the figure.
    """
    names = list(dict.fromkeys(curves["estimator"]))
    if not 1 <= len(names) <= len(_LINES):
        raise QueryError(f"There are {len(names)} estimators, expected 1 to {len(_LINES)}: give some of them.")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        lines = {}
        for name, (color, marker, dashes) in zip(names, _LINES, strict=False):
            line = curves[curves["estimator"] == name].sort_values("cost")
            axes.fill_between(line["cost"], line["low"], line["high"], color=color, alpha=0.15, linewidth=0)
            axes.plot(
                line["cost"], line["mean"], linestyle=dashes, color=color, marker=marker, markersize=5, label=name
            )
            lines[name] = line[["cost", "mean"]].to_numpy(dtype=np.float64)
        if target is not None:
            axes.axhline(target, color="black", linestyle="--", linewidth=0.8)
            lines[f"target {target:.4g}"] = np.array([[x, target] for x in axes.get_xlim()])
        axes.set(title=title, xlabel="cost in plain forward passes", ylabel="correlation, mean over examples")
        axes.xaxis.set_major_formatter("{x:,g}")
        _label_lines(axes, lines, [color for color, _, _ in _LINES[: len(names)]] + ["black"])
    return figure


def _label_lines(axes: Any, lines: dict[str, npt.NDArray[np.float64]], colors: Sequence[str]) -> None:
    """Writes each line's name beside one of its points, where it covers least of the lines and no other name."""
    (left, right), (bottom, top) = np.log(axes.get_xlim()), axes.get_ylim()
    axes.set(xlim=np.exp([left, right]), ylim=(bottom, top))  # as they are now, whatever is drawn later
    points = {  # in shares of width and height
        name: np.stack([(np.log(line[:, 0]) - left) / (right - left), (line[:, 1] - bottom) / (top - bottom)], axis=1)
        for name, line in lines.items()
    }
    drawn = np.concatenate([_along(line) for line in points.values()])
    taken: list[npt.NDArray[np.float64]] = []
    for (name, line), color in zip(points.items(), colors, strict=False):
        half = np.array([0.0056 * len(name), 0.026])  # of a name's width and height
        sides = [(1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1), (-1, 0)]
        places = [at + (half + np.array([0.02, 0.015])) * side for at in line[::-1] for side in np.array(sides)]

        def covered(place: npt.NDArray[np.float64], half: npt.NDArray[np.float64] = half) -> float:
            outside = np.any(place - half < 0) or np.any(place + half > 1)
            names = sum(bool(np.all(np.abs(place - other[0]) < half + other[1])) for other in taken)
            return float(np.all(np.abs(drawn - place) < half, axis=1).sum() + 1000 * (int(outside) + names))

        best = min(places, key=covered)
        taken.append(np.stack([best, half]))
        axes.text(*best, name, transform=axes.transAxes, ha="center", va="center", color=color, fontsize=9)


def _along(line: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns points along a polyline, (points, 2), close together."""
    if len(line) < 2:
        return line
    at = np.linspace(0, len(line) - 1, 60 * (len(line) - 1) + 1)
    return np.stack([np.interp(at, np.arange(len(line)), line[:, axis]) for axis in (0, 1)], axis=1)


def group_bars(before: GroupAccuracy, after: GroupAccuracy) -> Figure:
    """Returns accuracy per group, and on average, before and after an edit."""
    names = [*before.groups, "average"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.5, 3), layout="constrained")
        axes = figure.subplots()
        at = np.arange(len(names))
        for shift, result, color, label in ((-0.2, before, "#cbd5e0", "before"), (0.2, after, BLUE, "after")):
            values = [*result.groups.values(), result.average]
            bars = axes.bar(at + shift, values, 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        axes.set(xticks=at, ylim=(0, 1.12), ylabel="accuracy", title="Test accuracy per group")
        axes.set_xticklabels([name.replace("-", "\n") for name in names])
        axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.16))
    return figure
