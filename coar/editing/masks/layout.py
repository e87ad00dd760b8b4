"""Where the bits of a mask are: one row per gated tensor, one bit per selected component, in the index's order."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablate import Selection
from coar.errors import EditError


@dataclass(frozen=True)
class MaskRow:
    """The bits of one gated tensor: selected slices of `parameter` along `axis`.

    Attributes:
      parameter: Its name in `model.named_parameters()`.
      kind, axis, width: The component kind, the axis that is sliced and the length of one slice.
      count: Slices of the whole axis.
      units: Those that have a bit, ascending.
      start: Position of the row's first bit in the flat mask.
    """

    parameter: str
    kind: str
    axis: int
    width: int
    count: int
    units: tuple[int, ...]
    start: int

    @property
    def span(self) -> slice:
        """The row's bits in the flat mask."""
        return slice(self.start, self.start + len(self.units))

    def describe(self) -> dict[str, Any]:
        """Returns what an artefact says of this row, JSON-able."""
        return {"parameter": self.parameter, "kind": self.kind, "axis": self.axis, "bits": len(self.units)}


class MaskLayout:
    """The rows of a selection's mask. Bit j belongs to component `selection.ids[j]`.

    Rows are in the order of the index, which is the order of the model: for a block's feed-forward network the rows of
    its first layer, then the columns of its second. Rows may differ in length.

    Args:
      selection: The components that a mask chooses among.

    Raises:
      EditError: An empty selection, or one of a kind whose slices take a bias with them (`residual_branch`).
    """

    def __init__(self, selection: Selection) -> None:
        if not len(selection):
            raise EditError("The selection is empty: there is nothing to mask. Select at least one component.")
        self.selection = selection
        self.rows = tuple(_rows(selection))
        biased = sorted({port.module for port in selection.index.ports if port.with_bias} & _modules(selection))
        if biased:
            raise EditError(
                f"The selection holds residual branches ({biased[0]!r}), which take a bias with them, and masks gate "
                "weights only. Select other kinds, e.g. ffn_in and ffn_out, or conv_filter."
            )

    @property
    def bits(self) -> int:
        """The length of a mask."""
        return len(self.selection)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The gated tensors, each once."""
        return tuple(dict.fromkeys(row.parameter for row in self.rows))

    def gated(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the gated tensors of a model, detached, sharing its memory. Raises if the index does not fit it."""
        self.selection.index.check(model)
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self.parameters}

    def expand(self, parts: Tensor, gated: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns per gated tensor its mask, (n, ...) broadcastable over the tensor; differentiable.

        0 where a slice has no bit. Where two rows gate one tensor along two axes a weight has the probability that at
        least one of them is chosen, which for bits is their union.

        Args:
          parts: The masks, (n, bits).
          gated: From `gated`.
        """
        found: dict[str, Tensor] = {}
        for row in self.rows:
            part = parts[:, row.span]
            if len(row.units) < row.count:
                places = torch.tensor(row.units, device=parts.device)
                part = part.new_zeros(len(parts), row.count).index_copy(1, places, part)
            if row.width > 1:
                part = part.repeat_interleave(row.width, dim=1)
            shape = [len(parts)] + [1] * gated[row.parameter].ndim
            shape[1 + row.axis] = part.shape[1]
            part = part.view(shape)
            other = found.get(row.parameter)
            found[row.parameter] = part if other is None else other + part - other * part
        return found

    def chosen(self, bits: Tensor) -> Selection:
        """Returns the selection of the components whose bit is set, from a bool mask (bits,)."""
        ids = self.selection.ids
        return self.selection.index.select(ids[int(j)] for j in torch.nonzero(bits.cpu()).flatten())


def _rows(selection: Selection) -> list[MaskRow]:
    rows: list[MaskRow] = []
    start = 0
    ids = selection.ids
    for port, first, last in selection.index.spans():
        stop = bisect_left(ids, last, start)
        if stop > start:
            units = tuple(i - first for i in ids[start:stop])
            rows.append(MaskRow(port.parameter, port.kind, port.axis, port.width, port.count, units, start))
        start = stop
    return rows


def _modules(selection: Selection) -> set[str]:
    spans = selection.index.spans()
    return {p.module for p, first, stop in spans if p.with_bias and any(i in selection for i in range(first, stop))}
