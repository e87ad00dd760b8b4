"""The hypernetwork: its size, its tokens, and what it returns for a batch."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from coar.editing.masks.hypernetwork import CLAMP_TRAINING, Hypernetwork, NetworkShape, mask_of
from coar.editing.masks.settings import MetaSettings

SMALL = NetworkShape(feature=24, width=24, blocks=2, heads=3, hidden=24, rows=(5, 7, 2), shared_head=False)


def _of_vit_base(**settings: Any) -> Hypernetwork:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
        chosen = MetaSettings.preset(settings.pop("preset", "code"), **settings)
        return Hypernetwork(NetworkShape.of(model, 768, [3072] * 6, chosen))


def _millions(network: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)


@pytest.mark.parametrize(("blocks", "millions"), [(1, 17.7), (3, 24.8), (5, 31.9)])
def test_the_published_parameter_counts(blocks: int, millions: float) -> None:
    assert _millions(_of_vit_base(blocks=blocks)) == millions


def test_the_papers_text_mirrors_the_base_model_and_has_one_head() -> None:
    network = _of_vit_base(preset="paper")
    shape = network.shape
    assert (shape.blocks, shape.width, shape.heads, shape.hidden, shape.shared_head) == (5, 768, 12, 3072, True)
    assert _millions(network) == 37.8


def test_the_code_has_six_heads_and_a_narrow_feed_forward() -> None:
    shape = _of_vit_base().shape
    assert (shape.blocks, shape.width, shape.heads, shape.hidden) == (3, 768, 6, 768)


@pytest.mark.parametrize(("width", "heads"), [(64, 4), (384, 6), (7, 1), (10, 5)])
def test_attention_heads_divide_the_width(width: int, heads: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    shape = NetworkShape.of(model, width, [3], MetaSettings())
    assert shape.heads == heads
    Hypernetwork(shape)(torch.randn(2, width))


def test_tokens_are_zero_and_their_streams_identical_at_first() -> None:
    network = Hypernetwork(SMALL)
    assert not network.tokens.any()
    streams = network.streams(torch.randn(4, 24))
    assert streams.shape == (4, 3, 24)
    for row in (1, 2):
        torch.testing.assert_close(streams[:, row], streams[:, 0], rtol=0, atol=1e-6)
    assert streams.std() > 0


@pytest.mark.parametrize("shared", [False, True])
def test_rows_may_differ_in_length(shared: bool) -> None:
    network = Hypernetwork(NetworkShape(24, 16, 1, 2, 32, (5, 7, 2), shared))
    assert network(torch.randn(4, 24)).shape == (4, 14)
    assert len(network.heads) == (1 if shared else 3)


def test_permuting_the_batch_permutes_the_masks() -> None:
    network, feature, order = Hypernetwork(SMALL), torch.randn(6, 24), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        torch.testing.assert_close(network(feature[order]), network(feature)[order], rtol=1e-5, atol=1e-6)


def test_the_mask_is_a_clamped_sigmoid() -> None:
    logits = torch.tensor([-100.0, 0.0, 0.5, 100.0])
    expected = [CLAMP_TRAINING, 0.5, 1 / (1 + torch.tensor(-1.5).exp()), 1 - CLAMP_TRAINING]
    torch.testing.assert_close(mask_of(logits, 3.0, CLAMP_TRAINING), torch.tensor(expected))
