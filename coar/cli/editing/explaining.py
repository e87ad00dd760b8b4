"""Settings of editing methods as text: parsing what a user typed, and explaining each setting from the docstrings."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ablate.errors import nearest
from coar.editing.abstract import Editor
from coar.errors import EditError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
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
        SettingHelp(name, _takes(hint), _default(by_name[name]), meanings.get(name, ""))
        for name, hint in _hints(editor).items()
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
    hints = _hints(editor)
    values: dict[str, Any] = {}
    problems = []
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            problems.append(f"{text}: expected name=value, e.g. {_an_example(editor)}.")
        elif name in values:
            problems.append(f"{name}: given twice.")
        elif name not in hints:
            problems.append(_unknown(name, hints))
        else:
            try:
                values[name] = _parsed(value.strip(), hints[name])
            except ValueError:
                problems.append(f"{name}: got {value.strip()!r}, expected {_takes(hints[name])}.")
    _refuse(editor, problems)
    return values


def check_settings(editor: type[Editor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as a file has them (numbers, texts, lists), as the method's fields have them.

    Raises:
      EditError: With every problem: an unknown name, a value of another type.
    """
    hints = _hints(editor)
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if name not in hints:
            problems.append(_unknown(name, hints))
            continue
        try:
            # TOML has no null: there, too, the word none stands for it
            values[name] = _parsed(value, hints[name]) if isinstance(value, str) else _checked(value, hints[name])
        except ValueError:
            problems.append(f"{name}: got {value!r}, expected {_takes(hints[name])}.")
    _refuse(editor, problems)
    return values


def _hints(editor: type[Editor]) -> dict[str, Any]:
    """Returns setting -> its type, the seed, which every method has, last."""
    hints = get_type_hints(editor)
    own = sorted((s.name for s in fields(editor) if s.init), key=lambda name: name == "seed")
    return {name: hints[name] for name in own}


def _refuse(editor: type[Editor], problems: Sequence[str]) -> None:
    if problems:
        raise EditError("\n".join([f"Settings of method {editor.name!r}:", *(f"  {problem}" for problem in problems)]))


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    close = nearest(name, known)
    return f"{name}: no such setting. " + (f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}.")


def _an_example(editor: type[Editor]) -> str:
    setting = next(iter(_hints(editor)))
    return f"{setting}={_text(getattr(editor, setting, 0))}"


def _choices(hint: Any) -> tuple[Any, ...]:
    """Returns what a value may be, one by one: the members of a union, itself otherwise."""
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def _parsed(text: str, hint: Any) -> Any:
    """Returns the value that a text stands for; raises ValueError. A text is a text only if it is nothing else."""
    for choice in sorted(_choices(hint), key=lambda choice: (choice is str) - (choice is types.NoneType)):
        try:
            return _parsed_as(text, choice)
        except ValueError:
            continue
    raise ValueError(text)


def _parsed_as(text: str, kind: Any) -> Any:
    origin = get_origin(kind)
    if kind is types.NoneType and text.lower() in ("none", "null"):
        return None
    if origin is Literal:
        found = [choice for choice in get_args(kind) if str(choice) == text]
        if found:
            return found[0]
    elif kind is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    elif kind in (int, float):
        return kind(text)
    elif origin in (tuple, list, Sequence):
        words = text.strip("[]() ")
        item = get_args(kind)[0]
        return tuple(_parsed(word.strip(), item) for word in words.split(",") if word.strip())
    elif _is_table(kind):
        found_table = json.loads(text)
        if isinstance(found_table, dict):
            return found_table
    elif kind in (str, Any):
        return text
    raise ValueError(text)


def _checked(value: Any, hint: Any) -> Any:
    """Returns a value that a file has, with lists as tuples; raises ValueError if it is of another type."""
    for choice in _choices(hint):
        origin = get_origin(choice)
        if origin is Literal and any(value == known and type(value) is type(known) for known in get_args(choice)):
            return value
        if choice is bool and isinstance(value, bool):
            return value
        if choice is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if choice is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if origin in (tuple, list, Sequence) and isinstance(value, (list, tuple)):
            return tuple(_checked(item, get_args(choice)[0]) for item in value)
        if _is_table(choice) and isinstance(value, Mapping):
            return dict(value)
    raise ValueError(value)


def _is_table(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _takes(hint: Any) -> str:
    """Returns in words what values a type has."""
    words = []
    for choice in _choices(hint):
        origin = get_origin(choice)
        if origin is Literal:
            words += [str(known) for known in get_args(choice)]
        elif choice in NAMES:
            words.append(NAMES[choice])
        elif origin in (tuple, list, Sequence):
            words.append(f"a list of {PLURALS.get(get_args(choice)[0], 'values')}")
        elif _is_table(choice):
            words.append("a table as JSON")
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "none",
}
PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


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
