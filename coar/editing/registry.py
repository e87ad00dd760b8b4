"""Editing methods by name. A new method is one file and one line here; the contract tests then run on it."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from ablate.errors import UnknownNameError
from coar.editing.abstract import Editor
from coar.errors import EditError

_EDITORS: dict[str, str] = {
    "coar": "coar.editing.coar_edit.editor.COAREditor",
    "finetune": "coar.editing.methods.finetune.FineTuning",
    "output-collision": "coar.editing.methods.output_collision.OutputCollision",
    "1-li": "coar.editing.methods.interpolation.OneLayerInterpolation",
    "paint": "coar.editing.methods.interpolation.Paint",
    "lowrank": "coar.editing.methods.lowrank.DirectLowRank",
    "rewriting": "coar.editing.methods.rewriting.Rewriting",
    "hypernetwork-mask": "coar.editing.masks.editor.HypernetworkMask",
    "mean-mask": "coar.editing.masks.editor.MeanMask",
    "random-mask": "coar.editing.masks.controls.RandomMask",
}


def editor_names() -> tuple[str, ...]:
    """Returns the names of the editing methods."""
    return tuple(_EDITORS)


def editor_class(name: str) -> type[Editor]:
    """Returns the method of this name; its fields are its settings.

    Raises:
      UnknownNameError: No such method; offers the nearest matches.
    """
    if name not in _EDITORS:
        raise UnknownNameError("editing method", str(name), _EDITORS)
    module, _, attribute = _EDITORS[name].rpartition(".")
    found: type[Editor] = getattr(import_module(module), attribute)
    return found


def get_editor(method: str | Editor, **settings: Any) -> Editor:
    """Returns the method of this name with these settings, or the instance given.

    Raises:
      UnknownNameError: No such method; offers the nearest matches.
      EditError: A setting that the method does not have, or a value that it does not take.
    """
    if isinstance(method, Editor):
        if settings:
            raise EditError(
                f"Settings ({', '.join(settings)}) were given beside an instance of {type(method).__name__}, which has "
                "its own. Give them to its constructor."
            )
        return method
    chosen = editor_class(method)
    known = [setting.name for setting in fields(chosen)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise EditError(
            f"Method {method!r} has no setting {', '.join(map(repr, unknown))}; it takes {', '.join(known)}."
        )
    return chosen(**settings)
