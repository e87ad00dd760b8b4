"""What the engine is given and what it gives back, checked: keep-vectors, gates, logits, labels, finite numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.data.examples import MISSING, Examples
from ablate.errors import AblateError, DataError, KeepError, LabelError, NonFiniteOutputError, SpecError
from ablate.outputs import Output


def checked_keep(keep: Any, components: int) -> Tensor:
    """Returns keep-vectors (rows, components) bool, or raises KeepError."""
    array = keep if isinstance(keep, Tensor) else np.asarray(keep)
    dtype = _dtype_name(array)
    if dtype != "bool":
        raise KeepError(
            f"keep has dtype {dtype}, expected bool (True = kept). Convert it yourself, e.g. keep > 0.5, so that "
            "its meaning is yours."
        )
    if array.ndim != 2 or array.shape[1] != components:
        advice = " For one keep-vector pass keep[None]." if array.ndim == 1 else ""
        raise KeepError(
            f"keep has shape {tuple(array.shape)}, expected (rows, {components}): one column per component "
            f"of this index.{advice}"
        )
    return _tensor(array)


def checked_gates(gates: Any, components: int, examples: int | None = None) -> Tensor:
    """Returns gates (rows, components) floating and finite, one row per example if a number is given."""
    array = gates if isinstance(gates, Tensor) else np.asarray(gates)
    dtype = _dtype_name(array)
    if not dtype.startswith(("float", "bfloat")):
        raise KeepError(
            f"gates have dtype {dtype}, expected floating numbers: 1 = kept, 0 = ablated. For a keep array call "
            "outputs(), or pass keep.astype('float32')."
        )
    if array.ndim != 2 or array.shape[1] != components or examples not in (None, array.shape[0]):
        rows = "rows" if examples is None else str(examples)
        each = "" if examples is None else ", one row per example"
        raise KeepError(
            f"gates have shape {tuple(array.shape)}, expected ({rows}, {components}): one column per component of "
            f"this index{each}."
        )
    values = _tensor(array).detach()
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        row, component = (int(i) for i in bad[0])
        raise KeepError(
            f"The gate of component {component} in row {row} is {float(values[row, component])}, expected a finite "
            "number."
        )
    return values


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array.copy())  # torch takes no reversed views


def check_logits(logits: Tensor, examples: int, output: Output) -> None:
    """Raises DataError unless a model returned what an output needs, with the examples along the first axis."""
    shape = tuple(logits.shape)
    if not shape or shape[0] != examples:
        expected: str | None = f"shape ({examples}, ...): an entry per example"
    else:
        expected = output.expected(shape)
    if expected is not None:
        raise DataError(
            f"The model returned shape {shape} for {examples} examples, expected {expected} for output "
            f"{output.name!r}. Choose another output, or wrap the model so that it returns its logits."
        )


def check_labels(logits: Tensor, targets: Tensor, first: int, output: Output) -> None:
    """Raises LabelError unless the labels of a batch, from example `first` on, are classes of the model."""
    classes = output.classes(tuple(logits.shape))
    if classes is None:
        return
    lowest = -1 if targets.ndim == 1 else -(2**62)  # a negative target of a token means: not scored
    outside = torch.nonzero(((targets < 0) & (lowest == -1)) | (targets >= classes))
    if len(outside):
        label, where = int(targets[tuple(outside[0])]), first + int(outside[0][0])
        if logits[0].numel() == 1:
            raise LabelError(
                f"The label of example {where} is {label}, expected 0 or 1: the model has one logit, which says how "
                "much it is 1. Of a model that predicts a number take output='value', which needs no labels."
            )
        raise LabelError(
            f"The label of example {where} is {label}, expected a class from 0 to {classes - 1}: the model has "
            f"{classes} classes. Map the labels to them."
        )


def measured(output: Output, logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the outputs of a batch, (examples,), or raises DataError naming the output that cannot give them."""
    given = f"what the model returns, shape {tuple(logits.shape)}, and targets of shape {tuple(targets.shape)}"
    try:
        values = output(logits, targets)
    except (torch.OutOfMemoryError, AblateError):
        raise
    except Exception as error:  # whatever an output of the user's own raises
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"Output {output.name!r} fails on {given}: {type(error).__name__}: {reason}.") from error
    if not isinstance(values, Tensor):
        raise DataError(f"Output {output.name!r} gives a {type(values).__name__} for {given}, expected a tensor.")
    if tuple(values.shape) != (len(targets),):  # a scalar would be broadcast without a word
        raise DataError(
            f"Output {output.name!r} returned shape {tuple(values.shape)} for {len(targets)} examples, "
            f"expected ({len(targets)},): one number per example."
        )
    return values


def check_targets(examples: Examples, output: Output) -> None:
    """Raises DataError unless the examples have the targets an output needs: one per example, or one per token."""
    if output.needs_labels and not examples.labelled:
        raise DataError(
            f"{MISSING} Or take an output that needs none, like output='value': output {output.name!r} does."
        )
    if examples.per_token != output.per_token:
        needs = "a target per token (examples, tokens)" if output.per_token else "one label per example (examples,)"
        raise DataError(
            f"Output {output.name!r} needs {needs}, got targets of shape {tuple(examples.targets.shape)}. "
            f"Use output={'margin' if output.per_token else 'token_margin'!r}, or give other targets."
        )


def check_device(inputs: Tensor, device: torch.device) -> None:
    """Raises DataError for inputs that are neither on the CPU nor on the engine's device."""
    if inputs.device.type not in ("cpu", device.type):
        places = "the CPU" if device.type == "cpu" else f"the CPU or to {device}"
        raise DataError(
            f"Inputs are on {inputs.device}, the engine runs on {device}. Move them to {places}, or make the engine "
            f"with device={str(inputs.device)!r}."
        )


def finite_outputs(outputs: Tensor, examples: Examples) -> Tensor:
    """Returns the outputs (rows, examples), or raises NonFiniteOutputError naming the first that is not finite."""
    finite = torch.isfinite(outputs)
    if not bool(finite.all()):
        row, example = (int(i) for i in torch.nonzero(~finite)[0])
        raise NonFiniteOutputError(row, example, float(outputs[row, example]), examples.ids[example])
    return outputs


def finite_gradients(gradients: Tensor, examples: Examples) -> Tensor:
    """Returns the gradients (examples, components), or raises NonFiniteOutputError naming the first that is not."""
    bad = torch.nonzero(~torch.isfinite(gradients))
    if len(bad):
        example, component = (int(i) for i in bad[0])
        value = float(gradients[example, component])
        raise NonFiniteOutputError(example, example, value, examples.ids[example], component)
    return gradients


def require_device(device: str | None) -> None:
    """Raises SpecError unless this machine has the device; a spec may have been written for another machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = f"device: got {device!r}, but there is none here ({torch.cuda.device_count()} CUDA devices)."
        raise SpecError("CampaignSpec", [f"{problem} Choose another."]) from error
