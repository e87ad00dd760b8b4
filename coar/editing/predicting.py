"""What models predict: classes of examples, in batches, the model's state as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ablate import Examples, preserved_random_state
from ablate.campaign.steady import require_steady
from ablate.logits import OutputKey, class_logits, logits_of
from ablate.models.buffers import restored_buffers
from ablate.models.copies import device_of
from ablate.state import neutral_ambient
from coar.editing.edits.half import dtype_of
from coar.editing.given import ExamplesLike, as_examples
from coar.editing.request import TOKENS
from coar.editing.running import BATCH, memory_reported, run
from coar.errors import EditError

Integers = npt.NDArray[np.integer[Any]]


def predictions(
    model: nn.Module,
    examples: ExamplesLike,
    *,
    batch_size: int = BATCH,
    output_key: OutputKey = None,
    check: bool = True,
) -> npt.NDArray[np.int64]:
    """Returns the predicted class of each example, (examples,); of classes with equal logits the first.

    The model and the global random state are unchanged. What stands around the call (autocast, TF32) changes nothing.

    Args:
      model: In eval mode, all of it; returns logits (examples, classes).
      examples: With one label each: Examples, (inputs, targets) or a data set.
      batch_size: Examples per forward pass. Another one may change logits by rounding.
      output_key: Where in what the model returns the logits are, as for `ablate.Engine`.
      check: Whether to check, on two of the examples, that the model is deterministic and each example's logits are its
        own, as the engine does. False: it was checked before.

    Raises:
      EditError: Training mode, inputs the model fails on, another shape of outputs, NaN or +inf among the logits, or
        labels beyond the classes.
      GatingError: The model is random in eval mode, or mixes the examples of a batch.
      OutOfMemoryError: Memory did not suffice; says what to lower.
    """
    examples = as_examples(examples, "examples")
    require_eval(model)
    if examples.per_token:
        raise EditError(f"These examples have a target per token, and predictions are one class per example. {TOKENS}")
    if not examples.labelled:
        raise EditError("These examples have no labels; predictions are compared with them. Give one class each.")
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}, expected at least 1.")
    device = device_of(model)
    dtype = dtype_of(model)
    found = np.empty(len(examples), dtype=np.int64)
    with (
        preserved_random_state(),
        restored_buffers(model),
        neutral_ambient(device),
        torch.no_grad(),
        memory_reported(batch_size),
    ):
        for start, inputs, targets in examples.chunks(batch_size):
            prepared = examples.prepared(inputs.to(device), dtype)
            logits = logits_of(run(model, prepared), output_key)
            found[start : start + len(targets)] = _classes(logits, examples, start, targets)
            if check and not start:
                require_steady(model, prepared[:2], output_key)
    return found


def require_eval(model: nn.Module) -> None:
    """Raises EditError, naming the module, unless all of a model is in eval mode."""
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"Module {training!r} of this {type(model).__name__}" if training else f"This {type(model).__name__}"
        raise EditError(
            f"{where} is in training mode: dropout and batch norm would make predictions depend on chance. Call "
            "model.eval() first."
        )


def _classes(logits: Tensor, examples: Examples, start: int, targets: Tensor) -> npt.NDArray[np.int64]:
    if logits.ndim not in (1, 2) or len(logits) != len(targets):
        raise EditError(
            f"The model returns shape {tuple(logits.shape)} for {len(targets)} examples, expected logits of shape "
            "(examples, classes)."
        )
    values = class_logits(logits.detach()).double().cpu().numpy()
    bad = (np.isnan(values) | (values == np.inf)).any(axis=1)
    if bad.any():
        raise EditError(
            f"The model's logits for example {examples.ids[start + int(bad.argmax())]!r} hold NaN or infinity, so "
            "there is no prediction. An edit with too large steps does that; so do such inputs or weights."
        )
    if int(targets.max()) >= values.shape[1]:
        raise EditError(
            f"Example {examples.ids[start + int(targets.argmax())]!r} has label {int(targets.max())}, the model has "
            f"classes 0 to {values.shape[1] - 1}."
        )
    classes: npt.NDArray[np.int64] = values.argmax(axis=1)
    return classes
