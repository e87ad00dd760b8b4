"""Success, generalisation and locality of single-example edits: every edit starts from the unedited model.

Source: Yang et al., Learning where to edit vision Transformers (arXiv 2411.01948), Equations 8 to 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from coar.metrics.checks import Bits, Floats, MetricError, Row, as_classes, metric_row, share
from coar.statistics import mean_interval

Version = Literal["equation", "code"]
VERSIONS = ("equation", "code")


@dataclass(frozen=True, eq=False)
class SuccessRate:
    """How many edited examples the model edited for them predicts as asked.

    Attributes:
      value: successes / edits.
      successes, edits: Counts.
      already_right: Of the edited examples, how many were right before any edit; None: not known.
      per_edit: (edits,) bool.
      protocol: What was counted, in words.
    """

    value: float
    successes: int
    edits: int
    already_right: int | None
    per_edit: Bits
    protocol: str

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap interval (low, high) over edits, see `coar.mean_interval`.

        Where all edits end alike it has no width; with few edits that is no certainty.
        """
        return mean_interval(self.per_edit, level, seed)

    def row(self) -> Row:
        """Returns metric, value, interval, counts and protocol, for a table."""
        return metric_row("success rate", self.value, self.successes, self.edits, self.interval(), self.protocol)


def success_rate(predictions: Any, labels: Any, base: Any = None) -> SuccessRate:
    """Returns the share of edits after which the edited example is predicted as asked. Mutates nothing.

    Args:
      predictions: (edits,) integers: what the model edited for example i predicts for example i.
      labels: (edits,) integers: what it should predict.
      base: (edits,) integers: what the unedited model predicts; only counted.

    Source: Equation 8.
    """
    truth = as_classes("Labels", labels, None)
    _require_edits(len(truth))
    right: Bits = as_classes("Predictions", predictions, len(truth)) == truth
    already = None if base is None else int((as_classes("Base predictions", base, len(truth)) == truth).sum())
    successes = int(right.sum())
    note = "" if already is None else f" Before any edit {already:,} of them were right already."
    protocol = (
        f"Success rate: {successes:,} of {len(truth):,} edited examples are predicted as asked by the model that was "
        f"edited for that one example, each edit from the unedited model; micro-average over edits.{note}"
    )
    return SuccessRate(share(successes, len(truth)), successes, len(truth), already, right, protocol)


@dataclass(frozen=True, eq=False)
class GroupGeneralisation:
    """Generalisation within one group.

    Attributes:
      value: NaN where it is not defined.
      right: Predictions of *other* examples of the group that are right, summed over edits.
      predictions: How many such predictions there are: examples x (examples - 1).
      examples: Size of the group.
      per_edit: (examples,), the share of others that is right, per edit (by the same version as the value).
    """

    value: float
    right: int
    predictions: int
    examples: int
    per_edit: Floats


