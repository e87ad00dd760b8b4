"""The one layer that a method edits, with its block: what rewriting and low-rank editing refuse, they refuse here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ablate import Selection
from ablate.index.residual import ResidualBlocks
from ablate.index.structure import Structure
from coar.editing.edits.covered import covered
from coar.editing.where.blocks import Block, branch_ends, find_block
from coar.editing.where.defaults import one_layer
from coar.errors import EditError

Taps = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class LayerPlace:
    """Where a method works.

    Attributes:
      layer: Name of the layer.
      module: The layer, of the private copy.
      parameter: Name of its weight.
      rows: (outputs,) bool, the filters or neurons that may change.
      block: What leads to the layer's value.
    """

    layer: str
    module: nn.Linear | nn.Conv2d
    parameter: str
    rows: Tensor
    block: Block

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel, (1, 1) for a linear layer."""
        return (
            (1, 1) if isinstance(self.module, nn.Linear) else (self.module.kernel_size[0], self.module.kernel_size[1])
        )

    @property
    def every_tap(self) -> Taps:
        """All positions in the kernel, row by row."""
        height, width = self.kernel
        return tuple((y, x) for y in range(height) for x in range(width))

    @property
    def middle(self) -> Taps:
        """The centre of the kernel; of an even one its central positions, 2 x 2."""
        return tuple((y, x) for y in _middle(self.kernel[0]) for x in _middle(self.kernel[1]))


def place_of(model: nn.Module, selection: Selection, method: str, around: str | None) -> LayerPlace:
    """Returns where a method works, given the selection of its rows. Mutates nothing.

    Args:
      model: The model.
      selection: Filters or neurons of one layer.
      method: Its title, for errors.
      around: See `find_block`; None: found, and inside of residual blocks only the last layer of a branch is taken.

    Raises:
      EditError: Several layers, another kind of layer, a grouped convolution, parts of rows, a layer in a branch.
    """
    layer, module = one_layer(selection, model, method)
    found = cast("nn.Linear | nn.Conv2d", module)  # one_layer says so
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise EditError(
            f"{method} edits no grouped convolution: {layer!r} has groups={module.groups}, so that its filters read "
            f"different channels. Select an ordinary convolution or a linear layer."
        )
    parameter = f"{layer}.weight"
    mask = covered(selection, model)[parameter].flatten(1)
    if not torch.equal(mask.all(1), mask.any(1)):
        raise EditError(
            f"{method} edits whole rows of a weight, the selection covers parts of rows of {parameter!r}. Select "
            "components of kind conv_filter or linear_neuron."
        )
    if around is None:
        _check_end(model, layer, method)
    return LayerPlace(layer, found, parameter, mask.all(1), find_block(model, layer, around))


def _check_end(model: nn.Module, layer: str, method: str) -> None:
    ends = branch_ends(model)
    blocks = set(ResidualBlocks(Structure(model)).branches.values())
    inside = next((block for block in sorted(blocks, key=len, reverse=True) if layer.startswith(f"{block}.")), None)
    if inside is None or layer in ends:
        return
    last = [end for end, block in ends.items() if block == inside]
    raise EditError(
        f"{method} edits the last layer of a residual branch, {layer!r} lies within {inside!r}. Select "
        f"{' or '.join(map(repr, last))}; or pass around={inside!r} to edit this one for the value of the block, "
        f"around={layer!r} for its own."
    )


def _middle(size: int) -> tuple[int, ...]:
    return (size // 2,) if size % 2 else (size // 2 - 1, size // 2)
