"""What an edit should achieve, as a file or the command line says it: which examples, which labels, which method."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ablate import CampaignSpec, ComponentIndex, Examples, Selection, SpecError
from ablate.campaign.problems import explain
from ablate.errors import UnknownNameError
from coar.editing.request import Request
from coar.errors import EditError
from stores.storage.places import user_path

TABLE = "edit"
ABLATE_FRACTION = 0.05  # which a campaign's spec must have, and an edit does not need


class ExamplesSpec(BaseModel):
    """Some of the spec's examples: those at these positions, with these ids, and of these groups.

    Attributes:
      positions: Counted from 0.
      ids: Names.
      groups: Whole groups.
      ids_contain: Of the groups take only examples whose id contains this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    positions: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    ids_contain: str = ""

    def __bool__(self) -> bool:
        return bool(self.positions or self.ids or self.groups)

    def chosen(self, examples: Examples, what: str) -> list[int]:
        """Returns the positions, in the order given, each once.

        Raises:
          EditError: A position that is not there, or nothing is left.
          UnknownNameError: An id or a group that is not there.
        """
        found = list(self.positions)
        outside = [position for position in found if not 0 <= position < len(examples)]
        if outside:
            raise EditError(f"The {what} has no example {outside[0]}: positions are 0 to {len(examples) - 1}.")
        where = {name: position for position, name in enumerate(examples.ids)}
        for name in self.ids:
            if name not in where:
                raise UnknownNameError("example with id", name, where)
            found.append(where[name])
        for group in self.groups:
            if group not in examples.groups:
                raise UnknownNameError("group", group, sorted(set(examples.groups)))
            pairs = zip(examples.groups, examples.ids, strict=True)
            found += [i for i, (own, name) in enumerate(pairs) if own == group and self.ids_contain in name]
        if not found:
            raise EditError(
                f"The {what} is empty: no example of {', '.join(self.groups)} has {self.ids_contain!r} in its id."
            )
        return list(dict.fromkeys(found))


class ValidationSpec(BaseModel):
    """Examples to choose a strength on, used for nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: ExamplesSpec
    reference: ExamplesSpec


class EditSpec(BaseModel):
    """The `[edit]` table of a spec: a method, its settings, and what to ask of it.

    Attributes:
      method: Its name; see `coar edit --methods`.
      settings: Its settings, by name.
      kinds: Component kinds of the selection's index; None: the model's default.
      select: Patterns of module names; the selection is all components in modules that fit one. With neither kinds nor
        select the method chooses where it edits.
      target: The examples to change.
      inputs: File with the examples to change, instead of `target`: .npy, or .safetensors with one tensor or one of
        that name; as the model takes them.
      label: The class that all of them should get.
      labels: File with the class that each should get. With neither: the labels that the data has.
      originals: File with the examples before their transformation.
      masks: File with the place of the concept, 0 to 1.
      reference: What should stay.
      validation: To choose a strength on.
      alpha: Strength of the edit; None: what the method chose.
      out: Where the edit is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = None
    settings: dict[str, Any] = {}
    kinds: tuple[str, ...] | None = None
    select: tuple[str, ...] = ()
    target: ExamplesSpec = ExamplesSpec()
    inputs: str | None = None
    label: int | None = Field(default=None, ge=0)
    labels: str | None = None
    originals: str | None = None
    masks: str | None = None
    reference: ExamplesSpec = ExamplesSpec()
    validation: ValidationSpec | None = None
    alpha: float | None = Field(default=None, ge=0, le=1)
    out: str | None = None

    def selection(self, model: nn.Module) -> Selection | None:
        """Returns the components that may change; None: the method's own choice.

        Raises:
          UnknownNameError: A kind or a pattern that fits nothing.
        """
        if self.kinds is None and not self.select:
            return None
        index = ComponentIndex.from_model(model, self.kinds)
        if not self.select:
            return index.everything()
        parts = [index.where(module=pattern) for pattern in self.select]
        return index.select(component for part in parts for component in part)

    def request(self, examples: Examples) -> Request:
        """Returns what the method is asked, with tensors on the CPU.

        Raises:
          EditError: No examples to change, or given twice; a file that cannot be read or does not fit.
        """
        if bool(self.target) == (self.inputs is not None):
            given = "given twice, as target and as inputs" if self.inputs is not None else "missing"
            raise EditError(
                f"The examples to change are {given}: name some of the spec's examples (target), or a file (inputs)."
            )
        if self.label is not None and self.labels is not None:
            raise EditError("Labels are given twice, as label and as labels. Give one class for all, or a file.")
        if self.inputs is None:
            part = examples.take(self.target.chosen(examples, "target"))
            inputs, own = part.model_inputs(), None if part.per_token else part.targets
        else:
            inputs, own = _floating("inputs", self.inputs), None
        labels = own if self.labels is None else _array("labels", self.labels)
        if self.label is not None:
            labels = torch.full((len(inputs),), self.label)
        reference = self.reference.chosen(examples, "reference") if self.reference else None
        return Request(
            inputs=inputs,
            labels=labels,
            originals=None if self.originals is None else _floating("originals", self.originals),
            masks=None if self.masks is None else _floating("masks", self.masks),
            reference=None if reference is None else examples.take(reference),
            validation=self._validation(examples),
        )

    def _validation(self, examples: Examples) -> tuple[Examples, Examples] | None:
        if self.validation is None:
            return None
        changed = examples.take(self.validation.target.chosen(examples, "validation target"))
        if self.label is not None:
            wanted = torch.full((len(changed),), self.label)
            changed = Examples(changed.model_inputs(), wanted, changed.ids, changed.groups)
        return changed, examples.take(self.validation.reference.chosen(examples, "validation reference"))


