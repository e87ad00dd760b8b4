"""COAR-Edit as an editing method: switch off the components that the targets depend on and the reference does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from ablate import ComponentIndex, Engine, Examples, Selection, model_hash
from coar.attributions.attributions import Attributions, open_attributions
from coar.attributions.same_subject import listed, model_differences
from coar.editing.abstract import Editor, Found
from coar.editing.coar_edit.ranking import NO_VARIANCE, Direction, Ranking, rank_components, rank_weights
from coar.editing.coar_edit.size import Criterion, SizeChoice, SizeRule, choose_size, size_for_target
from coar.editing.edits.operations import Ablate
from coar.editing.given import as_positions
from coar.editing.judging.benchmark_sets import content_hashes
from coar.editing.log import EditLog
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.settings import Count, PercentagePoints
from coar.errors import EditError, EditMismatchError
from coar.estimators.estimate import estimate
from coar.metrics.admission import CAP


@dataclass(frozen=True, kw_only=True)
class COAREditor(Editor):
    """Ablates the components whose attributions differ most between target and reference examples. Trains nothing.

    Target: the request's inputs, with the labels whose margin should rise (or fall). The edit's details hold the
    predicted change of both sets and, measured, their margins and accuracies before and after: what the reference loses
    is the harm. The selection holds the candidates; by default all components of the model's default index.

    Attributes:
      k: How many components to ablate; None: see `choose`.
      choose: Where k is None: `validation` takes the best size on the request's validation examples; `target` ablates
        one component after the other until the margin of every input is right.
      direction: `raise` or `lower` the margin of the labels.
      criterion: What is best on validation examples: `accuracy` or mean `margin` of those to be changed, or the
        accuracy of the `worst_group` of all.
      cap: What accuracy on ordinary validation examples may drop, in percentage points; None: no cap.
      most: The largest size that is tried.
      every: Step between sizes tried on validation examples.
      patience: Stop after so many sizes in a row that are not better, or drop more than the cap.
      attributions: A store of them, or Attributions; None: estimated here, by gradients, for the inputs and the
        reference.
      target: Positions of the inputs in `attributions`.
      reference: Positions of reference examples in `attributions`; None: those with the ids of the request's reference.
      reference_size: Where they are estimated: at most so many reference examples, drawn by seed.
      passes: Of the estimate, per example.
      ablate_fraction: What the estimate is about: the share of components that is off.
      ddof: Variances are divided by n - ddof: 0 as published, 1 as in Welch's test.
      batch_size: Examples per forward; another value changes rounding only.

    Cost: the estimate, `passes` forward and backward passes per example; then a forward pass over the validation
      examples per size. With attributions and k: forward passes over inputs and reference only. Two copies of the model
      more than other methods.
    Fails when the behaviour has no components of its own: then what helps the target harms the reference as much.
    """

    name: ClassVar[str] = "coar"
    title: ClassVar[str] = "COAR-Edit"
    source: ClassVar[str] = "Shah et al., Decomposing and editing predictions (arXiv 2404.11534), Section 5"
    needs: ClassVar[tuple[str, ...]] = ("labels", "reference")
    exact_in_half: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"k": 2, "passes": 4, "reference_size": 8}

    k: Count | None = None
    choose: Literal["validation", "target"] = "validation"
    direction: Direction = "raise"
    criterion: Criterion = "accuracy"
    cap: PercentagePoints | None = CAP
    most: Count = 200
    every: Count = 1
    patience: Count = 20
    attributions: str | Attributions | None = None
    target: tuple[int, ...] | None = None
    reference: tuple[int, ...] | None = None
    reference_size: Count = 50
    passes: Annotated[int, Field(ge=2)] = 100
    ablate_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    ddof: Literal[0, 1] = 0
    batch_size: Count = BATCH

    def __post_init__(self) -> None:
        for name in ("target", "reference"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_positions(getattr(self, name), name))
        super().__post_init__()

    def _problems(self) -> list[str]:
        problems = []
        if self.attributions is not None and self.target is None:
            problems.append("attributions are given without target: say at which positions the inputs are in them")
        given = [name for name in ("target", "reference") if getattr(self, name) is not None]
        if self.attributions is None and given:
            problems.append(f"{' and '.join(given)}: positions in attributions, which are not given")
        return problems

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns all components of the attributions; where they are estimated, of the model's default index."""
        if self.attributions is not None:
            return _opened(self.attributions).index.everything()
        return ComponentIndex.from_model(model).everything()

    def describe(self) -> dict[str, Any]:
        """Returns the method and its settings as JSON-able values; attributions by where they are."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        if isinstance(self.attributions, Attributions):
            values["attributions"] = self.attributions.store.where
        return {"method": self.name, **{n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}}

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the ablation of the components that the ranking puts first."""
        if self.k is None and self.choose == "validation" and request.validation is None:
            raise EditError(
                "COAR-Edit needs to know how many components to ablate: set k, give validation examples in the "
                "request, or set choose='target' to go on until the inputs are right."
            )
        if self.k is not None and self.k > len(selection):
            raise EditError(f"k is {self.k}, expected 1 to {len(selection)}, the number of selected components.")
        if request.labels is None or request.reference is None:
            raise EditError(f"{self.title} needs labels and a reference in the request.")
        target = Examples(request.inputs.cpu(), request.labels.cpu())
        refuse_overlap(target, request.reference)
        engine = Engine(model, selection.index, precision=_precision(model), batch_size=self.batch_size)
        ranking, quality = self._ranking(model, selection, target, request.reference, log)
        choice = self._size(ranking, engine, target, request, log)
        details: dict[str, Any] = {"attributions": quality}
        if choice is not None:
            details["size"] = {
                "protocol": choice.protocol,
                "stopped": choice.stopped,
                "sweep": choice.table.to_dict(orient="list"),
            }
        k = self.k if choice is None else choice.k
        if not k:
            already = "the targets are as they should be" if self.choose == "target" else "no size tried is better"
            log.stop("noop", f"No component is ablated: {already}.")
            return Found(Ablate(), selection.index.select(ranking.ids[:1]), {"k": 0, **details}, alpha=0.0)
        how = "" if ranking.statistic == "t" else f"; {NO_VARIANCE}"
        log.stop("converged" if choice is not None else "max_steps", f"{k} components are ablated{how}")
        edit = ranking.edit(k)
        measured = _measured(ranking, engine, {"target": target, "reference": request.reference}, k)
        return Found(edit.operation, edit.selection, {**edit.details, "measured": measured, **details})

    def _size(
        self, ranking: Ranking, engine: Engine, target: Examples, request: Request, log: EditLog
    ) -> SizeChoice | None:
        """Returns the choice of the size, None where it is given."""
        if self.k is not None:
            return None
        if self.choose == "target" or request.validation is None:  # `find` has refused "validation" without any
            return size_for_target(ranking, engine, target, self.most, log)
        rule = SizeRule(self.criterion, self.cap, self.every, self.most, self.patience)
        return choose_size(ranking, engine, *request.validation, rule, log)

    def _ranking(
        self, model: nn.Module, selection: Selection, target: Examples, reference: Examples, log: EditLog
    ) -> tuple[Ranking, dict[str, Any]]:
        """Returns the ranking of the selected components, and where its attributions are from."""
        if self.attributions is None:
            return self._estimated(model, selection, target, reference, log)
        opened = _opened(self.attributions)
        found = model_differences(opened.header["identity"]["of"], model)
        if found:
            raise EditMismatchError(
                f"{opened.store.where} holds attributions of another model than this {type(model).__name__}. What "
                f"differs (attributions -> model):\n{listed(found)}\nGive the model's own, or let them be estimated."
            )
        own = self.target or ()
        if len(own) != len(target):
            raise EditError(f"target has {len(own)} positions for {len(target)} inputs: give one per input.")
        positions = opened.locate(reference.ids) if self.reference is None else list(self.reference)
        ranking = rank_components(opened, own, positions, self.direction, self.ddof).within(selection)
        return ranking, {"from": opened.store.where, "held_out_correlation": opened.quality_text()}

    def _estimated(
        self, model: nn.Module, selection: Selection, target: Examples, reference: Examples, log: EditLog
    ) -> tuple[Ranking, dict[str, Any]]:
        drawn = np.random.default_rng(self.seed).permutation(len(reference))[: self.reference_size]
        positions = [int(p) for p in np.sort(drawn)]
        chosen = reference.take(positions)
        dtype = getattr(torch, _precision(model))
        inputs = torch.cat([target.model_inputs(dtype=dtype), chosen.model_inputs(dtype=dtype)])
        found = estimate(
            model,
            (inputs, torch.cat([target.targets, chosen.targets])),
            index=selection.index,
            passes=self.passes,
            ablate_fraction=self.ablate_fraction,
            seed=self.seed,
            precision=_precision(model),
            batch_size=self.batch_size,
            progress=log.shows_progress,
        )
        weights: npt.NDArray[np.float32] = found.weights[:]
        ranking = rank_weights(
            selection.index,
            weights[: len(target)],
            weights[len(target) :],
            direction=self.direction,
            base=model_hash(model),
            target=range(len(target)),
            reference=positions,
            ddof=self.ddof,
        )
        quality = {"from": f"{self.passes} passes per example", "held_out_correlation": found.quality_text()}
        return ranking.within(selection), quality


