"""Whether the places of a batch's examples depend on what the examples are: seen operation by operation.

In most models an example's places in an activation follow from shapes alone, so that what two examples showed holds for
every batch. Not so where padding is removed, sequences are packed, tokens are sent to experts, or Python looks at a
number and takes another path: there two examples prove nothing. This module tells the two apart. It follows the values
of the examples through every operation of one run and calls what it cannot vouch for *moved*:

* what is fetched from, or put at, places along the examples' axis that the examples' own values choose (a boolean mask,
  `nonzero`, a sort, a packed sequence);
* what does not grow with the number of examples along exactly one axis (sums over the batch, matrices of all tokens by
  all tokens, routing by a product with a matrix of zeros and ones);
* everything after a number was read by Python (`item()`, `bool()`, `tolist()`, numpy).

It errs on one side only: what is moved is gated one example at a time, which needs no places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shape = tuple[int, ...]

BY_INDICES = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
ALONG = (
    *("gather", "index_select", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"),
    *("scatter_", "scatter_add_", "scatter_reduce_", "index_add_", "index_copy_", "index_fill_", "index_reduce"),
)
REORDERED = ("sort", "argsort", "topk", "kthvalue", "mode", "median", "nanmedian", "msort", "flip", "roll")
FRESH = ("lift_fresh", "lift")  # of numbers that were Python's
SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
# What may be done to whole numbers and truth values of examples without moving anything between places.
PLACE_BY_PLACE = (
    *("embedding", "cat", "stack", "clone", "copy_", "_to_copy", "repeat", "constant_pad_nd", "fill_", "masked_fill"),
    *("masked_fill_", "sum", "mean", "any", "all", "prod", "cumsum", "cumprod", "argmax", "argmin", "amax", "amin"),
    *("max", "min", "count_nonzero", "tril", "triu", "bucketize", "isin", "unfold", "_unsafe_view", "_reshape_alias"),
    *("alias", "detach", "mm", "bmm"),
)
READ_BY_PYTHON = ("_local_scalar_dense", "is_nonzero", "equal")
ROUNDING = ("round", "sign", "sgn", "floor", "ceil", "trunc", "heaviside")


@dataclass(frozen=True)
class Step:
    """One operation of a run, and the shapes of the tensors that it was given and made."""

    function: Any
    given: tuple[Shape, ...]
    made: tuple[Shape, ...]


class Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # it registers subclasses
    """Notes every operation of a run: what `Routes` compares the run of more examples with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _shapes(_tensors((args, kwargs)))
        result = function(*args, **kwargs)
        self.steps.append(Step(function, given, _shapes(_tensors(result))))
        return result


class Routes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the values of examples through a run of three, beside the operations of a run of two.

    Args:
      inputs: The three examples.
      steps: Of the run of two.
      where: Returns the name of the module whose forward is running.

    Attributes:
      lost: Why nothing can be said of what comes from now on, None while something can.
      cuts: Where the run does what has no derivative, in a user's words: a gradient may be missing behind it.
    """

    def __init__(self, inputs: Tensor, steps: Sequence[Step], where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lost: str | None = None
        self.cuts: dict[str, str] = {}
        self._steps = steps
        self._where = where
        self._position = 0
        # by memory: "" for values of examples that are where shapes put them, else why they may be anywhere
        self._moved: dict[int, str] = {memory_of(inputs): ""}

    def moved(self, tensor: Tensor) -> str | None:
        """Returns why the examples in a tensor may be anywhere, None if they are where shapes put them."""
        return self.lost or self._moved.get(memory_of(tensor)) or None

    def of_examples(self, tensor: Tensor) -> bool:
        """Returns whether a tensor holds values that depend on the examples'."""
        return memory_of(tensor) in self._moved

    def read(self, tensor: Tensor, how: str) -> None:
        """Notes that Python reads numbers: if they depend on the examples, so may everything that comes."""
        if self.of_examples(tensor):
            self.cuts.setdefault(how, self._where())
            self.lost = self.lost or f"Python reads values of its inputs ({how} in {self._where()!r})"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        call = _Call(function, args, kwargs, given, self)
        problem = call.problem()  # before the operation, which may write to what it is given
        result = function(*args, **kwargs)
        self._note(call, list(_tensors(result)), problem)
        return result

    def _note(self, call: _Call, made: Sequence[Tensor], problem: str | None) -> None:
        step = self._steps[self._position] if self._position < len(self._steps) else None
        self._position += 1
        if self.lost is None and (step is None or step.function is not call.function):
            self.lost = f"three examples run other operations than two (from {self._where()!r} on)"
        depends = call.name not in (*SHAPE_ONLY, *FRESH) and any(map(self.of_examples, call.given))
        if not depends:
            for tensor in made:
                if not any(tensor is one for one in call.given):
                    self._forget(tensor, call)
            return
        if problem is not None and call.name in READ_BY_PYTHON:
            self.lost = self.lost or problem
            return
        self._note_cut(call, made)
        earlier = next((self._moved[memory_of(t)] for t in call.given if self._moved.get(memory_of(t))), "")
        shapes = step.made if step is not None and len(step.made) == len(made) else None
        for position, tensor in enumerate(made):
            why = earlier or problem or ""
            if not why and (shapes is None or not _apart(shapes[position], tensor)):
                why = f"{call.name} in {self._where()!r} does not keep the examples of a batch apart"
            memory = memory_of(tensor)
            self._moved[memory] = self._moved.get(memory) or why
        for tensor in call.written:
            memory = memory_of(tensor)
            self._moved[memory] = self._moved.get(memory) or earlier or problem or ""

    def _forget(self, tensor: Tensor, call: _Call) -> None:
        """New memory holds nothing of the examples, also where older memory of theirs was given back."""
        memory = memory_of(tensor)
        if call.name in FRESH or memory not in {memory_of(one) for one in call.given}:
            self._moved.pop(memory, None)

    def _note_cut(self, call: _Call, made: Sequence[Tensor]) -> None:
        floating = any(tensor.is_floating_point() for tensor in call.given)
        if call.name.rstrip("_") in ROUNDING and floating:
            self.cuts.setdefault(f"{call.name}()", self._where())
        elif call.name == "detach" and floating:
            self.cuts.setdefault("detach() or .data", self._where())
        elif call.function.namespace not in ("aten", "prim", "prims"):
            self.cuts.setdefault(f"the operation {call.function.namespace}::{call.name}", self._where())
        if any(tensor.is_inference() for tensor in made):
            self.cuts.setdefault("torch.inference_mode()", self._where())

    def step(self) -> Step | None:
        """The operation of the run of two at which this run is."""
        return self._steps[self._position] if self._position < len(self._steps) else None


