"""Commands that are imported when they are run: what lists them reads their files, and imports nothing."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import coar
from coar.cli.workers.optional_ray import OptionalRay


class CommandsOnDemand(TyperGroup):
    """A group of commands that are known by where they are, as `module:function`.

    Attributes:
      panels: Panel of the help -> command -> where it is; for subclasses to set.
    """

    panels: Mapping[str, Mapping[str, str]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the commands' names, in the order of the help."""
        return [name for commands in self.panels.values() for name in commands]

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """Returns what help and completion show of a command: its name, its panel and what it does."""
        for panel, commands in self.panels.items():
            if cmd_name in commands:
                return TyperCommand(cmd_name, help=_docstring(commands[cmd_name]), rich_help_panel=panel)
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the command that is to be run, imported."""
        name, known, rest = super().resolve_command(ctx, args)
        return name, known and self.loaded(str(name)), rest

    def loaded(self, name: str) -> TyperCommand:
        """Returns a command with its options and what it runs."""
        place = next(commands[name] for commands in self.panels.values() if name in commands)
        module, _, function = place.partition(":")
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(name, cls=OptionalRay)(getattr(import_module(module), function))
        command: TyperCommand = typer.main.get_command(alone)  # type: ignore[assignment]
        return command


@cache
def _docstring(place: str) -> str:
    """Returns what a function `module:function` of this package says it does, without importing its module."""
    module, _, function = place.partition(":")
    file = Path(str(coar.__file__)).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return next(ast.get_docstring(n) or "" for n in body if isinstance(n, ast.FunctionDef) and n.name == function)
