"""Reads the docstrings as they are written here: entries of several names, and `Cost:` and `Source:` as headings.

An extension of griffe, which reads the packages for the reference.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# `include, exclude: Patterns.` Entries are indented, prose is not. They go on in lines that are indented further.
_JOINT = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_HEADED = re.compile(r"\n+(Cost|Source): ")


def readable(text: str) -> str:
    """Returns a docstring with an entry for every name, and a paragraph of its own for what has a heading."""
    text = _JOINT.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
    return _HEADED.sub(r"\n\n**\1:** ", text)


class HouseStyle(griffe.Extension):
    """Called by griffe for every function, class and attribute that it reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring in place, before its sections are parsed."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
