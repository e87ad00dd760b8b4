"""The report: one table per task, the findings, figures, and how every number was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.edit_comparison import figures
from experiments.edit_comparison.config import Config
from experiments.edit_comparison.findings import Finding, all_findings
from experiments.edit_comparison.runner import Result
from experiments.edit_comparison.summary import PROTOCOLS, frame, over_seeds, per_seed

# the sets of each task that its table shows, in order, and what its figure has on the x axis
SHOWN = {
    "cue": ("cue disagrees", "cue disagrees, held-out bars"),
    "concept": (
        "target class",
        "other classes",
        "target class, held-out textures",
        "other classes, held-out textures",
    ),
    "confusion": ("the edited image", "the rest of its group"),
}
KEPT = {"ordinary": "ordinary: accuracy", "locality": "locality: agreement"}
INTRODUCTION = (
    "Three tasks made of scikit-learn's handwritten digits, two networks (a residual CNN with batch norm, four blocks "
    "of timm's test_vit), all registered editing methods. Every method chooses among the same number of settings, on "
    "validation images only: highest accuracy on the images that should become right, among the settings after which "
    "accuracy on ordinary validation images drops by at most {cap}; where none of them is "
    "better than the unedited model, it makes no edit. "
    "Intervals are 95 % t-intervals over {seeds} seeds (of splits, networks and exemplars); seeds are few, so they are "
    "wide."
)
TASKS = {
    "cue": "Stripes behind the digit agree with the label in 95 % of the training images. Exemplars: other images "
    "where they do not, beside the same digits on the other stripes. Held out: bars of another phase or width.",
    "concept": "Even digits stand on a road of horizontal stripes, odd ones by a fence or a wall (in the ViT's "
    "training images with 5 % exceptions). The road is covered with another texture. Exemplars: {exemplars} images of "
    "one class in one texture. Held out: other textures of the same style. Errors corrected count images whose "
    "original the unedited model gets right.",
    "confusion": "Digits that are turned, slanted or shifted, and taken for one other digit. Each edit sees one image "
    "and is judged on the rest of its group (generalisation), on images that the model only just gets right (locality) "
    "and on ordinary ones. Rates are means over the edits made, {edits} per group, not over all of a group's images.",
}


def _duration(minutes: float | None) -> str:
    """Returns how long the run took, if it was one run."""
    return "" if minutes is None else f"{minutes:.0f} minutes on "


def write_report(
    folder: Path, name: str, config: Config, results: Sequence[Result], minutes: float | None
) -> list[Finding]:
    """Writes edit_comparison.csv, .md and the figures into the folder; returns the findings."""
    results = sorted(results, key=lambda r: (list(SHOWN).index(r.job["task"]), r.job["network"], r.job["seed"]))
    suffix = "" if name == "full" else f"_{name}"
    edits, base, curves, masks = (frame(results, part) for part in ("edits", "base", "curves", "masks"))
    notes = {str(r.job["task"]): dict(r.job["notes"]) for r in results}
    values = per_seed(edits, notes)
    table = over_seeds(values)
    table.to_csv(folder / f"edit_comparison{suffix}.csv", index=False, float_format="%.5g")
    findings = all_findings(values, edits, curves, masks, notes)
    methods = {arm.label: arm.method for arm in config.registered_arms()}
    drawn = _figures(folder, suffix, table, base, curves, masks, methods, notes)
    option = "" if name == "full" else f" --{name}"
    parts = [
        "# Which editing method for which task",
        f"`python -m experiments.edit_comparison{option}`: {_duration(minutes)}{config.workers} processes of one "
        f"thread, torch {torch.__version__}. Processor time of all jobs: "
        f"{sum(r.seconds['processor'] for r in results) / 60:.0f} minutes.",
        INTRODUCTION.format(cap=_caps(config), seeds=len({r.job["seed"] for r in results})),
        _not_run(config),
        "## Which published findings reappear",
        "\n\n".join(finding.markdown() for finding in findings),
    ]
    for task in dict.fromkeys(str(r.job["task"]) for r in results):
        parts += _section(task, config, table[table["task"] == task], edits, results, drawn)
    parts += ["## Room to improve", BASE_TEXT, markdown(_base(base)), *_masks_section(drawn)]
    parts += ["## What the numbers are", "\n".join(f"- *{name}*: {text}." for name, text in PROTOCOLS.items())]
    text = "\n\n".join(part for part in parts if part)
    (folder / f"edit_comparison{suffix}.md").write_text(text + "\n", encoding="utf-8")
    return findings


RANGES = (
    "Points are means over seeds, bars go from the lowest to the highest seed; dashed: the Pareto front of the means."
)
BASE_TEXT = (
    "Accuracy of the unedited networks on test images, mean over seeds (and cases); `untransformed`: on the originals "
    "of the same images."
)


def _caps(config: Config) -> str:
    return ", ".join(f"{config.cap[task]:g} points ({task})" for task in config.networks)


def _not_run(config: Config) -> str:
    missing = config.unregistered()
    return f"Not registered, so not run: {', '.join(missing)}." if missing else ""


def _figures(
    folder: Path,
    suffix: str,
    table: pd.DataFrame,
    base: pd.DataFrame,
    curves: pd.DataFrame,
    masks: pd.DataFrame,
    methods: dict[str, str],
    notes: dict[str, dict[str, Any]],
) -> dict[str, str]:
    """Saves all figures and returns their file names."""
    drawn: dict[str, str] = {}

    def save(key: str, figure: Any) -> None:
        drawn[key] = f"edit_comparison{suffix}_{key}.png"
        figure.savefig(folder / drawn[key], dpi=150)

    for task, note in notes.items():
        x, y = KEPT[note["kept"]], f"{note['success']}: accuracy"
        part = table[table["task"] == task]
        before = {network: _unedited(part, base, task, str(network), note) for network in part["network"].unique()}
        save(task, figures.tradeoff(part, methods, x, y, before, note["title"]))
        mine = curves[curves["task"] == task] if len(curves) else curves
        mine = mine[mine["moves"]] if len(mine) else mine
        if len(mine):
            names = "ordinary images: accuracy", f"{note['success']}: accuracy"
            save(f"{task}_alpha", figures.interpolation(mine, methods, *names, f"From alpha 0 to 1: {note['title']}"))
    if len(masks):
        save(
            "masks",
            figures.densities(
                masks, *({task: note[key] for task, note in notes.items()} for key in ("success", "kept"))
            ),
        )
    return drawn


def _unedited(
    part: pd.DataFrame, base: pd.DataFrame, task: str, network: str, note: dict[str, Any]
) -> tuple[float, float]:
    """Returns what the unedited model has on both axes: agreement with itself is 1."""
    mine = part[(part["network"] == network) & (part["metric"] == f"{note['success']}: before")]
    ordinary = base[(base["task"] == task) & (base["network"] == network) & (base["set"] == "ordinary")]["accuracy"]
    return 1.0 if note["kept"] == "locality" else float(ordinary.mean()), float(mine["mean"].iloc[0])


def _section(
    task: str,
    config: Config,
    table: pd.DataFrame,
    edits: pd.DataFrame,
    results: Sequence[Result],
    drawn: dict[str, str],
) -> list[str]:
    title = next(str(r.job["notes"]["title"]) for r in results if r.job["task"] == task)
    options = {"exemplars": "", "edits": "", **{k: str(v) for k, v in config.options[task].items()}}
    parts = [f"## {title}", TASKS[task].format(**options), f"![Trade-off]({drawn[task]})", RANGES]
    if f"{task}_alpha" in drawn:
        parts.append(f"![From the original to the edited model]({drawn[f'{task}_alpha']})")
    for network in table["network"].unique():
        parts += [f"### {task}, {network}", markdown(_pivot(task, table[table["network"] == network], edits, network))]
    return parts


def _pivot(task: str, table: pd.DataFrame, edits: pd.DataFrame, network: str) -> pd.DataFrame:
    """Returns one row per method, the columns that the task's table shows."""
    rows = []
    unedited: dict[str, str] = {"method": "*unedited*"}
    for method, part in table.groupby("method", sort=False):
        by = {row["metric"]: row for row in part.to_dict("records")}
        mine = edits[(edits["task"] == task) & (edits["network"] == network) & (edits["arm"] == method)]
        row = {"method": str(method)}
        for name in SHOWN[task]:
            row[name] = _with_interval(by[f"{name}: accuracy"], 100)
            unedited[name] = f"{100 * by[f'{name}: before']['mean']:.1f}"
            corrected = f"{name}: errors corrected, %"
            if task == "concept" and corrected in by and "held-out" not in name:
                row[f"{name}, errors corrected"] = _with_interval(by[corrected], 1)
        row["ordinary, change"] = _with_interval(by["ordinary: change, points"], 1, "+")
        for metric, scale in (
            ("locality: agreement", 100),
            ("original-task OOD penalty, points", 1),
            ("editing-task OOD penalty, points", 1),
        ):
            if metric in by:
                row[metric.removesuffix(", points")] = _with_interval(by[metric], scale, "+" if scale == 1 else "")
        seeds = mine.drop_duplicates(["seed", "case"])
        row["no edit"] = f"{int(seeds['no_edit'].sum())} of {len(seeds)}"
        row["steps"] = _mean(mine, "mean_steps", 0)
        row["seconds"] = _mean(mine, "mean_seconds", 2)
        row["setting of the first case"] = _setting(str(mine["setting"].iloc[0]), network)
        rows.append(row)
    return pd.DataFrame([unedited, *rows]).fillna("")


