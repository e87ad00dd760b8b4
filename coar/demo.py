"""The main job on real input: ablate, store, attribute, ask, edit, report. What `coar demo` and `make demo` run."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

import ablate
from ablate import CampaignSpec, Engine, Examples
from ablate.digits import CLASSES, MINORITY_GROUPS, digits_split
from ablate.outputs import predictions_correct
from coar.attributions.attributions import Attributions
from coar.editing.coar_edit.ranking import rank_components, sweep_edit_size
from coar.editing.edits.edit import Edit
from coar.estimators.regression.fit import fit
from coar.judging.evaluate import Evaluation, evaluate
from coar.metrics import GroupAccuracy, group_accuracy
from coar.report import plots
from coar.report.html import Section, edit_section, provenance_section, quality_section, write_report
from stores.storage.places import user_path

EDIT_SIZES = tuple(range(0, 81, 5))
CURVE_LENGTH = 20
QUICK_ROWS, QUICK_PER_GROUP = 300, 5  # some seconds: enough to see everything, too little to believe it
FRESH_SEED = 1_000_003  # added to the campaign's: the keep-vectors that judge are never those that were fitted

Say = Callable[[str, pd.DataFrame | None], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: figures to print and compare, paths to open."""

    attributions: Attributions
    evaluation: Evaluation
    edit: Edit
    before: GroupAccuracy
    after: GroupAccuracy
    report: Path
    timings: dict[str, float] = field(default_factory=dict)


def demo_spec(out: str | os.PathLike[str] = "runs/demo", seed: int = 0, quick: bool = False) -> CampaignSpec:
    """Returns the spec in `coar/demo.toml`, for another folder or seed if asked; quick: few keep-vectors and images."""
    values = tomllib.loads(files("coar").joinpath("demo.toml").read_text(encoding="utf-8"))
    values["seed"] = values["model"]["seed"] = values["data"]["seed"] = seed
    if quick:
        values["rows"] = QUICK_ROWS
        values["data"]["train_per_group"] = values["data"]["test_per_group"] = QUICK_PER_GROUP
    values["store"] = str(user_path(out) / "campaign.zarr")
    values["model"]["cache"] = str(user_path(out) / "model.safetensors")
    return CampaignSpec(where="coar/demo.toml", **values)


def run_demo(
    out: str | os.PathLike[str], seed: int, say: Say, progress: bool = True, quick: bool = False
) -> DemoResult:
    """Runs the main job into the folder `out`, reusing what is finished there, and returns what it found."""
    folder, timings = user_path(out), dict[str, float]()
    with _timed(timings, "train or load the model"):
        spec = demo_spec(out, seed, quick)
        model, examples = spec.load()
    unedited = _accuracy(model, digits_split("test", seed))
    if quick:
        say(
            f"This is the quick demo: {QUICK_ROWS} keep-vectors x {len(examples)} images. Its attributions are rough; "
            "leave --quick out for those worth looking at.",
            None,
        )
    say(
        f"1-2. Handwritten digits ({', '.join(CLASSES)}) over stripes that agree with the label in 95 % of the "
        f"training images. The network: {unedited.average:.1%} right on test images, but only "
        f"{unedited.worst:.1%} in its worst group, {unedited.worst_group}.",
        None,
    )
    with _timed(timings, "campaign"):
        campaign = ablate.run(spec, progress=progress)
    say(
        f"3. Campaign: {campaign.rows:,} keep-vectors x {campaign.example_count} images, {campaign.component_count} "
        f"filters -> {campaign.where}",
        None,
    )
    with _timed(timings, "fit"):
        attributions = fit(campaign, folder / "attributions.zarr", overwrite=True, progress=progress)
    engine = Engine(model, attributions.index)
    with _timed(timings, "evaluate"):
        evaluation = evaluate(attributions, engine, examples, seed=seed + FRESH_SEED)
    say(
        f"4. Attributions -> {attributions.store.where}. Held-out counterfactual correlation, mean over "
        f"{len(attributions)} images: {attributions.quality['correlation'].mean():.3f} on the campaign's held-out "
        f"rows, {evaluation.summary()['mean']:.3f} on {evaluation.rows} fresh keep-vectors.",
        None,
    )
    question = _ask(attributions, engine, examples, folder, say)
    with _timed(timings, "edit"):
        edit, after, repair = _repair(attributions, engine, model, seed, unedited)
    edit.save(folder / "edit.safetensors")
    say(
        f"6. COAR-Edit ablates {len(edit.selection)} of {len(attributions.index)} filters (chosen on validation "
        f"images). Worst group {unedited.worst:.1%} -> {after.worst:.1%}, average {unedited.average:.1%} -> "
        f"{after.average:.1%}. Saved: {folder / 'edit.safetensors'}",
        _before_after(unedited, after),
    )
    report = write_report(
        folder / "report.html",
        "Which filters look at the background?",
        "Component attribution and repair of a digit classifier with a spurious cue.",
        [
            question,
            repair,
            edit_section(edit),
            quality_section(attributions),
            _fresh_section(attributions, evaluation),
            provenance_section(attributions, timings),
        ],
    )
    say(f"7. Report: {report}", None)
    return DemoResult(attributions, evaluation, edit, unedited, after, report, timings)


def ablation_curve(
    attributions: Attributions, engine: Engine, examples: Examples, example: int, length: int
) -> pd.DataFrame:
    """Returns the predicted and actual output of one example as its strongest components are ablated one after another.

    Returns:
      Columns ablated (0 to length), predicted, actual. Cost: length + 1 forwards of one example.
    """
    order = attributions.top(example, length)["component"].to_numpy()
    keep = np.ones((length + 1, len(attributions.index)), dtype=np.bool_)
    for n in range(1, length + 1):
        keep[n:, order[n - 1]] = False
    return pd.DataFrame(
        {
            "ablated": range(length + 1),
            "predicted": attributions.predict(keep, [example])[:, 0],
            "actual": engine.outputs(keep, examples.take([example])).numpy()[:, 0],
        }
    )


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[step] = time.perf_counter() - start


