"""The one rule that takes the logits out of what a model returns: a tensor, a ModelOutput, a dict, a tuple.

Everything here that runs a model reads its result by this rule: the engine, attributions, editing, predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablate.errors import DataError

LOGITS = "logits"

OutputKey = str | int | None


def logits_of(returned: Any, key: OutputKey = None) -> Tensor:
    """Returns the logits in what a model returned. Mutates nothing; never guesses.

    A tensor is the logits. Of anything else `key` names them: a key of a mapping, an attribute, a position in a tuple
    or list. Without it they are what is called `logits`; else the only tensor that was returned.

    Args:
      returned: What a model returned.
      key: Which entry the logits are; None: by the rule above.

    Raises:
      DataError: There is no such entry, it is no tensor or a sparse one, or none is told apart; names what there is.
    """
    if isinstance(returned, Tensor):
        if key is not None:
            raise DataError(
                f"output_key is {key!r}, but the model returns one tensor of shape {tuple(returned.shape)}: there is "
                "nothing to choose from. Leave output_key out."
            )
        return _strided(returned)
    entries = entries_of(returned)
    if key is None and LOGITS in entries:
        key = LOGITS
    if key is not None:
        return _entry(returned, entries, key)
    only = [value for value in entries.values() if isinstance(value, Tensor)]
    if len(only) == 1 == len(list(tensors_in(list(entries.values())))):
        return _strided(only[0])
    unclear = ", and which of it are the logits is not told" if entries else ""
    raise DataError(f"{_says(returned, entries)}{unclear}. {_advice(entries)}")


def class_logits(logits: Tensor) -> Tensor:
    """Returns logits (examples, classes); of one logit z each, (examples, 1) or (examples,), the two logits 0 and z.

    Softmax over these two is the sigmoid of z, and the prediction is class 1 exactly where z is above 0.
    """
    if logits.ndim == 2 and logits.shape[1] != 1:
        return logits
    column = logits.reshape(len(logits), 1)
    return torch.cat([torch.zeros_like(column), column], dim=1)


class LogitsAlone:
    """A forward hook that makes a model return its logits and nothing else."""

    def __init__(self, key: OutputKey, of_classes: bool) -> None:
        self._key, self._of_classes = key, of_classes

    def __call__(self, module: nn.Module, args: Any, returned: Any) -> Tensor:
        """Returns the logits: the result itself where it is one tensor."""
        logits = logits_of(returned, self._key)
        return class_logits(logits) if self._of_classes and logits.ndim in (1, 2) else logits


@contextmanager
def logits_alone(copy: nn.Module, key: OutputKey = None) -> Iterator[None]:
    """Makes a model that we own return its logits alone for a `with` block; copies made meanwhile do so for good."""
    handle = copy.register_forward_hook(LogitsAlone(key, of_classes=False))
    try:
        yield
    finally:
        handle.remove()


def returning_logits(copy: nn.Module, key: OutputKey = None, *, of_classes: bool = False) -> nn.Module:
    """Makes a model that we own return its logits alone, for good, and returns it.

    Not for a user's model: it gets a hook, which copies of it keep.

    Args:
      copy: The model.
      key: As for `logits_of`.
      of_classes: One logit per example becomes the two of its classes, see `class_logits`.
    """
    copy.register_forward_hook(LogitsAlone(key, of_classes))
    return copy


def entries_of(returned: Any) -> dict[str | int, Any]:
    """Returns the parts of what a model returned by name or position, without those that are None."""
    if isinstance(returned, Mapping):
        found = dict(returned.items())
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        found = dict(zip(returned._fields, returned, strict=True))
    elif isinstance(returned, (tuple, list)):
        found = dict(enumerate(returned))
    elif is_dataclass(returned) and not isinstance(returned, type):
        found = {field.name: getattr(returned, field.name) for field in fields(returned)}
    else:
        found = {name: value for name, value in getattr(returned, "__dict__", {}).items() if not name.startswith("_")}
        if isinstance(getattr(returned, LOGITS, None), Tensor):
            found[LOGITS] = returned.logits
    return {name: value for name, value in found.items() if value is not None}


def _strided(logits: Tensor) -> Tensor:
    """Returns logits as they are; raises DataError for sparse ones."""
    if logits.layout is not torch.strided:
        raise DataError(
            f"The model returns a sparse tensor of shape {tuple(logits.shape)} ({logits.layout}), expected a dense "
            "one. Wrap it so that it returns logits.to_dense()."
        )
    return logits


def _entry(returned: Any, entries: Mapping[str | int, Any], key: str | int) -> Tensor:
    """Returns the entry that a key names: by name, by position, or as an attribute."""
    value = entries.get(key)
    if value is None and isinstance(key, int) and isinstance(returned, (tuple, list)):
        value = returned[key] if -len(returned) <= key < len(returned) else None  # by position though it has names
    if value is None and isinstance(key, str):
        value = getattr(returned, key, None)
    if isinstance(value, Tensor):
        return _strided(value)
    problem = "has no such entry" if value is None else f"holds a {type(value).__name__} there, expected a tensor"
    raise DataError(
        f"The logits were looked for at {key!r}. {_says(returned, entries)}: it {problem}. {_advice(entries)}"
    )


def _says(returned: Any, entries: Mapping[str | int, Any]) -> str:
    kind = type(returned).__name__
    kind = f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    if not entries:
        return f"The model returns {kind}, which holds no tensor"
    shown = ", ".join(f"{name!r} {_shape(value)}" for name, value in list(entries.items())[:8])
    return f"The model returns {kind} of {shown}{' ...' if len(entries) > 8 else ''}"


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def _advice(entries: Mapping[str | int, Any]) -> str:
    names = [name for name, value in entries.items() if isinstance(value, Tensor)]
    if not names:
        return "Wrap the model so that it returns its logits."
    choices = " or ".join(f"output_key={name!r}" for name in names[:3])
    return f"Give {choices}{' ...' if len(names) > 3 else ''}, or wrap the model so that it returns its logits."


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in a part of what a model returned, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)) or is_dataclass(value):
        for part in entries_of(value).values():
            yield from tensors_in(part)
