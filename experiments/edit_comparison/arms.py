"""How an arm edits a case: the request, the selection and the method with its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ablate import ComponentIndex, Selection
from coar.editing.edits.edit import Edit
from coar.editing.registry import editor_class, get_editor
from coar.editing.request import Request
from experiments.edit_comparison.config import TRAINED, Arm
from experiments.edit_comparison.tasks import Case, Task


@dataclass(frozen=True, eq=False)
class Bench:
    """A trained network with its task, and what arms need beside them.

    Attributes:
      model: Unedited, in eval mode.
      task: Its task.
      places: Name of a place -> network -> the module there.
      hypernetwork: File of the trained hypernetwork; None: mask methods cannot run.
    """

    model: nn.Module
    task: Task
    places: dict[str, dict[str, str]]
    hypernetwork: str | None = None

    def applies(self, arm: Arm) -> bool:
        """Returns whether the task has everything that the arm's method needs."""
        request = self.request(self.task.test.cases[0])
        needed = editor_class(arm.method).needs
        trained = TRAINED not in arm.fixed.values() or self.hypernetwork is not None
        return trained and all(getattr(request, name) is not None for name in needed)

    def request(self, case: Case) -> Request:
        """Returns what a method is given: the case's exemplars, and the validation images of its kind."""
        shown = case.exemplars
        alike = next(other for other in self.task.validation.cases if other.name == case.name)
        changed = next(iter(alike.sets.values())).examples
        return Request(
            inputs=shown.examples.inputs(),
            labels=shown.examples.targets,
            originals=shown.originals,
            masks=shown.masks,
            reference=self.task.reference,
            validation=(changed, self.task.validation.ordinary),
        )

    def edit(self, arm: Arm, setting: dict[str, Any], case: Case, seed: int = 0) -> Edit:
        """Returns the arm's edit of a case with one setting of its grid.

        Raises:
          EditError: The method cannot, e.g. the training diverged.
        """
        settings = {**arm.fixed, **setting}
        place = settings.pop("at", None)
        settings = {name: self._value(value) for name, value in settings.items()}
        editor = get_editor(arm.method, seed=seed, **settings)
        return editor.edit(self.model, self.request(case), None if place is None else self.place(place))

    def _value(self, value: Any) -> Any:
        """Returns what a value in the configuration stands for: one per network, or the trained hypernetwork."""
        if isinstance(value, dict) and self.task.network in value:
            value = value[self.task.network]
        return self.hypernetwork if value == TRAINED else value

    def place(self, name: str) -> Selection:
        """Returns all components of the module at a place."""
        index = ComponentIndex.from_model(self.model)
        return index.where(module=self.places[name][self.task.network])