def _accuracy(model: nn.Module, examples: Examples) -> GroupAccuracy:
    index = ablate.ComponentIndex.from_model(model)
    everything_kept = np.ones((1, len(index)), dtype=np.bool_)
    margins = Engine(model, index).outputs(everything_kept, examples)[0]
    return group_accuracy(predictions_correct(margins).numpy(), examples.groups)


def _question(engine: Engine, attributions: Attributions, examples: Examples) -> tuple[int, float]:
    """Returns the first misclassified test image of the minority groups (or their first), and its margin."""
    everything_kept = np.ones((1, len(attributions.index)), dtype=np.bool_)
    margins = engine.outputs(everything_kept, examples)[0]
    asked = [i for group in MINORITY_GROUPS for i in attributions.group(group, "test/")]
    chosen = next((i for i in asked if margins[i] <= 0), asked[0])
    return chosen, float(margins[chosen])


def _ask(attributions: Attributions, engine: Engine, examples: Examples, folder: Path, say: Say) -> Section:
    """Says which components matter most to one test image, draws them, and returns both for the report."""
    question, margin = _question(engine, attributions, examples)
    verdict = "misclassified" if margin <= 0 else "classified correctly"
    image_id, group = attributions.examples.loc[question, ["id", "group"]]
    top = attributions.top(question).drop(columns="module")
    say(
        f"5. Image {question}, {image_id} ({group}), is {verdict} (margin {margin:.2f}). The components that matter "
        "most to it:",
        top,
    )
    curve = ablation_curve(attributions, engine, examples, question, CURVE_LENGTH)
    figure = plots.top_components(attributions, question, examples.input(question)[0].numpy(), curve)
    figure.savefig(folder / "top_components.png", dpi=120)
    return Section(
        "The question",
        text=[
            f"{image_id} is {verdict} with a margin of {margin:.2f}. Which filters did that, and is the answer right "
            "when they are really ablated?"
        ],
        tables={"Its strongest components": top},
        figures={"The image, its components, and the test of the attribution": figure},
    )


def _repair(
    attributions: Attributions, engine: Engine, model: nn.Module, seed: int, before: GroupAccuracy
) -> tuple[Edit, GroupAccuracy, Section]:
    """Returns the edit (ranked on training, sized on validation images), its test accuracy, and both for the report."""
    groups = sorted(set(attributions.examples["group"]))
    target = [i for g in MINORITY_GROUPS for i in attributions.group(g, "train/")]
    reference = [i for g in groups if g not in MINORITY_GROUPS for i in attributions.group(g, "train/")]
    ranking = rank_components(attributions, target, reference, "raise")
    sweeps = {
        split: sweep_edit_size(ranking, engine, digits_split(split, seed), EDIT_SIZES)
        for split in ("validation", "test")
    }
    candidates = sweeps["validation"].iloc[1:]  # k = 0 is no edit
    best = candidates.sort_values(["worst", "average", "k"], ascending=[False, False, True]).iloc[0]
    edit = ranking.edit(int(best["k"]))
    after = _accuracy(edit.apply(model, share=True), digits_split("test", seed))
    each = len(target) // len(MINORITY_GROUPS)
    return edit, after, _repair_section(before, after, sweeps, len(edit.selection), each)


def _before_after(before: GroupAccuracy, after: GroupAccuracy) -> pd.DataFrame:
    names = [*before.groups, "worst group", "average"]
    old = [*before.groups.values(), before.worst, before.average]
    new = [*after.groups.values(), after.worst, after.average]
    sizes = [*before.sizes.values(), "", sum(before.sizes.values())]
    points = [100 * (b - a) for a, b in zip(old, new, strict=True)]
    return pd.DataFrame({"test group": names, "images": sizes, "before": old, "after": new, "points": points})


def _repair_section(
    before: GroupAccuracy, after: GroupAccuracy, sweeps: dict[str, pd.DataFrame], k: int, each: int
) -> Section:
    return Section(
        "The repair",
        text=[
            f"Worst group {before.worst:.1%} -> {after.worst:.1%}, average {before.average:.1%} -> {after.average:.1%} "
            f"on test images. Targets are {each} training images of each group where cue and label disagree, "
            f"references {each} of each where they agree; k was chosen on validation images, the test curve is shown "
            "for information only."
        ],
        tables={"Test accuracy": _before_after(before, after)},
        figures={
            "Accuracy per group": plots.group_bars(before, after),
            "Accuracy against the number of ablated components": plots.edit_sweep(sweeps, k),
        },
    )


def _fresh_section(attributions: Attributions, evaluation: Evaluation) -> Section:
    finite = np.argsort(np.nan_to_num(evaluation.correlations, nan=-1.0))
    shown = [int(finite[int(q * (len(finite) - 1))]) for q in (0.0, 0.25, 0.5, 1.0)]
    summary: Any = evaluation.summary()
    return Section(
        "Fresh keep-vectors",
        text=[
            f"{evaluation.rows} keep-vectors that were never fitted, {evaluation.ablate_fraction:.0%} ablated in each."
        ],
        tables={"Correlation of predicted with actual outputs": summary.to_frame().T},
        figures={
            "The worst, lower-quartile, median and best predicted image": plots.predicted_against_actual(
                evaluation.predicted[:, shown],
                evaluation.actual[:, shown],
                [f"{attributions.examples['id'][i]}\nr = {evaluation.correlations[i]:.3f}" for i in shown],
            )
        },
    )
