"""The figures: trade-offs per task, the way from the original to the edited model, masks over densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coar.metrics import pareto_front

# Of falling lightness, each with a marker of its own, as in coar/report/plots.py: told apart in grey and by every eye.
FAMILIES: dict[str, tuple[str, str]] = {
    "coar": ("#c53030", "*"),
    "rewriting": ("#08306b", "o"),
    "lowrank": ("#2b6cb0", "s"),
    "output-collision": ("#1b7f5c", "^"),
    "finetune": ("#b2560d", "D"),
    "1-li": ("#8a5fb0", "v"),
    "paint": ("#c2708f", "P"),
    "hypernetwork-mask": ("#4a5568", "X"),
    "mean-mask": ("#7f8a99", "X"),
    "random-mask": ("#a0aec0", "X"),
}
OTHER = ("#2d3748", "h")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
}


def tradeoff(
    table: pd.DataFrame, methods: dict[str, str], x: str, y: str, before: dict[str, tuple[float, float]], title: str
) -> Figure:
    """Returns one panel per network: a numbered point per method, bars from its lowest to its highest seed, the front.

    Args:
      table: Of `over_seeds`, of one task.
      methods: Label -> registered name.
      x, y: Metrics: what is kept, what is gained.
      before: Per network what the unedited model has.
      title: Of the figure.
    """
    networks = list(dict.fromkeys(table["network"]))
    labels = [label for label in methods if label in set(table["method"])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(networks) + 2.4, 4.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(networks)))
        handles: list[Any] = []
        for axes, network in zip(panels, networks, strict=True):
            part = table[table["network"] == network]
            points = {label: _point(part, label, x, y) for label in labels if _has(part, label, x, y)}
            spots: list[tuple[float, float]] = []
            for label, (px, py) in points.items():
                color, marker = FAMILIES.get(methods[label], OTHER)
                bars = {"xerr": _bar(px), "yerr": _bar(py), "ecolor": color, "elinewidth": 0.6, "alpha": 0.9}
                drawn = axes.errorbar(
                    px[0], py[0], **bars, color=color, marker=marker, markersize=6, linestyle="none", zorder=3
                )
                spots.append((px[0], py[0]))
                if network == networks[0]:
                    drawn.set_label(f"{labels.index(label) + 1}  {label}")
                    handles.append(drawn)
            _front(axes, spots)
            axes.plot(
                *before[network],
                marker="+",
                color="black",
                markersize=10,
                markeredgewidth=1.6,
                linestyle="none",
                zorder=5,
            )
            axes.annotate("unedited", before[network], (-6, -10), textcoords="offset points", ha="right", fontsize=8)
            axes.set(title=network, xlabel=x, ylabel=y if axes is panels[0] else "")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            _limits(axes, [*spots, before[network]])
            _number(figure, axes, spots, [labels.index(label) + 1 for label in points])
        figure.suptitle(title, fontsize=11, fontweight="bold")
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _has(part: pd.DataFrame, label: str, *metrics: str) -> bool:
    return all(((part["method"] == label) & (part["metric"] == metric)).any() for metric in metrics)


def _point(part: pd.DataFrame, label: str, x: str, y: str) -> list[tuple[float, float, float]]:
    rows = [part[(part["method"] == label) & (part["metric"] == metric)].iloc[0] for metric in (x, y)]
    return [(float(row["mean"]), float(row["smallest"]), float(row["largest"])) for row in rows]


def _bar(value: tuple[float, float, float]) -> Any:
    mean, low, high = value
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]  # a mean of equal values may differ from them by rounding


def _limits(axes: Any, spots: Sequence[tuple[float, float]]) -> None:
    """Sets limits around the points: ranges over seeds can be wide, and would leave the points in a corner."""
    for axis, values in zip("xy", np.array(spots).T, strict=True):
        span = max(float(np.ptp(values)), 0.02)
        limits = (float(values.min()) - 0.18 * span, min(float(values.max()) + 0.14 * span, 1.03))
        axes.set(**{f"{axis}lim": limits})


def _front(axes: Any, spots: Sequence[tuple[float, float]]) -> None:
    """Draws the Pareto front as stairs: nothing is above and to the right of it."""
    if not spots:
        return
    front = [spots[i] for i in pareto_front(spots)]
    axes.step(*zip(*front, strict=True), where="pre", color="#718096", linewidth=0.9, linestyle="--", zorder=1)


def _number(figure: Figure, axes: Any, spots: Sequence[tuple[float, float]], numbers: Sequence[int]) -> None:
    """Writes each point's number beside it, around points that lie together."""
    figure.draw_without_rendering()
    places = axes.transData.transform(np.array(spots)) if spots else np.zeros((0, 2))
    taken: list[Any] = []
    around = [np.array([np.cos(a), np.sin(a)]) for a in np.linspace(0.4, 0.4 + 2 * np.pi, 12, endpoint=False)]
    for place, spot, number in zip(places, spots, numbers, strict=True):
        options = [place + radius * way for radius in (13, 21, 29, 37) for way in around]

        def covered(option: Any) -> float:
            near = [np.abs(option - other).max() < 10 for other in [*taken, *places]]
            return float(sum(near))

        best = min(options, key=covered)
        taken.append(best)
        offset = (best - place) * 72 / figure.dpi
        arrow = {"arrowstyle": "-", "linewidth": 0.4, "color": "#718096", "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            str(number), spot, tuple(offset), textcoords="offset points", ha="center", va="center", fontsize=7.5,
            arrowprops=arrow, zorder=4,
        )  # fmt: skip