class _Call:
    """One operation of the run of three, and whether it moves examples."""

    def __init__(
        self, function: Any, args: Any, kwargs: Mapping[str, Any], given: list[Tensor], routes: Routes
    ) -> None:
        self.function, self.given, self._routes = function, given, routes
        schema = function._schema
        self.name = schema.name.partition("::")[2]
        self._bound = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | {
            argument.name: kwargs[argument.name] for argument in schema.arguments if argument.name in kwargs
        }
        self.written = [
            tensor
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(self._bound.get(argument.name))
        ]

    def problem(self) -> str | None:
        """Returns in what way this operation puts values of examples where other values of theirs say, None if not."""
        if not any(self._routes.of_examples(tensor) for tensor in self.given):
            return None
        where = self._routes._where()
        if self.name in READ_BY_PYTHON:
            self._routes.read(self.given[0], "item() or bool()")
            return self._routes.lost
        if any(tensor.is_nested or tensor.layout is not torch.strided for tensor in self.given):
            return f"{self.name} in {where!r} works on nested or sparse tensors"
        return f"{self.name} in {where!r} moves values between examples' places" if self._moves() else None

    def _moves(self) -> bool:
        if self.name in BY_INDICES:
            return self._by_indices()
        if self.name in ALONG:
            index, axis = self._bound.get("index"), self._axis_of("self")
            chosen = isinstance(index, Tensor) and self._routes.of_examples(index)
            return chosen and axis is not None and axis == self._dim(self._bound["self"])
        if self.name in REORDERED:
            axis, dims = self._axis_of("self"), self._bound.get("dims", [self._dim(self._bound["self"])])
            return axis is None or axis in [dim % self._bound["self"].ndim for dim in dims]
        if self.name.startswith("_embedding_bag"):
            return self._routes.of_examples(self._bound["offsets"])
        if torch.Tag.dynamic_output_shape in self.function.tags:
            return True
        by_place = torch.Tag.pointwise in self.function.tags or self.function.is_view or self.name in PLACE_BY_PLACE
        if by_place or self.name in SHAPE_ONLY or self.name.startswith("_scaled_dot_product"):
            return False
        return any(not tensor.is_floating_point() and self._routes.of_examples(tensor) for tensor in self.given)

    def _by_indices(self) -> bool:
        """Whether values of examples choose places along the examples' axis."""
        axis, dim = self._axis_of("self"), 0
        for index in self._bound["indices"]:
            width = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.ndim
            if index is not None and self._routes.of_examples(index) and axis in range(dim, dim + width):
                return True
            dim += width
        return False

    def _dim(self, tensor: Tensor) -> int:
        dim = self._bound.get("dim", 0 if self.name == "msort" else -1)
        return int(dim) % max(tensor.ndim, 1) if isinstance(dim, int) else 0

    def _axis_of(self, name: str) -> int | None:
        """Returns the axis along which an argument grows with the number of examples, None if there is no one axis."""
        tensor, step = self._bound[name], self._routes.step()
        place = next((i for i, one in enumerate(self.given) if one is tensor), None)
        if step is None or place is None or place >= len(step.given):
            return None
        return growing_axis(step.given[place], tuple(tensor.shape))


def growing_axis(two: Shape, three: Shape) -> int | None:
    """Returns the only axis in which shapes for two and three examples differ, if its length is so many per example."""
    if len(two) != len(three):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and 3 * two[axes[0]] == 2 * three[axes[0]] else None


def _apart(two: Shape, made: Tensor) -> bool:
    """Returns whether what was made holds each example along one axis, or nothing at all."""
    return made.numel() == 0 or growing_axis(two, tuple(made.shape)) is not None


def memory_of(tensor: Tensor) -> int:
    """Returns where the memory of a tensor is; something of its own for one that has none."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
        return -id(tensor)
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _shapes(tensors: Iterator[Tensor]) -> tuple[Shape, ...]:
    return tuple(() if tensor.is_nested else tuple(tensor.shape) for tensor in tensors)
