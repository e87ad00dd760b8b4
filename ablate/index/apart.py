"""Whether the weights of an index lie apart in memory, as gates on activations need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ablate.errors import GatingError

if TYPE_CHECKING:
    from ablate.index.components import ComponentIndex
from ablate.models.sharing import first_names, lies_over_itself, overlapping


def require_apart(model: nn.Module, index: ComponentIndex) -> None:
    """Raises GatingError unless no weight of an index lies over itself or another tensor, in part or turned round.

    Zeroing a slice of the one would change the other, which a gate on an activation does not, nor a cast copy. Weights
    that are the same memory altogether are one weight, and listed as one.
    """
    parameters = dict(model.named_parameters())
    others = first_names(model)
    listed = {port.parameter for port in index.ports}
    for name in sorted(listed & parameters.keys()):
        if lies_over_itself(parameters[name]):
            raise GatingError(
                f"The weight {name!r} lies over itself in memory, as an expanded tensor does "
                f"(shape {tuple(parameters[name].shape)}, strides {parameters[name].stride()}): ablating a component "
                "changes others, too. Give each number its own memory (parameter.data = parameter.data.contiguous()), "
                "or leave it out with exclude=[...]."
            )
    for group in overlapping(parameters | dict(model.named_buffers())):
        different = [name for name in group if name not in others]
        for name in sorted(listed & set(group)):
            if name in others:
                raise GatingError(
                    f"The index lists {name!r}, which is the same memory as {others[name]!r}: ablating the one ablates "
                    "the other. Make the index anew with ComponentIndex.from_model(model), which lists it once."
                )
            if len(different) > 1:
                other = next(other for other in different if other != name)
                raise GatingError(
                    f"The weights {name!r} and {other!r} lie in the same memory, one as a part or another view of the "
                    "other: ablating a component of one changes the other, too. Give each its own memory "
                    f"(parameter.data = parameter.data.clone()), or leave it out with exclude=[...]. "
                    "ablate.ablated(model, selection) does it by hand."
                )
