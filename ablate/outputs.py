"""Outputs: one number per example from the model's logits (examples, classes) and the targets (examples,).

Outputs of language models take logits (examples, tokens, vocabulary) and a target per token (examples, tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.errors import UnknownNameError


class Output(ABC):
    """One number per example. Subclass it, set `name`, implement `__call__`, pass an instance as `output=`.

    Implementations must be pure functions of their arguments, treat examples independently and stay on the device.
    Set `per_token` for logits (examples, tokens, vocabulary) and targets (examples, tokens), negative = not scored.
    """

    name: str
    per_token: bool = False

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns (examples,) from logits (examples, classes) and targets (examples,) int64."""


class Margin(Output):
    """The correct-class margin, `logit[y] - max(other logits)`: positive exactly where the prediction is correct.

    Source: COAR (arXiv 2404.11534), Section 3.
    """

    name = "margin"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the margin, (examples,), in logits."""
        own = logits.gather(1, targets[:, None])
        others = logits.scatter(1, targets[:, None], float("-inf"))
        return (own - others.amax(dim=1, keepdim=True)).squeeze(1)


class Logit(Output):
    """The logit of the target class."""

    name = "logit"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the target's logit, (examples,)."""
        return logits.gather(1, targets[:, None]).squeeze(1)


class LogProbability(Output):
    """The log-probability of the target class, in nats: minus the cross-entropy loss."""

    name = "log_probability"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probability, (examples,)."""
        return -F.cross_entropy(logits, targets, reduction="none")


class CrossEntropyLoss(Output):
    """The cross-entropy loss of the target class, in nats: here a *negative* weight supports the prediction."""

    name = "loss"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss, (examples,)."""
        return F.cross_entropy(logits, targets, reduction="none")


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
    output.name: output for output in (Margin, Logit, LogProbability, CrossEntropyLoss, TokenMeanMargin)
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
