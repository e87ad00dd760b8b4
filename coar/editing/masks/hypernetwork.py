"""The hypernetwork: a small transformer from one feature vector to the logits of a mask, one row per gated tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.index.kinds import Anatomy
from ablate.index.structure import sizes
from coar.editing.masks.settings import MetaSettings

NORM_EPS = 1e-6
INIT_STD = 0.02
CLAMP_TRAINING = 1e-5
CLAMP_USE = 1e-7
_HEADS_WITHOUT_MODEL = 8  # of a model without attentions
_RATIO_WITHOUT_MODEL = 4.0  # of one without feed-forward networks


@dataclass(frozen=True)
class NetworkShape:
    """Everything that decides the tensors of a hypernetwork; widths come from the model and the mask's rows.

    Attributes:
      feature: Width of the feature.
      width, blocks, heads, hidden: Of the transformer.
      rows: Bits per row of the mask.
      shared_head: One output layer for all rows.
    """

    feature: int
    width: int
    blocks: int
    heads: int
    hidden: int
    rows: tuple[int, ...]
    shared_head: bool

    @classmethod
    def of(cls, model: nn.Module, feature: int, rows: Sequence[int], settings: MetaSettings) -> NetworkShape:
        """Returns the shape that the settings mean for this model, feature width and mask rows."""
        anatomy = Anatomy(model)
        width = settings.width or feature
        most = settings.attention_heads or max(
            (attention.heads for attention in anatomy.attentions.values()), default=_HEADS_WITHOUT_MODEL
        )
        heads = next(count for count in range(min(most, width), 0, -1) if width % count == 0)
        ratio = settings.ffn_ratio
        if ratio is None:
            ratio = _ratio_of(anatomy)
        hidden = max(1, round(ratio * width))
        return cls(feature, width, settings.blocks, heads, hidden, tuple(rows), settings.shared_head)

    def describe(self) -> dict[str, Any]:
        """Returns the shape, JSON-able."""
        return {**asdict(self), "rows": list(self.rows)}


def _ratio_of(anatomy: Anatomy) -> float:
    for network in anatomy.feed_forwards.values():
        hidden, width = sizes(anatomy.modules[network.second.module])
        return hidden / width
    return _RATIO_WITHOUT_MODEL


class _Block(nn.Module):
    """A transformer block: normalise, attend, add; normalise, feed forward, add."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class Hypernetwork(nn.Module):
    """The network alone. `forward` returns the logits of a mask, (samples, bits), from features (samples, width).

    One learnable token per row of the mask, zero at the start, and the feature as one token more; no positions, no last
    normalisation. A row's logits are a linear function of its token.

    Args:
      shape: From `NetworkShape.of`.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Parameter(torch.zeros(1, len(shape.rows), shape.width))
        self.project = nn.Linear(shape.feature, shape.width) if shape.feature != shape.width else nn.Identity()
        self.blocks = nn.Sequential(*(_Block(shape.width, shape.heads, shape.hidden) for _ in range(shape.blocks)))
        # a shared head is as wide as the longest row, and shorter rows take its first outputs
        outputs = (max(shape.rows),) if shape.shared_head else shape.rows
        self.heads = nn.ModuleList(nn.Linear(shape.width, bits) for bits in outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def streams(self, feature: Tensor) -> Tensor:
        """Returns what the transformer makes of the rows' tokens, (samples, rows, width)."""
        tokens = self.tokens.expand(len(feature), -1, -1)
        out: Tensor = self.blocks(torch.cat([tokens, self.project(feature)[:, None]], dim=1))
        return out[:, :-1]

    def forward(self, feature: Tensor) -> Tensor:
        """Returns logits (samples, bits) of features (samples, width)."""
        rows = self.streams(feature)
        heads = list(self.heads) * len(self.shape.rows) if self.shape.shared_head else list(self.heads)
        return torch.cat(
            [head(rows[:, i])[:, :bits] for i, (head, bits) in enumerate(zip(heads, self.shape.rows, strict=True))],
            dim=1,
        )


def mask_of(logits: Tensor, slope: float, clamp: float) -> Tensor:
    """Returns the mask of logits, sigmoid(slope * logit) kept `clamp` away from 0 and 1."""
    return torch.sigmoid(slope * logits).clamp(clamp, 1 - clamp)
