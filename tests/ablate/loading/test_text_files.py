"""Text files: windows and lines, the next token as target, bytes or a tokenizer of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import ablate
from ablate.loading import TextData

pytestmark = pytest.mark.usefixtures("no_network")


def _load(path: Path, **values: Any) -> ablate.Examples:
    return ablate.load_data(TextData.model_validate({"source": "text", "path": str(path), "length": 4} | values))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("abcdefghij", encoding="utf-8")
    return tmp_path / "notes.txt"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of four words, which would truncate and pad if it were let."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path / "tokenizer"


def test_windows_of_bytes_cover_every_token_once(
    notes: Path, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    with untouched():
        examples = _load(notes)
    assert examples.inputs().tolist() == [[97, 98, 99, 100], [101, 102, 103, 104], [105, 106, 0, 0]]
    assert examples.targets.tolist() == [[98, 99, 100, 101], [102, 103, 104, 105], [106, -100, -100, -100]]
    assert examples.ids == ("notes.txt:0", "notes.txt:1", "notes.txt:2")
    assert examples.groups == ("text",) * 3
    assert examples.per_token


@pytest.mark.parametrize(("text", "windows"), [("ab", 1), ("abcd", 1), ("abcde", 1), ("abcdef", 2), ("äb", 1)])
def test_no_window_without_a_target(text: str, windows: int, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    examples = _load(tmp_path / "x.txt")
    assert len(examples) == windows
    assert int((examples.targets >= 0).sum()) == len(text.encode()) - 1, "every token but the first is scored once"


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc\n\nx\r\nabcde\n", encoding="utf-8")
    examples = _load(tmp_path / "x.txt", per="line")
    assert examples.inputs().tolist() == [[97, 98, 99, 0], [97, 98, 99, 100]]
    assert examples.targets.tolist() == [[98, 99, -100, -100], [98, 99, 100, 101]]
    assert examples.ids == ("x.txt:1", "x.txt:4"), "lines as an editor counts them"


def test_a_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc\nabcdef\n", encoding="utf-8")
    with pytest.raises(ablate.DataError) as caught:
        _load(tmp_path / "x.txt", per="line")
    assert str(caught.value) == (
        "Line 2 of x.txt has 6 tokens, expected at most 5: 4 to see and one to score after them. Raise length, or cut "
        "the text with per = 'window'."
    )


def test_a_folder_has_its_sub_folders_as_groups(tmp_path: Path) -> None:
    for name in ("b.txt", "poems/a.txt", "poems/old/c.txt", "poems/d.md"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name, encoding="utf-8")
    examples = _load(tmp_path / "texts", length=64)
    assert examples.ids == ("b.txt:0", "poems/a.txt:0", "poems/old/c.txt:0")
    assert examples.groups == ("text", "poems", "poems/old")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_tokenizer_of_ones_own(form: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the cat sat the dog sat", encoding="utf-8")
    place = tokenizer if form == "folder" else tokenizer / "tokenizer.json"
    examples = _load(tmp_path / "x.txt", tokenizer=str(place))
    assert examples.inputs().tolist() == [[1, 2, 3, 1], [0, 3, 0, 0]]
    assert examples.targets.tolist() == [[2, 3, 1, 0], [3, -100, -100, -100]]


def test_the_same_tokens_as_transformers_gives(tokenizer: Path, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    text = "the cat sat on the the mat"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    expected = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))(
        text, truncation=False
    )
    examples = _load(tmp_path / "x.txt", tokenizer=str(tokenizer), length=32)
    assert examples.inputs()[0, :7].tolist() == expected["input_ids"]


def test_texts_that_cannot_be(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("x", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    for path, values, message in (
        ("x.txt", {}, "No file or folder at {}/x.txt. Expected a text file, or a folder of .txt files."),
        ("empty", {}, "{}/empty holds no .txt files."),
        (
            "one.txt",
            {},
            "{}/one.txt gives no example: a window needs at least two tokens, one to see and one to score.",
        ),
        ("latin.txt", {}, "{}/latin.txt cannot be read as UTF-8 text: "),
        ("notes.txt", {"tokenizer": "{}/empty"}, "No tokenizer at {}/empty/tokenizer.json. Give a folder with a token"),
        ("notes.txt", {"tokenizer": "{}/bad"}, "{}/bad/tokenizer.json holds no tokenizer: "),
    ):
        arguments = {name: value.format(tmp_path) for name, value in values.items()}
        with pytest.raises(ablate.LoadError) as caught:
            _load(tmp_path / path, **arguments)
        assert str(caught.value).startswith(message.format(tmp_path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(ablate.LoadError, match=r"Install it: pip install 'component-attribution\[text\]'$"):
        _load(notes, tokenizer=str(tmp_path / "bad"))