def _with_interval(row: dict[Any, Any], scale: float, sign: str = "") -> str:
    if row["mean"] != row["mean"]:
        return "–"
    mean, low, high = (scale * row[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f}" + ("" if low != low else f" [{low:.1f}, {high:.1f}]")


def _mean(rows: pd.DataFrame, name: str, digits: int) -> str:
    known = rows[name].dropna() if name in rows else rows.iloc[:0]
    return f"{known.mean():.{digits}f}" if len(known) else "–"


def _setting(text: str, network: str) -> str:
    if not text:
        return "–"
    chosen = {name: value[network] if isinstance(value, dict) else value for name, value in json.loads(text).items()}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
    )


def _base(base: pd.DataFrame) -> pd.DataFrame:
    """Returns the base accuracies, mean over seeds and cases."""
    shown = base[~base["set"].str.startswith("ordinary, ")]
    mean = shown.groupby(["task", "network", "set"], sort=False)[["images", "accuracy", "untransformed"]].mean()
    table = mean.reset_index()
    for name in ("accuracy", "untransformed"):
        table[name] = [f"{100 * float(value):.1f}" if value == value else "–" for value in table[name].astype(float)]
    return table.assign(images=table["images"].round().astype(int))


def _masks_section(drawn: dict[str, str]) -> list[str]:
    if "masks" not in drawn:
        return []
    text = (
        "Learned, random and mean masks with the same rate and steps, mean over seeds and cases. Beside each point: "
        "how many per cent of the components are tuned. Up and to the right is better."
    )
    return ["## Masks over densities", text, f"![Masks over densities]({drawn['masks']})"]


def markdown(table: pd.DataFrame) -> str:
    """Returns a table as Markdown."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False, name=None)]
    return "\n".join(lines)
