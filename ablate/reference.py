"""The slow, obviously right implementation: copy the model, zero the weights, run. Everything fast must equal it."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ablate.components import ComponentIndex
from ablate.outputs import Output, get_output
from ablate.state import preserved_random_state


def reference_outputs(
    model: nn.Module,
    index: ComponentIndex,
    keep: npt.NDArray[np.bool_],
    inputs: Tensor,
    targets: Tensor,
    output: str | Output = "margin",
) -> Tensor:
    """Returns the outputs (rows, examples) of a copy of the model per keep-vector. Mutates nothing; for tests."""
    measure = get_output(output)
    rows = []
    for keep_row in keep:
        ablated = copy.deepcopy(model).eval()
        parameters = dict(ablated.named_parameters())
        with preserved_random_state(), torch.no_grad():
            for i in np.flatnonzero(~keep_row):
                c = index[int(i)]
                parameters[c.parameter].narrow(c.axis, c.start, c.stop - c.start).zero_()
            rows.append(measure(ablated(inputs), targets))
    return torch.stack(rows)
