"""Encoders of text in packages: sentences to embeddings, and chemical reactions to what each token is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ablate.loading.networks.checkpoints import load_weights, read_checkpoint
from ablate.loading.networks.text import LanguageModel
from ablate.loading.packages import require
from ablate.loading.tokens import TextTokens

# A reaction's SMILES, token by token. Source: Schwaller et al., Molecular Transformer (arXiv 1811.02633).
SMILES = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"


class SentenceEncoder(nn.Module):
    """An encoder of sentences: tokens (batch, tokens), 0 after the end, to embeddings (batch, width) of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean of the last layer over a sentence's tokens."""
        there = tokens != 0
        states: Tensor = self.model(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        total = (states * there[:, :, None]).sum(dim=1)
        return nn.functional.normalize(total / there.sum(dim=1, keepdim=True).clamp(min=1), dim=1)


class MaskedModel(LanguageModel):
    """A masked language model: tokens (batch, tokens) to what stands at each place, (batch, tokens, vocabulary)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of every place."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def sentence_encoder(files: Sequence[Path]) -> tuple[SentenceEncoder, TextTokens]:
    """Returns an encoder and its tokenizer; files: .safetensors, config.json, tokenizer.json."""
    weights = read_checkpoint(files[0])
    weights.pop("embeddings.position_ids", None)  # older versions of transformers stored what counts from 0
    tokenizer = require("tokenizers", "text").Tokenizer.from_file(str(files[2]))
    return SentenceEncoder(_loaded("AutoModel", files[1], weights, files[0])), TextTokens(tokenizer, frame=True)


def reaction_model(files: Sequence[Path]) -> tuple[MaskedModel, TextTokens]:
    """Returns a masked language model of reactions and its tokenizer; files: .bin, config.json, vocab.txt."""
    weights = {name: value for name, value in read_checkpoint(files[0]).items() if ".pooler." not in name}
    model = MaskedModel(_loaded("AutoModelForMaskedLM", files[1], weights, files[0]))
    words = files[2].read_text(encoding="utf-8").splitlines()
    return model, TextTokens(_reaction_tokenizer({word: i for i, word in enumerate(words)}), frame=True)


def _loaded(kind: str, config: Path, weights: dict[str, Tensor], where: Path) -> nn.Module:
    """Returns the model of a configuration with these weights, in float32."""
    transformers = require("transformers", "text")
    values = json.loads(config.read_text(encoding="utf-8"))
    made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model: nn.Module = getattr(transformers, kind).from_config(made, attn_implementation="sdpa")
    load_weights(model, weights, str(where))
    return model


def _reaction_tokenizer(vocabulary: dict[str, int]) -> Any:
    tokenizers = require("tokenizers", "text")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    # invert: what matches is a token, what does not is left out
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SMILES), behavior="removed", invert=True)
    marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    return made
