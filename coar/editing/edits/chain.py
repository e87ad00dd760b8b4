"""An edit on top of an edit, as one edit: each link is applied to what comes out of the links before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from coar.editing.edits.conflicts import conflicts
from coar.editing.edits.parts import Parts, changed_by, require_one_index, total_norms
from coar.editing.edits.value import EditValue
from coar.errors import EditError, EditMismatchError

Value = TypeVar("Value", bound=EditValue)


@dataclass(frozen=True, eq=False)
class Chain(Parts):
    """Applies its parts one after the other, each at its own alpha; they may change the same weights.

    Attributes:
      any_weights: Apply links after the first to whatever weights come out, as differences; else each must have been
        found on exactly these.
    """

    any_weights: bool = False
    name: ClassVar[str] = "chain"

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter on the straight line from where it is to where the whole chain leads."""
        end = weight
        for link in self.parts:
            end = changed_by(link, parameter, end, link.alpha)
        return end if alpha == 1.0 else torch.where(end == weight, weight, torch.lerp(weight, end, alpha))

    def check(self, model: nn.Module) -> None:
        """Raises EditMismatchError unless every link was found on what comes out of the links before it.

        Cost: a hash of the model per link after the first, unless `any_weights`.
        """
        self.parts[0].operation.check(model)
        for number, link in enumerate(self.parts[1:], start=1):
            model = self.parts[number - 1].apply(model, any_weights=True, share=True)
            try:
                link.check(model, any_weights=self.any_weights)
            except EditMismatchError as error:
                raise EditMismatchError(f"Link {number + 1} of this chain does not fit: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Returns what the header of a file says: the links, and whether they fit any weights."""
        return {**super().settings(), "any_weights": self.any_weights}

    @classmethod
    def of(cls, parts: Sequence[EditValue], settings: Mapping[str, Any]) -> Self:
        """Returns the chain of these links."""
        return cls(tuple(parts), settings["any_weights"] is True)


def chain(first: Value, second: Value, any_weights: bool) -> Value:
    """Returns the edit that does first the one, then the other; see `Edit.then`."""
    require_one_index(first, second)
    if not any_weights and first.alpha and second.base is not None and second.base == first.base:
        raise EditError(
            f"Both edits were found on one model, {second.base[:12]}. Find the second on what the first gives, "
            "first.apply(model); or pass any_weights=True to add it there as a difference."
        )
    links: tuple[EditValue, ...] = (*_links(first, any_weights), second)
    return replace(
        first,
        selection=first.selection | second.selection,
        operation=Chain(links, any_weights),
        alpha=1.0,
        method=", then ".join((first.method, second.method)),
        details={},
        norms=total_norms((first, second), conflicts(first, second)),
        extrapolates=first.extrapolates or second.extrapolates,
        notes={**first.notes, **second.notes},
    )


def _links(edit: EditValue, any_weights: bool) -> tuple[EditValue, ...]:
    operation = edit.operation
    same = isinstance(operation, Chain) and edit.alpha == 1.0 and operation.any_weights == any_weights
    return operation.parts if isinstance(operation, Chain) and same else (edit,)
