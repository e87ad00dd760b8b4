"""Decoders in formats of their own, as Llamas of transformers: glassllm's arrays, and a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.loading.networks.checkpoints import load_weights
from ablate.loading.networks.text import LanguageModel, language_model_from_config
from ablate.loading.packages import require
from ablate.loading.tokens import TextTokens

SPACE = "▁"  # how glassllm writes a space
MARK = 3  # the type of a GGUF token that no text is merged into

# What Llama calls the parts of a layer, by the names of glassllm and of GGUF.
GLASS_PARTS = {
    "norm1.gamma": "input_layernorm",
    "norm2.gamma": "post_attention_layernorm",
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}
GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def glass(files: Sequence[Path]) -> tuple[LanguageModel, TextTokens]:
    """Returns a decoder of glassllm and its tokenizer; files: its .npz, its .tokenizer.json."""
    with np.load(files[0], allow_pickle=False) as archive:
        config = json.loads(str(archive["__config__"]))
        arrays = {name: torch.from_numpy(archive[name]).float() for name in archive if name != "__config__"}
    weights = {"model.embed_tokens.weight": arrays.pop("E"), "model.norm.weight": arrays.pop("norm_f.gamma")}
    for name, value in arrays.items():
        _, layer, part = name.split(".", 2)
        # x @ W there, W @ x here
        weights[f"model.layers.{layer}.{GLASS_PARTS[part]}.weight"] = value.T.contiguous() if value.ndim == 2 else value
    shape = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": len(arrays["blocks.0.ffn.W2"]),
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "max_position_embeddings": config["max_len"],
        "rms_norm_eps": config["eps"],
    }
    model = _llama(shape, config["rope_base"], weights, files[0])
    return model, TextTokens(_glass_tokenizer(json.loads(files[1].read_text(encoding="utf-8"))))


def smollm(files: Sequence[Path]) -> tuple[LanguageModel, TextTokens]:
    """Returns the Llama in a GGUF file in float32, and its tokenizer of bytes; the file is SmolLM2's."""
    gguf = require("gguf")
    reader = gguf.GGUFReader(files[0])
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weights[_gguf_name(tensor.name)] = torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # a copy: the file is mapped
        )

    def said(key: str) -> Any:
        return reader.fields[key].contents()

    shape = {
        "vocab_size": said("llama.vocab_size"),
        "hidden_size": said("llama.embedding_length"),
        "intermediate_size": said("llama.feed_forward_length"),
        "num_hidden_layers": said("llama.block_count"),
        "num_attention_heads": said("llama.attention.head_count"),
        "num_key_value_heads": said("llama.attention.head_count_kv"),
        "max_position_embeddings": said("llama.context_length"),
        "rms_norm_eps": said("llama.attention.layer_norm_rms_epsilon"),
    }
    model = _llama(shape, said("llama.rope.freq_base"), weights, files[0])
    tokens, kinds = said("tokenizer.ggml.tokens"), said("tokenizer.ggml.token_type")
    marks = [token for token, kind in zip(tokens, kinds, strict=True) if kind == MARK]
    return model, TextTokens(_byte_tokenizer(tokens, said("tokenizer.ggml.merges"), marks))


def _gguf_name(name: str) -> str:
    if name in ("token_embd.weight", "output_norm.weight"):
        return "model.embed_tokens.weight" if name == "token_embd.weight" else "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{GGUF_PARTS[part]}.weight"


def _llama(shape: Mapping[str, Any], rotary_base: float, weights: Mapping[str, Tensor], where: Path) -> LanguageModel:
    """Returns a Llama of this shape and these weights, whose rotary pairs are (2i, 2i + 1); its embedding is tied."""
    rotary = {"rope_type": "default", "rope_theta": rotary_base}
    config = {"model_type": "llama", **shape, "rope_parameters": rotary, "tie_word_embeddings": True}
    model = language_model_from_config(config, None)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    turned = {name: rotary_halves(value, head) if _rotated(name) else value for name, value in weights.items()}
    load_weights(model.model, turned, str(where))
    return model


def _rotated(name: str) -> bool:
    return name.removesuffix(".weight").endswith(ROTATED)


def rotary_halves(weight: Tensor, head: int) -> Tensor:
    """Returns query or key rows (heads * head, width) for rotary pairs (i, i + head/2), given for (2i, 2i + 1)."""
    return weight.reshape(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _glass_tokenizer(saved: Mapping[str, Any]) -> Any:
    tokenizers = require("tokenizers", "text")
    merges = [(first, second) for first, second in saved["merges"]]
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *saved["alphabet"], *(first + second for first, second in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))  # noqa: S106  # of text
    normalizers, pieces = tokenizers.normalizers, tokenizers.Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, behavior="isolated")
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.Fuse()])
    return made


def _byte_tokenizer(tokens: Sequence[str], merges: Sequence[str], marks: Sequence[str]) -> Any:
    """Returns a tokenizer of bytes in which every digit stands alone, as SmolLM2's does."""
    tokenizers = require("tokenizers", "text")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made
