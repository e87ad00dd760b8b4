"""COAR-Edit: ablate the components whose attributions differ most between target and reference examples.

Source: COAR (arXiv 2404.11534), Section 5: a t-statistic per component of the attributions of target against reference
examples; ablate the k smallest to raise the target's output relative to the reference's, the k largest to lower it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from ablate import ComponentIndex, Engine, Examples, Margin, Selection
from ablate.outputs import predictions_correct
from coar.attributions.attributions import OTHER_UNITS, Attributions
from coar.attributions.same_subject import engine_differences, listed
from coar.editing.edits.edit import Edit
from coar.editing.given import ExamplesLike, as_examples, as_positions
from coar.errors import EditError
from coar.metrics import group_accuracy

Direction = Literal["raise", "lower"]
Statistic = Literal["t", "difference"]
Floats = npt.NDArray[np.float64]
Positions = Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor

NO_VARIANCE = (
    "ranked by the difference of the mean attributions: the examples of a set do not vary, so there is no t. Give more "
    "examples to rank by t"
)
ROUNDING = float(np.finfo(np.float32).eps)  # attributions are float32: what varies by less, relatively, does not vary


def coar_scores(target: npt.ArrayLike, reference: npt.ArrayLike, ddof: int = 0) -> Floats:
    """Returns per component the t-statistic of target against reference attributions. Mutates nothing; always finite.

    `(mean_T - mean_R) / sqrt(var_T / n_T + var_R / n_R)`. Where no component varies within a set (one example each, or
    the same example again and again) there is no such statistic: then it is the difference `mean_T - mean_R`. Where
    only some do not vary, their denominator is the rounding of float32 at the largest attribution.

    Args:
      target, reference: Attributions (examples, components), finite, at least one example each.
      ddof: 0: variances divided by n, as in the published code, so that one target example is enough. 1: by n - 1,
        Welch's statistic of the textbooks; needs two examples each.

    Raises:
      EditError: Another shape, values that are not finite, other components, or too few examples.
    """
    return _scored(target, reference, ddof)[0]


def _scored(target: npt.ArrayLike, reference: npt.ArrayLike, ddof: int) -> tuple[Floats, Statistic]:
    """Returns what `coar_scores` does, and which of the two statistics it is."""
    if ddof not in (0, 1):
        raise EditError(f"ddof is {ddof}, expected 0 (variances divided by n) or 1 (by n - 1).")
    t, r = np.asarray(target, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    for name, value in (("target", t), ("reference", r)):
        if value.ndim != 2 or not len(value):
            raise EditError(
                f"The {name} set has shape {value.shape}, expected (examples, components) with at least one example."
            )
        if not np.isfinite(value).all():
            example, component = np.argwhere(~np.isfinite(value))[0]
            raise EditError(f"The attribution of {name} example {example}, component {component} is not finite.")
        if len(value) <= ddof:
            raise EditError(
                f"The {name} set has 1 example, and a variance divided by n - 1 needs 2. Give more, or ddof=0."
            )
    if t.shape[1] != r.shape[1]:
        raise EditError(f"Target has {t.shape[1]} components, reference {r.shape[1]}: they belong to different models.")
    difference = t.mean(axis=0) - r.mean(axis=0)
    spread = np.sqrt(t.var(axis=0, ddof=ddof) / len(t) + r.var(axis=0, ddof=ddof) / len(r))
    rounding = ROUNDING * max(np.abs(t).max(initial=0.0), np.abs(r).max(initial=0.0))
    if (spread <= rounding).all():
        return np.where(np.abs(difference) <= rounding, 0.0, difference), "difference"
    return difference / np.maximum(spread, rounding), "t"


@dataclass(frozen=True)
class Ranking:
    """Components in the order in which COAR-Edit ablates them: all of an index, unless `within` chose some.

    Attributes:
      index: The components' index.
      ids: Component ids, first to be ablated first; ties by id.
      scores: The statistic of each, in the same order.
      direction: `raise` or `lower`: what ablating does to the target's output, relative to the reference's.
      target_weights, reference_weights: Mean attribution of each, in the same order: what ablating takes away.
      base: Hash of the model's weights; "" where it is not known.
      target, reference: Positions of the examples that were compared.
      in_output_units: Whether the attributions are in units of the output: else no change of it is predicted.
      statistic: What the scores are: `t`, or `difference` of the means where there is no variance to divide by.
      of: What the attributions are about, as far as it is known.
    """

    index: ComponentIndex
    ids: tuple[int, ...]
    scores: Floats
    direction: Direction
    target_weights: Floats
    reference_weights: Floats
    base: str
    target: tuple[int, ...]
    reference: tuple[int, ...]
    in_output_units: bool = True
    statistic: Statistic = "t"
    of: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def require_engine(self, engine: Engine, examples: Examples) -> None:
        """Raises EditError, naming each key, unless an engine is of the model, output and ablation of this ranking."""
        if engine.index != self.index:
            raise EditError(f"The engine has index {engine.index.hash[:12]}, the ranking {self.index.hash[:12]}.")
        if not isinstance(engine.output, Margin):
            raise EditError(
                f"The engine's output is {engine.output.name!r}, expected 'margin': accuracy is margin > 0."
            )
        about = {key: value for key, value in self.of.items() if key not in ("output", "output_settings")}
        found = engine_differences({"model": self.base or None, **about}, engine, examples)
        if found:
            raise EditError(
                f"The engine runs something else than the ranking is about. What differs (ranking -> engine):\n"
                f"{listed(found)}\nGive an engine of the same, unedited model and ablation."
            )

    def within(self, selection: Selection) -> Ranking:
        """Returns this ranking of some components only: the others are never ablated.

        Raises:
          EditError: The selection is of another index.
        """
        if selection.index != self.index:
            raise EditError(
                f"The selection is of index {selection.index.hash[:12]} ({len(selection.index):,} components), the "
                f"attributions of {self.index.hash[:12]} ({len(self.index):,}). Select with attributions.index."
            )
        chosen = np.array([component in selection for component in self.ids], dtype=np.bool_)
        return replace(
            self,
            ids=tuple(component for component in self.ids if component in selection),
            scores=self.scores[chosen],
            target_weights=self.target_weights[chosen],
            reference_weights=self.reference_weights[chosen],
        )

    def keep(self, k: int) -> npt.NDArray[np.bool_]:
        """Returns the keep-vector (components,) in which the first k components are ablated; k = 0: none."""
        keep = np.ones(len(self.index), dtype=np.bool_)
        keep[list(self.ids[:k])] = False
        return keep

    def edit(self, k: int) -> Edit:
        """Returns the edit that ablates the first k components."""
        k = _size(k, 1, len(self.ids))
        details: dict[str, Any] = {
            "direction": self.direction,
            "k": k,
            "ids_in_order": list(self.ids[:k]),
            "scores": [float(score) for score in self.scores[:k]],
            "statistic": self.statistic,
            "target": list(self.target),
            "reference": list(self.reference),
        }
        if self.in_output_units:  # what the attributions expect: the reference's change is the harm done
            details["predicted_change_target"] = -float(self.target_weights[:k].sum())
            details["predicted_change_reference"] = -float(self.reference_weights[:k].sum())
        else:
            details["weights"] = OTHER_UNITS
        if self.of.get("weights"):
            details["model_weights"] = self.of["weights"]
        return Edit(self.index.select(self.ids[:k]), base=self.base, method="COAR-Edit", details=details)


def rank_components(
    attributions: Attributions,
    target: Positions,
    reference: Positions,
    direction: Direction = "raise",
    ddof: int = 0,
) -> Ranking:
    """Returns the order in which COAR-Edit ablates the components. Mutates nothing.

    Args:
      attributions: Of the model to edit.
      target: Positions of the examples whose output should change.
      reference: Positions of the examples whose output should stay.
      direction: `raise` or `lower` the target's output.
      ddof: As for `coar_scores`.

    Raises:
      EditError: An empty or repeated set, an example in both, or a direction that is neither.
    """
    if direction not in ("raise", "lower"):
        raise EditError(f"direction is {direction!r}, expected 'raise' or 'lower'.")
    target, reference = (
        as_positions(given, name, len(attributions)) for name, given in (("target", target), ("reference", reference))
    )
    both = sorted(set(target) & set(reference))
    if both:
        raise EditError(f"Examples {both[:5]} are in target and reference: each example can be in one only.")
    without = sorted(attributions.lacking & {*map(int, target), *map(int, reference)})
    if without:
        raise EditError(
            f"Example {without[0]} has no attribution: its numbers in the imported file are not finite. Leave it out."
        )
    weights = (attributions.weights[np.asarray(positions)] for positions in (target, reference))
    ranking = rank_weights(
        attributions.index,
        *weights,
        direction=direction,
        base=attributions.header["identity"]["of"]["model"],
        target=target,
        reference=reference,
        ddof=ddof,
        of=attributions.header["identity"]["of"],
    )
    return replace(ranking, in_output_units=attributions.in_output_units)


def predicted_change(details: Mapping[str, Any]) -> str:
    """Returns what an edit's attributions expect of it, as a sentence without a full stop; "" if they say nothing."""
    if "predicted_change_target" in details:
        target, reference = details["predicted_change_target"], details["predicted_change_reference"]
        how = "" if details.get("statistic", "t") == "t" else f". Components are {NO_VARIANCE}"
        return f"Predicted change of the mean output: target {target:+.3f}, reference {reference:+.3f}{how}"
    if "weights" in details:
        return f"No change of the output is predicted: the attributions are {details['weights']}"
    return ""