def interpolation(curves: pd.DataFrame, methods: dict[str, str], x: str, y: str, title: str) -> Figure:
    """Returns one panel per network: accuracy on both sets from alpha 0 to 1, mean over seeds, one line per method.

    Drawn are the six methods whose edits gain most.
    """
    networks = list(dict.fromkeys(curves["network"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(networks) + 2.0, 4.2), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(networks)))
        drawn: dict[str, Any] = {}
        gains = curves.assign(gain=[edited[-1] - edited[0] for edited in curves["edited"]])
        chosen = gains.groupby("arm")["gain"].mean().sort_values(ascending=False).index[:6]
        dashes = dict(zip(chosen, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2))), strict=False))
        for axes, network in zip(panels, networks, strict=True):
            for arm in chosen:
                part = curves[(curves["network"] == network) & (curves["arm"] == arm)]
                if not len(part):
                    continue
                original, edited = (np.mean(part[name].tolist(), axis=0) for name in ("original", "edited"))
                color, marker = FAMILIES.get(methods[str(arm)], OTHER)
                (line,) = axes.plot(
                    original, edited, color=color, linestyle=dashes[arm], marker=marker, markersize=3.5, label=arm
                )
                axes.plot(original[-1], edited[-1], color=color, marker=marker, markersize=8)
                axes.plot(original[[0, -1]], edited[[0, -1]], color=color, linewidth=0.5, alpha=0.5)
                drawn.setdefault(str(arm), line)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set(title=network, xlabel=x, ylabel=y if axes is panels[0] else "")
        figure.suptitle(title, fontsize=11, fontweight="bold")
        figure.legend(handles=list(drawn.values()), loc="outside right center", frameon=False, fontsize=8)
    return figure


def densities(masks: pd.DataFrame, success: dict[str, str], kept: dict[str, str]) -> Figure:
    """Returns one panel per task and network: what learned, random and mean masks gain and keep, over densities.

    Args:
      masks: Rows of `Result.masks` with task, network, seed.
      success: Task -> the set that should become right.
      kept: Task -> `ordinary` (its accuracy is drawn) or `locality` (agreement).
    """
    looks = {"learned": ("#08306b", "o", "-"), "random": ("#b2560d", "s", "--"), "mean": ("#1b7f5c", "^", "-.")}
    panels_of = list(dict.fromkeys(zip(masks["task"], masks["network"], strict=True)))
    with mpl.rc_context(STYLE):
        columns = min(3, len(panels_of))
        rows = -(-len(panels_of) // columns)
        figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes, (task, network) in zip(panels, panels_of, strict=False):
            here = masks[(masks["task"] == task) & (masks["network"] == network)]
            for kind, (color, marker, dash) in looks.items():
                line = mask_points(here[here["mask"] == kind], success[task], kept[task])
                if not len(line):
                    continue
                axes.plot(
                    line["kept"], line["gained"], color=color, marker=marker, linestyle=dash, markersize=4, label=kind
                )
                for density, row in line.iterrows():
                    axes.annotate(
                        f"{100 * float(str(density)):g}", (row["kept"], row["gained"]), (4, 3),
                        textcoords="offset points", fontsize=6.5, color=color,
                    )  # fmt: skip
            x = "ordinary: accuracy" if kept[task] == "ordinary" else "locality: agreement"
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set(title=f"{task}, {network}", xlabel=x, ylabel=f"{success[task]}: accuracy")
        for axes in panels[len(panels_of) :]:
            axes.set_visible(False)
        panels[0].legend(frameon=False, fontsize=8)
    return figure


def mask_points(masks: pd.DataFrame, success: str, kept: str) -> pd.DataFrame:
    """Returns, by density, `gained` (accuracy on the set) and `kept`, means over seeds and cases."""
    shares = masks.assign(right=masks["right_after"] / masks["examples"], same=masks["agreeing"] / masks["examples"])
    gained = shares[shares["set"] == success].groupby("density")["right"].mean()
    column = "right" if kept == "ordinary" else "same"
    stayed = shares[shares["set"] == kept].groupby("density")[column].mean()
    return pd.DataFrame({"gained": gained, "kept": stayed})
