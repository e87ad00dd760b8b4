"""Outputs: one number per example from what the model returns, by default logits (examples, classes), and the targets.

A model with one logit z, (examples, 1) or (examples,), is one of two classes with the logits 0 and z. Outputs of
language models take logits (examples, tokens, vocabulary) and a target per token (examples, tokens).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.errors import UnknownNameError
from ablate.logits import class_logits
from ablate.models.network import plain_settings


class Output(ABC):
    """One number per example. Subclass it, set `name`, implement `__call__`, pass an instance as `output=`.

    Implementations must be pure functions of their arguments, treat examples independently and stay on the device.
    They see what the model returns, of any shape (examples, ...).

    Attributes:
      name: What stores call it.
      per_token: Takes logits (examples, tokens, vocabulary) and targets (examples, tokens), negative = not scored.
      needs_labels: Whether targets are classes. If not they may be left out (they are -1 then), and are not checked:
        integers of any meaning.
    """

    name: str
    per_token: bool = False
    needs_labels: bool = True

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns (examples,) from logits (examples, ...), mostly (examples, classes), and targets (examples,) int64.

        Logits are what the model returns, or the entry of it that `output_key` names.
        """

    def expected(self, shape: Sequence[int]) -> str | None:
        """Returns what is needed instead of a result of this shape (examples, ...), in words; None: it will do."""
        fits = not self.per_token or (len(shape) == 3 and shape[2] >= 2)
        return None if fits else f"logits of shape ({shape[0]}, tokens, vocabulary) with at least 2 words"

    def classes(self, shape: Sequence[int]) -> int | None:
        """Returns how many classes a label may be one of, for a result of this shape; None: labels are not checked."""
        known = self.per_token or (len(shape) == 2 and shape[1] >= 2)
        return int(shape[-1]) if known and self.needs_labels else None

    def describe(self) -> dict[str, Any]:
        """Returns its settings as a store records them, JSON-able: a store is refused to an output with others.

        Those are its attributes, and those of its class: numbers, texts, functions, tensors by their hash, and so on.
        """
        kinds = type(self).__mro__[: type(self).__mro__.index(Output)]
        values = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()}
        own = {k: v for k, v in values.items() if not (k.startswith("_") or k in vars(Output) or _is_code(v))}
        return plain_settings({k: v for k, v in {**own, **vars(self)}.items() if k != "name"}, tensors=True)


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (property, staticmethod, classmethod))


class ClassOutput(Output):
    """An output of logits (examples, classes); of one logit, (examples, 1) or (examples,), with labels 0 and 1."""

    def expected(self, shape: Sequence[int]) -> str | None:
        """Returns what is needed instead of a result of this shape, in words; None: it will do."""
        if len(shape) == 1 or (len(shape) == 2 and shape[1] >= 1):
            return None
        return f"logits of shape ({shape[0]}, classes), or one logit each, ({shape[0]}, 1) or ({shape[0]},)"

    def classes(self, shape: Sequence[int]) -> int:
        """Returns how many classes a label may be one of: two where there is one logit."""
        return max(2, int(shape[1])) if len(shape) > 1 else 2


class Margin(ClassOutput):
    """The correct-class margin, `logit[y] - max(other logits)`: positive exactly where the prediction is correct.

    Of one logit z: z for label 1, -z for label 0.

    Source: COAR (arXiv 2404.11534), Section 3.
    """

    name = "margin"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the margin, (examples,), in logits."""
        logits = class_logits(logits)
        own = logits.gather(1, targets[:, None])
        others = logits.scatter(1, targets[:, None], float("-inf"))
        return (own - others.amax(dim=1, keepdim=True)).squeeze(1)


class Logit(ClassOutput):
    """The logit of the target class. Of one logit z, signed by the label: z for label 1, -z for label 0."""

    name = "logit"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the target's logit, (examples,)."""
        if logits[0].numel() == 1:
            logit = logits.flatten()
            return torch.where(targets == 1, logit, -logit)
        return logits.gather(1, targets[:, None]).squeeze(1)


class LogProbability(ClassOutput):
    """The log-probability of the target class, in nats: minus the cross-entropy loss.

    Of one logit z the probability of label 1 is `sigmoid(z)`.
    """

    name = "log_probability"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probability, (examples,)."""
        return -F.cross_entropy(class_logits(logits), targets, reduction="none")


class CrossEntropyLoss(ClassOutput):
    """The cross-entropy loss of the target class, in nats: here a *negative* weight supports the prediction.

    Of one logit it is the binary cross-entropy.
    """

    name = "loss"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss, (examples,)."""
        return F.cross_entropy(class_logits(logits), targets, reduction="none")


class Value(Output):
    """The one number that a model returns for each example, as it is: of regression. Needs no labels."""

    name = "value"
    needs_labels = False

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the number, (examples,), in the model's units."""
        return logits.flatten()

    def expected(self, shape: Sequence[int]) -> str | None:
        """Returns what is needed instead of a result of this shape, in words; None: it is one number per example."""
        if all(size == 1 for size in shape[1:]):
            return None
        return f"one number per example, shape ({shape[0]},) or ({shape[0]}, 1)"


class TokenMeanMargin(Output):
    """The margin of a language model: the mean over an example's scored tokens of `logit[t] - max(other logits)`.

    Memory beside the logits (examples, tokens, vocabulary): a few numbers per token, no second copy of them.

    Source: the margin of COAR (arXiv 2404.11534), Section 3, of next-token prediction.
    """

    name = "token_margin"
    per_token = True

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean margin, (examples,), in logits, of logits (examples, tokens, vocabulary)."""
        scored = targets >= 0
        own_class = torch.where(scored, targets, 0)[:, :, None]
        own = logits.gather(2, own_class)
        values, classes = logits.topk(2, dim=2)  # the largest other logit is the first that is not the target's
        others = torch.where(classes[:, :, :1] == own_class, values[:, :, 1:], values[:, :, :1])
        margins = torch.where(scored, (own - others).squeeze(2), 0)
        return margins.sum(dim=1) / scored.sum(dim=1)


_OUTPUTS: dict[str, type[Output]] = {
    output.name: output for output in (Margin, Logit, LogProbability, CrossEntropyLoss, Value, TokenMeanMargin)
}


def output_names() -> tuple[str, ...]:
    """Returns the names of the outputs a spec may ask for."""
    return tuple(_OUTPUTS)


def get_output(output: str | Output) -> Output:
    """Returns the output of this name, or the instance given. Raises UnknownNameError with the nearest matches."""
    if isinstance(output, Output):
        return output
    if output not in _OUTPUTS:
        raise UnknownNameError("output", str(output), _OUTPUTS, "Or pass an instance of a subclass of ablate.Output.")
    return _OUTPUTS[output]()


def predictions_correct(margins: Tensor) -> Tensor:
    """Returns which examples are classified correctly, bool, from their margins: ties count as wrong."""
    return torch.gt(margins, 0)
