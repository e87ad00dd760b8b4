"""Rewriting a rule: a layer's response to a changed concept becomes its response to the original one.

Santurkar et al., Editing a classifier by rewriting its prediction rules (arXiv 2112.01008), Sections 3 and A.4, and the
code of its authors where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ablate import Examples, Selection
from coar.editing.abstract import Editor, Found
from coar.editing.edits.operations import Delta, Factors, LowRank
from coar.editing.log import EditLog
from coar.editing.methods.directions import ConceptKeys, DirectionsBy, along, coordinates, key_weights, pooled
from coar.editing.methods.pairs import Pairs
from coar.editing.methods.second_moment import FLOOR, second_moment
from coar.editing.request import Request
from coar.editing.settings import Count, CountFromZero, FromZero, Positive
from coar.editing.training.descent import OptimizerName, descend, descent_problems, value_of
from coar.editing.training.plain_descent import plain_descent
from coar.editing.where.blocks import layer_keys
from coar.editing.where.layer import LayerPlace, place_of
from coar.errors import EditError

LossName = Literal["l1", "mse"]

GRID = ((1e-3, 10_000), (1e-4, 20_000), (1e-5, 40_000), (1e-6, 80_000), (1e-7, 80_000))  # (rate, steps), A.4.1

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"rate": 1e-4, "steps": 20_000},  # Table 2, real-world test cases
    "code": {"rate": 1e-5, "steps": 40_000, "use_mask": True},  # the repository's config.json
    "brown": {  # Brown et al., Robustness of edited neural networks, App. C; its rates go up to 100
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "loss": "mse",
        "taps": "center",
        "project_every": 1,
    },
}


@dataclass(frozen=True, kw_only=True)
class Rewriting(Editor):
    """Rewriting: needs pairs and ordinary examples, no labels.

    Cost: one pass of the model over the ordinary examples, up to the layer; then `steps` runs of one block, forward and
    backward, on all pairs. Memory: the block's inputs and values for all pairs up to 256 MiB (beyond, they are computed
    anew in each step, by a second copy of the model), its activations for one batch, and two float64 (channels,
    channels).

    Attributes:
      rate: Learning rate; `GRID` has the pairs of rate and steps that the paper tried.
      steps: Updates. All pairs are in every step.
      optimizer: `adam` as in the paper, `sgd`, `adamw` or `rmsprop`; it works on the whole weight.
      momentum: Of sgd.
      weight_decay: As the optimizer has it, on the whole weight, before the projection.
      rank: Directions in which the keys of the concept are changed.
      loss: `l1`, the mean over all positions divided by the number of pairs, or `mse`.
      use_mask: Whether only positions of the concept count in the loss. Masks are used for the directions in any case.
      restrict_rank: Whether the change stays in the directions; False: any change of the weight ("-proj").
      project_every: Steps between two projections; also after the first and the last.
      taps: Which positions of a kernel change, `all` or `center`.
      direction: `whitened`, as the code has it, or `raw_eig`, eq. 1 of the paper.
      center: Whether the mean key is taken off the second moment.
      floor: Smallest eigenvalue of the second moment, as a part of the largest.
      cache: Folder for second moments; None: kept in memory only.
      around: Name of the module whose output is the layer's value; None: found.
      prefix_tokens: Tokens before the patches (class tokens), where there are masks; None: found.
      batch_size: Examples at a time.
    """

    name: ClassVar[str] = "rewriting"
    title: ClassVar[str] = "Rewriting"
    source: ClassVar[str] = "Santurkar et al., arXiv 2112.01008, Sections 3 and A.4"
    needs: ClassVar[tuple[str, ...]] = ("originals", "reference")
    quick: ClassVar[Mapping[str, Any]] = {"rate": 1e-2, "steps": 30}

    rate: Positive = 1e-4
    steps: Count = 20_000
    optimizer: OptimizerName = "adam"
    momentum: FromZero = 0.0
    weight_decay: FromZero = 0.0
    rank: Count = 1
    loss: LossName = "l1"
    use_mask: bool = False
    restrict_rank: bool = True
    project_every: Count = 10
    taps: Literal["all", "center"] = "all"
    direction: DirectionsBy = "whitened"
    center: bool = False
    floor: Annotated[float, Field(gt=0, lt=1)] = FLOOR
    cache: str | None = None
    around: str | None = None
    prefix_tokens: CountFromZero | None = None
    batch_size: Count = 64

    def _problems(self) -> list[str]:
        return descent_problems(self)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change of the layer's weight: of low rank, unless restrict_rank is off."""
        place = place_of(model, selection, self.title, self.around)
        originals = cast(Tensor, request.originals)  # it is in `needs`
        mask = self._trained(place)
        directions = self._directions(model, place, request, log) if self.restrict_rank else None
        pairs = Pairs(model, place.block, request.inputs, originals, self.batch_size)
        where = self._value_mask(model, place, request, pairs)
        weight = place.module.weight
        before = weight.detach().clone()

        def loss() -> Iterator[Tensor]:
            return rewriting_terms(pairs.values(), pairs.examples, where, self.loss)

        def project() -> None:
            if directions is not None:
                with torch.no_grad():
                    weight.copy_(torch.where(mask, before + along(weight - before, directions), before))

        def after_step(step: int) -> None:
            if step % self.project_every == 0:
                project()

        first = value_of(loss)
        if first == 0:
            log.stop("noop", "the values are those of the originals already")
        else:
            descend(model, {place.parameter: mask}, loss, plain_descent(self), log, after_step=after_step)
            project()
        last = value_of(loss)
        if last > first:
            log.stop("failed", f"the loss rose from {first:.3g} to {last:.3g}: lower the rate{_scarce(log)}")
        log.entries |= {"layer": place.layer, "block": list(place.block.modules), "loss_before": first}
        log.entries |= {"loss_after": last, "change_norm": float((weight.detach() - before).norm())}
        return Found(self._operation(place, before, directions, selection, mask))

    def _trained(self, place: LayerPlace) -> Tensor:
        """Returns which weights may move: the selected rows, at the taps that change."""
        weight = place.module.weight
        mask = torch.zeros_like(weight, dtype=torch.bool)
        if self.taps == "all":
            mask[place.rows] = True
            return mask
        if len(place.middle) != 1:
            raise EditError(
                f"taps is 'center', the kernel of {place.layer!r} is {place.kernel[0]} x {place.kernel[1]}: it has no "
                "centre. Pass taps='all'."
            )
        ((y, x),) = place.middle
        (mask if weight.ndim == 2 else mask[:, :, y, x])[place.rows] = True
        return mask

    def _directions(self, model: nn.Module, place: LayerPlace, request: Request, log: EditLog) -> Tensor:
        reference = cast(Examples, request.reference)  # it is in `needs`
        concept = self._concept(model, place, request)
        moment = second_moment(
            model, place.layer, reference, center=self.center, batch_size=self.batch_size, cache=self.cache
        )
        found, floored = concept.directions(moment, self.rank, self.direction, self.floor)
        log.entries |= {
            "concept_keys": concept.count,
            "second_moment_positions": moment.positions,
            "eigenvalues_floored": floored,
            "channels": len(moment.matrix),
        }
        return found.to(place.module.weight)

    def _concept(self, model: nn.Module, place: LayerPlace, request: Request) -> ConceptKeys:
        """Returns what the layer reads for the inputs, weighted by the masks, if there are any."""
        found = ConceptKeys()
        for start in range(0, len(request.inputs), self.batch_size):
            window = slice(start, start + self.batch_size)
            keys = layer_keys(model, place.layer, request.inputs[window])
            if request.masks is None:
                weights = torch.ones(keys.shape[:-1], device=keys.device)
            else:
                weights = key_weights(request.masks[window], place.module, tuple(keys.shape[1:-1]), self._prefix(model))
            found.add(keys.reshape(-1, keys.shape[-1]), weights.reshape(-1))
        return found

    def _prefix(self, model: nn.Module) -> int | None:
        """Returns how many tokens come before the patches, as set, or as timm's models say; None: to be found."""
        if self.prefix_tokens is not None:
            return self.prefix_tokens
        said = [n for part in model.modules() if isinstance(n := getattr(part, "num_prefix_tokens", None), int)]
        return said[0] if said else None

    def _value_mask(self, model: nn.Module, place: LayerPlace, request: Request, pairs: Pairs) -> Tensor | None:
        """Returns the mask at the resolution of the values, with one axis of channels; None: all positions count."""
        if not self.use_mask:
            return None
        if request.masks is None:
            raise EditError("use_mask is True, but the request has no masks. Give masks, or pass use_mask=False.")
        shape = pairs.value_shape()
        outputs = place.module.weight.shape[0]
        images = len(shape) == 3 and (shape[0] == outputs or shape[2] != outputs)  # channels before the positions
        mask = pooled(request.masks, shape[1:] if images else shape[:-1], self._prefix(model))
        if not bool((mask > 0).any()):
            raise EditError("The masks are zero at every position of the values: nothing would change.")
        return mask[:, None] if images else mask[..., None]

    def _operation(
        self, place: LayerPlace, before: Tensor, directions: Tensor | None, selection: Selection, mask: Tensor
    ) -> LowRank | Delta:
        after = place.module.weight.detach()
        if directions is None:
            rows = torch.zeros_like(mask)
            rows[place.rows] = True
            return Delta.between({place.parameter: before}, {place.parameter: after}, {place.parameter: rows})
        left = coordinates(after - before, directions)
        taps = place.every_tap
        if self.taps == "center":
            position = taps.index(place.middle[0])
            left, taps = left[:, position : position + 1], place.middle
        return LowRank({place.parameter: Factors(left.cpu().contiguous(), directions.T.cpu().contiguous(), taps)})


