"""What a model is: its tensors, which of them a forward writes, and its code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ablate.models.buffers import describe_weights
from ablate.models.network import describe_modules
from ablate.state import hash_tensors, named_tensors


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is.

    Attributes:
      hash: Of its tensors, see `model_hash`.
      weights: Empty, or its tensors without what a forward writes, see `describe_weights`.
      code: Its modules' types and settings and, if it was run, its calls, see `describe_modules` and `Calls`.
    """

    hash: str
    weights: Mapping[str, Any]
    code: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tensors: Mapping[str, Tensor] | None = None,
        rewritten: Collection[str] = (),
        code: Mapping[str, Any] | None = None,
    ) -> ModelIdentity:
        """Returns the identity of a model. Mutates nothing.

        Args:
          model: The model, or a copy of it.
          tensors: Its parameters and buffers by name; None: as it names them.
          rewritten: The buffers that a forward writes, as a probe found them.
          code: Its code, as a probe found it; None: the model is not run, and its calls are not known.
        """
        tensors = named_tensors(model) if tensors is None else tensors
        code = describe_modules(model) if code is None else code
        return cls(hash_tensors(tensors), describe_weights(model, rewritten, tensors), code)

    def describe(self) -> dict[str, Any]:
        """Returns it as a store keeps it."""
        return {"model": self.hash, "weights": dict(self.weights), "code": dict(self.code)}
