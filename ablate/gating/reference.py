"""The slow, obviously right implementation: copy the model, zero the weights, run. Everything fast must equal it."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ablate.gating.literal import attenuated
from ablate.index.components import ComponentIndex
from ablate.logits import OutputKey, logits_of
from ablate.models.copies import cast, copy_of
from ablate.outputs import Output, get_output
from ablate.state import preserved_random_state


def reference_outputs(
    model: nn.Module,
    index: ComponentIndex,
    keep: npt.NDArray[np.bool_],
    inputs: Tensor,
    targets: Tensor,
    output: str | Output = "margin",
    output_key: OutputKey = None,
) -> Tensor:
    """Returns the outputs (rows, examples) of a copy of the model per keep-vector. Mutates nothing; for tests."""
    measure = get_output(output)
    rows = []
    for keep_row in keep:
        # frozen, as the engine's copy: torch multiplies by weights that require gradients in another way
        ablated = copy_of(model).eval().requires_grad_(False)
        parameters = dict(ablated.named_parameters())
        with preserved_random_state(), torch.no_grad():
            for i in np.flatnonzero(~keep_row):
                c = index[int(i)]
                parameters[c.parameter].narrow(c.axis, c.start, c.stop - c.start).zero_()
                if c.kind == "residual_branch":  # the end of a branch: its bias goes, too
                    parameters.get(f"{c.module}.bias", torch.zeros(c.stop)).narrow(0, c.start, c.stop - c.start).zero_()
            rows.append(measure(logits_of(ablated(inputs), output_key), targets))
    return torch.stack(rows)


def literal_logits(
    model: nn.Module, index: ComponentIndex, keep: Tensor, inputs: Tensor, dtype: torch.dtype, closed: float = 0.0
) -> Tensor:
    """Returns the logits of example i under keep-vector i: weights of a copy are changed, it runs, and is put back.

    Args:
      model: Copied, in `dtype` on the device of the inputs; not changed and never run.
      index: Its components.
      keep: (examples, components) bool.
      inputs: (examples, ...).
      dtype: Of the copy.
      closed: The factor for the weights of components that are not kept.
    """
    rows = []
    copied = cast(copy.deepcopy(model), inputs.device, dtype)
    for example, row in enumerate(keep):
        with torch.no_grad(), attenuated(copied, index.select(torch.nonzero(~row).flatten().tolist()), closed):
            rows.append(copied(inputs)[example])
    return torch.stack(rows)