def read_spec(path: str | Path, more: Mapping[str, Any] | None = None) -> tuple[CampaignSpec, EditSpec]:
    """Returns the two parts of a spec file: model and data (as for a campaign), and its `[edit]` table.

    Args:
      path: A TOML file. Rows and the ablate fraction, which a campaign needs, may be missing.
      more: Values that go before those of the `[edit]` table; tables are joined key by key.

    Raises:
      SpecError: With every problem of both parts.
    """
    where = str(path)
    try:
        values = tomllib.loads(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(where, [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(where, [f"is no TOML: {error}"]) from error
    table = values.pop(TABLE, {})
    problems: list[str] = []
    edit = EditSpec()
    try:
        edit = EditSpec.model_validate(_joined(table, more or {}) if isinstance(table, Mapping) else table)
    except ValidationError as error:
        problems += [f"{TABLE}.{problem}" for problem in explain(error, EditSpec)]
    values.setdefault("ablate_fraction", ABLATE_FRACTION)
    try:
        spec = CampaignSpec.from_dict(values, where)
    except SpecError as error:
        raise SpecError(where, [*error.problems, *problems]) from error
    if problems:
        raise SpecError(where, problems)
    return spec, edit


def _joined(table: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table with other values before its own; tables in it are joined in the same way."""
    found = dict(table)
    for name, value in more.items():
        own = found.get(name)
        both = isinstance(value, Mapping) and isinstance(own, Mapping)
        found[name] = _joined(own, value) if both and isinstance(own, Mapping) else value
    return found


def _floating(name: str, path: str) -> Tensor:
    found = _array(name, path)
    if not found.is_floating_point():
        raise EditError(
            f"{name}: {path} holds {str(found.dtype).removeprefix('torch.')}, expected floating point: as the model "
            "takes them (masks: 0 to 1)."
        )
    return found.float()


def _array(name: str, path: str) -> Tensor:
    """Returns the tensor in a .npy file, or in a .safetensors file: the one of this name, or the only one."""
    file = user_path(path)
    if not file.is_file():
        raise EditError(f"{name}: no file at {path}. Check the path.")
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _named(name, path, load_file(file))
    except EditError:
        raise
    except Exception as error:  # numpy and safetensors raise many types
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else ""
        raise EditError(f"{name}: {path} cannot be read: {type(error).__name__}: {reason}.") from error
    raise EditError(f"{name}: {path} is neither .npy nor .safetensors.")


def _named(name: str, path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name in tensors:
        return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    held: Sequence[str] = sorted(tensors)
    raise EditError(
        f"{name}: {path} holds {', '.join(held) or 'nothing'}, expected one tensor, or one called {name!r}."
    )
