"""What an edit does to the weights that its selection covers: scale them, add a low-rank change, or move them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ablate import Selection
from coar.editing.edits.covered import covered
from coar.editing.edits.digest import digest
from coar.editing.edits.frozen import frozen, plain_number
from coar.errors import EditError


class Operation(ABC):
    """A change of weights by formula. Immutable; equal operations change the same weights in the same way."""

    name: ClassVar[str]

    @abstractmethod
    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the new value of a parameter; `weight` is unchanged, and so is what is not covered.

        Args:
          parameter: Its name in `model.named_parameters()`.
          weight: Its value.
          where: Bool, of the same shape: the weights that the selection covers.
          alpha: Strength, not 0.
        """

    def parameters(self, touched: Collection[str]) -> tuple[str, ...]:
        """Returns the parameters that change, given those that the selection touches."""
        return tuple(touched)

    @property
    def whole(self) -> Mapping[str, int]:
        """Parameters beyond any component (biases, normalisation) that change as a whole, and their sizes."""
        return {}

    @property
    def end_points(self) -> tuple[str, ...]:
        """Parameters of which only the end point is known, not the change: they fit no other weights."""
        return ()

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most fit any model of their index
        """Raises EditMismatchError unless every part fits a model whose weights are those of the whole edit's base."""

    def with_starts(self, model: nn.Module, selection: Selection) -> Operation:
        """Returns this operation with every change as a difference, given the model it starts from."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a file must hold beside the settings."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Returns what a file's header must say, JSON-able."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Operation:
        """Returns the operation with these settings and tensors; raises if they do not fit together."""

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Operation) and self._content == other._content

    def __hash__(self) -> int:
        return hash((self.name, self._content))

    @cached_property
    def _content(self) -> str:
        return digest(repr(sorted(self.settings().items())), self.tensors())


@dataclass(frozen=True, eq=False)
class Ablate(Operation):
    """Multiplies weights by 1 - alpha: ablation at alpha 1."""

    name: ClassVar[str] = "ablate"

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with covered weights times 1 - alpha; at 1 they are zero, whatever they were."""
        return torch.where(where, torch.zeros_like(weight) if alpha == 1.0 else weight * (1.0 - alpha), weight)

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ablate:
        """Returns the operation."""
        return cls()


