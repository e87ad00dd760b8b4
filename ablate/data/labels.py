"""What may stand for labels: whole numbers, one per example, or a target per token; anything else is named.

A column (examples, 1), or 0. and 1. as floats, can mean only one thing and is taken for it. What could mean two things
is refused, with what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ablate.errors import DataError

UNLABELLED = -1  # stands for the label of an example that has none
EXPECTED = "expected whole numbers of shape (examples,)"


def checked_targets(raw: Tensor, first_input: Callable[[], Tensor]) -> Tensor:
    """Returns int64 targets on the CPU: (examples,), or (examples, tokens) where inputs are sequences of that length.

    Args:
      raw: As given.
      first_input: Gives one input, (1, ...): called only where targets have two axes.

    Raises:
      DataError: They are neither; says what they look like, and what to do.
    """
    whole = _whole_numbers(raw)
    if whole.ndim == 1:
        return whole
    if whole.ndim != 2:
        advice = " Give targets.flatten()." if whole.ndim and whole.numel() == len(whole) else ""
        raise DataError(f"{_got(raw)}, {EXPECTED}.{advice}")
    first = first_input()
    if whole.shape[1] == 1 and not _is_sequence(first, 1):
        return whole.squeeze(1)
    _require_tokens(whole, raw, first)
    unscored = torch.nonzero((whole < 0).all(dim=1)).flatten()
    if len(unscored):
        raise DataError(
            f"Example {int(unscored[0])} has no token to score: all its targets are negative. Leave it out."
        )
    return whole


def item_label(item: Sequence[Any], i: int) -> int | Tensor:
    """Returns the target in a data set's item: one whole number, or one per token.

    Raises:
      DataError: It is neither.
    """
    try:
        target = torch.as_tensor(item[1])
        if target.ndim == 1 and len(target) > 1:
            return target
        number = target.item()
        if int(number) == number:
            return int(number)
    except (IndexError, TypeError, ValueError, RuntimeError, OverflowError):
        pass
    got = repr(item[1]) if len(item) > 1 else "nothing"
    raise DataError(f"The label of item {i} is {got}, expected an integer: the class.")


def _whole_numbers(raw: Tensor) -> Tensor:
    """Returns targets as int64 on the CPU; of floats only where every one is a whole number."""
    if raw.dtype == torch.bool:
        raise DataError(f"{_got(raw)}, {EXPECTED}. If False is class 0 and True class 1, give targets.long().")
    if raw.is_complex():
        raise DataError(f"{_got(raw)}, {EXPECTED}.")
    if raw.is_floating_point() and not bool(torch.isfinite(raw).all() and (raw == raw.round()).all()):
        raise DataError(f"{_got(raw)} with fractions, {EXPECTED}: the class of each. {_advice_on_fractions(raw)}")
    return raw.to(device="cpu", dtype=torch.int64)


def _advice_on_fractions(raw: Tensor) -> str:
    if raw.ndim == 2 and raw.shape[1] > 1:
        return "If they are probabilities of the classes, give the most probable, targets.argmax(1)."
    return (
        "Of a model that predicts a number leave them out and take output='value'; for a loss against true values pass "
        "an Output of your own that holds them."
    )


def _is_sequence(first: Tensor, length: int) -> bool:
    """Returns whether an input (1, ...) may be a sequence of so many tokens: their numbers, or a vector for each."""
    if first.ndim < 2 or first.shape[1] != length:
        return False
    return first.ndim == (3 if first.is_floating_point() else 2)


def _require_tokens(whole: Tensor, raw: Tensor, first: Tensor) -> None:
    """Raises DataError unless targets (examples, several) are targets of the tokens that the inputs are."""
    sequence = _is_sequence(first, whole.shape[1])
    one_hot = bool(((whole == 0) | (whole == 1)).all()) and bool((whole.sum(dim=1) == 1).all())
    if one_hot and (not sequence or raw.is_floating_point() or first.is_floating_point()):
        raise DataError(f"{_got(raw)}, a single 1 in each row, {EXPECTED}. Give the classes, targets.argmax(1).")
    if not sequence:
        kind = str(first.dtype).removeprefix("torch.")
        shape = ", ".join(map(str, ("examples", *first.shape[1:])))
        raise DataError(
            f"{_got(raw)}, {EXPECTED}. A target per token needs inputs that are tokens, integers of shape (examples, "
            f"{raw.shape[1]}); these are {kind} of shape ({shape}). Give one class per example."
        )


def _got(raw: Tensor) -> str:
    return f"Targets are {raw.dtype} of shape {tuple(raw.shape)}"
