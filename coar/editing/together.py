"""Edits of one model as one edit: each part changes its own weights, so their order does not matter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ablate.gating import touched_slices
from coar.editing.edit import Edit, conflicts
from coar.editing.operations import Ablate, Operation
from coar.errors import EditError


@dataclass(frozen=True, eq=False)
class Together(Operation):
    """Does what each of its parts does, each at its own alpha times the alpha of the whole.

    Attributes:
      parts: Edits whose weights are distinct.
    """

    parts: tuple[Edit, ...]
    name: ClassVar[str] = "together"

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with the changes of all parts."""
        for part in self.parts:
            own = _covered_by(part, parameter, where)
            strength = alpha * part.alpha
            if strength and parameter in part.operation.parameters([parameter] if own.any() else []):
                weight = part.operation.change(parameter, weight, own, strength)
        return weight

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

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parts' tensors and component ids."""
        found = {}
        for number, part in enumerate(self.parts):
            found[f"{number}/component_ids"] = torch.tensor(part.selection.ids, dtype=torch.int64)
            found |= {f"{number}/{name}": tensor for name, tensor in part.operation.tensors().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """Returns what the header of a file says of each part."""
        return {"parts": [part_header(part) for part in self.parts]}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Together:
        """Not used: `coar.editing.files` restores the parts, which need the index."""
        raise EditError("An edit of several parts is restored by coar.load_edit.")


def part_header(part: Edit) -> dict[str, Any]:
    """Returns what the header of a file says of an edit, without what all parts share."""
    return {
        "operation": part.operation.name,
        "settings": part.operation.settings(),
        "alpha": part.alpha,
        "extrapolates": part.extrapolates,
        "method": part.method,
        "details": dict(part.details),
    }


def _covered_by(part: Edit, parameter: str, where: Tensor) -> Tensor:
    """Returns which of a parameter's weights a part covers."""
    mask = torch.zeros_like(where)
    for name, axis, units in touched_slices(part.selection, [parameter]):
        if name == parameter:
            mask.index_fill_(axis, torch.tensor(units, device=where.device), True)
    return mask


def together(first: Edit, second: Edit) -> Edit:
    """Returns the edit that does what both do; see `Edit.__add__`."""
    if not isinstance(second, Edit):
        raise EditError(f"An edit adds to another edit only, got a {type(second).__name__}.")
    one, other = first.selection.index, second.selection.index
    if one != other:
        raise EditError(
            f"These edits have different indices, {one.hash[:12]} ({len(one):,} components) and {other.hash[:12]} "
            f"({len(other):,}). Make both with one index of all the kinds that they need."
        )
    bases = {edit.base for edit in (first, second)} - {None}
    if len(bases) > 1:
        names = " and ".join(sorted(base[:12] for base in bases if base))
        raise EditError(f"These edits were made for different models, {names}. Edits of one model add up.")
    base = next(iter(bases), None)
    selection = first.selection | second.selection
    method = " + ".join(dict.fromkeys((first.method, second.method)))
    if isinstance(first.operation, Ablate) and isinstance(second.operation, Ablate) and first.alpha == second.alpha:
        return Edit(
            selection, Ablate(), first.alpha, base, method, {"parts": [dict(e.details) for e in (first, second)]}
        )
    common = conflicts(first, second)
    if common:
        raise EditError(
            f"Both edits change weights of {', '.join(map(repr, common[:5]))}{' ...' if len(common) > 5 else ''}: what "
            "the sum means is not clear. Let them select distinct components; or apply one, then find the other on the "
            "model that comes out."
        )
    parts: list[Edit] = []
    for edit in (first, second):
        if isinstance(edit.operation, Together) and edit.alpha == 1.0:
            parts += edit.operation.parts
        else:
            parts.append(edit)
    return Edit(selection, Together(tuple(parts)), 1.0, base, method, {}, {**first.norms, **second.norms})