@dataclass(frozen=True, eq=False)
class Scale(Operation):
    """Moves weights towards `factor` times themselves: attenuates below 1, strengthens above it."""

    factor: float
    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", plain_number("factor", self.factor))
        if not math.isfinite(self.factor):
            raise EditError(f"factor is {self.factor}, expected a finite number, e.g. 0.5 to halve the weights.")

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with covered weights at lerp(weight, factor * weight, alpha)."""
        exact = _exact(weight)
        return torch.where(where, torch.lerp(exact, exact * self.factor, alpha).to(weight.dtype), weight)

    def settings(self) -> dict[str, Any]:
        """Returns the factor."""
        return {"factor": self.factor}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scale:
        """Returns the operation with its factor."""
        return cls(float(settings["factor"]))


@dataclass(frozen=True, eq=False)
class Factors:
    """A change of one weight, of low rank in the input channels: `d[o, i, y_t, x_t] = sum_r left[o, t, r] right[i, r]`.

    Attributes:
      left: (outputs, taps or 1, rank); 1 = all taps share it.
      right: (inputs, rank).
      taps: Positions (y, x) in the kernel; ((0, 0),) for a linear layer.
    """

    left: Tensor
    right: Tensor
    taps: tuple[tuple[int, int], ...] = ((0, 0),)

    def __post_init__(self) -> None:
        shapes = f"left {tuple(self.left.shape)}, right {tuple(self.right.shape)}, {len(self.taps)} taps"
        fits = (
            self.left.ndim == 3
            and self.right.ndim == 2
            and self.left.shape[2] == self.right.shape[1] >= 1
            and self.left.shape[1] in (1, len(self.taps))
            and len(set(self.taps)) == len(self.taps) > 0
        )
        if not fits:
            raise EditError(f"Factors do not fit: {shapes}; expected (outputs, taps or 1, rank) and (inputs, rank).")

    def dense(self, weight: Tensor) -> Tensor:
        """Returns the change of a weight (outputs, inputs[, height, width]), in its dtype, on its device."""
        product = torch.einsum("otr,ir->oti", self.left.to(weight), self.right.to(weight))
        kernel = torch.zeros_like(weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1))))
        for position, (y, x) in enumerate(self.taps):
            kernel[:, :, y, x] = product[:, position if self.left.shape[1] > 1 else 0]
        return kernel.reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class LowRank(Operation):
    """Adds alpha times a change of low rank, to the covered weights.

    Attributes:
      factors: Per parameter. Parameters that the selection does not touch stay.
    """

    factors: Mapping[str, Factors]
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", frozen(self.factors))

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter plus alpha times its low-rank change, where covered."""
        factors = self.factors[parameter]
        shape = (factors.left.shape[0], factors.right.shape[0])
        height, width = weight.shape[2:] or (1, 1)
        if weight.ndim not in (2, 4) or tuple(weight.shape[:2]) != shape:
            raise EditError(f"The factors of {parameter!r} are for a weight {shape}, it has {tuple(weight.shape)}.")
        if any(not (0 <= y < height and 0 <= x < width) for y, x in factors.taps):
            raise EditError(f"The factors of {parameter!r} have taps {factors.taps} outside its {height} x {width}.")
        exact = _exact(weight)
        return torch.where(where, (exact + alpha * factors.dense(exact)).to(weight.dtype), weight)

    def parameters(self, touched: Collection[str]) -> tuple[str, ...]:
        """Returns the parameters that have factors and are touched."""
        return tuple(name for name in touched if name in self.factors)

    def tensors(self) -> dict[str, Tensor]:
        """Returns left and right of each parameter."""
        found = {}
        for name, factors in self.factors.items():
            found[f"left/{name}"], found[f"right/{name}"] = factors.left, factors.right
        return found

    def settings(self) -> dict[str, Any]:
        """Returns the taps of each parameter."""
        return {"taps": {name: [list(tap) for tap in factors.taps] for name, factors in self.factors.items()}}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRank:
        """Returns the operation with its factors."""
        return cls(
            {
                name: Factors(
                    tensors[f"left/{name}"], tensors[f"right/{name}"], tuple((int(y), int(x)) for y, x in taps)
                )
                for name, taps in settings["taps"].items()
            }
        )