def refuse_overlap(target: Examples, reference: Examples) -> None:
    """Raises EditError if an input is among the targets and in the reference, bit by bit. Cost: a pass over both."""
    found = {key: position for position, key in enumerate(content_hashes(target, prepared=True))}
    hashes = zip(content_hashes(reference, prepared=True), reference.ids, strict=True)
    both = [(found[key], name) for key, name in hashes if key in found]
    if both:
        position, name = both[0]
        raise EditError(
            f"{len(both)} of the {len(reference):,} reference examples are inputs to be changed, too: reference "
            f"{name!r} is input {position}. What should change and what should stay must differ: leave them out of one."
        )


def _opened(attributions: str | Attributions) -> Attributions:
    return attributions if isinstance(attributions, Attributions) else open_attributions(attributions)


def _precision(model: nn.Module) -> str:
    return "float64" if any(p.dtype == torch.float64 for p in model.parameters()) else "float32"


def _measured(ranking: Ranking, engine: Engine, sets: Mapping[str, Examples], k: int) -> dict[str, Any]:
    """Returns, per set, mean margin and right predictions before and after the first k components are ablated."""
    keep = np.stack([ranking.keep(0), ranking.keep(k)])
    found = {}
    for name, examples in sets.items():
        before, after = engine.outputs(keep, examples)
        found[name] = {
            "examples": len(examples),
            "margin_before": float(before.double().mean()),
            "margin_after": float(after.double().mean()),
            "right_before": _right(before),
            "right_after": _right(after),
        }
    return found


def _right(margins: Tensor) -> int:
    return int((margins > 0).sum())
