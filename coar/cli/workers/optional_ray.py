"""A command in which `--ray` may stand alone."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class OptionalRay(TyperCommand):
    """A command in which --ray needs no value: what follows it counts as one only if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Returns the rest of the arguments, with an empty address where none was given."""
        filled = []
        for i, word in enumerate(args):
            following = args[i + 1] if i + 1 < len(args) else ""
            filled.append("--ray=" if word == "--ray" and not _is_address(following) else word)
        return super().parse_args(ctx, filled)


def _is_address(word: str) -> bool:
    host, _, port = word.rpartition(":")
    return word in ("auto", "local") or word.startswith("ray://") or (host != "" and port.isdecimal())
