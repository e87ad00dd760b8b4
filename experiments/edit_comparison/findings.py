"""Which published findings reappear here: computed from the numbers, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.edit_comparison.concept import OTHER, OTHER_HELD_OUT, TARGET
from experiments.edit_comparison.figures import mask_points
from experiments.edit_comparison.summary import differences, interval

REWRITING = "rewriting"
LABEL_TUNING = ("fine-tuning, local", "fine-tuning, global")
SPARSE = 0.05
INTERPOLATED = ("1-LI", "PAINT")
MOST = 0.8  # of the curves


@dataclass(frozen=True)
class Finding:
    """One published finding, whether it reappears, and the numbers."""

    claim: str
    verdict: str
    numbers: str

    def markdown(self) -> str:
        """Returns it as a paragraph."""
        return f"**{self.claim}** {self.verdict}. {self.numbers}"


def _shown(values: Sequence[float], unit: str = " points") -> str:
    mean, low, high = interval(values)
    if mean != mean:
        return "no value"
    return f"{mean:+.1f}{unit}" + ("" if low != low else f" [{low:+.1f}, {high:+.1f}]")


def all_findings(
    values: pd.DataFrame,
    edits: pd.DataFrame,
    curves: pd.DataFrame,
    masks: pd.DataFrame,
    notes: Mapping[str, Mapping[str, Any]],
) -> list[Finding]:
    """Returns every finding that is looked for; `notes` say per task which set is to gain and which to stay."""
    kept = {task: str(note["kept"]) for task, note in notes.items()}
    success = {task: str(note["success"]) for task, note in notes.items()}
    return [rewriting(values), concave(curves), sparse_masks(masks, success, kept), ablation(values, edits)]


def rewriting(values: pd.DataFrame) -> Finding:
    """Returns whether rewriting helps classes without exemplars, and fine-tuning on labels hurts them."""
    claim = "Rewriting helps other classes where fine-tuning hurts them."
    gains = differences(values[values["task"] == "concept"], lambda name: name in (TARGET, OTHER, OTHER_HELD_OUT))
    if REWRITING not in set(gains["arm"]):
        return Finding(claim, "Not tested", "Rewriting did not run.")
    texts, helps, hurts = [], [], []
    for network, part in gains.groupby("network", sort=False):
        of = {arm: {name: p["gain"].tolist() for name, p in rows.groupby("set")} for arm, rows in part.groupby("arm")}
        helps.append(interval(of[REWRITING][OTHER]))
        tuned = [arm for arm in LABEL_TUNING if arm in of]
        hurts += [interval(of[arm][OTHER]) for arm in tuned]
        texts += [
            f"{network}, {arm}: target class {_shown(of[arm][TARGET])}, other classes {_shown(of[arm][OTHER])}, other "
            f"classes in held-out textures {_shown(of[arm][OTHER_HELD_OUT])}"
            for arm in (REWRITING, *tuned)
        ]
    first = "rewriting helps other classes" if all(_above(h) for h in helps) else "rewriting does not always help them"
    second = "fine-tuning hurts them" if hurts and all(h[0] < 0 for h in hurts) else "fine-tuning does not hurt them"
    if hurts and any(h[0] < 0 for h in hurts) and not all(h[0] < 0 for h in hurts):
        second = "fine-tuning hurts them in some cases only"
    both = first.endswith("other classes") and second == "fine-tuning hurts them"
    verdict = "Reappears" if both else f"Does not reappear as a whole: {first}; {second}"
    return Finding(claim, verdict, "Change of accuracy on the transformed images: " + "; ".join(texts) + ".")


def _above(found: tuple[float, float, float]) -> bool:
    """Returns whether an interval lies above 0; with one seed, whether the value does."""
    mean, low, _ = found
    return mean > 0 if low != low else low > 0


def concave(curves: pd.DataFrame) -> Finding:
    """Returns whether the way from the original to the edited model bends away from the straight line, to the better.

    Measured in the plane of ordinary and edited accuracy: it does not matter how fast a curve is run through.
    """
    claim = "Interpolation curves are concave."
    moving = curves[curves["moves"]] if len(curves) else curves
    if not len(moving):
        return Finding(claim, "Not tested", "No edit changed a prediction.")
    pairs = zip(moving["original"], moving["edited"], strict=True)
    moving = moving.assign(bend=[100 * over_the_chord(original, edited) for original, edited in pairs])
    published = moving["arm"].isin(INTERPOLATED)
    texts = []
    for name, part in ((" and ".join(INTERPOLATED), moving[published]), ("the other methods", moving[~published])):
        bends = part["bend"].tolist()
        if bends:
            share, inside = float((part["bend"] > 0).mean()), float((part["gain_at_best"] > 0).mean())
            texts.append(
                f"{name}: {_shown(bends)} over {len(bends)} curves, {share:.0%} of them above; in {inside:.0%} the "
                "mean of both accuracies is best between 0 and 1"
            )
    judged = moving[published] if published.any() else moving
    found, share = interval(judged["bend"].tolist()), float((judged["bend"] > 0).mean())
    if _above(found) and share >= MOST:
        verdict = "Reappears"
    elif _above(found):
        verdict = f"Reappears on average, for {share:.0%} of the curves"
    else:
        verdict = "Does not reappear"
    return Finding(claim, verdict, f"Distance over the straight line at inner alphas, mean: {'; '.join(texts)}.")


def over_the_chord(original: Sequence[float], edited: Sequence[float]) -> float:
    """Returns how far the inner points lie, on average, on the better side of the line through the end points."""
    points = np.stack([np.asarray(original), np.asarray(edited)], axis=1)
    chord = points[-1] - points[0]
    length = float(np.hypot(*chord))
    if not length:
        return 0.0
    normal = np.array([-chord[1], chord[0]]) / length
    normal = normal if normal.sum() >= 0 else -normal
    return float(((points[1:-1] - points[0]) @ normal).mean())


def sparse_masks(masks: pd.DataFrame, success: Mapping[str, str], kept: Mapping[str, str]) -> Finding:
    """Returns whether learned masks do better than random ones where few components are tuned.

    Better: the mean of what is gained and what is kept is higher; either alone can be had for the other.
    """
    claim = "Learned masks beat random ones at densities of 5 % and less."
    if not len(masks) or "learned" not in set(masks["mask"]) or "random" not in set(masks["mask"]):
        return Finding(claim, "Not tested", "The mask methods did not run.")
    parts = []
    for keys, part in masks.groupby(["task", "network", "seed", "mask"], sort=False):
        task, network, seed, kind = (str(key) for key in keys)
        points = mask_points(part, success[task], kept[task]).reset_index()
        points["both"] = (points["gained"] + points["kept"]) / 2
        points["job"], points["mask"] = f"{task} {network} {seed}", kind
        parts.append(points)
    columns = ["gained", "kept", "both"]
    wide = 100 * pd.concat(parts).pivot(index=["job", "density"], columns="mask", values=columns)

    def over(other: str, which: str, rows: pd.DataFrame) -> list[float]:
        return [float(value) for value in rows[which]["learned"] - rows[which][other]]

    density = wide.index.get_level_values("density")
    texts = [
        f"density {d:g}: gained {_shown(over('random', 'gained', wide[density == d]))}, kept "
        f"{_shown(over('random', 'kept', wide[density == d]))}"
        for d in sorted(set(density))
    ]
    sparse = wide[density <= SPARSE]
    both = over("random", "both", sparse)
    found = interval(both)
    controls = f"mean of both against random masks {_shown(both)}"
    if "mean" in wide["both"]:
        controls += f", against mean masks {_shown(over('mean', 'both', sparse))}"
    if _above(found):
        verdict = "Reappears"
    elif found[0] > 0:
        verdict = "Reappears on average only: the interval holds 0"
    else:
        verdict = "Does not reappear"
    numbers = (
        "Learned minus random masks, all else equal, per task, network and seed; gained is accuracy on the images that "
        "should become right, kept is ordinary accuracy, or agreement near the boundary: "
        f"{'; '.join(texts)}. At {SPARSE:.0%} and less: {controls}. The hypernetworks were trained for a minute, "
        "not for hours."
    )
    return Finding(claim, verdict, numbers)


def ablation(values: pd.DataFrame, edits: pd.DataFrame) -> Finding:
    """Returns whether ablating components repairs without a training step."""
    claim = "Ablation needs no training."
    mine = edits[edits["method"] == "coar"]
    if not len(mine):
        return Finding(claim, "Not tested", "COAR-Edit did not run.")
    steps = mine["mean_steps"].fillna(0).max()
    labels = set(mine["arm"])
    texts: list[str] = []
    found: list[tuple[float, float, float]] = []
    for task, part in values[values["arm"].isin(labels)].groupby("task", sort=False):
        target = {"cue": "cue disagrees", "concept": OTHER, "confusion": "the rest of its group"}[str(task)]
        gains = differences(part, target.__eq__)["gain"].tolist()
        harm = part[part["metric"] == "ordinary: change, points"]["value"].tolist()
        found.append(interval(gains))
        texts.append(f"{task}: {target} {_shown(gains)}, ordinary images {_shown(harm)}")
    done = f"COAR-Edit took {steps:.0f} training steps"
    sure, helps = sum(map(_above, found)), sum(mean > 0 for mean, _, _ in found)
    if sure == len(found):
        verdict = f"Reappears: {done} and helps in every task"
    elif helps:
        verdict = (
            f"Reappears in part: {done}; it helps on average in {helps} of {len(found)} tasks, with an interval "
            f"above 0 in {sure}"
        )
    else:
        verdict = f"{done}, but does not help"
    return Finding(claim, verdict, "; ".join(texts) + ".")
