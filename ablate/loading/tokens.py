"""A language model's own tokenizer, where other models have a transform of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TextTokens:
    """Turns a text into the tokens of the model it came with.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      frame: Put the model's marks of beginning and end around the text, as encoders want it.
    """

    def __init__(self, tokenizer: Any, frame: bool = False) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._frame = tokenizer, frame

    def __call__(self, text: str) -> Tensor:
        """Returns the tokens of a text, (tokens,) int64."""
        return torch.tensor(self._tokenizer.encode(text, add_special_tokens=self._frame).ids, dtype=torch.int64)

    def text(self, tokens: Tensor | Sequence[int]) -> str:
        """Returns the text of tokens."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False))
