"""A dataclass as options of a command: a field each, which the command gets back as one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints


def gathered(command: Callable[..., None], name: str, kind: type) -> Callable[..., None]:
    """Returns a command whose parameter `name` is made of options: the fields of the dataclass `kind`, one by one."""
    hints = get_type_hints(kind, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(kind)]
    own = inspect.signature(command, eval_str=True)
    kept = [p.replace(kind=keyword) for p in own.parameters.values() if p.name != name]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**{p.name: values[p.name] for p in kept}, **{name: kind(**{p.name: values[p.name] for p in added})})

    run.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*kept, *added]} | {"return": None}
    return run
