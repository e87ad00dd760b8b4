"""What edits made of edits have in common: their parts, whose parameters, tensors and headers are listed together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ablate import Selection
from ablate.gating.literal import touched_slices
from coar.editing.edits.conflicts import changed_parameters
from coar.editing.edits.operations import Operation
from coar.editing.edits.value import EditValue
from coar.errors import EditError


@dataclass(frozen=True, eq=False)
class Parts(Operation):
    """An operation made of edits of one index.

    Attributes:
      parts: The edits, each with its own strength.
    """

    parts: tuple[EditValue, ...]

    def parameters(self, touched: Collection[str]) -> tuple[str, ...]:
        """Returns the parameters that change."""
        found: dict[str, None] = {}
        for part in self.parts:
            found |= dict.fromkeys(part.operation.parameters(touched))
        return tuple(found)

    @property
    def whole(self) -> Mapping[str, int]:
        """The parameters that change as a whole, and their sizes."""
        return {name: size for part in self.parts for name, size in part.operation.whole.items()}

    @property
    def end_points(self) -> tuple[str, ...]:
        """The parameters of which a part knows the end point only."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.operation.end_points))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parts' tensors and component ids."""
        found = {}
        for number, part in enumerate(self.parts):
            found[f"{number}/component_ids"] = torch.tensor(part.selection.ids, dtype=torch.int64)
            found |= {f"{number}/{name}": tensor for name, tensor in part.operation.tensors().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """Returns what the header of a file says of each part."""
        return {"parts": [{**part_header(part), "base": part.base} for part in self.parts]}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Not used: `coar.editing.edits.files` restores the parts, which need the index."""
        raise EditError("An edit of several parts is restored by coar.load_edit.")

    @classmethod
    def of(cls, parts: Sequence[EditValue], settings: Mapping[str, Any]) -> Self:
        """Returns the operation of these parts, with the settings that a file's header says."""
        return cls(tuple(parts))

    def with_starts(self, model: nn.Module, selection: Selection) -> Self:
        """Returns this operation with every change of its parts as a difference."""
        parts = (replace(p, operation=p.operation.with_starts(model, p.selection)) for p in self.parts)
        return replace(self, parts=tuple(parts))


def part_header(part: EditValue) -> dict[str, Any]:
    """Returns what the header of a file says of an edit, without what all parts share."""
    return {
        "operation": part.operation.name,
        "settings": part.operation.settings(),
        "alpha": part.alpha,
        "extrapolates": part.extrapolates,
        "method": part.method,
        "details": dict(part.details),
    }


def changed_by(part: EditValue, parameter: str, weight: Tensor, strength: float) -> Tensor:
    """Returns a parameter as one part changes it at a strength; `weight` itself where it does not."""
    own = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for name, axis, units in touched_slices(part.selection, [parameter]):
        if name == parameter:
            own.index_fill_(axis, torch.tensor(units, device=weight.device), True)
    if strength and parameter in part.operation.parameters([parameter] if own.any() else []):
        return part.operation.change(parameter, weight, own, strength)
    return weight


def require_one_index(first: EditValue, second: EditValue) -> None:
    """Raises EditError unless both edits have the same index."""
    one, other = first.selection.index, second.selection.index
    if one != other:
        raise EditError(
            f"These edits have different indices, {one.hash[:12]} ({len(one):,} components) and {other.hash[:12]} "
            f"({len(other):,}). Make both with one index of all the kinds that they need."
        )


def total_norms(parts: Sequence[EditValue], shared: Collection[str]) -> dict[str, tuple[float, float]]:
    """Returns the norms of what edits change together at their strengths; empty if no part knows its norms.

    NaN where they cannot be told without the model: for parameters in `shared`, of which two edits change a common
    weight, and for those that a part without norms changes. Changes of distinct weights are orthogonal.
    """
    if not any(part.norms for part in parts):
        return {}
    found: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(name for part in parts for name in _changed(part)):
        own = [part for part in parts if name in _changed(part)]
        if name in shared or not all(part.norms for part in own):
            found[name] = (math.nan, math.nan)
        else:
            change = math.hypot(*(part.alpha * part.norms[name][1] for part in own))
            found[name] = (own[0].norms[name][0], change)
    return found


def _changed(part: EditValue) -> Collection[str]:
    return part.norms or changed_parameters(part)
