"""Which tensors of a file are a model's weights: by the model's own names and shapes, whatever wrappers wrote around.

Wrappers put a prefix before every name (DataParallel `module.`, Lightning `model.` or the attribute's name), or a mark
inside a name (`_orig_mod` of torch.compile; `module` where a part of the model was wrapped). What counts is the model:
a prefix is one only if the names behind it are exactly the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Marks that only wrappers write; `module` may also be a part of the model itself.
_MARKS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?|shadow)([^a-z]|$)")


@dataclass(frozen=True)
class WeightSet:
    """Named tensors of a file, and where in it they lie: keys joined by dots, "" for the file itself."""

    label: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """Tensors that fit a model, by the model's own names.

    Attributes:
      label: Where they lie: the set's label and their prefix in it.
      source: The set.
      prefix: What stands before the names in the set, with its dot.
    """

    label: str
    source: WeightSet
    prefix: str
    tensors: dict[str, Tensor]

    def copy_into(self, model: nn.Module) -> None:
        """Copies the tensors into `model`, in place. Counters of batches that the file lacks stay as they are."""
        model.load_state_dict(self.tensors, strict=False)  # complete and without surplus: `fits` has seen to it


def fits(model: nn.Module, given: WeightSet) -> list[Fit]:
    """Returns every way in which the tensors are complete weights of `model`, that without a prefix first.

    Counters of batches may be missing: old files have none, and nothing in eval mode reads them. So may the second name
    of a tensor that the model shares: files hold it once.
    """
    own = _Names(model)
    for unwrapped in _unwrapped(given.tensors):
        found = []
        for prefix in _prefixes(unwrapped, own):
            inside = _behind(unwrapped, prefix)
            if not own.problems(inside):
                found.append(_fit(given, prefix, own.real(inside)))
        if found and all(fit.prefix for fit in found):  # the names without prefix may be all there, beside others
            bare = {name: value for name, value in unwrapped.items() if name in own.known}
            found += [] if own.problems(bare) else [_fit(given, "", own.real(bare))]
        if found:
            return found
    return []


def _fit(given: WeightSet, prefix: str, tensors: dict[str, Tensor]) -> Fit:
    label = ".".join(part for part in (given.label, prefix.rstrip(".")) if part)
    return Fit(label, given, prefix, tensors)


def _behind(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def best_attempt(model: nn.Module, sets: Sequence[WeightSet]) -> list[str]:
    """Returns what keeps the most similar set of tensors from fitting: missing, unexpected and misshapen ones."""
    own = _Names(model)
    attempts = [
        _behind(unwrapped, prefix)
        for given in sets
        for unwrapped in _unwrapped(given.tensors)
        for prefix in _prefixes(unwrapped, own) or [""]
    ]
    return own.problems(max(attempts, key=lambda names: len(own.known & set(names)), default={}))


def rivals(chosen: Fit, others: Iterable[Fit]) -> list[str]:
    """Returns the labels of other fits whose numbers differ from the chosen ones."""
    return [fit.label for fit in others if any(not _equal(fit.tensors[n], v) for n, v in chosen.tensors.items())]


def averages_beside(chosen: Fit, sets: Sequence[WeightSet]) -> list[str]:
    """Returns the labels of averaged weights (EMA, SWA) that lie beside the chosen ones, in whatever form."""
    if _is_averaged(chosen.label):
        return []
    found = [given.label for given in sets if _is_averaged(given.label) and _has_weights(given.tensors.values())]
    beside: dict[str, list[Tensor]] = {}
    for name, value in chosen.source.tensors.items():
        if chosen.prefix and not name.startswith(chosen.prefix):
            beside.setdefault(name.partition(".")[0], []).append(value)
    inside = [first for first, values in beside.items() if _is_averaged(first) and _has_weights(values)]
    return found + [".".join(filter(None, (chosen.source.label, first))) for first in inside]


def _is_averaged(label: str) -> bool:
    return _AVERAGED.search(label.lower()) is not None


def _has_weights(values: Iterable[Tensor]) -> bool:
    return any(value.ndim > 0 for value in values)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


class _Names:
    """A model's own names, as a file must have them."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict()
        self._state = {_plain(name): value for name, value in state.items() if isinstance(value, Tensor)}
        self._real = {_plain(name): name for name in state}
        self._shared = _shared(model)
        self.known = set(self._state)

    @property
    def anchors(self) -> tuple[str, ...]:
        """Names of which every file with weights of this model has one."""
        must = [name for name in self._state if not _is_counter(name)] or [*self._state, ""]
        first = next((name for name in must if name not in self._shared), must[0])
        return (first, *self._shared.get(first, ()))

    def problems(self, weights: dict[str, Tensor]) -> list[str]:
        """Returns what is missing, unexpected, misshapen or of another kind of number; empty: the weights fit."""
        lacking = [name for name in self._state if name not in weights and not _is_counter(name)]
        problems = [f"missing: {name}" for name in lacking if not self._shared.get(name, set()) & set(weights)]
        problems += [f"unexpected: {name}" for name in weights if name not in self._state]
        for name, expected in self._state.items():
            value = weights.get(name)
            if value is None:
                continue
            if value.shape != expected.shape:
                problems.append(f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
            elif value.is_floating_point() != expected.is_floating_point() and expected.is_floating_point():
                problems.append(f"{name}: {value.dtype}, expected {expected.dtype}")
            for other in self._shared.get(name, ()):
                if other in weights and name < other and not _equal(value, weights[other]):
                    problems.append(f"{name} and {other}: differ, but are one tensor of the model")
        return problems

    def real(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights by the names that `load_state_dict` wants, those of shared tensors all."""
        complete = dict(weights)
        for name, others in self._shared.items():
            for other in others:
                if name not in complete and other in weights:
                    complete[name] = weights[other]
        return {self._real[name]: value for name, value in complete.items()}


def _shared(model: nn.Module) -> dict[str, set[str]]:
    """Returns the other names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_plain(name))
    return {name: {*all_names} - {name} for all_names in names.values() for name in all_names if len(all_names) > 1}


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _plain(name: str) -> str:
    """Returns a name without the marks that only wrappers write."""
    return ".".join(part for part in name.split(".") if part not in _MARKS)


def _unwrapped(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the tensors by names without wrappers' marks: at first as they are, then without `module` inside."""
    plain = {name: _plain(name) for name in tensors}
    bare = {name: ".".join(part for part in short.split(".") if part != "module") for name, short in plain.items()}
    ways = [plain] if bare == plain else [plain, bare]
    # where two names would become one, a mark was none
    return [{way[n]: v for n, v in tensors.items()} for way in ways if len(set(way.values())) == len(tensors)]


def _prefixes(tensors: dict[str, Tensor], own: _Names) -> list[str]:
    """Returns what stands before the model's first name in these names, shortest first: "" or something with a dot."""
    anchors = own.anchors
    found = {name[: len(name) - len(anchor)] for name in tensors for anchor in anchors if name.endswith(anchor)}
    return sorted((prefix for prefix in found if not prefix or prefix.endswith(".")), key=len)
