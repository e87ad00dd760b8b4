"""Every use of a weight in a forward, seen where it happens: as an argument of a function, whichever module calls it.

Modules may never call the forward of the layer that owns a weight (`nn.MultiheadAttention`, attention pooling, Swin in
torchvision) or call it twice; a `TorchFunctionMode` that looks at the *identity* of the weight misses nothing. The
probe, the means of mean ablation and activation gating of such weights are three subclasses of `UseMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ablate.gating.attention import attention_forward
from ablate.index.table import Port


@dataclass(frozen=True)
class Op:
    """How a function takes its tensors, and which axis of its input and output holds the channels."""

    name: str
    x: tuple[int, str]
    weight: tuple[int, str]
    bias: tuple[int, str]
    out_axis: int  # of the weight: the axis of output channels
    channels: int  # of input and output: the axis of channels
    groups: tuple[int, str] | None = None  # of transposed convolutions, whose weight holds the outputs of one group

    def rows(self, weight: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> WeightRows:
        """Returns the output channels that a call computes: all of the weight's."""
        groups = 1 if self.groups is None else self.argument(self.groups, args, kwargs) or 1
        return WeightRows(0, weight.shape[self.out_axis] * groups)

    def with_input(
        self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call with another input."""
        position, name = self.x
        if position < len(args):
            return (*args[:position], x, *args[position + 1 :]), dict(kwargs)
        return args, {**kwargs, name: x}

    def argument(self, place: tuple[int, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns a positional-or-keyword argument of a call, None if it was not given."""
        position, name = place
        return args[position] if position < len(args) else kwargs.get(name)


OPS: dict[Callable[..., Any], Op] = {
    F.linear: Op("linear", (0, "input"), (1, "weight"), (2, "bias"), 0, -1),
    torch.conv1d: Op("conv1d", (0, "input"), (1, "weight"), (2, "bias"), 0, -2),
    torch.conv2d: Op("conv2d", (0, "input"), (1, "weight"), (2, "bias"), 0, -3),
    torch.conv3d: Op("conv3d", (0, "input"), (1, "weight"), (2, "bias"), 0, -4),
    **{
        function: Op(name, (0, "input"), (1, "weight"), (2, "bias"), 1, channels, groups=(6, "groups"))
        for function, name, channels in (
            (torch.conv_transpose1d, "conv_transpose1d", -2),
            (torch.conv_transpose2d, "conv_transpose2d", -3),
            (torch.conv_transpose3d, "conv_transpose3d", -4),
        )
    },
    torch.addmm: Op("addmm", (1, "mat1"), (2, "mat2"), (0, "input"), 1, -1),
    F.batch_norm: Op("batch_norm", (0, "input"), (3, "weight"), (4, "bias"), 0, 1),
    F.layer_norm: Op("layer_norm", (0, "input"), (2, "weight"), (3, "bias"), 0, -1),
    F.group_norm: Op("group_norm", (0, "input"), (2, "weight"), (3, "bias"), 0, 1),
}


@dataclass(frozen=True)
class WeightRows:
    """The output channels of a weight that one use computes; all of them unless attention packs several projections."""

    start: int
    stop: int


class UseMode(TorchFunctionMode):
    """Calls `before` and `after` around every function that uses a watched weight, and `other` for the rest."""

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.watched = {id(weight): name for name, weight in watched.items()}

    def before(self, name: str, op: Op, rows: WeightRows, x: Tensor) -> Tensor:
        """Returns what the function gets as its input instead of `x`."""
        return x

    def after(self, name: str, op: Op, rows: WeightRows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Returns what the function's caller gets instead of `y`, to which it added `bias`."""
        return y

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the result of a function that is no known use of a watched weight."""
        return function(*args, **kwargs)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward and self._watches(*args, *kwargs.values()):
            return attention_forward(self._project, *args, **kwargs)
        op = OPS.get(function)
        if op is None:
            return self.other(function, args, kwargs)
        weight = op.argument(op.weight, args, kwargs)
        name = self.watched.get(id(weight))
        x = op.argument(op.x, args, kwargs)
        if name is None or not isinstance(x, Tensor):
            return self.other(function, args, kwargs)
        rows = op.rows(weight, args, kwargs)
        x = self.before(name, op, rows, x)
        args, kwargs = op.with_input(x, args, kwargs)
        y = function(*args, **kwargs)
        return self.after(name, op, rows, x, y, op.argument(op.bias, args, kwargs))

    def _watches(self, *arguments: Any) -> bool:
        return any(id(argument) in self.watched for argument in arguments)

    def _project(
        self, role: str, x: Tensor, weight: Tensor, bias: Tensor | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        rows = WeightRows(start, len(weight) if stop is None else stop)
        name = self.watched.get(id(weight))
        op = OPS[F.linear]
        if name is not None:
            x = self.before(name, op, rows, x)
        y, offset = linear_rows(x, weight, bias, rows)
        return y if name is None else self.after(name, op, rows, x, y, offset)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: WeightRows) -> tuple[Tensor, Tensor | None]:
    """Returns `x` times some rows of a weight plus their bias, and that bias."""
    if rows == WeightRows(0, len(weight)):
        return F.linear(x, weight, bias), bias
    offset = None if bias is None else bias[rows.start : rows.stop]
    return F.linear(x, weight[rows.start : rows.stop], offset), offset


PACKED = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention keeps their biases in one


def bias_of(model: nn.Module, port: Port) -> Tensor | None:
    """Returns the live bias that belongs to a port's weight, None if there is none."""
    module: Any = model.get_submodule(port.module)
    leaf = port.parameter.rpartition(".")[2]
    packed = leaf == "in_proj_weight" or leaf in PACKED
    bias = getattr(module, "in_proj_bias" if packed else "bias", None)
    if not isinstance(bias, Tensor):
        return None
    return bias.detach().chunk(3)[PACKED.index(leaf)] if leaf in PACKED else bias.detach()
