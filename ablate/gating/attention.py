"""Multi-head attention taken apart: the same numbers as torch's fused function, with every projection in reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[..., Tensor]
"""`project(role, x, weight, bias, start, stop)`: x times rows of a weight; roles are in, q, k, v and out."""


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Switches off the fused attention and encoder layers that read weights behind every module's back."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def attention_forward(
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns what `F.multi_head_attention_forward` returns, with every projection a call of `project`.

    The signature is torch's. Inputs are (length, batch, channels), or (length, channels) for one example.
    """
    unusual = {
        "bias_k": bias_k is not None or bias_v is not None,
        "add_zero_attn": add_zero_attn,
        "static_k": static_k is not None or static_v is not None,
        "dropout in training mode": training and dropout_p > 0,
    }
    found = [name for name, there in unusual.items() if there]
    if found:
        raise NotImplementedInGatingError(f"nn.MultiheadAttention with {', '.join(found)}")
    single = query.ndim == 2
    if single:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    width = query.shape[-1]
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        given = zip("qkv", (query, key, value), weights, biases, strict=True)
        q, k, v = (project(role, x, w, b) for role, x, w, b in given)
    elif query is key and key is value:
        q, k, v = project("in", query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        spans = [(i * width, (i + 1) * width) for i in range(3)]
        q, k, v = (
            project("in", x, in_proj_weight, in_proj_bias, *span)
            for x, span in zip((query, key, value), spans, strict=True)
        )
    length, batch = q.shape[:2]
    q, k, v = (
        p.reshape(*p.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for p in (q, k, v)
    )  # (batch, heads, length, width)
    bias = _attention_bias(attn_mask, key_padding_mask, batch, num_heads, q.dtype)
    mixed, shares = _attend(q, k, v, bias, is_causal, need_weights)
    if shares is not None:
        shares = shares.mean(dim=1) if average_attn_weights else shares
        shares = shares[0] if single else shares
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, batch, -1)
    out = project("out", mixed, out_proj_weight, out_proj_bias)
    return (out[:, 0] if single else out), shares


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns what the heads mix, (batch, heads, length, width), and, if asked, their weights."""
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        return shares @ v, shares
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal and bias is None), None


class NotImplementedInGatingError(RuntimeError):
    """A variant of attention that is not taken apart; the probe turns it into an error with the module's name."""


def _attention_bias(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Returns both masks as one additive term that broadcasts to (batch, heads, length, length); True means hidden."""
    bias = None
    if attn_mask is not None:
        bias = _additive(attn_mask, dtype)
        if bias.ndim == 3:
            bias = bias.view(batch, heads, *bias.shape[1:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype)[:, None, None, :]
        bias = padding if bias is None else bias + padding
    return bias


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    if hidden.dtype != torch.bool:
        return hidden.to(dtype)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
