"""Bits of a mask: exactly as many as asked for, ties by index, or all above a threshold."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coar.editing.masks.binarise import binarise, bits_at
from coar.errors import EditError


@pytest.mark.parametrize(
    ("density", "k"), [(0.75, 13_824), (0.5, 9_216), (0.25, 4_608), (0.1, 1_843), (0.05, 921), (1.0, 18_432)]
)
def test_exactly_k_of_vit_base(density: float, k: int) -> None:
    # the published code takes one less (920 at 0.05): `>` the k-th value
    mask = torch.rand(18_432, generator=torch.Generator().manual_seed(0))
    bits = binarise(mask, density=density)
    assert int(bits.sum()) == k == bits_at(density, 18_432)
    assert k == len(mask) or mask[bits].min() > mask[~bits].max()


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.integers(1, 40))
def test_ties_go_by_index(values: list[float], k: int) -> None:
    k = min(k, len(values))
    bits = binarise(torch.tensor(values), density=k / len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert torch.nonzero(bits).flatten().tolist() == sorted(expected)


def test_a_saturated_mask_still_gives_k_bits() -> None:
    # the published code selects nothing where the top values tie
    mask = torch.sigmoid(torch.full((100,), 200.0))
    assert torch.nonzero(binarise(mask, density=0.29)).flatten().tolist() == list(range(29))


def test_density_1_is_everything() -> None:
    assert binarise(torch.zeros(7), density=1).all()


def test_a_threshold_takes_what_is_above_it() -> None:
    mask = torch.tensor([1e-7, 0.2, 0.5, 0.9])
    assert binarise(mask, threshold=0.5).tolist() == [False, False, False, True]
    assert binarise(mask, threshold=0).all()  # "rho = 0 edits everything"


@pytest.mark.parametrize(
    ("mask", "choice", "message"),
    [
        (
            [0.5],
            {"density": 0.5, "threshold": 0.5},
            "A mask needs a density or a threshold, not both: both are given. Leave the other one None.",
        ),
        ([0.5], {}, "A mask needs a density or a threshold, not both: neither is given. Leave the other one None."),
        ([0.5], {"density": 1.5}, "density is 1.5, expected a share above 0 and up to 1, e.g. 0.05."),
        ([0.5], {"density": 0}, "density is 0, expected a share above 0 and up to 1, e.g. 0.05."),
        ([0.5], {"threshold": 1.0}, "threshold is 1.0, expected a number from 0 (every bit) to below 1."),
        (
            [0.5] * 12,
            {"density": 0.05},
            "density 0.05 of 12 components is 0.6: none would be selected. Give at least 0.0833.",
        ),
        (
            [0.25, 0.5],
            {"threshold": 0.5},
            "No value of the mask is above the threshold 0.5, the largest is 0.5. Lower the threshold, or give a "
            "density.",
        ),
        (
            [0.25, float("nan")],
            {"density": 0.5},
            "The mask holds values that are not finite: check the inputs and the hypernetwork's training.",
        ),
        (
            [[0.5, 0.5]],
            {"density": 0.5},
            "The mask has shape (1, 2), expected (bits,): one mask, averaged over samples.",
        ),
    ],
)
def test_what_cannot_be_made_bits(mask: Any, choice: dict[str, float], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        binarise(torch.tensor(mask), **choice)
