"""What `coar ablate` and `coar estimate` have in common: one worker, many on this machine, on Ray, or by Slurm."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from ablate.campaign.spec import CampaignSpec
from ablate.workers.shares import choose_devices
from coar.cli.gathered import gathered
from coar.cli.workers.flags import WorkerFlags
from coar.cli.workers.spread import Opener, Outcome, Spread
from coar.cli.workers.stopping import ending_in_order


@dataclass(frozen=True)
class Workers:
    """What a command is given of these flags: how to work itself, or how to have others do it."""

    flags: WorkerFlags
    command: tuple[str, ...]

    @property
    def sharing(self) -> dict[str, Any]:
        """Returns the arguments of `ablate.run` and `coar.estimate` that say how one process works beside others."""
        return self.flags.sharing

    @property
    def device(self) -> str | None:
        """Where this process is to run, if that was said."""
        flags = self.flags
        return flags.device if flags.devices is None else choose_devices(flags.devices, flags.workers)[0]

    def spread(
        self, path: Path, spec: CampaignSpec, store: str, opened: Opener, about: tuple[str, str], progress: bool
    ) -> Outcome:
        """Has other processes do the work, where that was asked for.

        Args:
          path: The spec's file.
          spec: What is in it.
          store: Where the work is stored.
          opened: Opens it.
          about: What the progress says, and what the rows of the store are.
          progress: Show it.
        """
        if not self.flags.several:
            return Outcome.HERE
        return Spread(self.flags, self.command, path, spec, store, opened, *about, progress).run()


def with_workers(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose parameter `workers: Workers` is given by the options of `WorkerFlags`, one by one."""
    own = inspect.signature(command, eval_str=True)
    flags = inspect.Parameter("flags", inspect.Parameter.KEYWORD_ONLY)
    context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def run(_context: typer.Context, flags: WorkerFlags, **values: Any) -> None:
        with ending_in_order(flags.requeue, flags.tied):
            command(**values, workers=Workers(flags, _command_line(_context)))

    kept = [p.replace(kind=flags.kind) for p in own.parameters.values() if p.name != "workers"]
    run.__signature__ = inspect.Signature([context, *kept, flags])  # type: ignore[attr-defined]
    return gathered(run, "flags", WorkerFlags)


def _command_line(context: typer.Context) -> tuple[str, ...]:
    """Returns the command as it was given, without what is about workers or how results are shown."""
    left_out = {field.name for field in fields(WorkerFlags)} - {"lease_seconds"} | {"quiet", "as_json"}
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in left_out or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            words.insert(0, str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [f"{parameter.opts[0]}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    return (context.info_name or "", *words)
