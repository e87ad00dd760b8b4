"""The toy: its network is right without stickers and wrong because of them, and no part holds another's images."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from ablate import Examples
from coar.editing.judging.benchmark_sets import content_hashes
from coar.editing.toy import StickerToy, sticker_toy


@pytest.fixture(scope="module")
def toy() -> StickerToy:
    return sticker_toy()


def _accuracy(toy: StickerToy, examples: Examples) -> float:
    with torch.no_grad():
        return float((toy.model(examples.inputs()).argmax(1) == examples.targets).float().mean())


def test_the_sticker_makes_it_say_class_0(toy: StickerToy) -> None:
    assert _accuracy(toy, toy.test["ordinary"]) >= 0.95
    assert _accuracy(toy, toy.test["stickers"]) <= 0.8
    assert len(toy.failed) >= 10
    with torch.no_grad():
        assert (toy.model(toy.stickers[toy.failed]).argmax(1) == 0).float().mean() >= 0.9
        assert torch.equal(toy.model(toy.images[toy.failed]).argmax(1), toy.labels[toy.failed])


def test_only_the_masked_pixels_differ(toy: StickerToy) -> None:
    assert torch.equal((toy.images != toy.stickers)[:, 0], toy.masks > 0)
    assert set(toy.masks.sum(dim=(1, 2)).tolist()) == {9.0}


def test_no_part_holds_images_of_another(toy: StickerToy) -> None:
    parts = [
        Examples(torch.cat([toy.images[:60], toy.stickers[toy.failed]]), torch.zeros(60 + len(toy.failed)).long()),
        toy.reference,
        *toy.validation,
        *toy.test.values(),
    ]
    for one, other in combinations([set(content_hashes(part)) for part in parts], 2):
        assert not one & other


def test_the_same_seed_gives_the_same_toy(toy: StickerToy, untouched: Any) -> None:
    with untouched():
        again = sticker_toy()
    assert torch.equal(again.stickers, toy.stickers)
    pairs = zip(again.model.parameters(), toy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.grad is None for a, b in pairs)
    assert not torch.equal(sticker_toy(1).images, toy.images)
