"""Edits of one model as one edit: each part changes its own weights, so their order does not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from coar.editing.edits.conflicts import conflicts
from coar.editing.edits.operations import Ablate
from coar.editing.edits.parts import Parts, changed_by, require_one_index, total_norms
from coar.editing.edits.value import EditValue
from coar.errors import EditError

Value = TypeVar("Value", bound=EditValue)


@dataclass(frozen=True, eq=False)
class Together(Parts):
    """Does what each part does, at its own alpha times that of the whole. The weights of the parts are distinct."""

    name: ClassVar[str] = "together"

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with the changes of all parts."""
        for part in self.parts:
            weight = changed_by(part, parameter, weight, alpha * part.alpha)
        return weight

    def check(self, model: nn.Module) -> None:
        """Raises EditMismatchError unless every part fits."""
        for part in self.parts:
            part.operation.check(model)


def together(first: Value, second: Value) -> Value:
    """Returns the edit that does what both do; see `Edit.__add__`."""
    require_one_index(first, second)
    bases = {edit.base for edit in (first, second)} - {None}
    if len(bases) > 1:
        names = " and ".join(sorted(base[:12] for base in bases if base))
        raise EditError(
            f"These edits were made for different models, {names}. Edits of one model add up. An edit that was "
            "found on what the other gives follows it: first.then(second)."
        )
    fused = isinstance(first.operation, Ablate) and isinstance(second.operation, Ablate) and first.alpha == second.alpha
    common = conflicts(first, second)
    if common and not fused:
        raise EditError(
            f"Both edits change weights of {', '.join(map(repr, common[:5]))}{' ...' if len(common) > 5 else ''}: what "
            "the sum means is not clear. Let them select distinct components; or apply one, then find the other on the "
            "model that comes out. What is meant may be one after the other: first.then(second, any_weights=True)."
        )
    parts = (first, second) if fused else (*_parts(first), *_parts(second))
    norms = total_norms([edit.at(1.0) for edit in (first, second)] if fused else (first, second), common)
    return replace(
        first,
        selection=first.selection | second.selection,
        operation=Ablate() if fused else Together(parts),
        alpha=first.alpha if fused else 1.0,
        base=next(iter(bases), None),
        method=" + ".join(dict.fromkeys((first.method, second.method))),
        details={"parts": [dict(edit.details) for edit in (first, second)]} if fused else {},
        norms=norms,
        extrapolates=first.extrapolates or second.extrapolates,
        notes={**first.notes, **second.notes},
    )


def _parts(edit: EditValue) -> tuple[EditValue, ...]:
    return edit.operation.parts if isinstance(edit.operation, Together) and edit.alpha == 1.0 else (edit,)
