"""What every editing method is: settings, and a way from a model, a selection and a request to an edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ablate import ModelMismatchError, Selection, SelectionError, model_hash, preserved_random_state
from ablate.campaign.steady import require_steady
from ablate.engine.faithful import doubts
from ablate.index.flow import seen_with
from ablate.logits import OutputKey, returning_logits
from ablate.models.buffers import describe_weights, written_buffers
from ablate.models.copies import copy_of, device_of
from ablate.models.sharing import tie
from ablate.state import neutral_ambient
from coar.editing.edits.covered import covered
from coar.editing.edits.edit import Edit
from coar.editing.edits.frozen import frozen
from coar.editing.edits.half import HALF, is_half, lift, rounding, words
from coar.editing.edits.operations import Operation
from coar.editing.log import EditLog
from coar.editing.request import TOKENS, Request
from coar.editing.running import BATCH, memory_reported, run
from coar.editing.settings import problems_of
from coar.editing.where.defaults import last_layer
from coar.errors import EditError, EditMismatchError

LOGITS = "(examples, classes)"


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
      operation: What to do with the weights.
      selection: The components it does it to; None: those it was given.
      details: What else is worth knowing, JSON-able.
      alpha: The strength that the method chose.
    """

    operation: Operation
    selection: Selection | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    alpha: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Editor(ABC):
    """One editing method with its settings; `edit` returns an Edit and changes nothing. A frozen dataclass.

    Subclass it as `@dataclass(frozen=True, kw_only=True)`, set the class variables, implement `find`, and list it in
    `coar/editing/registry.py`. What a setting takes is in its annotation (`coar/editing/settings.py` has the usual
    ones), what it means under `Attributes`: both are checked and shown from there.

    Attributes:
      seed: Of everything that is drawn at random.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # fields of the request, beside inputs
    exact_in_half: ClassVar[bool] = False  # it only switches weights off: there is nothing to round
    quick: ClassVar[Mapping[str, Any]] = {}  # settings with which it takes about a second on a small model

    seed: int = 0

    def __post_init__(self) -> None:
        for setting in fields(self):
            if isinstance(value := getattr(self, setting.name), Mapping):
                object.__setattr__(self, setting.name, frozen(value))
        problems = problems_of(self, self._problems)
        if problems:
            raise EditError(f"These settings cannot work: {'; '.join(problems)}.")

    def _problems(self) -> list[str]:
        """Returns what is wrong between the settings, each of its type, in words; or raises EditError."""
        return []

    @abstractmethod
    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns what to do to the selected weights.

        Args:
          model: A copy of the model that the method may change: in eval mode, no parameter requires gradients.
          selection: What it may edit.
          request: Checked, on the model's device.
          log: To note steps, losses, the reason for stopping.
        """

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns what is edited unless the user says otherwise: the last layer before the classes."""
        return last_layer(model)

    def describe(self) -> dict[str, Any]:
        """Returns the method and its settings as JSON-able values."""
        return {"method": self.name, **{name: _plain(value) for name, value in asdict(self).items()}}

    def edit(
        self,
        model: nn.Module,
        request: Request,
        selection: Selection | None = None,
        *,
        output_key: OutputKey = None,
        progress: bool = False,
    ) -> Edit:
        """Returns the edit that this method makes. The model, the global random state and the request are unchanged.

        The same seed gives the same edit. Memory: one copy of the model, beside what the method says. A model in half
        precision is edited in float32, and what rounding takes from the edit is in its details (`rounding`); methods
        that only switch weights off are exact in any precision.

        Args:
          model: In eval mode; deterministic, and each example's logits its own: checked on two inputs.
          request: What to achieve.
          selection: The components that may change; None: see `default_selection`.
          output_key: Where in what the model returns the logits are, as for `ablate.Engine`.
          progress: Show progress on stderr.

        Raises:
          EditError: A request that misses something or does not fit the model, or a setting that cannot work here.
          EditMismatchError: The selection's index does not describe the model.
          ablate.GatingError: A copy of the model would go on running the original's weights; names them.
          GatingError: The model is random in eval mode, or mixes the examples of a batch.
          OutOfMemoryError: Memory did not suffice; says what to lower.
        """
        request = request.checked(self.needs, self.title)
        if selection is None:
            selection = self._by_default(model, request)
        self._check_model(model, selection)
        device = device_of(model)
        log = EditLog(progress)
        with preserved_random_state(), neutral_ambient(device), torch.enable_grad(), memory_reported(*self.room[::-1]):
            torch.manual_seed(self.seed)
            request = request.to(device)
            copy = copy_of(model).eval().requires_grad_(False)
            request = request.fitting(copy)
            tie(copy)  # what is one tensor trains as one
            doubt = doubts(model, copy, selection.sample((len(selection) + 1) // 2, seed=0), request.inputs[:2])
            returning_logits(copy, output_key, of_classes=True)
            lifted = is_half(copy) and not self.exact_in_half
            if lifted:
                request = request.fitting(lift(copy))
            with written_buffers(copy) as rewritten:
                self._check_outputs(copy, request)
            if doubt is not None:
                raise doubt
            found = self.find(copy, selection, request, log)
            chosen = selection if found.selection is None else found.selection
            made = Edit(chosen, found.operation, 1.0, model_hash(model), self.title).measured(model)
            details = {**self.describe(), **found.details}
            if weights := describe_weights(model, rewritten):
                details["model_weights"] = weights
            if lifted:
                details["rounding"] = rounding(made, model)
                log.why = "; ".join(filter(None, (log.why, words(details["rounding"]))))
        return replace(made, details={**details, "log": log.summary()}, alpha=found.alpha)

    def _by_default(self, model: nn.Module, request: Request) -> Selection:
        """Returns the default selection, as these inputs show the model to run."""
        try:
            with seen_with(model, request.inputs):
                return self.default_selection(model)
        except SelectionError as error:  # e.g. a model that is only a head: the rows of the classes are never a default
            raise EditError(
                f"{self.title} finds nothing to edit in this {type(model).__name__} by itself: give a selection, e.g. "
                f"of the classes' own layer. {error}"
            ) from error

    @property
    def room(self) -> tuple[str, int]:
        """The setting that says how many examples run at a time ("": none does), and how many do."""
        size = getattr(self, "batch_size", None)
        return ("", BATCH) if size is None else ("batch_size", size)

    def _check_model(self, model: nn.Module, selection: Selection) -> None:
        if model.training:
            raise EditError(
                f"This {type(model).__name__} is in training mode: dropout and batch norm would make the edit depend "
                "on chance. Call model.eval() first."
            )
        if not len(selection):
            raise EditError("The selection is empty: there is nothing to edit. Select at least one component.")
        try:
            selection.index.check(model)
        except ModelMismatchError as error:
            raise EditMismatchError(f"The selection belongs to another model. {error}") from error
        parameters = dict(model.named_parameters())
        for name, mask in covered(selection, model).items():
            weight = parameters[name].detach()
            if weight.dtype not in (torch.float32, torch.float64, *HALF):
                raise EditError(
                    f"{name!r} is {str(weight.dtype).removeprefix('torch.')}, expected float32, float64, bfloat16 or "
                    "float16. Edit the model it was made from, before it was quantised."
                )
            if not torch.isfinite(weight[mask]).all():
                raise EditError(f"{name!r} holds NaN or infinite weights where the selection covers it.")

    def _check_outputs(self, model: nn.Module, request: Request) -> None:
        """Raises unless the model returns finite logits for the inputs, with a class for each label, one by one."""
        with torch.no_grad():
            for start in range(0, len(request.inputs), self.room[1]):
                classes = self._classes(model, request.inputs[start : start + self.room[1]], start)
            require_steady(model, request.inputs[:2])
        if request.labels is not None and int(request.labels.max()) >= classes:
            raise EditError(f"labels hold {int(request.labels.max())}, the model has classes 0 to {classes - 1}.")

    def _classes(self, model: nn.Module, inputs: Tensor, start: int) -> int:
        """Returns how many classes the logits for some inputs have, after checking them."""
        logits = run(model, inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            tokens = f" {TOKENS}" if isinstance(logits, Tensor) and logits.ndim == 3 else ""
            raise EditError(f"The model returns {found} for the inputs, expected logits {LOGITS}.{tokens}")
        if not torch.isfinite(logits).all():
            bad = start + int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
            raise EditError(f"The model's logits for input {bad} hold NaN or infinite values.")
        return logits.shape[1]


def _plain(value: Any) -> Any:
    """Returns a setting as a JSON-able value."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
