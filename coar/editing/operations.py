"""What an edit does to the weights that its selection covers: scale them, add a low-rank change, or move them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

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
        hasher = hashlib.sha256(repr(sorted(self.settings().items())).encode())
        for name, tensor in sorted(self.tensors().items()):
            value = tensor.detach().cpu().contiguous()
            hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()


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
        if not torch.isfinite(torch.tensor(self.factor)):
            raise EditError(f"factor is {self.factor}, expected a finite number, e.g. 0.5 to halve the weights.")

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with covered weights at lerp(weight, factor * weight, alpha)."""
        return torch.where(where, torch.lerp(weight, weight * self.factor, alpha), weight)

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

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter plus alpha times its low-rank change, where covered."""
        factors = self.factors[parameter]
        shape = (factors.left.shape[0], factors.right.shape[0])
        height, width = weight.shape[2:] or (1, 1)
        if weight.ndim not in (2, 4) or tuple(weight.shape[:2]) != shape:
            raise EditError(f"The factors of {parameter!r} are for a weight {shape}, it has {tuple(weight.shape)}.")
        if any(not (0 <= y < height and 0 <= x < width) for y, x in factors.taps):
            raise EditError(f"The factors of {parameter!r} have taps {factors.taps} outside its {height} x {width}.")
        return torch.where(where, weight + alpha * factors.dense(weight), weight)

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
    """Moves weights on the straight line from the original (alpha 0) to an end point (alpha 1).

    Attributes:
      values: Per parameter the end point of its covered weights, one axis, in the order of the parameter's own; all of
        a parameter in `wholly`.
      wholly: Parameters beyond any component (biases, normalisation) that are moved as a whole.
    """

    values: Mapping[str, Tensor]
    wholly: tuple[str, ...] = field(default=())
    name: ClassVar[str] = "delta"

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
          where: From `coar.editing.weights.covered`.
          whole: Parameters moved as a whole. Those that did not change at all are left out.

        Raises:
          EditError: A value that is not finite.
        """
        values = {name: _within(after[name].detach(), mask) for name, mask in where.items()}
        moved = [name for name in whole if name not in where and not torch.equal(before[name], after[name])]
        values |= {name: after[name].detach().reshape(-1).cpu().clone() for name in moved}
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise EditError(
                    f"The edited {name!r} holds values that are not finite: the training diverged. Lower the rate."
                )
        return cls(values, tuple(moved))

    def change(self, parameter: str, weight: Tensor, where: Tensor, alpha: float) -> Tensor:
        """Returns the parameter with covered weights at lerp(weight, end point, alpha): exact at 0 and 1."""
        values = self.values[parameter].to(weight)
        if values.numel() == weight.numel() and (parameter in self.wholly or bool(where.all())):
            return torch.lerp(weight.detach(), values.reshape(weight.shape), alpha)
        mask = torch.ones_like(where) if parameter in self.wholly else where
        if values.numel() != int(mask.sum()):
            raise EditError(
                f"The edit holds {values.numel():,} values for {parameter!r}, its selection covers {int(mask.sum()):,}."
            )
        changed = weight.detach().clone()
        changed[mask] = torch.lerp(weight.detach()[mask], values, alpha)
        return changed

    def parameters(self, touched: Collection[str]) -> tuple[str, ...]:
        """Returns the parameters that have values."""
        return tuple(self.values)

    @property
    def whole(self) -> Mapping[str, int]:
        """The parameters that change as a whole, and their sizes."""
        return {name: self.values[name].numel() for name in self.wholly}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the end points."""
        return {f"values/{name}": value for name, value in self.values.items()}

    def settings(self) -> dict[str, Any]:
        """Returns the names of the parameters, and which are moved as a whole."""
        return {"parameters": list(self.values), "wholly": list(self.wholly)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
        """Returns the operation with its end points."""
        return cls({name: tensors[f"values/{name}"] for name in settings["parameters"]}, tuple(settings["wholly"]))


def _within(value: Tensor, where: Tensor) -> Tensor:
    """Returns the values that are covered, one axis, on the CPU. All of them without a list of their positions."""
    if where.all():
        return value.reshape(-1).to("cpu", copy=True)
    return value[where.to(value.device)].cpu()


OPERATIONS: dict[str, type[Operation]] = {kind.name: kind for kind in (Ablate, Scale, LowRank, Delta)}
