"""Modules with gates in them: a layer between its gates, and `nn.MultiheadAttention` taken apart."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from ablate.gating.attention import attention_forward
from ablate.gating.gates import EVERY_ROW, Gates
from ablate.gating.uses import WeightRows, linear_rows


class GatedLayer(nn.Module):
    """Mixed into a copy of a layer's class: the layer's forward between its gates; plain while no gates are set."""

    gates: Gates
    channels: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output with its gates applied."""
        x = self.gates.close_input(x, self.channels)
        y: Tensor = super().forward(x, *args, **kwargs)
        return self.gates.close_output(y, cast("Tensor | None", self.bias), self.channels, EVERY_ROW)


@cache
def gated_class(layer: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of a layer with gates around its forward."""
    return type(f"Gated{layer.__name__}", (GatedLayer, layer), {"__module__": layer.__module__})


class GatedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` taken apart, with gates at its projections; plain while no gates are set.

    Its own forward calls one fused function with all the weights, which no layer inside can see.
    """

    parts: dict[str, Gates]  # by role: in, q, k, v, out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the attention's output and, if asked, its weights; the signature is torch's."""
        if not any(gates.closed_somewhere for gates in self.parts.values()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        flip = self.batch_first and query.ndim == 3
        if flip:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        packed = self._qkv_same_embed_dim
        out, shares = attention_forward(
            self._project,
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not packed,
            q_proj_weight=None if packed else self.q_proj_weight,
            k_proj_weight=None if packed else self.k_proj_weight,
            v_proj_weight=None if packed else self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if flip else out), shares

    def _project(
        self, role: str, x: Tensor, weight: Tensor, bias: Tensor | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        rows = WeightRows(start, len(weight) if stop is None else stop)
        if role not in self.parts:
            return linear_rows(x, weight, bias, rows)[0]
        gates = self.parts[role]
        x = gates.close_input(x, -1)
        y, offset = linear_rows(x, weight, bias, rows)
        return gates.close_output(y, offset, -1, slice(rows.start, rows.stop))


ROLES = {
    "in_proj_weight": "in",
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
    "out_proj.weight": "out",
}
