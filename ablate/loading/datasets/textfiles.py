"""Text files as examples for language models: windows of a fixed length, or lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ablate.data.examples import TEXT_GROUP, Examples
from ablate.errors import DataError, LoadError
from ablate.loading.packages import one_line, require
from ablate.loading.tokens import TextTokens

NOT_SCORED = -100
Tokenizer = Callable[[str], npt.NDArray[np.int64]]


def text_data(path: Path, tokenizer: str | TextTokens | None, length: int, per: str) -> Examples:
    """Returns the examples of a text file, or of all .txt files of a folder: tokens, and the next token of each.

    Args:
      path: A file, or a folder; its sub-folders name groups.
      tokenizer: A folder with a `tokenizer.json`, or that file, or a model's own; None: the text's bytes, 0 to 255.
      length: Tokens per example.
      per: `window`: a file's tokens are cut into runs of `length`, the last one shorter. `line`: every line that has
        at least two tokens is an example; one that is longer than `length` + 1 tokens is an error.

    Returns:
      Inputs (examples, length) int64; targets (examples, length), the next token, -100 after an example's end, where
      inputs are 0. Ids say file and first line or window: `notes.txt:3`.
    """
    tokenize = _tokenize(tokenizer)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    ids: list[str] = []
    groups: list[str] = []
    for file, name, group in _files(path):
        for place, tokens in _examples_of(_read(file), name, tokenize, length, per):
            padded = torch.zeros(length, dtype=torch.int64)
            scored = torch.full((length,), NOT_SCORED, dtype=torch.int64)
            padded[: min(length, len(tokens))] = tokens[:length]
            scored[: len(tokens) - 1] = tokens[1:]
            inputs.append(padded)
            targets.append(scored)
            ids.append(place)
            groups.append(group)
    if not inputs:
        raise LoadError(f"{path} gives no example: a {per} needs at least two tokens, one to see and one to score.")
    return Examples(torch.stack(inputs), torch.stack(targets), ids, groups)


def _examples_of(text: str, name: str, tokenize: Tokenizer, length: int, per: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (id, tokens) of one file: at most `length` to see, and the one after them."""
    if per == "window":
        tokens = torch.from_numpy(tokenize(text))
        for window, start in enumerate(range(0, len(tokens) - 1, length)):
            yield f"{name}:{window}", tokens[start : start + length + 1]
        return
    for number, line in enumerate(text.splitlines(), start=1):
        tokens = torch.from_numpy(tokenize(line))
        if len(tokens) > length + 1:
            raise DataError(
                f"Line {number} of {name} has {len(tokens)} tokens, expected at most {length + 1}: {length} to see and "
                "one to score after them. Raise length, or cut the text with per = 'window'."
            )
        if len(tokens) >= 2:
            yield f"{name}:{number}", tokens


def _files(path: Path) -> Iterator[tuple[Path, str, str]]:
    """Yields (file, name, group)."""
    if path.is_file():
        yield path, path.name, TEXT_GROUP
        return
    if not path.is_dir():
        raise LoadError(f"No file or folder at {path}. Expected a text file, or a folder of .txt files.")
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise LoadError(f"{path} holds no .txt files.")
    for file in files:
        relative = file.relative_to(path)
        yield file, relative.as_posix(), relative.parent.as_posix() if len(relative.parts) > 1 else TEXT_GROUP


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} cannot be read as UTF-8 text: {one_line(error)}.") from error


def _tokenize(tokenizer: str | TextTokens | None) -> Tokenizer:
    if isinstance(tokenizer, TextTokens):
        return lambda text: tokenizer(text).numpy()
    return _byte_tokens if tokenizer is None else _tokenizer(Path(tokenizer))


def _byte_tokens(text: str) -> npt.NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)


def _tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise LoadError(f"No tokenizer at {file}. Give a folder with a tokenizer.json, or leave tokenizer out: bytes.")
    tokenizers = require("tokenizers", "text")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise LoadError(f"{file} holds no tokenizer: {one_line(error)}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
