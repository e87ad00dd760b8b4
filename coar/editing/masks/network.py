"""A trained hypernetwork with what it was made for: which components its bits are, and of which model and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ablate import Examples, Selection, model_hash
from coar.editing.masks.features import predict_with_feature, refuse_training_mode
from coar.editing.masks.hypernetwork import CLAMP_USE, Hypernetwork, mask_of
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditMismatchError
from stores import content_hash, differences

HISTORY = ("kl", "sparsity_free", "sparsity_predicted", "bce", "bits_that_differ", "pairs")


@dataclass(frozen=True, eq=False)
class MaskHypernetwork:
    """Predicts, from an input, how much each component of a selection should take part in an edit.

    Attributes:
      network: The transformer.
      selection: The components: bit j of a mask is `selection.ids[j]`.
      settings: It was trained with.
      identity: What it was made for, JSON-able: model, index, tensors in mask order, feature site, inputs.
      iterations: It was trained for so far.
      history: (iterations, columns of `HISTORY`), on the CPU.
    """

    network: Hypernetwork
    selection: Selection
    settings: MetaSettings
    identity: Mapping[str, Any]
    iterations: int
    history: Tensor = field(repr=False)

    @cached_property
    def layout(self) -> MaskLayout:
        """Where the bits are."""
        return MaskLayout(self.selection)

    @property
    def site(self) -> str:
        """The module whose input is the feature."""
        return str(self.identity["feature"]["site"])

    def masks(self, model: nn.Module, inputs: Tensor, batch_size: int = 64) -> Tensor:
        """Returns a continuous mask per input, (inputs, bits) float32 in (0, 1). Mutates nothing.

        Args:
          model: The unedited model, in eval mode.
          inputs: (examples, ...), as the model takes them.
          batch_size: Inputs per forward pass.

        Raises:
          EditMismatchError: Another model or shape of inputs than it was trained for.
          EditError: A model in training mode, or a feature that is not finite.
        """
        refuse_training_mode(model)
        self.check(model, inputs)
        return self.predict(model, inputs, batch_size)

    def predict(self, model: nn.Module, inputs: Tensor, batch_size: int = 64) -> Tensor:
        """Returns what `masks` does, for a model and inputs that were checked."""
        found = []
        device = next(self.network.parameters()).device
        with torch.no_grad():
            for start in range(0, len(inputs), batch_size):
                _, feature = predict_with_feature(model, self.site, inputs[start : start + batch_size])
                logits = self.network(feature.to(device=device, dtype=torch.float32))
                found.append(mask_of(logits, self.settings.slope, CLAMP_USE))
        return torch.cat(found)

    def check(self, model: nn.Module, inputs: Tensor | Examples | None = None, where: str = "This") -> None:
        """Raises EditMismatchError, naming each difference old -> new, unless model and inputs are those of training.

        `inputs` as a tensor tells their shape; Examples tell how pixels are normalised, too. None: only the model.
        """
        now = identity_of(model, self.selection, self.site, self.network.shape.feature, inputs)
        stored = dict(self.identity)
        if inputs is None:
            stored.pop("inputs")
            now.pop("inputs")
        elif isinstance(inputs, Tensor):
            stored["inputs"] = {"shape": stored["inputs"]["shape"]}
        refuse_differences(stored, now, where)

    def log(self) -> pd.DataFrame:
        """Returns one row per iteration of the training.

        Columns: iteration, kl (mean divergence at the last step of the free masks), sparsity_free and
        sparsity_predicted (1 - mean of the masks), bce (of the fit to the free masks), bits_that_differ (by more than
        0.2 between two samples: near 0 means that every input gets one mask) and pairs (that the minibatch had).
        """
        table = pd.DataFrame(self.history.numpy(), columns=list(HISTORY))
        table.insert(0, "iteration", range(len(table)))
        return table


def identity_of(
    model: nn.Module, selection: Selection, site: str, feature: int, inputs: Tensor | Examples | None
) -> dict[str, Any]:
    """Returns what a hypernetwork is bound to, JSON-able."""
    layout = MaskLayout(selection)
    seen: dict[str, Any] = {}
    if isinstance(inputs, Examples):
        normalize = inputs.normalize
        seen = {
            "shape": list(inputs.input(0).shape),
            "normalize": None if normalize is None else [list(values) for values in normalize],
        }
    elif inputs is not None:
        seen = {"shape": list(inputs.shape[1:])}
    return {
        "model": {"type": type(model).__name__, "hash": model_hash(model)},
        "index": selection.index.hash,
        "selection": content_hash(list(selection.ids)),
        "tensors": [row.describe() for row in layout.rows],
        "feature": {"site": site, "width": feature},
        "inputs": seen,
    }


def refuse_differences(stored: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises EditMismatchError naming everything that differs, stored -> now."""
    found = differences(_flat(stored), _flat(now))
    if found:
        lines = "\n".join(f"  {difference}" for difference in found)
        raise EditMismatchError(
            f"{where} mask hypernetwork was made for something else. What differs (old -> new):\n{lines}\n"
            "Give what it was trained with, or train one for this: train_hypernetwork(model, selection, images)."
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity with one entry per gated tensor, so that only those that differ are named."""
    rows = {
        f"row {i}": f"{row['kind']} of {row['parameter']}, {row['bits']} bits along axis {row['axis']}"
        for i, row in enumerate(identity.get("tensors", []))
    }
    return {**identity, "tensors": rows}
