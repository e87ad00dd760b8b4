"""One method at several densities: the points of a curve of generalisation against locality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ablate import Selection
from coar.editing.edits.edit import Edit
from coar.editing.masks.editor import HypernetworkMask
from coar.editing.masks.masked import MaskedEditor
from coar.editing.request import Request
from coar.errors import EditError

DENSITIES = (0.75, 0.5, 0.25, 0.1, 0.05)  # Yang et al., Section 5


def density_sweep(
    editor: MaskedEditor,
    model: nn.Module,
    request: Request,
    selection: Selection | None = None,
    *,
    densities: Sequence[float] = DENSITIES,
    progress: bool = False,
) -> dict[float, Edit]:
    """Returns the edit at each density, all else being the editor's. Mutates nothing.

    Cost: one edit per density.

    Args:
      editor: A mask editor; one with a hypernetwork must have it trained already, in a file.
      model, request, selection, progress: As for `Editor.edit`.
      densities: Shares of the selected components.

    Raises:
      EditError: No density, or a hypernetwork that would be trained again for each.
    """
    if not densities:
        raise EditError("densities is empty: give at least one share, e.g. (0.1, 0.05).")
    if isinstance(editor, HypernetworkMask):
        if editor.hypernetwork is None:
            raise EditError(
                f"{editor.title} would train a hypernetwork for each density. Train it once, with train_hypernetwork("
                "..., store='masks.safetensors'), and give the editor hypernetwork='masks.safetensors'."
            )
        editors: list[MaskedEditor] = [replace(editor, density=density, threshold=None) for density in densities]
    else:
        editors = [replace(editor, density=density) for density in densities]
    return {
        density: each.edit(model, request, selection, progress=progress)
        for density, each in zip(densities, editors, strict=True)
    }
