"""Interpolation: fine-tune, then go only part of the way, to where old and new examples are both predicted well.

Sources: Brown et al., Robustness of edited neural networks (2023), Section 2 (1-LI: one layer); Ilharco et al.,
Patching open-vocabulary models by interpolating weights (arXiv 2208.05592) and its code, mlfoundations/patching
(PAINT: all of an image encoder).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from ablate import Selection
from ablate.logits import OutputKey
from coar.editing.abstract import Found
from coar.editing.edits.edit import Edit
from coar.editing.given import ExamplesLike, named_sets
from coar.editing.log import EditLog
from coar.editing.methods.finetune import FineTuning, ScheduleName, ScopeName
from coar.editing.predicting import predictions
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.settings import Count, CountFromZero, FromZero, PercentagePoints, Positive
from coar.editing.training.descent import Clip, OptimizerName
from coar.editing.where.defaults import last_layer
from coar.errors import EditError
from coar.metrics import Accuracy, InterpolationCurve, accuracy

ALPHAS = tuple(step / 10 for step in range(11))


def interpolation_curve(
    model: nn.Module,
    edit: Edit,
    sets: Mapping[str, ExamplesLike],
    alphas: Sequence[float] = ALPHAS,
    *,
    extrapolate: bool = False,
    batch_size: int = BATCH,
    any_weights: bool = False,
) -> InterpolationCurve:
    """Returns the accuracies of the edited model at many strengths, for any edit. The model is unchanged afterwards.

    `.table()` is a DataFrame with one row per alpha, `.choose("mean")` or `.choose("cap")` the best alpha. At alpha 0
    it is the original model, at 1 the full edit, whatever the strength of the edit given.

    Cost: a forward pass over all sets per alpha.

    Args:
      model: The model that the edit was made for, in eval mode.
      edit: Any.
      sets: Examples by name; `original` (ordinary examples) and `edited` (examples to be changed, with the labels they
        should get) must be there. To choose an alpha, examples that serve nothing else.
      alphas: Rising, from 0.
      extrapolate: Allow strengths above 1.
      batch_size: Examples per forward pass.
      any_weights: Take also a model with other weights than the one the edit was made for; see `Edit.apply`.

    Raises:
      MetricError: alphas that do not rise from 0, or no set `original` or `edited`.
      EditMismatchError: The edit was made for another model.
      EditError: A set that is no examples, or what `predictions` raises.
    """
    sets = named_sets(sets, "sets")
    blank = {name: [Accuracy(0, len(examples))] * len(alphas) for name, examples in sets.items()}
    InterpolationCurve.of(alphas, blank)  # names what is wrong before any work
    columns: dict[str, list[Accuracy]] = {name: [] for name in sets}
    for i, part in enumerate([edit.at(float(alpha), extrapolate=extrapolate) for alpha in alphas]):
        with part.applied(model, any_weights=any_weights) as edited:
            for name, examples in sets.items():
                found = predictions(edited, examples, batch_size=batch_size, check=not i)
                columns[name].append(accuracy(found, examples.targets))
    return InterpolationCurve.of(alphas, columns)


@dataclass(frozen=True, kw_only=True)
class InterpolatedFineTuning(FineTuning):
    """Fine-tuning on labels whose strength alpha is chosen on validation examples. Base of 1-LI and PAINT.

    At alpha 1 it is `FineTuning` with the same settings. The defaults are those of the published code of PAINT but for
    the rate: 1e-5 as in its sample command. A warm-up of 500 steps is meant for thousands of inputs: with fewer steps
    than that the rate never gets high, and the log warns. Give a lower `warm_up` for few inputs.

    Cost: fine-tuning, and a forward pass over both validation sets per alpha.

    Decisions where the sources are open: neither paper nor code has a rule for alpha; both rules are the toolkit's own.
    Only the trained weights are interpolated, with `torch.lerp`; batch norm statistics stay.

    Attributes:
      rule: `mean`: the alpha with the largest mean of the accuracies on both validation sets. `cap`: the largest
        accuracy on examples to be changed, where that on ordinary ones drops by at most `cap`. Of equal ones the
        smaller; 0, the original model, always qualifies. `none`: alpha stays 1.
      cap: In percentage points.
      alphas: To choose from: rising, from 0 to at most 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("labels", "validation")
    quick: ClassVar[Mapping[str, Any]] = {
        "rate": 1e-2,
        "warm_up": 2,
        "epochs": 20,
        "rule": "cap",
        "cap": 100.0,
    }

    optimizer: OptimizerName = "adamw"
    rate: Positive = 1e-5
    epochs: Count | None = 10
    batch_size: Count | None = 128
    weight_decay: FromZero = 0.1
    clip: Clip | None = 1.0
    schedule: ScheduleName = "warm-up-cosine"
    warm_up: CountFromZero = 500
    stop_loss: FromZero | None = None
    rule: Literal["mean", "cap", "none"] = "mean"
    cap: PercentagePoints = 0.25
    alphas: tuple[float, ...] = ALPHAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(self.alphas))
        super().__post_init__()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        rising = all(a < b for a, b in itertools.pairwise(self.alphas))
        if not self.alphas or self.alphas[0] != 0 or not rising or not self.alphas[-1] <= 1:
            problems.append(f"alphas are {tuple(self.alphas)}, expected rising numbers from 0 to at most 1")
        return problems

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change that training made, and the alpha that the rule chooses."""
        for examples in request.validation or ():
            predictions(model, examples.take([0]))  # what the model does not take is named before any work
        scope, before = self.train(model, selection, request, log)
        operation = scope.operation(model, before)
        if self.rule == "none":
            return Found(operation, scope.selection)
        if request.validation is None:
            raise EditError(
                "validation is missing: alpha is chosen on a pair of ablate.Examples used for nothing else."
            )
        scope.put(model, before)  # the path starts at the original model
        changed, ordinary = request.validation
        sets = {"original": ordinary, "edited": changed}
        whole = Edit(scope.selection, operation)
        curve = interpolation_curve(model, whole, sets, self.alphas, batch_size=self.room[1])
        choice = curve.choose(self.rule, self.cap)
        details = {
            "alpha": {"chosen": choice.alpha, "rule": choice.rule, "protocol": choice.protocol},
            "curve": curve.table().to_dict("list"),
        }
        return Found(operation, scope.selection, details, choice.alpha)


@dataclass(frozen=True, kw_only=True)
class OneLayerInterpolation(InterpolatedFineTuning):
    """1-LI: fine-tunes one layer, the last before the classes unless a selection is given, and interpolates."""

    name: ClassVar[str] = "1-li"
    title: ClassVar[str] = "One-layer interpolation (1-LI)"
    source: ClassVar[str] = "Brown et al., Robustness of edited neural networks (2023), Section 2 and Appendix C"

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns the last layer before the classes: its weight, no bias."""
        return last_layer(model)


@dataclass(frozen=True, kw_only=True)
class Paint(InterpolatedFineTuning):
    """PAINT: fine-tunes every parameter but those of the layer that gives the logits, and interpolates.

    With a selection it trains the weights of that selection only.
    """

    name: ClassVar[str] = "paint"
    title: ClassVar[str] = "PAINT"
    source: ClassVar[str] = "Ilharco et al. (arXiv 2208.05592); mlfoundations/patching, src/patch.py"
    quick: ClassVar[Mapping[str, Any]] = {**InterpolatedFineTuning.quick, "epochs": 12}

    scope: ScopeName = "encoder"

    def edit(
        self,
        model: nn.Module,
        request: Request,
        selection: Selection | None = None,
        *,
        output_key: OutputKey = None,
        progress: bool = False,
    ) -> Edit:
        """Returns the edit, see `Editor.edit`. With a selection and scope `encoder` the scope is `selection`."""
        if selection is not None and self.scope == "encoder":
            local = replace(self, scope="selection")
            return local.edit(model, request, selection, output_key=output_key, progress=progress)
        return super().edit(model, request, selection, output_key=output_key, progress=progress)
