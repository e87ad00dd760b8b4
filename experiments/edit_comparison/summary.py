"""From counts to metrics: one number per task, network, method and metric, with an interval over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from coar.metrics import Accuracy, editing_task_penalty, original_task_penalty, percent_corrected
from experiments.edit_comparison.images import CORRUPTIONS
from experiments.edit_comparison.runner import Result

JOB = ["task", "network", "seed"]
PROTOCOLS = {
    "accuracy": "share of the set's test images that the edited model gets right; micro-average, then over cases",
    "before": "the same of the unedited model",
    "corrected": "100 (N_pre - N_post) / N_pre over images whose original the unedited model gets right, not clipped",
    "ordinary change": "accuracy of the edited minus that of the unedited model on ordinary test images, in points",
    "agreement": "share of ordinary test images predicted as by the unedited model, rightly or wrongly",
    "locality": "share of base-correct images near a boundary predicted as by the unedited model, mean over edits",
    "original OOD penalty": "accuracy of the edited minus that of the unedited model on corrupted ordinary images, "
    "mean over 4 corruptions, in points (Equation 6)",
    "editing OOD penalty": "accuracy of the edited model on the corrupted set minus that on the set itself, mean over "
    "4 corruptions, in points (Equation 7)",
}


def frame(results: Sequence[Result], part: str) -> pd.DataFrame:
    """Returns one part of all results (base, edits, choices, curves, masks) as a table, with task, network, seed."""
    rows = []
    for result in results:
        about = {name: result.job[name] for name in JOB}
        rows += [{**about, **row} for row in getattr(result, part)]
    return pd.DataFrame(rows)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns mean and 95 % t-interval of independent values: NaN bounds for one value, NaN for none."""
    known = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    mean = float(known.mean())
    if len(known) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    return mean, mean - half, mean + half


def per_seed(edits: pd.DataFrame, notes: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Returns long rows (task, network, seed, arm, metric, value, examples, protocol): cases averaged within a seed."""
    rows = []
    for keys, part in edits.groupby([*JOB, "arm"], sort=False):
        about = dict(zip([*JOB, "arm"], keys, strict=True))
        by_case = [list(_metrics(case, notes[str(about["task"])])) for _, case in part.groupby("case", sort=False)]
        for i, (metric, _, examples, protocol) in enumerate(by_case[0]):
            value = float(np.mean([case[i][1] for case in by_case]))
            rows.append({**about, "metric": metric, "value": value, "examples": examples, "protocol": protocol})
    return pd.DataFrame(rows)


def _metrics(case: pd.DataFrame, notes: dict[str, Any]) -> Iterator[tuple[str, float, int, str]]:
    rows = {str(row["set"]): row for row in case.to_dict("records")}
    corrupted = [name for name in rows if name.rpartition(", ")[2] in CORRUPTIONS]
    for name, row in rows.items():
        if name in corrupted or name in ("ordinary", "locality", "all classes"):
            continue
        n = int(row["examples"])
        yield f"{name}: accuracy", row["right_after"] / n, n, PROTOCOLS["accuracy"]
        yield f"{name}: before", row["right_before"] / n, n, PROTOCOLS["before"]
        if row.get("n_pre") is not None and np.isfinite(row.get("n_pre", np.nan)):
            value = percent_corrected(int(row["n_pre"]), int(row["n_post"]))
            yield f"{name}: errors corrected, %", value, n, PROTOCOLS["corrected"]
    ordinary, n = rows["ordinary"], int(rows["ordinary"]["examples"])
    change = 100 * (ordinary["right_after"] - ordinary["right_before"]) / n
    yield "ordinary: accuracy", ordinary["right_after"] / n, n, PROTOCOLS["accuracy"]
    yield "ordinary: change, points", change, n, PROTOCOLS["ordinary change"]
    yield "ordinary: agreement", ordinary["agreeing"] / n, n, PROTOCOLS["agreement"]
    if "locality" in rows:
        near = rows["locality"]
        yield "locality: agreement", near["agreeing"] / near["examples"], int(near["examples"]), PROTOCOLS["locality"]
    if corrupted:
        yield from _penalties(rows, str(notes["success"]))


def _penalties(rows: dict[str, Any], success: str) -> Iterator[tuple[str, float, int, str]]:
    def of(name: str, which: str) -> Accuracy:
        return Accuracy(int(rows[name][which]), int(rows[name]["examples"]))

    before, after = (
        {name: of(f"ordinary, {name}", which) for name in CORRUPTIONS} for which in ("right_before", "right_after")
    )
    original = original_task_penalty(before, after)
    n = int(rows["ordinary"]["examples"])
    yield "original-task OOD penalty, points", 100 * original.value, n, PROTOCOLS["original OOD penalty"]
    shifted = {name: of(f"{success}, {name}", "right_after") for name in CORRUPTIONS}
    editing = editing_task_penalty(of(success, "right_after"), shifted)
    yield "editing-task OOD penalty, points", 100 * editing.value, n, PROTOCOLS["editing OOD penalty"]


def over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per task, network, method and metric: mean, 95 % interval, range, seeds, protocol."""
    rows = []
    for keys, part in values.groupby(["task", "network", "arm", "metric"], sort=False):
        mean, low, high = interval(part["value"].tolist())
        about = dict(zip(["task", "network", "method", "metric"], keys, strict=True))
        first = part.iloc[0]
        rows.append(
            {
                **about,
                "mean": mean,
                "low": low,
                "high": high,
                "smallest": float(part["value"].min()),
                "largest": float(part["value"].max()),
                "seeds": len(part),
                "images": int(first["examples"]),
                "protocol": first["protocol"],
            }
        )
    return pd.DataFrame(rows)


def differences(values: pd.DataFrame, metric: Callable[[str], bool]) -> pd.DataFrame:
    """Returns per task, network, seed, method what a set's accuracy gains, in points, for the sets that fit."""
    after = values[values["metric"].str.endswith(": accuracy")].copy()
    before = values[values["metric"].str.endswith(": before")].copy()
    for part in (after, before):
        part["set"] = [str(name).rpartition(": ")[0] for name in part["metric"]]
    keys = [*JOB, "arm", "set"]
    joined = after.merge(before[[*keys, "value"]], on=keys, suffixes=("", "_before"))
    joined["gain"] = 100 * (joined["value"] - joined["value_before"])
    return joined.loc[np.array([metric(str(name)) for name in joined["set"]], dtype=np.bool_)]
