"""Direct low-rank editing: a layer's weight plus U Vᵀ, trained so that changed inputs give the values of the originals.

Brown et al., Robustness of edited neural networks (2023), Section 2 and Appendix C. No second moment, no masks, no
labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ablate import Selection
from coar.editing.abstract import Editor, Found
from coar.editing.edits.operations import Factors, LowRank
from coar.editing.log import DivergedError, EditLog
from coar.editing.methods.pairs import Pairs, TargetName
from coar.editing.request import Request
from coar.editing.settings import Count, FromZero, Positive
from coar.editing.training.descent import Loss, OptimizerName, descend, descent_problems, value_of
from coar.editing.training.plain_descent import plain_descent
from coar.editing.where.layer import LayerPlace, Taps, place_of
from coar.errors import EditError


@dataclass(frozen=True, kw_only=True)
class DirectLowRank(Editor):
    """Direct low-rank editing: needs pairs, no labels, no ordinary examples.

    The log tells the start that was kept (`kept_start`, from 0), and the final loss of each.

    Cost: `restarts * steps` runs of one block, forward and backward, on all pairs. Memory: the block's
    inputs and values for all pairs up to 256 MiB (beyond, they are computed anew in each step, by a second copy of the
    model), and its activations for one batch.

    Attributes:
      rate: Learning rate of the descent on U and V.
      steps: Updates of each start. All pairs are in every step.
      optimizer: `sgd` as in the paper, `adam`, `adamw` or `rmsprop`.
      momentum: Of sgd.
      weight_decay: On U and V; whether the paper has it there is not said.
      rank: Columns of U and V.
      restarts: How many random starts; the one with the lowest loss is kept.
      init: `zero` starts with U = 0, the original model, and random V; `both` draws both, another model from the start.
      target: `original`, values of the original model for the originals; `symmetric`, those of the edited model, which
          a layer that forgets everything attains too.
      normalize: Whether the change of an even kernel, on its 2 x 2 central positions, is divided by 4.
      around: Name of the module whose output is the layer's value; None: found.
      batch_size: Examples at a time.
    """

    name: ClassVar[str] = "lowrank"
    title: ClassVar[str] = "Direct low-rank editing"
    source: ClassVar[str] = "Brown et al., Robustness of edited neural networks (2023), Section 2 and Appendix C"
    needs: ClassVar[tuple[str, ...]] = ("originals",)
    quick: ClassVar[Mapping[str, Any]] = {"rate": 1e-2, "steps": 30, "restarts": 2}

    rate: Positive = 1e-2
    steps: Count = 500
    optimizer: OptimizerName = "sgd"
    momentum: FromZero = 0.9
    weight_decay: FromZero = 0.0
    rank: Count = 1
    restarts: Count = 10
    init: Literal["zero", "both"] = "zero"
    target: TargetName = "original"
    normalize: bool = False
    around: str | None = None
    batch_size: Count = 64

    def _problems(self) -> list[str]:
        return descent_problems(self)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change U Vᵀ at the centre of the kernel, of the best start."""
        place = place_of(model, selection, self.title, self.around)
        originals = cast(Tensor, request.originals)  # it is in `needs`
        largest = min(place.module.weight.shape[:2])
        if self.rank > largest:
            raise EditError(
                f"rank is {self.rank}, the weight of {place.layer!r} is {tuple(place.module.weight.shape[:2])}: "
                f"expected a rank of 1 to {largest}."
            )
        pairs = Pairs(model, place.block, request.inputs, originals, self.batch_size)
        frozen = self.target == "original"

        def loss() -> Iterator[Tensor]:
            return mean_square(pairs.values(frozen), pairs.examples)

        first = value_of(loss)
        product = _Product(place, self.rank, self.normalize)
        register_parametrization(place.module, "weight", product)
        if first == 0:
            log.stop("noop", "the values are those of the originals already")
            finals = [0.0]
        else:
            finals = self._best_start(model, place, product, loss, log)
        last = min(finals)
        if last > first:
            log.stop("failed", f"the loss rose from {first:.3g} to {last:.3g}: lower the rate")
        log.entries |= {"layer": place.layer, "block": list(place.block.modules), "loss_before": first}
        log.entries |= {"loss_after": last, "losses_of_starts": [v if math.isfinite(v) else None for v in finals]}
        left, right = product.left.detach() * product.scale, product.right.detach()
        factors = Factors(left[:, None].cpu().contiguous(), right.cpu().contiguous(), place.middle)
        return Found(LowRank({place.parameter: factors}))

    def _best_start(
        self, model: nn.Module, place: LayerPlace, product: _Product, loss: Loss, log: EditLog
    ) -> list[float]:
        """Leaves the best start's factors in `product`, and its steps in the log; returns the final loss of each."""
        generator = torch.Generator().manual_seed(self.seed)
        names = {name: f"{place.layer}.parametrizations.weight.0.{name}" for name in ("left", "right")}
        rows = place.rows[:, None].expand_as(product.left)
        finals: list[float] = []
        best: tuple[Tensor, Tensor] | None = None
        problem: DivergedError | None = None
        for _ in range(self.restarts):
            product.draw(generator, self.init, place.rows)
            own = log.part()
            try:
                descend(model, {names["left"]: rows, names["right"]: None}, loss, plain_descent(self), own)
            except DivergedError as error:  # another start may not
                problem, final = error, math.inf
            else:
                final = value_of(loss)
            final = final if math.isfinite(final) else math.inf
            if final < min(finals, default=math.inf):
                best = (product.left.detach().clone(), product.right.detach().clone())
                log.take(own)
                log.entries["kept_start"] = len(finals)
            finals.append(final)
        if best is None:
            raise EditError(f"All {self.restarts} starts diverged: lower the rate, now {self.rate:g}.") from problem
        with torch.no_grad():
            product.left.copy_(best[0])
            product.right.copy_(best[1])
        return finals


