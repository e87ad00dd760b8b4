"""Settings of editing methods as text: parsing what a user typed, and explaining each setting from the docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from ablate.errors import nearest
from coar.editing.abstract import Editor
from coar.editing.settings import adapters, expected
from coar.errors import EditError

NOTHING = ("none", "null")
SECTION = re.compile(r"^(Attributes|Args):$", re.MULTILINE)
COST = re.compile(r"^Cost(?::? )(?=\S)")
ENTRY = re.compile(r"^ {2}(\w+(?:, \w+)*): (.*)$")


@dataclass(frozen=True)
class SettingHelp:
    """One setting of a method, in words.

    Attributes:
      name: What it is called.
      takes: What values it takes.
      default: Its default, as it would be typed.
      meaning: From the docstring; "" where that says nothing.
    """

    name: str
    takes: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Explanation:
    """What a method does, in words, from its class and docstring.

    Attributes:
      name, title, source: Of the method.
      needs: Fields of the request that must be given.
      about: The first paragraph of its module's docstring, and those of its own, without settings and cost.
      cost: What its docstring says of it, or that of its base; "" if nothing.
      settings: All of them.
    """

    name: str
    title: str
    source: str
    needs: tuple[str, ...]
    about: tuple[str, ...]
    cost: str
    settings: tuple[SettingHelp, ...]


def explain(editor: type[Editor]) -> Explanation:
    """Returns what a method does and what its settings mean."""
    docstrings = [_docstring(kind.__doc__) for kind in editor.__mro__ if issubclass(kind, Editor)]
    module = inspect.getmodule(editor)
    about = (*_docstring(module.__doc__ if module else None)[0][:1], *docstrings[0][0])
    meanings: dict[str, str] = {}
    for _, entries in docstrings:
        meanings = {**entries, **meanings}
    by_name = {setting.name: setting for setting in fields(editor)}
    settings = tuple(
        SettingHelp(name, expected(known, as_text=True), _default(by_name[name]), meanings.get(name, ""))
        for name, known in _settings(editor).items()
    )
    costs = (text for paragraphs, _ in docstrings for text in paragraphs if COST.match(text))
    cost = COST.sub("", next(costs, ""))  # a method that only has other defaults costs what its base does
    own = [text for text in about if not COST.match(text)]
    return Explanation(editor.name, editor.title, editor.source, editor.needs, tuple(own), cost, settings)


def parse_settings(editor: type[Editor], given: Sequence[str]) -> dict[str, Any]:
    """Returns the settings in texts like `steps=50`, as the method's fields have them.

    Raises:
      EditError: With every problem: a text without =, an unknown or repeated name, a value of another type.
    """
    known = _settings(editor)
    values: dict[str, Any] = {}
    problems = []
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            problems.append(f"{text}: expected name=value, e.g. {_an_example(editor)}.")
        elif name in values:
            problems.append(f"{name}: given twice.")
        elif name not in known:
            problems.append(_unknown(name, known))
        else:
            try:
                values[name] = _read(value.strip(), known[name])
            except ValueError:
                problems.append(f"{name}: got {value.strip()!r}, expected {expected(known[name], as_text=True)}.")
    _refuse(editor, problems)
    return values


def check_settings(editor: type[Editor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as a file has them (numbers, texts, lists), as the method's fields have them.

    Raises:
      EditError: With every problem: an unknown name, a value of another type.
    """
    known = _settings(editor)
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if name not in known:
            problems.append(_unknown(name, known))
            continue
        try:
            # TOML has no null: there, too, the word none stands for it
            values[name] = _read(value if isinstance(value, str) else to_json(value), known[name])
        except ValueError:
            problems.append(f"{name}: got {value!r}, expected {expected(known[name], as_text=True)}.")
    _refuse(editor, problems)
    return values


def _settings(editor: type[Editor]) -> dict[str, TypeAdapter[Any]]:
    """Returns setting -> what reads it, the seed, which every method has, last."""
    return dict(sorted(adapters(editor).items(), key=lambda item: item[0] == "seed"))


def _refuse(editor: type[Editor], problems: Sequence[str]) -> None:
    if problems:
        raise EditError("\n".join([f"Settings of method {editor.name!r}:", *(f"  {problem}" for problem in problems)]))


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    close = nearest(name, known)
    return f"{name}: no such setting. " + (f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}.")


def _an_example(editor: type[Editor]) -> str:
    setting = next(iter(_settings(editor)))
    return f"{setting}={_text(getattr(editor, setting, 0))}"


def _read(text: str | bytes, setting: TypeAdapter[Any]) -> Any:
    """Returns the value that a text stands for; raises ValueError. A text is a text only if it is nothing else.

    JSON (bytes are nothing else), or as people type: `none`, `yes`, words without quotes, a list without brackets.
    """
    if isinstance(text, bytes):
        return setting.validate_json(text, strict=True)
    ways: list[Callable[[], Any]] = [lambda: setting.validate_json(text, strict=True)]
    if text.lower() in NOTHING:
        ways.append(lambda: setting.validate_python(None))
    ways += [
        lambda: setting.validate_python(text),
        lambda: setting.validate_python([word.strip() for word in text.strip("[]() ").split(",") if word.strip()]),
    ]
    for way in ways:
        with suppress(ValidationError):
            return way()
    raise ValueError(text)


def _default(setting: Field[Any]) -> str:
    if setting.default is not MISSING:
        return _text(setting.default)
    return _text(setting.default_factory()) if setting.default_factory is not MISSING else "-"


def _text(value: Any) -> str:
    """Returns a value as a user would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return json.dumps(dict(value), default=str)
    return '""' if value == "" else str(value)


def _docstring(docstring: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the paragraphs of a docstring, and what it says of each attribute."""
    text = inspect.cleandoc(docstring or "")
    before, *rest = SECTION.split(text)
    after: list[str] = []
    entries: dict[str, str] = {}
    names: list[str] = []
    inside = bool(rest)
    for line in rest[-1].splitlines() if rest else []:
        found = ENTRY.match(line)
        if inside and found:
            names = found.group(1).split(", ")
            entries |= dict.fromkeys(names, found.group(2))
        elif inside and line.startswith("   "):
            for name in names:
                entries[name] += " " + line.strip()
        elif line.strip() or after:
            inside = False
            after.append(line)
    joined = before.strip() + "\n\n" + "\n".join(after)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=Cost\b|Fails )", joined) if part.strip()]
    return tuple(paragraphs), entries
