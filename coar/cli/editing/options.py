"""The options of `coar edit` that say what to change: which examples, which method, where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.gathered import gathered

METHOD = "How to edit, and where"
EXAMPLES = "Which of the data's examples"
FILES = "Examples, labels and masks from files (.npy or .safetensors)"


@dataclass(frozen=True)
class EditOptions:
    """What was asked for on the command line; None where nothing was said."""

    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="See --methods; default: that of the spec's table `edit`; with a store of attributions: coar.",
            rich_help_panel=METHOD,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method, see --explain; repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules that may change, e.g. 'layer4.*'; repeatable. Default: the method chooses.",
            rich_help_panel=METHOD,
        ),
    ] = None
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="Component kind of the selection, e.g. conv_filter; repeatable.", rich_help_panel=METHOD),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Strength, 0 to 1; default: what the method chose, mostly 1.", rich_help_panel=METHOD
        ),
    ] = None
    k: Annotated[
        int | None,
        typer.Option("-k", help="Of coar: how many components to ablate; default: 20.", rich_help_panel=METHOD),
    ] = None
    direction: Annotated[
        str | None,
        typer.Option(help="Of coar: raise or lower the target's output; default: raise.", rich_help_panel=METHOD),
    ] = None
    target_group: Annotated[
        list[str] | None,
        typer.Option(help="Group whose output should change; repeatable.", rich_help_panel=EXAMPLES),
    ] = None
    target: Annotated[
        list[int] | None, typer.Option(help="Position of a target example; repeatable.", rich_help_panel=EXAMPLES)
    ] = None
    target_id: Annotated[
        list[str] | None, typer.Option(help="Id of a target example; repeatable.", rich_help_panel=EXAMPLES)
    ] = None
    reference_group: Annotated[
        list[str] | None, typer.Option(help="Group that should stay; repeatable.", rich_help_panel=EXAMPLES)
    ] = None
    reference: Annotated[
        list[int] | None, typer.Option(help="Position of a reference example; repeatable.", rich_help_panel=EXAMPLES)
    ] = None
    reference_id: Annotated[
        list[str] | None, typer.Option(help="Id of a reference example; repeatable.", rich_help_panel=EXAMPLES)
    ] = None
    ids_contain: Annotated[
        str,
        typer.Option(help="Of the groups take only examples whose id contains this.", rich_help_panel=EXAMPLES),
    ] = ""
    validation_target_group: Annotated[
        list[str] | None,
        typer.Option(help="Group to choose a strength on, to be changed; repeatable.", rich_help_panel=EXAMPLES),
    ] = None
    validation_reference_group: Annotated[
        list[str] | None,
        typer.Option(help="Group to choose a strength on, to stay; repeatable.", rich_help_panel=EXAMPLES),
    ] = None
    validation_ids_contain: Annotated[
        str,
        typer.Option(help="Of these groups take only examples whose id contains this.", rich_help_panel=EXAMPLES),
    ] = ""
    label: Annotated[
        int | None,
        typer.Option(
            min=0, help="The class that all targets should get; default: the labels of the data.", rich_help_panel=FILES
        ),
    ] = None
    labels: Annotated[
        Path | None, typer.Option(help="The class that each target should get, (n,) integers.", rich_help_panel=FILES)
    ] = None
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="The targets themselves, as the model takes them; instead of --target.", rich_help_panel=FILES
        ),
    ] = None
    originals: Annotated[
        Path | None,
        typer.Option(help="The targets before a transformation that should not matter.", rich_help_panel=FILES),
    ] = None
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Where the concept is in each target, (n, height, width) from 0 to 1.", rich_help_panel=FILES
        ),
    ] = None

    def as_table(self) -> dict[str, Any]:
        """Returns what was said, as the `[edit]` table of a spec says it; settings are left out."""
        names = ("method", "label", "labels", "inputs", "originals", "masks", "alpha", "select", "kinds")
        found: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        found = {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}
        for name, own in (
            ("target", _some(self.target, self.target_id, self.target_group, self.ids_contain)),
            ("reference", _some(self.reference, self.reference_id, self.reference_group, self.ids_contain)),
        ):
            if own:
                found[name] = own
        validation = {
            "target": _some(None, None, self.validation_target_group, self.validation_ids_contain),
            "reference": _some(None, None, self.validation_reference_group, self.validation_ids_contain),
        }
        if any(validation.values()):
            found["validation"] = {name: own for name, own in validation.items() if own}
        return found

    def given(self) -> list[str]:
        """Returns the fields that were given."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


def _some(
    positions: list[int] | None, ids: list[str] | None, groups: list[str] | None, ids_contain: str
) -> dict[str, Any]:
    """Returns examples as a spec names them; nothing where none were named."""
    if not (positions or ids or groups):
        return {}
    pairs = {"positions": positions, "ids": ids, "groups": groups, "ids_contain": ids_contain}
    return {name: value or ("" if name == "ids_contain" else []) for name, value in pairs.items()}


def option_name(field: str) -> str:
    """Returns the option by which a field of `EditOptions` is given."""
    return {"settings": "--set", "k": "-k"}.get(field, f"--{field.replace('_', '-')}")


def with_edit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose parameter `wish: EditOptions` is given by the options of `EditOptions`, one by one."""
    return gathered(command, "wish", EditOptions)