class _Product(nn.Module):
    """Adds U Vᵀ to a weight, at the central positions of its kernel."""

    def __init__(self, place: LayerPlace, rank: int, normalize: bool) -> None:
        super().__init__()
        weight = place.module.weight
        self.taps: Taps = place.middle
        self.scale = 1 / len(self.taps) if normalize else 1.0
        self.left = nn.Parameter(weight.new_zeros(weight.shape[0], rank), requires_grad=False)
        self.right = nn.Parameter(weight.new_zeros(weight.shape[1], rank), requires_grad=False)

    def draw(self, generator: torch.Generator, init: str, rows: Tensor) -> None:
        """Draws factors: V from N(0, 1 / inputs), and U too if init is `both`, else 0. Rows not selected stay 0."""
        with torch.no_grad():
            spread = 1 / math.sqrt(len(self.right))
            self.right.copy_(torch.randn(self.right.shape, generator=generator) * spread)
            drawn = torch.randn(self.left.shape, generator=generator) * spread
            self.left.copy_(drawn.to(self.left) * rows[:, None] if init == "both" else torch.zeros_like(self.left))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight with the product added."""
        product = self.scale * self.left @ self.right.T
        if weight.ndim == 2:
            return weight + product
        change = torch.zeros_like(weight)
        ys, xs = (torch.tensor([tap[axis] for tap in self.taps], device=weight.device) for axis in (0, 1))
        change[:, :, ys, xs] = product[:, :, None].expand(-1, -1, len(self.taps))
        return weight + change


def mean_square(values: Iterable[tuple[Tensor, Tensor]], examples: int) -> Iterator[Tensor]:
    """Yields what each batch of (value, target) adds to the mean squared difference, over examples and features.

    Args:
      values: Batches.
      examples: In all of them.
    """
    for value, target in values:
        yield (value - target).square().sum() / (value.numel() // len(value) * examples)