@dataclass(frozen=True, eq=False)
class GeneralisationRate:
    """How many other examples of a group an edit for one of them corrects.

    Attributes:
      value: Mean over the groups in which it is defined; NaN if there is none.
      groups: The same per group.
      undefined: Names of the groups of one example, which have no others.
      version: `equation` or `code`, see `generalisation_rate`.
      protocol: What was counted, in words.
    """

    value: float
    groups: Mapping[str, GroupGeneralisation]
    undefined: tuple[str, ...]
    version: Version
    protocol: str

    @property
    def right(self) -> int:
        """Right predictions of other examples, over all groups."""
        return sum(group.right for group in self.groups.values())

    @property
    def predictions(self) -> int:
        """Predictions of other examples, over all groups."""
        return sum(group.predictions for group in self.groups.values())

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap interval over groups; over edits where only one group defines the rate."""
        defined = [group for group in self.groups.values() if np.isfinite(group.value)]
        if len(defined) == 1:
            return mean_interval(defined[0].per_edit, level, seed)
        return mean_interval([group.value for group in defined], level, seed)

    def row(self) -> Row:
        """Returns metric, value, interval, counts and protocol, for a table."""
        name = "generalisation rate" + (" (published code)" if self.version == "code" else "")
        return metric_row(name, self.value, self.right, self.predictions, self.interval(), self.protocol)


def generalisation_rate(groups: Mapping[str, tuple[Any, Any]], *, version: Version = "equation") -> GeneralisationRate:
    """Returns the share of a group's other examples that an edit for one of them makes right. Mutates nothing.

    Args:
      groups: Per group (predictions, labels): predictions (examples, examples) integers, row e by the model edited for
        example e of the group, for all examples of the group in the same order; labels (examples,).
      version: `equation` counts the others only, right / (n (n - 1)). `code` is what the published code computes,
        (right - 1) / n with the edited example itself among the right ones: lower by (n - 1) / n, and by another 1 / n
        after an edit that failed.

    Source: Equation 9; averaged over groups, each counted once.
    """
    if version not in VERSIONS:
        raise MetricError(f"version is {version!r}, expected 'equation' or 'code'.")
    if not groups:
        raise MetricError("There is no group. Give the predictions of at least one group.")
    found = {str(name): _generalisation(name, *pair, version) for name, pair in groups.items()}
    undefined = tuple(name for name, group in found.items() if not np.isfinite(group.value))
    defined = [group.value for group in found.values() if np.isfinite(group.value)]
    right, count = sum(g.right for g in found.values()), sum(g.predictions for g in found.values())
    how = (
        "others of the same group that are right, the edited example left out (Equation 9)"
        if version == "equation"
        else "as in the published code: (right ones of the group with the edited example - 1) / size of the group"
    )
    left_out = f" Without others, so left out: {', '.join(undefined)}." if undefined else ""
    protocol = (
        f"Generalisation rate: share of {how}; {right:,} of {count:,} predictions of other examples are right; mean "
        f"per group, then macro-average over {len(defined):,} groups.{left_out}"
    )
    return GeneralisationRate(float(np.mean(defined)) if defined else float("nan"), found, undefined, version, protocol)


def _generalisation(name: str, predictions: Any, labels: Any, version: Version) -> GroupGeneralisation:
    truth = as_classes(f"Labels of group {name!r}", labels, None)
    n = len(truth)
    _require_edits(n)
    right = as_classes(f"Predictions of group {name!r}", predictions, n, n) == truth
    others = (right.sum(axis=1) - np.diagonal(right)).astype(np.int64)
    per_edit = np.full(n, np.nan)
    if version == "code":
        per_edit = (right.sum(axis=1) - 1) / n
    elif n > 1:
        per_edit = others / (n - 1)
    return GroupGeneralisation(float(per_edit.mean()), int(others.sum()), n * (n - 1), n, per_edit)


@dataclass(frozen=True, eq=False)
class LocalityRate:
    """How far edits leave alone what they should not change. Two numbers, never mixed up.

    Attributes:
      agreement: Share of predictions that are those of the *unedited model*; `value` is this.
      accuracy: Share of predictions that are the *label* (Equation 10 as printed).
      base_accuracy: Share of the examples the unedited model has right.
      agreeing, right: Counts, of `predictions`.
      predictions: edits x examples.
      edits, examples: Counts.
      per_edit: (edits,), agreement of each edit.
      by_group: Mean agreement of the edits of each group; empty where groups were not given.
      protocol: What was counted, in words.
    """

    agreement: float
    accuracy: float
    base_accuracy: float
    agreeing: int
    right: int
    edits: int
    examples: int
    per_edit: Floats
    by_group: Mapping[str, float]
    protocol: str

    @property
    def value(self) -> float:
        """The agreement with the unedited model."""
        return self.agreement

    @property
    def predictions(self) -> int:
        """How many there are: edits x examples."""
        return self.edits * self.examples

    @property
    def group_average(self) -> float:
        """Agreement averaged over groups, each counted once, as the published code does; NaN without groups."""
        return float(np.mean(list(self.by_group.values()))) if self.by_group else float("nan")

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap interval (low, high) of the agreement, over edits."""
        return mean_interval(self.per_edit, level, seed)

    def rows(self) -> list[Row]:
        """Returns two rows for a table, agreement and accuracy; the accuracy's interval is not computed (NaN)."""
        nothing = float("nan"), float("nan")
        counts = self.predictions, self.interval(), self.protocol
        return [
            metric_row("locality (agreement)", self.agreement, self.agreeing, *counts),
            metric_row("locality (accuracy)", self.accuracy, self.right, self.predictions, nothing, self.protocol),
        ]


def locality_rate(predictions: Any, base: Any, labels: Any, groups: Sequence[str] | None = None) -> LocalityRate:
    """Returns how often edited models predict ordinary examples as before, and how often rightly. Mutates nothing.

    Args:
      predictions: (edits, examples) integers: row e by the model of edit e.
      base: (examples,) integers: the unedited model's predictions.
      labels: (examples,) integers.
      groups: The group of each edit, for averages per group.

    Returns:
      NaN for all rates where there are no examples.
    Source: Equation 10 (accuracy); the published code computes agreement. Both are equal if the unedited model is right
      on every example.
    """
    truth = as_classes("Locality labels", labels, None)
    before = as_classes("Base predictions", base, len(truth))
    after = as_classes("Locality predictions", predictions, None, len(truth))
    _require_edits(len(after))
    if groups is not None and len(groups) != len(after):
        raise MetricError(f"There are {len(groups)} groups for {len(after)} edits. Give the group of each edit.")
    same, right = after == before, after == truth
    agreeing, correct, total = int(same.sum()), int(right.sum()), after.size
    per_edit = same.mean(axis=1) if len(truth) else np.full(len(after), np.nan)
    names = np.asarray([] if groups is None else [str(group) for group in groups], dtype=object)
    by_group = {str(name): float(per_edit[names == name].mean()) for name in dict.fromkeys(names.tolist())}
    unedited = int((before == truth).sum())
    protocol = (
        f"Locality: {agreeing:,} of {total:,} predictions ({len(after):,} edits x {len(truth):,} ordinary examples) "
        f"are those of the unedited model (agreement), and {correct:,} are the label (accuracy; the unedited model has "
        f"{unedited:,} of {len(truth):,} right); micro-average over edits."
    )
    return LocalityRate(
        agreement=share(agreeing, total),
        accuracy=share(correct, total),
        base_accuracy=share(unedited, len(truth)),
        agreeing=agreeing,
        right=correct,
        edits=len(after),
        examples=len(truth),
        per_edit=per_edit,
        by_group=by_group,
        protocol=protocol,
    )


def _require_edits(count: int) -> None:
    if not count:
        raise MetricError("There are no edits. Give the predictions of at least one edit.")
