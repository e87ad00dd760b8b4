"""The tables of the comparison, as CSV and Markdown."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch


def write_tables(
    folder: Path,
    name: str,
    records: pd.DataFrame,
    summary: pd.DataFrame,
    calibrated: pd.DataFrame,
    fractions: pd.DataFrame,
    minutes: float,
) -> None:
    """Writes cost_quality.csv with all that was measured, and cost_quality.md for people."""
    suffix = "" if name == "full" else f"_{name}"
    records.to_csv(folder / f"cost_quality{suffix}.csv", index=False, float_format="%.6g")
    option = "" if name == "full" else f" --{name}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    parts = [
        "# Cost and quality of attributions",
        f"`python -m experiments.cost_quality{option}`: {minutes:.0f} minutes, {device}, torch {torch.__version__}.",
        "Cost: in plain forward passes over the same examples, timed in the same run. Correlation: of predicted with "
        "true outputs on keep-vectors that no estimator saw, mean over examples, with a 95 % bootstrap interval.",
        "## Cost at equal correlation",
        markdown(summary),
    ]
    if len(calibrated):
        parts += [
            "## Do the intervals cover?",
            "Share of weights whose interval covers the weight of a long, independent run of the same kind.",
            markdown(calibrated),
        ]
    for network, part in records.groupby("network", sort=False):
        picture = f"![Correlation against cost](cost_quality_{network}.png)"
        shown = part[["estimator", "budget", "cost", "seconds", "mean", "low", "high", "median", "below_half"]]
        parts += [f"## {network}", picture, markdown(shown)]
    if len(fractions):
        parts += [
            "## Away from the ablate fraction that it was estimated at",
            markdown(fractions),
        ]
    (folder / f"cost_quality{suffix}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def markdown(table: pd.DataFrame) -> str:
    """Returns a table as Markdown, numbers rounded to what they are worth."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.itertuples(index=False, name=None)]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.4g}"
