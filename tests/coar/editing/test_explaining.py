"""Settings as text: every type of every method is parsed, every setting is explained, all problems are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import pytest
from torch import nn

import coar
from ablate import Selection
from coar.cli.editing.explaining import check_settings, explain, parse_settings
from coar.editing.abstract import Editor, Found
from coar.editing.log import EditLog
from coar.editing.registry import editor_class, editor_names
from coar.editing.request import Request


@dataclass(frozen=True, kw_only=True)
class Base(Editor):
    """Base.

    Cost: nothing, in
    two lines.

    Attributes:
      whole: A count,
          on two lines.
      share, flag: Two at once.
    """

    whole: int = 3
    share: float = 0.5
    flag: bool = False


@dataclass(frozen=True, kw_only=True)
class Planted(Base):
    """Does nothing.

    But it says so at length.

    Attributes:
      share: Said anew.
      choice: One of them.
    """

    name: ClassVar[str] = "planted"
    title: ClassVar[str] = "Planted"
    source: ClassVar[str] = "nowhere"
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    choice: Literal["a", "b", 2] = "a"
    maybe: int | None = None
    place: str | None = None
    text: str = ""
    numbers: tuple[float, ...] = (0.0, 1.0)
    table: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("whole=7", 7),
        ("whole = -7", -7),
        ("share=1e-4", 1e-4),
        ("share=2", 2.0),
        ("flag=yes", True),
        ("flag=False", False),
        ("choice=b", "b"),
        ("choice=2", 2),
        ("maybe=none", None),
        ("maybe=4", 4),
        ("place=none", None),
        ("place=here", "here"),
        ("text=a=b", "a=b"),
        ("text=none", "none"),
        ("text=", ""),
        ("numbers=[0, 0.25, 1]", (0.0, 0.25, 1.0)),
        ("numbers=0.5", (0.5,)),
        ("numbers=[]", ()),
        ('table={"width": 16}', {"width": 16}),
    ],
)
def test_a_text_becomes_a_value(text: str, value: Any) -> None:
    name = text.partition("=")[0].strip()
    found = parse_settings(Planted, [text])
    assert found == {name: value}
    assert type(found[name]) is type(value)
    assert getattr(Planted(**found), name) == value


def test_all_problems_of_texts_are_named() -> None:
    with pytest.raises(coar.EditError) as refused:
        parse_settings(
            Planted,
            [
                *("whole=1.5", "share=fast", "flag=perhaps", "choice=c", "maybe=x", "numbers=1,two", "table=[1]"),
                *("wholes=1", "whole", "text=a", "text=b", "zzz=1"),
            ],
        )
    assert str(refused.value) == (
        "Settings of method 'planted':\n"
        "  whole: got '1.5', expected an integer.\n"
        "  share: got 'fast', expected a number.\n"
        "  flag: got 'perhaps', expected true or false.\n"
        "  choice: got 'c', expected one of a, b, 2.\n"
        "  maybe: got 'x', expected an integer or none.\n"
        "  numbers: got '1,two', expected a list of numbers.\n"
        "  table: got '[1]', expected a table as JSON.\n"
        "  wholes: no such setting. Did you mean 'whole'?\n"
        "  whole: expected name=value, e.g. whole=3.\n"
        "  text: given twice.\n"
        "  zzz: no such setting. Known: whole, share, flag, choice, maybe, place, text, numbers, table, seed."
    )


def test_values_of_a_file_are_checked() -> None:
    given = {"whole": 2, "share": 1, "flag": True, "choice": 2, "maybe": "none", "numbers": [0, 1], "table": {"a": 1}}
    assert check_settings(Planted, given) == {**given, "maybe": None, "numbers": (0.0, 1.0)}
    with pytest.raises(coar.EditError) as refused:
        check_settings(Planted, {"whole": True, "flag": 1, "choice": 3, "numbers": ["x"], "tables": {}, "share": [1]})
    assert str(refused.value) == (
        "Settings of method 'planted':\n"
        "  whole: got True, expected an integer.\n"
        "  flag: got 1, expected true or false.\n"
        "  choice: got 3, expected one of a, b, 2.\n"
        "  numbers: got ['x'], expected a list of numbers.\n"
        "  tables: no such setting. Did you mean 'table'?\n"
        "  share: got [1], expected a number."
    )


def test_an_explanation_comes_from_the_docstrings() -> None:
    found = explain(Planted)
    assert (found.name, found.title, found.source, found.needs) == ("planted", "Planted", "nowhere", ("labels",))
    assert found.about == (
        "Settings as text: every type of every method is parsed, every setting is explained, all problems are named.",
        "Does nothing.",
        "But it says so at length.",
    )
    assert found.cost == "nothing, in two lines."
    by_name = {setting.name: setting for setting in found.settings}
    assert list(by_name) == ["whole", "share", "flag", "choice", "maybe", "place", "text", "numbers", "table", "seed"]
    assert by_name["whole"].meaning == "A count, on two lines."
    assert by_name["share"].meaning == "Said anew."
    assert by_name["flag"].meaning == "Two at once."
    assert by_name["text"].meaning == ""
    assert by_name["seed"].meaning == "Of everything that is drawn at random."
    defaults = ["3", "0.5", "false", "a", "none", "none", '""', "[0.0, 1.0]", "{}", "0"]
    assert [setting.default for setting in found.settings] == defaults


@pytest.mark.parametrize("name", editor_names())
def test_every_setting_of_every_method_is_explained(name: str) -> None:
    kind = editor_class(name)
    found = explain(kind)
    assert [s.name for s in found.settings if not s.meaning] == []
    assert [s.name for s in found.settings if not s.takes] == []
    assert {s.name for s in found.settings} == {f.name for f in fields(kind)}
    assert found.cost, f"the docstring of {kind.__name__}, or of its base, has no paragraph 'Cost: ...'"
    # the defaults, typed as they are shown, are the defaults
    texts = [f"{s.name}={s.default}" for s in found.settings if s.default != '""']
    assert kind(**parse_settings(kind, texts)) == kind()
