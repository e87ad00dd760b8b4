"""The sets an editing benchmark is made of: failures to edit, and ordinary examples near a decision boundary.

Source: Yang et al., Learning where to edit vision Transformers (arXiv 2411.01948), Section 4.1 and Appendix A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ablate import Examples
from coar.errors import EditError
from coar.metrics.checks import as_classes

GAP = 0.05
LEAST = 2  # examples of a group: with one there is nothing to generalise to

Positions = npt.NDArray[np.int64]
Scores = Literal["logits", "probabilities"]


@dataclass(frozen=True, eq=False)
class BoundarySet:
    """Ordinary examples that a model has right, but only just: what a careless edit breaks first.

    Attributes:
      positions: Of the examples chosen, rising.
      gaps: (examples,), top probability minus the second, of all examples given.
      examples, right, tied: How many were given; had the label on top; had two classes on top, and so no prediction.
      protocol: How they were chosen, in words.
    """

    positions: Positions
    gaps: npt.NDArray[np.float64]
    examples: int
    right: int
    tied: int
    protocol: str


def boundary_set(scores: Any, labels: Any, gap: float = GAP, kind: Scores = "logits") -> BoundarySet:
    """Returns which examples the model has right with a probability less than `gap` above the second. Mutates nothing.

    Args:
      scores: (examples, classes), of the *unedited* model; for a restricted task, the columns of its classes only.
      labels: (examples,), columns of `scores`.
      gap: What the two largest probabilities must differ by less than.
      kind: `logits` go through a softmax over the columns given; `probabilities` are taken as they are.

    Raises:
      EditError: Another shape, NaN, a label beyond the columns, or "probabilities" outside of 0 to 1.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] < 2:
        raise EditError(f"Scores have shape {found.shape}, expected (examples, classes) with at least 2 classes.")
    truth = as_classes("Labels", labels, len(found))
    if np.isnan(found).any():
        raise EditError(f"The scores of example {int(np.isnan(found).any(axis=1).argmax())} hold NaN.")
    if truth.size and int(truth.max()) >= found.shape[1]:
        raise EditError(f"Labels hold {int(truth.max())}, the scores have classes 0 to {found.shape[1] - 1}.")
    if not 0 < gap <= 1:
        raise EditError(f"gap is {gap}, expected a difference of probabilities above 0, at most 1.")
    if kind not in ("logits", "probabilities"):
        raise EditError(f"kind is {kind!r}, expected 'logits' or 'probabilities'.")
    p = _softmax(found) if kind == "logits" else found
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise EditError(f"Probabilities run from {p.min():g} to {p.max():g}, expected 0 to 1. Are these logits?")
    top = np.sort(found, axis=1)[:, -2:]  # of the scores: two probabilities may round to one number
    tie = top[:, 0] == top[:, 1]
    gaps = np.diff(np.sort(p, axis=1)[:, -2:], axis=1)[:, 0]
    right = (found.argmax(axis=1) == truth) & ~tie
    positions = np.flatnonzero(right & (gaps < gap))
    protocol = (
        f"Boundary set: {len(positions):,} of {len(found):,} examples, those whose label is the top class of the "
        f"unedited model ({int(right.sum()):,}) with a probability less than {gap:g} above the second class (of "
        f"{found.shape[1]:,} classes); {int(tie.sum()):,} examples with two classes on top are left out."
    )
    return BoundarySet(positions, gaps, len(found), int(right.sum()), int(tie.sum()), protocol)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    normalised: npt.NDArray[np.float64] = exponents / exponents.sum(axis=1, keepdims=True)
    return normalised


def failures(predictions: Any, labels: Any) -> Positions:
    """Returns the positions of the examples whose prediction is not their label, rising. Mutates nothing.

    Whatever the wrong class is: a group of one confusion still holds examples mistaken for something else.
    """
    truth = as_classes("Labels", labels, None)
    return np.flatnonzero(as_classes("Predictions", predictions, len(truth)) != truth)


@dataclass(frozen=True, eq=False)
class FailureGroups:
    """Groups of examples that a model has wrong, to be edited.

    Attributes:
      groups: Per group the failures, in their order.
      dropped: Per group left out how many failures it has: fewer than 2.
      right: Per group how many examples the model has right: left out, there is nothing to edit.
      protocol: What was chosen, in words.
    """

    groups: Mapping[str, Examples]
    dropped: Mapping[str, int]
    right: Mapping[str, int]
    protocol: str


def failure_groups(groups: Mapping[str, Examples], predictions: Mapping[str, Any]) -> FailureGroups:
    """Returns of each group what the unedited model has wrong, without groups of fewer than 2 failures.

    Args:
      groups: Examples per group.
      predictions: Per group the unedited model's, (examples,) integers, e.g. of `predictions`.

    Raises:
      EditError: A group without predictions.
    """
    kept: dict[str, Examples] = {}
    dropped: dict[str, int] = {}
    right: dict[str, int] = {}
    for name, examples in groups.items():
        if name not in predictions:
            raise EditError(f"There are no predictions for group {name!r}. Give those of every group.")
        wrong = failures(predictions[name], examples.targets.numpy())
        right[name] = len(examples) - len(wrong)
        if len(wrong) < LEAST:
            dropped[name] = len(wrong)
        else:
            kept[name] = examples.take(wrong)
    total = sum(len(examples) for examples in kept.values())
    named = ", ".join(f"{name} ({count})" for name, count in dropped.items())
    left_out = f" Left out, with fewer than {LEAST} failures: {named}." if dropped else ""
    protocol = (
        f"Edited are {total:,} examples in {len(kept):,} groups: all those the unedited model has wrong, whatever the "
        f"wrong class.{left_out}"
    )
    return FailureGroups(kept, dropped, right, protocol)


def reject_duplicates(edited: Mapping[str, Examples], ordinary: Mapping[str, Examples]) -> None:
    """Raises EditError if an input is twice in a group that is edited, or also among ordinary examples. Else nothing.

    Compared is the content of inputs, bit by bit, not ids. Cost: one pass over all inputs.
    """
    seen: dict[str, tuple[str, str]] = {}
    for group, examples in edited.items():
        own: dict[str, str] = {}
        for key, name in zip(content_hashes(examples), examples.ids, strict=True):
            if key in own:
                raise EditError(
                    f"Group {group!r} holds one input twice, as {own[key]!r} and {name!r}: an edit would be said to "
                    "generalise to what it was made with. Leave one out."
                )
            own[key] = name
            seen.setdefault(key, (group, name))
    for place, examples in ordinary.items():
        for key, name in zip(content_hashes(examples), examples.ids, strict=True):
            if key in seen:
                group, other = seen[key]
                raise EditError(
                    f"Example {name!r} of set {place!r} is example {other!r} of group {group!r}, which is edited: it "
                    "cannot be asked to change and to stay. Leave it out of one."
                )


def content_hashes(examples: Examples, *, prepared: bool = False) -> list[str]:
    """Returns the sha256 (hex) of each input's type, shape and bytes. Mutates nothing. Cost: one pass.

    `prepared`: of inputs as a float32 model takes them: then pixels and the same image normalised are one.
    """
    found = []
    for _, batch, _ in examples.chunks(256):
        inputs = examples.prepared(batch) if prepared else batch
        for value in inputs.detach().cpu().contiguous():
            head = f"{value.dtype}:{tuple(value.shape)};".encode()
            body = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.append(hashlib.sha256(head + body).hexdigest())
    return found