def _scarce(log: EditLog) -> str:
    """Returns advice if the ordinary examples do not determine the second moment."""
    floored = log.entries.get("eigenvalues_floored", 0)
    if not floored:
        return ""
    channels = log.entries["channels"]
    return f"; or give more ordinary examples: {floored} of {channels} directions hardly occur in the keys of these"


def rewriting_loss(values: list[tuple[Tensor, Tensor]], where: Tensor | None, kind: LossName = "l1") -> Tensor:
    """Returns the distance of values from their targets, over batches of pairs (value, target).

      l1: mean over all positions and channels of |sqrt(where) (target - value)|, divided by the number of examples once
      more, as the authors' code has it. mse: mean of where (target - value)^2. `where` weighs positions from 0 to 1,
    None: all alike.
    """
    examples = sum(len(value) for value, _ in values)
    return torch.stack(list(rewriting_terms(values, examples, where, kind))).sum()


def rewriting_terms(
    values: Iterable[tuple[Tensor, Tensor]], examples: int, where: Tensor | None, kind: LossName
) -> Iterator[Tensor]:
    """Yields what each batch of pairs adds to `rewriting_loss`, of so many examples in all."""
    start = 0
    for value, target in values:
        difference = target - value
        if where is not None:
            difference = difference * where[start : start + len(value)].to(difference).sqrt()
        start += len(value)
        numbers = value.numel() // len(value) * examples
        yield (
            (difference.abs() if kind == "l1" else difference.square()).sum()
            / numbers
            / (examples if kind == "l1" else 1)
        )