def rank_weights(
    index: ComponentIndex,
    target_weights: npt.ArrayLike,
    reference_weights: npt.ArrayLike,
    *,
    direction: Direction,
    base: str,
    target: Sequence[int],
    reference: Sequence[int],
    ddof: int = 0,
    of: Mapping[str, Any] | None = None,
) -> Ranking:
    """Returns the order in which COAR-Edit ablates the components, from attributions as arrays. Mutates nothing.

    Args:
      index: Of the components.
      target_weights, reference_weights: (examples, components).
      direction: `raise` or `lower` the target's output.
      base: Hash of the model's weights; "" where it is not known.
      target, reference: Positions of the examples, to be noted.
      ddof: As for `coar_scores`.

    Raises:
      EditError: What `coar_scores` raises, or no component's mean differs.
      of: What the attributions are about, if they are from a store: engines are compared with it.
    """
    t, r = np.asarray(target_weights, dtype=np.float64), np.asarray(reference_weights, dtype=np.float64)
    scores, statistic = _scored(t, r, ddof)
    if not scores.any():
        raise EditError(
            f"Target and reference have the same mean attribution in all {len(scores):,} components: nothing tells "
            "them apart. Give other examples, or attributions of more passes or rows."
        )
    order = np.argsort(scores if direction == "raise" else -scores, kind="stable")
    return Ranking(
        index=index,
        ids=tuple(int(i) for i in order),
        scores=scores[order],
        direction=direction,
        target_weights=t.mean(axis=0)[order],
        reference_weights=r.mean(axis=0)[order],
        base=base,
        target=tuple(int(p) for p in target),
        reference=tuple(int(p) for p in reference),
        statistic=statistic,
        of=dict(of or {}),
    )


