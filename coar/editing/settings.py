"""What settings take: said once, in the annotation of a field; checked and put into words from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

Count = Annotated[int, Field(ge=1)]
CountFromZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FromZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PercentagePoints = Annotated[float, Field(ge=0, le=100, description="percentage points")]

_NAMES = {"integer": "an integer", "number": "a number", "string": "text", "object": "a table"}
_IN_PYTHON = {**_NAMES, "boolean": "True or False", "null": "None", "array": "a tuple"}
_AS_TEXT = {**_NAMES, "boolean": "true or false", "null": "none", "array": "a list", "object": "a table as JSON"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "to below"}
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "literal_error"}


def problems_of(settings: Any, rules: Callable[[], list[str]]) -> list[str]:
    """Returns what is wrong with the fields of a dataclass, in words, each for itself and with each other.

    Args:
      settings: The dataclass.
      rules: Returns what is wrong between fields; asked only if all are of their type, so that it may compare them.
    """
    found, comparable = [], True
    for name, adapter in adapters(settings.__class__).items():
        value = getattr(settings, name)
        try:
            adapter.validate_python(_plain(value), strict=True)
        except ValidationError as error:
            found.append(f"{name} is {value!r}, expected {expected(adapter)}")
            comparable &= any(problem["type"] in _OUT_OF_RANGE for problem in error.errors())
    return [*found, *rules()] if comparable else found


@lru_cache
def adapters(kind: type) -> Mapping[str, TypeAdapter[Any]]:
    """Returns what reads each setting of a dataclass, by name; without those whose type pydantic cannot read."""
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # somebody's own method, with names that only type checkers see
        return {}
    found = {field.name: _adapter(hints[field.name]) for field in fields(kind) if field.init}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def expected(adapter: TypeAdapter[Any], *, as_text: bool = False) -> str:
    """Returns in words what values a setting takes, in Python or `as_text`: as one types them."""
    return _words(adapter.json_schema(schema_generator=_Schema), _AS_TEXT if as_text else _IN_PYTHON)


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return None


def _plain(value: Any) -> Any:
    """Returns numpy's numbers and mappings that cannot be written to as what they stand for; others as they are."""
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if isinstance(value, Mapping) else value


class _Schema(GenerateJsonSchema):
    """Names the types that only Python has instead of failing on them."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {"type": schema["cls"].__name__ if "cls" in schema else "a function"}


def _words(schema: Mapping[str, Any], names: Mapping[str, str]) -> str:
    if "anyOf" in schema:
        found = [_words(choice, names) for choice in schema["anyOf"]]
        *first, last = [words for words in found if words]
        return f"{', '.join(first)} or {last}" if first else last
    if "enum" in schema or "const" in schema:
        known = schema.get("enum", [schema.get("const")])
        return f"one of {', '.join(map(str, known))}" if len(known) > 1 else str(known[0])
    kind = schema.get("type", "anything")
    if kind == "array":
        items = _words(schema["items"], names).removeprefix("an ").removeprefix("a ")
        return f"{names['array']} of {items if items == 'text' else items + 's'}"
    # what only Python has cannot be typed
    name = schema.get("description") or names.get(kind, "" if names is _AS_TEXT else kind)
    bounds = [f"{words} {schema[bound]:g}" for bound, words in _BOUNDS.items() if bound in schema]
    return f"{name} {' '.join(bounds)}" if bounds else str(name)