@dataclass(frozen=True, eq=False)
class Delta(Operation):
    """Moves weights by a difference: on the straight line from the original (alpha 0) to an end point (alpha 1).

    A difference is kept as its two ends, because float arithmetic does not lead from one to the other bit for bit:
    weights that are at the start land on the end point exactly, others are moved by alpha times (end - start).

    Attributes:
      values: Per parameter the end point of its covered weights, one axis, in the order of the parameter's own; all of
        a parameter in `wholly`.
      wholly: Parameters beyond any component (biases, normalisation) that are moved as a whole.
      starts: Per parameter where its weights came from, in the form of `values`. A parameter without one has an end
        point only: every weight moves towards it, wherever it starts.
    """

    values: Mapping[str, Tensor]
    wholly: tuple[str, ...] = field(default=())
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    name: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", frozen(self.values))
        object.__setattr__(self, "wholly", tuple(self.wholly))
        object.__setattr__(self, "starts", frozen(self.starts))
        for name, start in self.starts.items():
            end = self.values.get(name)
            if end is None or start.shape != end.shape:
                shape = "no end point" if end is None else f"an end point of shape {tuple(end.shape)}"
                raise EditError(f"The start of {name!r} has shape {tuple(start.shape)}, there is {shape}.")

    @classmethod
    def between(
        cls,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        where: Mapping[str, Tensor],
        whole: Collection[str] = (),
    ) -> Delta:
        """Returns the operation that leads from `before` to `after` where covered, and in the parameters in `whole`.

        Args:
          before, after: Parameters by name. Others than those in `where` and `whole` are not looked at.
          where: From `coar.editing.edits.covered.covered`.
          whole: Parameters moved as a whole. Those that did not change at all are left out.

        Raises:
          EditError: A value that is not finite.
        """
        moved = tuple(name for name in whole if name not in where and not torch.equal(before[name], after[name]))
        everything: dict[str, Tensor | None] = {**where, **dict.fromkeys(moved)}
        values = {name: _within(after[name].detach(), mask) for name, mask in everything.items()}
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise EditError(
                    f"The edited {name!r} holds values that are not finite: the training diverged. Lower the rate."
                )
        starts = {name: _within(before[name].detach(), mask) for name, mask in everything.items()}
        return cls(values, moved, starts)

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with covered weights moved: at alpha 1 from the start to the end point, exactly."""
        values = self.values[parameter]
        if values.numel() == weight.numel() and (parameter in self.wholly or bool(where.all())):
            return self._moved(parameter, weight.detach().reshape(-1), alpha).reshape(weight.shape)
        mask = torch.ones_like(where) if parameter in self.wholly else where
        if values.numel() != int(mask.sum()):
            raise EditError(
                f"The edit holds {values.numel():,} values for {parameter!r}, its selection covers {int(mask.sum()):,}."
            )
        changed = weight.detach().clone()
        changed[mask] = self._moved(parameter, weight.detach()[mask], alpha)
        return changed

    def _moved(self, parameter: str, weight: Tensor, alpha: float) -> Tensor:
        end = self.values[parameter].to(weight)
        straight = end if alpha == 1.0 else torch.lerp(weight, end, alpha)
        if parameter not in self.starts:
            return straight
        start = self.starts[parameter].to(weight)
        return torch.where(weight == start, straight, weight + alpha * (end - start))

    def parameters(self, touched: Collection[str]) -> tuple[str, ...]:
        """Returns the parameters that have values."""
        return tuple(self.values)

    @property
    def whole(self) -> Mapping[str, int]:
        """The parameters that change as a whole, and their sizes."""
        return {name: self.values[name].numel() for name in self.wholly}

    @property
    def end_points(self) -> tuple[str, ...]:
        """The parameters without a start."""
        return tuple(name for name in self.values if name not in self.starts)

    def with_starts(self, model: nn.Module, selection: Selection) -> Delta:
        """Returns this operation with the model's values as the starts that are missing."""
        where = covered(selection, model)
        found = {name: _within(model.get_parameter(name).detach(), where.get(name)) for name in self.end_points}
        return replace(self, starts={**self.starts, **found})

    def tensors(self) -> dict[str, Tensor]:
        """Returns the end points, and the starts that are known."""
        ends = {f"values/{name}": value for name, value in self.values.items()}
        return ends | {f"starts/{name}": value for name, value in self.starts.items()}

    def settings(self) -> dict[str, Any]:
        """Returns the names of the parameters, which are moved as a whole, and which have a start."""
        return {"parameters": list(self.values), "wholly": list(self.wholly), "starts": list(self.starts)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
        """Returns the operation with its end points; files of format 2 know no starts."""
        return cls(
            {name: tensors[f"values/{name}"] for name in settings["parameters"]},
            tuple(settings["wholly"]),
            {name: tensors[f"starts/{name}"] for name in settings.get("starts", [])},
        )


def _exact(weight: Tensor) -> Tensor:
    """Returns a weight in float32 at least: what becomes of half precision is rounded once, at last."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _within(value: Tensor, where: Tensor | None) -> Tensor:
    """Returns the values that are covered (None: all), one axis, on the CPU; the result owns its memory."""
    if where is None or where.all():
        return value.reshape(-1).to("cpu", copy=True)
    return value[where.to(value.device)].cpu()


OPERATIONS: dict[str, type[Operation]] = {kind.name: kind for kind in (Ablate, Scale, LowRank, Delta)}