def coar_edit(
    attributions: Attributions,
    target: Positions,
    reference: Positions,
    k: int = 20,
    direction: Direction = "raise",
) -> Edit:
    """Returns the edit that ablates the k components COAR-Edit ranks first. Mutates nothing; no forward passes.

    Its `details` hold the ranking and the predicted change of target and of reference: the latter is the harm.

    Args:
      attributions: Of the model to edit.
      target: Positions of the examples whose output should change.
      reference: Positions of the examples whose output should stay.
      k: Number of components to ablate.
      direction: `raise` or `lower` the target's output.

    Raises:
      EditError: k out of range, an empty set, an example in both sets, or equal attributions in all components.
    """
    return rank_components(attributions, target, reference, direction).edit(k)


def _size(k: Any, least: int, most: int) -> int:
    """Returns how many components to ablate, an integer of any library; raises EditError for anything else."""
    try:
        size = None if isinstance(k, (bool, np.bool_)) else operator.index(k)
    except TypeError:
        size = None
    if size is None or not least <= size <= most:
        got = repr(k) if size is None else size
        raise EditError(f"k is {got}, expected an integer from {least} to {most}, the number of components.")
    return size


def sweep_edit_size(ranking: Ranking, engine: Engine, examples: ExamplesLike, sizes: Sequence[int]) -> pd.DataFrame:
    """Returns group accuracies on `examples` when the first k components are ablated, for each k. Mutates nothing.

    k = 0 is the unedited model. Choose k here, on examples that are used for nothing else.

    Args:
      ranking: From `rank_components`.
      engine: The unedited model, with output `margin`.
      examples: With groups; e.g. the validation split.
      sizes: The k to try.

    Returns:
      One row per k: k, worst (group accuracy), worst_group, average, group_average.

    Cost: one forward pass over the examples per k.
    """
    examples = as_examples(examples, "examples")
    ranking.require_engine(engine, examples)
    sizes = [_size(k, 0, len(ranking.ids)) for k in sizes]
    keep = np.ones((len(sizes), len(ranking.index)), dtype=np.bool_)
    for row, k in enumerate(sizes):
        keep[row] = ranking.keep(k)
    correct = predictions_correct(engine.outputs(keep, examples)).numpy()
    results = [group_accuracy(correct[row], examples.groups) for row in range(len(sizes))]
    return pd.DataFrame(
        {
            "k": list(sizes),
            "worst": [result.worst for result in results],
            "worst_group": [result.worst_group for result in results],
            "average": [result.average for result in results],
            "group_average": [result.group_average for result in results],
        }
    )
